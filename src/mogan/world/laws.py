"""Laws of motion: how long and how fast a path is, and the nearest one (``(F, D)``, D coordinates) that a law allows."""

from functools import cache
from itertools import combinations

import numpy as np

CHORD = 4  # frames over which speed is measured: shimmer from frame to frame is not speed


def chord_speed(path_FD: np.ndarray) -> float:
    """Mean distance covered in four frames (fewer in short clips), per frame."""
    span = min(CHORD, len(path_FD) - 1)
    return float(np.linalg.norm(path_FD[span:] - path_FD[:-span], axis=1).mean() / span) if span > 0 else float("nan")


def path_length(path_FD: np.ndarray) -> float:
    """Distance covered from frame to frame, summed."""
    return float(np.linalg.norm(np.diff(path_FD, axis=0), axis=1).sum())


def physics_residual(path_FD: np.ndarray, kind: str) -> float:
    """Root mean square distance in pixels from :func:`lawful_path`."""
    return float(np.sqrt(np.square(path_FD - lawful_path(path_FD, kind)).sum(1).mean()))


def lawful_path(path_FD: np.ndarray, kind: str) -> np.ndarray:
    """The nearest path ``(F, 2)`` (least squares) under the kind's law of motion; pixels.

    Still and rotating: one place. Linear and pan: constant velocity. Falling: constant acceleration. Bouncing: constant
    velocity between at most two turns per axis, at whole or half frames.
    """
    if kind == "bouncing":
        bases = _broken_bases(len(path_FD))
        columns = []
        for values in path_FD.T:
            inside = np.einsum("kfd,f->kd", bases, values)
            best = int(np.square(inside).sum(1).argmax())
            columns.append(bases[best] @ inside[best])
        return np.stack(columns, 1)
    degree = {"still": 0, "rotating": 0, "linear": 1, "pan": 1, "falling": 2}[kind]
    time = np.linspace(-1, 1, len(path_FD))
    basis = np.stack([time**power for power in range(degree + 1)], 1)
    return basis @ np.linalg.lstsq(basis, path_FD, rcond=None)[0]


@cache
def _broken_bases(frames: int) -> np.ndarray:
    """Orthonormal bases ``(K, F, D)`` of continuous lines with up to two turns."""
    time = np.arange(frames, dtype=float)
    turns = np.arange(0.5, frames - 1, 0.5)
    line = [np.ones(frames), time]
    if frames < 5:
        return np.linalg.qr(np.stack(line, 1)[None])[0]
    # with these two pairs both turns bend the line at the same frame: the four columns have rank three
    same = {(0.5, 1.0), (frames - 2.0, frames - 1.5)}
    pairs = [pair for pair in combinations(turns, 2) if pair not in same]
    bent = [np.stack([*line, (time - a).clip(0), (time - b).clip(0)], 1) for a, b in pairs]
    return np.linalg.qr(np.stack(bent))[0]
