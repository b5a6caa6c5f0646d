"""From a config to live networks, objectives and optimisers."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as once
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mogan import wan
from mogan.checkpoint import latest_checkpoint, load_part
from mogan.config import Config, GANConfig, ShiftConfig
from mogan.data import Cache, ensure_observations, ensure_text
from mogan.denoiser import Denoiser, compile_blocks, recomputed
from mogan.discriminator import Discriminator
from mogan.distributed import World, choose_device, local, shard, split_tokens
from mogan.errors import UserError
from mogan.flow import FlowEstimator, RaftFlow
from mogan.lora import adapted, hold_in, learned_state, load_learned
from mogan.objectives import Objective
from mogan.objectives.dmd import DMD, dmd_direction
from mogan.objectives.flow_matching import FlowMatching
from mogan.objectives.gan import GAN
from mogan.objectives.motion_score import MotionScore
from mogan.objectives.msm import motion_direction
from mogan.objectives.shift import Shift
from mogan.objectives.surrogate import Surrogate
from mogan.objectives.together import Together
from mogan.observation import MotionObservation, Observed
from mogan.rewards import MotionRewards, PixelFlux
from mogan.sample import open_generator
from mogan.surrogate import MotionSurrogate, Remembered


@dataclass
class Assembly:
    """Everything a run works with. ``networks`` are the ones that learn."""

    config: Config
    cache: Cache
    run: Path | None
    world: World
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
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.world.device

    @property
    def student(self) -> Denoiser:
        """The network being post-trained."""
        return cast(Denoiser, self.networks["student"])

    def update_average(self) -> None:
        """Exponential moving average of what the student learns (its weights or its adapters), fp32."""
        with torch.no_grad():
            live = self.student.transformer.state_dict()
            average = [local(v) for v in self.average.values()]
            torch._foreach_lerp_(average, [local(live[k]) for k in self.average], 1 - self.config.ema)

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

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: weights (of networks with adapters the adapters alone), the optimisers' moments by
        number of the parameter, averages.
        """
        state = {f"{name}.{k}": v for name, network in self.networks.items() for k, v in learned_state(network).items()}
        for name, optimizer in self.optimizers.items():
            for number, moments in optimizer.state_dict()["state"].items():
                state |= {f"{name}_optimizer.{number}.{k}": v for k, v in moments.items()}
        return state | {f"ema.{k}": v for k, v in self.average.items()}

    def prepare_to_load(self, names: Collection[str]) -> None:
        """Give every optimiser the moments that are among ``names``, at zero: optimisers make theirs at their first step."""
        for name, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments: dict[int, dict[str, Tensor]] = {}
            for key in names:
                part, _, rest = key.partition(".")
                if part == f"{name}_optimizer":
                    number, kind = rest.split(".")
                    like = torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[int(number)])
                    moments.setdefault(int(number), {})[kind] = like
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def assemble(
    config: Config,
    cache: Cache,
    *,
    model: str,
    student: str | None = None,
    run: Path | None,
    device: str = "auto",
    world: World | None = None,
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
        world: the processes of the run, over which every network is sharded; by default this one alone, on ``device``.
    """
    world = world or World(choose_device(device))
    _check_processes(config, world)
    target = world.device
    base, start, adapters_of = _where(config, model, student)
    if cache.has_clips:
        cache.require(vae=wan.fingerprint(base, "vae"))
    size = wan.geometry(base)
    if cache.has_clips:
        size = wan.Geometry(**{k: cache.facts[k] for k in ("fps", "height", "width", "frames")})
    shape = wan.latent_shape(base, size)
    _check_window(config, shape[1])
    _check_surrogate(config)
    _check_clips(config, cache)
    dtype = _dtype(config, target)
    frozen = _frozen_weights(config, dtype, world)
    student_network = _denoiser(frozen, start, "transformer", config, dtype, world)
    networks: dict[str, nn.Module] = {"student": student_network}
    objectives: dict[str, Objective] = {}
    encode = _text_encoder(cache, base, world)
    vae = wan.load_vae(base, dtype).to(target)
    flow, key = None, None
    if config.dmd is not None:
        teacher = Denoiser(frozen(base, "transformer"), dtype)
        has_own = (start / "fake_score" / "config.json").is_file()
        fake_from = (start, "fake_score") if has_own else (base, "transformer")
        fake = _denoiser(frozen, *fake_from, config, dtype, world)
        networks["fake_score"] = fake
        null = wan.stack_text(encode([config.negative_prompt]), target)
        d = config.dmd
        direction = motion_direction(d.motion_weight) if d.motion_weight else dmd_direction
        objectives["dmd"] = DMD(
            teacher, fake, null, guidance=d.guidance, shift=d.shift, low=d.low, high=d.high, direction=direction
        )
    if config.gan is not None:
        discriminator = _discriminator(config.gan, base, encode, dtype, world, config.seed)
        if config.checkpointing:
            discriminator.transformer.enable_gradient_checkpointing(recomputed)
        networks["discriminator"] = discriminator
        observe = None
        if config.gan.space == "motion":
            observe = _motion_observation(config, config.gan, vae, target)
            flow = observe.flow
            key = _observe_real_clips(cache, config.gan, observe, wan.fingerprint(base, "vae"), world)
        exact: Callable[[Tensor, int], Observed] | None = observe
        g, seen = config.gan, _surrogate(config, shape, target)
        if observe is not None and seen is not None:
            networks["surrogate"], exact = seen, Remembered(observe, seen)
        gan = GAN(
            discriminator,
            exact,
            student_weight=g.student_weight,
            judge_weight=g.judge_weight,
            r1=g.r1,
            r2=g.r2,
            noise=g.noise,
            normalise=g.normalise,
            drawn_levels=g.drawn_levels,
        )
        objectives["gan"] = gan
        if config.surrogate is not None and seen is not None:
            objectives["surrogate"] = Surrogate(seen, gan, config.surrogate.limit)
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
    if config.motion_score is not None:
        m = config.motion_score
        objectives["motion_score"] = MotionScore(
            student_network, encode([""])[0], windows=m.windows, shift=m.shift, drop_text=m.drop_text
        )
    for several in (u for u in config.plan if len(u.judges) > 1):
        objectives[several.by] = Together([objectives[judge] for judge in several.judges])
    if adapters_of is not None:
        _continue_adapters(networks, adapters_of)
    if config.compile:
        called = [*networks.values(), *(o.teacher for o in objectives.values() if isinstance(o, DMD))]
        compile_blocks([n.transformer for n in called if isinstance(n, Denoiser | Discriminator)], target)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for update in config.plan:
        if update.optimizer_name not in optimizers:
            o = config.optimizers[update.optimizer_name]
            learnable = [p for p in networks[update.learns].parameters() if p.requires_grad]
            optimizers[update.optimizer_name] = torch.optim.AdamW(
                learnable, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay
            )
    average = {k: v.detach().clone() for k, v in learned_state(student_network.transformer).items()}
    facts = {"model": str(base), "student": str(start), "data": str(cache.path)}
    return Assembly(
        config, cache, run, world, size, shape, networks, objectives, optimizers, average, vae, flow, key, facts
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


def _frozen_weights(config: Config, dtype: torch.dtype, world: World) -> Callable[[Path, str], Any]:
    """Load frozen transformers, each once: with adapters, networks of the same start share them."""

    @once
    def load(folder: Path, part: str) -> Any:
        transformer = hold_in(wan.load_transformer(folder, part), dtype if config.lora else torch.float32)
        return _spread(transformer, world, dtype)

    return load


def _spread(transformer: Any, world: World, dtype: torch.dtype) -> Any:
    """Over the processes, then to the device: a GPU never holds a whole network."""
    split_tokens(transformer, world)
    return shard(transformer, transformer.blocks, world, dtype, partial=True).to(world.device)


def _denoiser(
    frozen: Callable[[Path, str], Any],
    folder: Path,
    part: str,
    config: Config,
    dtype: torch.dtype,
    world: World,
) -> Denoiser:
    if config.lora is None:
        transformer = wan.load_transformer(folder, part).train()
    else:
        transformer = adapted(frozen(folder, part), config.lora, config.seed).train()
    if config.checkpointing:
        transformer.enable_gradient_checkpointing()
    return Denoiser(_spread(transformer, world, dtype), dtype)


def _continue_adapters(networks: dict[str, nn.Module], run: Path) -> None:
    """Start the student with a run's averaged adapters, and the fake score, where both have one, with its live ones."""
    newest = latest_checkpoint(run)
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet: let it train until it has saved one")
    load_learned(cast(Denoiser, networks["student"]).transformer, load_part(newest, "ema"))
    fake = load_part(newest, "fake_score")
    if "fake_score" in networks and fake:
        load_learned(networks["fake_score"], fake)


def _check_window(config: Config, frames: int) -> None:
    gan = config.gan
    if gan is not None and gan.space == "motion" and max(gan.starts) + gan.window > frames:
        raise UserError(
            f"{config.recipe} looks at latent frames up to {max(gan.starts) + gan.window} and clips have {frames}: prepare "
            "longer clips, or give the recipe a shorter window and fewer starts"
        )


def _check_surrogate(config: Config) -> None:
    if config.surrogate is not None and (config.gan is None or config.gan.space != "motion"):
        raise UserError(f"{config.recipe} has a motion surrogate and looks at no optical flow: give gan.space motion")


def _check_clips(config: Config, cache: Cache) -> None:
    """A batch of real clips takes each once."""
    for update in config.plan:
        from_clips = (update.learns != "student" and update.by != "dmd") or update.by in (
            "flow_matching",
            "shift",
            "motion_score",
        )
        if cache.has_clips and from_clips and update.batch > len(cache):
            raise UserError(
                f"{update.label} takes {update.batch} clips at a time and {cache.path} holds {len(cache)}: prepare more, or "
                f"give --batch {len(cache)}"
            )


def _check_processes(config: Config, world: World) -> None:
    if config.compile and world.sequence is not None:
        raise UserError(
            "--compile does not go with --context-parallel, whose hooks lie inside the blocks: leave one out"
        )
    if config.surrogate is not None and world.ranks > 1:
        raise UserError("a motion surrogate remembers the clips of one process: start one, or train without it")
    if config.lora is not None and world.ranks > 1:
        raise UserError("--lora trains in one process: start one, or leave --lora out")
    if config.shift is not None and world.ranks > 1:
        raise UserError("SHIFT compares the clips of a whole batch and trains in one process: start one")
    for update in config.plan:
        if update.batch % world.shares:
            raise UserError(
                f"{update.label}: a batch of {update.batch} does not split over {world.shares} processes; give --batch a "
                f"multiple of {world.shares}, start fewer processes, or let several share a sample (--context-parallel)"
            )


def _text_encoder(cache: Cache, base: Path, world: World) -> wan.TextEncoder:
    """Encode through the cache, on the first process for all.

    The text encoder, Wan's largest part, is loaded only for a prompt that is not in the cache.
    """
    encoder = once(lambda: wan.load_text(base))

    def encode(prompts: list[str]) -> list[Tensor]:
        ensure_text(cache.path, prompts, lambda missing: encoder()(missing))
        return [cache.text(p) for p in prompts]

    return lambda prompts: world.from_main(lambda: encode(prompts))


def _discriminator(gan: GANConfig, base: Path, encode, dtype, world: World, seed: int) -> Discriminator:
    torch.manual_seed(seed)  # the heads start at random
    text = wan.stack_text(encode([gan.prompt]))
    trunk = wan.load_transformer(base)
    if gan.blocks > len(trunk.blocks):
        raise UserError(
            f"the recipe's discriminator takes {gan.blocks} blocks and {base} has {len(trunk.blocks)}: lower gan.blocks and gan.taps"
        )
    network = Discriminator(trunk, text, blocks=gan.blocks, tap_at=gan.taps, sigma=gan.sigma, dtype=dtype)
    if not gan.train_trunk:
        network.transformer.requires_grad_(False)
    shard(network, trunk.blocks, world, dtype)
    return network.to(world.device).train()


def _surrogate(config: Config, shape: tuple[int, int, int, int], device: torch.device) -> MotionSurrogate | None:
    gan, s = config.gan, config.surrogate
    if gan is None or s is None:
        return None
    torch.manual_seed(config.seed)
    channels, _, height, width = shape
    network = MotionSurrogate((channels, height, width), gan.window, width=s.width, blocks=s.blocks, pairs=s.pairs)
    return network.to(device)


def _rewards(s: ShiftConfig, cache: Cache, seed: int) -> MotionRewards:
    cache.require_clips()
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


def cache_observations(config: Config, cache: Cache, model: str, device: str = "auto") -> int:
    """Compute and keep what a motion recipe's discriminator sees of the real clips; returns how many clips that are.

    ``mogan train`` does the same at its start for what is missing.
    """
    if config.gan is None or config.gan.space != "motion":
        raise UserError(f"{config.recipe} looks at no optical flow: --observe-for takes a recipe such as mogan_lab")
    world = World(choose_device(device))
    base = wan.resolve_model("lab-teacher" if model == "lab" else model)
    vae = wan.load_vae(base, _dtype(config, world.device)).to(world.device)
    observe = _motion_observation(config, config.gan, vae, world.device)
    _observe_real_clips(cache, config.gan, observe, wan.fingerprint(base, "vae"), world)
    return len(cache.entries)


def _dtype(config: Config, device: torch.device) -> torch.dtype:
    return {"auto": wan.fast_dtype(device), "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]


def _motion_observation(config: Config, gan: GANConfig, vae: Any, device: torch.device) -> MotionObservation:
    flow = wan.load_flow(gan.flow, gan.flow_iterations)
    if isinstance(flow, RaftFlow):
        flow = flow.to(device)
        flow.checkpointing = config.checkpointing
    return MotionObservation(vae, flow, gan.window, gan.max_flow, config.checkpointing, gan.flow_resolution)


def _observe_real_clips(cache: Cache, gan: GANConfig, observe: MotionObservation, vae: str, world: World) -> Path:
    """Compute what the cache lacks of the real clips' observations; returns the folder they are kept in.

    Real clips go through the same chain as generated ones, codec included: the discriminator must not tell them apart
    by the codec's traces.
    """
    key = {
        "vae": vae,
        "flow": wan.flow_fingerprint(gan.flow),
        "flow_iterations": gan.flow_iterations,
        "window": gan.window,
        "max_flow": gan.max_flow,
    } | ({} if gan.flow_resolution is None else {"flow_resolution": gan.flow_resolution})

    @torch.no_grad()
    def observed(latent_BCFHW: Tensor, start: int) -> Tensor:
        return observe(latent_BCFHW.float().to(world.device), start).latent_BCFHW.cpu()

    folder = ensure_observations(cache.path, key, observed, gan.starts, rank=world.rank, ranks=world.ranks)
    world.barrier()
    return folder
