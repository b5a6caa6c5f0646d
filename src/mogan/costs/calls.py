"""What each call of a training step costs, traced on the real networks at the real shapes, batch 1.

Depth and windows repeat equal pieces, so each network is traced at two small depths or lengths and the line through them
followed; ``tests/test_estimate.py`` compares that line with the whole.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel

from mogan.costs.codec import Codec, arguments, estimate_flow, random_flow
from mogan.costs.shapes import Shapes
from mogan.costs.trace import Call, Work, fake, sizes, trace
from mogan.models.attention import set_attention
from mogan.models.conditions import channels_beside, conditioned, is_vace
from mogan.models.denoiser import Denoiser, recomputed
from mogan.models.discriminator import Discriminator
from mogan.models.frame_sparse import set_frame_sparse
from mogan.models.host import kept_on_host
from mogan.models.step_condition import arguments_of
from mogan.motion.flow import RaftFlow, motion_picture

TEXT_TOKENS = 128  # a long caption; cross-attention to the padding is folded into one token
PICTURE_TOKENS = 257  # of Wan2.1's image encoder


class Tracer:
    """Traces the calls of one model, batch 1, each once; nothing is allocated.

    Attributes:
        shapes: of the model.
        checkpointing: activations are recomputed in the backward pass.
        dtype: networks compute in it.
        offload: as :attr:`mogan.config.Config.offload`.
        given: latent frames that are given at level 0: every frame then has a level of its own.
    """

    def __init__(
        self,
        shapes: Shapes,
        checkpointing: bool,
        dtype: torch.dtype,
        say: Callable[[str], None] = lambda text: None,
        offload: bool = False,
        given: int = 0,
    ):
        self.shapes, self.checkpointing, self.dtype, self.say, self.offload = shapes, checkpointing, dtype, say, offload
        self.given = given
        self._known: dict[tuple, Any] = {}

    def once(self, key: tuple, call: Callable[[], Any]) -> Any:
        """What ``call`` returns, made the first time that ``key`` is asked for; its first word is what is being traced."""
        if key not in self._known:
            self.say(str(key[0]))
            with kept_on_host(self.offload):
                self._known[key] = call()
        return self._known[key]

    @property
    def forward(self) -> Call:
        """The transformer without gradient."""
        return self._transformer()[0]

    @property
    def train(self) -> Call:
        """The transformer, forward and backward."""
        return self._transformer()[1]

    @property
    def student(self) -> tuple[Call, Call]:
        """The student without gradient and with: the transformer, or where the shapes say so a frame-sparse one."""
        if self.shapes.references is None:
            return self._transformer()
        return self.once(("frame-sparse transformer",), self._sparse)

    def _sparse(self) -> tuple[Call, Call]:
        """Blocks cost what all would cost alike, each its share; what comes and goes is the largest block's."""
        counts = Counter(self.shapes.references)
        shares = [count / counts.total() for count in counts.values()]
        settings = (self.shapes, self.checkpointing, self.dtype, self.given)
        found = [transformer_calls(*settings, number) for number in counts]
        forward, train = (_mean(calls, shares) for calls in zip(*found, strict=True))
        return forward, train

    def _transformer(self) -> tuple[Call, Call]:
        return self.once(
            ("transformer",), lambda: transformer_calls(self.shapes, self.checkpointing, self.dtype, self.given)
        )

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: ``transformer``, ``block`` (one of its blocks), ``rest`` (what is outside them), ``adapters``
        (per rank), ``vae``, ``text_encoder``; ``told`` and ``told_adapters`` (per rank): more of a transformer that is told where
        its step ends.
        """
        return self.once(("parameters",), lambda: network_parameters(self.shapes))

    def codec(self, dtype: torch.dtype | None = None) -> Codec:
        """The autoencoder."""
        dtype = dtype or self.dtype
        return self.once(("autoencoder", dtype), lambda: Codec(self.shapes, dtype, self.offload))

    def encoder_parameters(self) -> int:
        """Of the autoencoder's encoder."""
        return sizes(self.codec().vae.encoder)[0]

    @property
    def decode(self) -> Call:
        """Of a whole clip at once."""
        return self.codec().decode(self.shapes.latent[1])

    @property
    def stream(self) -> Call:
        """Of a clip frame by frame, for sampling."""
        return self.codec().stream()

    def flow(self, name: str, iterations: int) -> tuple[RaftFlow | None, int]:
        """The recipe's RAFT with random weights, and its parameters; None for a classical estimator, whose cost is the CPU's."""
        return self.once(("optical flow", name, iterations), lambda: random_flow(name, iterations, self.offload))

    def flow_fields(self, name: str, iterations: int, frames: int) -> Call:
        """Flow between so many frames, without gradient."""
        flow, _ = self.flow(name, iterations)
        key = ("optical flow", name, iterations, frames)
        return self.once(key, lambda: estimate_flow(flow, self.shapes, frames, False, False))

    def check(self, name: str, iterations: int) -> Call:
        """A clip decoded frame by frame, and the flow of each latent frame's four with the one before them."""
        pairs = self.shapes.size.frames - 1
        piece, stream = self.flow_fields(name, iterations, min(pairs, 4) + 1), self.stream
        peak = max(stream.peak, stream.held + piece.peak)
        return Call(stream.work + piece.work * (pairs / min(pairs, 4)), 0.0, peak)


