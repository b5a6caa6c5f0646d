"""Predicted memory against memory really allocated, at sizes a CPU can run."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mogan.costs.calls import build_transformer, judge_call, transformer_calls
from mogan.costs.codec import Codec, estimate_flow
from mogan.costs.shapes import Shapes
from mogan.models.autoencoder import decode_window, encode_video, stream_video
from mogan.models.denoiser import Denoiser, recomputed
from mogan.models.discriminator import Discriminator
from mogan.motion.flow import RaftConfig, RaftFlow


@dataclass(frozen=True)
class Case:
    """One call at one size: bytes predicted and bytes allocated, weights and their gradients left out."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def allocated_peak(call: Callable[[], Any]) -> float:
    """Most bytes ``call`` allocates at once, above what was there: every allocation of PyTorch's, as its profiler saw it.

    The call runs twice and the second time counts: then weights have their gradients, as from the second part of a batch
    on. Tensors are a CPU's.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def small(shapes: Shapes, layers: int, width_share: int) -> Shapes:
    """The same model with fewer and narrower layers."""
    transformer = shapes.transformer | {
        "num_layers": layers,
        "num_attention_heads": max(1, shapes.transformer["num_attention_heads"] // width_share),
        "ffn_dim": shapes.transformer["ffn_dim"] // width_share,
        "text_dim": shapes.transformer["text_dim"] // width_share,
    }
    vae = shapes.vae | {"base_dim": shapes.vae.get("base_dim", 96) // width_share}
    if "decoder_base_dim" in vae:
        vae["decoder_base_dim"] //= width_share
    return replace(shapes, transformer=transformer, vae=vae)


def compare(shapes: Shapes, *, window: int, text_tokens: int = 128) -> Iterator[Case]:
    """Run each call of a motion update for real, in fp32, beside its prediction."""
    torch.manual_seed(0)
    latent, size = torch.randn(1, *shapes.latent), shapes.size
    text = torch.randn(1, text_tokens, shapes.transformer["text_dim"])
    for checkpointing in (False, True):
        network = build_transformer(shapes).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        denoiser = Denoiser(network)
        _, predicted = transformer_calls(shapes, checkpointing, torch.float32)
        real = allocated_peak(partial(_backward, denoiser, latent, torch.full((1,), 0.5), text))
        yield Case(f"transformer, checkpointing {checkpointing}", predicted.peak, real)
        del network, denoiser

    layers = shapes.transformer["num_layers"]
    taps = tuple(range(layers))[-3:]
    judge = Discriminator(build_transformer(shapes), text, blocks=layers, tap_at=taps).train()
    judge.transformer.enable_gradient_checkpointing(recomputed)
    predicted, _ = judge_call(shapes, layers, len(taps), shapes.latent[1], True, torch.float32, learns=True)
    real = allocated_peak(lambda: judge(latent).sum().backward())
    yield Case("discriminator", predicted.peak, real)

    codec = Codec(shapes, torch.float32)
    vae = codec.vae.to_empty(device="cpu")
    for parameter in vae.parameters():
        parameter.data.normal_(0, 0.02)
    start = shapes.latent[1] - window
    z = latent.clone().requires_grad_(True)
    predicted = Codec(shapes, torch.float32).decode(window, start, True, True)
    real = allocated_peak(lambda: _gradient(decode_window(vae, z, start, window), z))
    yield Case(f"decode, window of {window}", predicted.peak, real)
    real = allocated_peak(lambda: deque(stream_video(vae, latent), maxlen=0))
    yield Case("decode, frame by frame", Codec(shapes, torch.float32).stream().peak, real)
    frames = 4 * window - 3
    video = torch.randn(1, 3, frames, size.height, size.width, requires_grad=True)
    predicted = Codec(shapes, torch.float32).encode(frames, True, True)
    real = allocated_peak(lambda: _gradient(encode_video(vae, video), video))
    yield Case(f"encode, {frames} frames", predicted.peak, real)
    flow = RaftFlow(RaftConfig().build(), 4, 4)
    predicted = estimate_flow(flow, shapes, frames, True, True)
    real = allocated_peak(lambda: _gradient(flow(video), video))
    yield Case(f"flow, {frames} frames", predicted.peak, real)


def _backward(network: Callable[..., Tensor], *inputs: Tensor) -> None:
    network(*inputs).sum().backward()


def _gradient(out: Tensor, of: Tensor) -> None:
    of.grad = None
    out.sum().backward()
