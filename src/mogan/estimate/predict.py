"""From costs and a machine to memory per GPU, time per update, and the price of a run."""

import math
from dataclasses import dataclass, replace

from mogan.config import Config, ShiftConfig, Update
from mogan.estimate.beside import Beside, beside, sampling, text_encoder_bytes
from mogan.estimate.costs import Costs
from mogan.estimate.machines import GPUS_PER_NODE, REACHED_LINK, Machine, usable
from mogan.estimate.shapes import Shapes
from mogan.estimate.trace import Call, Work

FP32, BF16 = 4, 2  # bytes
PAIRS = "pairs"  # what SHIFT samples, in the place of a network that learns


@dataclass(frozen=True)
class Network:
    """What one network occupies on one GPU, bytes."""

    name: str
    parameters: int
    weights: float
    gradients: float = 0.0
    moments: float = 0.0
    average: float = 0.0


@dataclass(frozen=True)
class Step:
    """One update on one GPU.

    Attributes:
        label: who learns, from whom; ``times``: per iteration that has it, which ``share`` of the iterations do.
        clips: of its batch, on this GPU; ``part``: computed at once.
        activations: most bytes that come and go; ``peak``: with everything that stays.
        flops: computed by one GPU, recomputation included; ``model_flops``: without it.
        seconds: predicted; ``waiting``: seconds of communication, which overlap with computing.
    """

    label: str
    times: int
    share: float
    clips: float
    part: int
    activations: float
    peak: float
    flops: float
    model_flops: float
    seconds: float
    waiting: float


@dataclass(frozen=True)
class Stage:
    """One stage of the motion observation of one clip, forward and backward: bytes, FLOPs and seconds."""

    name: str
    held: float
    peak: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A recipe on a machine."""

    recipe: str
    model: str
    machine: Machine
    gpus: int
    lora: int | None
    checkpointing: bool
    window: int | None
    clip: tuple[int, int, int]
    networks: tuple[Network, ...]
    steps: tuple[Step, ...]
    observation: tuple[Stage, ...]
    available: float
    iterations: int
    beside: tuple[Beside, ...]
    sampling: tuple[Beside, ...]
    main_memory: float
    note: str = ""

    @property
    def peak(self) -> float:
        """Most bytes on one GPU while the run trains."""
        return max([step.peak for step in self.steps] + [each.peak for each in self.beside])

    @property
    def fits(self) -> bool:
        """Whether that is less than the GPU has for tensors."""
        return self.peak <= self.available

    @property
    def iteration_seconds(self) -> float:
        """One pass through the plan, a mean over the run."""
        return sum(step.times * step.share * step.seconds for step in self.steps)

    @property
    def hours(self) -> float:
        """The whole run, from start to last checkpoint: updates, observations of real clips, sheets; without loading."""
        return self.iterations * self.iteration_seconds / 3600 + sum(each.hours for each in self.beside)


def predict(
    config: Config, shapes: Shapes, costs: Costs, machine: Machine, gpus: int, *, clips: int, lora: int | None = None
) -> Estimate:
    """Price a recipe.

    Sharding is FSDP2's: weights, gradients, moments and averages are divided by the GPUs; two blocks are gathered in bf16 at
    a time; autoencoder and flow network are on every GPU. One GPU keeps everything, and autocast's copies of the weights.

    Args:
        config: the recipe.
        shapes: the model.
        costs: of :func:`mogan.estimate.costs.measure_costs` for both.
        machine: one GPU of it.
        gpus: how many.
        clips: real clips, none of which anybody has observed yet; 0 if all are.
        lora: rank of adapters in place of full weights of student and fake score.
    """
    networks = _networks(config, costs, gpus, lora)
    stays = sum(n.weights + n.moments + n.average for n in networks)
    gradients = {n.name: n.gradients for n in networks}
    steps = []
    for update in (*_sampling(config), *config.plan):
        clips_here = update.batch / gpus
        part = max(1, min(update.batch // update.accumulate, math.ceil(clips_here)))
        activations = _activations(config, update, costs) * part + _gathered(shapes, costs, gpus)
        learner = gradients.get(update.learns, 0.0)
        work, passes = _work(config, update, costs)
        waiting = _communication(costs, machine, gpus, passes) * math.ceil(clips_here / part)
        steps.append(
            Step(
                update.label,
                update.times,
                _share(config, update),
                clips_here,
                part,
                activations,
                stays + learner + max(activations, learner),  # AdamW's foreach step needs as much again as the weights
                work.flops * clips_here,
                (work.flops - _recomputed(config, update, costs)) * clips_here,
                max(work.seconds(machine) * clips_here, waiting),
                waiting,
            )
        )
    odd = [u.batch for u in config.plan if u.batch % gpus]
    gan = config.gan
    more = sum(n.average for n in networks) + _gathered(shapes, costs, gpus)
    return Estimate(
        config.recipe,
        shapes.name,
        machine,
        gpus,
        lora,
        config.checkpointing,
        gan.window if gan is not None and gan.space == "motion" else None,
        (shapes.size.frames, shapes.size.height, shapes.size.width),
        networks,
        tuple(steps),
        tuple(Stage(n, c.held, c.peak, c.work.flops, c.work.seconds(machine)) for n, c in costs.stages.items()),
        usable(machine.memory),
        config.iterations,
        beside(config, shapes, costs, machine, gpus, clips, stays, more),
        sampling(config, shapes, costs, machine),
        text_encoder_bytes(shapes, costs),
        f"a batch of {odd[0]} does not split over {gpus} GPUs: give --batch a multiple of {gpus}" if odd else "",
    )


def _sampling(config: Config) -> tuple[Update, ...]:
    """SHIFT's pairs, which the first update of an iteration samples, observes and rewards for all of them; as an update."""
    first = next((u for u in config.plan if u.by == "shift"), None)
    return () if first is None else (replace(first, learns=PAIRS, times=1),)


