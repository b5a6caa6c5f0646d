"""Optimal transport between two predictions (VDOT, arXiv 2512.06802): a direction for :class:`mogan.objectives.dmd.DMD`.

The tokens of a frame as the fake score predicts it are carried to those that the teacher predicts, at least cost. Where a
difference of scores says little because student and teacher hardly overlap, the way of the tokens still points somewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mogan.terms import Alarm

Base = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
UNSOLVED = Alarm(
    "marginal_error",
    lambda first, now: now > 0.1,
    "the transport is not solved: its plan misses {now:.0%} of the mass; raise transport.iterations or transport.eps",
)


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """Transport mixed into distribution matching; see :class:`Transport`.

    Attributes:
        rho: its part of the direction; the rest is DMD's.
        eps: weight of the plan's entropy, in squared units of a token; ``iterations`` of Sinkhorn.
        debias: leave out what equal sets would be pulled by.
        per_frame: the direction of each frame has a root mean square of 1, instead of being in DMD's unit.
    """

    rho: float
    eps: float
    iterations: int = 300
    debias: bool = False
    per_frame: bool = False

    def __post_init__(self):
        if not 0 <= self.rho <= 1 or not self.eps > 0 or self.iterations < 1:
            raise ValueError(
                f"transport: rho lies within 0 and 1, eps above 0, iterations are at least 1, not {self.rho}, {self.eps} and "
                f"{self.iterations}"
            )


def sinkhorn(
    cost_KNM: Float[Tensor, "k n m"], eps: float, iterations: int
) -> tuple[Float[Tensor, "k n m"], Float[Tensor, " k"]]:
    """The plan that minimises ``<cost, T> + eps <T, log T>`` with uniform marginals, in the log domain; and how far it is from it.

    The error is the mass, of 1, by which rows miss their marginal; columns have theirs. The number of iterations is fixed, so
    that nothing waits for the device.
    """
    rows, columns = cost_KNM.shape[-2:]
    kernel = cost_KNM / -eps
    f, g = kernel.new_zeros(kernel.shape[:-1]), kernel.new_zeros(*kernel.shape[:-2], columns)
    for _ in range(iterations):
        f = -math.log(rows) - (kernel + g[:, None]).logsumexp(2)
        g = -math.log(columns) - (kernel + f[:, :, None]).logsumexp(1)
    plan = (kernel + f[:, :, None] + g[:, None]).exp()
    return plan, (plan.sum(2) - 1 / rows).abs().sum(1)


def transport_gradient(
    a_KNC: Float[Tensor, "k n c"], b_KMC: Float[Tensor, "k m c"], eps: float, iterations: int
) -> tuple[Float[Tensor, "k n c"], Float[Tensor, " k"]]:
    """Gradient of the regularised cost of carrying ``a`` to ``b`` by squared distance, and the plan's error.

    By the envelope theorem it is ``2 sum_j T_ij (a_i - b_j)`` with the plan held: nothing is differentiated through the
    iterations (VDOT's equation; its released code does differentiate through 60 of them).
    """
    distance = torch.cdist(a_KNC, b_KMC, compute_mode="donot_use_mm_for_euclid_dist")
    plan, error = sinkhorn(distance.square(), eps, iterations)
    return 2 * (plan.sum(2, keepdim=True) * a_KNC - plan @ b_KMC), error


def frame_tokens(x_BCFHW: Float[Tensor, "b c f h w"]) -> Float[Tensor, "k n c"]:
    """Every frame as the set of its 2 x 2 means."""
    return F.avg_pool3d(x_BCFHW, (1, 2, 2)).movedim(1, -1).flatten(2, 3).flatten(0, 1)


def frames_of(tokens_KNC: Tensor, like_BCFHW: Tensor) -> Tensor:
    """The adjoint of :func:`frame_tokens` up to its factor, ``(B, C, F, H, W)``: each of a mean's four places gets its token."""
    batch, _, frames, height, width = like_BCFHW.shape
    grid = tokens_KNC.unflatten(1, (height // 2, width // 2)).unflatten(0, (batch, frames)).movedim(-1, 1)
    return grid.repeat_interleave(2, -2).repeat_interleave(2, -1)


class Transport:
    """``(1 - rho)`` of DMD's direction and ``rho`` of that of transport.

    Transport's is the gradient in units of a token's way: with a plan that takes every token to its own place it is DMD's
    difference of 2 x 2 means. ``seen`` are the numbers of the last call.
    """

    def __init__(self, settings: TransportConfig, base: Base, scale: Callable[[Tensor, Tensor], Tensor]):
        self.settings, self.base, self.scale = settings, base, scale
        self.seen: dict[str, Tensor] = {}

    def __call__(self, x0: Tensor, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
        """The direction ``(B, C, F, H, W)`` against which the sample is moved; arguments as of ``dmd_direction``."""
        s, a, b = self.settings, frame_tokens(fake), frame_tokens(real)
        gradient, error = transport_gradient(a, b, s.eps, s.iterations)
        if s.debias:
            gradient = gradient - transport_gradient(a, a, s.eps, s.iterations)[0]
        way = frames_of(gradient * (a.shape[1] / 2), x0)
        unit = (
            way.square().mean((1, 3, 4), keepdim=True).sqrt().clamp(min=1e-8) if s.per_frame else self.scale(x0, real)
        )
        self.seen = {"marginal_error": error.mean()}
        return (1 - s.rho) * self.base(x0, real, fake, sigma) + s.rho * (way / unit)
