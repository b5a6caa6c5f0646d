r"""When MoGAN has had its effect, and what R1 and R2 are for: motion, form and the gap of logits after more and more iterations.

    mogan study table1 --out runs/study --column dmd --seeds 3 --prompts 64 --clips 4
    python benchmarks/when_to_stop.py runs/study --at 20 40 60 80
    python benchmarks/when_to_stop.py runs/study --at 40 80 160 320 --figure penalties.png \
        --recipes mogan_lab mogan.study.columns:no_r1r2 mogan.study.columns:printed_r1r2

A run is stopped at each number, exported, sampled on the study's held-out prompts and measured, and goes on: an hour and a half
of one core for 80 iterations of one recipe with three seeds. Prints a table in Markdown for each recipe: what the student has, and
its difference from the DMD student that it began as, clip by clip on the same prompt and number, with 95 % intervals over prompts
and training seeds.

What was measured of a recipe and seed is kept in STUDY/when_to_stop/RECIPE/seedN.json.gz, number by number. Started again it goes on
where it stopped; such files may be copied from another machine, and what they hold is not done again.
"""

import argparse
import gzip
import json
import subprocess
import sys
from itertools import chain
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from mogan.disk.files import replacing
from mogan.evaluation.results import read_results
from mogan.evaluation.sets import paired
from mogan.evaluation.statistics import mean_interval
from mogan.runs.checkpoint import student_checkpoint
from mogan.runs.watch import read_records

METRICS = {
    "dynamic_degree": "dynamic degree",
    "lab_net": "net displacement",
    "lab_speed": "true speed",
    "lab_pulsing": "pulsing",
    "lab_physics": "distance from physics",
    "lab_identity": "identity",
    "lab_shape": "shape",
}
LOGGED = {"gap": "gap of logits", "r1": "R1", "motion_gradient": "norm of the student's motion gradient"}
LAST = 20  # iterations that logged numbers are means of
Kept = dict[str, dict[str, Any]]  # by number of iterations: "clips", and what was logged


def mogan(*words: Any) -> None:
    """One command, in a process of its own."""
    subprocess.run([sys.executable, "-m", "mogan", *map(str, words)], check=True)


def measured(study: Path, model: Path, home: Path, clips: int) -> list[dict]:
    """Clips of a model on the study's prompts: prompt, number and metrics."""
    prompts, samples, results = study / "held_out.txt", home / "samples", home / "results.json"
    mogan("sample", "--model", model, "--prompts", prompts, "--seeds", clips, "--out", samples)
    mogan("evaluate", samples, "--quick", "--out", results)
    found = next(iter(read_results(results).values()))["clips"]
    return [
        {"prompt": c["prompt"], "index": c["index"], "values": {m: c["values"].get(m) for m in METRICS}}
        for c in found
        if "values" in c
    ]


def logged(run: Path, at: int) -> dict[str, float]:
    """Means over the iterations just before ``at``."""
    rows = [row for row in read_records(run / "metrics.jsonl") if at - LAST <= row["iteration"] < at]
    found = {name: [row[name] for row in rows if name in row] for name in ("gap", "r1")}
    found["motion_gradient"] = [row["grad_norm"] for row in rows if row["update"] == "student<gan"]
    return {name: mean(values) for name, values in found.items() if values}


def follow(given: argparse.Namespace, recipe: str, seed: int) -> Kept:
    """Train one recipe with one seed, stop at each number and measure what is not measured."""
    start = given.study / "dmd" / f"seed{seed}" / "export"
    home = given.study / "when_to_stop" / recipe.rpartition(":")[2]
    kept, work = home / f"seed{seed}.json.gz", home / f"seed{seed}"
    found: Kept = json.loads(gzip.decompress(kept.read_bytes())) if kept.is_file() else {}
    for at in sorted({0, *given.at}):
        if str(at) in found:
            continue
        model = work / str(at) / "export" if at else start
        if not model.exists():
            about = ("--data", given.study / "cache", "--student", start, "--seed", seed, "--iterations", at)
            mogan("train", recipe, *about, "--out", work / "run")
            if (reached := int(student_checkpoint(work / "run").name)) != at:
                raise SystemExit(f"{work / 'run'} is at {reached} iterations already: remove it to measure {at}")
            mogan("export", work / "run", "--out", model)
        clips = measured(given.study, model, work / str(at), given.clips)
        found[str(at)] = {"clips": clips, **(logged(work / "run", at) if at else {})}
        with replacing(kept) as temporary:
            temporary.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
    return found


