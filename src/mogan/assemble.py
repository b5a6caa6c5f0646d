"""From a config to live networks, objectives and optimisers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mogan import wan
from mogan.config import Config, GANConfig, ShiftConfig
from mogan.data import Cache, ensure_observations
from mogan.denoiser import Denoiser
from mogan.discriminator import Discriminator
from mogan.errors import UserError
from mogan.flow import FlowEstimator, RaftFlow
from mogan.objectives import Objective
from mogan.objectives.dmd import DMD
from mogan.objectives.flow_matching import FlowMatching
from mogan.objectives.gan import GAN
from mogan.objectives.shift import Shift
from mogan.observation import MotionObservation
from mogan.rewards import MotionRewards, PixelFlux


@dataclass
class Assembly:
    """Everything a run works with. ``networks`` are the ones that learn."""

    config: Config
    cache: Cache
    run: Path | None
    device: torch.device
    geometry: wan.Geometry
    latent_shape: tuple[int, int, int, int]
    networks: dict[str, nn.Module]
    objectives: dict[str, Objective]
    optimizers: dict[str, torch.optim.Optimizer]
    average: dict[str, Tensor]
    vae: nn.Module
    flow: FlowEstimator | None
    observations: Path | None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def student(self) -> Denoiser:
        """The network being post-trained."""
        return cast(Denoiser, self.networks["student"])

    def update_average(self) -> None:
        """Exponential moving average of the student's weights, fp32."""
        with torch.no_grad():
            live = self.student.transformer.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [live[k] for k in self.average], 1 - self.config.ema)

    @contextmanager
    def averaged_student(self) -> Iterator[Denoiser]:
        """The student with its averaged weights, for sampling; the live weights come back afterwards."""
        student = self.student
        live = {k: v.clone() for k, v in student.transformer.state_dict().items()}
        student.transformer.load_state_dict(self.average)
        try:
            yield student
        finally:
            student.transformer.load_state_dict(live)

    def state(self) -> dict:
        """What a checkpoint holds."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema": self.average,
        }

    def load_state(self, state: dict) -> None:
        """Put a checkpoint's state back."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        with torch.no_grad():
            for key, value in state["ema"].items():
                self.average[key].copy_(value)


def assemble(
    config: Config, cache: Cache, *, model: str, student: str | None = None, run: Path | None, device: str = "auto"
) -> Assembly:
    """Load the parts a config needs and put them together.

    Args:
        config: the run.
        cache: its data.
        model: the base model: teacher, autoencoder, text encoder.
        student: where the student starts; the base model unless the recipe post-trains a few-step student.
        run: folder of the run, named in error messages.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    base, start = _where(config, model, student)
    if cache.has_clips:
        cache.require(vae=wan.fingerprint(base, "vae"))
    dtype = {"auto": wan.fast_dtype(target), "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    student_network = _denoiser(start, "transformer", config, dtype, target)
    networks: dict[str, nn.Module] = {"student": student_network}
    objectives: dict[str, Objective] = {}
    encode = wan.load_text(base)
    vae = wan.load_vae(base, dtype).to(target)
    flow, key = None, None
    if config.dmd is not None:
        teacher = Denoiser(wan.load_transformer(base).to(target).eval().requires_grad_(False), dtype)
        has_own = (start / "fake_score" / "config.json").is_file()
        fake = _denoiser(start if has_own else base, "fake_score" if has_own else "transformer", config, dtype, target)
        networks["fake_score"] = fake
        null = wan.stack_text(encode([config.negative_prompt]), target)
        d = config.dmd
        objectives["dmd"] = DMD(teacher, fake, null, guidance=d.guidance, shift=d.shift, low=d.low, high=d.high)
    if config.gan is not None:
        discriminator = _discriminator(config.gan, base, encode, dtype, target, config.seed)
        networks["discriminator"] = discriminator
        observe = None
        if config.gan.space == "motion":
            flow = wan.load_flow(config.gan.flow, config.gan.flow_iterations)
            if isinstance(flow, RaftFlow):
                flow = flow.to(target)
                flow.checkpointing = config.checkpointing
            observe = MotionObservation(vae, flow, config.gan.window, config.gan.max_flow, config.checkpointing)
            key = observe_real_clips(cache, config.gan, observe, wan.fingerprint(base, "vae"), target)
        g = config.gan
        objectives["gan"] = GAN(
            discriminator,
            observe,
            student_weight=g.student_weight,
            judge_weight=g.judge_weight,
            r1=g.r1,
            r2=g.r2,
            noise=g.noise,
            normalise=g.normalise,
        )
    if config.flow_matching is not None:
        f = config.flow_matching
        objectives["flow_matching"] = FlowMatching(
            student_network, encode([""])[0], shift=f.shift, drop_text=f.drop_text, given=config.given
        )
    if config.shift is not None:
        s = config.shift
        flow = wan.load_flow(s.flow, s.flow_iterations)
        flow = flow.to(target) if isinstance(flow, RaftFlow) else flow
        rewards = _rewards(s, cache, config.seed).to(target)
        networks["reward"] = rewards
        objectives["shift"] = Shift(
            student_network,
            rewards,
            PixelFlux(vae, flow),
            wan.stack_text(encode([config.negative_prompt]), target),
            guidance=s.guidance,
            sigmas=config.sigmas,
            given=config.given,
            points=s.points,
            shift=s.shift,
            weight=s.weight,
            beta=s.beta,
        )
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for update in config.plan:
        if update.optimizer_name not in optimizers:
            o = config.optimizers[update.optimizer_name]
            learnable = [p for p in networks[update.learns].parameters() if p.requires_grad]
            optimizers[update.optimizer_name] = torch.optim.AdamW(
                learnable, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay
            )
    size = wan.geometry(base)
    if cache.has_clips:
        size = wan.Geometry(**{k: cache.facts[k] for k in ("fps", "height", "width", "frames")})
    average = {k: v.detach().clone() for k, v in student_network.transformer.state_dict().items()}
    facts = {"model": str(base), "student": str(start), "data": str(cache.path)}
    shape = wan.latent_shape(base, size)
    return Assembly(
        config, cache, run, target, size, shape, networks, objectives, optimizers, average, vae, flow, key, facts
    )


def _where(config: Config, model: str, student: str | None) -> tuple[Path, Path]:
    """Folders of the base model and of the student's start, checked against the recipe."""
    base = wan.resolve_model("lab-teacher" if model == "lab" else model)
    post_trains = config.gan is not None
    if student is not None:
        start = wan.resolve_model(student)
    elif post_trains and model == "lab":
        start = wan.resolve_model("lab")
    elif post_trains:
        raise UserError(f"{config.recipe} post-trains a few-step student: name it with --student (a DMD run's export)")
    else:
        start = base
    levels = wan.model_facts(start).get("sigmas")
    if post_trains and levels and tuple(levels) != config.sigmas:
        raise UserError(f"{start} samples at levels {levels}, the recipe at {list(config.sigmas)}; they must agree")
    return base, start


