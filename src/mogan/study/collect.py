"""Measured clips of every column and training seed -> one table with intervals, and Markdown."""

import math
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mogan.evaluation.names import METRICS
from mogan.evaluation.sets import column_of, deviations, look_distance, paired, speed_distance
from mogan.evaluation.statistics import Interval, mean_interval
from mogan.evaluation.table import cell
from mogan.study.columns import Column

Record = dict[str, Any]

SHOWN = (
    "dynamic_degree", "motion_smoothness", "motion_score", "lab_net", "lab_speed", "lab_path", "lab_wobble",
    "lab_pulsing", "lab_straightness", "lab_still", "lab_physics", "lab_identity", "lab_colour", "lab_shape",
    "lab_travels", "lab_count",
    "saturation", "appearance_distance", "variety", "speed_to_rich", "speed_to_world",
)  # fmt: skip
COMPARED = (
    "dynamic_degree",
    "lab_net",
    "lab_speed",
    "lab_wobble",
    "lab_pulsing",
    "lab_physics",
    "lab_identity",
    "lab_shape",
    "lab_travels",
    "saturation",
)
OWN = {
    "variety": "Variety: distance between the looks of a prompt's clips",
    "speed_to_rich": "Speed histogram, distance to the motion-rich set (px/frame)",
    "speed_to_world": "Speed histogram, distance to the teacher's world (px/frame)",
}


def combine(
    column: Column, clips_of_seed: dict[str, list[Record]], rich: list[Record], world: list[Record]
) -> dict[str, Any]:
    """One system of ``results.json``: metrics over all training seeds, and each seed's own means in ``per_seed``.

    Intervals resample prompts and training seeds, each by itself; with one seed, prompts alone.
    """
    clips = [clip for found in clips_of_seed.values() for clip in found if "error" not in clip]
    seeds = [seed for seed, found in clips_of_seed.items() for clip in found if "error" not in clip]
    metrics = _metrics(clips, seeds, rich, world)
    per_seed = {}
    for seed in clips_of_seed:
        own = [clip for clip, of in zip(clips, seeds, strict=True) if of == seed]
        found = _metrics(own, [seed] * len(own), rich, world, intervals=False)
        per_seed[seed] = {name: interval.mean for name, interval in found.items()}
    return {
        "about": column.about,
        "metrics": {name: interval.to_json() for name, interval in metrics.items()},
        "per_seed": per_seed,
    }


def minus(clips_of_seed: dict[str, list[Record]], base_of_seed: dict[str, list[Record]]) -> dict[str, Any]:
    """A system's clips minus a base's, clip by clip on the same training seed, prompt and number: means and intervals.

    What both have in common, such as an easy prompt, cancels, so these intervals are narrower than those of two means.
    A system that is not trained has the same clips for every seed.
    """
    found = {}
    for name in COMPARED:
        rows: list[tuple[float, str, str]] = []
        for seed, base in base_of_seed.items():
            clips = clips_of_seed.get(seed) or next(iter(clips_of_seed.values()))
            rows += [(gap, prompt, seed) for gap, prompt in zip(*paired(base, clips, name), strict=True)]
        if rows:
            gaps, prompts, seeds = zip(*rows, strict=True)
            found[name] = mean_interval(gaps, *_factors(prompts, seeds)).to_json()
    return found


def _factors(prompts: Sequence[str], seeds: Sequence[str]) -> tuple[Sequence[str], ...]:
    """What is resampled: prompts, and training seeds if there are several."""
    return (prompts, seeds) if len(set(seeds)) > 1 else (prompts,)


def _metrics(
    clips: list[Record], seeds: Sequence[str], rich: list[Record], world: list[Record], *, intervals: bool = True
) -> dict[str, Interval]:
    factors = _factors([clip["prompt"] for clip in clips], seeds) if intervals else ()
    found: dict[str, Interval] = {}
    for name in METRICS:
        values = column_of(clips, name)
        if any(map(math.isfinite, values)):
            found[name] = mean_interval(values, *factors)
    distances = {
        "appearance_distance": look_distance(clips, world, *factors),  # the look is to stay the teacher's world's
        "variety": variety_of(clips, seeds, world) if world else None,
        "speed_to_rich": speed_distance(clips, rich, *factors),
        "speed_to_world": speed_distance(clips, world, *factors),
    }
    return found | {name: distance for name, distance in distances.items() if distance}


def variety_of(clips: list[Record], seeds: Sequence[str], world: list[Record]) -> Interval | None:
    """Mean distance between the looks of clips of one prompt and training seed, in the deviations of real ones; None of single clips.

    Looks are the 40 numbers of :func:`mogan.evaluation.appearance.frame_features`, per root of their number: real clips of
    different captions lie about 1.4 apart.
    """
    scale = deviations(np.array([clip["features"] for clip in world]))
    looks: dict[tuple[str, str], list[np.ndarray]] = {}
    for clip, seed in zip(clips, seeds, strict=True):
        looks.setdefault((clip["prompt"], seed), []).append(np.array(clip["features"]) / scale)
    rows = [
        (float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in combinations(found, 2)])), *whose)
        for whose, found in looks.items()
        if len(found) > 1
    ]
    if not rows:
        return None
    values, prompts, of = zip(*rows, strict=True)
    return mean_interval(values, *_factors(prompts, of))


