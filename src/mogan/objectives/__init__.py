"""Objectives: each a file with its settings, its losses, its needs and its costs.

The settings are a :class:`mogan.config.Block`. ``build`` makes an :class:`Objective`, which owns the networks that train beside
the student. A loss ``(rollout, batch, generator)`` sends gradient into the network it is named for and into nothing else, and
returns itself and a dictionary of scalars worth logging.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mogan.costs.trace import Call
from mogan.data.batches import Batch
from mogan.data.observations import Observations
from mogan.motion.flow import FlowEstimator

Loss = tuple[Tensor, dict[str, Tensor]]
Randomness = torch.Generator | list[torch.Generator]  # in training one per sample; see mogan.sampling.rollout.normal
LossFn = Callable[[Any, Batch, Randomness], Loss]  # the first is a Rollout, or None if the lesson wants none


class Prepare(Protocol):
    """A function of a whole batch, called once per update before its parts are judged."""

    def __call__(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """The batch with ``more``; at most ``most`` clips are computed at a time."""
        ...


class Compare(Protocol):
    """A function of a whole batch and of all samples that the student made for it."""

    def __call__(self, batch: Batch, rollouts: Sequence[Any]) -> Batch:
        """The batch with ``more``; the rollouts of its parts, in order, without gradient."""
        ...


@dataclass
class Objective:
    """What the training loop asks of an objective.

    Attributes:
        judge: the object with its losses as methods, for objectives that build on this one.
        losses: by the network that learns; each returns a scalar and scalars to log.
        networks: its own networks that learn, by name.
        frozen: transformers that it calls and that do not learn.
        prepare: called once per update; ``None``: nothing.
        compare: by the network that learns, if an update compares the student's clips with each other before any part of
            them is judged. They are then generated twice, from the same random numbers.
        state: tensors other than the networks' that a resumed run needs, by name: checkpoints hold them, and fill them in
            place. They are equal in all processes, but for the shares of sharded weights.
        observations: its inputs for real clips, for lessons with ``observation``; ``observation_bytes``: size of each.
        flow: its flow estimator; ``scale``: the speed in pixels per frame that its flow picture draws as 1.
    """

    judge: Any
    losses: Mapping[str, LossFn]
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    frozen: Sequence[nn.Module] = ()
    prepare: Prepare | None = None
    compare: Mapping[str, Compare] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    observations: Observations | None = None
    observation_bytes: int = 0
    flow: FlowEstimator | None = None
    scale: float | None = None


# ---------------------------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Bill:
    """What an objective adds to an update, per clip, beside the student's rollout.

    Attributes:
        calls: one after the other; the memory that each holds stays until the backward pass.
        passes: over sharded weights: forward 1, trained 2.
        repeated: floating-point operations of forward passes that checkpointing repeats.
    """

    calls: tuple[Call, ...] = ()
    passes: float = 0.0
    repeated: float = 0.0


@dataclass(frozen=True)
class Kept:
    """A network that stays in memory.

    Attributes:
        name: the same if several objectives share it; a network that learns is named as in the plan.
        parameters: their number; ``beside``: bytes of buffers.
        learns: it has gradients and moments.
        transformer: it is a whole transformer of the model, which adapters can replace and frozen ones can share.
        trunk: of a network that learns, the number of blocks that are such a transformer's first ones.
        sharded: over the GPUs; else each GPU holds all of it.
        saved: it does not learn, and is in checkpoints, as averages are.
    """

    name: str
    parameters: int
    beside: float = 0.0
    learns: bool = True
    transformer: bool = False
    trunk: int = 0
    sharded: bool = True
    saved: bool = False


@dataclass(frozen=True)
class Price:
    """What an objective costs.

    Attributes:
        bills: by the network that learns.
        kept: networks beside the student.
        prepare: per clip, once in an iteration that has any of its updates.
        observe: observing a real clip, once per run; ``stages``: those of an observation with gradient, for the printed table.
        once: by name, work done once per run for each of so many clips, shared by its GPUs.
        check: decoding a clip and its flow, frame by frame; ``pictured``: that is part of a sheet of samples.
    """

    bills: Mapping[str, Bill]
    kept: tuple[Kept, ...] = ()
    prepare: Bill | None = None
    observe: Call | None = None
    once: Mapping[str, tuple[int, Call]] = field(default_factory=dict)
    stages: Mapping[str, Call] = field(default_factory=dict)
    check: Call | None = None
    pictured: bool = False


def guided_calls(guidance: float) -> int:
    """Of a guided network: with the prompt and, unless guidance is 1, without."""
    return 1 if guidance == 1 else 2
