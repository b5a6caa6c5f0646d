"""What each call of a training step costs, traced on the real networks at the real shapes, batch 1.

Depth and windows repeat equal pieces, so each network is traced at two small depths or lengths and the line through them
followed; ``tests/test_estimate.py`` compares that line with the whole.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torchvision.models.optical_flow import raft_large

from mogan.config import Config, GANConfig, ShiftConfig, SurrogateConfig
from mogan.estimate.shapes import Shapes
from mogan.estimate.trace import Call, Work, fake, sizes, trace
from mogan.models.attention import set_attention
from mogan.models.autoencoder import decode_window, encode_video, stream_video
from mogan.models.denoiser import Denoiser, recomputed
from mogan.models.discriminator import Discriminator
from mogan.motion.flow import RaftConfig, RaftFlow, motion_picture, read_raft_config
from mogan.motion.pixel_flux import state_size
from mogan.objectives.rewards import MotionRewards
from mogan.objectives.surrogate_network import MotionSurrogate

TEXT_TOKENS = 128  # a long caption; cross-attention to the padding is folded into one token


@dataclass(frozen=True)
class Costs:
    """Calls at batch 1, and parameters, of everything a recipe uses.

    Attributes:
        forward: the transformer without gradient; ``train``: with, and its backward pass.
        judge: the discriminator, forward and backward, its weights learning, in fp32 where it is penalised; ``judge_frozen``:
            only its input's gradient; ``judge_predicted``: learning from a surrogate's predictions, never penalised.
        observe: window decode, flow and encode without gradient; ``observe_grad``: with; ``stages``: of the latter.
        decode: of a whole clip at once; ``stream``: frame by frame, for sampling; ``check``: so, with its flow.
        predict: the surrogate of an observation without gradient; ``predict_grad``: with its input's; ``predict_learns``: its weights'.
        pixel_flux: a whole clip decoded, its flow there and back; ``reward``: SHIFT's rewards on it, forward and backward.
        parameters: of ``transformer``, ``block`` (one of its blocks), ``rest`` (what is outside them), ``adapters`` (per rank), ``discriminator``, ``vae``,
            ``flow``, ``surrogate``, ``remembered`` (numbers in the pairs it keeps), ``reward``, ``text_encoder``.
    """

    forward: Call
    train: Call
    decode: Call
    stream: Call
    parameters: Mapping[str, int]
    observe: Call | None = None
    observe_grad: Call | None = None
    stages: Mapping[str, Call] = field(default_factory=dict)
    judge: Call | None = None
    judge_frozen: Call | None = None
    judge_predicted: Call | None = None
    predict: Call | None = None
    predict_grad: Call | None = None
    predict_learns: Call | None = None
    pixel_flux: Call | None = None
    reward: Call | None = None
    check: Call | None = None


def measure_costs(config: Config, shapes: Shapes, say: Callable[[str], None] = lambda text: None) -> Costs:
    """Trace every call a recipe makes. Takes seconds to a minute; nothing is allocated."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    parameters = network_parameters(shapes)
    say("transformer")
    forward, train = transformer_calls(shapes, config.checkpointing, dtype)
    say("autoencoder")
    codec = Codec(shapes, dtype)
    costs: dict[str, Any] = {"forward": forward, "train": train, "decode": codec.decode(shapes.latent[1])}
    costs["stream"] = codec.stream()
    if config.gan is not None:
        if config.gan.space == "motion":
            say("optical flow")
            flow, parameters["flow"] = _flow(config.gan.flow, config.gan.flow_iterations)
            exact = codec if dtype == torch.float32 else Codec(shapes, torch.float32)
            plain = _observe(codec, exact, flow, config.gan, grad=False, checkpointing=config.checkpointing)
            stages = _observe(codec, exact, flow, config.gan, grad=True, checkpointing=config.checkpointing)
            if exact is not codec:
                parameters["fp32 encoder"] = sizes(exact.vae.encoder)[0]
            costs |= {"stages": stages, "observe": one_after_the_other(plain.values())}
            costs["observe_grad"] = one_after_the_other(stages.values())
            costs["check"] = _check(costs["stream"], flow, shapes)
        say("discriminator")
        gan = config.gan
        seen = gan.window if gan.space == "motion" else shapes.latent[1]
        judge = partial(judge_call, shapes, gan.blocks, len(gan.taps), seen, config.checkpointing)
        penalised = torch.float32 if gan.r1 or gan.r2 else dtype
        costs["judge"], parameters["discriminator"] = judge(penalised, learns=True)
        costs["judge_frozen"], _ = judge(dtype, learns=False)
    if config.surrogate is not None and config.gan is not None:
        say("surrogate")
        costs["judge_predicted"], _ = judge(dtype, learns=True)
        calls, parameters["surrogate"], parameters["remembered"] = surrogate_calls(
            config.surrogate, shapes, config.gan.window
        )
        costs |= dict(zip(("predict", "predict_grad", "predict_learns"), calls, strict=True))
    if config.shift is not None:
        say("motion rewards")
        flow, parameters["flow"] = _flow(config.shift.flow, config.shift.flow_iterations)
        fields = estimate_flow(flow, shapes, shapes.size.frames, False, False)
        costs["pixel_flux"] = one_after_the_other((costs["decode"], fields, fields))
        costs["check"] = _check(costs["stream"], flow, shapes)
        costs["reward"], parameters["reward"] = reward_call(config.shift, shapes)
    return Costs(parameters=parameters, **costs)


