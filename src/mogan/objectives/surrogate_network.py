"""The latent motion surrogate: a small network that predicts what MoGAN's discriminator sees of a clip.

Decoding, optical flow and encoding are most of a motion update. MoGAN (arXiv 2511.21592) names a surrogate in latent
space as future work and gives no design; this one was chosen here. It learns from pairs of latents and their exact
observation: the cached ones of the real clips, and the last ones that were computed of the student's, which it remembers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogan.devices import sent
from mogan.motion.observation import Observed
from mogan.schedule import uniform


class MotionSurrogate(nn.Module):
    """From a window of latents, and the latent frame before it, to the latents of the window's optical flow; fp32.

    Residual blocks of a convolution in space and one in time, all on the latents' own grid. What it remembers lies in
    buffers, so a checkpoint holds it.

    Args:
        shape: channels, height and width of latents.
        window: latent frames of a window.
        width: channels inside, a multiple of 8; blocks: how many.
        pairs: of the student's latents and exact observations that are remembered, the newest ones.
    """

    windows: Tensor
    observations: Tensor
    errors: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, int, int], window: int, *, width: int, blocks: int, pairs: int):
        super().__init__()
        channels, height, side = shape
        self.window = window
        self.first = nn.Conv3d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_block(width) for _ in range(blocks))
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv3d(width, channels, 3, padding=1))
        self.register_buffer("windows", torch.zeros(pairs, channels, window + 1, height, side))
        self.register_buffer("observations", torch.zeros(pairs, channels, window, height, side))
        self.register_buffer("errors", torch.full((pairs,), torch.inf))  # of each pair when it was new
        self.register_buffer("count", torch.zeros(()))  # pairs ever remembered; fp32 as every tensor of a checkpoint

    def forward(self, window_BCGHW: Float[Tensor, "b c f+1 h w"]) -> Float[Tensor, "b c f h w"]:
        """Predict the observation of a window cut by :func:`window_of`."""
        x = self.first(window_BCGHW)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)[:, :, 1:]

    def see(self, latent_BCFHW: Float[Tensor, "b c f h w"], start: int) -> Float[Tensor, "b c g h w"]:
        """Predict what :class:`mogan.motion.observation.MotionObservation` makes of latent frames from ``start`` on."""
        return self(window_of(latent_BCFHW, start, self.window))

    @torch.no_grad()
    def remember(self, latent_BCFHW: Tensor, start: int, observation_BCFHW: Tensor) -> None:
        """Keep new pairs in the place of the oldest, and how far off the prediction is that has not learned from them."""
        windows = window_of(latent_BCFHW, start, self.window)
        errors = (self(windows) - observation_BCFHW).square().mean((1, 2, 3, 4))
        size = len(self.errors)
        places = ((self.count + torch.arange(len(windows), device=self.count.device)) % size).long()[-size:]
        for kept, new in ((self.windows, windows), (self.observations, observation_BCFHW), (self.errors, errors)):
            kept[places] = new[-size:].to(kept)
        self.count += len(windows)

    def recall(self, size: int, generator: torch.Generator | list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Windows and observations ``(B, C, F, H, W)`` of stored pairs, drawn with replacement; there must be one."""
        there = self.count.clamp(max=len(self.errors))
        chosen = (sent(uniform(size, generator), there.device).to(there) * there).long()
        return self.windows[chosen], self.observations[chosen]

    def error(self) -> Tensor:
        """Error of the surrogate on the stored pairs when they were new: mean squared error over :func:`spread`, a
        scalar. Infinite until as many pairs as it can remember have been seen.
        """
        return self.errors.mean() / spread(self.observations)


def _block(width: int) -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(8, width),
        nn.SiLU(),
        nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1)),
        nn.SiLU(),
        nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)),
    )


def window_of(latent_BCFHW: Float[Tensor, "b c f h w"], start: int, window: int) -> Float[Tensor, "b c window+1 h w"]:
    """Latent frames ``start ... start + window - 1`` after the one before them, which is zero at the start of a clip.

    The decoder's state comes from the frames before a window; as in :func:`mogan.models.autoencoder.decode_window`, no gradient goes there.
    """
    before = latent_BCFHW[:, :, max(start - 1, 0) : max(start, 1)].detach()
    inside = latent_BCFHW[:, :, start : start + window]
    return torch.cat([before if start else torch.zeros_like(before), inside], 2)


def spread(observation_BCFHW: Float[Tensor, "b c f h w"]) -> Tensor:
    """Variance of observations around the mean of their channel, averaged over channels: a scalar.

    The mean of a channel is the picture of no motion at all: to know it is worth nothing.
    """
    return observation_BCFHW.var((0, 2, 3, 4), unbiased=False).mean()


def relative_error(predicted_BCFHW: Tensor, observation_BCFHW: Tensor, unit: Tensor) -> Tensor:
    """Mean squared error over ``unit``, the :func:`spread` of all observations compared, both scalars: 1 is the error of every
    channel's mean.
    """
    return (predicted_BCFHW - observation_BCFHW).square().mean() / unit


@dataclass(frozen=True)
class Remembered:
    """An exact observation of the student's clips that the surrogate watches. Every process remembers those of all: ``rows``
    gives it theirs, in one order, so that memories are alike.
    """

    observe: Callable[[Tensor, int], Observed]
    surrogate: MotionSurrogate
    rows: Callable[[Tensor], Tensor] = lambda mine: mine

    def __call__(self, latent_BCFHW: Float[Tensor, "b c f h w"], start: int) -> Observed:
        """Observe exactly, as without a surrogate, and let it remember."""
        seen = self.observe(latent_BCFHW, start)
        latents, observations = (self.rows(x.detach().float()) for x in (latent_BCFHW, seen.latent_BCFHW))
        self.surrogate.remember(latents, start, observations)
        return seen
