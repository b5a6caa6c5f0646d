r"""How much the clips of one prompt differ in motion, and how much in look: what Phased DMD (arXiv 2510.27684) is to keep.

    mogan study signatures --column phased --column dmd_long --column teacher --out OUT       # 5 clips a prompt
    python benchmarks/variety.py teacher=OUT/teacher/seed0/samples "Phased DMD=OUT/phased/seed0/samples" ... \
           DMD=OUT/dmd_long/seed0/samples ... --world OUT/world

    mogan sample --model MODEL --prompts few.txt --seeds 8 --out CLIPS
    python benchmarks/variety.py LABEL=CLIPS ... --sheet FILE.png --prompt "a blue triangle bouncing"

Folders of one label are training seeds of one recipe: intervals (95 %) are over prompts and training seeds. A number is the mean over
prompts of the deviation among the clips of one prompt and folder, of the caption's first thing as the tracker finds it:

- position at half time, pixels, both axes together;
- direction from the first frame to half time, degrees around the circle, of clips that cover a pixel (of 64) at least; directions
  drawn at random have 73;
- speed, pixels a frame: the median over chords of four frames, so that a tracker which jumps once does not count.

The last two are of captions in which something moves from its place: not of those at rest or spinning.

A deviation is the root of half the mean square between two clips, so it does not grow with their number. A clip whose thing is not
found at half time has no position; "found" is the share of those that have. Variety of looks is the mean distance between middle
frames, as in the tables of studies, in deviations of the real clips of --world (else of the first label's). Prompts that only
some folders have are left out.

The sheet shows the clips of a prompt side by side, a row a label: the frame at half time and the way of the thing, from the white
dot to the black one.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from mogan.data.video import contact_sheet, read_video
from mogan.evaluation.appearance import frame_features
from mogan.evaluation.clips import Entry, named_folder, read_folder
from mogan.evaluation.sets import deviations
from mogan.evaluation.statistics import mean_interval
from mogan.world.captions import parse_caption
from mogan.world.laws import CHORD
from mogan.world.scenes import SIZE
from mogan.world.tracking import track

SHOWN = ("position, px", "direction, degrees", "speed, px/frame", "looks", "found")
Seen = dict[str, np.ndarray]  # of one clip; what was not found is NaN


def seen(frames_FHW3: np.ndarray, caption: str) -> Seen:
    """Place at half time ``(2,)``, way from the first frame to there as an angle ``(1,)``, speed ``(1,)``, look ``(40,)``."""
    said = parse_caption(caption)
    assert said is not None, f"not a caption of the lab: {caption!r}"
    way, half = track(frames_FHW3, said).centres_F2, len(frames_FHW3) // 2
    x, y = way[half] - way[0]
    chords = np.linalg.norm(way[CHORD:] - way[:-CHORD], axis=1) / CHORD
    chords, travels = chords[np.isfinite(chords)], said.kind not in ("still", "rotating")
    moved = travels and np.hypot(x, y) >= min(frames_FHW3.shape[1:3]) / SIZE  # else it has no direction
    return {
        "place": way[half],
        "angle": np.array([np.arctan2(y, x) if moved else np.nan]),
        "speed": np.array([np.median(chords) if travels and len(chords) else np.nan]),
        "look": frame_features(frames_FHW3[half]),
    }


def deviation(values: Sequence[np.ndarray], gap: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> float:
    """Root of half the mean square between two of some vectors; NaN of fewer than two that are numbers.

    ``gap`` changes differences first, as where they go round a circle.
    """
    kept = [value for value in values if np.isfinite(value).all()]
    squares = [np.square(gap(a - b)).sum() for a, b in combinations(kept, 2)]
    return float(np.sqrt(np.mean(squares) / 2)) if squares else np.nan


def turned(angle: np.ndarray) -> np.ndarray:
    """The same angle within half a turn of 0."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def varied(clips: list[Seen], unit_D: np.ndarray) -> list[float]:
    """What is shown, of the clips of one prompt."""
    place, angle, speed, look = ([clip[name] for clip in clips] for name in ("place", "angle", "speed", "look"))
    looks = [np.sqrt(np.square((a - b) / unit_D).mean()) for a, b in combinations(look, 2)]
    found = np.mean([np.isfinite(one).all() for one in place])
    turns = np.degrees(deviation(angle, turned))
    return [deviation(place), float(turns), deviation(speed), float(np.mean(looks)), float(found)]


