"""Dynamic degree of one clip by VBench's own code and by ours, one after the other: seconds of a processor, and whether they agree.

    git clone https://github.com/Vchitect/VBench ~/VBench && pip install ...     # what it needs
    python benchmarks/dynamic_degree.py ~/VBench --width 240 --height 136

RAFT has random weights, the same for both: what it costs does not depend on them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mogan.data.video import write_video
from mogan.evaluation.frames import Clip
from mogan.evaluation.motion import dynamic_degree
from mogan.motion.flow import RaftFlow, load_raft
from mogan.world.scenes import make_scene, render


class Settings(SimpleNamespace):
    """What VBench's RAFT asks for with ``in`` and by attribute."""

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and seconds of the processor."""
    began = time.process_time()
    return function(), time.process_time() - began


def main() -> None:
    """Print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vbench", type=Path, help="a checkout of VBench")
    parser.add_argument("--width", type=int, default=240)
    parser.add_argument("--height", type=int, default=136)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sys.path.insert(0, str(given.vbench.expanduser()))
    from vbench.dynamic_degree import DynamicDegree
    from vbench.third_party.RAFT.core.raft import RAFT

    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = Settings(small=False, mixed_precision=False, alternate_corr=False)
    with tempfile.TemporaryDirectory() as folder:
        weights, clip = Path(folder) / "raft-things.pth", Path(folder) / "clip.mp4"
        torch.save(RAFT(settings).state_dict(), weights)
        side = max(given.width, given.height)
        frames = render(make_scene(0, 1, motion="rich", frames=given.frames, size=side))
        write_video(clip, frames[:, : given.height, : given.width], 8)  # every frame is kept at this rate
        settings.model = str(weights)
        theirs, flow = DynamicDegree(settings, torch.device("cpu")), RaftFlow(load_raft(weights), iterations=20)
        pairs = []
        for _ in range(given.rounds):
            their, their_seconds = timed(lambda: theirs.infer(str(clip)))
            our, our_seconds = timed(lambda: dynamic_degree(Clip(clip), Clip(clip).fps, flow).decision)
            pairs.append((their_seconds, our_seconds, their == our))
    ratios = [a / b for a, b, _ in pairs]
    print(
        f"{given.frames} frames of {given.width} x {given.height}: VBench's code {min(a for a, _, _ in pairs):.2f} s, ",
        end="",
    )
    print(f"ours {min(b for _, b, _ in pairs):.2f} s, {statistics.median(ratios):.2f} times as fast", end="")
    print(
        f" ({min(ratios):.2f} to {max(ratios):.2f}); {'same decision' if all(p[2] for p in pairs) else 'DECISIONS DIFFER'}"
    )


if __name__ == "__main__":
    main()
