"""Dynamic degree: streamed and batched, beside a loop over pairs of a decoded clip; and the memory of a ten-minute
clip, for dynamic degree and for all that ``mogan evaluate --quick`` measures.

    python benchmarks/evaluate.py [--clips 6] [--minutes 10]

Every measurement is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mogan.data.video import write_video
from mogan.evaluation.frames import Clip
from mogan.evaluation.interpolators import blend
from mogan.evaluation.measure import measure as measure_clip
from mogan.evaluation.motion import dynamic_degree, interval, top_magnitude
from mogan.evaluation.pairs import to_video
from mogan.motion.classical_flow import farneback
from mogan.motion.flow import RaftConfig, RaftFlow
from mogan.world.scenes import make_scene, render


def main() -> None:
    """Write clips, measure each way in its own process, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short"
        short.mkdir()
        for index in range(given.clips):
            write_video(short / f"{index}.mp4", render(make_scene(0, index, motion="rich", frames=33)), 16)
        long = {minutes: Path(folder) / f"long-{minutes}" for minutes in (given.minutes / 4, given.minutes)}
        for minutes, path in long.items():
            path.mkdir()
            write_video(path / "0.mp4", repeated(int(minutes * 60 * 16)), 16)
        print(f"{'':36} {'clips/s':>9} {'peak MB':>9}")
        for way in ("loop", "batched"):
            show(f"{way}, RAFT of the lab's size, 33 frames", run(way, "raft", short))
        for minutes, path in long.items():
            show(f"dynamic degree, Farneback, {minutes:g} min", run("batched", "farneback", path))
        for minutes, path in long.items():
            show(f"all of --quick, Farneback, {minutes:g} min", run("all", "farneback", path))


def repeated(count: int):
    """A long clip of 128 x 128, one frame at a time."""
    frames = render(make_scene(0, 1, motion="rich", frames=32, size=128))
    for number in range(count):
        place = number % 62
        yield frames[place if place < 32 else 62 - place]


def run(way: str, flow: str, folder: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    call = [sys.executable, __file__, "--one", way, flow, str(folder)]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def show(name: str, found: dict[str, float]) -> None:
    """One line of the table."""
    print(f"{name:36} {found['clips_per_s']:9.3f} {found['peak_mb']:9.0f}", flush=True)


def measure(way: str, flow: str, folder: str) -> dict[str, float]:
    """Time and peak resident memory above what was there before."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    estimator = RaftFlow(RaftConfig().build(), iterations=20) if flow == "raft" else farneback
    files = sorted(Path(folder).glob("*.mp4"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    for file in files:
        if way == "all":
            measure_clip(Clip(file), estimator, blend, quick=True)
        elif way == "batched":
            clip = Clip(file)
            dynamic_degree(clip, clip.fps, estimator)
        else:
            loop(file, estimator)
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"clips_per_s": len(files) / seconds, "peak_mb": peak}


def loop(file: Path, estimator) -> None:
    """What one would write first: decode everything, then one pair after the other."""
    clip = Clip(file)
    frames = np.stack(list(clip))[:: interval(clip.fps)]
    with torch.inference_mode():
        for one, two in pairwise(frames):
            top_magnitude(estimator(to_video((one, two)))[0, :, 0].numpy(), 0.05)


if __name__ == "__main__":
    main()
