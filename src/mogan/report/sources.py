"""What a report is made of: results of evaluations, and the curves of runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

from mogan.data.lists import printable
from mogan.disk.files import from_json
from mogan.errors import UserError
from mogan.evaluation.results import read_results


@dataclass(frozen=True)
class Result:
    """One system of a ``results.json``; paths in it are relative to ``base``."""

    name: str
    base: Path
    metrics: dict[str, Any]
    how: dict[str, Any]
    clips: list[dict[str, Any]]

    @property
    def good(self) -> list[dict[str, Any]]:
        """Clips that could be measured."""
        return [clip for clip in self.clips if "error" not in clip]


@dataclass(frozen=True)
class Curves:
    """A run's numbers: ``series[(update, quantity)]`` is a list of ``(iteration, value)``, a mean over its repeats."""

    name: str
    series: dict[tuple[str, str], list[tuple[int, float]]]
    warnings: tuple[str, ...]


def read_sources(inputs: tuple[Path, ...]) -> tuple[list[Result], list[Curves]]:
    """Read ``results.json`` files and folders of runs; a folder may hold both.

    Raises:
        UserError: an input is neither, or is of another format.
    """
    files: list[Path] = []
    logs: list[Path] = []
    for path in inputs:
        inside = [path / "results.json", path / "metrics.jsonl"]
        found = [path] if path.is_file() else [p for p in inside if p.is_file()]
        if not found:
            raise UserError(f"{path} is neither a results.json nor a folder with results.json or metrics.jsonl")
        for file in found:
            (logs if file.suffix == ".jsonl" else files).append(file)
    files = list({file.resolve(): file for file in files}.values())  # one that is named twice is one
    results = _distinctly_named([_read_results(file) for file in files], files)
    names = distinct_names([log.resolve().parent for log in logs])
    return results, [_read_curves(log, name) for log, name in zip(logs, names, strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """What to call folders: their names, or where two have the same one, what of their paths differs."""
    names = [printable(folder.name) for folder in folders]
    if len(set(names)) == len(names):
        return names
    paths = [folder.parts for folder in folders]
    head, tail = _shared(paths), _shared([path[::-1] for path in paths])
    names = [printable("/".join(path[head : len(path) - tail]) or path[-1]) for path in paths]
    if len(set(names)) < len(set(paths)):  # one folder within another of its name
        return [printable(str(folder)) for folder in folders]
    return names


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts all paths begin with alike."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _read_results(path: Path) -> list[Result]:
    return [
        Result(printable(name), path.parent, system["metrics"], system["how"], system["clips"])
        for name, system in read_results(path, clips_have=("file", "width", "fps")).items()
    ]


def _distinctly_named(read: Sequence[Sequence[Result]], files: Sequence[Path]) -> list[Result]:
    """All results; before a name that several files have, what tells these files apart. Clips are found by these names."""
    having: dict[str, list[Path]] = {}
    for file, results in zip(files, read, strict=True):
        for result in results:
            having.setdefault(result.name, []).append(file)
    before = {
        name: dict(zip(of, distinct_names([file.resolve().with_suffix("") for file in of]), strict=True))
        for name, of in having.items()
        if len(of) > 1
    }
    return [
        replace(result, name=f"{before[result.name][file]}/{result.name}") if result.name in before else result
        for file, results in zip(files, read, strict=True)
        for result in results
    ]


def _read_curves(path: Path, name: str) -> Curves:
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = from_json(line)
            iteration, update = int(row["iteration"]), str(row["update"])
            numbers = {name: float(value) for name, value in row.items() if type(value) in (int, float)}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line torn by a kill, or damaged
        for quantity, value in numbers.items():
            if quantity not in ("iteration", "update", "repeat") and math.isfinite(value):
                found.setdefault((update, quantity), {}).setdefault(iteration, []).append(value)
    if not found:
        raise UserError(f"{path} holds no number yet: let the run make an iteration first")
    series = {key: [(i, mean(values)) for i, values in sorted(by.items())] for key, by in found.items()}
    notes = path.with_name("warnings.log")
    return Curves(
        name, series, tuple(notes.read_text(encoding="utf-8", errors="replace").splitlines()) if notes.is_file() else ()
    )
