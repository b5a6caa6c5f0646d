"""What a video holds: its shots, clips of one length, how much they move."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mogan.data.video import Frame, read_frames
from mogan.errors import UserError
from mogan.models.defaults import Geometry
from mogan.motion.flow import FlowEstimator

# A cut is a pair of frames whose thumbnails (16 x 16, 0 to 255) differ on average by more than CUT_FLOOR, by more than
# CUT_DEVIATIONS median absolute deviations above the median of the CUT_RADIUS pairs on either side, and by more than
# CUT_ISOLATION times either neighbouring pair: quick motion and shaking last for several pairs, a cut for one.
CUT_FLOOR = 16.0
CUT_DEVIATIONS = 6.0
CUT_RADIUS = 24
CUT_ISOLATION = 2.0


@dataclass(frozen=True)
class Clip:
    """Frames of one shot. ``start`` counts resampled frames; ``repeats`` of them equal the one before."""

    start: int
    start_s: float
    repeats: int
    frames_FHWC: np.ndarray


@dataclass(frozen=True)
class ShortShot:
    """A shot too short to hold a clip."""

    start: int
    start_s: float
    frames: int


@dataclass(frozen=True)
class Held:
    """A clip's time in which a single frame was held: no video."""

    start: int
    start_s: float


# ---------------------------------------------------------------------------------------------- shots and clips


def clips_of(frames: Iterable[Frame], length: int) -> Iterator[Clip | Held | ShortShot]:
    """Non-overlapping clips of ``length`` frames, none across a shot cut or a gap in their numbers.

    Shots without room for a clip are reported, and clips that are one frame repeated. What remains of a shot after its
    last full clip is left out.
    """
    # a stretch without a gap has one difference between number and count
    for _, stretch in groupby(enumerate(frames), lambda pair: pair[1].number - pair[0]):
        yield from _clips_of_stretch((frame for _, frame in stretch), length)


def _clips_of_stretch(frames: Iterable[Frame], length: int) -> Iterator[Clip | Held | ShortShot]:
    held: list[Frame] = []
    made = 0
    for frame, starts_shot in shots(frames):
        if starts_shot:
            if held and not made:
                yield ShortShot(held[0].number, held[0].time_s, len(held))
            held, made = [], 0
        held.append(frame)
        if len(held) == length:
            one = all(f.image_HWC is held[0].image_HWC for f in held)
            yield Held(held[0].number, held[0].time_s) if one else make_clip(held)
            held, made = [], made + 1
    if held and not made:
        yield ShortShot(held[0].number, held[0].time_s, len(held))


def make_clip(frames: list[Frame]) -> Clip:
    """Stack neighbouring frames."""
    images = [frame.image_HWC for frame in frames]
    repeats = sum(a is b or np.array_equal(a, b) for a, b in pairwise(images))
    return Clip(frames[0].number, frames[0].time_s, repeats, np.stack(images))


def clips_at(path: Path, starts: dict[int, dict], geometry: Geometry) -> Iterator[tuple[int, np.ndarray]]:
    """Clips of a file that begin with these frames: the first frame's number, uint8 ``(F, H, W, 3)``."""
    length, held = geometry.frames, []
    only = {start + i for start in starts for i in range(length)}
    for frame in read_frames(path, fps=geometry.fps, size=(geometry.height, geometry.width), only=only):
        held.append(frame)
        if frame.number - held[0].number == length - 1:
            if len(held) == length and held[0].number in starts:
                yield held[0].number, np.stack([f.image_HWC for f in held])
            held = []


def shots(frames: Iterable[Frame]) -> Iterator[tuple[Frame, bool]]:
    """Every frame, and whether a shot starts with it; at most ``CUT_RADIUS + 3`` pictures are held at a time.

    A frame that repeats the one before starts none, and its difference of nothing does not make others seem large.
    """
    waiting: deque[tuple[Frame, int | None]] = deque()  # with the pair that it ends; None: it repeats
    last: np.ndarray | None = None
    thumbs: deque[np.ndarray] = deque(maxlen=3)
    scores: list[float] = []  # scores[i] belongs to the pair (i, i + 1)
    for frame in frames:
        if frame.image_HWC is last:
            waiting.append((frame, None))
            continue
        last = frame.image_HWC
        thumbs.append(_thumbnail(last))
        if len(thumbs) == 1:
            yield frame, True
            continue
        waiting.append((frame, len(scores)))
        scores.append(_difference(thumbs[-2], thumbs[-1]))
        if len(thumbs) == 3:
            _settle(scores, *thumbs)
        settled = len(scores) - CUT_RADIUS - 1  # the newest score may still change
        while waiting[0][1] is None or waiting[0][1] < settled:
            first, pair = waiting.popleft()
            yield first, pair is not None and _is_cut(scores, pair)
    for frame, pair in waiting:
        yield frame, pair is not None and _is_cut(scores, pair)


def _settle(scores: list[float], before: np.ndarray, middle: np.ndarray, after: np.ndarray) -> None:
    """Correct the last two scores for a middle frame that belongs to neither side.

    A flash or a decoding fault differs from both neighbours, which resemble each other: no cut. A cut in a video whose
    frame rate was converted often passes through a mixture of both shots: one cut, not two halves of one.
    """
    skip = _difference(before, after)
    if _difference(middle, (before + after) // 2) < 0.2 * skip:
        scores[-2], scores[-1] = skip, 0.0
    else:
        scores[-2], scores[-1] = min(scores[-2], skip), min(scores[-1], skip)


def _is_cut(scores: list[float], pair: int) -> bool:
    beside = max((scores[i] for i in (pair - 1, pair + 1) if 0 <= i < len(scores)), default=0.0)
    if scores[pair] <= max(CUT_FLOOR, CUT_ISOLATION * beside):
        return False
    around = np.array(scores[max(0, pair - CUT_RADIUS) : pair + CUT_RADIUS + 1])
    median = np.median(around)
    return bool(scores[pair] > median + CUT_DEVIATIONS * np.median(np.abs(around - median)))


def _thumbnail(image_HWC: np.ndarray) -> np.ndarray:
    return cv2.resize(image_HWC, (16, 16), interpolation=cv2.INTER_AREA).astype(np.int16)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


# ---------------------------------------------------------------------------------------------- motion


def to_video(frames_FHWC: np.ndarray) -> Float[Tensor, "1 3 f h w"]:
    """uint8 frames ``(F, H, W, 3)`` as a batch of one video ``(1, 3, F, H, W)`` in [-1, 1], fp32."""
    return torch.from_numpy(frames_FHWC).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def motion_of(frames_FHWC: np.ndarray, estimate_flow: FlowEstimator) -> float:
    """Pixels per frame that a clip moves: mean over frame pairs of the mean length of the longest 5 % of flow vectors.

    The top 5 % is VBench's measure (dynamic degree): a small thing that moves counts, a large background at rest does
    not dilute it.

    Raises:
        UserError: the flow is not finite.
    """
    with torch.no_grad():
        flow = estimate_flow(to_video(frames_FHWC))[0].float()
    if not bool(flow.isfinite().all()):
        raise UserError(
            "the flow network gives numbers that are not finite: get its weights again, or use another --flow"
        )
    length_FN = flow.square().sum(0).sqrt().flatten(1)
    top = max(1, int(0.05 * length_FN.shape[1]))
    return float(length_FN.topk(top, dim=1).values.mean())
