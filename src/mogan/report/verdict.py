"""What would change the verdict: how much of a difference between two systems rests on few prompts or on one threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mogan.evaluation.names import METRICS
from mogan.evaluation.sets import paired
from mogan.evaluation.statistics import Interval, mean_interval
from mogan.report.sources import Result

MOTION = ("dynamic_degree", "flow_top5", "lab_net", "lab_speed")  # of which neither more nor less is better in itself
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of VBench's threshold


@dataclass(frozen=True)
class Verdict:
    """One difference of a system from the first, and in words what would change what is said of it."""

    system: str
    label: str
    difference: str
    clear: bool
    change: str


def verdicts(results: Sequence[Result], metrics: Sequence[str]) -> list[Verdict]:
    """For every system but the first and every metric, what would change the verdict."""
    found = []
    for metric in metrics:
        for other in results[1:]:
            gaps, prompts = paired(results[0].good, other.good, metric)
            interval = mean_interval(gaps, prompts) if gaps else None
            if interval is None or interval.ci95 is None:
                continue
            clear = _clear(interval)
            change = _prompts_to_lose(gaps, prompts) if clear else _prompts_to_win(gaps, prompts)
            found.append(Verdict(other.name, METRICS[metric].label, _words(interval), clear, change))
    return found


def in_a_sentence(first: Result, other: Result, metrics: Sequence[str]) -> str:
    """What is clear about a system beside the first: does it move more, what became better, what worse."""
    said: dict[str, list[str]] = {"moves more": [], "moves less": [], "better": [], "worse": []}
    compared = False
    for metric in metrics:
        gaps, prompts = paired(first.good, other.good, metric)
        compared |= bool(gaps)
        found = mean_interval(gaps, prompts)
        better = METRICS[metric].better
        if not _clear(found) or (metric not in MOTION and better is None):
            continue
        up = found.mean > 0
        how = ("moves more" if up else "moves less") if metric in MOTION else _way(up, better == "higher")
        said[how].append(f"{METRICS[metric].label.lower()} {signed(found.mean)}")
    parts = [f"{how} ({', '.join(what)})" for how, what in said.items() if what]
    if not compared:
        return f"against {first.name}: nothing can be compared, for no clips share prompt, number and metric"
    if not parts:
        return f"against {first.name}: no difference is clear"
    return f"against {first.name}: {', '.join(parts)}"


def _way(up: bool, higher_is_better: bool) -> str:
    return "better" if up == higher_is_better else "worse"


def _clear(found: Interval) -> bool:
    return found.ci95 is not None and (found.ci95[0] > 0 or found.ci95[1] < 0)


def _words(found: Interval) -> str:
    low, high = found.ci95 or (math.nan, math.nan)
    return f"{signed(found.mean)} ({signed(low)} to {signed(high)})"


def signed(value: float) -> str:
    """A difference with its sign; zero has none."""
    return f"{value:+.3g}" if value else "0"


def prompts_to_lose(gaps: Sequence[float], prompts: Sequence[str]) -> tuple[int | None, str]:
    """How few prompts carry a clear difference.

    Returns:
        The number to leave out, those most in its favour first, until the interval holds zero (None: it is clear on the
        last two, too), and the first of them.
    """
    sign = math.copysign(1, float(np.mean(gaps)))
    totals: dict[str, float] = {}
    for gap, prompt in zip(gaps, prompts, strict=True):
        totals[prompt] = totals.get(prompt, 0.0) + sign * gap
    order = sorted(totals, key=lambda prompt: -totals[prompt])
    for count in range(1, len(order) - 1):
        out = set(order[:count])
        kept = [(gap, prompt) for gap, prompt in zip(gaps, prompts, strict=True) if prompt not in out]
        if not _clear(mean_interval([gap for gap, _ in kept], [prompt for _, prompt in kept])):
            return count, order[0]
    return None, order[0]


def prompts_to_win(gaps: Sequence[float], prompts: Sequence[str]) -> int | None:
    """With how many prompts a difference as large and as spread out would be clear; None where it is zero."""
    mean = abs(float(np.mean(gaps)))
    low, high = mean_interval(gaps, prompts).ci95 or (math.nan, math.nan)
    half = (high - low) / 2
    if mean == 0 or not math.isfinite(half):
        return None
    return math.ceil(len(set(prompts)) * (half / mean) ** 2)


def _prompts_to_lose(gaps: Sequence[float], prompts: Sequence[str]) -> str:
    count, first = prompts_to_lose(gaps, prompts)
    of = len(set(prompts))
    if count is None:
        return f"clear even on the two prompts of {of} that favour it least"
    shown = first if len(first) <= 60 else first[:57] + "..."
    if count == 1:
        return f"rests on one prompt of {of}: without “{shown}” it is not clear"
    return f"clear until the {count} prompts of {of} that favour it most are left out"


def _prompts_to_win(gaps: Sequence[float], prompts: Sequence[str]) -> str:
    wanted, of = prompts_to_win(gaps, prompts), len(set(prompts))
    if wanted is None:
        return "no difference at all"
    if wanted > 100 * of:
        return f"open; so small that more than {100 * of} prompts would be needed"
    return f"open; a difference this large would be clear with about {max(wanted, of + 1)} prompts; here there are {of}"


def threshold_table(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Dynamic degree at other thresholds than VBench's, by system: whether the order of systems hangs on the line.

    The rule of :func:`mogan.evaluation.motion.dynamic_degree` on the pair scores in the results.
    """
    table = []
    for result in results:
        cells = []
        for factor in FACTORS:
            decided = [
                sum(score > factor * clip["threshold"] for score in clip["pair_scores"])
                >= round((len(clip["pair_scores"]) + 1) / 4)
                for clip in result.good
                if clip.get("pair_scores")
            ]
            cells.append(f"{np.mean(decided):.3g}" if decided else "–")
        table.append((result.name, cells))
    return table if any(cell != "–" for _, cells in table for cell in cells) else []
