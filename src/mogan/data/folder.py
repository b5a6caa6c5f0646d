"""A cache's folder while it is filled: whose it is, its lists, what there is to say about it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mogan.data import cache as data
from mogan.disk.files import json_line, openable, replacing, write_atomically
from mogan.disk.locks import LOCK
from mogan.errors import UserError

PASSING = (LOCK, ".tmp-", *data.FACTS.values())  # names of files that come before anything is made


def claim(out: Path, facts: dict[str, Any]) -> None:
    """Write ``cache.json`` (of paths ``trajectories.json``), or make sure that an earlier run wrote the same.

    Raises:
        UserError: the folder holds something else, or was made with other settings.
    """
    openable(out)
    there = data.read_facts(out)
    if there is not None:
        unsaid = {"model", "flow_name", *({"precision"} - there.keys())}  # older stores do not say how precise they are
        wanted = {"controls": "none"} | facts if "controls" in there else facts
        different = data.unlike(there, {k: v for k, v in wanted.items() if k not in unsaid})
        if different:
            raise UserError(f"the cache in {out} {different}: use the same options, or another --out")
        return
    if out.exists() and any(not path.name.startswith(PASSING) for path in out.iterdir()):
        raise UserError(f"{out} is not empty and not a cache: give another --out")
    with replacing(out / data.FACTS[facts["contents"]]) as temporary:
        temporary.write_text(json.dumps({"format": data.FORMAT, "version": data.VERSION} | facts, indent=2) + "\n")


@contextmanager
def claimed_by_work_alone(out: Path, shard: str | None) -> Iterator[None]:
    """Take a new file of facts away again if nothing was made: a failed start, as with damaged weights, ties the folder to
    nothing. Other shards may be at work under what one of them wrote.
    """
    new = shard is None and data.read_facts(out) is None
    try:
        yield
    except BaseException:
        if new and all(path.name.startswith(PASSING) for path in out.iterdir()):
            for name in data.FACTS.values():
                (out / name).unlink(missing_ok=True)
        raise


def write_lines(path: Path, rows: list[dict]) -> None:
    """One JSON line per row."""
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(map(json_line, rows)))


def tell(out: Path, notes: list[str]) -> None:
    """Print what the user should know, and keep it in the cache."""
    for note in notes:
        print(note)
    write_atomically(out / "warnings.log", "".join(f"{note}\n" for note in notes))
