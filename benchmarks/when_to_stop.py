"""When MoGAN has had its effect: motion and form of its student after more and more iterations, against DMD's.

    mogan study table1 --out runs/study --column dmd --seeds 3 --prompts 64 --clips 4
    python benchmarks/when_to_stop.py runs/study --at 20 40 60 80 --seeds 0 1 2

A run is stopped at each number, exported, sampled on the study's held-out prompts and measured, and goes on: an hour and a half
of one core with three seeds. Prints a table in Markdown: what the student has, and its difference from the DMD student that it
began as, clip by clip on the same prompt and number, with 95 % intervals over prompts. Started again it goes on where it stopped.
"""

import argparse
import subprocess
import sys
from itertools import chain
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from mogan.evaluation.results import read_results
from mogan.evaluation.sets import paired
from mogan.evaluation.statistics import mean_interval

METRICS = {
    "dynamic_degree": "dynamic degree",
    "lab_net": "net displacement",
    "lab_speed": "true speed",
    "lab_pulsing": "pulsing",
    "lab_physics": "distance from physics",
    "lab_identity": "identity",
    "lab_shape": "shape",
}


def mogan(*words: Any) -> None:
    """One command, in a process of its own."""
    subprocess.run([sys.executable, "-m", "mogan", *map(str, words)], check=True)


def measured(study: Path, model: Path, home: Path, clips: int) -> list[dict]:
    """Clips of a model on the study's prompts."""
    prompts, samples, results = study / "held_out.txt", home / "samples", home / "results.json"
    mogan("sample", "--model", model, "--prompts", prompts, "--seeds", clips, "--out", samples)
    mogan("evaluate", samples, "--quick", "--out", results)
    return next(iter(read_results(results).values()))["clips"]


def main() -> None:
    """Train, stop, measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of `mogan study`, with DMD students")
    parser.add_argument("--at", type=int, nargs="+", default=[20, 40, 60, 80])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=2, help="per prompt")
    parser.add_argument("--recipe", default="mogan_lab")
    given = parser.parse_args()
    found: dict[int, list[list[dict]]] = {0: [], **{at: [] for at in given.at}}
    for seed in given.seeds:
        start, home = given.study / "dmd" / f"seed{seed}" / "export", given.study / "when_to_stop" / f"seed{seed}"
        found[0].append(measured(given.study, start, home / "0", given.clips))
        for at in sorted(given.at):
            about = ("--data", given.study / "cache", "--student", start, "--seed", seed, "--iterations", at)
            if not (home / str(at) / "export").exists():
                mogan("train", given.recipe, *about, "--out", home / "run")
                mogan("export", home / "run", "--out", home / str(at) / "export")
            found[at].append(measured(given.study, home / str(at) / "export", home / str(at), given.clips))
    table(found)


def table(found: dict[int, list[list[dict]]]) -> None:
    """Print what was measured: clips by number of iterations, 0 for DMD's, a list for each training seed."""
    print(f"| iterations | {' | '.join(METRICS.values())} |\n|---|{'---|' * len(METRICS)}")
    for at, runs in found.items():
        cells = []
        for metric in METRICS:
            values = [v for run in runs for c in run if (v := c.get("values", {}).get(metric)) is not None]
            cell, pairs = (
                f"{mean(values):.3f}",
                [paired(dmd, run, metric) for run, dmd in zip(runs, found[0], strict=True)],
            )
            if at:
                gaps, prompts = (list(chain.from_iterable(part)) for part in zip(*pairs, strict=True))
                low, high = mean_interval(gaps, prompts).ci95 or (nan, nan)
                cell += f", {mean(gaps):+.3f} [{low:+.3f}, {high:+.3f}]"
            cells.append(cell)
        print(f"| {at} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
