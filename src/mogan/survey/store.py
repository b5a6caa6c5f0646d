"""Votes on disk: SQLite in WAL mode, ``synchronous=FULL``; what was answered with success is on the disk.

One ``Store`` belongs to one thread (``app`` gives it a thread of its own). Every public method is one transaction.
"""

import hashlib
import hmac
import json
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mogan.errors import UserError
from mogan.survey.folder import VOTES, Survey, fingerprint
from mogan.survey.plan import Slot, plan

MAX_RATERS = 5000
OPEN_S = 2 * 3600  # an unfinished visit counts as "will still vote" for this long after its last sign of life

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS raters (
  id TEXT PRIMARY KEY, created REAL NOT NULL, seen REAL NOT NULL,
  external TEXT UNIQUE, platform TEXT NOT NULL, device TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS slots (
  rater TEXT NOT NULL REFERENCES raters(id), slot INTEGER NOT NULL,
  kind TEXT NOT NULL, item TEXT NOT NULL, swapped INTEGER NOT NULL,
  PRIMARY KEY (rater, slot), UNIQUE (rater, kind, item)
) STRICT;
CREATE TABLE IF NOT EXISTS votes (
  rater TEXT NOT NULL, slot INTEGER NOT NULL, answers TEXT NOT NULL, watch TEXT NOT NULL, received REAL NOT NULL,
  PRIMARY KEY (rater, slot), FOREIGN KEY (rater, slot) REFERENCES slots (rater, slot)
) STRICT;
"""


@dataclass(frozen=True)
class Visit:
    """A rater's whole list of screens and which of them are answered (always the first ``done``)."""

    rater: str
    platform: dict[str, str]
    slots: list[Slot]
    done: int


class Full(Exception):
    """The survey has had as many visitors as it can take."""


class Begun(Exception):
    """Somebody has begun under this external name, from another link."""


class Store:
    """The votes of one survey folder."""

    def __init__(self, folder: Path, survey: Survey):
        self.survey = survey
        self.db = connect(folder / VOTES)
        mark = fingerprint(folder)
        try:
            with self._writing():
                for statement in SCHEMA.split(";"):
                    self.db.execute(statement)
                self.db.execute("INSERT OR IGNORE INTO meta VALUES ('survey', ?)", (mark,))
                (given,) = self.db.execute("SELECT value FROM meta WHERE key = 'survey'").fetchone()
        except sqlite3.Error as error:
            self.db.close()
            raise _unusable(folder / VOTES, error) from error
        if given != mark:
            self.db.close()
            raise UserError(
                f"{folder / 'survey.json'} changed after raters came: restore it, or move {VOTES} away to start again."
            )

    def open(self, external: str | None, platform: dict[str, str], device: dict, now: float) -> Visit:
        """A new rater with a plan of their own; whoever comes back by the same platform's link resumes.

        A participant's number is no secret, so it alone opens nobody's visit: the link must carry the session, too.

        Raises:
            Begun: the external name has a visit that was begun from another link.
            Full: there are too many.
        """
        with self._writing():
            if external is not None:
                row = self.db.execute("SELECT id, platform FROM raters WHERE external = ?", (external,)).fetchone()
                if row:
                    if not _same_session(json.loads(row[1]), platform):
                        raise Begun
                    visit = self._visit(row[0])
                    assert visit is not None
                    return visit
            if self.db.execute("SELECT count(*) FROM raters").fetchone()[0] >= MAX_RATERS:
                raise Full
            rater = secrets.token_hex(8)
            slots = plan(self.survey, self._shown(now), Random(secrets.randbits(64)))
            self.db.execute(
                "INSERT INTO raters VALUES (?, ?, ?, ?, ?, ?)",
                (rater, now, now, external, json.dumps(platform), json.dumps(device)),
            )
            self.db.executemany(
                "INSERT INTO slots VALUES (?, ?, ?, ?, ?)",
                [(rater, k, slot.kind, slot.item, int(slot.swapped)) for k, slot in enumerate(slots)],
            )
        return Visit(rater, platform, slots, 0)

    def resume(self, rater: str) -> Visit | None:
        """The visit of a known rater; works on a full disk, too."""
        return self._visit(rater)

    def vote(self, rater: str, slot: int, answers: dict[str, str], watch: dict, now: float) -> tuple[str, Visit | None]:
        """Keep one vote: ``new``, ``same`` (already kept, same answers), ``different`` (the first stands), ``ahead``.

        ``new`` is returned only after the commit reached the disk.
        """
        text = json.dumps(answers, sort_keys=True)
        with self._writing():
            visit = self._visit(rater)
            if visit is None or slot > visit.done or slot >= len(visit.slots):
                return "ahead", visit
            if slot < visit.done:
                (kept,) = self.db.execute(
                    "SELECT answers FROM votes WHERE rater = ? AND slot = ?", (rater, slot)
                ).fetchone()
                return ("same" if kept == text else "different"), visit
            self.db.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?)", (rater, slot, text, json.dumps(watch), now))
            self.db.execute("UPDATE raters SET seen = ? WHERE id = ?", (now, rater))
        return "new", Visit(rater, visit.platform, visit.slots, visit.done + 1)

    def counts(self) -> tuple[int, int]:
        """(raters, votes)."""
        (raters,) = self.db.execute("SELECT count(*) FROM raters").fetchone()
        (votes,) = self.db.execute("SELECT count(*) FROM votes").fetchone()
        return raters, votes

    def close(self) -> None:
        """Fold the log into the database file."""
        self.db.close()

    def _visit(self, rater: str) -> Visit | None:
        row = self.db.execute("SELECT platform FROM raters WHERE id = ?", (rater,)).fetchone()
        if row is None:
            return None
        rows = self.db.execute("SELECT kind, item, swapped FROM slots WHERE rater = ? ORDER BY slot", (rater,))
        slots = [Slot(kind, item, bool(swapped)) for kind, item, swapped in rows]
        (done,) = self.db.execute("SELECT count(*) FROM votes WHERE rater = ?", (rater,)).fetchone()
        return Visit(rater, json.loads(row[0]), slots, done)

    def _shown(self, now: float) -> dict[tuple[str, bool], int]:
        rows = self.db.execute(
            "SELECT s.item, s.swapped, count(*) FROM slots s JOIN raters r ON r.id = s.rater "
            "LEFT JOIN votes v ON v.rater = s.rater AND v.slot = s.slot "
            "WHERE s.kind = 'pair' AND (v.slot IS NOT NULL OR r.seen > ?) GROUP BY s.item, s.swapped",
            (now - OPEN_S,),
        )
        return {(item, bool(swapped)): count for item, swapped, count in rows}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise


