"""A data set of your own: videos in a folder, one line of metadata.jsonl each. Here they are drawn; yours come from anywhere.

python examples/own_dataset.py runs/balls
mogan prepare runs/balls --out runs/balls_cache
mogan train dmd_lab --data runs/balls_cache --out runs/balls_dmd --iterations 2
"""

import json
import sys
from pathlib import Path

import numpy as np

from mogan.data.video import write_video

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}


def ball(colour, seed, frames=24, size=64):
    """A ball that bounces from the walls: uint8 (F, H, W, 3)."""
    random = np.random.default_rng(seed)
    place, speed, radius = random.uniform(16, size - 16, 2), random.uniform(-4, 4, 2), size // 8
    y, x = np.mgrid[:size, :size]
    video = np.full((frames, size, size, 3), 235, np.uint8)
    for frame in video:
        frame[(x - place[0]) ** 2 + (y - place[1]) ** 2 < radius**2] = COLOURS[colour]
        speed = np.where((place + speed < radius) | (place + speed > size - radius), -speed, speed)
        place = place + speed
    return video


def main(folder, clips=12):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for number in range(clips):
            colour = list(COLOURS)[number % len(COLOURS)]
            write_video(folder / f"{number:03}.mp4", ball(colour, number), fps=16)
            row = {"file_name": f"{number:03}.mp4", "caption": f"a {colour} circle bouncing"}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
