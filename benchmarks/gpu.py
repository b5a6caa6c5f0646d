"""One GPU, no network, random weights: what Wan2.1-1.3B's recipes take at 81 x 480 x 832, beside what `mogan estimate` says.

    make gpu                                                    # all that nine minutes allow
    python benchmarks/gpu.py --parts card,dmd,networks --budget 200
    python benchmarks/gpu.py --parts tdm,vdot --add docs/results/gpu.json
    python benchmarks/gpu.py --tables docs/results/gpu.json     # measures nothing, writes the page again

Every part is a process of its own with a time limit and writes each number down when it has it (--work/results/PART.json):
one that fails or hangs loses nothing but what it had not measured. Parts come in the order of what they are worth; those for
which the budget has no time are skipped. The estimates are made on the CPU meanwhile. Without a GPU the same code runs on
narrow networks and writes no page.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_inputs import NEIGHBOURS
from gpu_tables import tables, write_tables

from mogan.costs.machines import MACHINES
from mogan.disk.files import write_atomically

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """Seconds of an H200: ``repeat``: repetitions that far; ``least``: what it needs to be worth starting; ``limit``: its end."""

    name: str
    repeat: float
    least: float
    limit: float


PARTS = (
    Part("card", 5, 15, 60),
    Part("dmd", 22, 40, 150),
    Part("mogan_lora", 70, 90, 210),
    Part("mogan", 32, 50, 150),
    Part("mogan_fit", 40, 60, 210),
    Part("networks", 0, 40, 150),
    Part("penalty", 10, 30, 90),
    Part("sample", 10, 30, 90),
    Part("compile", 40, 60, 200),
    *(Part(name, 0 if name == "shift" else 20, 35, 90) for name in NEIGHBOURS),  # SHIFT's first update samples for all
)


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A process that ends with the block, and its children with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def finished(process: subprocess.Popen, log: Path, limit: float) -> str:
    """Wait; empty if it went well, else why not, in a line."""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else f"ended with {process.returncode} and said nothing")[:240]


class Run:
    """Parts one after the other, and what they found in one file that is written after each.

    Args:
        parts: which, in order.
        work: where they write.
        out: the file that holds everything.
        budget: seconds for all.
        command: of a part, given its name and for how long it may repeat.
        earlier: what another run found; parts of this one take their place.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        work: Path,
        out: Path,
        budget: float,
        command: Callable[[str, float], list[str]],
        earlier: Mapping[str, Any] | None = None,
    ):
        self.parts, self.work, self.out, self.budget, self.command = parts, work, out, budget, command
        self.earlier = earlier or {}
        self.began = time.monotonic()
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.budget - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        """With the seconds since the start."""
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def all(self) -> None:
        """Every part that the budget allows."""
        for part in self.parts:
            self.one(part)

    def one(self, part: Part) -> None:
        """A part, unless there is no time for it."""
        if self.left < part.least:
            self.skipped.append(part.name)
            self.say(f"{part.name}: skipped, {self.left:.0f} s are left and it takes at least {part.least:.0f}")
            self.merge()
            return
        limit, log = min(part.limit, self.left), self.work / "results" / f"{part.name}.log"
        (self.work / "results" / f"{part.name}.json").unlink(missing_ok=True)
        self.say(f"{part.name}: begins, at most {limit:.0f} s")
        with started(self.command(part.name, part.repeat), log) as process:
            why = finished(process, log, limit)
        if why:
            self.failed[part.name] = why
            print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
        self.say(f"{part.name}: {why or 'done'}")
        found = self.merge()["parts"].get(part.name, {})
        for row in found.get("rows", []):
            numbers = {
                k: v for k, v in row.items() if k in ("clip", "seconds", "peak", "above", "error", "note", "time")
            }
            print(f"    {row['what']}: {json.dumps(numbers)}", flush=True)

    def merge(self) -> dict[str, Any]:
        """Everything so far."""
        known = dict(self.earlier.get("parts", {}))
        for name in [part.name for part in PARTS] + [part.name for part in self.parts]:
            if (one := read(self.work / "results" / f"{name}.json")) is not None:
                known[name] = one
        for name, why in self.failed.items():
            known[name] = known.get(name, {"rows": []}) | {"failed": why}
        order = {part.name: place for place, part in enumerate(PARTS)}
        found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "parts": {name: known[name] for name in sorted(known, key=lambda name: order.get(name, len(order)))},
            "skipped": [name for name in self.skipped if name not in known],
            "predicted": self.earlier.get("predicted", {}) | (read(self.work / "results" / "predicted.json") or {}),
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out, json.dumps(found, indent=1) + "\n")
        return found


