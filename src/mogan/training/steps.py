"""One update: what it is given, what the student makes of it, who judges, what is learnt.

All randomness is a pure function of (seed, iteration, update, repeat, place in the batch), so a run resumed from a checkpoint
is the run that was never stopped, and a run of many processes is, but for rounding, the run of one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mogan.config import Config, Update
from mogan.data.batches import Batch, draw_batch
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser
from mogan.models.host import kept_on_host
from mogan.objectives import Loss, Objective, Randomness
from mogan.runs.checkpoint import latest_checkpoint
from mogan.sampling.rollout import Rollout, normal
from mogan.sharding import average_gradients, whole
from mogan.terms import OBSERVATION
from mogan.training.assemble import Assembly

EXIT, NOISE, LOSS = 0, 2, 3  # what randomness of a step is for
CUT = (
    "prompts",
    "text",
    "ids",
    "latent_BCFHW",
    "observation_BCFHW",
    "path_BKCFHW",
    "control_BKFHW",
    "picture_BTD",
    "places",
)  # row by row

RECORDED = {"iteration", "update", "repeat", "loss", "grad_norm", "seconds", "core_seconds"}  # a record's own


def generator_for(*keys: int) -> torch.Generator:
    """A generator that depends on ``keys`` alone."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in keys]).generate_state(2, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Position:
    """Where in a run a step stands."""

    seed: int
    iteration: int
    update: int
    repeat: int

    def generator(self, purpose: int, place: int = -1) -> torch.Generator:
        """Randomness for one purpose; ``place`` is a sample's number in the whole batch, left out for what all share."""
        return generator_for(self.seed, self.iteration, self.update, self.repeat, purpose, place)

    def generators(self, purpose: int, batch: Batch) -> list[torch.Generator]:
        """One generator per sample: its noise depends neither on how the batch is accumulated nor on who computes it."""
        return [self.generator(purpose, place) for place in batch.places]


def positions(config: Config, start: int) -> Iterator[Position]:
    """Every step of a run from iteration ``start`` on, in order."""
    for iteration in range(start, config.iterations):
        for index, update in enumerate(config.plan):
            for repeat in range(update.times if update.happens(iteration) else 0):
                yield Position(config.seed, iteration, index, repeat)


def parts_of(size: int, most: int) -> int:
    """The fewest equal parts of ``size`` clips that hold at most ``most`` each."""
    return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= most)


