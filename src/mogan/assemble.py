"""From a config to live networks, objectives and optimisers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as once
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mogan import wan
from mogan.checkpoint import latest_checkpoint, load_checkpoint
from mogan.config import Config, GANConfig
from mogan.data import Cache, ensure_observations, ensure_text
from mogan.denoiser import Denoiser
from mogan.discriminator import Discriminator
from mogan.errors import UserError
from mogan.flow import FlowEstimator, RaftFlow
from mogan.lora import adapted, hold_in, learned_state, load_learned
from mogan.objectives import Objective
from mogan.objectives.dmd import DMD
from mogan.objectives.flow_matching import FlowMatching
from mogan.objectives.gan import GAN
from mogan.observation import MotionObservation
from mogan.sample import open_generator


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
        """Exponential moving average of what the student learns (its weights or its adapters), fp32."""
        with torch.no_grad():
            live = self.student.transformer.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [live[k] for k in self.average], 1 - self.config.ema)

    @contextmanager
    def averaged_student(self) -> Iterator[Denoiser]:
        """The student with its averaged weights, for sampling; the live weights come back afterwards."""
        student = self.student
        live = {k: v.clone() for k, v in learned_state(student.transformer).items()}
        load_learned(student.transformer, self.average)
        try:
            yield student
        finally:
            load_learned(student.transformer, live)

    def state(self) -> dict:
        """What a checkpoint holds: of networks with adapters the adapters alone."""
        return {
            "networks": {name: learned_state(network) for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema": self.average,
        }

    def load_state(self, state: dict) -> None:
        """Put a checkpoint's state back."""
        for name, network in self.networks.items():
            load_learned(network, state["networks"][name])
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
        student: where the student starts: a model, or a run whose adapters are trained on; the base model unless the
            recipe post-trains a few-step student.
        run: folder of the run, named in error messages.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    base, start, adapters_of = _where(config, model, student)
    if cache.has_clips:
        cache.require(vae=wan.fingerprint(base, "vae"))
    dtype = {"auto": wan.fast_dtype(target), "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    frozen = _frozen_weights(config, dtype, target)
    student_network = _denoiser(frozen, start, "transformer", config, dtype, target)
    networks: dict[str, nn.Module] = {"student": student_network}
    objectives: dict[str, Objective] = {}
    encode = _text_by_way_of(cache, base)
    vae = wan.load_vae(base, dtype).to(target)
    flow, key = None, None
    if config.dmd is not None:
        teacher = Denoiser(frozen(base, "transformer"), dtype)
        has_own = (start / "fake_score" / "config.json").is_file()
        fake_from = (start, "fake_score") if has_own else (base, "transformer")
        fake = _denoiser(frozen, *fake_from, config, dtype, target)
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
            student_network, encode([""])[0], shift=f.shift, drop_text=f.drop_text
        )
    if adapters_of is not None:
        _continue_adapters(networks, adapters_of)
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
    average = {k: v.detach().clone() for k, v in learned_state(student_network.transformer).items()}
    facts = {"model": str(base), "student": str(start), "data": str(cache.path)}
    shape = wan.latent_shape(base, size)
    return Assembly(
        config, cache, run, target, size, shape, networks, objectives, optimizers, average, vae, flow, key, facts
    )


def _where(config: Config, model: str, student: str | None) -> tuple[Path, Path, Path | None]:
    """Folders of the base model and of the student's start, and the run whose adapters it starts with, if any."""
    base = wan.resolve_model("lab-teacher" if model == "lab" else model)
    post_trains = config.gan is not None
    if student is None and post_trains and model != "lab":
        raise UserError(f"{config.recipe} post-trains a few-step student: name it with --student (a DMD run's export)")
    if student is None and not post_trains:
        return base, base, None
    source = open_generator(student or "lab")
    if source.run is not None and (config.lora is None or source.lora != config.lora):
        raise UserError(
            f"{student} is a run with "
            + (f"adapters of rank {source.lora}: give --lora {source.lora}, or" if source.lora else "full weights:")
            + " export it with `mogan export` and name the export with --student"
        )
    if post_trains and source.sigmas and not _agree(source.sigmas, config.sigmas):
        raise UserError(
            f"{student} samples at levels {list(source.sigmas)}, the recipe at {list(config.sigmas)}; they must agree"
        )
    return base, source.folder, source.run


def _agree(sigmas: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return len(sigmas) == len(others) and all(abs(a - b) < 1e-4 for a, b in zip(sigmas, others, strict=True))


def _frozen_weights(config: Config, dtype: torch.dtype, device: torch.device) -> Callable[[Path, str], Any]:
    """Load frozen transformers, each once: with adapters, networks of the same start share them."""

    @once
    def load(folder: Path, part: str) -> Any:
        return hold_in(wan.load_transformer(folder, part).to(device), dtype if config.lora else torch.float32)

    return load


def _denoiser(
    frozen: Callable[[Path, str], Any],
    folder: Path,
    part: str,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
) -> Denoiser:
    if config.lora is None:
        transformer = wan.load_transformer(folder, part).to(device).train()
    else:
        transformer = adapted(frozen(folder, part), config.lora, config.seed).train()
    if config.checkpointing:
        transformer.enable_gradient_checkpointing()
    return Denoiser(transformer, dtype)


def _continue_adapters(networks: dict[str, nn.Module], run: Path) -> None:
    """Start the student with a run's averaged adapters, and the fake score, where both have one, with its live ones."""
    newest = latest_checkpoint(run)
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet: let it train until it has saved one")
    state = load_checkpoint(newest)
    load_learned(cast(Denoiser, networks["student"]).transformer, state["ema"])
    if "fake_score" in networks and "fake_score" in state["networks"]:
        load_learned(networks["fake_score"], state["networks"]["fake_score"])


def _text_by_way_of(cache: Cache, base: Path) -> wan.TextEncoder:
    """Encode through the cache: the text encoder, Wan's largest part, is loaded only for a prompt that is not there."""
    encoder = once(lambda: wan.load_text(base))

    def encode(prompts: list[str]) -> list[Tensor]:
        ensure_text(cache.path, prompts, lambda missing: encoder()(missing))
        return [cache.text(p) for p in prompts]

    return encode


def _discriminator(gan: GANConfig, base: Path, encode, dtype, device, seed: int) -> Discriminator:
    torch.manual_seed(seed)  # the heads start at random
    text = wan.stack_text(encode([gan.prompt]))
    trunk = wan.load_transformer(base)
    network = Discriminator(trunk, text, blocks=gan.blocks, tap_at=gan.taps, sigma=gan.sigma, dtype=dtype)
    return network.to(device).train()


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
