"""``samples.jsonl``: one line for each clip in a folder, written by any number of processes at once."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from mogan.disk.files import from_json, json_line, writing
from mogan.disk.locks import locked
from mogan.errors import UserError

NAME = "samples.jsonl"
Record = dict[str, Any]
ALIKE = (  # in all clips of a folder
    "fps", "precision", "sigmas", "steps", "guidance", "shift", "negative_prompt", "solver", "flowmo", "motion", "motion_ratio", "causal",
)  # fmt: skip
HOW = ("first_frames", "controls", "state", *ALIKE[1:])
WAY = ("prompt", "index", "seed", "task", "kind", "control", "mask", "clip", "references", "fps", *HOW)
UNSAID = {"negative_prompt": ""}  # what lists mean that were written before it was noted
UNKNOWN = ("precision",)  # what they may have been, for all that they say


def append_samples(folder: Path, records: Iterable[Record]) -> None:
    """Add lines. Each process locks the file, so no line is lost or mixed with another's, on NFS too.

    A line torn by a kill is taken away first: its clip is still there, and who makes that clip lists it again.
    """
    lines = b"".join(map(json_line, records))
    if not lines:
        return
    with writing(folder / NAME), (folder / NAME).open("a+b") as file, locked(file.fileno()):
        _drop_torn_end(file)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def listed_samples(folder: Path) -> dict[str, Record]:
    """Records by file name; a torn last line is left out.

    Raises:
        UserError: another line is no record.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    found = {}
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.decode(errors="replace").split("\n"), 1):
        try:
            if line.strip():
                found[str(from_json(line)["file"])] = from_json(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no record of a clip: remove that line, or the file") from error
    return found


def refuse_others(folder: Path, listed: dict[str, Record], wanted: Sequence[Record]) -> None:
    """Raise if a folder holds clips that were made otherwise: one folder is one way of sampling.

    Args:
        folder: where they lie.
        listed: what it says of the clips that are there.
        wanted: what it would say of those that are to be there, at least one. Clips of one name agree in all of ``WAY``, others
            in ``ALIKE``; all are of the same weights.
    """
    change = f"give another --out, or remove {NAME} and the clips"
    own = {record["file"]: record for record in wanted}
    for file, there in listed.items():
        record = own.get(file, wanted[0])
        for key in WAY if file in own else ALIKE:
            before, now = (one.get(key, UNSAID.get(key)) for one in (there, record))
            if before != now and not (key in UNKNOWN and before is None):
                raise UserError(f"{folder} lists {file[:60]} with {key} {before!r}, not {now!r}: {change}")
        if there.get("weights", record.get("weights")) != record.get("weights"):
            raise UserError(f"{folder} lists {file[:60]}, made by a model with other weights: {change}")


def _drop_torn_end(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
