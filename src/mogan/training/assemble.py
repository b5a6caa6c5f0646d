"""From a config to live networks, objectives and optimisers."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mogan.config import Config, DMDConfig, GANConfig, ShiftConfig, SurrogateConfig, Update
from mogan.data.cache import Cache
from mogan.data.observations import Observations
from mogan.devices import choose_device
from mogan.distributed import World, local, shard
from mogan.errors import UserError
from mogan.models import attention, wan
from mogan.models.denoiser import Denoiser, compile_blocks, recomputed
from mogan.models.discriminator import Discriminator
from mogan.models.lora import learned_state, load_learned
from mogan.motion import estimators
from mogan.motion.flow import FlowEstimator, RaftFlow
from mogan.motion.observation import MotionObservation, Observed, full_scale
from mogan.motion.pixel_flux import PixelFlux
from mogan.objectives import Objective
from mogan.objectives.dmd import DMD, dmd_direction
from mogan.objectives.flow_matching import FlowMatching
from mogan.objectives.gan import GAN
from mogan.objectives.motion_score import MotionScore
from mogan.objectives.msm import motion_direction
from mogan.objectives.rewards import MotionRewards
from mogan.objectives.shift import Shift
from mogan.objectives.surrogate import Surrogate
from mogan.objectives.surrogate_network import MotionSurrogate, Remembered
from mogan.objectives.together import Together
from mogan.runs.checkpoint import load_part, student_checkpoint
from mogan.sampling.rollout import Rollout
from mogan.training.load import Base, load


@dataclass
class Assembly:
    """Everything a run works with. ``networks`` are the ones that learn."""

    config: Config
    cache: Cache
    run: Path | None
    world: World
    geometry: wan.Geometry
    latent_shape: tuple[int, int, int, int]
    vae: nn.Module
    networks: dict[str, nn.Module]
    objectives: dict[str, Objective] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    flow: FlowEstimator | None = None
    observations: Observations | None = None
    facts: dict[str, str] = field(default_factory=dict)
    prompts: Cache | None = None
    # of the student's last update, part by part, without gradient
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.world.device

    @property
    def texts(self) -> Cache:
        """Where the prompts come from that the student makes clips of."""
        return self.prompts or self.cache

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
    prompts: Cache | None = None,
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
        prompts: prompts for the updates that need no clip's own caption, in place of the captions of ``cache``.
        run: folder of the run, named in error messages.
        device: ``auto``, ``cpu`` or ``cuda``.
        world: the processes of the run, over which every network is sharded; by default this one alone, on ``device``.
    """
    world = world or World(choose_device(device))
    config = with_scale(config, cache)
    base = load(config, cache, model, student, world, prompts)
    student_network = base.denoiser(base.start, "transformer")
    made = Assembly(config, cache, run, world, base.geometry, base.latent_shape, base.vae, {"student": student_network})
    made.prompts = prompts
    made.facts = {"model": str(base.folder), "student": str(base.start), "data": str(cache.path)}
    made.facts |= {"prompts": str(prompts.path)} if prompts else {}
    if config.dmd is not None:
        _add_dmd(made, base, config.dmd)
    if config.gan is not None:
        _add_gan(made, base, config.gan)
    if config.flow_matching is not None:
        f, no_text = config.flow_matching, base.encode([""])[0]
        made.objectives["flow_matching"] = FlowMatching(
            student_network, no_text, shift=f.shift, drop_text=f.drop_text, given=config.given
        )
    if config.shift is not None:
        _add_shift(made, base, config.shift)
    if config.motion_score is not None:
        m, no_text = config.motion_score, base.encode([""])[0]
        made.objectives["motion_score"] = MotionScore(
            student_network, no_text, windows=m.windows, shift=m.shift, drop_text=m.drop_text
        )
    for several in (u for u in config.plan if len(u.judges) > 1):
        made.objectives[several.by] = Together([made.objectives[judge] for judge in several.judges])
    if base.adapters_of is not None:
        _continue_adapters(made.networks, base.adapters_of)
    if config.compile:
        called = [*made.networks.values(), *(o.teacher for o in made.objectives.values() if isinstance(o, DMD))]
        compile_blocks([n.transformer for n in called if isinstance(n, Denoiser | Discriminator)], made.device)
    for update in config.plan:
        if update.optimizer_name not in made.optimizers:
            made.optimizers[update.optimizer_name] = _optimizer(made, update)
    made.average = {k: v.detach().clone() for k, v in learned_state(student_network.transformer).items()}
    return made


def _optimizer(made: Assembly, update: Update) -> torch.optim.Optimizer:
    o = made.config.optimizers[update.optimizer_name]
    learnable = [p for p in made.networks[update.learns].parameters() if p.requires_grad]
    return torch.optim.AdamW(learnable, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)


def _add_dmd(made: Assembly, base: Base, d: DMDConfig) -> None:
    teacher = Denoiser(base.frozen(base.folder, "transformer"), base.dtype)
    has_own = (base.start / "fake_score" / "config.json").is_file()
    fake = base.denoiser(*((base.start, "fake_score") if has_own else (base.folder, "transformer")))
    made.networks["fake_score"] = fake
    null = attention.stack_text(base.encode([made.config.negative_prompt]), made.device)
    direction = motion_direction(d.motion_weight) if d.motion_weight else dmd_direction
    made.objectives["dmd"] = DMD(
        teacher, fake, null, guidance=d.guidance, shift=d.shift, low=d.low, high=d.high, direction=direction
    )