# ---------------------------------------------------------------------------------------------- transformers


def build_transformer(shapes: Shapes, layers: int | None = None) -> Any:
    """A Wan transformer of this shape (on whatever device is current), at another depth if asked."""
    config = {k: v for k, v in shapes.transformer.items() if not k.startswith("_")}
    network = WanTransformer3DModel(**config | ({} if layers is None else {"num_layers": layers}))
    return set_attention(network, fp32_on_cpu=False)


def network_parameters(shapes: Shapes) -> dict[str, int]:
    """Exact counts, from two depths."""
    with torch.device("meta"):
        one, two = (sizes(build_transformer(shapes, n))[0] for n in (1, 2))
        vae = sizes(AutoencoderKLWan(**_known(shapes.vae)))[0]
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
        "rest": one - (two - one),
        "adapters": layers * (8 * 2 * width + 2 * (width + ffn)),  # per rank; eight square matrices and two of the MLP
        "vae": vae,
        "text_encoder": text["vocab_size"] * text["d_model"] + text["num_layers"] * layer + text["d_model"],
    }


def transformer_calls(shapes: Shapes, checkpointing: bool, dtype: torch.dtype) -> tuple[Call, Call]:
    """One call without gradient, one with; at full depth."""
    calls: dict[bool, list[Call]] = {False: [], True: []}
    with fake():
        x, sigma = torch.empty(1, *shapes.latent), torch.full((1,), 0.5)
        text = torch.empty(1, TEXT_TOKENS, shapes.transformer["text_dim"])
        for layers in (1, 2):
            network = build_transformer(shapes, layers).train()
            if checkpointing:
                network.enable_gradient_checkpointing()
            denoiser = Denoiser(network, dtype)
            for backward, found in calls.items():
                found.append(trace(network.parameters(), partial(denoiser, x, sigma, text), backward=backward))
    more = shapes.transformer["num_layers"] - 1
    forward, train = (one.along(two, more) for one, two in calls.values())
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
        for depth in (1, 2):
            at = (depth - 1,) * heads  # heads cost the same wherever they read
            network = Discriminator(build_transformer(shapes, depth), text, blocks=depth, tap_at=at, dtype=dtype)
            if checkpointing:
                network.transformer.enable_gradient_checkpointing(recomputed)
            if not learns:
                network.requires_grad_(False)
            network.train()
            counts.append(sizes(network)[0])
            calls.append(trace(network.parameters(), partial(network, seen), backward=True))
    return calls[0].along(calls[1], blocks - 1), counts[0] + (blocks - 1) * (counts[1] - counts[0])


