"""Sets of measured clips: clip by clip against each other, and as distances to a reference set of real ones."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mogan.evaluation.cd_fvd import cd_fvd, noise_floor
from mogan.evaluation.distribution import Moments, frechet
from mogan.evaluation.statistics import RESAMPLES, Interval, joint_draws, moved_ends, wasserstein_interval

Record = dict[str, Any]


def column_of(clips: Sequence[Record], metric: str) -> list[float]:
    """A metric of clips, NaN where it could not be measured."""
    return [math.nan if (v := clip["values"].get(metric)) is None else v for clip in clips]


def paired(first: Sequence[Record], other: Sequence[Record], metric: str) -> tuple[list[float], list[str]]:
    """Differences of a metric, other minus first, clip by clip on the same prompt and number; and their prompts."""
    values = {(clip["prompt"], clip["index"]): clip["values"].get(metric) for clip in first if "error" not in clip}
    pairs = [
        (mine - theirs, clip["prompt"])
        for clip in other
        if "error" not in clip
        and (mine := clip["values"].get(metric)) is not None
        and (theirs := values.get((clip["prompt"], clip["index"]))) is not None
    ]
    return [gap for gap, _ in pairs], [prompt for _, prompt in pairs]


def set_metrics(
    clips: Sequence[Record], reference: Sequence[Record], *factors: Sequence[Hashable]
) -> dict[str, Interval]:
    """Speed histogram and look of a set of measured clips against the reference's; empty where there is too little.

    ``factors`` are what is resampled for the intervals, as in :func:`mogan.evaluation.statistics.mean_interval`; the
    prompts, if none is given.
    """
    factors = factors or ([clip["prompt"] for clip in clips],)
    found: dict[str, Interval] = {}
    real = [v for clip in reference if (v := clip["values"].get("lab_speed")) is not None]
    speeds = column_of(clips, "lab_speed")
    if real and any(map(math.isfinite, speeds)):
        found["lab_speed_wasserstein"] = wasserstein_interval(speeds, real, *factors)
    one, two = (np.array([clip["features"] for clip in some]) for some in (clips, reference))
    if min(len(one), len(two)) >= 2 * one.shape[1]:
        found["appearance_distance"] = appearance_distance(one, two, *factors)
    seen, real_seen = (
        np.array([f for clip in some if (f := clip.get("video_features")) is not None]) for some in (clips, reference)
    )
    if min(len(seen), len(real_seen)) >= 4:
        found["cd_fvd"] = Interval(cd_fvd(seen, real_seen), None, len(seen))
        found["cd_fvd_floor"] = Interval(noise_floor(real_seen), None, len(real_seen) // 2)
    return found


def deviations(features_ND: np.ndarray) -> np.ndarray:
    """The unit ``(D,)`` of each feature of a look; 1e-6 where a set shows none."""
    return np.maximum(features_ND.std(0), 1e-6)


def appearance_distance(features_ND: np.ndarray, reference_MD: np.ndarray, *factors: Sequence[Hashable]) -> Interval:
    """Frechet distance (covariance over N) of features scaled by the reference's deviations, with an interval, whose ends are
    those of :func:`mogan.evaluation.statistics.moved_ends`.
    """
    scale = deviations(reference_MD)
    target = Moments().add(reference_MD / scale)
    unit = features_ND / scale
    distance = frechet(Moments().add(unit), target)
    draws = joint_draws(factors, RESAMPLES // 20)
    if draws is None:
        return Interval(distance, None, len(unit))
    found = [frechet(Moments().add(np.repeat(unit, draw, axis=0)), target) for draw in draws]
    return Interval(distance, moved_ends(distance, found), len(unit))
