"""VBench's naming, checked strictly: which clips a folder must hold, and what is wrong with the ones it holds.

Rules (Vchitect/VBench 45e79ec, ``vbench/__init__.py``, ``prompts/README.md``): clips are called
``{prompt}-{0..4}.mp4``; a missing one is only warned of, and the rest are averaged; temporal flickering wants 25, so that
five survive the static filter. The user brings ``VBench_full_info.json``.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from mogan.data.lists import read_rows, whole
from mogan.data.prompts import about
from mogan.data.video import SUFFIXES
from mogan.errors import UserError
from mogan.evaluation.clips import Entry, System

DIMENSIONS = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip
ENTRIES, PER_PROMPT, PER_FLICKER = 946, 5, 25
LONGEST_NAME = 255  # bytes
SHORTEST_CUT = 20  # characters: a shorter name is no sign of cutting
REFUSED = '<>:"\\|?*'  # by Windows, and by disks formatted for it


@dataclass(frozen=True)
class Info:
    """What ``VBench_full_info.json`` says: prompts of every dimension, and what is odd about the file."""

    prompts: dict[str, tuple[str, ...]]
    oddities: tuple[str, ...]

    def of(self, dimensions: Iterable[str]) -> list[str]:
        """Different prompts of these dimensions, in the file's order."""
        return list(dict.fromkeys(prompt for name in dimensions for prompt in self.prompts[name]))


@dataclass(frozen=True)
class Check:
    """What a folder lacks of some dimensions. ``unexpected`` are videos that no prompt of the *file* asks for."""

    expected: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...]


def read_info(path: Path) -> Info:
    """Read ``VBench_full_info.json``.

    Raises:
        UserError: it is another kind of file.
    """
    try:
        rows = [row.values for row in read_rows(path)]
        prompts: dict[str, list[str]] = {}
        for row in rows:
            if not isinstance(row["prompt_en"], str) or not isinstance(row["dimension"], list):
                raise TypeError("prompt_en is a text and dimension a list of names")
            whole(row["prompt_en"], "a prompt")
            for name in row["dimension"]:
                prompts.setdefault(str(name), []).append(row["prompt_en"])
        if not prompts:
            raise KeyError("no dimension")
    except (UserError, KeyError, TypeError) as error:
        if not path.is_file():
            raise UserError(
                f"{path} is no file: give VBench_full_info.json, of github.com/Vchitect/VBench (folder vbench)"
            ) from error
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is not VBench_full_info.json ({why}): take vbench/VBench_full_info.json "
            "of github.com/Vchitect/VBench"
        ) from error
    told = about(row["prompt_en"] for row in rows)
    oddities = []
    if len(rows) != ENTRIES:
        oddities.append(f"{path.name} has {len(rows)} entries; VBench's has {ENTRIES}")
    if not (told["set"] or "").startswith("VBench"):
        oddities.append(f"{path.name} does not hold VBench's prompts (fingerprint {told['sha256'][:16]}...)")
    return Info({name: tuple(found) for name, found in prompts.items()}, tuple(oddities))


