"""Log-likelihood of a clip's motion under a motion model, by the probability-flow ODE (Motion Score Matching, section 6.3).

A likelihood is no quality. A clip that stands still lies at the mode of many a motion distribution and gets the highest
value of all; compare with the values of real clips, and read a motion magnitude beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.models.denoiser import Denoiser
from mogan.sampling.motion_score import centred_path, differences, motion_velocity


@dataclass(frozen=True)
class Likelihood:
    """Natural log-densities, and how uncertain the trace estimate leaves them.

    Attributes:
        nats_B: log-density per clip; divide by ``numbers`` to compare clips of different size.
        error_B: standard error over the probes (the solver's own error is not in it).
        numbers: values per clip the density is over.
    """

    nats_B: Float[Tensor, " b"]
    error_B: Float[Tensor, " b"]
    numbers: int


def log_likelihood(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise_log_density: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator,
    steps: int = 50,
    probes: int = 8,
) -> Likelihood:
    """``log p(x0) = log p_noise(x_1) + integral of div velocity over sigma`` along the path from ``x0``.

    Source: Chen et al., "Neural ODEs" (2018), and Song et al. 2021, section 4.3. The divergence is Hutchinson's estimate
    ``z^T (dv/dx) z`` with ``probes`` random signs ``z``, each kept along the whole path (FFJORD), hence unbiased for the
    divergence; the fourth-order Runge-Kutta method integrates.

    Args:
        velocity: ``(x, sigma_B) -> dx/dsigma``, differentiable in ``x``.
        x0: clips ``(B, ...)``.
        noise_log_density: log-density per clip at level 1.
        generator: draws the probes.
        steps: of the solver; each evaluates the velocity four times.
        probes: at least 2.
    """
    if probes < 2:
        raise ValueError("the error needs at least 2 probes")
    signs = [torch.randint(0, 2, x0.shape, generator=generator).to(x0) * 2 - 1 for _ in range(probes)]

    def slope(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, x.new_full((len(x),), sigma))
            pulled = (torch.autograd.grad(v, x, z, retain_graph=True)[0] for z in signs)
            traces = torch.stack([(p * z).flatten(1).sum(1).double() for p, z in zip(pulled, signs, strict=True)])
        return v.detach(), traces

    x, total, h = x0, torch.zeros(probes, len(x0), dtype=torch.float64, device=x0.device), 1 / steps
    for i in range(steps):
        v1, d1 = slope(x, i * h)
        v2, d2 = slope(x + h / 2 * v1, (i + 0.5) * h)
        v3, d3 = slope(x + h / 2 * v2, (i + 0.5) * h)
        v4, d4 = slope(x + h * v3, (i + 1) * h)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    each = total + noise_log_density(x).double()
    return Likelihood(each.mean(0), each.std(0) / math.sqrt(probes), x0[0].numel())


def noise_log_density(motion_BCFHW: Float[Tensor, "b c f h w"]) -> Float[Tensor, " b"]:
    """Log-density of differences of standard normal frames, a number per clip in nats.

    Their covariance is ``D D^T`` along time, whose determinant is F + 1.
    """
    count, frames = motion_BCFHW[0].numel(), motion_BCFHW.shape[2]
    square = centred_path(motion_BCFHW.double()).square().flatten(1).sum(1)  # m^T (D D^T)^-1 m = |D^+ m|^2
    return -0.5 * (square + count * math.log(2 * math.pi) + count / frames * math.log(frames + 1))


def motion_log_likelihood(
    motion: Denoiser,
    latent_BCFHW: Float[Tensor, "b c f h w"],
    text_BLD: Float[Tensor, "b l d"],
    *,
    given: int = 1,
    generator: torch.Generator,
    steps: int = 50,
    probes: int = 8,
) -> Likelihood:
    """Log-likelihood under a motion model of the clips' differences after their first ``given`` frames, without guidance.

    Probability-flow ODE with Hutchinson's trace (Song et al., arXiv 2011.13456); MSM, section 6.3.

    Args:
        motion: a motion model (``mogan.recipes.motion_score``).
        latent_BCFHW: normalised latents of clips.
        text_BLD: prompts.
        given: clean frames that the model is given.
        generator: of the probes.
        steps: of the solver.
        probes: of the trace estimate.

    Returns the log-density in nats, a number per clip, and the standard error of its trace estimate.
    """
    known = latent_BCFHW[:, :, :given]
    return log_likelihood(
        lambda m, sigma: motion_velocity(motion, known, m, sigma, text_BLD),
        differences(latent_BCFHW[:, :, max(given, 1) - 1 :]),
        noise_log_density,
        generator=generator,
        steps=steps,
        probes=probes,
    )
