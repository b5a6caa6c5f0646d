"""A complete description of a run: frozen dataclasses, no defaults that belong to a paper. Recipes fill them in."""

from dataclasses import dataclass, replace
from itertools import pairwise

# What an update may say: the networks that learn by each objective
LEARN_BY = {
    "dmd": ("student", "fake_score"),
    "gan": ("student", "discriminator"),
    "surrogate": ("student", "discriminator", "surrogate"),
    "flow_matching": ("student",),
    "motion_score": ("student",),
    "shift": ("student", "reward"),
}
OF_ROLLOUTS = ("dmd", "gan", "surrogate")  # they judge what the student makes, so several may judge one rollout


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
        learns: the network that learns, by an objective that :data:`LEARN_BY` lists for it.
        by: the objective that judges; of the student also several of :data:`OF_ROLLOUTS` on one rollout, ``dmd+gan``.
        times: repetitions within one iteration.
        batch: clips per step.
        accumulate: the batch is processed in this many parts.
        optimizer: name of the optimiser; updates that share a name share its moments. Defaults to ``learns``.
        start, stop, every: it happens in iterations ``range(start, stop, every)``; no ``stop`` is the end of the run.
        unless: and not in ``range(start, stop, unless)``: those that another update has with this as its ``every``.
        again: judge the clips that the student's last update of the same iteration made, and make no new ones.
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
    def from_clips(self) -> bool:
        """Whether it learns from real clips and their captions, not from what the student makes of prompts."""
        return not set(self.judges) <= set(OF_ROLLOUTS)

    @property
    def optimizer_name(self) -> str:
        """The optimiser this update steps."""
        return self.optimizer or self.learns

    @property
    def label(self) -> str:
        """Name in logs."""
        return f"{self.learns}<{self.by}"


@dataclass(frozen=True, kw_only=True)
class DMDConfig:
    """Distribution matching; see :class:`mogan.objectives.dmd.DMD`.

    Attributes:
        motion_weight: lambda of motion score matching (see :mod:`mogan.objectives.msm`); 0 is plain DMD.
    """

    guidance: float
    shift: float
    low: float = 0.02
    high: float = 0.98
    motion_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """Adversarial objective and its discriminator; see :class:`mogan.objectives.gan.GAN`.

    Attributes:
        space: ``motion`` (decoded optical flow, MoGAN) or ``latent`` (the ablation).
        student_weight: lambda_1. Of an update with an optimiser of its own Adam undoes it: there the learning rate weighs.
        judge_weight: lambda_2, against ``r1`` and ``r2``.
        blocks: first blocks of the transformer that form the trunk; ``taps``: after which of them heads read.
        prompt: what the trunk is told; ``sigma``: the noise level it is told.
        window: latent frames decoded; ``starts``: where a window may begin, one is drawn per update.
        max_flow: pixels per frame drawn as 1; ``None``: what the cached clips say (:func:`mogan.motion.observation.full_scale`).
        flow: flow estimator (see :func:`mogan.motion.estimators.load_flow`); ``flow_iterations``: its refinement steps;
            ``flow_resolution``: the part of height and width it sees, ``None`` for all.
        drawn_levels: noise the observation to drawn levels and tell them to the trunk, instead of ``sigma`` always.
        train_trunk: the trunk learns too; otherwise only tokens and heads.
    """

    space: str
    blocks: int
    taps: tuple[int, ...]
    prompt: str = "a video with good motion"
    sigma: float = 0.0
    student_weight: float = 0.5
    judge_weight: float = 0.5
    r1: float = 0.3
    r2: float = 0.3
    noise: float = 0.01
    normalise: bool
    window: int
    starts: tuple[int, ...] = (0,)
    flow: str
    flow_iterations: int = 12
    flow_resolution: float | None = None
    max_flow: float | None = None
    drawn_levels: bool = False
    train_trunk: bool = True


@dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """A network that predicts ``gan``'s observation; see :class:`mogan.objectives.surrogate_network.MotionSurrogate`.

    Attributes:
        width: channels inside, a multiple of 8; ``blocks``: how many residual blocks.
        pairs: of the student's latents and their exact observation that it remembers.
        limit: relative error above which updates by the surrogate are exact instead; ``None``: never.
    """

    width: int
    blocks: int
    pairs: int
    limit: float | None


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Flow matching on clips; see :class:`mogan.objectives.flow_matching.FlowMatching`."""

    shift: float
    drop_text: float = 0.1


@dataclass(frozen=True, kw_only=True)
class MotionScoreConfig:
    """A motion model; see :class:`mogan.objectives.motion_score.MotionScore`."""

    windows: tuple[tuple[int, int], ...]
    shift: float
    drop_text: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Advantage-weighted denoising with motion rewards; see :class:`mogan.objectives.shift.Shift`.

    Attributes:
        guidance: of the sampler; its levels are the config's ``sigmas``.
        shift: shift of the levels at which pairs are denoised.
        weight: ``exp`` or ``linear``; ``beta``: its temperature.
        clip: range of a reward.
        points: query points per clip.
        patch: frames, height and width of a patch of the flux maps.
        width, depth, heads: of each reward's transformer.
        flow: flow estimator (see :func:`mogan.motion.estimators.load_flow`); ``flow_iterations``: its refinement steps.
    """

    guidance: float
    shift: float
    weight: str
    beta: float
    clip: tuple[float, float]
    points: int
    patch: tuple[int, int, int]
    width: int
    depth: int
    heads: int
    flow: str
    flow_iterations: int = 12


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of. Written as JSON beside every checkpoint.

    Attributes:
        recipe: name of the recipe it came from.
        sigmas: the student's levels, descending from 1, final 0 implied.
        plan: the updates of one iteration, in order.
        optimizers: by name, see ``Update.optimizer``.
        given: latent frames the student is given, clean: 0 is text to video, 1 image to video.
        ema: decay of the student's averaged weights, which are what is sampled and exported.
        lora: rank of the adapters that student and fake score learn instead of all their weights; ``None``: all weights.
        negative_prompt: the teacher's unconditional branch.
        precision: ``auto`` (bf16 where the hardware has it), ``bf16`` or ``fp32``.
        save_every, sample_every: iterations between checkpoints and between sample sheets.
        keep: checkpoints kept.
        checkpointing: recompute activations in the backward pass, of the transformers and of the whole motion observation.
        compile: compile the transformers' blocks (torch.compile); changes a run by rounding alone.
    """

    recipe: str
    sigmas: tuple[float, ...]
    plan: tuple[Update, ...]
    optimizers: dict[str, Optimizer]
    iterations: int
    ema: float
    dmd: DMDConfig | None = None
    gan: GANConfig | None = None
    surrogate: SurrogateConfig | None = None
    flow_matching: FlowMatchingConfig | None = None
    lora: int | None = None
    motion_score: MotionScoreConfig | None = None
    shift: ShiftConfig | None = None
    given: int = 0
    negative_prompt: str = ""
    precision: str = "auto"
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 50
    sample_every: int = 50
    sample_prompts: int = 4
    keep: int = 2

    def with_budget(self, iterations: int) -> "Config":
        """The same run, longer or shorter."""
        return replace(self, iterations=iterations)

    def takes(self, update: Update) -> tuple[str, ...]:
        """What of real clips an update of the plan is given: ``latent``, ``observation``, both, or none: prompts are enough."""
        sees_motion = self.gan is not None and self.gan.space == "motion"
        if update.from_clips:
            return ("latent",)
        if update.learns == "discriminator" or update.learns == "surrogate":
            both = ("latent", "observation") if update.by == "surrogate" else ("observation",)
            return both if sees_motion else ("latent",)
        return ()

    def __post_init__(self):
        levels = (*self.sigmas, 0.0)
        if any(a <= b for a, b in pairwise(levels)) or self.sigmas[0] != 1.0:
            raise ValueError(f"sigmas must fall from 1 to above 0, not {self.sigmas}")
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"lora must be a rank of at least 1, not {self.lora}")
        learner: dict[str, str] = {}  # of each optimiser
        for place, update in enumerate(self.plan):
            _check_judges(update)
            _check_numbers(update)
            if update.optimizer_name not in self.optimizers:
                raise ValueError(f"{update.label}: no optimiser named {update.optimizer_name}")
            if learner.setdefault(update.optimizer_name, update.learns) != update.learns:
                raise ValueError(
                    f"{update.label}: the optimiser {update.optimizer_name} is the {learner[update.optimizer_name]}'s; "
                    f"give the {update.learns} its own"
                )
            for judge in update.judges:
                if getattr(self, judge) is None:
                    raise ValueError(f"{update.label}: the config has no {judge}")
            if (
                update.again
                and _clips(update) not in [_clips(u) for u in self.plan[:place] if u.learns == "student"][-1:]
            ):
                raise ValueError(
                    f"{update.label}: the student's update before it does not make the clips to judge again"
                )


def _check_judges(update: Update) -> None:
    """Refuse what no objective offers."""
    for judge in update.judges:
        if judge not in LEARN_BY:
            raise ValueError(f"{update.label}: no objective is named {judge!r}; there are {', '.join(LEARN_BY)}")
        if update.learns not in LEARN_BY[judge]:
            raise ValueError(f"{update.label}: by {judge} learn {' and '.join(LEARN_BY[judge])}, not {update.learns!r}")
    together = len(update.judges) > 1
    if together and (update.learns != "student" or len(set(update.judges)) < len(update.judges)):
        raise ValueError(f"{update.label}: only the student learns by several objectives at once, by each of them once")
    if together and not set(update.judges) <= set(OF_ROLLOUTS):
        raise ValueError(f"{update.label}: only {', '.join(OF_ROLLOUTS)} judge a rollout together")


def _check_numbers(update: Update) -> None:
    for name in ("times", "batch", "accumulate", "every", "unless"):
        if (number := getattr(update, name)) is not None and number < 1:
            raise ValueError(f"{update.label}: {name} must be at least 1, not {number}")
    if update.batch % update.accumulate:
        raise ValueError(f"{update.label}: batch {update.batch} does not split into {update.accumulate} parts")


def _clips(update: Update) -> tuple:
    """How many an update makes, in what parts and when."""
    return update.batch, update.accumulate, update.start, update.stop, update.every, update.unless
