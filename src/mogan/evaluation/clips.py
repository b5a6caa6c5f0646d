"""Which clips a folder holds, and of which prompt each is."""

import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from mogan.data.listing import File, Folder, refuse_twice
from mogan.data.lists import Row, printable, read_rows
from mogan.data.tasks import Task, read_task
from mogan.data.video import SUFFIXES
from mogan.errors import UserError
from mogan.sampling.samples import HOW


@dataclass(frozen=True)
class Entry:
    """One clip: where it is, its prompt, its number among the clips of that prompt, its seed and its task if known.

    ``problem`` says why it cannot be opened.
    """

    path: Path
    prompt: str
    index: int = 0
    seed: int | None = None
    problem: str | None = None
    task: Task | None = None


@dataclass(frozen=True)
class System:
    """The clips of one generator. ``missing`` are listed but not there, ``unlisted`` are there but in no list.

    ``outside`` lie outside the folder; ``uncaptioned`` are listed without a caption, and their names stand for it.
    ``prompt_lists`` are fingerprints of the lists of prompts that ``samples.jsonl`` says were sampled from, ``sampling``
    the ways in which it says they were.
    """

    name: str
    folder: Path
    clips: tuple[Entry, ...]
    naming: str
    missing: tuple[str, ...] = field(default=())
    unlisted: tuple[str, ...] = field(default=())
    prompt_lists: tuple[str, ...] = field(default=())
    outside: tuple[str, ...] = field(default=())
    uncaptioned: tuple[str, ...] = field(default=())
    sampling: tuple[dict[str, Any], ...] = field(default=())


def find_systems(dirs: tuple[Path, ...]) -> list[System]:
    """Read ``DIR`` or ``NAME=DIR`` arguments; a folder's own name is the system's.

    Raises:
        UserError: no folder given, two of one name, a folder without clips, or no prompt in common.
    """
    if not dirs:
        raise UserError("name at least one folder of clips: mogan evaluate DIR [DIR ...]")
    systems: list[System] = []
    for text in map(str, dirs):
        name, path = named_folder(text)
        if name in {s.name for s in systems}:
            raise UserError(f"two folders are called {name!r}: give them names, as in first={path}")
        systems.append(read_folder(path, name))
    prompts = [{entry.prompt for entry in s.clips} for s in systems]
    if len(systems) > 1 and not set.intersection(*prompts):
        raise UserError(
            f"{' and '.join(s.name for s in systems)} have no prompt in common and cannot be compared: evaluate them "
            "one by one, or name files {prompt}-{k}.mp4, or list them in samples.jsonl"
        )
    return systems


def named_folder(text: str) -> tuple[str, Path]:
    """``NAME=DIR``, or ``DIR``, which is named after itself and may have an equals sign in its name.

    Raises:
        UserError: the name or the folder is empty.
    """
    given, equals, folder = text.partition("=")
    if not equals or os.path.exists(text):
        given, folder = Path(text).resolve().name, text
    if not given or not folder:
        raise UserError(f"'{text}' lacks a name or a folder: give NAME=DIR")
    return given, Path(folder)


def unshared_prompts(systems: list[System]) -> int:
    """How many prompts not every system has."""
    prompts = [{entry.prompt for entry in s.clips} for s in systems]
    return len(prompts[0].union(*prompts)) - len(prompts[0].intersection(*prompts))


