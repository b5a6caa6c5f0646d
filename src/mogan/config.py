"""A complete description of a run: frozen dataclasses, no defaults that belong to a paper. Recipes fill them in.

An objective is described by a block of its own, which lies beside it in :mod:`mogan.objectives`; here is only what every
block answers. So nothing in this file, in the loop or in the price of a run knows a method by name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Protocol

from mogan.terms import Lesson, Terms, joined, require_kept, several, whole_numbers


class Block(Protocol):
    """The settings of one objective: a frozen dataclass beside it."""

    def terms(self, config: "Config") -> Terms:
        """What the objective asks of a run. Raises ValueError if the rest of the config does not fit."""
        ...

    def build(self, base: Any, others: Mapping[str, Any]) -> Any:
        """The live :class:`mogan.objectives.Objective`, on a :class:`mogan.objectives.base.Base`; ``others`` were built before it."""
        ...

    def price(self, config: "Config", tracer: Any) -> Any:
        """The :class:`mogan.objectives.Price` of its updates, by a :class:`mogan.costs.calls.Tracer`."""
        ...


PRECISIONS = ("auto", "bf16", "fp32")
_LEAST = dict.fromkeys(("iterations", "save_every", "sample_every", "keep", "lora"), 1) | {
    "seed": 0,
    "sample_prompts": 0,
}
LCM, EULER = "lcm", "euler"  # between a student's steps: fresh noise on its clean prediction, or its own flow


class RolloutKind(Protocol):
    """How a student makes clips while it is trained; see :mod:`mogan.sampling.rollout`.

    ``solver`` is how such a student is sampled: ``lcm`` or ``euler``. If ``told`` is true, the student and the networks trained
    beside it get the end of each step as input. A kind with ``counts`` trains for several numbers of steps. One with ``causal``
    generates chunk by chunk, with a student that sees only the past.
    """

    solver: ClassVar[str]

    def draw(self, sigmas: tuple[float, ...], generator: Any) -> int:
        """The step whose prediction is judged."""
        ...

    def make(
        self, student: Any, noise: Any, text: Any, sigmas: tuple[float, ...], generator: Any, step: int, grad: bool
    ) -> Any:
        """A :class:`mogan.sampling.rollout.Rollout` up to that step."""
        ...

    def steps(self, sigmas: tuple[float, ...]) -> float:
        """Mean number of steps before the judged one. Raises ValueError for a student that cannot be rolled out so."""
        ...


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW for one network.

    Attributes:
        lr: learning rate.
        betas: AdamW's.
        weight_decay: decoupled.
        clip: largest gradient norm of an update; larger ones are scaled down.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Update:
    """One kind of step within an iteration.

    Attributes:
        learns: the network that learns.
        by: the objective by which it learns; of the student also several at once, ``dmd+gan``.
        times: repetitions within one iteration.
        batch: clips per step.
        accumulate: the batch is processed in this many parts.
        optimizer: name of the optimiser; updates that share a name share its moments. Defaults to ``learns``.
        start, stop, every: it happens in iterations ``range(start, stop, every)``; no ``stop`` is the end of the run.
        unless: but not in ``range(start, stop, unless)``, the iterations of another update with this as its ``every``.
        rollout: the kind of rollout of this update; ``None``: the config's.
        again: judge the clips that the student's last update of the same iteration made, instead of new ones.
    """

    learns: str
    by: str
    times: int = 1
    batch: int
    accumulate: int = 1
    optimizer: str | None = None
    start: int = 0
    stop: int | None = None
    every: int = 1
    unless: int | None = None
    rollout: RolloutKind | None = None
    again: bool | None = None

    def happens(self, iteration: int) -> bool:
        """Whether this update is part of an iteration."""
        since = iteration - self.start
        ended = self.stop is not None and iteration >= self.stop
        left_out = self.unless is not None and since % self.unless == 0
        return not ended and not left_out and since >= 0 and since % self.every == 0

    @property
    def judges(self) -> tuple[str, ...]:
        """The names in ``by``."""
        return tuple(self.by.split("+"))

    @property
    def optimizer_name(self) -> str:
        """The optimiser this update steps."""
        return self.optimizer or self.learns

    @property
    def label(self) -> str:
        """Name in logs."""
        return f"{self.learns}<{self.by}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of. Written as JSON beside every checkpoint.

    Attributes:
        recipe: name of the recipe it came from.
        sigmas: the student's levels, descending from 1, final 0 implied.
        plan: the updates of one iteration, in order.
        optimizers: by name, see ``Update.optimizer``.
        objectives: by the names that the plan uses; one may build on those before it.
        post_trains: the student is a few-step student already, which must be named and whose levels must agree.
        rollout: how the student generates the clips that are judged; ``None``: its few steps, fresh noise between them.
        boundary: the student has two experts, one for levels from here on and one for those below, both initialised from the
            start's transformer of those levels; ``None``: as many as the start has.
        given: clean latent frames that the student gets: 0 is text to video, 1 image to video.
        states: labelled states of clips, and the words that initialise each row of text (:mod:`mogan.models.states`);
            ``None``: those of the start.
        ema: decay of the student's averaged weights, which are what is sampled and exported.
        lora: rank of the adapters that student, fake score and MoGAN's trunk learn instead of all their weights; ``None``: all weights.
        negative_prompt: the teacher's unconditional branch.
        precision: ``auto`` (bf16 where the hardware has it), ``bf16`` or ``fp32``.
        save_every, sample_every: iterations between checkpoints and between sample sheets.
        keep: checkpoints kept.
        checkpointing: recompute activations in the backward pass, of the transformers and of the whole motion observation.
        compile: compile the transformers' blocks (torch.compile); changes a run by rounding alone.
        offload: tensors of the backward pass are held in the host's memory, and decoder, encoder, flow and discriminator take
            the smallest steps (:mod:`mogan.models.host`); goes with ``checkpointing``. Slower, and changes a run by rounding alone.
    """

    recipe: str
    sigmas: tuple[float, ...]
    plan: tuple[Update, ...]
    optimizers: dict[str, Optimizer]
    iterations: int
    ema: float
    objectives: dict[str, Block]
    post_trains: bool = False
    rollout: RolloutKind | None = None
    lora: int | None = None
    boundary: float | None = None
    given: int = 0
    negative_prompt: str = ""
    precision: str = "auto"
    checkpointing: bool = False
    compile: bool = False
    offload: bool | None = None
    states: dict[str, str] | None = None
    seed: int = 0
    save_every: int = 50
    sample_every: int = 50
    sample_prompts: int = 4
    keep: int = 2

    def with_budget(self, iterations: int) -> "Config":
        """The same run, longer or shorter."""
        return replace(self, iterations=iterations)

    def changed(self, name: str, **settings: Any) -> "Config":
        """The same run with other settings of one objective."""
        block: Any = self.objectives[name]
        return replace(self, objectives=self.objectives | {name: replace(block, **settings)})

    def as_json(self) -> dict[str, Any]:
        """What a run writes of it; of a kind of rollout also which it is."""
        found = asdict(self)
        kinds = [self.rollout, *(update.rollout for update in self.plan)]
        for written, kind in zip([found, *found["plan"]], kinds, strict=True):
            if kind is not None:
                written["rollout"] |= {"kind": type(kind).__name__}
        return found | ({} if self.solver == LCM else {"solver": self.solver})

    @property
    def solver(self) -> str:
        """How the student's steps follow one another when it is sampled."""
        return LCM if self.rollout is None else self.rollout.solver

    @property
    def told(self) -> bool:
        """Whether student and fake score are told where a step ends (:mod:`mogan.models.step_condition`)."""
        return bool(getattr(self.rollout, "told", False))

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of steps that the student is trained for, where there are several."""
        return tuple(getattr(self.rollout, "counts", None) or ())

    @property
    def causal(self) -> Any:
        """How a student that sees the past alone makes clips (:class:`mogan.models.causal_cache.Causal`); ``None``: it sees all."""
        return getattr(self.rollout, "causal", None)

    @property
    def alone(self) -> str:
        """Why an objective trains in one process; empty where none minds."""
        return next(filter(None, (self.terms(name).alone for name in self.objectives)), "")

    def terms(self, name: str) -> Terms:
        """What one objective asks of this run."""
        return self.objectives[name].terms(self)

    def lesson(self, update: Update) -> Lesson:
        """What an update needs: all that any of the objectives in ``by`` does."""
        return joined(self.terms(name).lessons[update.learns] for name in update.judges)

    def __post_init__(self):
        several("sigmas", self.sigmas, float, int)
        # whole numbers would make tensors of whole numbers, into which no level between 0 and 1 goes
        object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        several("plan", self.plan, Update)
        levels = (*self.sigmas, 0.0)
        if any(a <= b for a, b in pairwise(levels)) or self.sigmas[0] != 1.0:
            raise ValueError(f"sigmas must fall from 1 to above 0, not {self.sigmas}")
        whole_numbers(self, _LEAST)
        if not isinstance(self.recipe, str) or self.precision not in PRECISIONS or not 0 <= self.ema < 1:
            raise ValueError(
                f"recipe is text, precision one of {', '.join(PRECISIONS)}, ema from 0 to below 1, "
                f"not {self.recipe!r}, {self.precision!r}, {self.ema!r}"
            )
        for name, settings in {**self.objectives, "rollout": self.rollout}.items():
            if settings is not None and not is_dataclass(settings):
                raise ValueError(
                    f"{name}: settings are a dataclass, since a run keeps them; {type(settings).__name__} is none"
                )
        for field in fields(self):
            require_kept(field.name, getattr(self, field.name))
        if self.states is not None and not self.states:
            raise ValueError("states: at least one, or None")
        for kind in filter(None, (self.rollout, *(update.rollout for update in self.plan))):
            kind.steps(self.sigmas)
        if self.causal is not None and (self.boundary is not None or self.given not in (0, self.causal.first)):
            raise ValueError(
                "rollout: a causal student is one transformer and is given nothing or its first chunk: leave out boundary, and make "
                f"given {self.causal.first} or 0"
            )
        if self.told and self.given:
            raise ValueError(
                "given: a student that is told where its steps end is given no first frames: leave one out"
            )
        if self.boundary is not None and not self.sigmas[-1] < self.boundary <= 1:
            raise ValueError(
                f"boundary must lie among the levels {self.sigmas} for both experts to have one, not {self.boundary}"
            )
        learner: dict[str, str] = {}  # of each optimiser
        for place, update in enumerate(self.plan):
            self._check_judges(update)
            _check_numbers(update)
            if update.optimizer_name not in self.optimizers:
                raise ValueError(f"{update.label}: no optimiser named {update.optimizer_name}")
            if learner.setdefault(update.optimizer_name, update.learns) != update.learns:
                raise ValueError(
                    f"{update.label}: the optimiser {update.optimizer_name} is the {learner[update.optimizer_name]}'s; "
                    f"give the {update.learns} its own"
                )
            if update.again and update.learns == "student":
                raise ValueError(
                    f"{update.label}: what the student made before is kept without gradient: leave again out of its updates"
                )
            if (
                update.again
                and _clips(update)
                not in [_clips(u) for u in self.plan[:place] if u.learns == "student" and self.lesson(u).rollout][-1:]
            ):
                raise ValueError(
                    f"{update.label}: the student's update before it does not make the clips to judge again"
                )

    def _check_judges(self, update: Update) -> None:
        """Refuse what no objective offers."""
        for judge in update.judges:
            if judge not in self.objectives:
                named = ", ".join(self.objectives) or "none"
                raise ValueError(f"{update.label}: the config has no objective named {judge!r}; it has {named}")
            learn = self.terms(judge).lessons
            if update.learns not in learn:
                raise ValueError(f"{update.label}: by {judge} learn {' and '.join(learn)}, not {update.learns!r}")
        if len(update.judges) > 1 and (update.learns != "student" or len(set(update.judges)) < len(update.judges)):
            raise ValueError(
                f"{update.label}: only the student learns by several objectives at once, by each of them once"
            )
        if self.lesson(update).rollout and self.given and self.causal is None and self.solver == LCM:
            raise ValueError(
                f"{update.label}: a student that is given its first frames is sampled by Euler steps: give the config "
                "rollout=Euler(stop=len(sigmas), since=0)"
            )
        own = getattr(update.rollout, "causal", None)
        if update.rollout is not None and (own and own.fixed) != (self.causal and self.causal.fixed):
            raise ValueError(f"{update.label}: a causal student makes all its clips chunk by chunk, in the same way")
        whole = [j for j in update.judges if not (self.terms(j).lessons[update.learns].rollout or self.terms(j).forces)]
        if self.causal is not None and update.learns == "student" and whole:
            raise ValueError(f"{update.label}: it calls a student on whole clips, which a causal one cannot be")
        if self.causal is not None and self.given and self.lesson(update).rollout:
            raise ValueError(
                f"{update.label}: what a causal student makes while it trains begins with nothing: leave out given"
            )


def _check_numbers(update: Update) -> None:
    least = dict.fromkeys(("times", "batch", "accumulate", "every", "unless"), 1) | {"start": 0, "stop": 0}
    whole_numbers(update, least, f"{update.label}: ")
    if update.batch % update.accumulate:
        raise ValueError(f"{update.label}: batch {update.batch} does not split into {update.accumulate} parts")


def _clips(update: Update) -> tuple:
    """How many an update makes, in what parts and when."""
    return update.batch, update.accumulate, update.start, update.stop, update.every, update.unless, update.rollout
