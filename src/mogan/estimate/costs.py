"""What each call of a training step costs, traced on the real networks at the real shapes, batch 1.

Depth and windows repeat equal pieces, so each network is traced at two small depths or lengths and the line through them
followed; ``tests/test_estimate.py`` compares that line with the whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torchvision.models.optical_flow import raft_large

from mogan.config import Config, GANConfig
from mogan.denoiser import Denoiser
from mogan.discriminator import Discriminator
from mogan.estimate.shapes import Shapes
from mogan.estimate.trace import Call, Work, fake, sizes, trace
from mogan.flow import RaftConfig, RaftFlow, motion_picture
from mogan.wan import decode_window, encode_video, fold_padding

TEXT_TOKENS = 128  # a long caption; cross-attention to the padding is folded into one token


@dataclass(frozen=True)
class Costs:
    """Calls at batch 1, and parameters, of everything a recipe uses.

    Attributes:
        forward: the transformer without gradient; ``train``: with, and its backward pass.
        judge: the discriminator, forward and backward, its weights learning; ``judge_frozen``: only its input's gradient.
        observe: window decode, flow and encode without gradient; ``observe_grad``: with.
        decode: of a whole clip, for sampling.
        parameters: of ``transformer``, ``block`` (one of its blocks), ``adapters`` (per rank), ``discriminator``, ``vae``,
            ``flow``, ``text_encoder``.
    """

    forward: Call
    train: Call
    decode: Call
    parameters: Mapping[str, int]
    observe: Call | None = None
    observe_grad: Call | None = None
    judge: Call | None = None
    judge_frozen: Call | None = None


def measure_costs(config: Config, shapes: Shapes, say: Callable[[str], None] = lambda text: None) -> Costs:
    """Trace every call a recipe makes. Takes seconds to a minute; nothing is allocated."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    with fake():
        say("transformer")
        forward, train = _transformer(shapes, config.checkpointing, dtype)
        say("autoencoder")
        vae = _vae(shapes, dtype)
        decode = _decode(vae, shapes, length=shapes.latent[1], start=0, grad=False, checkpointing=False)
        costs: dict[str, Any] = {"forward": forward, "train": train, "decode": decode}
        parameters = _parameters(shapes)
        if config.gan is not None:
            if config.gan.space == "motion":
                say("optical flow")
                flow, parameters["flow"] = _flow(config.gan)
                costs["observe"] = _observe(vae, flow, shapes, config.gan, False, config.checkpointing)
                costs["observe_grad"] = _observe(vae, flow, shapes, config.gan, True, config.checkpointing)
            say("discriminator")
            costs["judge"], parameters["discriminator"] = _judge(config, shapes, dtype, learns=True)
            costs["judge_frozen"], _ = _judge(config, shapes, dtype, learns=False)
    return Costs(parameters=parameters, **costs)


# ---------------------------------------------------------------------------------------------- transformers


def build_transformer(shapes: Shapes, layers: int | None = None) -> Any:
    """A Wan transformer of this shape (on whatever device is current), at another depth if asked."""
    config = {k: v for k, v in shapes.transformer.items() if not k.startswith("_")}
    return fold_padding(WanTransformer3DModel(**config | ({} if layers is None else {"num_layers": layers})))


def _parameters(shapes: Shapes) -> dict[str, int]:
    """Exact counts, from two depths."""
    one, two = (sizes(build_transformer(shapes, n))[0] for n in (1, 2))
    width = shapes.transformer["num_attention_heads"] * shapes.transformer["attention_head_dim"]
    layers, ffn = shapes.transformer["num_layers"], shapes.transformer["ffn_dim"]
    text = shapes.text_encoder
    inner = text["num_heads"] * text["d_kv"]
    gated = 3 if str(text.get("feed_forward_proj", "gated-gelu")).startswith("gated") else 2
    buckets = text.get("relative_attention_num_buckets", 32) * text["num_heads"]
    layer = 4 * text["d_model"] * inner + gated * text["d_model"] * text["d_ff"] + 2 * text["d_model"] + buckets
    return {
        "transformer": one + (layers - 1) * (two - one),
        "block": two - one,
        "adapters": layers * (8 * 2 * width + 2 * (width + ffn)),  # per rank; eight square matrices and two of the MLP
        "vae": sizes(AutoencoderKLWan(**_known(shapes.vae)))[0],
        "text_encoder": text["vocab_size"] * text["d_model"] + text["num_layers"] * layer + text["d_model"],
    }


def _transformer(shapes: Shapes, checkpointing: bool, dtype: torch.dtype) -> tuple[Call, Call]:
    """One call without gradient, one with; at full depth."""
    x, sigma = torch.randn(1, *shapes.latent), torch.full((1,), 0.5)
    text = torch.randn(1, TEXT_TOKENS, shapes.transformer["text_dim"])
    calls: dict[bool, list[Call]] = {False: [], True: []}
    for layers in (1, 2):
        network = build_transformer(shapes, layers).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        denoiser = Denoiser(network, dtype)
        for backward, found in calls.items():
            found.append(trace(network.parameters(), lambda d=denoiser: d(x, sigma, text), backward=backward))
    more = shapes.transformer["num_layers"] - 1
    forward, train = (one.along(two, more) for one, two in calls.values())
    return forward, train


