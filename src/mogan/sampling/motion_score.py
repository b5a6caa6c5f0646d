"""Motion as differences of latent frames, and what a velocity model of them is good for (Motion Score Matching, 4.2, 6.3).

``D`` subtracts neighbouring latent frames. A motion model is a stock Wan transformer that reads ``given`` clean latent
frames, told level 0, followed by the differences of the noisy frames after them, and predicts the differences of the
velocity, ``D (noise - x0)``. Noising comes before the subtraction, so what it reads at level ``sigma`` is exactly ``D x_t``
of the clip another model is sampling, and both velocities can be mixed without any conversion.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mogan.errors import UserError
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.sampling.rollout import normal
from mogan.schedule import velocity_to_x0


def differences(x_BCFHW: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f-1 h w"]:
    """``D x``: each frame minus the one before (eq. 10)."""
    return x_BCFHW[:, :, 1:] - x_BCFHW[:, :, :-1]


def differences_adjoint(m_BCFHW: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f+1 h w"]:
    """``D^T m``: frame ``i`` receives ``m[i - 1] - m[i]``."""
    return F.pad(m_BCFHW, (0, 0, 0, 0, 1, 0)) - F.pad(m_BCFHW, (0, 0, 0, 0, 0, 1))


def centred_path(m_BCFHW: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f+1 h w"]:
    """``D^+ m`` (Moore-Penrose): the frames whose differences are ``m`` and whose mean over time is zero."""
    path = F.pad(m_BCFHW.cumsum(2), (0, 0, 0, 0, 1, 0))
    return path - path.mean(2, keepdim=True)


def motion_velocity(
    denoiser: Denoiser,
    known_BCKHW: Float[Tensor, "b c k h w"],
    motion_BCFHW: Float[Tensor, "b c f h w"],
    sigma_B: Float[Tensor, " b"],
    text_BLD: Float[Tensor, "b l d"],
    null_1LD: Tensor | None = None,
    guidance: float = 1.0,
) -> Float[Tensor, "b c f h w"]:
    """What a motion model predicts of noisy differences, given clean frames before them (eq. 15: none; 16: one; 17: k)."""
    given = known_BCKHW.shape[2]
    seen = torch.cat([known_BCKHW, motion_BCFHW], 2)
    levels = sigma_B[:, None].repeat(1, seen.shape[2])
    levels[:, :given] = 0.0
    null = text_BLD if null_1LD is None else null_1LD
    return guided_velocity(denoiser, seen, levels, text_BLD, null, guidance)[:, :, given:]


def steer(
    velocity_BCFHW: Tensor,
    x_BCFHW: Tensor,
    sigma_B: Tensor,
    *,
    motion: Denoiser,
    given: int,
    text_BLD: Tensor,
    null_1LD: Tensor,
    guidance: float,
    ratio: float,
) -> Tensor:
    """Replace the share ``ratio`` of a clip model's motion by a motion model's; the mean over time stays (section 6.3).

    The result ``v`` has ``D v = (1 - ratio) D velocity + ratio u``; ``u`` is the motion model's, given (if ``given`` is 1)
    the clip model's current prediction of the first frame. In scores: ``s + ratio (D^T s_motion - D^+ D s)``. Velocities are
    ``(B, C, F, H, W)``.
    """
    known = velocity_to_x0(x_BCFHW, velocity_BCFHW, sigma_B)[:, :, :given]
    found = motion_velocity(motion, known, differences(x_BCFHW), sigma_B, text_BLD, null_1LD, guidance)
    return velocity_BCFHW + ratio * centred_path(found - differences(velocity_BCFHW))


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate ``dx/dsigma = velocity(x, sigma)`` from ``sigmas[0]`` to 0, final 0 implied; ``x``: ``(B, ...)``, ``sigma``: ``(B,)``."""
    for now, then in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        x = x + (then - now) * velocity(x, x.new_full((len(x),), now))
    return x


def fuse(estimates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean of estimates of one difference, tensors of the same shape, the newest first (MSM eq. 17).

    Weights without an estimate are left out.

    Raises:
        UserError: a weight is negative, or that of the newest is 0.
    """
    used = weights[: len(estimates)]
    total = sum(used)
    if min(used) < 0 or total <= 0 or len(estimates) > len(weights):
        raise UserError(f"weights must not be negative and need one above 0 for the newest window, not {list(weights)}")
    return torch.stack([w / total * e for w, e in zip(used, estimates, strict=True)]).sum(0)


@torch.no_grad()
def continue_clip(
    motion: Denoiser,
    known_BCKHW: Float[Tensor, "b c k h w"],
    text_BLD: Tensor,
    null_1LD: Tensor,
    *,
    frames: int,
    weights: Sequence[float],
    sigmas: Sequence[float],
    guidance: float,
    generators: list[torch.Generator],
) -> Float[Tensor, "b c k+frames h w"]:
    """Add latent frames one by one: each window predicts ``len(weights)`` differences, so each is fused of up to as many.

    Noise belongs to frames, not to windows, so that windows that overlap start from the same noise: means of independent
    samples would move less than any of them.

    Args:
        motion: a motion model trained on windows ``(k, len(weights))``.
        known_BCKHW: clean latent frames to continue from.
        text_BLD: prompts.
        null_1LD: the empty prompt.
        frames: how many to add.
        weights: of the estimates of one difference, from the window that begins there to the one that ends there.
        sigmas: levels of the solver, descending from 1.
        guidance: of the motion model.
        generators: one per clip.
    """
    given, ahead = known_BCKHW.shape[2], len(weights)
    shape = torch.Size((*known_BCKHW.shape[:2], frames + ahead, *known_BCKHW.shape[3:]))
    noise, clip = normal(shape, generators, known_BCKHW.device), known_BCKHW
    windows: list[Tensor] = []
    for n in range(frames):
        known = clip[:, :, -given:]

        def velocity(m: Tensor, sigma: Tensor, known: Tensor = known) -> Tensor:
            return motion_velocity(motion, known, m, sigma, text_BLD, null_1LD, guidance)

        windows.append(euler(velocity, differences(noise[:, :, n : n + ahead + 1]), sigmas))
        estimates = [windows[n - j][:, :, j : j + 1] for j in range(min(ahead, n + 1))]
        clip = torch.cat([clip, clip[:, :, -1:] + fuse(estimates, weights)], 2)
    return clip
