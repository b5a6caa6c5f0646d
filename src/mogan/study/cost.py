"""What training took, from the runs' own logs: student updates, seconds, and how many iterations fit in a time."""

import json
from pathlib import Path
from typing import Any

from mogan.study.columns import Column

MOTION = ("student<gan", "student<dmd+gan", "student<surrogate")  # updates of the student by its motion


def run_of(out: Path, column: str, seed: int) -> Path:
    """Where a column's run with one training seed lies."""
    return out / column / f"seed{seed}" / "run"


def from_teacher(column: Column, seed: int, known: dict[str, Column], out: Path) -> tuple[int, float]:
    """Student updates and seconds of training that lead from the base model to a column's student."""
    if column.recipe is None:
        return 0, 0.0
    updates, seconds = from_teacher(known[column.start], seed, known, out) if column.start else (0, 0.0)
    rows = _rows(run_of(out, column.name, seed))
    learned = sum(row["update"].startswith("student") for row in rows)
    return updates + learned, seconds + sum(row["seconds"] for row in rows)


def iterations_that_fit(column: Column, seed: int, known: dict[str, Column], out: Path) -> int:
    """How long a column with ``as_long_as`` trains; at least once.

    The first iterations take what they took in the measured run, since some recipes begin with a warm-up; later ones
    what the second half of it took.
    """
    assert column.as_long_as is not None
    measured, other = column.as_long_as
    left = from_teacher(known[other], seed, known, out)[1]
    left -= from_teacher(known[column.start], seed, known, out)[1] if column.start else 0.0
    each: dict[int, float] = {}
    for row in _rows(run_of(out, measured, seed)):
        each[row["iteration"]] = each.get(row["iteration"], 0.0) + row["seconds"]
    count, seconds = 0, list(each.values())
    for one in seconds:
        if one > left:
            return max(1, count)
        count, left = count + 1, left - one
    later = seconds[len(seconds) // 2 :]
    return count + int(left * len(later) / sum(later))


def training(column: Column, seeds: list[int], known: dict[str, Column], out: Path) -> dict[str, Any]:
    """Seconds and updates of training, and how the discriminator stood, per seed; as part of a system's results."""
    seconds, gaps, worst = {}, {}, {}
    for seed in seeds:
        rows = _rows(run_of(out, column.name, seed))
        seconds[str(seed)] = sum(row["seconds"] for row in rows)
        gap = [row["gap"] for row in rows if "gap" in row]
        if gap:
            gaps[str(seed)] = sum(gap[-10:]) / len(gap[-10:])
            worst[str(seed)] = max(row["grad_norm"] for row in rows if row["update"] in MOTION)
    whole = [from_teacher(column, seed, known, out) for seed in seeds]
    cost = {
        name: sum(found) / len(seeds)
        for name, found in zip(("updates", "seconds"), zip(*whole, strict=True), strict=True)
    }
    discriminator = {"final_gap": gaps, "largest_motion_gradient": worst} if gaps else {}
    return {"training_seconds": seconds, "from_teacher": cost} | discriminator


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
