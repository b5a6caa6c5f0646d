"""Multi-step consistency distillation (MCD): the teacher's trajectory in segments, each of them a step of the student.

Heek et al., "Multistep Consistency Models" (arXiv 2403.06807); the first stage of Efficient-vDiT (arXiv 2502.06155).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogan.config import EULER, Config
from mogan.costs.calls import Tracer
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.models.lora import learned_state
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness, guided_calls
from mogan.objectives.base import Base
from mogan.objectives.consistency import follow
from mogan.objectives.flow_matching import OF_CLIPS
from mogan.sampling.rollout import normal
from mogan.schedule import add_noise, broadcast, shifted_levels, uniform
from mogan.terms import Terms


@dataclass(frozen=True, kw_only=True)
class MCDConfig:
    """Multi-step consistency distillation; see :class:`MCD`. The student's levels are where segments begin.

    Attributes:
        steps: of the teacher's grid; ``shift``: of its levels.
        guidance: of the teacher.
        decay: of the average that is the target; ``since``: iteration before which the target is the student itself.
    """

    steps: int
    shift: float
    guidance: float
    decay: float
    since: int = 0

    def terms(self, config: Config) -> Terms:
        """The student learns from clips and their captions. Raises ValueError for steps that do not end on the grid."""
        self.ends(config)
        return Terms(lessons={"student": OF_CLIPS})

    def ends(self, config: Config) -> tuple[float, ...]:
        """Where segments end, as the grid has it: at the student's next level, at last 0."""
        if config.solver != EULER or config.given or config.told:
            raise ValueError(
                "a student of segments makes whole clips by Euler steps: give the config rollout=Euler(...) and given=0"
            )
        grid = shifted_levels(self.steps, self.shift)
        found = [level for level in grid if any(abs(level - sigma) < 1e-6 for sigma in config.sigmas)]
        if len(found) < len(config.sigmas):
            raise ValueError(
                f"the student's levels {config.sigmas} must lie on the teacher's grid of {self.steps} steps, shift {self.shift}: "
                "its steps are segments of it"
            )
        return (*found[1:], 0.0)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The student, the target that follows it, and the frozen base model, which attends densely."""
        target, teacher = base.started().requires_grad_(False), base.teacher(0.0, 1.0)
        null = base.no_text(base.config.negative_prompt)
        found = MCD(base.student, target, teacher, null, self, self.ends(base.config))
        frozen = (*teacher.experts, *target.experts)
        losses = {"student": found.student_loss}
        return Objective(found, losses, frozen=frozen, prepare=found.prepare, state=learned_state(target))

    def price(self, config: Config, tracer: Tracer) -> Price:
        """The teacher guided, the target, and the student, trained."""
        forward, train = tracer.student
        steps = (tracer.forward.times(guided_calls(self.guidance)).freed(), train, forward.freed())
        bill = Bill(steps, 4, forward.work.flops if config.checkpointing else 0.0)
        weights = tracer.parameters["transformer"] * (1 if tracer.shapes.boundary is None else 2)
        kept = (
            Kept(name, weights, learns=False, transformer=True, saved=name == "target")
            for name in ("teacher", "target")
        )
        return Price({"student": bill}, tuple(kept))


class MCD:
    """``E ||J(x_i, s_i -> e; student) - sg J(x_{i+1}, s_{i+1} -> e; target)||^2`` with ``J(x, s -> e; v) = x + (e - s) v(x, s)``:
    one step of the teacher apart, both mean the same end.

    ``x_i`` is a real clip noised to a level of the teacher's grid; ``x_{i+1} = x_i + (s_{i+1} - s_i) v(x_i, s_i)`` with the guided
    teacher's ``v``; ``e`` is the end of the segment that ``s_i`` lies in, and where ``s_{i+1} = e`` the target is ``x_{i+1}``
    itself. One segment is consistency distillation of the clip; as many as the grid has steps, regression on the teacher's
    steps. The student's Euler steps then go from end to end.

    Args:
        student: the network being trained.
        target: its average; ``teacher``: frozen.
        null_1LD: embedding of the negative prompt.
        settings: grid, guidance, decay.
        ends: levels of the grid, falling to 0, at which segments end.
    """

    def __init__(
        self,
        student: Denoiser,
        target: Denoiser,
        teacher: Denoiser,
        null_1LD: Tensor,
        settings: MCDConfig,
        ends: tuple[float, ...],
    ):
        self.student, self.target, self.teacher = student, target, teacher
        self.null_1LD, self.settings = null_1LD, settings
        self.levels = (*shifted_levels(settings.steps, settings.shift), 0.0)
        self.ends = tuple(max(e for e in ends if e < level) for level in self.levels[:-1])  # of each step of the grid

    @torch.no_grad()
    def prepare(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """The target takes in what the student has learnt up to this update."""
        follow(self.target, self.student, 1.0 if iteration <= self.settings.since else 1 - self.settings.decay)
        return batch

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch's clips; ``rollout`` is not used."""
        assert batch.latent_BCFHW is not None, "consistency distillation needs clips, not only prompts"
        device = self.null_1LD.device
        x0, text = sent(batch.latent_BCFHW, device), stack_text(batch.text, device)
        step = (uniform(len(x0), generator) * self.settings.steps).long()
        level, following = (sent(torch.tensor(self.levels)[step + ahead], device) for ahead in (0, 1))
        end = sent(torch.tensor(self.ends)[step], device)
        x = add_noise(x0, normal(x0.shape, generator, device), level)
        with torch.no_grad():
            velocity = guided_velocity(self.teacher, x, level, text, self.null_1LD, self.settings.guidance)
            there = x + broadcast(following - level, x) * velocity
            meant = jump(self.target, there, following, end, text)
        return (jump(self.student, x, level, end, text) - meant).square().mean(), {}


def jump(network: Any, x: Tensor, level: Tensor, end: Tensor, text: Tensor) -> Tensor:
    """``J(x, s -> e; v) = x + (e - s) v(x, s)``: straight to the end of a segment; where ``s = e`` it is ``x``.

    ``x``: ``(B, C, F, H, W)``, as what is returned; levels ``(B,)``; ``text``: ``(B, L, D)``. Efficient-vDiT (arXiv 2502.06155).
    """
    return x + broadcast(end - level, x) * network.velocity(x, level, text)