def with_batch(update: Update, batch: int) -> Update:
    """The same update on another batch, computed in parts no larger than the recipe's: those are what fits."""
    return replace(update, batch=batch, accumulate=parts_of(batch, update.batch // update.accumulate))


def draw(parts: Assembly, where: Position) -> Batch:
    """Our share of the batch of one step: prompts and, where needed, real clips or their observations of one window."""
    update = parts.config.plan[where.update]
    lesson = parts.config.lesson(update)
    more: dict[str, Any] = {} if parts.observations is None else {"observation": parts.observations.read}
    return draw_batch(
        parts.cache,
        seed=where.seed,
        rank=parts.world.share,
        ranks=parts.world.shares,
        iteration=where.iteration,
        update=where.update,
        repeat=where.repeat,
        size=update.batch // parts.world.shares,
        want=lesson.clips,
        starts=lesson.starts,
        prompts=None if lesson.captions else parts.prompts,
        levels=(*parts.config.sigmas, 0.0),
        controls=parts.student.controlled,
        given=parts.config.given if lesson.rollout else 0,
        **more,
    )


def complete(parts: Assembly, update: Update, batch: Batch) -> Batch:
    """The batch with the observations that nobody had computed when it was drawn."""
    wanted = OBSERVATION in parts.config.lesson(update).clips
    return parts.observations.complete(batch) if wanted and parts.observations is not None else batch


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into equal parts for accumulation."""
    size = len(batch.prompts) // parts
    pieces = []
    for i in range(parts):
        window = slice(i * size, (i + 1) * size)
        cut: dict[str, Any] = {name: None if (value := getattr(batch, name)) is None else value[window] for name in CUT}
        pieces.append(replace(batch, more={name: value[window] for name, value in batch.more.items()}, **cut))
    return pieces


def rolled_out(parts: Assembly, update: Update, batch: Batch, where: Position, *, grad: bool = True) -> Rollout | None:
    """What the student makes of the batch's prompts, if anybody asks; with gradient if it is the student that learns."""
    if not parts.config.lesson(update).rollout:
        return None
    generators, sigmas = where.generators(NOISE, batch), parts.config.sigmas
    noise = normal(torch.Size((len(batch.prompts), *parts.latent_shape)), generators, parts.device)
    text, kind = batch.told(parts.device), parts.rollout(update)
    step = kind.draw(sigmas, where.generator(EXIT))
    return kind.make(parts.student, noise, text, sigmas, generators, step, grad and update.learns == "student")


def compared(parts: Assembly, update: Update, batch: Batch, where: Position, most: int) -> Batch:
    """The batch as its objectives complete it on sight of all that the student makes of it, ``most`` clips at a time.

    Its parts are rolled out again, with gradient, when each is judged: only one of their graphs fits into memory.
    """
    found = [o.compare[update.learns] for o in parts.judges(update) if update.learns in o.compare]
    if found:
        pieces = split(batch, parts_of(len(batch.ids), most))
        with torch.no_grad():
            rollouts = [rolled_out(parts, update, piece, where, grad=False) for piece in pieces]
            for compare in found:
                batch = compare(batch, rollouts)
    return batch


def judged(
    objectives: Sequence[Objective], learns: str, rollout: Rollout | None, batch: Batch, generator: Randomness
) -> Loss:
    """The sum of the losses, whose randomness is drawn one after the other."""
    losses: list[Tensor] = []
    logs: dict[str, Tensor] = {}
    for objective in objectives:
        found = objective.losses[learns](rollout, batch, generator)
        by = f"the {learns}'s loss by {type(objective.judge).__name__}"
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
            raise TypeError(f"{by} returns no (loss, numbers to log)")
        loss, more = found
        for name, value in {"loss": loss, **more}.items():
            if not isinstance(value, Tensor) or value.ndim:
                shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{by} returns as {name!r} {shape}, not one number as a tensor without dimensions")
        if taken := more.keys() & (logs.keys() | RECORDED):
            raise TypeError(f"{by} logs {taken.pop()!r}, as the run or another objective of the update does: rename it")
        losses.append(loss)
        logs |= more
    return torch.stack(losses).sum(), logs


@dataclass(frozen=True)
class Learnt:
    """What an update leaves: numbers to log, on the device, and the clips of a student that learnt, part by part."""

    numbers: dict[str, Tensor]
    rollouts: list[Rollout]


def learn(parts: Assembly, where: Position, batch: Batch, again: Sequence[Rollout] = ()) -> Learnt:
    """One update: roll out, judge, back-propagate in parts, clip, optimise, average. Nothing waits for the device.

    Every process does this on its share of the batch; the backward pass averages gradients over them (see
    :func:`mogan.sharding.shard`). ``again`` are the clips of the student's last update, for those that judge them again.

    Raises:
        UserError: gradient reaches a network that does not learn by the update.
    """
    update = parts.config.plan[where.update]
    network, optimizer = parts.networks[update.learns], parts.optimizers[update.optimizer_name]
    objectives, most = parts.judges(update), update.batch // update.accumulate  # clips at a time
    for prepare in (o.prepare for o in objectives if o.prepare):
        generators = where.generators(NOISE, batch)
        batch = prepare(batch, iteration=where.iteration, generator=generators, most=most)
    batch = compared(parts, update, batch, where, most)
    pieces = split(batch, parts_of(len(batch.ids), most))
    numbers: dict[str, Tensor] = {}
    made: list[Rollout] = []
    for number, piece in enumerate(pieces):
        with kept_on_host(bool(parts.config.offload)):
            rollout = again[number] if update.again else rolled_out(parts, update, piece, where)
            loss, logs = judged(objectives, update.learns, rollout, piece, where.generators(LOSS, piece))
        (loss / len(pieces)).backward()
        if rollout is not None and update.learns == "student":
            made.append(replace(rollout, sample_BCFHW=rollout.sample_BCFHW.detach()))
        for key, value in (logs | {"loss": loss.detach()}).items():
            numbers[key] = numbers.get(key, 0) + value / len(pieces)
    for name, other in parts.networks.items():
        if name != update.learns and any(p.grad is not None for p in other.parameters()):
            raise UserError(
                f"{update.label} sends gradient into {name}, which does not learn by it: call it within "
                "mogan.models.denoiser.frozen, or on what is detached"
            )
    average_gradients(network, parts.world, partial=isinstance(network, Denoiser))
    trained = [p for p in network.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(trained, parts.config.optimizers[update.optimizer_name].clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # a network that rests keeps no gradients
    if update.learns == "student":
        parts.average.update()
    return Learnt(numbers | {"grad_norm": whole(norm)}, made)


def read(parts: Assembly, learnt: Sequence[tuple[Position, dict[str, Tensor]]]) -> list[dict[str, float]]:
    """The numbers of some steps, averaged over the processes: read together, the only time the host waits for them.

    Raises:
        UserError: a loss or a gradient is no number. What was learnt since is lost: the last checkpoint is the one before.
    """
    if not learnt:
        return []
    means = iter(parts.world.mean([value for _, numbers in learnt for value in numbers.values()]))
    records = [dict(zip(numbers, means, strict=False)) for _, numbers in learnt]
    for (where, _), record in zip(learnt, records, strict=True):
        if not np.isfinite([record["loss"], record["grad_norm"]]).all():
            raise _not_finite(parts, where, record)
    return records


def _not_finite(parts: Assembly, where: Position, record: dict) -> UserError:
    good = latest_checkpoint(parts.run) if parts.run else None
    others = [f"{k} ({v})" for k, v in record.items() if k not in RECORDED and not np.isfinite(v)]
    look = f"Look at {', '.join(others)}, or try" if others else "Try"
    return UserError(
        f"iteration {where.iteration}, {parts.config.plan[where.update].label}: the loss is {record['loss']} and the gradient "
        f"norm {record['grad_norm']}; nothing of this iteration is kept and the last checkpoint is "
        f"{good or 'not written yet'}. {look} a lower learning rate, --precision fp32, or a smaller clip"
    )


def step(
    parts: Assembly, where: Position, batch: Batch | None = None, again: Sequence[Rollout] = ()
) -> dict[str, float]:
    """One update by itself: draw a batch, learn from it, read the numbers to log (means over the processes).

    Raises:
        UserError: a loss or a gradient is not finite, or gradient reaches another network.
    """
    batch = complete(parts, parts.config.plan[where.update], batch or draw(parts, where))
    return read(parts, [(where, learn(parts, where, batch, again).numbers)])[0]
