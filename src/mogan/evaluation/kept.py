"""Values of clips that were measured before, beside the results."""

import json
import os
from pathlib import Path
from typing import Any

from mogan.disk.files import from_json, writing
from mogan.disk.locks import locked

Record = dict[str, Any]
NEEDED = {
    "sha256", "frames", "height", "width", "fps", "values", "pair_scores", "threshold", "features", "device", "torch",
}  # fmt: skip

MEASURED = ("values", "pair_scores", "features", "video_features")
LARGEST = 1e30  # of a measured number: sums of such overflow, and none is near it


class Kept:
    """Values measured before, one JSON line each, by any number of processes; a torn or damaged line is not used."""

    def __init__(self, path: Path):
        self._path = path
        self._found: dict[str, Record] = {}
        if path.is_file():
            for line in path.read_bytes().split(b"\n"):
                try:
                    row = from_json(line)
                    record = row["record"]
                    if NEEDED <= record.keys() and all(map(_are_numbers, map(record.get, MEASURED))):
                        self._found[row["key"]] = record
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue

    def get(self, key: str) -> Record | None:
        """What is known under a key."""
        return self._found.get(key)

    def put(self, key: str, record: Record) -> None:
        """Remember, on disk too."""
        self._found[key] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self._path), self._path.open("a") as file, locked(file.fileno()):
            file.write("\n" * (file.seek(0, os.SEEK_END) > 0) + json.dumps({"key": key, "record": record}))
            file.flush()


def _are_numbers(measured: Any) -> bool:
    """Whether all that was measured is a number, or nothing; lists in its place would break far from here."""
    if measured is None:
        return True
    found = measured.values() if isinstance(measured, dict) else measured
    return all(one is None or (isinstance(one, (int, float)) and abs(one) < LARGEST) for one in found)
