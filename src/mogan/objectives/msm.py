"""Motion score matching: distribution matching that also matches the differences of the score along latent time.

Source: "Motion Score Matching in Video Generation" (ICLR 2026 submission), eq. 10-13. A direction for
:class:`mogan.objectives.dmd.DMD`; nothing else changes, the fake score least of all (end of section 4.2).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mogan.errors import UserError
from mogan.objectives.dmd import Direction, dmd_direction, dmd_scale
from mogan.sampling.motion_score import differences, differences_adjoint


def motion_direction(weight: float, features: Callable[[Tensor], Tensor] | None = None) -> Direction:
    """DMD's direction plus ``weight`` (lambda) times that of the motion score (eq. 12).

    The motion score ``D s`` (eq. 10) belongs to the variable ``D x``; the chain rule through ``D`` takes its difference
    back to the frames. Without ``features`` the sum is ``(I + weight D^T D) g``: a frequency ``w`` of the gradient along
    time is multiplied by ``1 + weight (2 - 2 cos w)``, what does not move is left alone.

    With ``features``, eq. 13's ``f``: per-frame features of ``(B, C, F, H, W)``, ``(B, C', F, H', W')``, of the predicted clean
    latents, and the term is ``J^T (D f(fake) - D f(real))``, ``J`` the Jacobian of ``D f`` at the student's sample.

    Raises:
        UserError: when called with one level per frame (section 6.2).
    """

    def direction(x0: Tensor, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
        if sigma.ndim > 1:
            raise UserError(
                "motion score matching compares neighbouring frames at one noise level, and this rollout has a level per "
                "frame: set motion_weight to 0 (Motion Score Matching, section 6.2)"
            )
        gradient = dmd_direction(x0, real, fake, sigma)
        if features is None:
            return gradient + weight * differences_adjoint(differences(gradient))
        gap = (differences(features(fake)) - differences(features(real))) / dmd_scale(x0, real)
        with torch.enable_grad():
            point = x0.detach().requires_grad_()
            (pulled,) = torch.autograd.grad(differences(features(point)), point, gap.detach())
        return gradient + weight * pulled

    return direction
