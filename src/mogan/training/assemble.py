"""From a config to live networks, objectives and optimisers."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mogan.config import Config, RolloutKind, Update
from mogan.data.cache import Cache
from mogan.data.observations import Observations
from mogan.devices import choose_device
from mogan.distributed import World
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.denoiser import Denoiser, compile_blocks
from mogan.models.host import resting, set_aside
from mogan.models.lora import learned_state, load_learned
from mogan.motion.flow import FlowEstimator
from mogan.objectives import Objective
from mogan.runs.checkpoint import load_part, student_checkpoint
from mogan.sampling.rollout import FewStep
from mogan.training.average import Average
from mogan.training.load import filled, load


@dataclass
class Assembly:
    """Everything a run works with. ``networks`` are the ones that learn, ``prompts`` a second set beside the clips' captions."""

    config: Config
    cache: Cache
    prompts: Cache | None
    run: Path | None
    world: World
    geometry: wan.Geometry
    latent_shape: tuple[int, int, int, int]
    vae: nn.Module
    networks: dict[str, nn.Module]
    objectives: dict[str, Objective]
    optimizers: dict[str, torch.optim.Optimizer]
    average: Average

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.world.device

    @property
    def texts(self) -> Cache:
        """Where the prompts come from that the student makes clips of."""
        return self.prompts or self.cache

    @property
    def references(self) -> int:
        """Latent frames that stand before every clip, of reference pictures."""
        return self.texts.references if self.student.controlled else 0

    @property
    def student(self) -> Denoiser:
        """The network being trained."""
        return cast(Denoiser, self.networks["student"])

    def rollout(self, update: Update) -> RolloutKind:
        """How the student makes the clips that an update judges."""
        return update.rollout or self.config.rollout or FewStep()

    def judges(self, update: Update) -> list[Objective]:
        """The objectives of an update."""
        return [self.objectives[name] for name in update.judges]

    @property
    def observations(self) -> Observations | None:
        """What an objective sees of real clips, if one does."""
        return next((o.observations for o in self.objectives.values() if o.observations), None)

    @property
    def flow(self) -> FlowEstimator | None:
        """What motion is seen through, if it is."""
        return next((o.flow for o in self.objectives.values() if o.flow), None)

    @property
    def scale(self) -> float | None:
        """Pixels per frame that the motion picture draws as 1, if there is one."""
        return next((o.scale for o in self.objectives.values() if o.scale is not None), None)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: weights (of networks with adapters the adapters alone), the optimisers' moments by
        number of the parameter, averages, and what objectives keep beside their networks.
        """
        state = {f"{name}.{k}": v for name, network in self.networks.items() for k, v in learned_state(network).items()}
        for name, optimizer in self.optimizers.items():
            for number, moments in optimizer.state_dict()["state"].items():
                state |= {f"{name}_optimizer.{number}.{k}": v for k, v in moments.items()}
        for name, objective in self.objectives.items():
            state |= {f"{name}_state.{k}": v for k, v in objective.state.items()}
        return state | {f"ema.{k}": v for k, v in self.average.weights.items()}

    def prepare_to_load(self, names: Collection[str]) -> None:
        """Give every optimiser the moments that are among ``names``, at zero: optimisers make theirs at their first step."""
        for name, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments: dict[int, dict[str, Tensor]] = {}
            for key in names:
                if key.startswith(prefix := f"{name}_optimizer."):
                    number, kind = key.removeprefix(prefix).split(".")
                    like = torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[int(number)])
                    moments.setdefault(int(number), {})[kind] = like
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
            if self.config.offload:
                set_aside(optimizer)


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

    Raises:
        UserError: a model, the cache or the prompts do not fit the recipe.
    """
    world = world or World(choose_device(device))
    config = filled(config, cache)
    base = load(config, cache, model, student, world, prompts)
    networks: dict[str, nn.Module] = {"student": base.student}
    objectives: dict[str, Objective] = {}
    for name, block in config.objectives.items():
        objectives[name] = made = block.build(base, objectives)
        _check_built(name, set(config.terms(name).lessons), made, networks)
        networks |= made.networks
    if base.adapters_of is not None:
        _continue_adapters(networks, base.adapters_of, world)
    if config.compile:
        own = [
            t for n in networks.values() for t in (getattr(n, "transformer", None), getattr(n, "transformer_2", None))
        ]
        called = [*filter(None, own), *(t for o in objectives.values() for t in o.frozen)]
        compile_blocks(called, world.device)
    return Assembly(
        config,
        cache,
        prompts,
        run,
        world,
        base.geometry,
        base.latent_shape,
        base.vae,
        networks,
        objectives,
        _optimizers(config, networks),
        Average(base.student.learner, config.ema),
    )


def _check_built(name: str, learn: set[str], made: Objective, networks: dict[str, nn.Module]) -> None:
    """What was promised is there, and takes nobody's place."""
    if lacking := learn - set(made.losses):
        raise UserError(f"objective {name} has a lesson and no loss for {', '.join(sorted(lacking))}: add it to losses")
    if taken := set(made.networks) & set(networks):
        raise UserError(f"objective {name} names a network {taken.pop()!r}, and the run has one so called: rename it")
    if unknown := learn - {*made.networks, *networks}:
        raise UserError(f"objective {name} has no network {unknown.pop()!r} to learn: add it to networks")


def _optimizers(config: Config, networks: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    made: dict[str, torch.optim.Optimizer] = {}
    for update in config.plan:
        name = update.optimizer_name
        if name not in made:
            o = config.optimizers[name]
            learnable = [p for p in networks[update.learns].parameters() if p.requires_grad]
            adamw = torch.optim.AdamW(learnable, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
            made[name] = resting(adamw) if config.offload else adamw
    return made


def _continue_adapters(networks: dict[str, nn.Module], run: Path, world: World) -> None:
    """Start the student with a run's averaged adapters, and what else has adapters there and here with its live ones."""
    start = world.from_main(lambda: student_checkpoint(run))  # that run may save another one meanwhile
    load_learned(cast(Denoiser, networks["student"]).learner, load_part(start, "ema"))
    for name, network in networks.items():
        if name != "student" and isinstance(network, Denoiser) and (there := load_part(start, name)):
            load_learned(network, there)
