"""Ways of judging a rollout.

An objective owns the networks that chase the student. ``student_loss(rollout, batch, generator)`` sends gradient into
the student and into nothing else; ``judge_loss(rollout, batch, generator)`` trains the objective's own networks on a
rollout without gradient. Both return the loss and a dictionary of scalars worth logging.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from mogan.data.cache import Batch

Loss = tuple[Tensor, dict[str, Tensor]]
Randomness = torch.Generator | list[torch.Generator]  # in training one per sample; see mogan.sampling.rollout.normal


class Objective(Protocol):
    """What the training loop asks of an objective."""

    needs_rollout: bool  # if False, ``rollout`` is None

    def student_loss(self, rollout: Any, batch: Batch, generator: Randomness) -> Loss:
        """Loss whose gradient reaches the student only."""
        ...

    def judge_loss(self, rollout: Any, batch: Batch, generator: Randomness) -> Loss:
        """Loss whose gradient reaches the objective's own networks only."""
        ...
