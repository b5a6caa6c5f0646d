"""Ways of judging: each a file with its settings, its losses, what it needs and what it costs.

The settings are a :class:`mogan.config.Block`. ``build`` makes an :class:`Objective`, which owns the networks that chase the
student. A loss ``(rollout, batch, generator)`` sends gradient into the network it is named for and into nothing else, and
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
LossFn = Callable[[Any, Batch, Randomness], Loss]  # the first is a Rollout, or None for who asks for none


class Prepare(Protocol):
    """What an objective makes of a batch before its parts are judged."""

    def __call__(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """The batch with ``more``; at most ``most`` clips are computed at a time."""
        ...


class Compare(Protocol):
    """What an objective makes of a batch on sight of all that the student made of it."""

    def __call__(self, batch: Batch, rollouts: Sequence[Any]) -> Batch:
        """The batch with ``more``; the rollouts of its parts, in order, without gradient."""
        ...


@dataclass
class Objective:
    """What the training loop asks of an objective.

    Attributes:
        judge: the object whose methods the losses are, for objectives that build on this one.
        losses: by the network that learns.
        networks: its own that learn, by name.
        frozen: transformers that it calls and that do not learn.
        prepare: once per update; ``None``: nothing.
        compare: by the network that learns, where an update compares the student's clips with each other before any part of
            them is judged. They are made twice then, by the same randomness.
        state: tensors beside the networks' that a run goes on with, by name: checkpoints hold them, and fill them in place.
            Those of all processes are equal.
        observations: what it sees of real clips, for lessons with ``observation``; ``observation_bytes``: size of each.
        flow: the estimator it sees motion through; ``scale``: pixels per frame that its motion picture draws as 1.
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
        calls: one after the other; what each holds stays for the backward pass.
        passes: over weights that are sharded: forward 1, trained 2.
        repeated: operations of forward passes that checkpointing does again.
    """

    calls: tuple[Call, ...] = ()
    passes: float = 0.0
    repeated: float = 0.0


@dataclass(frozen=True)
class Kept:
    """A network that stays in memory.

    Attributes:
        name: of it, the same for one that several objectives share; what learns is named as in the plan.
        parameters: how many; ``beside``: bytes of buffers.
        learns: it has gradients and moments.
        transformer: a whole transformer of the model, which adapters can take the place of and a frozen one can share.
        trunk: of a network that learns, how many of its blocks are such a transformer's first.
        sharded: over the GPUs; else each has all of it.
    """

    name: str
    parameters: int
    beside: float = 0.0
    learns: bool = True
    transformer: bool = False
    trunk: int = 0
    sharded: bool = True


@dataclass(frozen=True)
class Price:
    """What an objective costs.

    Attributes:
        bills: by the network that learns.
        kept: networks beside the student.
        prepare: per clip, once in an iteration that has any of its updates.
        observe: a real clip, once per run; ``stages``: of an observation with gradient, for people to look at.
        once: by name, what the run does once for each of so many clips, its GPUs sharing them.
        check: a clip decoded and its flow, frame by frame; ``pictured``: that is part of a sheet of samples.
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