# ---------------------------------------------------------------------------------------------- transformers


def kind_of(shapes: Shapes) -> type:
    """The stock class of the transformer."""
    return WanVACETransformer3DModel if is_vace(shapes.transformer) else WanTransformer3DModel


def build_transformer(shapes: Shapes, layers: int | None = None, readers: int = 1) -> Any:
    """A Wan transformer of this shape (on whatever device is current), at another depth if asked: a VACE then with so many
    blocks that read a control.
    """
    config = arguments_of(kind_of(shapes), shapes.transformer)
    if layers is not None:
        more = {"vace_layers": list(range(readers))} if is_vace(config) else {}
        config |= {"num_layers": layers} | more
    return set_attention(kind_of(shapes)(**config), fp32_on_cpu=False)


def _depths(shapes: Shapes) -> list[tuple[int, int]]:
    """Small depths, and numbers of blocks that read a control, through which :func:`_at_depth` draws its line."""
    return [(1, 1), (2, 1), *([(2, 2)] if is_vace(shapes.transformer) else [])]


def _at_depth(found: list[Call], shapes: Shapes, layers: int) -> Call:
    """A call of a transformer of so many layers, all blocks that read a control included."""
    line = found[0].along(found[1], layers - 1)
    readers = len(shapes.transformer.get("vace_layers") or ()) - 1
    return line.along(found[2], readers, shorter=found[1]) if len(found) > 2 else line


def _control(shapes: Shapes) -> torch.Tensor | None:
    """A control of one clip, if the transformer reads any."""
    vace, beside = is_vace(shapes.transformer), channels_beside(shapes.transformer)
    channels = shapes.transformer.get("vace_in_channels", 96) if vace else beside
    return torch.empty(1, channels, *shapes.latent[1:]) if channels else None


def _picture(shapes: Shapes) -> torch.Tensor | None:
    """What an image encoder sees of a first frame, if the transformer reads it."""
    width = shapes.transformer.get("image_dim")
    return torch.empty(1, PICTURE_TOKENS, width) if width else None


def network_parameters(shapes: Shapes) -> dict[str, int]:
    """Exact counts, from two depths."""
    with torch.device("meta"):
        one, two, *more = (sizes(build_transformer(shapes, *depth))[0] for depth in _depths(shapes))
        vae = sizes(AutoencoderKLWan(**arguments(shapes.vae)))[0]
    width = shapes.transformer["num_attention_heads"] * shapes.transformer["attention_head_dim"]
    layers, ffn = shapes.transformer["num_layers"], shapes.transformer["ffn_dim"]
    text, waves = shapes.text_encoder, shapes.transformer.get("freq_dim", 256)
    inner = text["num_heads"] * text["d_kv"]
    gated = 3 if str(text.get("feed_forward_proj", "gated-gelu")).startswith("gated") else 2
    buckets = text.get("relative_attention_num_buckets", 32) * text["num_heads"]
    readers = len(shapes.transformer.get("vace_layers") or ())
    rest = one - (two - one) + sum(more[0] - two for _ in range(readers - 1))
    layer = 4 * text["d_model"] * inner + gated * text["d_model"] * text["d_ff"] + 2 * text["d_model"] + buckets
    return {
        "transformer": rest + layers * (two - one),
        "block": two - one,
        "rest": rest,
        # per rank and block; eight square matrices and two of the MLP
        "adapters": (layers + readers) * (8 * 2 * width + 2 * (width + ffn)),
        "told": waves * width + width + width * width + width,
        "told_adapters": waves + 3 * width,
        "vae": vae,
        "text_encoder": text["vocab_size"] * text["d_model"] + text["num_layers"] * layer + text["d_model"],
    }


