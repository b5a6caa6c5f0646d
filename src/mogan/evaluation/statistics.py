"""Means with honest intervals: clips of one prompt are no independent draws, so prompts are what is resampled."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

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
            both are resampled independently and their weights multiply (the pigeonhole bootstrap, Owen 2007). Without any
            there is no interval.

    Returns:
        The mean, the 2.5 and 97.5 percentiles of 2000 resamples drawn with seed 0, and the count. No values give NaN.
    """
    kept = np.isfinite(np.asarray(values, float))
    numbers = np.asarray(values, float)[kept]
    if numbers.size == 0:
        return Interval(float("nan"), None, 0)
    codes = [_codes(_where(factor, kept)) for factor in factors]
    draws = _draws(codes, RESAMPLES)
    if draws is None:
        return Interval(float(numbers.mean()), None, numbers.size)
    total = _resampled_sums(np.ones_like(numbers), codes, draws)
    means = _resampled_sums(numbers, codes, draws)[total > 0] / total[total > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    mean = float(numbers.mean())
    # where all values are alike, rounding may put the mean beside its own resamples
    return Interval(mean, (min(float(low), mean), max(float(high), mean)), numbers.size)


def wasserstein_interval(values: Sequence[float], reference: Sequence[float], *factors: Sequence[Hashable]) -> Interval:
    """:func:`wasserstein` of a set to a fixed reference, with the interval of a cluster bootstrap of the set.

    Its ends are those of :func:`moved_ends`, and none is below 0.
    """
    kept = np.isfinite(np.asarray(values, float))
    numbers = np.asarray(values, float)[kept]
    if numbers.size == 0:
        return Interval(float("nan"), None, 0)
    distance = wasserstein(numbers, reference)
    draws = joint_draws([_where(factor, kept) for factor in factors], RESAMPLES // 4)
    if draws is None:
        return Interval(distance, None, numbers.size)
    drawn = _wasserstein(numbers, draws[draws.any(1)], reference)
    low, high = moved_ends(distance, drawn)
    return Interval(distance, (max(0.0, low), high), numbers.size)


def moved_ends(distance: float, drawn: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of resampled distances, ``(R,)``, moved to where their median is the distance itself.

    A resample holds fewer different values and so lies farther away.
    """
    low, middle, high = np.quantile(drawn, (0.025, 0.5, 0.975))
    return float(distance + low - middle), float(distance + high - middle)


def joint_draws(factors: Sequence[Sequence[Hashable]], resamples: int) -> np.ndarray | None:
    """How often every value is drawn, ``(resamples, N)``, when whole clusters of each factor are resampled by themselves.

    None if a factor has a single level: nothing can be said of how its others would differ.
    """
    draws = cluster_draws(factors, resamples)
    return None if draws is None else reduce(np.multiply, draws)


def cluster_draws(factors: Sequence[Sequence[Hashable]], resamples: int) -> list[np.ndarray] | None:
    """The factors of :func:`joint_draws`, ``(resamples, N)`` each."""
    codes = [_codes(factor) for factor in factors]
    draws = _draws(codes, resamples)
    if draws is None:
        return None
    return [draw[:, code].astype(int) for draw, code in zip(draws, codes, strict=True)]


def wasserstein(one: Sequence[float] | np.ndarray, two: Sequence[float] | np.ndarray) -> float:
    """First Wasserstein distance between two sets of numbers, ``(N,)`` and ``(M,)``: the area between their distribution functions."""
    if len(one) == 0 or len(two) == 0:
        return float("nan")
    return float(_wasserstein(one, np.ones((1, len(one))), two)[0])


def _wasserstein(
    values: Sequence[float] | np.ndarray, weights_RN: np.ndarray, reference: Sequence[float] | np.ndarray
) -> np.ndarray:
    """The distance for each row of weights ``(R,)``: sorting is done once for all of them."""
    values, reference = np.asarray(values, float), np.sort(np.asarray(reference, float))
    order = np.argsort(values)
    points = np.sort(np.concatenate([values, reference]))
    reached = np.pad(weights_RN[:, order].cumsum(1, dtype=float), ((0, 0), (1, 0)))
    below = reached[:, np.searchsorted(values[order], points[:-1], side="right")] / reached[:, -1:]
    below_reference = np.searchsorted(reference, points[:-1], side="right") / reference.size
    return np.abs(below - below_reference) @ np.diff(points)


def _draws(codes: Sequence[np.ndarray], resamples: int) -> list[np.ndarray] | None:
    """How often each cluster of each factor is drawn, ``(resamples, clusters)``; None if a factor has only one, or there is none."""
    counts = [int(code.max()) + 1 for code in codes]
    if min(counts, default=0) < 2:
        return None
    return [_drawn(count, resamples, stream) for stream, count in enumerate(counts)]


@lru_cache(maxsize=128)
def _drawn(count: int, resamples: int, stream: int) -> np.ndarray:
    """Of one factor, the same for every set with as many clusters. A byte each: a cluster is drawn about once."""
    found = np.random.default_rng([SEED, stream]).multinomial(count, np.full(count, 1 / count), resamples)
    return found.astype(np.uint8)


def _resampled_sums(values_N: np.ndarray, codes: Sequence[np.ndarray], draws: Sequence[np.ndarray]) -> np.ndarray:
    """``sum_n weight_n value_n`` of every resample, a weight being the product over factors of its clusters' draws.

    Values that share their clusters share their weight, so they are added up first.
    """
    cells = np.zeros([draw.shape[1] for draw in draws])
    np.add.at(cells, tuple(codes), values_N)
    sums = np.tensordot(draws[0], cells, 1)
    for draw in draws[1:]:
        sums = np.einsum("rk,rk...->r...", draw, sums)
    return sums


def _codes(names: Sequence[Hashable]) -> np.ndarray:
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], int)


def _where(names: Sequence[Hashable], kept: np.ndarray) -> list[Hashable]:
    return [name for name, keep in zip(names, kept, strict=True) if keep]