def surrogate_calls(
    surrogate: SurrogateConfig, shapes: Shapes, window: int
) -> tuple[tuple[Call, Call, Call], int, int]:
    """A surrogate on one window: without gradient, with its input's, with its weights'; its parameters, and what it keeps."""
    channels, _, height, width = shapes.latent
    options = {k: getattr(surrogate, k) for k in ("width", "blocks", "pairs")}
    with fake():
        network = MotionSurrogate((channels, height, width), window, **options)
        seen = torch.empty(1, channels, window + 1, height, width)
        learns = trace(network.parameters(), partial(network, seen), backward=True)
        plain = trace(network.parameters(), partial(network, seen), backward=False)
        network.requires_grad_(False)
        passed = trace((), partial(network, seen.requires_grad_(True)), backward=True)
        return (plain, passed, learns), sizes(network)[0], sum(b.numel() for b in network.buffers())


def reward_call(shift: ShiftConfig, shapes: Shapes) -> tuple[Call, int]:
    """SHIFT's two rewards on one clip, forward and backward; their parameters."""
    size = shapes.size
    options = {k: getattr(shift, k) for k in ("patch", "width", "depth", "heads", "clip")}
    with fake():
        with warnings.catch_warnings(action="ignore"):  # of the copies that torch makes of a transformer's first layer
            rewards = MotionRewards((size.frames, size.height, size.width), **options)
        maps = torch.empty(1, 4, size.frames - 1, size.height, size.width)
        states = torch.empty(1, shift.points, state_size(size.frames))
        return trace(rewards.parameters(), partial(rewards, maps, states), backward=True), sizes(rewards)[0]


# ---------------------------------------------------------------------------------------------- autoencoder and flow


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``AutoencoderKLWan`` among a config file's entries."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "clip_output"}


