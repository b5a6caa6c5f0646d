"""How `make gpu` times a call and what it writes down; every row at once, so that a part that dies loses none."""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mogan.disk.files import write_atomically

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
FAST = torch.bfloat16 if CUDA else torch.float32  # networks compute in it
Row = dict[str, Any]


class Report:
    """The rows of one part, in a file that is always whole."""

    def __init__(self, file: Path, part: str):
        self.file, self.rows, self.began = file, [], time.perf_counter()
        name = torch.cuda.get_device_name() if CUDA else "CPU, narrow networks"
        self.facts: Row = {"part": part, "device": name, "torch": torch.__version__}
        self.write()

    def add(self, what: str, **numbers: Any) -> Row:
        """A row, or the new numbers of one that is there; also printed."""
        row = next((r for r in self.rows if r["what"] == what and r.get("clip") == numbers.get("clip")), None)
        if row is None:
            row = {"what": what}
            self.rows.append(row)
        row |= numbers
        self.write()
        told = ", ".join(f"{key} {_short(value)}" for key, value in numbers.items() if value is not None)
        print(f"[{time.perf_counter() - self.began:6.1f} s] {what}: {told}", flush=True)
        return row

    def attempt(self, what: str, call: Callable[[], Any], **about: Any) -> BaseException | None:
        """Do it, or note in a line of the row ``what`` why not, and go on; returns the error."""
        failed: BaseException | None = None
        try:
            call()
        except Exception as error:
            traceback.print_exception(error)
            self.add(what, **about, note=in_a_line(error))
            failed = error.with_traceback(None)  # its frames hold what did not fit
        forget()
        return failed

    def write(self) -> None:
        """Put it on the disk."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.facts |= {"seconds": time.perf_counter() - self.began, "rows": self.rows}
        write_atomically(self.file, json.dumps(self.facts, indent=1) + "\n")


def in_a_line(error: BaseException) -> str:
    """What it is and the beginning of what it says."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "does not fit: " + str(error).partition(". ")[0].removeprefix("CUDA out of memory. ")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timed(call: Callable[[], Any]) -> Row:
    """Seconds of one call by the GPU's own events, and the most bytes it held: ``peak`` in all, ``above`` what was there.

    What the call returns is dropped. Errors of the GPU come up here.
    """
    if not CUDA:
        began = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - began}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": first.elapsed_time(last) / 1000,
        "peak": float(peak),
        "above": float(peak - before),
        "reserved": float(torch.cuda.max_memory_reserved()),
    }


def measured(
    call: Callable[[], Any], seconds: float = 4.0, most: int = 7, warm: Callable[[], Any] | None = None
) -> Row:
    """The median of calls that take about so long together, at least one; after ``warm()``, or a first call that is not counted."""
    (warm or call)()
    runs = [timed(call)]
    while len(runs) < most and sum(run["seconds"] for run in runs) + runs[0]["seconds"] <= seconds:
        runs.append(timed(call))
    return runs[0] | {"seconds": statistics.median(run["seconds"] for run in runs), "runs": len(runs)}


def forget() -> None:
    """Give back what nothing names any more."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
