"""How fast videos are read: our decoding, resampling and shrinking beside PyAV's bare decoding loop.

    python benchmarks/prepare.py [--seconds 8]

The bare loop decodes every frame and throws it away: no reader that uses FFmpeg's decoder can be faster. The video is
made here: a picture of noise that slides, 1280 x 720, 30 frames per second. Everything is measured in turn, round after
round, and the fastest counts. On a machine with other work the share by processor time is the one to trust.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np

from mogan.data.clips import clips_of
from mogan.data.video import read_frames, write_video

SIZES = {"lab, 64 x 64, 16 fps": (64, 64), "Wan, 480 x 832, 16 fps": (480, 832)}


def sliding_noise(frames: int):
    noise = np.random.default_rng(0).integers(0, 256, (90, 400, 3), dtype=np.uint8)
    picture = cv2.resize(noise, (3200, 720), interpolation=cv2.INTER_CUBIC)
    for i in range(frames):
        start = 3 * i % (3200 - 1280)
        yield picture[:, start : start + 1280]


def bare(path: Path) -> None:
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        for _ in file.decode(stream):
            pass


def best_of(rounds: int, works: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """Of each work its fastest wall-clock and processor seconds, over rounds that do one after the other."""
    best = dict.fromkeys(works, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, work in works.items():
            wall, busy = time.perf_counter(), time.process_time()
            work()
            seconds = time.perf_counter() - wall, time.process_time() - busy
            best[name] = min(best[name][0], seconds[0]), min(best[name][1], seconds[1])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=8, help="length of the video")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many rounds counts")
    arguments = parser.parse_args()
    count = 30 * arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.mp4"
        write_video(path, sliding_noise(count), 30, crf=23)
        works: dict[str, Callable[[], None]] = {"bare PyAV decoding": lambda: bare(path)}
        for name, size in SIZES.items():

            def frames(size=size):
                return read_frames(path, fps=16, size=size)

            works[f"{name}: read"] = lambda f=frames: sum(1 for _ in f())
            works[f"{name}: read, cut into clips"] = lambda f=frames: sum(1 for _ in clips_of(f(), 17))
        best = best_of(arguments.repeats, works)
        wall, busy = best["bare PyAV decoding"]
        for name, (seconds, own) in best.items():
            shares = f"{wall / seconds:.2f} of bare decoding, {busy / own:.2f} by processor time"
            print(f"{name:<46} {count / seconds:7.0f} source frames/s, {shares}")


if __name__ == "__main__":
    main()