def read(file: Path) -> Any:
    """What a file says, if it is there and whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def chosen(names: str) -> list[Part]:
    """Parts by name, in our order."""
    known = {part.name: part for part in PARTS}
    asked = names.split(",") if names else list(known)
    if unknown := [name for name in asked if name not in known]:
        sys.exit(f"no part {unknown[0]}: there are {', '.join(known)}")
    return [part for part in PARTS if part.name in asked]


def main() -> None:
    """Measure, print, and on a GPU write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="room for 4 GB of random weights")
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--out", type=Path, help="docs/results/gpu.json, of a dry run dry/gpu.json in --work")
    parser.add_argument(
        "--parts", default="", help="comma-separated; all by default: " + ", ".join(p.name for p in PARTS)
    )
    parser.add_argument("--budget", type=float, help="seconds in all; 540 on a GPU")
    parser.add_argument("--add", type=Path, metavar="JSON", help="what an earlier run found, whose other parts stay")
    parser.add_argument(
        "--predicted", type=Path, metavar="JSON", help="estimates that gpu_predicted.py has made already"
    )
    parser.add_argument("--tables", type=Path, metavar="JSON", help="write the page from this file and measure nothing")
    arguments = parser.parse_args()
    if arguments.tables:
        write_tables(arguments.page, tables(read(arguments.tables)))
        return
    dry = not torch.cuda.is_available()
    work = arguments.work / "dry" if dry else arguments.work
    if dry:
        print("no GPU here: a dry run on narrow networks, no page is written", file=sys.stderr)
    machine = (
        "h200"
        if dry
        else next((m for m in MACHINES if m.split("-")[0] in torch.cuda.get_device_name().lower()), "h200")
    )
    narrow = ["--narrow"] if dry else []

    def script(name: str, *more: str) -> list[str]:
        return [sys.executable, str(HERE / name), "--work", str(work), *narrow, *more]

    def command(part: str, repeat: float) -> list[str]:
        return script("gpu_parts.py", "--part", part, "--seconds", str(0.0 if dry else repeat))

    out = arguments.out or (work / "gpu.json" if dry else Path("docs/results/gpu.json"))
    budget = arguments.budget or (float("inf") if dry else 540.0)
    parts = [replace(part, limit=10 * part.limit) if dry else part for part in chosen(arguments.parts)]
    run = Run(parts, work, out, budget, command, read(arguments.add) if arguments.add else None)
    results = work / "results"
    log = results / "inputs.log"
    with started(script("gpu_parts.py", "--part", "inputs"), log, CUDA_VISIBLE_DEVICES="") as inputs:
        if run.parts[0].name == "card":  # needs no inputs
            run.one(run.parts[0])
            run.parts = run.parts[1:]
        why = finished(inputs, log, min(200.0, run.left) if not dry else 600.0)
    if why:
        print(log.read_text(errors="replace")[-2000:])
        sys.exit(f"no random weights: {why} ({log})")
    run.say("random weights: done")
    if arguments.predicted:
        write_atomically(results / "predicted.json", arguments.predicted.read_text())
        run.all()
    else:
        beside, log = script("gpu_predicted.py", "--gpu", machine), results / "predicted.log"
        with started(["nice", *beside], log, CUDA_VISIBLE_DEVICES="") as predicted:
            run.all()
            why = finished(predicted, log, max(1.0, min(run.left, 900.0)))
        run.say(f"estimates: {why or 'done'}")
    lines = tables(run.merge())
    print("\n".join(lines))
    if not dry:
        write_tables(arguments.page, lines)


if __name__ == "__main__":
    main()
