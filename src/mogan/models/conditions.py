"""Conditions beside a prompt: VACE's control videos and reference pictures (arXiv 2503.07598), as its transformer reads them.

A control is a video and a mask: where the mask is 1 something is to be made, where it is 0 the video is to be kept. What is to be
made may be shown (depth, flow, edges) or grey. Reference pictures stand before the clip, as latent frames of their own, which are
denoised with it and left out of what is decoded.

Whoever passes text on passes conditions on: :class:`Conditioned` takes the place of text, and only the network looks into it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Conditioned:
    """Texts and controls, a row of each per clip; rows are chosen, counted and moved together, as those of a text are."""

    text_BLD: Float[Tensor, "b l d"]
    control_BKFHW: Float[Tensor, "b k f h w"]

    def __len__(self) -> int:
        return len(self.text_BLD)

    def __getitem__(self, rows: Any) -> "Conditioned":
        return Conditioned(self.text_BLD[rows], self.control_BKFHW[rows])

    @property
    def device(self) -> torch.device:
        """Where both lie."""
        return self.text_BLD.device


def conditioned(text_BLD: Tensor, control_BKFHW: Tensor | None) -> Any:
    """What a network is told of its clips: texts, and their controls if there are any."""
    return text_BLD if control_BKFHW is None else Conditioned(text_BLD, control_BKFHW)


def parted(told: Any) -> tuple[Tensor, Tensor | None]:
    """Texts and controls; of texts alone ``None``."""
    return (told.text_BLD, told.control_BKFHW) if isinstance(told, Conditioned) else (told, None)


def reads_controls(config: Any) -> bool:
    """Whether the transformer of a config is a VACE."""
    return bool((config or {}).get("vace_layers"))


def blocks_of(transformer: Any) -> list[Any]:
    """Every transformer block, those that read a control included."""
    return [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]


def channels_of(vae_config: Any) -> int:
    """Of a control: latents of what is kept and of what is shown where something is made, and the mask's pixels."""
    return 2 * vae_config.get("z_dim", 16) + vae_config.get("scale_factor_spatial", 8) ** 2


# ---------------------------------------------------------------------------------------------- from pictures


def mask_places(mask_B1FHW: Float[Tensor, "b 1 f h w"], space: int, time: int) -> Float[Tensor, "b p g h2 w2"]:
    """The pixels of a mask that lie under each place of a latent, as its channels; of the frames those nearest in time."""
    frames = mask_B1FHW.shape[2]
    kept = (frames + time - 1) // time
    nearest = torch.tensor([(2 * i + 1) * frames // (2 * kept) for i in range(kept)], device=mask_B1FHW.device)
    return F.pixel_unshuffle(mask_B1FHW[:, :, nearest].movedim(2, 1), space).movedim(1, 2)


def pictures_of_references(images: list[np.ndarray], height: int, width: int) -> Float[Tensor, "r 3 h w"]:
    """Pictures, uint8 ``(H, W, 3)``, each scaled until it fits and laid in the middle of a white one; in [-1, 1]."""
    canvas = torch.ones(len(images), 3, height, width)
    for number, image in enumerate(images):
        picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        scale = min(height / picture.shape[2], width / picture.shape[3])
        size = int(picture.shape[2] * scale), int(picture.shape[3] * scale)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        fitted = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)
        canvas[number, :, top : top + size[0], left : left + size[1]] = fitted[0]
    return canvas


@torch.no_grad()
def encode_control(
    vae: Any,
    video_B3FHW: Float[Tensor, "b 3 f h w"],
    mask_B1FHW: Float[Tensor, "b 1 f h w"],
    references_BR3HW: Float[Tensor, "b r 3 h w"] | None = None,
) -> Float[Tensor, "b k g h2 w2"]:
    """A control as the transformer reads it, in fp32; equal to what stock ``WanVACEPipeline`` prepares, to rounding.

    Channels: the latent of the video where it is kept, that of the video where something is made, and the mask. References
    come first, the last of them before the others, as the pipeline has it.

    Args:
        vae: Wan 2.1's autoencoder.
        video_B3FHW: in [-1, 1]; grey is 0.
        mask_B1FHW: 0 or 1.
        references_BR3HW: see :func:`pictures_of_references`.
    """
    # diffusers takes seconds to import, and commands begin with this module
    from mogan.models.autoencoder import encode_video

    kept, shown = (encode_video(vae, video_B3FHW * part, False) for part in (1 - mask_B1FHW, mask_B1FHW))
    places = mask_places(mask_B1FHW, vae.config.scale_factor_spatial, vae.config.scale_factor_temporal)
    control = torch.cat([kept, shown, places.to(kept)], 1)
    if references_BR3HW is None or not references_BR3HW.shape[1]:
        return control
    count = references_BR3HW.shape[1]
    encoded = encode_video(vae, references_BR3HW.flip(1).flatten(0, 1).unsqueeze(2), False)
    before = encoded.unflatten(0, (-1, count)).squeeze(3).movedim(1, 2)
    nothing = before.new_zeros(len(before), control.shape[1] - before.shape[1], *before.shape[2:])
    return torch.cat([torch.cat([before, nothing], 1), control], 2)


def nothing_shown(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Video and mask of text to video: grey, all of it to be made."""
    return torch.zeros(1, 3, frames, height, width), torch.ones(1, 1, frames, height, width)