def _share(config: Config, update: Update) -> float:
    """The part of a run's iterations that has this update; pairs are made for any of SHIFT's."""
    those = [u for u in config.plan if u.by == "shift"] if update.learns == PAIRS else [update]
    return sum(any(u.happens(i) for u in those) for i in range(config.iterations)) / config.iterations


def _networks(config: Config, costs: Costs, gpus: int, lora: int | None) -> tuple[Network, ...]:
    whole, rank = costs.parameters["transformer"], lora or 0

    def optimizers(name: str) -> int:
        return len({u.optimizer_name for u in config.plan if u.learns == name})

    def trained(name: str, parameters: int, averaged: bool = False) -> Network:
        mine = FP32 * parameters / gpus
        return Network(name, parameters, mine, mine, 2 * optimizers(name) * mine, mine if averaged else 0.0)

    def adapters(name: str, averaged: bool, own_base: bool) -> Network:
        base = (BF16 * blocks + FP32 * (whole - blocks)) / gpus if own_base else 0.0
        learned = FP32 * rank * costs.parameters["adapters"] / gpus
        return Network(
            name,
            rank * costs.parameters["adapters"],
            base + learned,
            learned,
            2 * optimizers(name) * learned,
            averaged * learned,
        )

    layers = round((whole - costs.parameters["rest"]) / costs.parameters["block"])
    blocks = layers * costs.parameters["block"]
    learning = {u.learns for u in config.plan}
    found = []
    if "student" in learning:
        # adapters of student and fake score share the teacher's frozen weights, unless the student starts elsewhere
        own_base = config.dmd is None or config.gan is not None
        found.append(adapters("student", True, own_base) if lora else trained("student", whole, True))
    if config.dmd is not None:
        held = BF16 * blocks + FP32 * (whole - blocks) if lora else FP32 * whole
        found.append(Network("teacher", whole, held / gpus))
        found.append(adapters("fake_score", False, False) if lora else trained("fake_score", whole))
    if config.gan is not None:
        found.append(trained("discriminator", costs.parameters["discriminator"]))
    if config.surrogate is not None:
        surrogate = trained("surrogate", costs.parameters["surrogate"])
        found.append(replace(surrogate, weights=surrogate.weights + FP32 * costs.parameters["remembered"]))
    if config.shift is not None:
        found.append(trained("reward", costs.parameters["reward"]))
    precision = FP32 if config.precision == "fp32" else BF16
    found.append(Network("autoencoder", costs.parameters["vae"], precision * costs.parameters["vae"]))
    if encoder := costs.parameters.get("fp32 encoder"):
        found.append(Network("fp32 encoder", encoder, FP32 * encoder))
    if costs.parameters.get("flow"):
        found.append(Network("flow network", costs.parameters["flow"], FP32 * costs.parameters["flow"]))
    return tuple(found)


def _gathered(shapes: Shapes, costs: Costs, gpus: int) -> float:
    """Weights in the precision of the matrix products, beside the fp32 ones."""
    if gpus == 1:
        return max(costs.train.copies, costs.forward.copies)
    block, rest = costs.parameters["block"], costs.parameters["rest"]
    return 2 * BF16 * block + FP32 * block + FP32 * rest  # two gathered blocks, one block's gradients, what is outside


def _activations(config: Config, update: Update, costs: Costs) -> float:
    """Most bytes alive at once in one update of one clip, beside weights and gradients."""
    forward, train = costs.forward, costs.train
    if update.by == "shift":
        assert config.shift is not None
        assert costs.pixel_flux is not None
        assert costs.reward is not None
        if update.learns == PAIRS:
            return max(_calls(config.shift.guidance) * forward.peak, costs.pixel_flux.peak)
        return 2 * (train if update.learns == "student" else costs.reward).peak  # both clips of a pair
    if update.learns == "discriminator":
        seen = costs.observe
        if update.by == "surrogate":
            assert costs.predict is not None
            seen = replace(
                costs.predict, peak=2 * costs.predict.peak
            )  # real clips' latents and the student's in one pass
        rolled = 0.0 if update.again else forward.peak
        return max(seen.peak if seen else 0.0, rolled, _shown(config, update) * _judge(update, costs).peak)
    if update.learns == "surrogate":
        assert costs.predict_learns is not None
        return 2 * costs.predict_learns.peak
    held = peak = 0.0  # what judges a rollout, one after the other, while what each needs for its backward pass stays
    if update.learns == "student":
        for judge in update.judges:
            for call in _judging(config, judge, costs):
                peak, held = max(peak, held + call.peak), held + call.held
    return max(train.peak, train.held + peak)


