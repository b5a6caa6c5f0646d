"""What the pixels alone say about a clip: jerk, frozen frames, cuts. No weights, no flow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mogan.evaluation.frames import Frames

FROZEN = 0.1  # grey levels: below it two neighbouring frames are one frame shown twice
CUT_MADS, CUT_RATIO, CUT_FLOOR = 10.0, 3.0, 8.0


@dataclass(frozen=True)
class Frozen:
    """Share of neighbouring pairs that are the same frame, and the longest unbroken run of such pairs."""

    share: float
    longest: int


def pixel_jerk(frames: Frames) -> float:
    """Mean of ``|f(t+1) - 2 f(t) + f(t-1)| / 255``: zero for stillness and for linear fades."""
    sums = [float(np.abs(_second(*triple)).mean()) for triple in _triples(frames)]
    if not sums:
        raise ValueError("pixel jerk needs at least three frames")
    return float(np.mean(sums)) / 255.0


def _triples(frames: Frames) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    last: list[np.ndarray] = []
    for frame in frames:
        last = [*last[-2:], frame]
        if len(last) == 3:
            yield last[0], last[1], last[2]


def _second(one: np.ndarray, two: np.ndarray, three: np.ndarray) -> np.ndarray:
    return three.astype(np.int16) - 2 * two.astype(np.int16) + one.astype(np.int16)


def frame_gaps(frames: Frames) -> list[float]:
    """Mean absolute difference of every two neighbouring frames, in grey levels."""
    found, before = [], None
    for frame in frames:
        if before is not None:
            found.append(float(np.mean(cv2.absdiff(before, frame))))
        before = frame
    return found


def frozen(pair_differences: Sequence[float]) -> Frozen:
    """Duplicated frames among the :func:`frame_gaps` of a clip: padding, stutter, a clip that stops."""
    longest = run = 0
    same = [d < FROZEN for d in pair_differences]
    for yes in same:
        run = run + 1 if yes else 0
        longest = max(longest, run)
    return Frozen(float(np.mean(same)) if same else 0.0, longest)


def cuts(pair_differences: Sequence[float]) -> list[int]:
    """Frames that start a new shot: differences that stand out from the clip's own.

    One does if it exceeds the median by ten median absolute deviations, is three times the median, and at least eight
    grey levels. A cut dominates every other number, so a clip with one should be judged apart.
    """
    if len(pair_differences) < 3:
        return []
    values = np.asarray(pair_differences)
    middle = float(np.median(values))
    spread = float(np.median(np.abs(values - middle)))
    limit = max(middle + CUT_MADS * spread, CUT_RATIO * middle, CUT_FLOOR)
    return [int(i) + 1 for i in np.flatnonzero(values > limit)]