def _mean(calls: Sequence[Call], shares: Sequence[float]) -> Call:
    """Of calls of networks as deep and wide, one in which each has a share of the blocks."""
    work = sum((call.work * share for call, share in zip(calls, shares, strict=True)), Work())
    held = sum(call.held * share for call, share in zip(calls, shares, strict=True))
    return replace(calls[0], work=work, held=held, peak=held + max(call.peak - call.held for call in calls))


def transformer_calls(
    shapes: Shapes, checkpointing: bool, dtype: torch.dtype, given: int = 0, references: int | None = None
) -> tuple[Call, Call]:
    """One call without gradient, one with; at full depth. ``given``: see :class:`Tracer`; with so many ``references`` in every
    block, or dense.
    """
    calls: dict[bool, list[Call]] = {False: [], True: []}
    with fake():
        x, sigma = torch.empty(1, *shapes.latent), torch.full((1, shapes.latent[1]) if given else (1,), 0.5)
        text = conditioned(
            torch.empty(1, TEXT_TOKENS, shapes.transformer["text_dim"]), _control(shapes), _picture(shapes)
        )
        for depth in _depths(shapes):
            network = build_transformer(shapes, *depth).train()
            if references is not None:
                set_frame_sparse(network, shapes.latent[1], [references] * depth[0])
            if checkpointing:
                network.enable_gradient_checkpointing()
            denoiser = Denoiser(network, dtype)
            for backward, found in calls.items():
                found.append(trace(network.parameters(), partial(denoiser, x, sigma, text), backward=backward))
    forward, train = (_at_depth(found, shapes, shapes.transformer["num_layers"]) for found in calls.values())
    return forward, train


def judge_call(
    shapes: Shapes, blocks: int, heads: int, frames: int, checkpointing: bool, dtype: torch.dtype, *, learns: bool
) -> tuple[Call, int]:
    """A discriminator of so many blocks and heads on one observation of ``frames`` latent frames; its parameters."""
    channels, _, height, width = shapes.latent
    calls, counts = [], []
    with fake():
        seen = torch.empty(1, channels, frames, height, width, requires_grad=not learns)
        text = torch.empty(1, TEXT_TOKENS, shapes.transformer["text_dim"])
        for depth, readers in _depths(shapes):
            at = (depth - 1,) * heads  # heads cost the same wherever they read
            trunk, control = build_transformer(shapes, depth, readers), _control(shapes)
            if is_vace(shapes.transformer):
                trunk.forward = partial(trunk.forward, control_hidden_states=control)
            network = Discriminator(trunk, text, blocks=depth, tap_at=at, dtype=dtype)
            if checkpointing:
                network.transformer.enable_gradient_checkpointing(recomputed)
            if not learns:
                network.requires_grad_(False)
            network.train()
            counts.append(sizes(network)[0])
            calls.append(trace(network.parameters(), partial(network, seen), backward=True))
    return _at_depth(calls, shapes, blocks), counts[0] + (blocks - 1) * (counts[1] - counts[0])


# ---------------------------------------------------------------------------------------------- observation


def observe_calls(
    tracer: Tracer, flow: RaftFlow | None, window: int, start: int, *, grad: bool, part: float | None = None
) -> dict[str, Call]:
    """The stages of an observation of a window from latent frame ``start`` on, in order; the picture is encoded in fp32.

    ``part`` is that of height and width at which flow is estimated; ``None``: all.
    """
    frames, size, checkpointing = 4 * window - 3, tracer.shapes.size, tracer.checkpointing
    coarse = size if part is None else replace(size, height=round(size.height * part), width=round(size.width * part))
    fields = torch.empty(1, 2, frames - 1, size.height, size.width, device="meta", requires_grad=grad)
    return {
        "window decode": tracer.codec().decode(window, start, grad, checkpointing),
        "flow": estimate_flow(flow, replace(tracer.shapes, size=coarse), frames, grad, checkpointing),
        "picture": trace((), lambda: motion_picture(fields, 1.0), backward=grad),
        "encode": tracer.codec(torch.float32).encode(frames, grad, checkpointing),
    }


def one_after_the_other(stages: Iterable[Call]) -> Call:
    """A call made of stages: what each holds stays while the next one runs."""
    held, peak, host, work = 0.0, 0.0, 0.0, Work()
    for stage in stages:
        peak = max(peak, held + stage.peak)
        held, host, work = held + stage.held, host + stage.host, work + stage.work
    return Call(work, held, peak, host=host)