def _judging(config: Config, judge: str, costs: Costs) -> tuple[Call, ...]:
    """Calls by which an objective judges a rollout of one clip, in order; none where the network that learns is itself all."""
    if judge == "dmd":
        assert config.dmd is not None
        calls = _calls(config.dmd.guidance)
        return (Call(costs.forward.work * calls, 0.0, calls * costs.forward.peak), replace(costs.forward, held=0.0))
    if judge not in ("gan", "surrogate"):
        return ()
    assert costs.judge_frozen is not None
    seen = costs.observe_grad if judge == "gan" else costs.predict_grad
    return (seen, costs.judge_frozen) if seen else (costs.judge_frozen,)


def _work(config: Config, update: Update, costs: Costs) -> tuple[Work, float]:
    """Work of one update per clip, and passes over a transformer's weights (forward 1, trained 2)."""
    before = (len(config.sigmas) - 1) / 2  # the exit step is uniform over the student's steps
    forward, train = costs.forward.work, costs.train.work
    if update.by in ("flow_matching", "motion_score"):  # a motion model's longest window is as long as a clip
        return train, 2
    if update.by == "shift":
        return _shift_work(config.shift, update, costs, len(config.sigmas))
    if update.learns == "student":
        judging = [call.work for judge in update.judges for call in _judging(config, judge, costs)]
        return sum(judging, forward * before + train), before + 2 + 2 * len(update.judges)
    if update.learns == "surrogate":
        assert costs.predict_learns is not None
        return costs.predict_learns.work * 2, 0
    rolled, passes = (Work(), 0.0) if update.again else (forward * (before + 1), before + 1)
    if update.by == "dmd":
        return rolled + train, passes + 2
    seen = costs.observe.work if costs.observe else Work()
    if update.by == "surrogate":
        assert costs.predict is not None
        seen = costs.predict.work * 2
    return rolled + seen + _judge(update, costs).work * _shown(config, update), passes + 2


def _judge(update: Update, costs: Costs) -> Call:
    """The discriminator as it learns in an update."""
    judge = costs.judge_predicted if update.by == "surrogate" else costs.judge
    assert judge is not None
    return judge


def _shift_work(shift: ShiftConfig | None, update: Update, costs: Costs, steps: int) -> tuple[Work, float]:
    """As :func:`_work`, per pair of clips."""
    assert shift is not None
    assert costs.pixel_flux is not None
    assert costs.reward is not None
    if update.learns == "student":
        return costs.train.work * 2, 2
    if update.learns != PAIRS:
        return costs.reward.work * 2, 0
    judged = costs.pixel_flux.work + costs.reward.work * (1 / 3)  # forward alone
    return costs.forward.work * (steps * _calls(shift.guidance)) + judged * 2, steps


def _calls(guidance: float) -> int:
    """Of a guided network: with the prompt and, unless guidance is 1, without."""
    return 1 if guidance == 1 else 2


def _shown(config: Config, update: Update) -> int:
    """Inputs per clip of the discriminator's passes: one of the student's, or real and generated, each noised if penalised."""
    if update.learns == "student":
        return sum(judge in ("gan", "surrogate") for judge in update.judges)
    if update.learns != "discriminator":
        return 0
    assert config.gan is not None
    return 2 + (update.by == "gan") * (bool(config.gan.r1) + bool(config.gan.r2))


def _recomputed(config: Config, update: Update, costs: Costs) -> float:
    """Operations of the forward passes that checkpointing repeats, per clip."""
    if not config.checkpointing or update.learns in (PAIRS, "reward", "surrogate"):
        return 0.0
    flops = costs.forward.work.flops if update.learns in ("student", "fake_score") else 0.0
    if costs.judge is not None:  # forward, forward again, and a backward pass of twice the work
        flops += _shown(config, update) * costs.judge.work.flops / 4
    if config.gan is not None and costs.observe is not None and update.learns == "student" and "gan" in update.judges:
        start = sum(config.gan.starts) / len(config.gan.starts)
        flops += costs.observe.work.flops * config.gan.window / (config.gan.window + start)
    return flops * 2 if update.by == "shift" else flops


def _communication(costs: Costs, machine: Machine, gpus: int, passes: float) -> float:
    """Seconds a part's collectives take: bf16 weights gathered at every pass, fp32 gradients reduced once."""
    if gpus == 1:
        return 0.0
    moved = costs.parameters["transformer"] * (BF16 * passes + FP32) * (gpus - 1) / gpus
    return moved / (REACHED_LINK * (machine.link if gpus <= GPUS_PER_NODE else machine.network))
