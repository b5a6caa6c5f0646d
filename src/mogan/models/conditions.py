"""Conditions beside a prompt, as transformers read them: VACE's control videos and reference pictures (arXiv 2503.07598), and
the first frame of image-to-video models.

A VACE's control is a video and a mask: where the mask is 1 something is to be made, where it is 0 the video is to be kept. What is to be
made may be shown (depth, flow, edges) or grey. Reference pictures stand before the clip, as latent frames of their own, which are
denoised with it and left out of what is decoded.

An image-to-video model's control is its first frame followed by grey, encoded, and which frames are given; it reads them as
more channels of its input. Wan 2.1's also reads what CLIP sees of the picture, beside the text.

A network without inputs of its own for a control may have learnt to be given the first latent frames at level 0, as Wan 2.2's
TI2V: then those frames are its control.

Whoever passes text on passes conditions on: :class:`Conditioned` takes the place of text, and only the network looks into it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Conditioned:
    """Texts and controls, a row of each per clip; rows are chosen, counted and moved together, as those of a text are.

    ``picture_BTD`` is what CLIP sees of first frames, where a network reads it.
    """

    text_BLD: Float[Tensor, "b l d"]
    control_BKFHW: Float[Tensor, "b k f h w"]
    picture_BTD: Float[Tensor, "b t d"] | None = None

    def __len__(self) -> int:
        return len(self.text_BLD)

    def __getitem__(self, rows: Any) -> "Conditioned":
        picture = None if self.picture_BTD is None else self.picture_BTD[rows]
        return Conditioned(self.text_BLD[rows], self.control_BKFHW[rows], picture)

    @property
    def device(self) -> torch.device:
        """Where both lie."""
        return self.text_BLD.device


def conditioned(text_BLD: Tensor, control_BKFHW: Tensor | None, picture_BTD: Tensor | None = None) -> Any:
    """The conditions of clips: texts ``(B, L, D)``, and if there are any controls ``(B, K, F, H, W)`` and image features ``(B, T, D)``."""
    return text_BLD if control_BKFHW is None else Conditioned(text_BLD, control_BKFHW, picture_BTD)


def parted(told: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Texts ``(B, L, D)``, controls ``(B, K, F, H, W)``, image features ``(B, T, D)``; of texts alone ``None`` twice."""
    return (
        (told.text_BLD, told.control_BKFHW, told.picture_BTD) if isinstance(told, Conditioned) else (told, None, None)
    )


def is_vace(config: Any) -> bool:
    """Whether the transformer of a config is a VACE."""
    return bool((config or {}).get("vace_layers"))


def animates(config: Any) -> bool:
    """Whether the transformer of a config is given the first frame in channels beside the clip's (image to video)."""
    return channels_beside(config) > 0


def channels_beside(config: Any) -> int:
    """Channels that a transformer reads beside the clip's: of an image-to-video model a latent's, and four of the mask."""
    known = config if isinstance(config, Mapping) else {}
    return known.get("in_channels", 16) - (known.get("out_channels") or 16)


def reads_controls(config: Any) -> bool:
    """Whether the transformer of a config is told more of its clips than texts."""
    return is_vace(config) or animates(config)


def blocks_of(transformer: Any) -> list[Any]:
    """Every transformer block, those that read a control included."""
    return [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]


def channels_of(vae_config: Any) -> int:
    """Of a VACE's control: latents of what is kept and of what is shown where something is made, and the mask's pixels."""
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
    """Video ``(1, 3, F, H, W)`` in [-1, 1] and mask ``(1, 1, F, H, W)`` of text to video: grey, all of it to be generated."""
    return torch.zeros(1, 3, frames, height, width), torch.ones(1, 1, frames, height, width)


@torch.no_grad()
def encode_first_frame(vae: Any, image_B3HW: Float[Tensor, "b 3 h w"], frames: int) -> Float[Tensor, "b k g h2 w2"]:
    """The control of an image-to-video model, in fp32; equal to what stock ``WanImageToVideoPipeline`` prepares, to rounding.

    Channels: the latent of the first frame followed by grey, then the mask, 1 where a frame is given. The network reads
    the mask first, as the pipeline has it.

    Args:
        vae: the autoencoder.
        image_B3HW: first frames, in [-1, 1].
        frames: of the clips.
    """
    from mogan.models.autoencoder import encode_video

    nothing = image_B3HW.new_zeros(*image_B3HW.shape[:2], frames - 1, *image_B3HW.shape[2:])
    latent = encode_video(vae, torch.cat([image_B3HW.unsqueeze(2), nothing], 2), False)
    given = latent.new_zeros(len(latent), vae.config.scale_factor_temporal, *latent.shape[2:])
    given[:, :, 0] = 1.0
    return torch.cat([latent, given], 1)