def _judge(config: Config, shapes: Shapes, dtype: torch.dtype, *, learns: bool) -> tuple[Call, int]:
    """The discriminator on one observation, and its number of parameters."""
    gan = cast(GANConfig, config.gan)
    channels, frames, height, width = shapes.latent
    seen = torch.randn(1, channels, gan.window if gan.space == "motion" else frames, height, width, requires_grad=not learns)
    text = torch.randn(1, TEXT_TOKENS, shapes.transformer["text_dim"])
    calls, counts = [], []
    for blocks in (1, 2):
        at = (blocks - 1,) * len(gan.taps)  # heads cost the same wherever they read
        network = Discriminator(build_transformer(shapes, blocks), text, blocks=blocks, tap_at=at, dtype=dtype)
        if config.checkpointing:
            network.transformer.enable_gradient_checkpointing()
        network.train().requires_grad_(learns)
        counts.append(sizes(network)[0])
        calls.append(trace(network.parameters(), lambda n=network: n(seen), backward=True))
    return calls[0].along(calls[1], gan.blocks - 1), counts[0] + (gan.blocks - 1) * (counts[1] - counts[0])


# ---------------------------------------------------------------------------------------------- autoencoder and flow


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``AutoencoderKLWan`` among a config file's entries."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "clip_output"}


def _vae(shapes: Shapes, dtype: torch.dtype) -> AutoencoderKLWan:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return AutoencoderKLWan(**_known(shapes.vae)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def _flow(gan: GANConfig) -> tuple[RaftFlow | None, int]:
    """The recipe's RAFT with random weights; None for a classical estimator, whose cost is the CPU's."""
    if gan.flow == "farneback":
        return None, 0
    with torch._C._DisableTorchDispatch():
        network = RaftConfig().build() if gan.flow == "lab" else raft_large()
    return RaftFlow(network, gan.flow_iterations), sizes(network)[0]


def _decode(
    vae: AutoencoderKLWan, shapes: Shapes, *, length: int, start: int, grad: bool, checkpointing: bool
) -> Call:
    """Decode of ``length`` latent frames after ``start`` others; frames from the third on cost the same."""
    channels, _, height, width = shapes.latent

    def call(first: int, count: int) -> Call:
        z = torch.randn(1, channels, first + count, height, width, requires_grad=grad)
        return trace((), lambda: decode_window(vae, z, first, count, checkpointing), backward=grad)

    if not grad:  # nothing is kept but the frames: as one window from the start
        whole = start + length
        if whole <= 3:
            return call(start, length)
        return call(0, 3).along(call(0, 4), whole - 3)
    if length <= 2:
        return call(start, length)
    prefix = call(0, 2)
    found = call(2, 1).along(call(2, 2), length - 1)
    more = _decode(vae, shapes, length=start, start=0, grad=False, checkpointing=False) if start > 2 else prefix
    return Call(found.work + more.work - prefix.work, found.held, found.peak)


def _encode(vae: AutoencoderKLWan, shapes: Shapes, frames: int, grad: bool, checkpointing: bool) -> Call:
    size = shapes.size

    def call(count: int) -> Call:
        video = torch.randn(1, 3, count, size.height, size.width, requires_grad=grad)
        return trace((), lambda: encode_video(vae, video, checkpointing), backward=grad)

    return call(frames) if frames <= 9 else call(9).along(call(13), (frames - 9) / 4)


def _estimate_flow(flow: RaftFlow | None, shapes: Shapes, frames: int, grad: bool, checkpointing: bool) -> Call:
    """RAFT on a window: chunks of pairs one after the other, ``iterations`` refinements each."""
    if flow is None:
        return Call(Work(), 0.0, 0.0)
    size, pairs = shapes.size, min(flow.pairs_per_chunk, frames - 1)
    flow.checkpointing = checkpointing
    wanted, calls = flow.iterations, []
    for flow.iterations in (1, 2):
        video = torch.randn(1, 3, pairs + 1, size.height, size.width, requires_grad=grad)
        calls.append(trace((), lambda v=video: flow(v), backward=grad))
    flow.iterations = wanted
    chunk = calls[0].along(calls[1], wanted - 1)
    chunks = (frames - 1) / pairs
    held = chunk.held * chunks
    return Call(chunk.work * chunks, held, held - chunk.held + chunk.peak)


def _observe(
    vae: AutoencoderKLWan, flow: RaftFlow | None, shapes: Shapes, gan: GANConfig, grad: bool, checkpointing: bool
) -> Call:
    """Decode, flow, picture, encode: one after the other, what is held adds up. The mean over the window's starts."""
    frames = 4 * gan.window - 3
    start = round(sum(gan.starts) / len(gan.starts))
    decode = _decode(vae, shapes, length=gan.window, start=start, grad=grad, checkpointing=checkpointing)
    estimate = _estimate_flow(flow, shapes, frames, grad, checkpointing)
    fields = torch.randn(1, 2, frames - 1, shapes.size.height, shapes.size.width, requires_grad=grad)
    picture = trace((), lambda: motion_picture(fields, gan.max_flow), backward=grad)
    encode = _encode(vae, shapes, frames, grad, checkpointing)
    held, peak, work = 0.0, 0.0, Work()
    for stage in (decode, estimate, picture, encode):
        peak = max(peak, held + stage.peak)
        held, work = held + stage.held, work + stage.work
    return Call(work, held, peak)

