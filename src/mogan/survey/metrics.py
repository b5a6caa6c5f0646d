"""Which automatic number agrees with people: its order of two clips against their votes."""

from pathlib import Path
from typing import Any

import numpy as np

from mogan.errors import UserError
from mogan.evaluation.names import METRICS
from mogan.evaluation.results import read_results
from mogan.survey import statistics as st
from mogan.survey.ballots import Vote
from mogan.survey.folder import Survey
from mogan.survey.summary import CODE, DRAWS

Values = dict[tuple[str, str, int], dict[str, float | None]]  # (system, prompt, number) -> metric -> value


def read_values(path: Path, survey: Survey) -> Values:
    """Per-clip values of a ``results.json``.

    Raises:
        UserError: it is none, or it holds none of the survey's systems.
    """
    systems = read_results(path)
    values = {
        (name, clip["prompt"], clip["index"]): clip["values"]
        for name, system in systems.items()
        for clip in system["clips"]
        if "error" not in clip
    }
    missing = [name for name in survey.systems if name not in systems]
    if missing:
        raise UserError(
            f"{path} has no clips of {missing[0]}: evaluate under the survey's names, as in mogan evaluate "
            f"{missing[0]}=FOLDER"
        )
    return values


def agreement(votes: list[Vote], values: Values, question: str, seed: int) -> list[dict[str, Any]]:
    """How often each metric prefers the clip that a vote preferred, farthest from a coin first.

    Of the votes that were no ties: the share on the metric's side; a metric that does not tell the two clips apart
    counts half. 0.5 is a coin. Lower is taken to be better where :data:`METRICS` says so, else higher: a share well
    below 0.5 then means that people prefer less of it. Intervals are 95 % of the bootstrap over prompts and raters that
    the votes themselves get.

    Returns:
        One row per metric: ``metric``, ``prefers`` ("higher" or "lower"), ``share``, ``ci95`` (None with one prompt),
        ``votes``, ``undecided`` (share of these votes on which the metric says nothing).
    """
    decided = [
        (vote, *found)
        for vote in votes
        if vote.kind == "pair" and vote.answers[question] != "tie" and (found := _values_of(vote, values))
    ]
    rows: list[dict[str, Any]] = []
    drawn_for: tuple[list[Vote], np.ndarray] | None = None  # most metrics know all clips: votes, and their weights
    for name, metric in METRICS.items():
        kept = [
            (vote, a - b)
            for vote, first, second in decided
            if (a := first.get(name)) is not None and (b := second.get(name)) is not None
        ]
        if not kept:
            continue
        way = -1 if metric.better == "lower" else 1
        sides = np.array([CODE[vote.answers[question]] for vote, _ in kept])
        hits = (1 + sides * np.sign([way * gap for _, gap in kept])) / 2
        of = [vote for vote, _ in kept]
        prompts, raters = np.array([v.item.prompt for v in of]), np.array([v.rater for v in of])
        if drawn_for is None or drawn_for[0] != of:
            drawn_for = of, st.bootstrap_weights(prompts, raters, DRAWS, np.random.default_rng([seed, 3]))
        weights = drawn_for[1]
        total = weights.sum(1)
        drawn = (weights @ hits)[total > 0] / total[total > 0]
        rows.append(
            {
                "metric": name,
                "prefers": metric.better or "higher",
                "share": float(hits.mean()),
                "ci95": st.interval(drawn).tolist() if len(set(prompts)) > 1 else None,
                "votes": len(kept),
                "undecided": float(np.mean(hits == 0.5)),
            }
        )
    return sorted(rows, key=lambda row: -abs(row["share"] - 0.5))


def _values_of(vote: Vote, values: Values) -> tuple[dict[str, float | None], dict[str, float | None]] | None:
    """The values of the pair's two clips, in the order of its systems; None where one was not measured."""
    first, second = (
        values.get((system, vote.item.prompt, vote.item.index)) for system in vote.item.systems or ("", "")
    )
    return None if first is None or second is None else (first, second)


def agreement_markdown(tables: dict[str, list[dict[str, Any]]], titles: dict[str, str]) -> str:
    """The tables of :func:`agreement` by question, as Markdown: one row per metric, in the order of the first question that has it."""
    names = list(dict.fromkeys(row["metric"] for rows in tables.values() for row in rows))
    lines = ["## Which number agrees with people", ""]
    if not names:
        return "\n".join([*lines, "No voted pair was measured: the results are of other prompts or numbers.", ""])
    found = {q: {row["metric"]: row for row in rows} for q, rows in tables.items()}
    lines += [f"| metric | {' | '.join(titles[q] for q in tables)} | undecided % |", "|---" * (len(tables) + 2) + "|"]
    for name in names:
        first = next(rows[name] for rows in found.values() if name in rows)
        cells = " | ".join(_cell(rows.get(name)) for rows in found.values())
        arrow = "↓" if first["prefers"] == "lower" else "↑"
        lines.append(f"| {METRICS[name].title} {arrow} | {cells} | {100 * first['undecided']:.0f} |")
    lines += [
        "",
        "Share of decided votes on the side of the metric, in %, with 95 % intervals over prompts and raters. 50 is a "
        "coin; below 50 people prefer less of it (↑) or more (↓). With many metrics some leave 50 out by chance.",
        "",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    interval = " [{:.0f}, {:.0f}]".format(*(100 * x for x in row["ci95"])) if row["ci95"] else ""
    return f"{100 * row['share']:.0f}{interval}, n {row['votes']}"
