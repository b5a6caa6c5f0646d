"""Which clips a folder holds, and of which prompt each is."""

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from mogan.errors import UserError

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")


@dataclass(frozen=True)
class Entry:
    """One clip: where it is, its prompt, its number among the clips of that prompt, its seed if known."""

    path: Path
    prompt: str
    index: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class System:
    """The clips of one generator. ``missing`` are listed but not there, ``unlisted`` are there but in no list.

    ``prompt_lists`` are fingerprints of the lists of prompts that ``samples.jsonl`` says were sampled from.
    """

    name: str
    folder: Path
    clips: tuple[Entry, ...]
    naming: str
    missing: tuple[str, ...] = field(default=())
    unlisted: tuple[str, ...] = field(default=())
    prompt_lists: tuple[str, ...] = field(default=())


def find_systems(dirs: tuple[Path, ...]) -> list[System]:
    """Read ``DIR`` or ``NAME=DIR`` arguments; a folder's own name is the system's.

    Raises:
        UserError: no folder given, two of one name, a folder without clips, or no prompt in common.
    """
    if not dirs:
        raise UserError("name at least one folder of clips: mogan evaluate DIR [DIR ...]")
    systems: list[System] = []
    for text in map(str, dirs):
        given, _, folder = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
        path = Path(folder)
        name = given or path.resolve().name
        if name in {s.name for s in systems}:
            raise UserError(f"two folders are called {name!r}: give them names, as in first={folder}")
        systems.append(read_folder(path, name))
    prompts = [{entry.prompt for entry in s.clips} for s in systems]
    if len(systems) > 1 and not set.intersection(*prompts):
        raise UserError(
            f"{' and '.join(s.name for s in systems)} have no prompt in common and cannot be compared: evaluate them "
            "one by one, or name files {prompt}-{k}.mp4, or list them in samples.jsonl"
        )
    return systems


def unshared_prompts(systems: list[System]) -> int:
    """How many prompts not every system has."""
    prompts = [{entry.prompt for entry in s.clips} for s in systems]
    return len(prompts[0].union(*prompts)) - len(prompts[0].intersection(*prompts))


def read_folder(folder: Path, name: str) -> System:
    """Clips of one folder: by ``samples.jsonl``, by ``metadata.jsonl`` or ``.csv``, else by their names.

    ``{prompt}-{k}.mp4`` is VBench's naming; any other name is a prompt of its own.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give a folder of clips")
    files = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )
    rows, naming = _listed(folder)
    if rows is None:
        if not files:
            raise UserError(f"{folder} holds no video ({', '.join(SUFFIXES)}): give a folder of clips")
        named = tuple(_by_name(path) for path in files)
        naming = "VBench ({prompt}-{k})" if all(re.fullmatch(r".+-\d+", p.stem) for p in files) else "file names"
        return System(name, folder, named, naming)
    found = _entries(folder, naming, rows)
    missing = tuple(name for name, entry in found.items() if not entry.path.is_file())
    entries = tuple(entry for entry in found.values() if entry.path.is_file())
    if not entries:
        raise UserError(
            f"none of the {len(missing)} files that {folder / naming} lists is in {folder}: check the names"
        )
    known = {entry.path.name for entry in entries}
    unlisted = tuple(p.name for p in files if p.name not in known)
    lists = tuple(sorted({str(row["prompts_sha256"]) for row in rows if row.get("prompts_sha256")}))
    return System(name, folder, entries, naming, missing, unlisted, lists)


def _entries(folder: Path, naming: str, rows: list[dict[str, object]]) -> dict[str, Entry]:
    """By file name; where a file is listed twice, the last line counts."""
    found: dict[str, Entry] = {}
    counts: dict[str, int] = {}
    for row in rows:
        try:
            file, prompt = (
                _first(row, "file", "file_name", "video", "video_path", "path"),
                _first(row, "prompt", "caption", "text"),
            )
            if file is None or prompt is None:
                raise UserError(f"{folder / naming} has a line without file or prompt: {json.dumps(row)[:120]}")
            number, seed = _first(row, "index"), _first(row, "seed")
            index = counts.get(str(prompt), 0) if number is None else int(str(number))
            entry = Entry(folder / str(file), str(prompt), index, None if seed is None else int(str(seed)))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{folder / naming} has a line that cannot be used ({error}): {str(row)[:120]}") from error
        counts[str(prompt)] = counts.get(str(prompt), 0) + 1
        found[str(file)] = entry
    return found


def _listed(folder: Path) -> tuple[list[dict[str, object]] | None, str]:
    for name in ("samples.jsonl", "metadata.jsonl"):
        if (folder / name).is_file():
            try:
                lines = (folder / name).read_text(encoding="utf-8").split("\n")
                return [json.loads(line) for line in lines if line.strip()], name
            except ValueError as error:
                raise UserError(
                    f"{folder / name} is not one JSON object per line ({error}): correct or remove it"
                ) from error
    if (folder / "metadata.csv").is_file():
        with (folder / "metadata.csv").open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file)), "metadata.csv"
    return None, ""


def _first(row: dict[str, object], *names: str) -> object | None:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _by_name(path: Path) -> Entry:
    match = re.fullmatch(r"(.+)-(\d+)", path.stem)
    return Entry(path, match[1], int(match[2])) if match else Entry(path, path.stem)
