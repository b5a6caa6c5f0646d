"""Which clips belong together: folders of clips -> samples -> the (prompt, k) that every system has."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mogan.errors import UserError

NAME = re.compile(r"(?P<prompt>.+)-(?P<index>\d+)\.mp4", re.DOTALL)
Key = tuple[str, int]


class Sample(NamedTuple):
    """One clip of one system."""

    path: Path
    prompt: str
    number: int
    seed: int | None


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER`` (named after itself) -> {name: folder}."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.resolve().name
        if not name:
            raise UserError(f"'{text}' names no system: write NAME=FOLDER.")
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give the folder that holds the clips of {name}.")
        if name in folders:
            raise UserError(f"Two systems are called '{name}': tell them apart with NAME=FOLDER.")
        folders[name] = path
    if len(folders) < 2:
        raise UserError("A survey compares at least two systems: give --a FOLDER --b FOLDER, or more folders.")
    return folders


def read_samples(folder: Path) -> dict[Key, Sample]:
    """The clips of one system by (prompt, k), from ``samples.jsonl`` or from VBench's names ``{prompt}-{k}.mp4``."""
    listing = folder / "samples.jsonl"
    samples = list(_listed(listing) if listing.is_file() else _by_name(folder))
    if not samples:
        raise UserError(f"{folder} holds no clips: expected samples.jsonl or files named like 'a cat runs-0.mp4'.")
    by_key: dict[Key, Sample] = {}
    for sample in samples:
        key = (sample.prompt, sample.number)
        if key in by_key:
            raise UserError(f"{folder} has two clips for '{_short(sample.prompt)}' number {sample.number}: remove one.")
        by_key[key] = sample
    return by_key


def _listed(listing: Path) -> Iterable[Sample]:
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            seed = row.get("seed")
            sample = Sample(
                listing.parent / str(row["file"]),
                str(row["prompt"]),
                int(row["index"]),
                None if seed is None else int(seed),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{listing} line {number} is no sample ({error!r}): it needs file, prompt and index."
            ) from error
        if not sample.path.is_file():
            raise UserError(f"{listing} line {number} names {sample.path.name}, which is not there: sample again.")
        yield sample


def _by_name(folder: Path) -> Iterable[Sample]:
    strange = []
    for path in sorted(folder.glob("*.mp4")):
        match = NAME.fullmatch(path.name)
        if match:
            yield Sample(path, match["prompt"], int(match["index"]), None)
        else:
            strange.append(path.name)
    if strange:
        raise UserError(
            f"{len(strange)} clips in {folder} are not named '<prompt>-<k>.mp4' (first: {strange[0]}): "
            "rename them or write samples.jsonl."
        )


def shared_keys(samples: dict[str, dict[Key, Sample]], common: bool) -> list[Key]:
    """The (prompt, k) that every system has, in order; a ``UserError`` where some lack partners or seeds differ."""
    everything = sorted(set().union(*samples.values()))
    shared = [key for key in everything if all(key in clips for clips in samples.values())]
    if not shared:
        raise UserError("The folders have no prompt in common: sample all systems from the same prompts.")
    if len(shared) < len(everything) and not common:
        prompt, index = next(key for key in everything if key not in set(shared))
        lacking = next(name for name, clips in samples.items() if (prompt, index) not in clips)
        raise UserError(
            f"{len(everything) - len(shared)} of {len(everything)} clips lack a partner (first: '{_short(prompt)}' "
            f"number {index} in {lacking}): sample them, or pass --common to use the {len(shared)} that all have."
        )
    for key in shared:
        seeds = {name: clips[key].seed for name, clips in samples.items() if clips[key].seed is not None}
        if len(set(seeds.values())) > 1:
            told = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
            raise UserError(
                f"The seeds of '{_short(key[0])}' number {key[1]} differ ({told}): sample with the same seeds."
            )
    return shared


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
