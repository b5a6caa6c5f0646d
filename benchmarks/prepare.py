"""How fast videos are read: our decoding, resampling and shrinking beside PyAV's bare decoding loop.

    python benchmarks/prepare.py [--seconds 8]

The bare loop decodes every frame and throws it away: no reader that uses FFmpeg's decoder can be faster. The video is
made here: a picture of noise that slides, 1280 x 720, 30 frames per second.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np

from mogan.clips import clips_of
from mogan.video import read_frames, write_video

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


def best_of(repeats: int, work: Callable[[], None]) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=8, help="length of the video")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    arguments = parser.parse_args()
    count = 30 * arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.mp4"
        write_video(path, sliding_noise(count), 30, crf=23)
        floor = best_of(arguments.repeats, lambda: bare(path))
        print(f"{'bare PyAV decoding':<34} {count / floor:7.0f} source frames/s")
        for name, size in SIZES.items():

            def frames(size=size):
                return read_frames(path, fps=16, size=size)

            reading = best_of(arguments.repeats, lambda f=frames: sum(1 for _ in f()))
            cutting = best_of(arguments.repeats, lambda f=frames: sum(1 for _ in clips_of(f(), 17)))
            for what, seconds in (("read", reading), ("read, cut into clips", cutting)):
                label = f"{name}: {what}"
                print(f"{label:<46} {count / seconds:7.0f} source frames/s, {floor / seconds:.2f} of bare decoding")


if __name__ == "__main__":
    main()