# ---------------------------------------------------------------------------------------------- Markdown


def markdown(title: str, results: dict[str, Any]) -> str:
    """The table, its bars and how it was made, as a page."""
    systems = results["systems"]
    names = [n for n in SHOWN if any(n in s["metrics"] for s in systems.values())]
    lines = [f"# {title}", "", results["how"]["sentence"], *_about_seeds(systems), ""]
    lines += ["```", *_wrapped(results["how"]["command"]), "```", ""]
    lines += ["| | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    for name in names:
        cells = [cell(s["metrics"].get(name)) for s in systems.values()]
        lines.append(f"| {_label(name)} | " + " | ".join(cells) + " |")
    lines += _costs(systems) + _speeds(systems)
    lines += ["", "Systems:", ""]
    lines += [f"- `{name}`: {system['about']}{_cost(system)}" for name, system in systems.items()]
    lines += _differences(systems)
    if results["bars"]:
        lines += ["", "| expected | found | holds |", "|---|---|---|"]
        lines += [f"| {b['says']} | {b['found']} | {'yes' if b['holds'] else '**no**'} |" for b in results["bars"]]
    lines += ["", "Per training seed:", "", "| | seed | " + " | ".join(map(_label, names)) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for name, system in systems.items():
        for seed, means in system["per_seed"].items():
            cells = [f"{means[n]:.3g}" if n in means else "-" for n in names]
            lines.append(f"| {name} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _about_seeds(systems: dict[str, Any]) -> list[str]:
    """What few training seeds mean for the intervals, as a paragraph; none where there are many, or one."""
    seeds = max(len(system["per_seed"]) for system in systems.values())
    if not 1 < seeds < 6:
        return []
    return [
        "",
        f"Intervals over {seeds} seeds reach no farther than the seeds: where seeds differ more than prompts do, they cover less than 95 %.",
    ]


def _wrapped(command: str, width: int = 116) -> list[str]:
    """A command as a shell takes it back over several lines, an option never apart from its value."""
    lines = [""]
    for word in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _differences(systems: dict[str, Any]) -> list[str]:
    """A table for each column that others are held against, a line per system; in bold what is apart from zero."""
    lines = []
    for base in systems:
        found = {name: gaps for name, system in systems.items() if (gaps := system.get(f"minus_{base}"))}
        if not found:
            continue
        says = "clip by clip on the same training seed, prompt and number; in bold what is apart from zero:"
        lines += ["", f"Minus `{base}`, {says}"]
        lines += ["", "| | " + " | ".join(map(_label, COMPARED)) + " |", "|---" * (len(COMPARED) + 1) + "|"]
        for name, gaps in found.items():
            lines.append(f"| {name} | " + " | ".join(_signed_cell(gaps.get(metric)) for metric in COMPARED) + " |")
    return lines


def _signed_cell(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    if metric["ci95"] is None:
        return f"{metric['mean']:+.3f}"
    low, high = metric["ci95"]
    cell = f"{metric['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{cell}**" if low > 0 or high < 0 else cell


def _costs(systems: dict[str, Any]) -> list[str]:
    """Two lines of the table: what training from the teacher took, means over training seeds."""
    costs = [system.get("from_teacher") for system in systems.values()]
    if not any(costs):
        return []
    updates = [f"{cost['updates']:.0f}" if cost else "-" for cost in costs]
    minutes = [f"{cost['seconds'] / 60:.1f}" if cost else "-" for cost in costs]
    return [
        f"| Student updates, from the teacher on | {' | '.join(updates)} |",
        f"| Training, from the teacher on (core-minutes) | {' | '.join(minutes)} |",
    ]


def _speeds(systems: dict[str, Any]) -> list[str]:
    """Two lines of the table: what a clip takes."""
    calls = [f"{system['calls']:g}" if "calls" in system else "-" for system in systems.values()]
    seconds = [f"{system['seconds_a_clip']:.2f}" if "seconds_a_clip" in system else "-" for system in systems.values()]
    return [
        f"| Network calls for a clip | {' | '.join(calls)} |",
        f"| Sampling and decoding a clip, loading shared (core-seconds) | {' | '.join(seconds)} |",
    ]


def _label(name: str) -> str:
    return OWN.get(name) or METRICS[name].title


def _cost(system: dict[str, Any]) -> str:
    seconds = system.get("training_seconds")
    return f" ({sum(seconds.values()) / len(seconds) / 60:.1f} minutes of training)" if seconds else ""