def _denoiser(folder: Path, part: str, config: Config, dtype: torch.dtype, device: torch.device) -> Denoiser:
    transformer = wan.load_transformer(folder, part).to(device).train()
    if config.checkpointing:
        transformer.enable_gradient_checkpointing()
    return Denoiser(transformer, dtype)


def _discriminator(gan: GANConfig, base: Path, encode, dtype, device, seed: int) -> Discriminator:
    torch.manual_seed(seed)  # the heads start at random
    text = wan.stack_text(encode([gan.prompt]))
    trunk = wan.load_transformer(base)
    network = Discriminator(trunk, text, blocks=gan.blocks, tap_at=gan.taps, sigma=gan.sigma, dtype=dtype)
    return network.to(device).train()


def _rewards(s: ShiftConfig, cache: Cache, seed: int) -> MotionRewards:
    if not cache.has_clips:
        raise UserError(f"{cache.path} holds prompts alone; this recipe needs videos: prepare a folder of them")
    frames, height, width = (cache.facts[k] for k in ("frames", "height", "width"))
    if any(a % b for a, b in zip((frames - 1, height, width), s.patch, strict=True)):
        raise UserError(
            f"clips of {frames} x {height} x {width} do not split into patches {s.patch}: change shift.patch"
            " in the recipe so that it divides frames - 1, height and width"
        )
    torch.manual_seed(seed)
    return MotionRewards(
        (frames, height, width), patch=s.patch, width=s.width, depth=s.depth, heads=s.heads, clip=s.clip
    )


def observe_real_clips(
    cache: Cache, gan: GANConfig, observe: MotionObservation, vae: str, device: torch.device
) -> Path:
    """Compute what the cache lacks of the real clips' observations; returns the folder they are kept in.

    Real clips go through the same chain as generated ones, codec included: the discriminator must not tell them apart
    by the codec's traces.
    """
    key = {
        "vae": vae,
        "flow": gan.flow,
        "flow_iterations": gan.flow_iterations,
        "window": gan.window,
        "max_flow": gan.max_flow,
    }

    @torch.no_grad()
    def observed(latent_BCFHW: Tensor, start: int) -> Tensor:
        return observe(latent_BCFHW.float().to(device), start).latent_BCFHW.cpu()

    return ensure_observations(cache.path, key, observed, gan.starts)
