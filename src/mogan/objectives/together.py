"""Several objectives that judge one rollout: ``Update(by="dmd+gan")``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mogan.data.cache import Batch
from mogan.objectives import Loss, Objective, Randomness
from mogan.sampling.rollout import Rollout


class Together:
    """The sum of the student's losses. What judges learns by its own objective.

    Args:
        objectives: each judges a rollout.
    """

    needs_rollout = True

    def __init__(self, objectives: Sequence[Objective]):
        self.objectives = objectives

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """Sum of the losses; their randomness is drawn one after the other."""
        losses: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        for objective in self.objectives:
            loss, more = objective.student_loss(rollout, batch, generator)
            losses.append(loss)
            logs |= more
        return torch.stack(losses).sum(), logs

    def judge_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """Nothing: a judge learns by one objective."""
        raise AssertionError("a network that judges learns by its own objective")
