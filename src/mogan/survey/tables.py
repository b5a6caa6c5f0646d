"""The result as text: a Markdown table, and CSV rows of votes and of raters."""

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from mogan.survey.ballots import Rater, Vote
from mogan.survey.folder import Survey


def markdown(survey: Survey, results: dict[str, Any]) -> str:
    """The result as Markdown: kept raters first, then everybody, then what to know before believing it."""
    titles = {question.id: question.title for question in survey.questions}
    people = results["raters"]
    lines = [f"# {survey.title}", ""]
    for key, heading in (("kept", "After exclusions"), ("everybody", "Everybody")):
        part = results[key]
        lines += [f"## {heading}: {part['votes']} votes by {part['raters']} raters", ""]
        lines += ["| comparison | question | win % | tie % | lose % | net, points [95 %] | p (Holm) | detectable |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_row(comparison, titles) for comparison in part["comparisons"]]
        lines.append("")
        if part["ranking"] and all(part["ranking"].values()):
            lines += ["| question | rank. system (log strength [95 %]) |", "|---|---|"]
            lines += [f"| {titles[q]} | {_ranks(ranking)} |" for q, ranking in part["ranking"].items()]
            lines.append("")
    lines += ["## How far to believe it", ""]
    lines.append(
        "| question | agreeing pairs | alpha nominal | alpha ordinal | AC1 | share left (p) | same when repeated |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    part = results["kept"]
    for q, title in titles.items():
        agreement, position, repeated = part["agreement"][q], part["position"][q], part["repeated"][q]
        lines.append(
            f"| {title} | {_percent(agreement['raw'])} | {_number(agreement['alpha_nominal'])} | "
            f"{_number(agreement['alpha_ordinal'])} | {_number(agreement['gwet_ac1'])} | "
            f"{_percent(position['share_left'])} ({position['p']:.2g}) | "
            f"{_percent(repeated['same'])} of {repeated['n']} |"
        )
    lines += [
        "",
        f"{people['came']} raters came, {people['finished']} finished, {len(people['excluded'])} were excluded:",
    ]
    lines += [f"- {rater}: {'; '.join(reasons)}" for rater, reasons in people["excluded"].items()] or ["- nobody"]
    lines += ["", *(f"Warning: {warning}" for warning in results["warnings"])]
    return "\n".join(lines).rstrip() + "\n"


def _row(c: dict[str, Any], titles: dict[str, str]) -> str:
    head = f"| {c['first']} against {c['second']} | {titles[c['question']]} "
    if not c["votes"]:
        return head + "| - | - | - | - | - | - |"
    net = f"{100 * c['net']['value']:+.1f}"
    if c["net"]["ci95"]:
        net += " [{:+.1f}, {:+.1f}]".format(*(100 * value for value in c["net"]["ci95"]))
    detectable = f"{100 * c['detectable']['net']:.0f}" if c["detectable"] else "-"
    shares = " | ".join(f"{100 * c[name]['value']:.1f}" for name in ("win", "tie", "lose"))
    return head + f"| {shares} | {net} | {c['sign_test']['p_holm']:.2g} | {detectable} |"


def _ranks(ranking: dict[str, Any]) -> str:
    told = []
    for one in ranking["systems"]:
        interval = " [{:+.2f}, {:+.2f}]".format(*one["ci95"]) if one["ci95"] else ""
        told.append(f"{one['rank'] or '-'}. {one['system']} ({one['strength']:+.2f}{interval})")
    return ", ".join(told)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def vote_rows(votes: list[Vote], kept: set[str]) -> Iterable[dict[str, Any]]:
    """One row per answer: who, about what, what it means and what was pressed."""
    for vote in votes:
        first, second = vote.item.systems or ("", "")
        for question, answer in vote.answers.items():
            yield {
                "rater": vote.rater,
                "kept": int(vote.rater in kept),
                "kind": vote.kind,
                "manner": vote.item.manner,
                "item": vote.item.id,
                "prompt": vote.item.prompt,
                "index": vote.item.index,
                "seed": vote.item.seed,
                "first": first,
                "second": second,
                "question": question,
                "answer": answer,
                "shown": vote.shown[question],
                "seconds": round(vote.seconds, 3),
                **vote.watch,
            }


def rater_rows(raters: list[Rater]) -> Iterable[dict[str, Any]]:
    """One row per rater, for paying and for judging the exclusions."""
    for rater in raters:
        yield {
            "rater": rater.id,
            "pairs": rater.pairs,
            "finished": int(rater.finished),
            "code": rater.code,
            "failed_checks": rater.failed,
            "checks": rater.checks,
            "median_s": round(rater.median_s, 2),
            "excluded": "; ".join(rater.reasons),
            "platform": json.dumps(rater.platform, sort_keys=True),
            **rater.device,
        }


def csv_text(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV under the first row's names."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
