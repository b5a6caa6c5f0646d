"""What the few-step student just produced: sampling with its own steps, gradient through one of them.

The rule between steps is the one DMD students are trained and shipped with (diffusers' ``FlowMatchLCMScheduler``): predict
the clean latent, then noise it afresh to the next level.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.schedule import add_noise


@dataclass(frozen=True)
class Rollout:
    """The student's answer and how it came about.

    Attributes:
        x0_BCFHW: the clean latent predicted at the exit step; carries gradient if asked for.
        exit_step: index of the step after which the rollout stopped.
        text_BLD: the condition it was made under.
    """

    x0_BCFHW: Float[Tensor, "b c f h w"]
    exit_step: int
    text_BLD: Float[Tensor, "b l d"]


def roll_out(
    student: Denoiser,
    noise_BCFHW: Float[Tensor, "b c f h w"],
    text_BLD: Float[Tensor, "b l d"],
    sigmas: tuple[float, ...],
    generator: torch.Generator | list[torch.Generator],
    *,
    exit_step: int | None = None,
    grad: bool = False,
) -> Rollout:
    """Sample with the student's levels, as at inference, and stop after ``exit_step`` (the last one by default).

    This is DMD2's backward simulation: only the exit step carries gradient, and what it receives is the student's own
    noisy sample rather than a noised real one.

    Args:
        student: the few-step generator.
        noise_BCFHW: starting noise, at level ``sigmas[0] = 1``.
        text_BLD: from :func:`mogan.models.attention.stack_text`.
        sigmas: descending levels, final 0 implied.
        generator: draws the fresh noise between steps; one for the batch, or one per sample (then a sample does not
            depend on its neighbours).
        exit_step: which step's prediction is returned.
        grad: let gradient flow through the exit step.
    """
    exit_step = len(sigmas) - 1 if exit_step is None else exit_step
    x = noise_BCFHW
    for step in range(exit_step + 1):
        sigma = torch.full((x.shape[0],), sigmas[step], device=x.device)
        with torch.set_grad_enabled(grad and step == exit_step):
            x0 = student(x, sigma, text_BLD)
        if step == exit_step:
            break
        level = torch.full((x.shape[0],), sigmas[step + 1], device=x.device)
        x = add_noise(x0, normal(x0.shape, generator, x0.device), level)
    return Rollout(x0, exit_step, text_BLD)


@torch.no_grad()
def animate(
    denoiser: Denoiser,
    noise_BCFHW: Float[Tensor, "b c f h w"],
    given_BCFHW: Float[Tensor, "b c g h w"],
    text_BLD: Float[Tensor, "b l d"],
    null_1LD: Tensor,
    sigmas: tuple[float, ...],
    guidance: float,
) -> Float[Tensor, "b c f h w"]:
    """Image to video by Euler steps: the first latent frames are given, and stay clean at level 0 throughout.

    That is how Wan 2.2's TI2V model is conditioned (diffusers: ``expand_timesteps``). ``sigmas`` descend from 1, final 0
    implied; guidance as in :func:`mogan.models.denoiser.guided_velocity`.
    """
    x, given = noise_BCFHW, given_BCFHW.shape[2]
    for level, following in pairwise((*sigmas, 0.0)):
        x = torch.cat([given_BCFHW, x[:, :, given:]], 2)
        sigma = torch.full((x.shape[0], x.shape[2]), level, device=x.device)
        sigma[:, :given] = 0.0
        x = x + (following - level) * guided_velocity(denoiser, x, sigma, text_BLD, null_1LD, guidance)
    return torch.cat([given_BCFHW, x[:, :, given:]], 2)


def normal(shape: torch.Size, generator: torch.Generator | list[torch.Generator], device) -> Tensor:
    """Standard normal noise; with a list of generators, sample ``i`` of the batch comes from generator ``i``."""
    if isinstance(generator, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=g, device=g.device) for g in generator]).to(device)
    return torch.randn(shape, generator=generator, device=generator.device).to(device)