def check_folder(folder: Path, info: Info, dimensions: tuple[str, ...]) -> Check:
    """Compare a folder with the names that these dimensions ask for.

    Raises:
        UserError: no such folder, or a dimension that the file does not have.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give a folder of clips")
    if unknown := [name for name in dimensions if name not in info.prompts]:
        raise UserError(f"no dimension is called {', '.join(unknown)}: there are {', '.join(info.prompts)}")
    files = {path.name: path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    wanted = info.of(dimensions)
    names = [f"{prompt}-{k}.mp4" for prompt in wanted for k in range(PER_PROMPT)]
    known = {f"{prompt}-{k}.mp4" for prompt in info.of(info.prompts) for k in range(PER_PROMPT)}
    known |= {f"{p}-{k}.mp4" for p in info.prompts.get("temporal_flickering", ()) for k in range(PER_FLICKER)}
    missing = tuple(name for name in names if name not in files)
    unexpected = tuple(n for n in sorted(files) if Path(n).suffix.lower() in SUFFIXES and n not in known)
    notes = [*info.oddities, *_about_names(wanted), *_about_files(files)]
    notes += _near_misses(missing, unexpected)
    if "temporal_flickering" in dimensions:
        few = sum(
            any(f"{p}-{k}.mp4" not in files for k in range(PER_FLICKER)) for p in info.prompts["temporal_flickering"]
        )
        if few:
            notes.append(
                f"{few} prompts of temporal flickering have fewer than {PER_FLICKER} clips: {PER_PROMPT} must survive the "
                "static filter"
            )
    return Check(len(names), missing, unexpected, tuple(notes))


def _about_names(prompts: list[str]) -> list[str]:
    notes = []
    if impossible := [p for p in prompts if "/" in p or "\0" in p or len(f"{p}-0.mp4".encode()) > LONGEST_NAME]:
        notes.append(f"{len(impossible)} prompts cannot be names of files, such as {impossible[0][:60]!r}")
    if refused := [p for p in prompts if set(p) & set(REFUSED)]:
        notes.append(
            f"{len(refused)} prompts hold one of {REFUSED}, which Windows refuses, such as {refused[0][:60]!r}"
        )
    return notes


def _about_files(files: dict[str, Path]) -> list[str]:
    notes = []
    if empty := sorted(name for name, path in files.items() if name.endswith(".mp4") and not path.stat().st_size):
        notes.append(f"{len(empty)} files are empty, such as {empty[0]}")
    if others := sorted(name for name in files if not name.endswith(".mp4")):
        notes.append(
            f"{others[0]} lies beside the clips: VBench itself takes the ending of whichever file comes first, so give it a "
            "folder of .mp4 files alone"
        )
    return notes


def _near_misses(missing: tuple[str, ...], unexpected: tuple[str, ...]) -> list[str]:
    """Guesses why names do not match: cut short, or written a little differently."""

    def plain(name: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", name).replace("_", " ").casefold().split())

    by_plain = {plain(name): name for name in unexpected}
    alike = [(by_plain[plain(name)], name) for name in missing if plain(name) in by_plain]
    starts = {start: name for name in unexpected if len(start := name.rpartition("-")[0]) >= SHORTEST_CUT}
    lengths = {len(start) for start in starts}
    cut = [
        starts[n[:size]]
        for n in missing
        for size in lengths
        if n[:size] in starts and n[size : size + 1] not in ("", "-")
    ]
    notes = []
    if alike:
        notes.append(
            f"{len(alike)} names differ only in case, spaces or accents, such as {alike[0][0]!r} for {alike[0][1]!r}; on a "
            "disk that ignores case two of VBench's prompts are one"
        )
    if cut:
        notes.append(f"{len(cut)} names look cut short, such as {cut[0]!r}: VBench does not find them")
    return notes


def restrict(system: System, info: Info, dimensions: tuple[str, ...]) -> tuple[System, list[str]]:
    """The clips of a system that VBench averages for these dimensions, and what else there is to say.

    Raises:
        UserError: a clip is missing, or the dimensions have different prompts, so that one mean cannot be both.
    """
    found = check_folder(system.folder, info, dimensions)
    if len({frozenset(info.prompts[name]) for name in dimensions}) != 1:
        raise UserError(f"{' and '.join(dimensions)} have different prompts: evaluate one after the other")
    if found.missing:
        raise UserError(
            f"{system.name} lacks {len(found.missing)} of VBench's {found.expected} clips for {', '.join(dimensions)}, such as "
            f"{found.missing[0]!r}: `mogan vbench {quote(str(system.folder))} --info FILE` lists them"
        )
    seeds = {entry.path.name: entry.seed for entry in system.clips}
    clips = []
    for prompt in info.of(dimensions):
        for k in range(PER_PROMPT):
            name = f"{prompt}-{k}.mp4"
            clips.append(Entry(system.folder / name, prompt, k, seeds.get(name)))
    return replace(system, clips=tuple(clips), missing=(), unlisted=found.unexpected), list(found.notes)


def vbench(folder: Annotated[Path, tyro.conf.Positional], *, info: Path, dimensions: tuple[str, ...] = ()) -> None:
    """Check that a folder holds every clip that VBench wants, under exactly its name, and list what is wrong.

    VBench only warns of a missing clip and averages the others. This stops with exit code 2 if a dimension is asked for and
    a clip is missing, or if no dimension is asked for and none is whole.

    Args:
        folder: clips called {prompt}-{0..4}.mp4.
        info: VBench_full_info.json, from github.com/Vchitect/VBench (folder vbench).
        dimensions: such as dynamic_degree motion_smoothness; all sixteen if not given.
    """
    facts = read_info(info)
    names = dimensions or tuple(name for name in DIMENSIONS if name in facts.prompts)
    if not names:
        raise UserError(f"{info} asks for none of VBench's dimensions: give its VBench_full_info.json")
    found = check_folder(folder, facts, names)
    missing = set(found.missing)
    lacking = {name: [n for n in _names(facts, name) if n in missing] for name in names}
    for name in names:
        wanted = len(_names(facts, name))
        print(f"{name:<24} {wanted - len(lacking[name]):>5} of {wanted}")
    for title, files in (("missing", found.missing), ("not asked for", found.unexpected)):
        print("".join(f"{title}: {file}\n" for file in files), end="")
    for note in found.notes:
        print(f"note: {note}")
    partial = [name for name in names if 0 < len(lacking[name]) < len(_names(facts, name))]
    whole = [name for name in names if not lacking[name]]
    if (dimensions and missing) or not whole:
        raise UserError(
            f"{folder} lacks {len(missing)} of {found.expected} clips: sample them, or correct the names above"
        )
    if partial:
        print(f"note: incomplete, so VBench's number would be of a part only: {', '.join(partial)}")
    if set(whole) != set(DIMENSIONS):
        print("note: VBench's quality, semantic and total scores need all sixteen dimensions")
    print(f"complete: {', '.join(whole)}")


def _names(info: Info, dimension: str) -> list[str]:
    return [f"{prompt}-{k}.mp4" for prompt in info.of([dimension]) for k in range(PER_PROMPT)]