def gained(runs: list[Kept], at: int, metric: str) -> tuple[float, float, float, float]:
    """Mean of a metric over training seeds and clips; of its difference from the start, mean and 95 % interval over prompts and seeds."""
    values = [v for run in runs for c in run[str(at)]["clips"] if (v := c["values"].get(metric)) is not None]
    pairs = [paired(run["0"]["clips"], run[str(at)]["clips"], metric) for run in runs]
    gaps, prompts = (list(chain.from_iterable(part)) for part in zip(*pairs, strict=True))
    seeds = [seed for seed, (found, _) in enumerate(pairs) for _ in found]
    low, high = mean_interval(gaps, prompts, *([seeds] if len(runs) > 1 else [])).ci95 or (nan, nan)
    return mean(values), mean(gaps), low, high


def table(runs: list[Kept], numbers: list[int]) -> None:
    """Print what was measured of one recipe, a row for each number of iterations."""
    logs = [name for name in LOGGED if any(name in run[str(at)] for run in runs for at in numbers)]
    names = [*METRICS.values(), *(LOGGED[name] for name in logs)]
    print(f"| iterations | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for at in (0, *numbers):
        cells = []
        for metric in METRICS:
            value, gain, low, high = gained(runs, at, metric)
            cells.append(f"{value:.3f}" + (f", {gain:+.3f} [{low:+.3f}, {high:+.3f}]" if at else ""))
        for name in logs:
            cells.append(", ".join(f"{run[str(at)][name]:.3g}" for run in runs if name in run[str(at)]))
        print(f"| {at} | {' | '.join(cells)} |")


def draw(found: dict[str, list[Kept]], numbers: list[int], path: Path) -> None:
    """Motion, form and gap over iterations, a line with its interval for each recipe."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from mogan.report.figures import STYLE

    panels = ("dynamic_degree", "lab_net", "lab_shape", "lab_identity", "gap")
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 3.4), layout="constrained")
        for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            axis.set(title=METRICS.get(panel) or LOGGED[panel], xlabel="iterations")
            for colour, (recipe, runs) in enumerate(found.items()):
                if panel in METRICS:
                    points = [gained(runs, at, panel) for at in (0, *numbers)]
                    axis.plot((0, *numbers), [p[1] for p in points], "o-", color=f"C{colour}", label=recipe)
                    low, high = ([p[side] for p in points] for side in (2, 3))
                    axis.fill_between((0, *numbers), low, high, color=f"C{colour}", alpha=0.15, lw=0)
                    axis.set_ylabel("more than DMD's")
                    continue
                for run in runs:  # a line for each seed: gaps are not of clips
                    axis.plot(numbers, [run[str(at)].get(panel, nan) for at in numbers], "o-", color=f"C{colour}")
        figure.axes[0].legend(frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """Train, stop, measure; print the tables, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of `mogan study`, with DMD students")
    parser.add_argument("--at", type=int, nargs="+", default=[20, 40, 60, 80])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=2, help="per prompt")
    parser.add_argument("--recipes", nargs="+", default=["mogan_lab"])
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    given = parser.parse_args()
    found = {
        recipe.rpartition(":")[2]: [follow(given, recipe, seed) for seed in given.seeds] for recipe in given.recipes
    }
    for recipe, runs in found.items():
        print(f"\n{recipe}\n")
        table(runs, sorted(given.at))
    if given.figure:
        draw(found, sorted(given.at), given.figure)


if __name__ == "__main__":
    main()
