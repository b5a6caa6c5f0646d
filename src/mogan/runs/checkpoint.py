"""Saving and resuming a run: atomic, everything needed to go on bit for bit, nothing unpickled.

A checkpoint is a folder of safetensors files written by ``torch.distributed.checkpoint``: every process writes its own
part of every sharded tensor and reads back whatever part it needs, so a run saved by any number of processes resumes on
any other number. torch's own format of the same name keeps its index as a pickle; the safetensors one keeps it in the
files' headers. A run of one process writes the same format.
"""

import json
import math
import shutil
import warnings
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from mogan.config import Config
from mogan.disk.files import from_json, write_atomically
from mogan.distributed import ONE, World
from mogan.errors import UserError

SUMS = "checksums.json"  # beside the files: CRC-32 of each
SAVE_WITHIN = 3600.0  # seconds: an iteration at full size on one card takes hours, and a recipe saves after 50


def save_checkpoint(run: Path, iteration: int, state: dict[str, Tensor], config: Config, world: World = ONE) -> Path:
    """Write ``checkpoints/<iteration>`` whole or not at all, then drop all but ``config.keep`` and the one that
    :func:`student_checkpoint` names.

    All processes call this; the folder must be one that all of them see. ``state`` names tensors ``part.name...``; each
    part goes into a file of its own, which bounds the memory that writing takes.

    Raises:
        UserError: the disk refuses it.
    """
    final = run / "checkpoints" / f"{iteration:06d}"
    temporary = final.with_name(f".{final.name}.new")
    if world.main:
        for left in final.parent.glob(".*.new"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    parts = sorted({key.split(".")[0] for key in state})
    files = {key: 1 + parts.index(key.split(".")[0]) for key in state}
    writer = HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.save(state, storage_writer=writer, no_dist=world.mesh is None)
    except CheckpointException as error:  # raised by all processes together
        shutil.rmtree(temporary, ignore_errors=True)
        kept = latest_checkpoint(run)
        raise UserError(
            f"could not save {final} ({_reason(error)}); free some disk space and run the same command again"
            + (f": it resumes from {kept}" if kept else "")
        ) from error
    # each process knows of its own files, and may not yet of others'
    seen = world.gather([file.name for file in temporary.glob("*.safetensors")])
    files_there = [temporary / name for name in sorted(set().union(*seen))]
    sums = world.gather(_sums(files_there[world.rank :: world.ranks]))
    if world.main:
        whole = {name: value for part in sums for name, value in part.items()}
        write_atomically(temporary / SUMS, json.dumps(whole, indent=2) + "\n")
        write_atomically(temporary / "config.json", json.dumps(config.as_json(), indent=2) + "\n")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        for old in set(checkpoints(run)) - _kept(run, config):
            # under such a name it is no checkpoint any more, and the next one sweeps what a kill leaves of it
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.new")))
    world.barrier()  # nobody leaves, and so ends the others, before the checkpoint is in its place
    return final


def _kept(run: Path, config: Config) -> set[Path]:
    """The newest checkpoint, before it those that the recipe's ``save_every`` made, sooner than others, and the best student's."""
    *before, newest = checkpoints(run)
    before.sort(key=lambda path: (int(path.name) % config.save_every == 0, int(path.name)))
    return {newest, student_checkpoint(run), *before[max(0, len(before) + 1 - config.keep) :]}


def _reason(error: CheckpointException) -> BaseException:
    """What went wrong; raised where it is a Ctrl-C, which torch takes for a failure of the file."""
    found = next(iter(error.failures.values()))[0]
    if isinstance(found, KeyboardInterrupt):
        raise found from error
    return found


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in _numbered(run) if (path / "config.json").is_file()]


def _numbered(run: Path) -> list[Path]:
    """Folders named by an iteration, in order; a user's copy, such as ``000200 (copy)`` or ``000200.bak``, is none of ours."""
    return sorted(
        (p for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdecimal()), key=lambda path: int(path.name)
    )


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    found = checkpoints(run)
    return found[-1] if found else None


def broken_checkpoints(run: Path) -> list[Path]:
    """Folders newer than :func:`latest_checkpoint` that something has been taken from: checkpoints appear whole."""
    newest = latest_checkpoint(run)
    return [path for path in _numbered(run) if newest is None or int(path.name) > int(newest.name)]


def student_checkpoint(run: Path) -> Path:
    """The checkpoint whose student is sampled, exported and trained on: of most motion on held-out prompts, if the run
    was told to look (:mod:`mogan.training.held_out`); else the newest.

    Raises:
        UserError: there is none yet.
    """
    motions, there = held_out_motions(run), checkpoints(run)
    if not there:
        raise UserError(f"{run} has no checkpoint: let it train until it has saved one, or copy its checkpoints there")
    judged = [path for path in there if int(path.name) in motions]
    return max(judged, key=lambda path: motions[int(path.name)]) if judged else there[-1]


def held_out_motions(run: Path) -> dict[int, float]:
    """Motion on held-out prompts by iteration, in order, as far as it was measured."""
    return _held_out(run)[0]


def held_out_prompts(run: Path) -> dict[str, str]:
    """On which prompts that was measured: their ``cache`` and a ``fingerprint``; empty where nobody noted it."""
    return _held_out(run)[1]


