"""All numbers of one clip."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mogan.evaluation import appearance, motion, pixels
from mogan.evaluation.backbones import Backbone
from mogan.evaluation.flow_statistics import (
    Tracks,
    camera_split,
    occluded,
    per_eighth,
    round_trip,
    summarise,
    trajectory_smoothness,
    warping_error,
)
from mogan.evaluation.frames import Clip
from mogan.evaluation.pairs import flow_of_pairs, neighbours
from mogan.motion.flow import FlowEstimator

VERSION = 3  # raise it when a number changes its meaning: cached values of another version are not used

FRAMES_AT_ONCE = 8

Values = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """Numbers of one clip with what they were measured on; ``pair_scores`` are dynamic degree's, ``features`` the middle frame's look."""

    values: Values
    frames: int
    height: int
    width: int
    fps: float | None
    pair_scores: tuple[float, ...]
    threshold: float
    features: tuple[float, ...]


def measure(
    clip: Clip,
    flow: FlowEstimator,
    interpolate: motion.Interpolator,
    *,
    quick: bool = False,
    looks: Mapping[str, Backbone] | None = None,
) -> Measured:
    """Everything :mod:`mogan.evaluation` knows of one clip.

    Args:
        clip: frames; gone through several times, one at a time.
        flow: estimator of optical flow.
        interpolate: for motion smoothness.
        quick: leave out what needs flow in both directions, and the static filter.
        looks: by metric, features for the consistencies and scores for the others; see :mod:`mogan.evaluation.backbones`.

    Raises:
        UserError: the file cannot be read to its end.
    """
    frames, height, width = clip.shape
    values: Values = {}
    degree = motion.dynamic_degree(clip, clip.fps, flow)
    values["dynamic_degree"] = float(degree.decision)
    if frames >= 3:
        values["motion_smoothness"] = motion.motion_smoothness(clip, interpolate)
        values["motion_score"] = motion.motion_score(values["motion_smoothness"], values["dynamic_degree"])
        values["pixel_jerk"] = pixels.pixel_jerk(clip)
    if frames >= 2:
        values["temporal_flickering"] = motion.temporal_flickering(clip)
        gaps = pixels.frame_gaps(clip)
        values["frozen"] = pixels.frozen(gaps).share
        values["cuts"] = float(len(pixels.cuts(gaps)))
        values |= _flow_values(clip, flow, quick=quick)
    values |= look_values(clip, looks or {})
    values["saturation"] = appearance.saturation(clip)
    values["contrast"] = appearance.contrast(clip)
    middle = next(islice(clip, frames // 2, None))
    features = tuple(float(f"{x:.6g}") for x in appearance.frame_features(middle))
    return Measured(values, frames, height, width, clip.fps, degree.scores, degree.threshold, features)


def look_values(clip: Clip, looks: Mapping[str, Backbone]) -> Values:
    """VBench's numbers of look: consistency of features over time, or the mean over frames of a score.

    ``subject_consistency`` and ``background_consistency`` take features ``(B, D)``; every other name takes scores ``(B,)``.
    A clip of one frame has no consistency.
    """
    seen: dict[str, list[np.ndarray]] = {name: [] for name in looks}
    source = iter(clip)
    while looks and (frames := list(islice(source, FRAMES_AT_ONCE))):
        batch = np.stack(frames)
        for name, see in looks.items():
            seen[name].append(see(batch))
    values: Values = {}
    for name, parts in seen.items():
        found = np.concatenate(parts)
        if name.endswith("_consistency"):
            found = np.array(appearance.consistency(found))
        if found.size:
            values[name] = float(found.mean())
    return values


def _flow_values(clip: Clip, flow: FlowEstimator, *, quick: bool) -> Values:
    count, height, width = clip.shape
    side = min(height, width)
    tops: list[float] = []
    sums: dict[str, list[float]] = {}
    tracks = Tracks((height, width))
    backward = flow_of_pairs(((two, one) for one, two in neighbours(clip)), flow) if not quick else None
    first = last = next(iter(clip))
    for (one, two), there in zip(neighbours(clip), flow_of_pairs(neighbours(clip), flow), strict=True):
        last = two
        found = summarise(there)
        row = {
            "flow_mean": per_eighth(found.mean, clip.fps, side),
            "flow_median": per_eighth(found.median, clip.fps, side),
            "flow_top5": per_eighth(found.top5, clip.fps, side),
            "flow_px_mean": found.mean,
            "flow_px_top5": found.top5,
            "moving_share": found.moving,
        }
        if backward is not None:
            back = next(backward)
            hidden = occluded(there, back)
            split = camera_split(there)
            row |= {
                "round_trip": round_trip(there, back),
                "occluded": float(hidden.mean()),
                "warping_error": warping_error(one, two, there, hidden),
                "camera_motion": split.camera,
                "object_motion": split.rest_top5,
            }
            tops.append(motion.top_magnitude(there, 0.02))
        tracks.follow(there)
        for name, value in row.items():
            sums.setdefault(name, []).append(value)
    values = {name: float(np.mean(column)) for name, column in sums.items()}
    if not quick and height % 8 == width % 8 == 0:  # else the rule wants padded frames, and flow of its own
        ends = motion.end_scores(first, last, flow)
        values["static"] = float(motion.static_decision(tuple(tops), ends, count, side).decision)
    elif not quick:
        values["static"] = float(motion.static_filter(clip, flow).decision)
    smooth = trajectory_smoothness(tracks.array, clip.fps, side)
    return values | {"acceleration": smooth.acceleration, "log_jerk": smooth.log_jerk}
