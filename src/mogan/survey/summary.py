"""Every number of the result: one set of votes -> shares, intervals, agreement, position, ranking, power."""

from itertools import combinations
from typing import Any

import numpy as np

from mogan.survey import statistics as st
from mogan.survey.ballots import Vote
from mogan.survey.folder import Survey
from mogan.survey.plan import REPEAT

DRAWS = 2000
CODE = {"first": 1, "tie": 0, "second": -1}


def summarise(survey: Survey, votes: list[Vote], seed: int) -> dict[str, Any]:
    """Every number about one set of votes; repeats and checks count only where said."""
    pairs = [vote for vote in votes if vote.kind == "pair"]
    comparisons = [
        _comparison([v for v in pairs if v.item.systems == names], names, question.id, seed)
        for names in combinations(survey.systems, 2)
        for question in survey.questions
    ]
    for comparison, p_value in zip(comparisons, st.holm([c["sign_test"]["p"] for c in comparisons]), strict=True):
        comparison["sign_test"]["p_holm"] = p_value
    return {
        "raters": len({vote.rater for vote in pairs}),
        "votes": len(pairs),
        "comparisons": comparisons,
        "agreement": {question.id: _agreement(pairs, question.id) for question in survey.questions},
        "position": {question.id: _position(pairs, question.id) for question in survey.questions},
        "repeated": {question.id: _repeated(votes, question.id) for question in survey.questions},
        "ranking": {question.id: _ranking(survey, pairs, question.id, seed) for question in survey.questions}
        if len(survey.systems) > 2
        else {},
    }


