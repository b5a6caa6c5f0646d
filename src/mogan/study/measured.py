"""What a column came to with one training seed, in one small file: enough for the table, so machines can share a study.

A file that is there, made here or copied, stands for its column and seed: nothing of them is trained or sampled again.
"""

import gzip
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mogan.disk.files import from_json, replacing
from mogan.errors import UserError
from mogan.evaluation.clips import read_folder
from mogan.evaluation.measure import VERSION
from mogan.study.cost import Training, read_training
from mogan.study.jobs import Job, core_seconds, told

Record = dict[str, Any]
KEPT = ("prompt", "index", "values", "features")


@dataclass(frozen=True)
class Measured:
    """One column with one training seed.

    Attributes:
        commands: that made it, paths relative to the study's folder.
        clips: of each ``prompt``, ``index``, ``values`` by metric and ``features`` of its look.
        training: None for what is not trained.
        core_seconds: that the commands took.
        sampling: core-seconds of sampling and decoding, loading included; None where it was not kept.
        version: of the metrics, :data:`mogan.evaluation.measure.VERSION`.
    """

    commands: list[str]
    clips: list[Record]
    training: Training | None
    core_seconds: float
    sampling: float | None = None
    version: int = 0


def path_of(out: Path, column: str, seed: int) -> Path:
    """Where the file lies: beside the folder with the run and its samples."""
    return out / column / f"seed{seed}.json.gz"


def read_measured(path: Path, out: Path, jobs: list[Job], prompts: set[str]) -> Measured | None:
    """What the file holds; None without one.

    Raises:
        UserError: it is torn, or of other options, prompts or metrics than these jobs'.
    """
    if not path.is_file():
        return None
    try:
        found = from_json(gzip.decompress(path.read_bytes()))
        training = found.pop("training")
        measured = Measured(**found, training=training and Training(**training))
        same = measured.commands == _commands(jobs, out) and {clip["prompt"] for clip in measured.clips} == prompts
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again, or remove it to measure anew") from error
    if not same:
        raise UserError(f"{path} was measured with other options: give another --out, or the same options")
    if measured.version != VERSION:
        mark = out / "logs" / f"{path.parent.name}-{path.name.partition('.')[0].removeprefix('seed')}-measure.done"
        raise UserError(
            f"{path} holds numbers of another version of the metrics: remove it, and {mark} if that is there, to measure anew"
        )
    return measured


def keep_measured(path: Path, home: Path, out: Path, jobs: list[Job]) -> Measured:
    """Gather what finished jobs left in a column's folder, and write the file."""
    clips = [{key: clip[key] for key in KEPT} for clip in records(home / "samples", home / "results.json")]
    log = home / "run" / "metrics.jsonl"
    training = read_training(log) if log.is_file() else None
    logs, sampled = out / "logs", [job for job in jobs if job.command[0] == "sample"]
    measured = Measured(
        _commands(jobs, out), clips, training, core_seconds(jobs, logs), core_seconds(sampled, logs), VERSION
    )
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(asdict(measured)).encode(), mtime=0))
    return measured


def records(folder: Path, results: Path) -> list[Record]:
    """Values and features of a folder's clips, from the file that the evaluation kept.

    Raises:
        UserError: the file is damaged.
    """
    from mogan.evaluation.records import measured

    found = measured(read_folder(folder, folder.name), results.with_suffix(".clips.jsonl"))
    if broken := [record["error"] for record in found if "error" in record]:
        raise UserError(f"{broken[0]}; remove it, and the .done file of the job that made it, and run this again")
    return found


def _commands(jobs: list[Job], out: Path) -> list[str]:
    return [told(job, out) for job in jobs]
