"""Distribution matching distillation with backward simulation (DMD2, arXiv 2405.14867; rectified-flow form).

The student's sample is noised; the teacher says where the data lies, the fake score where the student's own samples lie;
the difference is the gradient of KL(student || teacher) with respect to the sample.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogan.config import Alarm, Config, Lesson, Terms
from mogan.costs.calls import Tracer
from mogan.costs.trace import Call
from mogan.data.batches import Batch
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness, guided_calls
from mogan.objectives.base import Base
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, broadcast, draw_sigma, renoise, velocity_to_x0

Direction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SETTLED = 50  # iterations a fake score that starts from the teacher needs to find the student at all
LAGS = Alarm(
    "loss",
    lambda first, now: now > 1.3 * max(first, 1e-8),
    "the fake score lags behind the student: its loss is {now:.3f}, at first {first:.3f}; give it more updates per iteration "
    "or a higher learning rate",
    learns="fake_score",
    since=SETTLED,
)


@dataclass(frozen=True, kw_only=True)
class DMDConfig:
    """Distribution matching; see :class:`DMD`.

    Attributes:
        motion_weight: lambda of motion score matching (see :mod:`mogan.objectives.msm`); 0 is plain DMD.
    """

    guidance: float
    shift: float
    low: float = 0.02
    high: float = 0.98
    motion_weight: float = 0.0

    def terms(self, config: Config) -> Terms:
        """The student and the fake score learn from roll-outs alone."""
        return Terms(lessons={"student": Lesson(), "fake_score": Lesson()}, alarms=(LAGS,))

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """Teacher and fake score; the latter is the start's own where it has one, else it begins as the teacher."""
        from mogan.objectives.msm import motion_direction

        teacher = Denoiser(base.frozen(base.folder, "transformer"), base.dtype)
        has_own = (base.start / "fake_score" / "config.json").is_file()
        fake = base.denoiser(*((base.start, "fake_score") if has_own else (base.folder, "transformer")))
        direction = motion_direction(self.motion_weight) if self.motion_weight else dmd_direction
        levels: dict[str, Any] = {"shift": self.shift, "low": self.low, "high": self.high}
        null = base.no_text(base.config.negative_prompt)
        dmd = DMD(teacher, fake, null, guidance=self.guidance, direction=direction, **levels)
        losses = {"student": dmd.student_loss, "fake_score": dmd.fake_score_loss}
        return Objective(dmd, losses, {"fake_score": fake}, frozen=(teacher.transformer,))

    def price(self, config: Config, tracer: Tracer) -> Price:
        """A guided teacher and the fake score look at a roll-out; the fake score learns from one."""
        calls, forward = guided_calls(self.guidance), tracer.forward
        looks = (Call(forward.work * calls, 0.0, calls * forward.peak), forward.freed())
        again = forward.work.flops if config.checkpointing else 0.0
        kept = (
            Kept("teacher", tracer.parameters["transformer"], learns=False, transformer=True),
            Kept("fake_score", tracer.parameters["transformer"], transformer=True),
        )
        return Price({"student": Bill(looks, 2), "fake_score": Bill((tracer.train,), 2, again)}, kept)


def dmd_scale(x0: Tensor, real: Tensor) -> Tensor:
    """``mean |x0 - real|`` per sample, the unit in which DMD measures differences (DMD eq. 8)."""
    return (x0 - real).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True).clamp(min=1e-8)


def dmd_direction(x0: Tensor, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    """``(fake - real) / mean |x0 - real|``, the mean per sample (DMD eq. 8 in x0 space, as CausVid and Self-Forcing).

    Moving ``x0`` against this direction goes from where the student's samples are to where the teacher's are. The scores
    differ by ``(1 - sigma) / sigma^2`` times as much; the mean takes the place of that factor, so ``sigma`` is not used.
    """
    return (fake - real) / dmd_scale(x0, real)


class DMD:
    """Distribution matching. Owns the fake score.

    Args:
        teacher: frozen multi-step denoiser.
        fake_score: denoiser of the student's samples, trained by :meth:`fake_score_loss`.
        null_1LD: embedding of the empty (or negative) prompt.
        guidance: of the teacher, diffusers convention.
        shift: shift of the levels at which samples are compared.
        low: least level, ``high`` largest; levels are clamped after shifting.
        direction: ``(x0, real, fake, sigma) -> gradient``; where variants of DMD differ.
    """

    def __init__(
        self,
        teacher: Denoiser,
        fake_score: Denoiser,
        null_1LD: Tensor,
        *,
        guidance: float,
        shift: float,
        low: float = 0.02,
        high: float = 0.98,
        direction: Direction = dmd_direction,
    ):
        self.teacher, self.fake_score, self.null_1LD = teacher, fake_score, null_1LD
        self.guidance, self.shift, self.low, self.high = guidance, shift, low, high
        self.direction = direction

    def _noised(self, rollout: Rollout, generator: Randomness) -> tuple[Tensor, Tensor, Tensor]:
        """The sample at a drawn level of the interval that the roll-out may be judged in, the noise, and the level."""
        x, (low, high) = rollout.sample_BCFHW.detach(), rollout.interval
        drawn = draw_sigma(len(x), generator, low=max(low, self.low), high=min(high, self.high), k=self.shift)
        sigma, noise = drawn.to(x.device), normal(x.shape, generator, x.device)
        if rollout.level == 0.0:
            return add_noise(x, noise, sigma), noise, sigma
        return renoise(x, noise, torch.full_like(sigma, rollout.level), sigma), noise, sigma

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``0.5 mean (x - sg(x - g))^2``, whose gradient with respect to ``x`` is ``g / numel``."""
        x = rollout.sample_BCFHW
        with torch.no_grad():
            x_t, _, sigma = self._noised(rollout, generator)
            velocity = guided_velocity(self.teacher, x_t, sigma, rollout.text_BLD, self.null_1LD, self.guidance)
            real = velocity_to_x0(x_t, velocity, sigma)
            fake = self.fake_score(x_t, sigma, rollout.text_BLD)
            gradient = torch.nan_to_num(self.direction(x.detach(), real, fake, sigma))
        loss = 0.5 * (x - (x.detach() - gradient)).square().mean()
        return loss, {"direction": gradient.square().mean().sqrt()}

    def fake_score_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """Flow matching of the fake score on the student's samples: ``E ||v - (noise - x0)||^2`` (MoGAN eq. 3)."""
        x_t, noise, sigma = self._noised(rollout, generator)
        velocity = self.fake_score.velocity(x_t, sigma, rollout.text_BLD)
        return (velocity - target(rollout, noise, sigma)).square().mean(), {}


def target(rollout: Rollout, noise: Tensor, sigma: Tensor) -> Tensor:
    """The velocity whose mean, given the noised sample, is the flow of the student's distribution.

    ``noise - x0`` of a clean sample. Of a sample at level ``s`` (Phased DMD, arXiv 2510.27684, eq. 11, rectified flow)
    ``(t + (1 - t) s^2 / (1 - s)^2) / b noise - x_s / (1 - s)`` with ``b^2 = t^2 - ((1 - t) s / (1 - s))^2``: the clean
    sample is not known, and ``noise - x_s`` in its place is biased.
    """
    x, s = rollout.sample_BCFHW.detach(), rollout.level
    if s == 0.0:
        return noise - x
    ratio = s / (1 - s)
    spread = (sigma.square() - ((1 - sigma) * ratio).square()).sqrt()
    return broadcast((sigma + (1 - sigma) * ratio**2) / spread, x) * noise - x / (1 - s)