def _arrays(votes: list[Vote], question: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outcomes, prompt of each, rater of each)."""
    outcomes = np.array([CODE[vote.answers[question]] for vote in votes], dtype=int)
    return outcomes, np.array([vote.item.prompt for vote in votes]), np.array([vote.rater for vote in votes])


def _comparison(votes: list[Vote], names: tuple[str, str], question: str, seed: int) -> dict[str, Any]:
    outcomes, prompts, raters = _arrays(votes, question)
    clusters = len(set(prompts))
    result: dict[str, Any] = {
        "first": names[0],
        "second": names[1],
        "question": question,
        "votes": len(votes),
        "items": len({vote.item.id for vote in votes}),
        "prompts": clusters,
        "raters": len(set(raters)),
    }
    first, tied, second = _majorities(prompts, outcomes)  # clips of one prompt are no independent pairs
    result["sign_test"] = {"first": first, "tied": tied, "second": second, "p": st.sign_test(first, second)}
    if not votes:
        return {**result, "win": None, "tie": None, "lose": None, "net": None, "win_rate": None, "detectable": None}
    generator = np.random.default_rng([seed, 1])
    weights = st.bootstrap_weights(prompts, raters, DRAWS, generator)
    share, drawn = st.shares(outcomes), st.shares(outcomes, weights)
    dirichlet = st.dirichlet_interval(outcomes, generator)
    enough = clusters > 1
    for k, name in enumerate(("win", "tie", "lose")):
        result[name] = _estimate(share[k], drawn[:, k] if enough else None)
        result[name]["ci95_independent"] = dirichlet[:, k].tolist()
    result["net"] = _estimate(share[0] - share[2], drawn[:, 0] - drawn[:, 2] if enough else None)
    result["win_rate"] = _estimate(share[0] + share[1] / 2, drawn[:, 0] + drawn[:, 1] / 2 if enough else None)
    result["detectable"] = _power(outcomes, drawn, clusters) if enough and len(set(outcomes)) > 1 else None
    return result


def _majorities(clusters: np.ndarray, outcomes: np.ndarray) -> tuple[int, int, int]:
    """Of how many clusters of votes the majority is +1, none, -1."""
    names, codes = np.unique(clusters, return_inverse=True)
    sums = np.zeros(len(names), int)
    np.add.at(sums, codes, outcomes)
    return int((sums > 0).sum()), int((sums == 0).sum()), int((sums < 0).sum())


def _estimate(value: float, drawn: np.ndarray | None) -> dict[str, Any]:
    return {"value": float(value), "ci95": None if drawn is None else st.interval(drawn).tolist()}


def _power(outcomes: np.ndarray, drawn: np.ndarray, prompts: int) -> dict[str, float]:
    """Smallest detectable net preference here, from the bootstrap's own standard error, and prompts for ten points.

    ``design_effect`` is that variance over the variance of as many independent answers.
    """
    error = float(np.nanstd(drawn[:, 0] - drawn[:, 2]))
    naive = float(outcomes.std()) / np.sqrt(len(outcomes))
    smallest = (st.Z_TWO_SIDED + st.Z_POWER) * error
    return {
        "net": smallest,
        "standard_error": error,
        "design_effect": (error / naive) ** 2,
        "prompts_for_10_points": int(np.ceil(prompts * (smallest / 0.1) ** 2)),
    }


def _agreement(votes: list[Vote], question: str) -> dict[str, float | None]:
    outcomes, _, _ = _arrays(votes, question)
    table = st.ratings_table(np.array([vote.item.id for vote in votes]), outcomes)
    return {
        "items_rated_twice": int((table.sum(axis=1) >= 2).sum()),
        "raw": _finite(st.raw_agreement(table)),
        "alpha_nominal": _finite(st.krippendorff_alpha(table)),
        "alpha_ordinal": _finite(st.krippendorff_alpha(table, ordinal=True)),
        "gwet_ac1": _finite(st.gwet_ac1(table)) if len(table) else None,
    }


def _position(votes: list[Vote], question: str) -> dict[str, float | None]:
    """Which side was preferred; ``p``: an exact sign test of raters, each by the side that they preferred more often."""
    sides = np.array([{"left": 1, "right": -1}.get(vote.shown[question], 0) for vote in votes], int)
    left, right = int((sides > 0).sum()), int((sides < 0).sum())
    mostly_left, _, mostly_right = _majorities(np.array([vote.rater for vote in votes]), sides)
    return {
        "left": left,
        "right": right,
        "share_left": left / (left + right) if left + right else None,
        "p": st.sign_test(mostly_left, mostly_right),
    }


def _repeated(votes: list[Vote], question: str) -> dict[str, float | None]:
    """How often a rater who saw a pair again, sides swapped, said the same."""
    before = {(vote.rater, vote.item.id): vote.answers[question] for vote in votes if vote.kind == "pair"}
    again = [vote for vote in votes if vote.kind == REPEAT and (vote.rater, vote.item.id) in before]
    same = sum(before[vote.rater, vote.item.id] == vote.answers[question] for vote in again)
    return {"n": len(again), "same": same / len(again) if again else None}


def _ranking(survey: Survey, votes: list[Vote], question: str, seed: int, draws: int = 400) -> dict[str, Any]:
    """Davidson strengths with bootstrap intervals; a system's rank is 1 + the number of systems surely better."""
    if not votes:
        return {}
    outcomes, prompts, raters = _arrays(votes, question)
    place = {name: k for k, name in enumerate(survey.systems)}
    first, second = (np.array([place[(vote.item.systems or ("", ""))[k]] for vote in votes]) for k in (0, 1))

    def fit(weights: np.ndarray) -> st.Davidson:
        wins, ties = np.zeros((2, len(weights), len(place), len(place)))
        for outcome, better, worse in ((1, first, second), (-1, second, first)):
            won = outcomes == outcome
            np.add.at(wins.transpose(1, 2, 0), (better[won], worse[won]), weights.T[won])
        for a, b in ((first, second), (second, first)):
            np.add.at(ties.transpose(1, 2, 0), (a[outcomes == 0], b[outcomes == 0]), weights.T[outcomes == 0])
        return st.davidson(wins, ties)

    whole = fit(np.ones((1, len(votes))))
    weights = st.bootstrap_weights(prompts, raters, draws, np.random.default_rng([seed, 2]))
    drawn = fit(weights[weights.sum(axis=1) > 0]).strength
    _, high = st.interval(drawn[:, :, None] - drawn[:, None, :])
    enough = len(set(prompts)) > 1
    return {
        "tie_parameter": float(np.exp(whole.tie[0])),
        "systems": [
            {
                "system": name,
                "strength": float(whole.strength[0, k]),
                "ci95": st.interval(drawn[:, k]).tolist() if enough else None,
                "rank": 1 + int((high[k] < 0).sum()) if enough else None,
            }
            for name, k in sorted(place.items(), key=lambda pair: -whole.strength[0, pair[1]])
        ],
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