def _add_gan(made: Assembly, base: Base, g: GANConfig) -> None:
    config = made.config
    discriminator = _discriminator(g, base, config.seed)
    if config.checkpointing:
        discriminator.transformer.enable_gradient_checkpointing(recomputed)
    made.networks["discriminator"] = discriminator
    exact: Callable[[Tensor, int], Observed] | None = None
    if g.space == "motion":
        exact = observe = _motion_observation(config, g, base.vae, base.folder, made.device)
        made.flow = observe.flow
        made.observations = _of_real_clips(made.cache, g, observe, wan.fingerprint(base.folder, "vae"), base.dtype)
        if config.surrogate is not None:
            exact = Remembered(observe, _surrogate(config.surrogate, g.window, made))
            made.networks["surrogate"] = exact.surrogate
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
    made.objectives["gan"] = gan
    if config.surrogate is not None and isinstance(exact, Remembered):
        made.objectives["surrogate"] = Surrogate(exact.surrogate, gan, config.surrogate.limit)


def _add_shift(made: Assembly, base: Base, s: ShiftConfig) -> None:
    config = made.config
    made.flow = flow = estimators.load_flow(s.flow, s.flow_iterations, made.device)
    rewards = _rewards(s, made.cache, config.seed)
    blocks = nn.ModuleList([*rewards.instantaneous.blocks.layers, *rewards.long_term.blocks.layers])
    shard(rewards, blocks, made.world, torch.float32)
    made.networks["reward"] = rewards.to(made.device)
    made.objectives["shift"] = Shift(
        made.student,
        rewards,
        PixelFlux(base.vae, flow),
        attention.stack_text(base.encode([config.negative_prompt]), made.device),
        guidance=s.guidance,
        sigmas=config.sigmas,
        given=config.given,
        points=s.points,
        shift=s.shift,
        weight=s.weight,
        beta=s.beta,
        average=made.world.average,
    )


def _continue_adapters(networks: dict[str, nn.Module], run: Path) -> None:
    """Start the student with a run's averaged adapters, and the fake score, where both have one, with its live ones."""
    start = student_checkpoint(run)
    load_learned(cast(Denoiser, networks["student"]).transformer, load_part(start, "ema"))
    fake = load_part(start, "fake_score")
    if "fake_score" in networks and fake:
        load_learned(networks["fake_score"], fake)


def _discriminator(gan: GANConfig, base: Base, seed: int) -> Discriminator:
    torch.manual_seed(seed)  # the heads start at random
    text = attention.stack_text(base.encode([gan.prompt]))
    trunk = wan.load_transformer(base.folder)
    if gan.blocks > len(trunk.blocks):
        raise UserError(
            f"the recipe's discriminator takes {gan.blocks} blocks and {base.folder} has {len(trunk.blocks)}: lower "
            "gan.blocks and gan.taps"
        )
    network = Discriminator(trunk, text, blocks=gan.blocks, tap_at=gan.taps, sigma=gan.sigma, dtype=base.dtype)
    if not gan.train_trunk:
        network.transformer.requires_grad_(False)
    # penalised it computes in fp32, so its blocks are gathered in fp32
    shard(network, trunk.blocks, base.world, torch.float32 if gan.r1 or gan.r2 else base.dtype)
    return network.to(base.world.device).train()


def _surrogate(s: SurrogateConfig, window: int, made: Assembly) -> MotionSurrogate:
    torch.manual_seed(made.config.seed)
    channels, _, height, width = made.latent_shape
    network = MotionSurrogate((channels, height, width), window, width=s.width, blocks=s.blocks, pairs=s.pairs)
    return network.to(made.device)


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


def with_scale(config: Config, cache: Cache) -> Config:
    """The config with the scale of its motion picture, which a recipe may leave to the cache's clips.

    A run keeps the number in its ``config.json``, and the observations beside theirs.

    Raises:
        UserError: the cache does not say how much its clips move, or they stand still.
    """
    gan = config.gan
    if gan is None or gan.space != "motion" or gan.max_flow is not None:
        return config
    cache.require_clips()
    motions = [entry["motion"] for entry in cache.entries if "motion" in entry]
    scale = full_scale(motions) if motions else 0.0
    if scale <= 0:
        why = "most of its clips stand still" if motions else "it does not say how much its clips move"
        raise UserError(
            f"{cache.path} gives no scale for the picture of motion ({why}): prepare clips that move (--motion-rich), or "
            "give gan.max_flow in the recipe, pixels per frame"
        )
    return replace(config, gan=replace(gan, max_flow=scale))


def _motion_observation(
    config: Config, gan: GANConfig, vae: Any, folder: Path, device: torch.device
) -> MotionObservation:
    flow = estimators.load_flow(gan.flow, gan.flow_iterations, device)
    if isinstance(flow, RaftFlow):
        flow.checkpointing = config.checkpointing
    encoder = None
    if vae.dtype != torch.float32:
        encoder = wan.load_vae(folder, torch.float32)
        encoder.decoder = None
        encoder.to(device)
    assert gan.max_flow is not None
    return MotionObservation(vae, flow, gan.window, gan.max_flow, config.checkpointing, gan.flow_resolution, encoder)


def _of_real_clips(
    cache: Cache, gan: GANConfig, observe: MotionObservation, vae: str, dtype: torch.dtype
) -> Observations:
    """Observations of real clips, which go through the same chain as generated ones, codec included: the discriminator
    must not tell them apart by the codec's traces.
    """
    key = {
        "vae": vae,
        "dtype": str(dtype).removeprefix("torch."),
        "flow": estimators.flow_fingerprint(gan.flow),
        "flow_iterations": gan.flow_iterations,
        "window": gan.window,
        "max_flow": gan.max_flow,
        "encoded": "fp32",
    } | ({} if gan.flow_resolution is None else {"flow_resolution": gan.flow_resolution})
    device = next(observe.vae.parameters()).device
    return Observations(cache, key, lambda latent, start: observe(latent.float().to(device), start).latent_BCFHW)