class Codec:
    """The autoencoder of some shapes, on the meta device; every call is traced once."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype):
        self.shapes = shapes
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                self.vae: Any = AutoencoderKLWan(**_known(shapes.vae)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(usual)
        self._traced: dict[tuple, Call] = {}

    def decode(self, length: int, start: int = 0, grad: bool = False, checkpointing: bool = False) -> Call:
        """Decode of ``length`` latent frames after ``start`` others. From the third latent frame on all cost the same, and
        from the fourth on none needs more memory than the one before.
        """
        if not grad:
            if start + length <= 4:
                return self._decode(start, length)
            line = self._decode(0, 3).along(self._decode(0, 4), start + length - 3)
            return Call(line.work, line.held, max(line.peak, 2 * line.held))  # the frames, and the clip put together
        if start + length <= 4 or length <= 2:
            return self._decode(start, length, True, checkpointing)
        window = self._decode(2, 2, True, checkpointing).along(self._decode(2, 3, True, checkpointing), length - 2)
        prefix = self._decode(0, 3).work - self._decode(0, 2).work
        return Call(window.work + prefix * (start - 2), window.held, window.peak)

    def encode(self, frames: int, grad: bool = False, checkpointing: bool = False) -> Call:
        """Encode of ``4 k + 1`` frames. From the second chunk on all cost the same."""
        if frames <= 13:
            return self._encode(frames, grad, checkpointing)
        three, four = (self._encode(n, grad, checkpointing) for n in (9, 13))
        return three.along(four, (frames - 9) / 4)

    def stream(self) -> Call:
        """Decode of a clip whose frames are given away as they come: from the fourth latent frame on none needs more memory."""
        channels, frames, height, width = self.shapes.latent
        z = torch.empty(1, channels, min(frames, 4), height, width, device="meta")

        def last() -> torch.Tensor:
            piece = torch.empty(0, device="meta")
            for piece in stream_video(self.vae, z):  # noqa: B007  # what the loop leaves is held, one latent frame's
                pass
            return piece

        short = self._once(("stream", 0, 0, False, False), last)
        return Call(self.decode(frames).work, short.held, short.peak)

    def _decode(self, first: int, count: int, grad: bool = False, checkpointing: bool = False) -> Call:
        channels, _, height, width = self.shapes.latent
        z = torch.empty(1, channels, first + count, height, width, device="meta", requires_grad=grad)
        return self._once(
            ("decode", first, count, grad, checkpointing),
            lambda: decode_window(self.vae, z, first, count, checkpointing),
        )

    def _encode(self, frames: int, grad: bool, checkpointing: bool) -> Call:
        size = self.shapes.size
        video = torch.empty(1, 3, frames, size.height, size.width, device="meta", requires_grad=grad)
        return self._once(
            ("encode", frames, 0, grad, checkpointing), lambda: encode_video(self.vae, video, checkpointing)
        )

    def _once(self, key: tuple, call: Callable[[], torch.Tensor]) -> Call:
        if key not in self._traced:
            self._traced[key] = trace((), call, backward=key[3])
        return self._traced[key]


def _flow(name: str, iterations: int) -> tuple[RaftFlow | None, int]:
    """The recipe's RAFT with random weights; None for a classical estimator, whose cost is the CPU's."""
    if name == "farneback":
        return None, 0
    settings = Path(name) / "config.json"
    if settings.is_file():
        network = read_raft_config(settings).build()
    else:
        network = RaftConfig().build() if name == "lab" else raft_large()
    return RaftFlow(network, iterations), sizes(network)[0]


def estimate_flow(flow: RaftFlow | None, shapes: Shapes, frames: int, grad: bool, checkpointing: bool) -> Call:
    """RAFT on a window: chunks of pairs one after the other, ``iterations`` refinements each."""
    if flow is None:
        return Call(Work(), 0.0, 0.0)
    size = shapes.size
    pairs = min(flow.pairs_at_once(size.height, size.width), frames - 1)
    flow.checkpointing = checkpointing
    wanted, calls = flow.iterations, []
    for flow.iterations in (1, 2):
        with fake():
            video = torch.empty(1, 3, pairs + 1, size.height, size.width, requires_grad=grad)
            calls.append(trace((), partial(flow, video), backward=grad))
    flow.iterations = wanted
    chunk = calls[0].along(calls[1], wanted - 1)
    chunks = (frames - 1) / pairs
    held = chunk.held * chunks
    return Call(chunk.work * chunks, held, held - chunk.held + chunk.peak)


def _observe(
    codec: Codec, exact: Codec, flow: RaftFlow | None, gan: GANConfig, *, grad: bool, checkpointing: bool
) -> dict[str, Call]:
    """The stages of an observation, in order; ``exact`` encodes. The window starts at its mean start."""
    frames, size = 4 * gan.window - 3, codec.shapes.size
    start = round(sum(gan.starts) / len(gan.starts))
    fields = torch.empty(1, 2, frames - 1, size.height, size.width, device="meta", requires_grad=grad)
    return {
        "window decode": codec.decode(gan.window, start, grad, checkpointing),
        "flow": estimate_flow(flow, codec.shapes, frames, grad, checkpointing),
        "picture": trace((), lambda: motion_picture(fields, 1.0), backward=grad),
        "encode": exact.encode(frames, grad, checkpointing),
    }


def _check(stream: Call, flow: RaftFlow | None, shapes: Shapes) -> Call:
    """A clip decoded frame by frame, and the flow of each latent frame's four with the one before them."""
    pairs = shapes.size.frames - 1
    piece = estimate_flow(flow, shapes, min(pairs, 4) + 1, False, False)
    return Call(stream.work + piece.work * (pairs / min(pairs, 4)), 0.0, max(stream.peak, stream.held + piece.peak))


def one_after_the_other(stages: Iterable[Call]) -> Call:
    """A call made of stages: what each holds stays while the next one runs."""
    held, peak, work = 0.0, 0.0, Work()
    for stage in stages:
        peak = max(peak, held + stage.peak)
        held, work = held + stage.held, work + stage.work
    return Call(work, held, peak)
