"""From costs and a machine to memory per GPU, time per update, and the price of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mogan.config import Config, Update
from mogan.costs.calls import Tracer, one_after_the_other
from mogan.costs.causal import chunks, roll_out_calls
from mogan.costs.machines import GPUS_PER_NODE, REACHED_LINK, Machine, usable
from mogan.errors import UserError
from mogan.estimate.beside import Beside, beside, sampling, text_encoder_bytes
from mogan.objectives import Bill, Kept, Price
from mogan.sampling.rollout import FewStep

FP32, BF16 = 4, 2  # bytes
PREPARE = "prepare"  # what an objective makes once per iteration, in the place of a network that learns


@dataclass(frozen=True)
class Network:
    """What one network occupies on one GPU, bytes; ``waiting`` are moments in the host's memory, ``saved`` is what of all its GPUs
    goes into a checkpoint beside what it learns.
    """

    name: str
    parameters: int
    weights: float
    gradients: float = 0.0
    moments: float = 0.0
    average: float = 0.0
    waiting: float = 0.0
    saved: float = 0.0


@dataclass(frozen=True)
class Step:
    """One update on one GPU.

    Attributes:
        label: who learns, from whom; ``times``: per iteration that has it, which ``share`` of the iterations do.
        clips: of its batch, on this GPU; ``part``: computed at once.
        activations: most bytes that come and go; ``peak``: with everything that stays; ``host``: bytes that wait in the host's memory.
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
    host: float = 0.0


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
    clip: tuple[int, int, int]
    networks: tuple[Network, ...]
    steps: tuple[Step, ...]
    observation: tuple[Stage, ...]
    available: float
    iterations: int
    beside: tuple[Beside, ...]
    sampling: tuple[Beside, ...]
    main_memory: float
    checkpoints: int
    note: str = ""
    copies: int = 1

    @property
    def peak(self) -> float:
        """Most bytes on one GPU while the run trains."""
        return max([step.peak for step in self.steps] + [each.peak for each in self.beside])

    @property
    def host(self) -> float:
        """Most bytes of one process in the host's memory while the run trains."""
        return max(step.host for step in self.steps) + sum(n.waiting for n in self.networks)

    @property
    def checkpoint(self) -> float:
        """Bytes of one checkpoint: what learns, its moments, averages, and what objectives keep, of all GPUs together."""
        whole = 1 if self.lora else self.gpus // self.copies  # adapters lie on every GPU
        learnt = whole * sum(n.gradients + n.moments + n.waiting + n.average for n in self.networks)
        return learnt + sum(n.saved for n in self.networks)

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
    config: Config, tracer: Tracer, machine: Machine, gpus: int, *, clips: int, lora: int | None = None, copies: int = 1
) -> Estimate:
    """Price a recipe.

    Sharding is FSDP2's: weights, gradients, moments and averages are divided by the GPUs; two blocks are gathered in bf16 at
    a time; autoencoder and flow network are on every GPU. One GPU keeps everything, and autocast's copies of the weights. So
    do many with adapters: the weights that they share lie whole on every GPU.

    Args:
        config: the recipe.
        tracer: of the model.
        machine: one GPU of it.
        gpus: how many.
        clips: real clips, none of which anybody has observed yet; 0 if all are.
        lora: rank of adapters in place of full weights of student and fake score.
        copies: of the sharded networks (HSDP): each is divided by ``gpus / copies``.
    """
    shapes, prices = tracer.shapes, {name: block.price(config, tracer) for name, block in config.objectives.items()}
    networks = _networks(config, prices, tracer, gpus, lora, gpus // copies)
    stays = sum(n.weights + n.moments + n.average for n in networks)
    # of who learns: gradients, and what its optimiser fetches for a step
    gradients = {n.name: (n.gradients, 2 * n.gradients if n.waiting else 0.0) for n in networks}
    steps = [
        _step(tracer, machine, gpus, lora, update, _share(config, [update]), _bill(config, update, prices, tracer), stays,
              *gradients.get(update.learns, (0.0, 0.0)))
        for update in config.plan
    ]  # fmt: skip
    for name, price in prices.items():
        if price.prepare is not None:
            those = [u for u in config.plan if name in u.judges]
            first = replace(those[0], learns=PREPARE, times=1)
            steps.insert(0, _step(tracer, machine, gpus, lora, first, _share(config, those), price.prepare, stays, 0.0))
    odd = [u.batch for u in config.plan if u.batch % gpus]
    stages = {name: call for price in prices.values() for name, call in price.stages.items()}
    more = sum(n.average for n in networks) + _gathered(tracer, gpus, lora)
    return Estimate(
        config.recipe,
        shapes.name,
        machine,
        gpus,
        lora,
        config.checkpointing,
        (shapes.size.frames, shapes.size.height, shapes.size.width),
        networks,
        tuple(steps),
        tuple(Stage(n, c.held, c.peak, c.work.flops, c.work.seconds(machine)) for n, c in stages.items()),
        usable(machine.memory),
        config.iterations,
        beside(config, tracer, tuple(prices.values()), machine, gpus, clips, stays, more),
        sampling(config, tracer, machine),
        max(text_encoder_bytes(tracer), min(gpus, GPUS_PER_NODE) * FP32 * tracer.parameters["transformer"]),
        config.keep,
        f"a batch of {odd[0]} does not split over {gpus} GPUs: train with --batch, a multiple of {gpus}" if odd else "",
        copies,
    )


def _step(
    tracer: Tracer,
    machine: Machine,
    gpus: int,
    lora: int | None,
    update: Update,
    share: float,
    bill: Bill,
    stays: float,
    gradients: float,
    fetched: float = 0.0,
) -> Step:
    """One update on one GPU; ``stays`` are bytes that are always there, ``fetched`` those of the optimiser's step alone."""
    clips_here = update.batch / gpus
    part = max(1, min(update.batch // update.accumulate, math.ceil(clips_here)))
    call = one_after_the_other(bill.calls)
    activations = call.peak * part + _gathered(tracer, gpus, lora)
    waiting = _communication(tracer, machine, gpus, lora, bill.passes) * math.ceil(clips_here / part)
    return Step(
        update.label,
        update.times,
        share,
        clips_here,
        part,
        activations,
        stays
        + gradients
        + max(activations, gradients + fetched),  # AdamW's foreach step needs as much again as the weights
        call.work.flops * clips_here,
        (call.work.flops - bill.repeated) * clips_here,
        max(call.work.seconds(machine) * clips_here, waiting),
        waiting,
        call.host * part,
    )


def _bill(config: Config, update: Update, prices: Mapping[str, Price], tracer: Tracer) -> Bill:
    """Per clip, of the rollout if one is made and of everybody who judges; as in :func:`mogan.training.steps.learn`."""
    for name in update.judges:
        if update.learns not in prices[name].bills:
            raise UserError(
                f"objective {name} has a lesson for {update.learns} and no bill: add it to those of its price"
            )
    bills = [prices[name].bills[update.learns] for name in update.judges]
    calls, passes, repeated = [], 0.0, sum(bill.repeated for bill in bills)
    if config.lesson(update).rollout and not update.again:
        before = (update.rollout or config.rollout or FewStep()).steps(config.sigmas)
        learns, (forward, train) = update.learns == "student", tracer.student
        if config.causal is None:
            calls += [
                replace(forward, work=forward.work * before, held=0.0),
                train if learns else forward.freed(),
            ]
            passes += before + 1 + learns
        else:
            made, passes = roll_out_calls(tracer, config.causal, before, learns=learns)
            calls, forward = [*made], chunks(tracer, config.causal)[0]
        repeated += forward.work.flops if learns and config.checkpointing else 0.0
    calls += [call for bill in bills for call in bill.calls]
    return Bill(tuple(calls), passes + sum(bill.passes for bill in bills), repeated)


def _share(config: Config, updates: Sequence[Update]) -> float:
    """The part of a run's iterations that has any of these updates."""
    looked_at = min(config.iterations, 1_000_000)  # of endless runs the beginning
    return sum(any(u.happens(i) for u in updates) for i in range(looked_at)) / looked_at


def _networks(
    config: Config, prices: Mapping[str, Price], tracer: Tracer, gpus: int, lora: int | None, shards: int
) -> tuple[Network, ...]:
    one, rank, told = tracer.parameters["transformer"], lora or 0, int(config.told)
    of_student = 1 if config.boundary is None and tracer.shapes.boundary is None else 2  # experts
    layers = round((one - tracer.parameters["rest"]) / tracer.parameters["block"])
    blocks = layers * tracer.parameters["block"]
    held_once = BF16 * blocks + FP32 * (one - blocks) if lora else FP32 * one  # a frozen transformer

    def optimizers(name: str) -> int:
        return len({u.optimizer_name for u in config.plan if u.learns == name})

    def trained(kept: Kept, averaged: bool = False, own_base: bool = False) -> Network:
        """With adapters, a transformer learns those over a frozen base, which it may share."""
        adapts = lora is not None and kept.transformer
        each = tracer.parameters["adapters"] + told * tracer.parameters["told_adapters"]
        parameters = rank * each * (kept.parameters // one) if adapts else kept.parameters
        if lora is not None and kept.trunk:
            trunk = tracer.parameters["rest"] + kept.trunk * tracer.parameters["block"]
            parameters += rank * tracer.parameters["adapters"] * kept.trunk // layers - trunk
            adapts = True
        mine = FP32 * parameters / (1 if adapts else shards)
        # two experts that start as the one transformer of a model share it
        held = held_once * (max(1, kept.parameters // one) if tracer.shapes.boundary else 1)
        weights = mine + kept.beside + (held if adapts and own_base else 0.0)
        moments = 2 * optimizers(kept.name) * mine
        waits = bool(config.offload) and (adapts or gpus == 1)
        here, there = (0.0, moments) if waits else (moments, 0.0)
        return Network(kept.name, parameters, weights, mine, here, averaged * mine, there, kept.beside)

    every = list({kept.name: kept for price in prices.values() for kept in price.kept}.values())
    # adapters share the frozen weights of a network that starts as they do, unless the student starts elsewhere
    teaches = any(k.transformer and not k.learns for k in every)
    own_base = config.post_trains or not teaches
    learns = any(update.learns == "student" for update in config.plan)
    student = Kept("student", of_student * (one + told * tracer.parameters["told"]), transformer=True)
    found = [trained(student, True, own_base)] if learns else []
    for kept in every:
        if kept.learns:
            found.append(trained(kept, own_base=bool(kept.trunk) and not teaches and config.post_trains))
        elif kept.sharded:
            frozen = held_once * (kept.parameters / one) if kept.transformer else FP32 * kept.parameters
            whole = lora is not None and kept.transformer
            learnt = rank * tracer.parameters["adapters"] * kept.parameters // one if whole else kept.parameters
            saved = FP32 * learnt if kept.saved else 0.0
            found.append(Network(kept.name, kept.parameters, frozen if whole else frozen / shards, saved=saved))
    vae = tracer.parameters["vae"]
    found.append(Network("autoencoder", vae, (FP32 if config.precision == "fp32" else BF16) * vae))
    found += [Network(k.name, k.parameters, FP32 * k.parameters) for k in every if not k.learns and not k.sharded]
    return tuple(found)


def _gathered(tracer: Tracer, gpus: int, lora: int | None) -> float:
    """Weights in the precision of the matrix products, beside the fp32 ones; those that adapters leave frozen are held in it."""
    block, rest = tracer.parameters["block"], tracer.parameters["rest"]
    if gpus == 1 or lora is not None:
        copies = max(tracer.train.copies, tracer.forward.copies)
        return min(copies, BF16 * (rest + lora * tracer.parameters["adapters"])) if lora else copies
    return 2 * BF16 * block + FP32 * block + FP32 * rest  # two gathered blocks, one block's gradients, what is outside


def _communication(tracer: Tracer, machine: Machine, gpus: int, lora: int | None, passes: float) -> float:
    """Seconds a part's collectives take: bf16 weights gathered at every pass, fp32 gradients reduced once.

    Of adapters the gradients alone are reduced, and given back; what a sharded discriminator gathers beside them is not counted.
    """
    if gpus == 1:
        return 0.0
    whole = tracer.parameters["transformer"] * (BF16 * passes + FP32)
    moved = (whole if lora is None else 2 * FP32 * lora * tracer.parameters["adapters"]) * (gpus - 1) / gpus
    return moved / (REACHED_LINK * (machine.link if gpus <= GPUS_PER_NODE else machine.network))
