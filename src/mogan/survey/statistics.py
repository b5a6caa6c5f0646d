"""The statistics of two-way comparisons: pure functions on arrays, each with its source and a known answer in tests.

Outcomes are coded +1 (first wins), 0 (tie), -1 (second wins).
"""

from math import comb, sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

OUTCOMES = (1, 0, -1)
Z_TWO_SIDED = 1.959964  # 95 %
Z_POWER = 0.841621  # 80 %


class Davidson(NamedTuple):
    """Log strengths (mean 0) and the log of the tie parameter."""

    strength: Float[np.ndarray, "*R S"]
    tie: Float[np.ndarray, "*R"]


def shares(outcomes: Int[np.ndarray, "N"], weights: Float[np.ndarray, "... N"] | None = None) -> np.ndarray:
    """Shares of win, tie, lose, ``(..., 3)``; NaN where the weights sum to 0."""
    weights = np.ones(len(outcomes)) if weights is None else weights
    hits = np.stack([outcomes == outcome for outcome in OUTCOMES], axis=-1).astype(float)
    with np.errstate(invalid="ignore"):
        return (weights @ hits) / weights.sum(axis=-1, keepdims=True)


def bootstrap_weights(
    prompts: Int[np.ndarray, "N"], raters: Int[np.ndarray, "N"], draws: int, generator: np.random.Generator
) -> Float[np.ndarray, "R N"]:
    """Weights of N votes in ``draws`` two-way cluster bootstraps: prompts and raters are drawn with replacement.

    A vote weighs (times its prompt was drawn) x (times its rater was drawn), the pigeonhole bootstrap of Owen (2007),
    which does not understate the variance of crossed data. ``prompts`` and ``raters`` number the clusters; a factor
    with one level is not drawn.
    """

    def drawn(labels: np.ndarray) -> np.ndarray:
        names, codes = np.unique(labels, return_inverse=True)
        if len(names) < 2:
            return np.ones((draws, len(labels)))
        return generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)[:, codes]

    return (drawn(prompts) * drawn(raters)).astype(float)


def interval(values: Float[np.ndarray, "R ..."]) -> Float[np.ndarray, "2 ..."]:
    """Percentiles 2.5 and 97.5 along the draws, leaving out draws without any vote."""
    return np.nanpercentile(values, [2.5, 97.5], axis=0)


def dirichlet_interval(outcomes: Int[np.ndarray, "N"], generator: np.random.Generator) -> Float[np.ndarray, "2 3"]:
    """95 % of the posterior of (win, tie, lose) from a flat prior, as FlowMo has it: takes answers as independent."""
    counts = [int((outcomes == outcome).sum()) + 1 for outcome in OUTCOMES]
    return interval(generator.dirichlet(counts, size=20_000))


def sign_test(first: int, second: int) -> float:
    """Exact two-sided binomial test of ``first`` against ``second`` at 1/2; 1 when both are 0."""
    n, k = first + second, max(first, second)
    term = tail = comb(n, k)
    for i in range(k, n):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: list[float]) -> list[float]:
    """P values corrected for testing all of them (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[k] * (len(p_values) - rank)))
        corrected[k] = largest
    return corrected


def ratings_table(
    units: Int[np.ndarray, "N"], outcomes: Int[np.ndarray, "N"], categories: tuple[int, ...] = OUTCOMES
) -> Float[np.ndarray, "U Q"]:
    """How many raters put each unit into each category."""
    names, codes = np.unique(units, return_inverse=True)
    table = np.zeros((len(names), len(categories)))
    for q, category in enumerate(categories):
        np.add.at(table[:, q], codes[outcomes == category], 1)
    return table


def krippendorff_alpha(table: Float[np.ndarray, "U Q"], ordinal: bool = False) -> float:
    """Krippendorff's alpha (2011) from counts per unit and category, categories in order; missing ratings allowed.

    1 is perfect agreement, 0 what chance gives. NaN without a unit rated twice; 1 when only one category was ever used.
    """
    rated = table.sum(axis=1)
    table, rated = table[rated >= 2], rated[rated >= 2]
    if not len(table):
        return float("nan")
    pairs = np.einsum("uc,uk->uck", table, table) - np.einsum("uc,ck->uck", table, np.eye(table.shape[1]))
    coincidence = (pairs / (rated - 1)[:, None, None]).sum(axis=0)
    totals = coincidence.sum(axis=1)
    if ordinal:
        below = np.cumsum(totals) - totals / 2
        distance = (below[:, None] - below[None, :]) ** 2
    else:
        distance = 1 - np.eye(len(totals))
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - (coincidence * distance).sum() / expected) if expected else 1.0


def raw_agreement(table: Float[np.ndarray, "U Q"]) -> float:
    """Share of agreeing pairs of raters, averaged over units rated at least twice; NaN if there is none."""
    rated = table.sum(axis=1)
    table, rated = table[rated >= 2], rated[rated >= 2]
    return float(((table * (table - 1)).sum(axis=1) / (rated * (rated - 1))).mean()) if len(table) else float("nan")


def gwet_ac1(table: Float[np.ndarray, "U Q"]) -> float:
    """Gwet's AC1 (2008), which unlike kappa and alpha does not collapse when one category is rare; missing allowed."""
    agreement = raw_agreement(table)
    table = table[table.sum(axis=1) > 0]
    prevalence = (table / table.sum(axis=1, keepdims=True)).mean(axis=0)
    chance = float((prevalence * (1 - prevalence)).sum() / (table.shape[1] - 1))
    return (agreement - chance) / (1 - chance)


