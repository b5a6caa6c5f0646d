"""What lies in a survey folder: ``survey.json`` (private), ``clips/<opaque>.mp4``, ``votes.sqlite`` when served."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from mogan.disk.files import from_json
from mogan.errors import UserError

FORMAT = 1
FILE = "survey.json"
VOTES = "votes.sqlite"

Answer = Literal["first", "tie", "second"]
Kind = Literal["pair", "practice", "check"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Question:
    """One thing raters are asked about each pair. ``shows_prompt`` keeps the prompt away from the other questions."""

    id: str
    title: str
    ask: str
    hint: str
    shows_prompt: bool = False


QUESTIONS = (
    Question(
        "motion",
        "Motion",
        "Which clip moves better?",
        "Natural, continuous, believable motion. More motion is not better motion; standing still where something "
        "should move is bad motion, and so are jumps, warping and limbs that melt.",
    ),
    Question(
        "quality",
        "Visual quality",
        "Which clip looks better?",
        "Sharpness, detail, colour, freedom from blocks, ghosts and flicker. Leave the motion aside.",
    ),
    Question(
        "text",
        "Match with the text",
        "Which clip shows this better?",
        "Only what the text says: the things, what they do, where they are.",
        shows_prompt=True,
    ),
)


@dataclass(frozen=True)
class Clip:
    """A clip under its opaque name. ``fps`` is for the frame step, ``frames / fps`` for how long a look takes."""

    file: str
    fps: float
    frames: int
    width: int
    height: int

    @property
    def seconds(self) -> float:
        """How long one play takes."""
        return self.frames / self.fps


@dataclass(frozen=True)
class Item:
    """Two clips to compare. ``first`` and ``second`` are opaque names; the rater's plan says which side they are on.

    A pair names its two ``systems``. Practice and attention checks have instead the answers they ``expect`` and the
    ``lesson`` that practice tells the rater afterwards.
    """

    id: str
    kind: Kind
    prompt: str
    first: str
    second: str
    index: int = 0
    seed: int | None = None
    systems: tuple[str, str] | None = None
    manner: str = ""
    expect: dict[str, Answer] = field(default_factory=dict)
    lesson: str = ""


@dataclass(frozen=True)
class Rules:
    """Who is left out of the main result; fixed before the first vote. See ``analyze``."""

    failed_checks: int = 2  # this many failed attention checks, or more
    fast_margin_s: float = 2.0  # median time per pair under clip length + margin
    one_side: float = 0.85  # more than this share of decided answers on one side


@dataclass(frozen=True)
class Survey:
    """All that was decided when the survey was built."""

    title: str
    intro: str
    secret: str
    systems: tuple[str, ...]
    raters: int
    per_rater: int
    checks_per_rater: int
    repeats_per_rater: int
    completion_code: str
    clips: tuple[Clip, ...]
    items: tuple[Item, ...]
    questions: tuple[Question, ...] = QUESTIONS
    rules: Rules = Rules()
    warnings: tuple[str, ...] = ()
    format: int = FORMAT

    def of_kind(self, kind: Kind) -> list[Item]:
        """The items of one kind, in their order."""
        return [item for item in self.items if item.kind == kind]

    def clip(self, file: str) -> Clip:
        """The clip of that opaque name."""
        return next(clip for clip in self.clips if clip.file == file)


def write_survey(survey: Survey, folder: Path) -> None:
    """Write ``survey.json``, readable by its owner only: it holds the names of the systems and the key of the links."""
    path = folder / FILE
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(survey), file, indent=1)  # names of folders may hold bytes that are no text
        file.write("\n")
    temporary.rename(path)


def read_survey(folder: Path) -> Survey:
    """Read and check ``survey.json``; every clip it names must be there.

    Raises:
        UserError: the folder holds no survey, or a clip is missing.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {FILE}: give the folder that `mogan survey build --out` wrote.")
    try:
        raw = from_json(path.read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {raw.get('format')}, this version reads {FORMAT}: build the survey again."
            )
        parts = {
            "systems": tuple(raw["systems"]),
            "clips": tuple(_read(Clip, clip) for clip in raw["clips"]),
            "items": tuple(_item(item) for item in raw["items"]),
            "questions": tuple(_read(Question, question) for question in raw["questions"]),
            "rules": _read(Rules, raw["rules"]),
            "warnings": tuple(raw["warnings"]),
        }
        survey = _read(Survey, {**raw, **parts})
        if any(clip.fps <= 0 or clip.frames < 1 for clip in survey.clips):
            raise ValueError("a clip without a frame rate, or without frames")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): build the survey again or restore the file.") from error
    missing = [clip.file for clip in survey.clips if not (folder / "clips" / clip.file).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} clips are missing from {folder / 'clips'} (first: {missing[0]}): restore them."
        )
    return survey


def fingerprint(folder: Path) -> str:
    """SHA-256 of ``survey.json``: votes are tied to the design they were given under."""
    return hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def _item(raw: dict) -> Item:
    return _read(Item, {**raw, "systems": tuple(raw["systems"]) if raw["systems"] else None})


def _read(kind: type[Made], raw: dict) -> Made:
    """A dataclass of what JSON holds: text where it has text, and numbers that are some, none below 0. Raises ValueError."""
    made: Any = kind(**raw)
    plain: dict[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
    for part in fields(made):
        value, number = getattr(made, part.name), part.type in (int, float)
        if part.type in plain and (
            not isinstance(value, plain[part.type])
            or (number and (isinstance(value, bool) or not 0 <= value < math.inf))
        ):
            raise ValueError(f"{part.name} is {value!r}")
    return made
