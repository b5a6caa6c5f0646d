"""Distribution matching distillation with backward simulation (DMD2, arXiv 2405.14867; rectified-flow form).

The student's sample is noised; the teacher says where the data lies, the fake score where the student's own samples lie;
the difference is the gradient of KL(student || teacher) with respect to the sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mogan.data.cache import Batch
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.objectives import Loss, Randomness
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, draw_sigma, velocity_to_x0

Direction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
        fake_score: denoiser of the student's samples, trained by :meth:`judge_loss`.
        null_1LD: embedding of the empty (or negative) prompt.
        guidance: of the teacher, diffusers convention.
        shift: shift of the levels at which samples are compared.
        low: least level, ``high`` largest; levels are clamped after shifting.
        direction: ``(x0, real, fake, sigma) -> gradient``; where variants of DMD differ.
    """

    needs_rollout = True

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
        x0 = rollout.x0_BCFHW.detach()
        sigma = draw_sigma(len(x0), generator, low=self.low, high=self.high, k=self.shift).to(x0.device)
        noise = normal(x0.shape, generator, x0.device)
        return add_noise(x0, noise, sigma), noise, sigma

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``0.5 mean (x - sg(x - g))^2``, whose gradient with respect to ``x`` is ``g / numel``."""
        x0 = rollout.x0_BCFHW
        with torch.no_grad():
            x_t, _, sigma = self._noised(rollout, generator)
            velocity = guided_velocity(self.teacher, x_t, sigma, rollout.text_BLD, self.null_1LD, self.guidance)
            real = velocity_to_x0(x_t, velocity, sigma)
            fake = self.fake_score(x_t, sigma, rollout.text_BLD)
            gradient = torch.nan_to_num(self.direction(x0.detach(), real, fake, sigma))
        loss = 0.5 * (x0 - (x0.detach() - gradient)).square().mean()
        return loss, {"direction": gradient.square().mean().sqrt()}

    def judge_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """Flow matching of the fake score on the student's samples: ``E ||v - (noise - x0)||^2`` (MoGAN eq. 3)."""
        x_t, noise, sigma = self._noised(rollout, generator)
        velocity = self.fake_score.velocity(x_t, sigma, rollout.text_BLD)
        loss = (velocity - (noise - rollout.x0_BCFHW.detach())).square().mean()
        return loss, {}
