"""Causal consistency distillation: few steps from a causal model of many, on real clips, without its paths (2602.02214)."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.causal import forced
from mogan.data.batches import Batch
from mogan.distributed import local
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.denoiser import guided_velocity
from mogan.models.lora import learned_state
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness, guided_calls
from mogan.objectives.base import Base
from mogan.objectives.teacher_forcing import Forced, forcing_terms, past_of, per_chunk, require_one_pass
from mogan.sampling.rollout import normal
from mogan.schedule import add_noise, broadcast, shifted_levels, uniform, velocity_to_x0
from mogan.terms import Terms


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency distillation of the causal model that the student starts as; see :class:`Consistency`.

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
        """Those of all that teacher-forces."""
        return forcing_terms(config)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The start twice more: as the frozen teacher, and as the target that follows the student."""
        if base.adapters_of is not None:
            raise UserError(
                f"{base.config.recipe} distils the model that it starts from: name an export of {base.adapters_of}"
            )
        student = require_one_pass(base)
        if base.world.main and wan.defaults(base.start).causal is None:
            print(
                f"{base.config.recipe} distils the model that it starts from, and {base.start} has never seen the past alone: name "
                "the export of a teacher-forced run (causal_teacher_lab) with --student",
                file=sys.stderr,
            )
        target = CausalDenoiser(base.denoiser(base.start, "transformer").transformer.requires_grad_(False), base.dtype)
        teacher = CausalDenoiser(base.frozen(base.start, "transformer"), base.dtype)
        null = base.no_text(base.config.negative_prompt)
        found = Consistency(student, target, teacher, null, base.config.causal, self)
        frozen = (teacher.transformer, target.transformer)
        losses = {"student": found.student_loss}
        return Objective(found, losses, frozen=frozen, prepare=found.prepare, state=learned_state(target))

    def price(self, config: Config, tracer: Tracer) -> Price:
        """Twice a clip's frames: the teacher guided, the target, and the student, trained."""
        forward, train = forced(tracer, config.causal)
        calls, weights = guided_calls(self.guidance), tracer.parameters["transformer"]
        steps = (forward.times(calls).freed(), train, forward.freed())
        bill = Bill(steps, 4, forward.work.flops if config.checkpointing else 0.0)
        kept = (Kept(name, weights, learns=False, transformer=True) for name in ("teacher", "target"))
        return Price({"student": bill}, tuple(kept))


class Consistency:
    """``E ||x0(x_i, s_i) - sg x0_target(x_{i+1}, s_{i+1})||^2``: one step of the teacher apart, both mean the same clip.

    ``x_i`` is a real clip noised to a level of the teacher's grid, one per chunk; ``x_{i+1} = x_i + (s_{i+1} - s_i) v(x_i, s_i)``
    with the guided teacher's ``v``; where ``s_{i+1} = 0`` the target is ``x_{i+1}`` itself. All three see the real past.

    Args:
        student: the causal network being trained; ``target``: its average; ``teacher``: frozen.
        null_1LD: embedding of the negative prompt.
        how: chunks and what they see.
        settings: grid, guidance, decay.
    """

    def __init__(
        self,
        student: CausalDenoiser,
        target: CausalDenoiser,
        teacher: CausalDenoiser,
        null_1LD: Tensor,
        how: Causal,
        settings: ConsistencyConfig,
    ):
        self.student, self.target, self.teacher, self.null_1LD = student, target, teacher, null_1LD
        self.how, self.settings = how, settings
        self.levels = (*shifted_levels(settings.steps, settings.shift), 0.0)

    @torch.no_grad()
    def prepare(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """The target takes in what the student has learnt up to this update."""
        new = 1.0 if iteration <= self.settings.since else 1 - self.settings.decay
        mine, live = learned_state(self.target), self.student.state_dict()
        torch._foreach_lerp_([local(v) for v in mine.values()], [local(live[k]) for k in mine], new)
        return batch

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch's clips, mean over frames; ``rollout`` is not used."""
        assert batch.latent_BCFHW is not None, "consistency distillation needs clips, not only prompts"
        device = self.null_1LD.device
        x0, text = batch.latent_BCFHW.float().to(device), stack_text(batch.text, device)
        frames = x0.shape[2]
        drawn = uniform(len(x0), generator, len(self.how.chunks(frames))) * self.settings.steps
        step = per_chunk(drawn.long(), self.how, frames).to(device)
        level, following = (torch.tensor(self.levels, device=device)[step + ahead] for ahead in (0, 1))
        noise = normal(x0.shape, generator, device)
        x, past = add_noise(x0, noise, level), past_of(x0, self.how, generator)
        with torch.no_grad():
            guide: Any = Forced(self.teacher, past, self.how)
            velocity = guided_velocity(guide, x, level, text, self.null_1LD, self.settings.guidance)
            there = x + broadcast(following - level, x) * velocity
            velocity = Forced(self.target, past, self.how).velocity(there, following, text)
            meant = velocity_to_x0(there, velocity, following)  # at level 0 it is what is there
        found = velocity_to_x0(x, Forced(self.student, past, self.how).velocity(x, level, text), level)
        return (found - meant).square().mean(), {}
