"""How clips look, apart from how they move: saturation, and VBench's consistency of features over time."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import cv2
import numpy as np

from mogan.evaluation.frames import Frames

Features = Callable[[np.ndarray], np.ndarray]  # one uint8 frame (H, W, 3) -> (D,)


def saturation(frames: Frames) -> float:
    """Mean HSV saturation over pixels and frames, in [0, 1]: post-training that loses the look drives it up."""
    return float(np.mean([_saturation(frame) for frame in frames]))


def _saturation(frame: np.ndarray) -> float:
    high, low = frame.max(-1).astype(np.float32), frame.min(-1).astype(np.float32)
    return float(np.where(high > 0, (high - low) / np.maximum(high, 1), 0).mean())


def contrast(frames: Frames) -> float:
    """Mean over frames of the standard deviation of luma (BT.601), in [0, 1]."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return float(np.mean([float((frame.astype(np.float32) @ weights).std()) for frame in frames])) / 255.0


def frame_features(frame: np.ndarray) -> np.ndarray:
    """Forty numbers ``(40,)`` about the look of one frame, uint8 ``(H, W, 3)``, from no network that training could have used.

    Mean colour of a 3 x 3 grid (27), mean and deviation of saturation (2), energy of detail at three scales (3),
    histogram of the directions of edges (8).
    """
    unit = frame.astype(np.float32) / 255
    grid = cv2.resize(unit, (3, 3), interpolation=cv2.INTER_AREA).ravel()
    high, low = unit.max(-1), unit.min(-1)
    colourful = np.where(high > 0, (high - low) / np.maximum(high, 1 / 255), 0)
    grey = unit.mean(-1)
    smooth = [grey, *(cv2.GaussianBlur(grey, (0, 0), width) for width in (1.0, 2.0, 4.0))]
    detail = [np.log10(1e-4 + float(np.abs(one - two).mean())) for one, two in pairwise(smooth)]
    down, right = np.gradient(smooth[1])
    strength = np.hypot(down, right)
    bins = (np.arctan2(down, right) / (2 * np.pi) * 8).round().astype(int) % 8
    edges = np.bincount(bins.ravel(), strength.ravel(), minlength=8)[:8] / (strength.sum() + 1e-6)
    return np.concatenate([grid, [colourful.mean(), colourful.std()], detail, edges])


def consistency(features_FD: np.ndarray) -> list[float]:
    """VBench's subject and background consistency of one clip, per compared frame t = 1 .. F - 1.

    ``(max(0, cos(f[t-1], f[t])) + max(0, cos(f[0], f[t]))) / 2``. Subject: CLS features of DINO ViT-B/16; background:
    CLIP ViT-B/32 image features of whole frames.
    """
    features = np.asarray(features_FD, np.float64)
    if not np.isfinite(features).all():
        raise ValueError("the features hold numbers that are not finite: look at the network that made them")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    to_last = np.maximum(0, (unit[1:] * unit[:-1]).sum(1))
    to_first = np.maximum(0, unit[1:] @ unit[0])
    return [float(x) for x in (to_last + to_first) / 2]


def consistency_score(clips: Sequence[Sequence[float]], *, per_frame: bool = True) -> float:
    """Mean over clips of :func:`consistency`.

    Args:
        clips: scores per compared frame of each clip.
        per_frame: every frame counts the same, as VBench does in one process and always for the background; False:
            every clip does, as VBench does for the subject on several GPUs. They differ if the clips differ in length.
    """
    if per_frame:
        return float(np.mean([score for clip in clips for score in clip]))
    return float(np.mean([np.mean(clip) for clip in clips]))


def aesthetic_score(embedding_D: np.ndarray, weight_D: np.ndarray, bias: float) -> float:
    """LAION's linear head on a normalised CLIP ViT-L/14 embedding, divided by ten as VBench does."""
    unit = embedding_D / np.linalg.norm(embedding_D)
    return float(unit @ weight_D + bias) / 10.0


def musiq_size(height: int, width: int, longest: int = 512) -> tuple[int, int]:
    """Size VBench's imaging quality resizes a frame to: the longer side at most 512, the other truncated."""
    if max(height, width) <= longest:
        return height, width
    scale = longest / max(height, width)
    return int(scale * height), int(scale * width)