def _held_out(run: Path) -> tuple[dict[int, float], dict[str, str]]:
    path = run / "held_out.json"
    try:
        found = from_json(path.read_text()) if path.is_file() else {}
        motions = found.get("motions", {} if "prompts" in found else found)  # older runs have nothing but motions
        if not all(math.isfinite(v) for v in motions.values()):
            raise ValueError("a motion that is no number")
        return {int(k): float(v) for k, v in motions.items()}, {k: str(v) for k, v in found.get("prompts", {}).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, motion is measured from then on") from error


def write_held_out_motions(run: Path, motions: dict[int, float], prompts: dict[str, str]) -> None:
    """What :func:`held_out_motions` and :func:`held_out_prompts` read."""
    facts = {"prompts": prompts, "motions": dict(sorted(motions.items()))}
    write_atomically(run / "held_out.json", json.dumps(facts, indent=2) + "\n")


def load_checkpoint(path: Path, state: dict[str, Tensor], world: World = ONE) -> None:
    """Fill the tensors of ``state``, in place, with those that :func:`save_checkpoint` wrote under their names.

    They may be sharded in any way, or be some of those that were saved.

    Raises:
        UserError: a file of theirs is not what was written; the message names it.
    """
    _check_sums(path, state, world)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=world.mesh is None)
    except CheckpointException as error:
        raise _unreadable(path, _reason(error)) from error


def load_part(path: Path, part: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint whose name begins with ``part.``, by the rest of its name; fp32, none if it has none."""
    shapes = {name: shape for name, shape in stored(path).items() if name.startswith(f"{part}.")}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if state:
        load_checkpoint(path, state)
    return {name.removeprefix(f"{part}."): value for name, value in state.items()}


def stored(path: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a checkpoint."""
    found = _metadata(path).state_dict_metadata
    return {name: torch.Size(about.size) for name, about in found.items() if hasattr(about, "size")}


def _metadata(path: Path) -> Any:
    if gone := next((name for name in _noted(path) if not (path / name).is_file()), None):
        raise _unreadable(path, f"{gone} is gone")
    try:
        return HuggingFaceStorageReader(str(path)).read_metadata()
    except Exception as error:  # safetensors' own kinds of error, and the disk's
        raise _unreadable(path, error) from error


def _sums(files: Collection[Path]) -> dict[str, int]:
    """CRC-32 of files by name, several read side by side: computing it is slower than disks."""

    def of(path: Path) -> int:
        found = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                found = zlib.crc32(block, found)
        return found

    with ThreadPoolExecutor(8) as pool:
        return dict(zip([path.name for path in files], pool.map(of, files), strict=True))


def _noted(path: Path) -> dict[str, int]:
    """What ``checksums.json`` says; empty for a checkpoint that is older than it."""
    if not (path / SUMS).is_file():
        return {}
    try:
        noted = from_json((path / SUMS).read_text())
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not noted or not isinstance(noted, dict):
        raise _unreadable(path, f"{SUMS} is damaged")
    return noted


def _check_sums(path: Path, names: Collection[str], world: World) -> None:
    """Read the files of these tensors, each process its share, and hold them against what was noted when they were written.

    A checkpoint that is older than the notes passes.
    """
    if not (noted := _noted(path)):
        return
    holds = {
        Path(about.relative_path).name for index, about in _metadata(path).storage_data.items() if index.fqn in names
    }
    for name, found in _sums([path / name for name in sorted(holds)[world.rank :: world.ranks]]).items():
        if noted.get(name) != found:
            raise _unreadable(path, f"{name} is not what was written: its checksum differs")


def _unreadable(path: Path, error: BaseException | str) -> UserError:
    return UserError(f"{path} cannot be read ({error}); delete that folder to resume from the one before")


def check_same_run(run: Path, config: Config) -> None:
    """Refuse to resume a run made by another recipe; the budget, the cadence of saving and compilation may change."""
    newest = latest_checkpoint(run)
    path = run / "config.json" if newest is None or (run / "config.json").is_file() else newest / "config.json"
    if not path.is_file():
        return
    try:
        old, new = settings(from_json(path.read_text())), settings(json.loads(json.dumps(config.as_json())))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): put back a copy, every checkpoint has one") from error
    changed = [k for k in new | old if old.get(k) != new.get(k)]
    if changed:
        raise UserError(
            f"{run} was made with another {changed[0]} ({old.get(changed[0])}); give another --out, or the same settings"
        )


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Of a config as JSON what makes a run the run it is: without budget, cadence of saving and compilation, every
    objective by its name, as runs of all versions have it.
    """
    free = {
        "iterations",
        "save_every",
        "sample_every",
        "keep",
        "sample_prompts",
        "compile",
        "offload",
        "post_trains",
        "objectives",
    }
    return _stated({k: v for k, v in (config | config.get("objectives", {})).items() if k not in free})


def _stated(value: Any) -> Any:
    """A config without what is None: an option that is newer than a run is None where it is not used."""
    if isinstance(value, dict):
        return {k: _stated(v) for k, v in value.items() if v is not None}
    return [_stated(v) for v in value] if isinstance(value, list) else value