def read_folder(folder: Path, name: str) -> System:
    """Clips of one folder: by ``samples.jsonl``, by ``metadata.jsonl`` or another list, else those right in it.

    The prompt of a clip that no list names is the text file beside it, else its name: ``{prompt}-{k}.mp4`` is VBench's
    naming, any other name is a prompt of its own.

    Raises:
        UserError: it is no folder, holds no clips, or its list is wrong.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder: give a folder of clips")
    here = Folder(folder)
    samples = here.path / "samples.jsonl"
    path = samples if os.path.lexists(samples) else here.list_in(here.path)
    if path is None:
        files = [file for name, file in sorted(here.videos.items()) if "/" not in name]
        if not files:
            raise UserError(f"{folder} holds no video ({', '.join(SUFFIXES)}): give a folder of clips")
        clips, naming = _by_texts_and_names(here, files)
        return System(name, folder, clips, naming, unlisted=_left(here, files))
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} lists no clip: write a row for each, or remove it")
    found = [(here.find(row, here.path), row) for row in rows]
    if path.name != "samples.jsonl":
        refuse_twice(found)
    entries, nameless = _entries(here, found)
    there = [file for file, _ in found if file.there]
    missing = tuple(dict.fromkeys(file.name for file, _ in found if not file.there))
    last = list({file.name: row for file, row in found if file.there}.values())  # of a clip that was sampled again
    if not there:
        raise UserError(f"none of the {len(missing)} files that {path} lists is in {folder}: check the names")
    return System(
        name,
        folder,
        tuple(entries[file.name] for file in dict.fromkeys(there)),
        path.name,
        missing,
        _left(here, there),
        tuple(sorted({str(row.values["prompts_sha256"]) for row in last if row.values.get("prompts_sha256")})),
        tuple(dict.fromkeys(file.name for file in there if file.outside)),
        nameless,
        _ways(last) if path is samples else (),
    )


def _ways(rows: list[Row]) -> tuple[dict[str, Any], ...]:
    """Guidance, steps and so on, once each."""
    ways = [{key: row.values[key] for key in HOW if key in row.values} for row in rows]
    return tuple({json.dumps(way, sort_keys=True): way for way in ways if way}.values())


def _left(here: Folder, files: list[File]) -> tuple[str, ...]:
    """Videos that are not among these."""
    names = {file.name for file in files}
    return tuple(name for name, file in sorted(here.videos.items()) if name not in names and file.problem is None)


def _entries(here: Folder, found: list[tuple[File, Row]]) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """By file name, where a file is listed twice the last line; and the names of those that are there without a caption."""
    entries: dict[str, Entry] = {}
    nameless: dict[str, None] = {}
    words = [here.words(file, row.caption) for file, row in found]
    prompts = [caption or _by_name(file).prompt for (file, _), (caption, _) in zip(found, words, strict=True)]
    numbers = _numbers([file for file, _ in found], prompts)
    for (file, row), (caption, problem), prompt, number in zip(found, words, prompts, numbers, strict=True):
        index = _number(row, "index")
        if index is None:
            index = number if caption else _by_name(file).index
        entries[file.name] = Entry(file.path, prompt, index, _number(row, "seed"), problem, read_task(row, here.path))
        if caption is None and file.there:
            nameless[file.name] = None
    return entries, tuple(nameless)


def _number(row: Row, column: str) -> int | None:
    value = row.values.get(column)
    try:
        return None if value in (None, "") else int(str(value))
    except ValueError as error:
        raise UserError(f"{row.where}: {column} is no whole number ({str(value)[:40]}): correct it") from error


def _by_texts_and_names(here: Folder, files: list[File]) -> tuple[tuple[Entry, ...], str]:
    words = [here.words(file, None) for file in files]
    told = [(file, caption) for file, (caption, _) in zip(files, words, strict=True) if caption is not None]
    numbers = iter(_numbers([file for file, _ in told], [caption for _, caption in told]))
    entries = []
    for file, (caption, problem) in zip(files, words, strict=True):
        entry = _by_name(file) if caption is None else Entry(file.path, caption, next(numbers))
        entries.append(replace(entry, problem=problem))
    naming = "VBench ({prompt}-{k})" if all(map(_numbered, files)) else "file names"
    return tuple(entries), f"text files, else {naming}" if told else naming


def _numbers(files: list[File], prompts: list[str]) -> list[int]:
    """The number of each file among those of its prompt: what its name ends in, ``-k``, so that a clip which is not there moves
    no other; its place, where names do not go with prompts.
    """
    stems = [match[1] if (match := _numbered(file)) else None for file in files]
    pairs = set(zip(stems, prompts, strict=True))
    if None not in stems and len(pairs) == len(set(stems)) == len(set(prompts)):
        numbers = [_by_name(file).index for file in files]
        if len(set(zip(prompts, numbers, strict=True))) == len(files):  # in two folders there may be two of a name
            return numbers
    places: dict[str, count] = defaultdict(count)
    return [next(places[prompt]) for prompt in prompts]


def _by_name(file: File) -> Entry:
    match = _numbered(file)
    return Entry(file.path, match[1], int(match[2])) if match else Entry(file.path, printable(Path(file.name).stem))


def _numbered(file: File) -> re.Match | None:
    """What stands before and after the last ``-`` of a name, if that is a number."""
    return re.fullmatch(r"(.+)-(\d+)", printable(Path(file.name).stem), re.DOTALL)
