"""FlowMo (arXiv 2506.01144): sampling guided towards latents that vary little over time. Nothing is trained.

The paper gives no code. Where it leaves a choice, this is taken: the prediction is the guided clean latent, Adam keeps
its moments over the guided steps, and every clip of a batch is guided by itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

FLOWMO_STEPS = 12  # of 50
RATE = 0.005


def temporal_variance(x0_BCFHW: Float[Tensor, "b c f h w"]) -> Float[Tensor, " b"]:
    """FlowMo's loss: of the changes between neighbouring frames, ``|x[f+1] - x[f]|``, the variance over time, averaged
    over channels, at the place where it is largest. Zero for a clip that changes by the same amount in every frame.
    """
    changes = (x0_BCFHW[:, :, 1:] - x0_BCFHW[:, :, :-1]).abs()
    return changes.var(2, correction=0).mean(1).flatten(1).amax(1)


class FlowMo:
    """One Adam step on the noisy latent before each of the first sampling steps; moments are kept between them."""

    def __init__(self, rate: float = RATE):
        self.rate = rate
        self.optimizer: torch.optim.Adam | None = None

    @torch.enable_grad()
    def __call__(self, x: Tensor, velocity: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
        """The latent ``(B, C, F, H, W)`` after one step.

        ``velocity`` is the guided prediction at level ``sigma``, a scalar; gradient passes through it.
        """
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam([torch.nn.Parameter(x.detach().clone())], lr=self.rate)
        z = self.optimizer.param_groups[0]["params"][0]
        z.data.copy_(x)
        loss = temporal_variance(z - sigma * velocity(z)).sum()
        (z.grad,) = torch.autograd.grad(loss, z)
        self.optimizer.step()
        return z.detach().clone()
