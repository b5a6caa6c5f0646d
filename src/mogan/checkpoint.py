"""Saving and resuming a run: atomic, everything needed to go on bit for bit, nothing unpickled."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from mogan.config import Config
from mogan.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk, then rename."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_checkpoint(run: Path, iteration: int, state: dict, config: Config) -> Path:
    """Write ``checkpoints/<iteration>`` whole or not at all, then drop all but the newest ``config.keep``.

    ``state`` holds tensors, numbers and containers of them only, so that it loads with ``weights_only``.
    """
    final = run / "checkpoints" / f"{iteration:06d}"
    temporary = final.with_name(f".{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with (temporary / "state.pt").open("wb") as file:
            torch.save(state | {"iteration": iteration}, file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        kept = latest_checkpoint(run)
        raise UserError(
            f"could not save iteration {iteration} ({error}); free some disk space and run the same command again"
            + (f": it resumes from {kept}" if kept else "")
        ) from error
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for old in checkpoints(run)[: -config.keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("[0-9]*") if (p / "state.pt").is_file())


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    found = checkpoints(run)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> dict:
    """State written by :func:`save_checkpoint`."""
    try:
        return torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete that folder to resume from the one before") from error


def check_same_run(run: Path, config: Config) -> None:
    """Refuse to resume a run made by another recipe; the budget and the cadence of saving may change."""
    path = run / "config.json"
    if not path.is_file():
        return
    old, new = json.loads(path.read_text()), json.loads(json.dumps(asdict(config)))
    free = {"iterations", "save_every", "sample_every", "keep", "sample_prompts"}
    changed = [k for k in new if k not in free and old.get(k) != new[k]]
    if changed:
        raise UserError(
            f"{run} was made with another {changed[0]} ({old.get(changed[0])}); give another --out, or the same settings"
        )