def by_prompt(folder: Path) -> dict[str, list[Entry]]:
    """Its clips, prompt by prompt, in the order of their numbers; prompts of a single clip are left out."""
    found: dict[str, list[Entry]] = {}
    for clip in sorted(read_folder(folder, folder.name).clips, key=lambda clip: (clip.prompt, clip.index)):
        found.setdefault(clip.prompt, []).append(clip)
    return {prompt: clips for prompt, clips in found.items() if len(clips) > 1}


def with_way(frames_FHW3: np.ndarray, caption: str, times: int = 2) -> np.ndarray:
    """The frame at half time, so many times as large, and on it the way, from a white dot to a black one."""
    said = parse_caption(caption)
    assert said is not None
    picture = np.ascontiguousarray(frames_FHW3[len(frames_FHW3) // 2].repeat(times, 0).repeat(times, 1))
    way = track(frames_FHW3, said).centres_F2
    points = np.rint((way[np.isfinite(way).all(1)] + 0.5) * times * 16).astype(np.int32)  # in sixteenths of a pixel
    for grey, width in ((0, 3), (255, 1)):
        cv2.polylines(picture, [points[:, None]], False, (grey,) * 3, width, cv2.LINE_AA, 4)
    for place, grey in zip(points[[0, -1]] if len(points) else [], (255, 0), strict=False):
        cv2.circle(picture, place.tolist(), 56, (255 - grey,) * 3, -1, cv2.LINE_AA, 4)
        cv2.circle(picture, place.tolist(), 40, (grey,) * 3, -1, cv2.LINE_AA, 4)
    return np.pad(picture, ((0, 0), (1, 1), (0, 0)), constant_values=255)


def table(found: dict[str, list[tuple[list[float], str, int]]]) -> None:
    """Print means and intervals over prompts and, if there are several, training seeds."""
    print(f"| | {' | '.join(SHOWN)} |\n|---|{'---|' * len(SHOWN)}")
    for label, rows in found.items():
        numbers, prompts, folders = zip(*rows, strict=True)
        factors = [prompts, *([folders] if len(set(folders)) > 1 else [])]
        cells = [mean_interval(column, *factors) for column in zip(*numbers, strict=True)]
        ends = [f" [{i.ci95[0]:.2f}, {i.ci95[1]:.2f}]" if i.ci95 else "" for i in cells]
        print(f"| {label} | {' | '.join(f'{i.mean:.2f}{end}' for i, end in zip(cells, ends, strict=True))} |")


def main() -> None:
    """Print the table; draw a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--world", type=Path, help="folder of real clips, the unit of looks")
    parser.add_argument("--sheet", type=Path, help="PNG: of each label's first folder the clips of a prompt")
    parser.add_argument("--prompt", nargs="+", help="those in the sheet; left out: the first")
    parser.add_argument("--side", type=int, default=8, help="clips side by side in it")
    args = parser.parse_args()
    folders = [(label, by_prompt(folder)) for label, folder in map(named_folder, args.folders)]
    shared = [prompt for prompt in folders[0][1] if all(prompt in prompts for _, prompts in folders)]
    clips = [
        (label, {prompt: [seen(read_video(clip.path)[0], prompt) for clip in prompts[prompt]] for prompt in shared})
        for label, prompts in folders
    ]
    print(
        f"{len(shared)} prompts, {sum(len(some) for some in clips[0][1].values())} clips of them in the first folder\n"
    )
    if args.world:
        real = [read_video(clip.path)[0] for clip in read_folder(args.world, "world").clips]
        unit = deviations(np.array([frame_features(frames[len(frames) // 2]) for frames in real]))
    else:
        unit = deviations(np.array([one["look"] for some in clips[0][1].values() for one in some]))
    found: dict[str, list[tuple[list[float], str, int]]] = {}
    for number, (label, prompts) in enumerate(clips):
        found.setdefault(label, []).extend((varied(some, unit), prompt, number) for prompt, some in prompts.items())
    table(found)
    if args.sheet:
        shown = args.prompt or shared[:1]
        first = dict(reversed(folders))
        rows = [(label, prompt) for prompt in shown for label in dict.fromkeys(label for label, _ in folders)]
        chosen = [first[label][prompt][: args.side] for label, prompt in rows]
        strips = [np.stack([with_way(read_video(clip.path)[0], clip.prompt) for clip in some]) for some in chosen]
        contact_sheet(
            strips, args.sheet, args.side, [f"{label}: {prompt}" for label, prompt in rows], strips[0].shape[1]
        )


if __name__ == "__main__":
    main()