def _same_session(before: dict[str, str], now: dict[str, str]) -> bool:
    """Whether two links are of one session, which the platform draws anew for every submission and shows nobody else."""
    sessions = [link.get("SESSION_ID") or link.get("assignmentId") or "" for link in (before, now)]
    return sessions[0] != "" and hmac.compare_digest(*(s.encode() for s in sessions))


def connect(path: Path) -> sqlite3.Connection:
    """Open for writing: WAL, every commit synced, foreign keys held."""
    db = None
    try:
        path.touch(0o600)  # raters' numbers are private; the files beside it get the same mode
        db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        raise _unusable(path, error) from error
    return db


def _unusable(path: Path, error: sqlite3.Error) -> UserError:
    damaged = getattr(error, "sqlite_errorname", "").startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT"))
    advice = (
        "restore it from a copy, or move it away to start again"
        if damaged or path.is_dir()
        else "give a folder on a local disk with space that you may write to"
    )
    return UserError(f"{path} cannot be opened ({error}): {advice}.")


def link_token(survey: Survey, rater: str) -> str:
    """What the rater's link carries: their random id and a keyed hash of it, so that none can be guessed or made up."""
    return f"{rater}.{hmac.new(survey.secret.encode(), rater.encode(), hashlib.sha256).hexdigest()[:32]}"


def rater_of(survey: Survey, token: str) -> str | None:
    """The rater a token belongs to, or None."""
    rater = token.partition(".")[0]
    return rater if hmac.compare_digest(link_token(survey, rater).encode(), token.encode()) else None


def completion_code(survey: Survey, rater: str) -> str:
    """The survey's code where it has one (as Prolific wants), otherwise the rater's own (see ``raters.csv``)."""
    if survey.completion_code:
        return survey.completion_code
    return hmac.new(survey.secret.encode(), b"done " + rater.encode(), hashlib.sha256).hexdigest()[:10].upper()
