"""Where things are in a clip of the lab's world: the subject found by its colour, the camera by the background.

Positions are pixels (x right, y down), angles radians.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from mogan.world.captions import Caption
from mogan.world.scenes import COLOURS

FOUND_CHROMA = 0.35  # of the named colour's own chroma: paler things are not of that colour
FOUND_AREA = (0.008, 0.30)  # of the picture


def cover(frames_FHW3: np.ndarray, colour: str) -> np.ndarray:
    """How much of every pixel the named colour covers: ``(F, H, W)`` in [0, 1], soft at outlines; zero if it is not
    there.

    Chroma (a pixel minus its own grey) is measured from the background's, along the direction of the named colour;
    what points aside, such as another sprite, is taken off. The scale is the clip's own, so pale or blurred sprites
    are found as long as they keep a third of the chroma.
    """
    pixels = frames_FHW3.astype(np.float32)
    chroma = pixels - pixels.mean(-1, keepdims=True)
    ground = np.median(chroma.reshape(-1, 3), axis=0)
    named = np.array(COLOURS[colour], np.float32)
    axis = named - named.mean() - ground
    size = float(np.linalg.norm(axis))
    chroma -= ground
    along = chroma @ (axis / size)
    aside = np.sqrt(np.maximum(np.square(chroma).sum(-1) - np.square(along), 0))
    strength = (along - aside) / size
    peak = float(np.quantile(strength, 0.985))
    if peak < FOUND_CHROMA:
        return np.zeros(strength.shape, np.float32)
    return np.clip((strength - 0.3 * peak) / (0.3 * peak), 0, 1)


@dataclass(frozen=True)
class Track:
    """Pose of the subject in every frame. Where it is not ``found`` the pose is NaN; ``free`` means wholly in view.

    ``angles_F`` point from the dark to the bright half of the sprite's shading, unwrapped.
    """

    centres_F2: np.ndarray
    areas_F: np.ndarray
    angles_F: np.ndarray
    found_F: np.ndarray
    free_F: np.ndarray


def track(frames_FHW3: np.ndarray, caption: Caption) -> Track:
    """Follow the thing of the caption's colour through a clip."""
    frames, h, w, _ = frames_FHW3.shape
    mask = np.stack([largest(one) for one in cover(frames_FHW3, caption.colour)])
    others = [cover(frames_FHW3, colour) > 0.5 for colour in caption.other_colours]
    y, x = np.mgrid[:h, :w].astype(np.float64)
    grey = frames_FHW3.astype(np.float64).mean(-1)
    centres, areas, angles = np.full((frames, 2), np.nan), mask.sum((1, 2)).astype(np.float64), np.full(frames, np.nan)
    found = (areas > FOUND_AREA[0] * h * w) & (areas < FOUND_AREA[1] * h * w)
    free = found.copy()
    for t in np.flatnonzero(found):
        weight = mask[t].astype(np.float64)
        centre = np.array([(weight * x).sum(), (weight * y).sum()]) / areas[t]
        centres[t] = centre
        solid = np.where(weight > 0.9, grey[t], 0)
        inner = weight > 0.9
        if inner.any():
            shade = solid - solid[inner].mean() * inner
            angles[t] = np.arctan2((shade * (y - centre[1])).sum(), (shade * (x - centre[0])).sum())
        edge = np.concatenate([mask[t, 0], mask[t, -1], mask[t, :, 0], mask[t, :, -1]])
        near = cv2.dilate((mask[t] > 0.3).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
        free[t] = edge.max() < 0.5 and not any((near & other[t]).any() for other in others)
    angles[found] = np.unwrap(angles[found])
    return Track(centres, areas, angles, found, free)


def largest(cover_HW: np.ndarray) -> np.ndarray:
    """The cover ``(H, W)`` of the largest connected piece alone, with its soft rim."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((cover_HW > 0.3).astype(np.uint8))
    if count < 2:
        return np.zeros_like(cover_HW)
    piece = (labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).astype(np.uint8)
    return cover_HW * cv2.dilate(piece, np.ones((3, 3), np.uint8))


def camera_path(frames_FHW3: np.ndarray, caption: Caption, subject: Track) -> np.ndarray:
    """Where the background lies in every frame, ``(F, 2)``, from zero: translation only, sprites masked.

    Each frame is registered to the one before by least squares on brightness (Lucas and Kanade 1981, iterated, with an
    offset of brightness), because the lab's background is smooth: it has gradients everywhere and no corners to
    correlate. A background of parallel waves does not show motion along them; there, and only there, the subject's own
    motion decides, for what a camera pans over moves together.
    """
    smooth = np.stack([cv2.GaussianBlur(f.astype(np.float32).mean(-1), (0, 0), 1.0) for f in frames_FHW3])
    hidden = np.zeros(smooth.shape, bool)
    for colour in (caption.colour, *caption.other_colours):
        for t, one in enumerate(cover(frames_FHW3, colour)):
            hidden[t] |= cv2.dilate((one > 0.05).astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    path = [np.zeros(2)]
    for t in range(len(smooth) - 1):
        both = subject.free_F[t] and subject.free_F[t + 1]
        hint = subject.centres_F2[t + 1] - subject.centres_F2[t] if both else None
        path.append(path[-1] + _shift(smooth[t], smooth[t + 1], ~(hidden[t] | hidden[t + 1]), hint))
    return np.stack(path)


def _shift(one: np.ndarray, two: np.ndarray, seen: np.ndarray, hint: np.ndarray | None) -> np.ndarray:
    """The translation d with ``two(p + d) = one(p) + constant`` where ``seen``, by least squares, drawn to the hint."""
    h, w = one.shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    inner = seen & (x >= 4) & (x < w - 4) & (y >= 4) & (y < h - 4)
    if inner.sum() < 50:
        return np.zeros(2) if hint is None else hint
    shift = np.zeros(2) if hint is None else np.clip(hint, -8, 8)
    pull = 0.0 if hint is None else 0.02 * inner.sum()  # against gradients of about 1 to 2 grey levels per pixel
    for _ in range(8):
        to_x, to_y = x + np.float32(shift[0]), y + np.float32(shift[1])
        moved = cv2.remap(two, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        slope_y, slope_x = np.gradient((moved + one) / 2)
        slopes = np.stack([slope_x[inner], slope_y[inner]], 1).astype(np.float64)
        gap = (one - moved)[inner].astype(np.float64)
        slopes, gap = slopes - slopes.mean(0), gap - gap.mean()
        matrix, target = slopes.T @ slopes, slopes.T @ gap
        if hint is not None:
            matrix, target = matrix + pull * np.eye(2), target + pull * (hint - shift)
        step = np.linalg.lstsq(matrix, target, rcond=1e-6)[0]
        shift = np.clip(shift + step, -8, 8)
        if np.abs(step).max() < 1e-3:
            break
    return shift
