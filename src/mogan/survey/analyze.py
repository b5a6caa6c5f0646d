"""``mogan survey analyze``: votes -> win / tie / lose with intervals, before and after exclusions."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro

from mogan import __version__
from mogan.data.lists import printable
from mogan.disk.files import replacing, writable_file, writable_folder
from mogan.ranges import is_seed
from mogan.survey.ballots import Rater, Vote, read_votes
from mogan.survey.figure import draw
from mogan.survey.folder import Survey, fingerprint, read_survey
from mogan.survey.metrics import agreement, agreement_markdown, read_values
from mogan.survey.summary import summarise
from mogan.survey.tables import csv_text, markdown, rater_rows, vote_rows


def analyze(
    survey: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path | None = None,
    metrics: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Say who won, by how much, with confidence intervals.

    Writes into --out: `table.md` (the paper's table), `figure.png` (win / tie / lose bars), `results.json` (all of it),
    `votes.csv` (one row per answer) and `raters.csv` (participant numbers and completion codes; keep it to yourself).
    Intervals are 95 % of a bootstrap over prompts and raters, since answers on one prompt or by one person are not
    independent. The main result leaves out raters by the rules fixed when the survey was built; the result with
    everybody stands beside it. It may be run while the survey is being served.

    Example: mogan survey analyze survey

    Args:
        survey: The folder that was served.
        out: Where to write; by default `results` inside the survey folder.
        metrics: A results.json of `mogan evaluate` on the same clips: says how well each metric agrees with the votes.
        seed: Of the bootstrap; the same votes and seed give the same numbers.
    """
    is_seed(seed=seed)
    design = read_survey(survey)
    votes, raters = read_votes(survey, design)
    values = read_values(metrics, design) if metrics else None
    out = out or survey / "results"
    writable_folder(out)
    writable_file(out / "results.json", rb'\s*\{\s*"format"')  # that of `mogan evaluate` has this name, too
    kept = {rater.id for rater in raters if not rater.reasons}
    results: dict[str, Any] = {
        "format": 1,
        "version": __version__,
        "survey": fingerprint(survey),
        "title": design.title,
        "systems": list(design.systems),
        "rules": vars(design.rules),
        "warnings": list(design.warnings) + list(_warnings(design, votes, raters)),
        "raters": _raters_summary(raters),
        "kept": summarise(design, [vote for vote in votes if vote.rater in kept], seed),
        "everybody": summarise(design, votes, seed),
    }
    table = printable(markdown(design, results))
    if values is not None:
        judged = [vote for vote in votes if vote.rater in kept]
        results["metrics"] = {q.id: agreement(judged, values, q.id, seed) for q in design.questions}
        table += "\n" + agreement_markdown(results["metrics"], {q.id: q.title for q in design.questions})
    _write(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    _write(out / "table.md", table)
    _write(out / "votes.csv", csv_text(vote_rows(votes, kept)))
    _write(out / "raters.csv", csv_text(rater_rows(raters)), private=True)
    draw(design, results["kept"]["comparisons"], out / "figure.png")
    print(table + f"\nWritten to {out}")
    return results


def _raters_summary(raters: list[Rater]) -> dict[str, Any]:
    return {
        "came": len(raters),
        "finished": sum(rater.finished for rater in raters),
        "excluded": {rater.id: list(rater.reasons) for rater in raters if rater.reasons},
    }


def _warnings(survey: Survey, votes: list[Vote], raters: list[Rater]) -> Iterable[str]:
    pairs = [vote for vote in votes if vote.kind == "pair"]
    prompts = len({vote.item.prompt for vote in pairs})
    if prompts < 20:
        yield f"Only {prompts} prompts were judged: bootstrap intervals over so few are too narrow."
    judged = {vote.item.id for vote in pairs}
    missing = len(survey.of_kind("pair")) - len(judged)
    if missing:
        yield f"{missing} pairs have no vote yet."
    voted = {vote.rater for vote in pairs}
    if voted and all(rater.reasons for rater in raters if rater.id in voted):
        yield "The rules exclude everybody: the main table is empty."


def _write(path: Path, text: str, private: bool = False) -> None:
    with replacing(path) as temporary:
        temporary.touch(mode=0o600 if private else 0o644)
        temporary.write_text(text, encoding="utf-8")
