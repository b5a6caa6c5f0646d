"""What MoGAN's discriminator sees of a clip: decode a window, estimate flow, draw it, encode it.

The chain is differentiable from the flow's latents back to the student's; nothing in it is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mogan.devices import sent
from mogan.models.autoencoder import decode_window, encode_video
from mogan.motion.flow import FlowEstimator, motion_picture


@dataclass(frozen=True)
class Observed:
    """Latents for the discriminator, and the flow and frames they were made of (for logs and pictures)."""

    latent_BCFHW: Float[Tensor, "b c f h w"]
    flow_BCFHW: Float[Tensor, "b 2 g h2 w2"]
    video_BCFHW: Float[Tensor, "b 3 g2 h2 w2"]


@dataclass(frozen=True)
class MotionObservation:
    """``latent -> decode window -> flow -> motion picture -> encode`` (MoGAN, figure 2 and appendix A).

    Attributes:
        vae: frozen autoencoder; ``encoder``: the same in fp32, which encodes the picture. In bf16 the slowest motion would be rounded
            away: near -1, which stands for no motion, bf16 has steps of 1/256. ``None``: ``vae``.
        flow: frozen flow estimator on video in [-1, 1].
        window: latent frames decoded with gradient (MoGAN: 12 of 21).
        max_flow: pixels per frame that the picture draws as 1.
        checkpointing: recompute decoder and encoder in the backward pass, latent frame by latent frame.
        flow_resolution: part of height and width at which flow is estimated; ``None``: all.
    """

    vae: torch.nn.Module
    flow: FlowEstimator
    window: int
    max_flow: float
    checkpointing: bool = True
    flow_resolution: float | None = None
    encoder: torch.nn.Module | None = None

    def __call__(self, latent_BCFHW: Float[Tensor, "b c f h w"], start: int) -> Observed:
        """Observe latent frames ``start ... start + window - 1``.

        A window inside the clip decodes to ``4 window`` frames and one at its start to ``4 window - 3``. The encoder takes
        ``4 k + 1`` frames, so the last ``4 window - 3`` are used in both cases: every window looks alike.
        """
        video = decode_window(self.vae, latent_BCFHW, start, self.window, self.checkpointing)
        video = video[:, :, -(4 * self.window - 3) :]
        flow = self.flow(video) if self.flow_resolution is None else self._coarse_flow(video, self.flow_resolution)
        picture = motion_picture(flow.float(), self.max_flow)
        latent = encode_video(self.encoder or self.vae, picture, self.checkpointing)
        return Observed(latent, flow, video)

    def _coarse_flow(self, video_BCFHW: Tensor, part: float) -> Tensor:
        """Flow of the video made smaller, in pixels of the whole one."""
        frames, height, width = video_BCFHW.shape[2:]
        small = F.interpolate(video_BCFHW, (frames, round(height * part), round(width * part)), mode="trilinear")
        both = torch.tensor([width / small.shape[4], height / small.shape[3]]).view(1, 2, 1, 1, 1)
        return sent(both, video_BCFHW.device).to(video_BCFHW) * F.interpolate(
            self.flow(small), (frames - 1, height, width), mode="trilinear"
        )


def full_scale(motions: Sequence[float]) -> float:
    """Pixels per frame to draw as 1, from how much real clips move (:func:`motion_amount`): 1.9 times their upper quartile.

    The fastest points of a typical clip then take up nearly half of the range, whatever size and rate clips have; the other
    half and what lies beyond are left to their fastest moments. The paper gives no scale. 1.9 is the lab's: of 2, 4 and 8
    px/frame 4 brought most motion back there, and its clips' upper quartile is 2.1. Two digits, so that it can be said
    and typed; 0 where most clips stand still.
    """
    return float(f"{1.9 * np.quantile(np.asarray(motions), 0.75):.2g}")


def motion_amount(flow_BCFHW: Float[Tensor, "b 2 f h w"]) -> Float[Tensor, " b"]:
    """How much a clip moves: mean over frame pairs of the mean of the largest 5 % flow magnitudes, pixels per frame."""
    magnitude = flow_BCFHW.square().sum(1).sqrt().flatten(2)
    return magnitude.topk(max(1, magnitude.shape[-1] // 20), dim=-1).values.mean((1, 2))


def saturation(video_BCFHW: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, " b"]:
    """Mean HSV saturation of a clip in [-1, 1], between 0 (grey) and 1."""
    rgb = (video_BCFHW + 1) / 2
    high, low = rgb.amax(1), rgb.amin(1)
    return ((high - low) / high.clamp(min=1e-3)).mean((1, 2, 3))
