"""Means with honest intervals: clips of one prompt are no independent draws, so prompts are what is resampled."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval (None with fewer than two clusters: nothing can be said) and the number of values."""

    mean: float
    ci95: tuple[float, float] | None
    n: int

    def to_json(self) -> dict[str, object]:
        """As in ``results.json``."""
        return {"mean": self.mean, "ci95": list(self.ci95) if self.ci95 else None, "n": self.n}


def mean_interval(values: Sequence[float], *factors: Sequence[Hashable]) -> Interval:
    """Mean with the percentile interval of a cluster bootstrap.

    Args:
        values: one per clip; NaN ones are left out and not counted.
        factors: for every value, what it is clustered by: the prompt; with a second factor, such as the training seed,
            both are resampled independently and their weights multiply (the pigeonhole bootstrap, Owen 2007).

    Returns:
        The mean, the 2.5 and 97.5 percentiles of 2000 resamples drawn with seed 0, and the count. No values give NaN.
    """
    kept = np.isfinite(np.asarray(values, float))
    numbers = np.asarray(values, float)[kept]
    if numbers.size == 0:
        return Interval(float("nan"), None, 0)
    weights = joint_draws([_where(factor, kept) for factor in factors], RESAMPLES)
    if weights is None:
        return Interval(float(numbers.mean()), None, numbers.size)
    total = weights.sum(1)
    means = (weights @ numbers)[total > 0] / total[total > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(numbers.mean()), (float(low), float(high)), numbers.size)


def wasserstein_interval(values: Sequence[float], reference: Sequence[float], *factors: Sequence[Hashable]) -> Interval:
    """:func:`wasserstein` of a set to a fixed reference, with the interval of a cluster bootstrap of the set."""
    kept = np.isfinite(np.asarray(values, float))
    numbers = np.asarray(values, float)[kept]
    if numbers.size == 0:
        return Interval(float("nan"), None, 0)
    distance = wasserstein(numbers, reference)
    draws = joint_draws([_where(factor, kept) for factor in factors], RESAMPLES // 4)
    if draws is None:
        return Interval(distance, None, numbers.size)
    found = [wasserstein(np.repeat(numbers, draw), reference) for draw in draws if draw.any()]
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(distance, (float(low), float(high)), numbers.size)


def joint_draws(factors: Sequence[Sequence[Hashable]], resamples: int) -> np.ndarray | None:
    """How often every value is drawn when each factor is resampled by itself: products of :func:`cluster_draws`.

    None if a factor has a single level: nothing can be said of how its others would differ.
    """
    draws = [cluster_draws(factor, resamples, number) for number, factor in enumerate(factors)]
    if any(draw is None for draw in draws):
        return None
    return np.prod(np.stack([draw for draw in draws if draw is not None]), axis=0)


def cluster_draws(clusters: Sequence[Hashable], resamples: int, stream: int = 0) -> np.ndarray | None:
    """How often every value is drawn in every resample of whole clusters: ``(resamples, N)``; None with one cluster."""
    codes = _codes(clusters)
    count = int(codes.max()) + 1
    if count < 2:
        return None
    return np.random.default_rng([SEED, stream]).multinomial(count, np.full(count, 1 / count), resamples)[:, codes]


def wasserstein(one: Sequence[float] | np.ndarray, two: Sequence[float] | np.ndarray) -> float:
    """First Wasserstein distance between two sets of numbers: the area between their distribution functions."""
    a, b = np.sort(np.asarray(one, float)), np.sort(np.asarray(two, float))
    if a.size == 0 or b.size == 0:
        return float("nan")
    points = np.sort(np.concatenate([a, b]))
    below_a = np.searchsorted(a, points[:-1], side="right") / a.size
    below_b = np.searchsorted(b, points[:-1], side="right") / b.size
    return float((np.abs(below_a - below_b) * np.diff(points)).sum())


def _codes(names: Sequence[Hashable]) -> np.ndarray:
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], int)


def _where(names: Sequence[Hashable], kept: np.ndarray) -> list[Hashable]:
    return [name for name, keep in zip(names, kept, strict=True) if keep]
