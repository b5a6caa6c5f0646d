"""VBench's motion numbers by their exact rules, without VBench.

Source: Vchitect/VBench 45e79ec (``dynamic_degree.py``, ``static_filter.py``, ``motion_smoothness.py``,
``temporal_flickering.py``). The rules are VBench's; the flow network and the interpolator are whatever the caller
gives, so a number is VBench's own only with RAFT ``C_T_V1`` at 20 iterations, or AMT-S.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import cv2
import numpy as np
import torch

from mogan.evaluation.frames import Frames
from mogan.evaluation.pairs import Pair, flow_of_pairs, neighbours, pairs_at_once
from mogan.motion.flow import FlowEstimator

Interpolator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # two (B, 3, H, W) in [0, 1] -> the middle one


@dataclass(frozen=True)
class Decision:
    """A yes-or-no number and what led to it: how many of the ``scores`` must exceed ``threshold``."""

    decision: bool
    scores: tuple[float, ...]
    threshold: float
    count: int


def dynamic_degree(frames: Frames, fps: float | None, flow: FlowEstimator) -> Decision:
    """Whether a clip is dynamic: enough pairs of frames an eighth of a second apart whose fastest 5 % moved far enough.

    Every ``max(1, round(fps / 8))``-th frame is kept; a pair exceeds if the mean of the largest 5 % of its flow is
    above ``6 min(H, W) / 256`` pixels; ``round(N / 4)`` pairs must, N counting kept *frames*; both roundings are to
    even. With two frames the count is 0 and even a still clip is dynamic: the reference does so too.
    """
    kept = _Counted(islice(frames, 0, None, interval(fps)))
    scores = _top_share(kept, flow, 0.05)
    threshold, count = 6.0 * kept.min_side / 256.0, round(4 * (kept.count / 16.0))
    return Decision(bool(scores) and sum(s > threshold for s in scores) >= count, scores, threshold, count)


def interval(fps: float | None) -> int:
    """Every how many-th frame dynamic degree keeps: about eight a second. 1 where the container has no tag."""
    return max(1, round(fps / 8)) if fps else 1


def static_filter(frames: Frames, flow: FlowEstimator) -> Decision:
    """Whether a clip counts as static, VBench's condition before temporal flickering; ``decision`` True means static.

    On every frame; the largest 2 %; ``3 min(H, W) / 256`` pixels; *more* than ``round(N / 8)`` pairs, or either of the
    two extra pairs (first, last) and (last, first) above threshold times twice that count. ``scores`` end with these
    two.
    """
    counted = _Counted(frames)
    scores = _top_share(counted, flow, 0.02)
    if not scores:
        return static_decision((), (), counted.count, counted.min_side)
    return static_decision(scores, end_scores(counted.first, counted.last, flow), counted.count, counted.min_side)


def end_scores(first: np.ndarray, last: np.ndarray, flow: FlowEstimator) -> tuple[float, ...]:
    """The static filter's two extra scores: from the first frame to the last, uint8 ``(H, W, 3)``, and back; in pixels."""
    pairs = map(_pad_pair, [(first, last), (last, first)])
    return tuple(top_magnitude(field, 0.02) for field in flow_of_pairs(pairs, flow))


def static_decision(scores: tuple[float, ...], extra: tuple[float, ...], frames: int, min_side: int) -> Decision:
    """The rule of :func:`static_filter` on scores already measured."""
    threshold, count = 3.0 * min_side / 256.0, round(2 * (frames / 16.0))
    moved = sum(s > threshold for s in scores) > count or any(s > threshold * count * 2 for s in extra)
    return Decision(not moved, scores + extra, threshold, count)


class _Counted:
    """Frames passed on, remembering how many there were, their size, the first and the last."""

    def __init__(self, frames: Frames):
        self._frames = frames
        self.count, self.min_side = 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self._frames:
            if self.count == 0:
                self.first, self.min_side = frame, min(frame.shape[:2])
            self.last = frame
            self.count += 1
            yield frame


def _top_share(frames: Frames, flow: FlowEstimator, share: float) -> tuple[float, ...]:
    pairs = map(_pad_pair, neighbours(frames))
    return tuple(top_magnitude(field, share) for field in flow_of_pairs(pairs, flow))


def _pad_pair(pair: Pair) -> Pair:
    """Pad to multiples of 8, centred, edges repeated; the reference leaves its flow padded, and the share counts it."""
    h, w = pair[0].shape[:2]
    if h % 8 == 0 and w % 8 == 0:
        return pair
    tall, wide = -h % 8, -w % 8
    around = ((tall // 2, tall - tall // 2), (wide // 2, wide - wide // 2), (0, 0))
    return np.pad(pair[0], around, mode="edge"), np.pad(pair[1], around, mode="edge")


def top_magnitude(flow_2HW: np.ndarray, share: float) -> float:
    """Mean of the largest ``share`` of the magnitudes, in pixels, summed in the reference's order (descending, float32)."""
    magnitude = np.sqrt(np.square(flow_2HW[0]) + np.square(flow_2HW[1])).ravel()
    count = int(magnitude.size * share)
    if count == 0:
        return 0.0
    return float(np.mean(np.abs(np.sort(np.partition(-magnitude, count - 1)[:count]))))


def motion_smoothness(frames: Frames, interpolate: Interpolator) -> float:
    """How well the odd frames are foretold by their even neighbours, in [0, 1].

    ``(255 - mean of |odd - middle|) / 255`` over uint8 values, the middle frame truncated to uint8 as the reference
    does. With an even number of frames the last is not used.

    Raises:
        ValueError: fewer than three frames.
    """
    errors = []
    source = _triples(frames)
    first = next(source, None)
    if first is None:
        raise ValueError("motion smoothness needs at least three frames")
    size = pairs_at_once(first[0])
    source = chain([first], source)
    while batch := list(islice(source, size)):
        before, odd, after = (np.stack(part) for part in zip(*batch, strict=True))
        middle = interpolate(_unit(before), _unit(after)).float().cpu()
        levels = (middle * 255.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        errors += [float(np.mean(cv2.absdiff(one, two))) for one, two in zip(levels, odd, strict=True)]
    return (255.0 - float(np.mean(errors))) / 255.0


def _triples(frames: Frames) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each odd frame between its even neighbours."""
    source = iter(frames)
    before = next(source, None)
    while before is not None and len(two := tuple(islice(source, 2))) == 2:
        yield before, two[0], two[1]
        before = two[1]


def _unit(frames_BHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames_BHWC).permute(0, 3, 1, 2).float() / 255.0


def temporal_flickering(frames: Frames) -> float:
    """``(255 - mean |difference of neighbouring frames|) / 255`` over all frames; 1 is perfectly still.

    Raises:
        ValueError: fewer than two frames.
    """
    # the reference averages in float32; the mean over uint8 differences is exact in float64 and agrees to 1e-6
    errors = [float(np.mean(cv2.absdiff(one, two))) for one, two in neighbours(frames)]
    if not errors:
        raise ValueError("temporal flickering needs at least two frames")
    return (255.0 - float(np.mean(errors))) / 255.0


def motion_score(smoothness: float, dynamic: float) -> float:
    """MoGAN's motion score, section 5.2: the mean of motion smoothness and dynamic degree, raw."""
    return (smoothness + dynamic) / 2
