"""The first pass over videos: decode in threads, cut, measure motion; one record per file, kept on disk."""

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mogan.data.clips import Held, ShortShot, clips_of, motion_of
from mogan.data.listing import Source
from mogan.data.lists import printable
from mogan.data.video import probe, read_frames
from mogan.disk.files import from_json, json_line, replacing
from mogan.errors import UserError
from mogan.models.defaults import Geometry
from mogan.motion.flow import FlowEstimator

RENEW = 16  # clips of one file after which its unfinished record is written

READER = 3  # raise it when the same file gives other clips: records of another reader are not used
EMPTY: dict[str, Any] = {"reader": READER, "done": False, "error": None, "clips": [], "short": [], "held": []}


def measure(
    sources: list[Source], out: Path, geometry: Geometry, estimate_flow: FlowEstimator, workers: int
) -> list[dict]:
    """One record per source: its ``clips`` with their motion, its ``short`` shots, the times at which one frame was ``held`` for as long
    as a clip, or the ``error`` that rules it out.

    Records lie in ``out/sources``; a file that was measured and has not changed is not opened again. The record of a
    long file is renewed while it is being measured, so that a kill costs at most ``RENEW`` clips.
    """
    records = {s.name: _record(out, s) for s in sources}
    todo = [s for s in sources if not records[s.name]["done"] and "bytes" in records[s.name]]
    known = {s.name: {c["start"]: c["motion"] for c in records[s.name]["clips"]} for s in todo}
    for source in todo:
        records[source.name] |= EMPTY | {"clips": [], "short": [], "held": []}
    with tqdm(total=len(todo), desc="measure", unit="file", disable=not todo) as bar:
        for source, item in in_threads(todo, lambda s: _read_clips(s, geometry), workers):
            record = records[source.name]
            bar.set_postfix_str(printable(source.name), refresh=False)
            if isinstance(item, dict):
                record |= item
            elif isinstance(item, ShortShot):
                record["short"].append({"start_s": round(item.start_s, 3), "frames": item.frames})
            elif isinstance(item, Held):
                record["held"].append(round(item.start_s, 3))
            elif isinstance(item, Done):
                if item.error is not None:  # `done` stays False: it is tried again next time
                    record |= {"clips": [], "short": [], "held": [], "error": item.error}
                else:
                    record["done"] = True
                _write_record(out, record)
                bar.update()
            else:
                motion = known[source.name].get(item.start)
                if motion is None:
                    motion = round(motion_of(item.frames_FHWC, estimate_flow), 4)
                place = {"start": item.start, "start_s": round(item.start_s, 3), "repeats": item.repeats}
                record["clips"].append(place | {"motion": motion})
                if len(record["clips"]) > len(known[source.name]) and len(record["clips"]) % RENEW == 0:
                    _write_record(out, record)
    return [records[s.name] for s in sources]


def _read_clips(source: Source, geometry: Geometry) -> Iterator[Any]:
    """In a worker: facts of the file, then its clips and short shots."""
    yield {"sha": file_sha(source.path)}
    found = probe(source.path)
    yield {"source_fps": found.fps, "source_height": found.height, "source_width": found.width}
    yield {"remarks": list(found.remarks)}
    size = (geometry.height, geometry.width)
    yield from clips_of(read_frames(source.path, fps=geometry.fps, size=size), geometry.frames)


def known_record(out: Path, source: Source) -> dict | None:
    """What some process has found out about all of a file, if the file is still the same."""
    try:
        stamp, old = _stamp(source), _stored(out, source)
    except OSError as error:
        return _unreadable(source, error)
    return old if old is not None and stamp.items() <= old.items() and (old["done"] or old["error"]) else None


def _stamp(source: Source) -> dict[str, int]:
    if source.path.exists() and not source.path.is_file():  # a pipe would wait for ever
        raise OSError("it is no file")
    stat = source.path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _stored(out: Path, source: Source) -> dict | None:
    """An earlier record, unless it was made of other pictures or other times, or is damaged: the file is measured again."""
    path = _record_path(out, source.name)
    try:
        old = from_json(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(old, dict) or not {"source", "sha", *EMPTY} <= old.keys():
        return None
    return old if old["reader"] == READER else None


def _unreadable(source: Source, error: OSError) -> dict:
    return {"source": source.name, "sha": ""} | EMPTY | {"error": f"cannot be read ({error.strerror or error})"}


def _record(out: Path, source: Source) -> dict:
    """What an earlier run knows about a file, if the file is still the same; else an empty record, without ``bytes`` if
    the file cannot be read.
    """
    try:
        stamp, old = _stamp(source), _stored(out, source)
        if old is not None and stamp.items() <= old.items():
            return old
        if old is not None and old["sha"] == file_sha(source.path):  # copied, or touched
            _write_record(out, old | stamp)
            return old | stamp
    except OSError as error:
        return _unreadable(source, error)
    return {"source": source.name, "sha": ""} | stamp | EMPTY  # a worker reads all of it, when its turn comes


def _record_path(out: Path, name: str) -> Path:
    return out / "sources" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.json"


def _write_record(out: Path, record: dict) -> None:
    with replacing(_record_path(out, record["source"])) as temporary:
        temporary.write_bytes(json_line(record))


def file_sha(path: Path) -> str:
    """Half of the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


# ---------------------------------------------------------------------------------------------- threads


@dataclass(frozen=True)
class Done:
    """A worker has finished a job, or could not (``error``)."""

    error: str | None = None


def in_threads(jobs: Iterable, work: Callable[[Any], Iterator], workers: int) -> Iterator[tuple[Any, Any]]:
    """Run ``work(job)`` in threads; yield ``(job, item)`` for each of its items, then ``(job, Done)``.

    FFmpeg works outside Python's lock, so threads are enough. At most ``workers`` items wait at a time. A UserError,
    and what the machine refuses, ends its job; any other exception is raised here.
    """
    items: queue.Queue = queue.Queue(maxsize=workers)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run(job: Any) -> None:
        try:
            for item in work(job):
                if not put((job, item)):
                    return
            put((job, Done()))
        except (UserError, MemoryError, OSError) as error:
            put((job, Done(str(error) or type(error).__name__)))
        except BaseException as error:
            put((job, error))

    jobs = list(jobs)
    pool = ThreadPoolExecutor(workers)
    try:
        for job in jobs:
            pool.submit(run, job)
        left = len(jobs)
        while left:
            job, item = items.get()
            if isinstance(item, BaseException):
                raise item
            left -= isinstance(item, Done)
            yield job, item
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