def davidson(wins: Float[np.ndarray, "*R S S"], ties: Float[np.ndarray, "*R S S"], ridge: float = 1e-2) -> Davidson:
    """Bradley-Terry with ties (Davidson 1970) by Newton's method, for one data set or many at once.

    ``wins[i, j]`` counts i over j, ``ties`` is symmetric. P(i wins) : P(j wins) : P(tie) is
    ``p_i : p_j : nu sqrt(p_i p_j)``; in logs a multinomial logit, hence concave. The penalty 1/2 ``ridge`` |x|^2 on
    log strengths and log nu keeps the answer finite for a system that never lost and for data without ties.
    """
    size = wins.shape[-1]
    first, second = np.triu_indices(size, 1)
    rows = np.arange(len(first))
    design = np.zeros((len(first), 3, size + 1))  # outcome logits as linear functions of (strengths, log nu)
    design[rows, 0, first] = design[rows, 2, second] = design[rows, 1, size] = 1
    design[rows, 1, first] = design[rows, 1, second] = 0.5
    counts = np.stack([wins[..., first, second], ties[..., first, second], wins[..., second, first]], axis=-1)
    total = counts.sum(axis=-1, keepdims=True)

    def logits(x: np.ndarray) -> np.ndarray:
        return np.einsum("poj,...j->...po", design, x)

    def objective(x: np.ndarray) -> np.ndarray:
        fit = logits(x)
        return (counts * (fit - _logsumexp(fit))).sum(axis=(-2, -1)) - ridge / 2 * (x**2).sum(axis=-1)

    x = np.zeros((*wins.shape[:-2], size + 1))
    for _ in range(60):
        fit = logits(x)
        chance = np.exp(fit - _logsumexp(fit))
        gradient = np.einsum("...po,poj->...j", counts - total * chance, design) - ridge * x
        mean = np.einsum("...po,poj->...pj", chance, design)
        spread = design - mean[..., None, :]
        curvature = np.einsum("...po,...poj,...pok->...jk", total * chance, spread, spread) + ridge * np.eye(size + 1)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        before = objective(x)
        for _ in range(20):  # halve the steps that would go down
            worse = objective(x + step) < before - 1e-12 * np.abs(before)
            if not worse.any():
                break
            step = np.where(worse[..., None], step / 2, step)
        x = x + step
        if np.abs(step).max() < 1e-8:
            break
    strength = x[..., :size]
    return Davidson(strength - strength.mean(axis=-1, keepdims=True), x[..., size])


def detectable(
    prompts: int, raters: float, ties: float = 0.15, correlation: float = 0.3, z: float = Z_TWO_SIDED + Z_POWER
) -> float:
    """Smallest net preference (win - lose) that a study finds with 80 % power at the two-sided 5 % level.

    Var = (1 - ties) (1 + (raters - 1) correlation) / (prompts raters), the design effect of Kish (1965).
    """
    return z * sqrt((1 - ties) * (1 + (raters - 1) * correlation) / (prompts * raters))


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
