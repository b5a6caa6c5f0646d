"""Every network of MoGAN by itself, as `make gpu` measures it beside what `mogan.costs` predicts of the same call."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from gpu_inputs import Inputs
from gpu_measure import DEVICE, FAST, Report, measured

from mogan.costs.calls import TEXT_TOKENS, Tracer, observe_calls
from mogan.costs.machines import Machine
from mogan.costs.trace import Call, Work
from mogan.models.autoencoder import decode_video, decode_window, encode_video
from mogan.models.denoiser import Denoiser, recomputed
from mogan.models.discriminator import Discriminator
from mogan.models.wan import load_transformer, load_vae
from mogan.motion.flow import RaftFlow, load_raft
from mogan.recipes import find_recipe
from mogan.recipes.mogan import gan_of

ARITHMETICS = ("bf16", "fp32 with TF32", "fp32")


def with_gradients(network: torch.nn.Module) -> None:
    """Zero gradients that stay, so that what a backward pass takes is its own."""
    for p in network.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)


def transformer_calls(network: torch.nn.Module, inputs: Inputs) -> tuple[Callable[[], None], Callable[[], None]]:
    """A call without gradient, and one forward and backward, of the size of :func:`mogan.costs.calls.transformer_calls`."""
    shape = inputs.cache(inputs.clip).latent("clip0").shape
    denoiser = Denoiser(network, FAST)
    x, sigma = torch.randn(1, *shape, device=DEVICE), torch.full((1,), 0.5, device=DEVICE)
    text = torch.randn(1, TEXT_TOKENS, network.config.text_dim, device=DEVICE)  # type: ignore[union-attr]

    def forward() -> None:
        with torch.no_grad():
            denoiser(x, sigma, text)

    with_gradients(network)
    return forward, lambda: denoiser(x, sigma, text).sum().backward()


def networks(report: Report, inputs: Inputs, seconds: float) -> None:
    """Transformer, discriminator, autoencoder, flow; memory is what a call takes above weights and their gradients."""
    for what, call in (
        ("transformer", _transformer),
        ("decode", _decoder),
        ("encode", _encoder),
        ("flow", _flow),
        ("discriminator", _discriminator),
    ):
        report.attempt(what, partial(call, report, inputs))


def _transformer(report: Report, inputs: Inputs) -> None:
    network = load_transformer(inputs.model).to(DEVICE).train()
    network.enable_gradient_checkpointing()
    forward, train = transformer_calls(network, inputs)
    report.add("transformer, forward", **measured(forward, 2.0))
    report.add("transformer, forward and backward", **measured(train, 4.0))


def _latent(inputs: Inputs) -> torch.Tensor:
    return inputs.cache(inputs.clip).latent("clip0")[None].to(DEVICE)


def window_of(frames: int) -> tuple[int, int]:
    """Length and start of the recipe's window in the middle of a clip."""
    window = gan_of(find_recipe("mogan_wan_1_3b")).window
    return window, (1 + (frames - 1) // 4 - window) // 2


def _decoder(report: Report, inputs: Inputs) -> None:
    window, start = window_of(inputs.clip[0])
    z = _latent(inputs).requires_grad_()
    vae = load_vae(inputs.model, FAST).to(DEVICE)

    def clip() -> None:
        with torch.no_grad():
            decode_video(vae, z)

    def short() -> None:  # the kernels of every later frame
        decode_window(vae, z, 0, 4).sum().backward()

    def decode() -> None:
        decode_window(vae, z, start, window).sum().backward()

    report.add("window decode, forward and backward", **measured(decode, 4.0, warm=short))
    report.add("decode of a clip, forward", **measured(clip, 0.0, warm=lambda: None))
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous()
    few = z[:, :, :4].detach()

    def some() -> None:
        with torch.no_grad():
            decode_video(vae, few)

    report.add("decode of a clip, forward, channels first", **measured(clip, 0.0, warm=some))


def _encoder(report: Report, inputs: Inputs) -> None:
    frames, height, width = inputs.clip
    window, _ = window_of(frames)
    vae = load_vae(inputs.model, torch.float32).to(DEVICE)
    video = torch.rand(1, 3, 4 * window - 3, height, width, device=DEVICE).requires_grad_()
    tail = video[:, :, :9].detach().requires_grad_()
    report.add(
        "picture encode in fp32, forward and backward",
        **measured(
            lambda: encode_video(vae, video).sum().backward(),
            4.0,
            warm=lambda: encode_video(vae, tail).sum().backward(),
        ),
    )


def _flow(report: Report, inputs: Inputs) -> None:
    frames, height, width = inputs.clip
    window, _ = window_of(frames)
    flow = RaftFlow(load_raft(inputs.raft), 2 if inputs.narrow else 12).to(DEVICE)
    video = (torch.rand(1, 3, 4 * window - 3, height, width, device=DEVICE) * 2 - 1).requires_grad_()
    few = video[:, :, :5].detach().requires_grad_()
    call = measured(lambda: flow(video).sum().backward(), 2.0, warm=lambda: flow(few).sum().backward())
    report.add("flow, forward and backward", **call)


def discriminator_of(inputs: Inputs, heads_seed: int = 0) -> Discriminator:
    """The recipe's, on the random transformer, in fp32 unless a call says otherwise."""
    gan = gan_of(find_recipe("mogan_wan_1_3b"))
    trunk = load_transformer(inputs.model)
    torch.manual_seed(heads_seed)
    text = torch.randn(1, TEXT_TOKENS, trunk.config.text_dim)
    network = Discriminator(trunk, text, blocks=gan.blocks, tap_at=gan.taps).to(DEVICE).train()
    network.transformer.enable_gradient_checkpointing(recomputed)
    return network


def _discriminator(report: Report, inputs: Inputs) -> None:
    network = discriminator_of(inputs)
    window, start = window_of(inputs.clip[0])
    seen = _latent(inputs)[:, :, start : start + window]
    with_gradients(network)
    for name in ARITHMETICS:
        torch.set_float32_matmul_precision("high" if name.endswith("TF32") else "highest")
        dtype, what = (
            torch.bfloat16 if name == "bf16" else torch.float32,
            f"discriminator in {name}, forward and backward",
        )

        def call(shown: torch.Tensor, dtype: torch.dtype) -> None:
            network(shown, dtype=dtype).sum().backward()

        def one(what: str, dtype: torch.dtype) -> None:
            warm = partial(call, seen[:, :, :2], dtype)
            report.add(what, **measured(partial(call, seen, dtype), 3.0, warm=warm))

        report.attempt(what, partial(one, what, dtype))
    torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------------------------------------- what is predicted


def predicted(tracer: Tracer, machine: Machine, inputs: Inputs) -> dict[str, dict[str, float]]:
    """Seconds, bytes above weights and gradients, and operations of every row of :func:`networks`, by its name."""
    window, start = window_of(inputs.clip[0])
    gan = gan_of(find_recipe("mogan_wan_1_3b"))
    flow, _ = tracer.flow(str(inputs.raft), 2 if inputs.narrow else 12)
    stages = observe_calls(tracer, flow, window, start, grad=True)
    bf16, fp32 = (gan.judge(tracer, dtype, learns=True)[0] for dtype in (torch.bfloat16, torch.float32))
    narrower = Work(Counter({(f, b, k.replace("fp32", "tf32")): n for (f, b, k), n in fp32.work.operations.items()}))
    calls = {
        "transformer, forward": tracer.forward,
        "transformer, forward and backward": tracer.train,
        "window decode, forward and backward": stages["window decode"],
        "decode of a clip, forward": tracer.decode,
        "decode of a clip, forward, channels first": tracer.decode,
        "picture encode in fp32, forward and backward": stages["encode"],
        "flow, forward and backward": stages["flow"],
        "discriminator in bf16, forward and backward": bf16,
        "discriminator in fp32 with TF32, forward and backward": Call(narrower, fp32.held, fp32.peak, fp32.copies),
        "discriminator in fp32, forward and backward": fp32,
        "decode, frame by frame": tracer.stream,
    }
    return {
        name: {"seconds": c.work.seconds(machine), "above": c.peak + c.copies, "flops": c.work.flops}
        for name, c in calls.items()
    }
