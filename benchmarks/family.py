"""How well clips of the lab keep to their captions, those that move and those at rest apart; and what they look like.

    mogan lab render --out runs/family/world --clips 64 --seed 2
    mogan sample --prompts runs/family/world/metadata.jsonl --model lab-teacher --seeds 2 --out runs/family/teacher
    mogan sample --prompts runs/family/world/metadata.jsonl --model lab --seeds 2 --out runs/family/dmd
    mogan evaluate runs/family/world runs/family/teacher runs/family/dmd --quick --out runs/family/results.json
    python benchmarks/family.py runs/family/results.json --sheet runs/family/clips.jpg

prints a table in Markdown, means with 95 % intervals over prompts, and draws a clip of every prompt, the systems side by side.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mogan.data.video import contact_sheet, read_video
from mogan.evaluation.results import read_results
from mogan.evaluation.statistics import mean_interval
from mogan.world.captions import parse_caption

MOVES = {
    "lab_shape": "shape agrees",
    "lab_direction": "direction agrees",
    "lab_physics": "distance from physics, px",
    "lab_travels": "travels",
    "lab_count": "number agrees",
    "lab_still": "still",
    "lab_colour": "colour agrees",
    "lab_identity": "identity",
    "lab_pulsing": "pulsing",
    "lab_net": "net displacement, px/frame",
}
RESTS = {"lab_shape": "shape agrees", "lab_still": "still", "lab_count": "number agrees"}


def rests(clip: dict[str, Any]) -> bool:
    """Whether the caption says at rest."""
    said = parse_caption(clip["prompt"])
    return said is not None and said.kind == "still"


def row(systems: dict[str, Any], metric: str, at_rest: bool) -> list[str]:
    """One metric of every system: mean and interval over the clips of such captions."""
    cells = []
    for system in systems.values():
        clips = [c for c in system["clips"] if "error" not in c and rests(c) == at_rest]
        values = [c["values"].get(metric) for c in clips]
        numbers = [float("nan") if v is None else v for v in values]
        found = mean_interval(numbers, [c["prompt"] for c in clips])
        low, high = found.ci95 or (float("nan"), float("nan"))
        cells.append(f"{found.mean:.2f} [{low:.2f}, {high:.2f}]")
    return cells


def main() -> None:
    """Print the table, draw the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="of `mogan evaluate`")
    parser.add_argument("--sheet", type=Path, help="draw this picture: four moments of each clip")
    given = parser.parse_args()
    systems = read_results(given.results)
    print(f"| captions | | {' | '.join(systems)} |\n|---|---|{'---|' * len(systems)}")
    for at_rest, names in ((False, MOVES), (True, RESTS)):
        for metric, name in names.items():
            cells = row(systems, metric, at_rest)
            print(f"| {'at rest' if at_rest else 'that move'} | {name} | {' | '.join(cells)} |")
    if given.sheet:
        clips = [{c["prompt"]: c for c in reversed(s["clips"]) if "error" not in c} for s in systems.values()]
        prompts = sorted(set.intersection(*map(set, clips)))
        rows = [np.stack([moments(given.results.parent / c[prompt]["file"]) for c in clips]) for prompt in prompts]
        drawn = given.sheet.with_suffix(".png")
        contact_sheet(rows, drawn, titles=[f"{prompt}: {', '.join(systems)}" for prompt in prompts], height=48)
        Image.open(drawn).save(given.sheet, quality=80)


def moments(path: Path, count: int = 4) -> np.ndarray:
    """Frames of a clip beside each other, from the first to the last."""
    frames = read_video(path)[0]
    return np.concatenate(list(frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]), 1)


if __name__ == "__main__":
    main()
