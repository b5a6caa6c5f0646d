"""Votes and raters read back from a survey folder, each rater held against the survey's own rules."""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np

from mogan.disk.files import from_json
from mogan.errors import UserError
from mogan.survey import checks
from mogan.survey.folder import VOTES, Answer, Item, Survey, fingerprint
from mogan.survey.plan import REPEAT
from mogan.survey.store import completion_code

SIDES = ("left", "tie", "right")
PAIRS_FOR_SIDE = 10  # with fewer, the better clip may well have been on one side by chance


@dataclass(frozen=True)
class Vote:
    """One answered screen: ``answers`` by question as first / tie / second, ``shown`` as left / tie / right."""

    rater: str
    kind: str
    item: Item
    swapped: bool
    answers: dict[str, Answer]
    shown: dict[str, str]
    seconds: float
    watch: dict[str, float]


@dataclass(frozen=True)
class Rater:
    """Who answered, and what speaks against counting them (empty: nothing)."""

    id: str
    platform: dict[str, str]
    device: dict[str, float]
    pairs: int
    finished: bool
    failed: int
    checks: int
    median_s: float
    reasons: tuple[str, ...]
    code: str


def read_votes(folder: Path, survey: Survey) -> tuple[list[Vote], list[Rater]]:
    """All votes and all raters of a survey folder, read without disturbing a server that runs.

    Raises:
        UserError: there are no votes yet.
    """
    path = folder / VOTES
    if not path.is_file():
        raise UserError(
            f"{folder} has no votes yet: run `mogan survey serve {quote(str(folder))}` and let people vote."
        )
    items = {item.id: item for item in survey.items}
    seconds = {clip.file: clip.seconds for clip in survey.clips}
    try:
        db = _open(path)
        try:
            (mark,) = db.execute("SELECT value FROM meta WHERE key = 'survey'").fetchone()
            people = db.execute("SELECT id, created, platform, device FROM raters ORDER BY created, id").fetchall()
            rows = db.execute(
                "SELECT s.rater, s.kind, s.item, s.swapped, v.answers, v.watch, v.received "
                "FROM votes v JOIN slots s USING (rater, slot) ORDER BY s.rater, s.slot"
            ).fetchall()
            asked = dict(db.execute("SELECT rater, count(*) FROM slots GROUP BY rater"))
        finally:
            db.close()
    except (sqlite3.Error, TypeError) as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
            raise UserError(
                f"{path} cannot be read where it lies ({error}): free some space on its disk, or copy the survey's folder, with "
                f"{path.name}-wal, to where there is some and you may write."
            ) from error
        raise UserError(f"{path} cannot be read ({error}): restore it from a copy.") from error
    if mark != fingerprint(folder):
        raise UserError(f"{folder / 'survey.json'} is not the one these votes were given for: restore it.")
    votes: dict[str, list[Vote]] = {rater: [] for rater, *_ in people}
    latest = {rater: created for rater, created, *_ in people}
    about = {}
    try:
        for rater, kind, item, swapped, answers, watch, received in rows:
            shown, watched = from_json(answers), from_json(watch)
            if {question.id for question in survey.questions} != shown.keys() or set(shown.values()) - set(SIDES):
                raise ValueError(f"an answer of {rater} is none of the survey's")
            spent = min(received - latest[rater], watched["total_ms"] / 1000)  # the server's clock cannot be faked
            latest[rater] = received
            true = {question: from_side(side, bool(swapped)) for question, side in shown.items()}
            votes[rater].append(Vote(rater, kind, items[item], bool(swapped), true, shown, spent, watched))
        for rater, _, platform, device in people:
            about[rater] = dict(json.loads(platform)), dict(json.loads(device))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was changed by something else ({error}): restore it from a copy.") from error
    if not any(vote.kind == "pair" for given in votes.values() for vote in given):
        raise UserError(f"Nobody has judged a pair of {folder} yet: wait for votes.")
    raters = [_judge_rater(survey, rater, *about[rater], votes[rater], asked[rater], seconds) for rater in about]
    return [vote for given in votes.values() for vote in given], raters


def _open(path: Path) -> sqlite3.Connection:
    """To read, with what a server has written last; where nothing can be written beside the file, as it lies there."""
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        db.execute("SELECT value FROM meta").fetchone()
    except (
        sqlite3.OperationalError
    ):  # no room or no right to make votes.sqlite-shm, which readers share with the server
        db.close()
        if path.with_name(f"{path.name}-wal").is_file():
            raise
        db = sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)
    return db


def from_side(side: str, swapped: bool) -> Answer:
    """What was meant by a side: left / tie / right -> first / tie / second."""
    if side == "tie":
        return "tie"
    return "first" if (side == "left") != swapped else "second"


def _judge_rater(
    survey: Survey,
    rater: str,
    platform: dict[str, str],
    device: dict[str, float],
    votes: list[Vote],
    asked: int,
    seconds: dict[str, float],
) -> Rater:
    """Apply the survey's rules to one rater."""
    rules = survey.rules
    judged = [vote for vote in votes if vote.kind in ("pair", REPEAT)]
    checked = [vote for vote in votes if vote.kind == "check"]
    failed = sum(not checks.passed(vote.item, vote.answers) for vote in checked)
    reasons = []
    if failed >= rules.failed_checks:
        reasons.append(f"failed {failed} of {len(checked)} attention checks")
    median = float(np.median([vote.seconds for vote in judged])) if judged else 0.0
    length = float(np.median([max(seconds[v.item.first], seconds[v.item.second]) for v in judged])) if judged else 0.0
    if judged and median < length + rules.fast_margin_s:
        reasons.append(f"median {median:.1f} s per pair of {length:.1f} s clips")
    decided = [side for vote in judged for side in vote.shown.values() if side != "tie"]
    one = max(decided.count("left"), decided.count("right")) / len(decided) if decided else 0.0
    if len(judged) >= PAIRS_FOR_SIDE and one > rules.one_side:
        reasons.append(f"{100 * one:.0f} % of decided answers on one side")
    return Rater(
        rater,
        platform,
        device,
        len([vote for vote in votes if vote.kind == "pair"]),
        len(votes) == asked,
        failed,
        len(checked),
        median,
        tuple(reasons),
        completion_code(survey, rater) if len(votes) == asked else "",
    )
