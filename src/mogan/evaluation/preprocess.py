"""What the networks of VBench and of CD-FVD are shown: frames to tensors, bit for bit as the references prepare them.

Sources: Vchitect/VBench 45e79ec (``utils.py``, ``imaging_quality.py``); songweige/content-debiased-fvd a1e037a
(``utils/data_utils.py``, ``third_party/VideoMAEv2/utils.py``).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mogan.evaluation.appearance import musiq_size

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip_input(frames_BHWC: np.ndarray) -> Tensor:
    """For CLIP: shorter side to 224, bicubic without antialiasing, centre crop, CLIP's statistics: ``(B, 3, 224, 224)``.

    This is not CLIP's own preprocessing: bicubic overshoot beyond 0 and 255 stays, since VBench resizes floats.
    """
    sized = _shorter_side(_floats(frames_BHWC), 224, "bicubic")
    top, left = (round((side - 224) / 2.0) for side in sized.shape[-2:])
    return _normalised(sized[..., top : top + 224, left : left + 224], CLIP_MEAN, CLIP_STD)


def dino_input(frames_BHWC: np.ndarray) -> Tensor:
    """For DINO: shorter side to 224, bilinear without antialiasing, no crop, ImageNet's statistics.

    480 x 832 becomes ``(B, 3, 224, 388)``.
    """
    return _normalised(_shorter_side(_floats(frames_BHWC), 224, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)


def musiq_input(frames_BHWC: np.ndarray) -> Tensor:
    """For MUSIQ, ``(B, 3, h, w)``, VBench's mode "longer": longer side at most 512, bilinear without antialiasing, values in [0, 1]."""
    frames = _floats(frames_BHWC)
    size = musiq_size(*frames.shape[-2:])
    return (frames if size == frames.shape[-2:] else _resize(frames, size, "bilinear")) / 255.0


def cd_fvd_input(frames_FHWC: np.ndarray, resolution: int = 256) -> Tensor:
    """For CD-FVD's VideoMAE: one clip as ``(F, 3, 224, 224)`` in [0, 1], without ImageNet's statistics.

    Shorter side to ``resolution`` (the longer rounded up), bilinear *with* antialiasing; centre crop; truncated to 8 bits
    as the published loader does; then squashed to 224, bilinear without antialiasing.
    """
    frames = torch.from_numpy(np.ascontiguousarray(frames_FHWC)).permute(0, 3, 1, 2).float() / 255.0
    height, width = frames.shape[-2:]
    scale = resolution / min(height, width)
    size = (resolution, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), resolution)
    sized = F.interpolate(frames, size=size, mode="bilinear", align_corners=False, antialias=True)
    top, left = ((side - resolution) // 2 for side in sized.shape[-2:])
    cropped = sized[..., top : top + resolution, left : left + resolution]
    return _resize((cropped * 255).byte().float() / 255, (224, 224), "bilinear")


def cd_fvd_indices(frames: int, count: int = 16, *, start: int | None = None) -> list[int]:
    """Which frames of a clip CD-FVD sees.

    Args:
        frames: how many the clip has.
        count: how many are wanted.
        start: None: spread over the clip at the largest whole stride, centred, so that all of the clip counts. A number:
            ``count`` neighbouring frames from there, as the published loader does from a random start, which sees 16 of
            81 frames.

    Raises:
        ValueError: the clip is too short.
    """
    if frames < count + (start or 0):
        raise ValueError(f"CD-FVD needs {count} frames, the clip has {frames}")
    if start is not None:
        return list(range(start, start + count))
    stride = (frames - 1) // (count - 1)
    first = (frames - 1 - stride * (count - 1)) // 2
    return list(range(first, first + stride * count, stride))


def _floats(frames_BHWC: np.ndarray) -> Tensor:
    """``(B, 3, H, W)`` float32, 0 to 255: VBench's loader makes floats before anything is resized."""
    return torch.from_numpy(np.ascontiguousarray(frames_BHWC)).permute(0, 3, 1, 2).float()


def _shorter_side(frames: Tensor, side: int, mode: str) -> Tensor:
    """The shorter side to ``side``, the longer truncated; already there: unchanged."""
    height, width = frames.shape[-2:]
    short, long = min(height, width), max(height, width)
    if short == side:
        return frames
    other = int(side * long / short)
    return _resize(frames, (side, other) if height <= width else (other, side), mode)


def _resize(frames: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(frames, size=size, mode=mode, align_corners=False, antialias=False)


def _normalised(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (frames / 255.0 - mean_C11) / std_C11
