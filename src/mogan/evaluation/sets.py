"""Sets of measured clips: clip by clip against each other, and as distances to a reference set of real ones."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mogan.evaluation.cd_fvd import cd_fvd, noise_floor
from mogan.evaluation.distribution import Moments, frechet
from mogan.evaluation.statistics import RESAMPLES, Interval, cluster_draws, moved_ends, wasserstein_interval

Record = dict[str, Any]


def column_of(clips: Sequence[Record], metric: str) -> list[float]:
    """A metric of clips, NaN where it could not be measured."""
    return [math.nan if (v := clip["values"].get(metric)) is None else v for clip in clips]


def paired(first: Sequence[Record], other: Sequence[Record], metric: str) -> tuple[list[float], list[str]]:
    """Differences of a metric, other minus first, clip by clip on the same prompt, task and number; and their prompts."""
    values = {_which(clip): clip["values"].get(metric) for clip in first if "error" not in clip}
    pairs = [
        (mine - theirs, clip["prompt"])
        for clip in other
        if "error" not in clip
        and (mine := clip["values"].get(metric)) is not None
        and (theirs := values.get(_which(clip))) is not None
    ]
    return [gap for gap, _ in pairs], [prompt for _, prompt in pairs]


def _which(clip: Record) -> tuple[str, str | None, int]:
    return clip["prompt"], clip.get("task"), clip["index"]


def set_metrics(clips: Sequence[Record], reference: Sequence[Record]) -> dict[str, Interval]:
    """Speed histogram and look of a set of measured clips against the reference's; empty where there is too little.

    Intervals resample prompts.
    """
    prompts = [clip["prompt"] for clip in clips]
    distances = {
        "lab_speed_wasserstein": speed_distance(clips, reference, prompts),
        "appearance_distance": look_distance(clips, reference, prompts),
    }
    found = {name: distance for name, distance in distances.items() if distance}
    seen, real_seen = (
        np.array([f for clip in some if (f := clip.get("video_features")) is not None]) for some in (clips, reference)
    )
    if min(len(seen), len(real_seen)) >= 4:
        found["cd_fvd"] = Interval(cd_fvd(seen, real_seen), None, len(seen))
        found["cd_fvd_floor"] = Interval(noise_floor(real_seen), None, len(real_seen) // 2)
    return found


def speed_distance(
    clips: Sequence[Record], reference: Sequence[Record], *factors: Sequence[Hashable]
) -> Interval | None:
    """Of the histograms of tracked speeds; None where a set has none. ``factors`` are what is resampled."""
    real = [v for clip in reference if (v := clip["values"].get("lab_speed")) is not None]
    speeds = column_of(clips, "lab_speed")
    return wasserstein_interval(speeds, real, *factors) if real and any(map(math.isfinite, speeds)) else None


def look_distance(
    clips: Sequence[Record], reference: Sequence[Record], *factors: Sequence[Hashable]
) -> Interval | None:
    """:func:`appearance_distance` of measured clips; None where a model or the reference has fewer clips than it takes."""
    one, two = (np.array([clip["features"] for clip in some]) for some in (clips, reference))
    fewest = min(Counter(factors[1]).values()) if len(factors) > 1 else len(one)
    return appearance_distance(one, two, *factors) if min(fewest, len(two)) >= 2 * one.shape[-1] else None


def deviations(features_ND: np.ndarray) -> np.ndarray:
    """The unit ``(D,)`` of each feature of a look; 1e-6 where a set shows none."""
    return np.maximum(features_ND.std(0), 1e-6)


def appearance_distance(features_ND: np.ndarray, reference_MD: np.ndarray, *factors: Sequence[Hashable]) -> Interval:
    """Frechet distance (covariance over N) of features scaled by the reference's deviations, with an interval, whose ends are
    those of :func:`mogan.evaluation.statistics.moved_ends`.

    ``factors`` are what is resampled: prompts, and which model made a clip. Of several models it is the mean of their distances:
    together they are no model, and more clips are less biased.
    """
    scale = deviations(reference_MD)
    target, unit = Moments().add(reference_MD / scale), features_ND / scale
    models = np.array(factors[1] if len(factors) > 1 else [0] * len(unit))
    of_model = [np.flatnonzero(models == model) for model in dict.fromkeys(models.tolist())]

    def mean_distance(prompts_N: np.ndarray, models_N: np.ndarray) -> float:
        """Weights say how often each clip's prompt and model were drawn."""
        drawn = [own for own in of_model if models_N[own[0]]]
        distances = [frechet(Moments().add(np.repeat(unit[own], prompts_N[own], axis=0)), target) for own in drawn]
        return float(np.average(distances, weights=[models_N[own[0]] for own in drawn]))

    once = np.ones(len(unit), int)
    distance = mean_distance(once, once)
    draws = cluster_draws(factors, RESAMPLES // 20)
    if draws is None:
        return Interval(distance, None, len(unit))
    found = [mean_distance(rows[0], rows[1] if len(rows) > 1 else once) for rows in zip(*draws, strict=True)]
    return Interval(distance, moved_ends(distance, found), len(unit))
