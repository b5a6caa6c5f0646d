"""What training took: student updates, seconds, and how many iterations fit in a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogan.runs.watch import read_records
from mogan.study.columns import Column

MOTION = ("student<gan", "student<dmd+gan", "student<surrogate")  # updates of the student by its motion


@dataclass(frozen=True)
class Training:
    """One run, by its log.

    Attributes:
        updates: of the student.
        seconds: of each iteration; on a CPU of all its cores together, so that neither other programs nor the number of
            cores count.
        final_gap: of the discriminator's logits, mean of the last 10; None without one.
        largest_motion_gradient: norm, over the student's motion updates; None without any.
    """

    updates: int
    seconds: list[float]
    final_gap: float | None = None
    largest_motion_gradient: float | None = None


Cell = tuple[str, int]  # a column and a training seed
Trained = Mapping[Cell, Training]


def read_training(log: Path) -> Training:
    """From a run's ``metrics.jsonl``."""
    rows = read_records(log)
    updates = sum(row["update"].startswith("student") for row in rows)
    each: dict[int, float] = {}
    for row in rows:
        each[row["iteration"]] = each.get(row["iteration"], 0.0) + row.get("core_seconds", row["seconds"])
    seconds = list(each.values())
    gaps = [row["gap"] for row in rows if "gap" in row][-10:]
    if not gaps:
        return Training(updates, seconds)
    steepest = max((row["grad_norm"] for row in rows if row["update"] in MOTION), default=None)
    return Training(updates, seconds, sum(gaps) / len(gaps), steepest)


def from_teacher(column: Column, seed: int, known: dict[str, Column], trained: Trained) -> tuple[int, float]:
    """Student updates and seconds of training that lead from the base model to a column's student."""
    updates, seconds = from_teacher(known[column.start], seed, known, trained) if column.start else (0, 0.0)
    if column.recipe is None:
        return updates, seconds
    own = trained[column.name, seed]
    return updates + own.updates, seconds + sum(own.seconds)


def iterations_that_fit(column: Column, seed: int, known: dict[str, Column], trained: Trained) -> int:
    """How long a column with ``as_long_as`` trains; at least once.

    The first iterations take what they took in the measured run, since some recipes begin with a warm-up; later ones
    what the second half of it took.
    """
    assert column.as_long_as is not None
    measured, other = column.as_long_as
    left = from_teacher(known[other], seed, known, trained)[1]
    left -= from_teacher(known[column.start], seed, known, trained)[1] if column.start else 0.0
    count, seconds = 0, trained[measured, seed].seconds
    for one in seconds:
        if one > left:
            return max(1, count)
        count, left = count + 1, left - one
    later = seconds[len(seconds) // 2 :]
    return max(1, count + int(left * len(later) / sum(later))) if later else 1


def training(column: Column, seeds: list[int], known: dict[str, Column], trained: Trained) -> dict[str, Any]:
    """Seconds and updates of training, and how the discriminator stood, per seed; as part of a system's results."""
    own = {str(seed): trained[column.name, seed] for seed in seeds}
    whole = [from_teacher(column, seed, known, trained) for seed in seeds]
    cost = {
        name: sum(found) / len(seeds)
        for name, found in zip(("updates", "seconds"), zip(*whole, strict=True), strict=True)
    }
    found: dict[str, Any] = {
        "training_seconds": {seed: sum(one.seconds) for seed, one in own.items()},
        "from_teacher": cost,
    }
    for name in ("final_gap", "largest_motion_gradient"):
        values = {seed: value for seed, one in own.items() if (value := getattr(one, name)) is not None}
        found |= {name: values} if values else {}
    return found
