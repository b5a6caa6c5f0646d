"""Rectified-flow algebra as pure functions.

``sigma`` is the noise level, 1 = pure noise: ``x_t = (1 - sigma) x0 + sigma noise``. The network predicts the velocity
``noise - x0``. ``sigma`` is a tensor with one level per sample ``(B,)`` or per sample and frame ``(B, F)``.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def broadcast(sigma: Tensor, like: Tensor) -> Tensor:
    """Give levels ``(B,)`` or ``(B, F)`` the shape that multiplies ``like`` ``(B, C, F, ...)``."""
    if sigma.ndim == 1:
        return sigma.view(-1, *[1] * (like.ndim - 1))
    return sigma.view(sigma.shape[0], 1, sigma.shape[1], *[1] * (like.ndim - 3))


def shift(sigma, k: float):
    """Move levels towards noise: ``k sigma / (1 + (k - 1) sigma)``; 0 and 1 stay, ``k = 1`` changes nothing."""
    return k * sigma / (1 + (k - 1) * sigma)


def shifted_levels(steps: int, k: float) -> tuple[float, ...]:
    """The usual levels of a ``steps``-step sampler: the shifted uniform grid from 1, final 0 implied."""
    return (1.0, *(shift(1 - i / steps, k) for i in range(1, steps)))


def levels_of(sigmas: tuple[float, ...], count: int) -> tuple[float, ...]:
    """The levels of fewer steps, spread evenly: numbers ``floor(i N / count)`` of ``N``, the first always among them. Of a
    shifted uniform grid and a divisor of ``N`` it is the shifted uniform grid of those steps.
    """
    return tuple(sigmas[i * len(sigmas) // count] for i in range(count))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``(1 - sigma) x0 + sigma noise``; tensors ``(B, C, F, H, W)``, ``sigma`` ``(B,)`` or ``(B, F)``."""
    s = broadcast(sigma, x0)
    return (1 - s) * x0 + s * noise


def renoise(x_u: Tensor, noise: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """From level ``u`` to a noisier level ``t``: the transition whose marginals agree with noising ``x0`` directly.

    ``x_t = a x_u + sqrt(t^2 - (a u)^2) noise`` with ``a = (1 - t) / (1 - u)``; ``u = 0`` is :func:`add_noise`. Source:
    Phased DMD (arXiv 2510.27684), the rectified-flow case of the transition kernel. Tensors are ``(B, C, F, H, W)``, levels ``(B,)``.
    """
    scale = (1 - t) / (1 - u)
    spread = (t.square() - (scale * u).square()).clamp(min=0).sqrt()
    return broadcast(scale, x_u) * x_u + broadcast(spread, x_u) * noise


def velocity_to_x0(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent, ``x_t - sigma velocity``; ``x_t``, ``velocity``: ``(B, C, F, H, W)``; ``sigma``: ``(B,)`` or ``(B, F)``."""
    return x_t - broadcast(sigma, x_t) * velocity


def uniform(count: int, generator: torch.Generator | list[torch.Generator], *each: int) -> Float[Tensor, "b *each"]:
    """Uniform numbers in [0, 1), of shape ``(count, *each)``; with a list of generators, sample ``i`` uses generator ``i``."""
    if isinstance(generator, list):
        return torch.cat([torch.rand(1, *each, generator=g, device=g.device) for g in generator])
    return torch.rand(count, *each, generator=generator, device=generator.device)


def draw_sigma(
    count: int,
    generator: torch.Generator | list[torch.Generator],
    *,
    low: float = 0.0,
    high: float = 1.0,
    k: float = 1.0,
) -> Float[Tensor, " b"]:
    """Noise levels, one per sample: uniform on [0, 1], shifted by ``k``, then clamped to ``[low, high]``.

    Shift first and clamp after, as in DMD training code (CausVid, Self-Forcing: levels in [0.02, 0.98]).
    """
    return shift(uniform(count, generator), k).clamp(low, high)


def draw_between(
    count: int, generator: torch.Generator | list[torch.Generator], *, low: float, high: float, k: float = 1.0
) -> Float[Tensor, " b"]:
    """Noise levels as of :func:`draw_sigma`, given that they lie in ``[low, high]``: none is clamped."""
    start, end = shift(low, 1 / k), shift(high, 1 / k)  # a shift by 1 / k undoes one by k
    return shift(start + (end - start) * uniform(count, generator), k).clamp(low, high)
