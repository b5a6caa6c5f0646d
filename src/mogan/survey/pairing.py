"""Which clips belong together: folders of clips -> samples -> the (prompt, k) that every system has."""

import os
from collections.abc import Sequence
from pathlib import Path

from mogan.data.lists import printable
from mogan.errors import UserError
from mogan.evaluation.clips import Entry, named_folder, read_folder

Key = tuple[str, int]


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER``, as `mogan evaluate` takes them -> {name: folder}.

    Raises:
        UserError: fewer than two, one that is no folder, or two of one name or place.
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, path = named_folder(text)
        if not os.path.isdir(path):
            raise UserError(f"{path} is not a folder: give the folder that holds the clips of {name}.")
        if name in folders:
            raise UserError(f"Two systems are called '{name}': tell them apart with NAME=FOLDER.")
        if twin := next((other for other, place in folders.items() if os.path.samefile(path, place)), None):
            raise UserError(f"'{twin}' and '{name}' are the same folder, {path}: give each system's own.")
        folders[name] = path
    if len(folders) < 2:
        raise UserError("A survey compares at least two systems: give --a FOLDER --b FOLDER, or more folders.")
    return folders


def read_samples(folder: Path) -> dict[Key, Entry]:
    """The clips of one system by (prompt, k), found as every command finds them: see ``read_folder``.

    A survey shows every clip that is listed, and its prompt: a listed file that is not there or has no caption is an error
    here (UserError). What cannot be opened is left out; whether its partners may be is for :func:`shared_keys` to say.
    """
    system = read_folder(folder, folder.name)
    if system.uncaptioned:
        raise UserError(
            f"{folder / system.naming} gives {printable(system.uncaptioned[0])} no caption: raters are shown it, add it."
        )
    if system.missing:
        raise UserError(f"{folder / system.naming} names {system.missing[0]}, which is not there: sample again.")
    by_key: dict[Key, Entry] = {}
    for entry in system.clips:
        if entry.problem:
            print(f"left out: {printable(str(entry.path))} {entry.problem}")
            continue
        key = (entry.prompt, entry.index)
        if key in by_key:
            raise UserError(f"{folder} has two clips for '{_short(entry.prompt)}' number {entry.index}: remove one.")
        by_key[key] = entry
    return by_key


def shared_keys(samples: dict[str, dict[Key, Entry]], common: bool) -> list[Key]:
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
