"""What would change the verdict: how much of a difference between two systems rests on few prompts or on one threshold."""

import math
from collections.abc import Mapping, Sequence
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
    """One difference of a system from its base, and in words what would change what is said of it."""

    system: str
    base: str
    label: str
    difference: str
    clear: bool
    change: str


def held_against(results: Sequence[Result], bases: Mapping[str, Sequence[str]]) -> list[tuple[Result, list[Result]]]:
    """Every system that is compared, with those it is held against: its bases where they are here, else the first.

    Without any bases, the first and the one before.
    """
    known = {result.name: result for result in results}
    found = []
    for number, result in enumerate(results):
        named = [known[name] for name in bases.get(result.name, ()) if name in known and name != result.name]
        before = [] if bases or number < 2 else [results[number - 1]]
        if named or number:
            found.append((result, named or [results[0], *before]))
    return found


def verdicts(pairs: Sequence[tuple[Result, Result]], metrics: Sequence[str]) -> list[Verdict]:
    """For every metric and every pair of a system and its base, what would change the verdict."""
    found = []
    for metric in metrics:
        for other, base in pairs:
            gaps, prompts = paired(base.good, other.good, metric)
            interval = mean_interval(gaps, prompts) if gaps else None
            if interval is None or interval.ci95 is None:
                continue
            clear = _clear(interval)
            change = _prompts_to_lose(gaps, prompts) if clear else _prompts_to_win(gaps, prompts)
            found.append(Verdict(other.name, base.name, METRICS[metric].label, _words(interval), clear, change))
    return found


@dataclass(frozen=True)
class Difference:
    """A clear difference of a metric; ``firmness`` is its distance from zero in halves of its interval."""

    how: str
    words: str
    firmness: float


def clear_differences(base: Result, other: Result, metrics: Sequence[str]) -> list[Difference] | None:
    """What is clear about a system beside another: does it move more, what became better, what worse.

    None if no clips share prompt, number and metric.
    """
    found, compared = [], False
    for metric in metrics:
        gaps, prompts = paired(base.good, other.good, metric)
        compared |= bool(gaps)
        interval, better = mean_interval(gaps, prompts), METRICS[metric].better
        if not _clear(interval) or (metric not in MOTION and better is None):
            continue
        up = interval.mean > 0
        how = ("moves more" if up else "moves less") if metric in MOTION else _way(up, better == "higher")
        words = f"{METRICS[metric].label.lower()} {signed(interval.mean)}"
        found.append(Difference(how, words, _firmness(interval)))
    return found if compared else None


def in_full(base: Result, other: Result, metrics: Sequence[str]) -> str:
    """Everything that is clear about a system beside another."""
    found = clear_differences(base, other, metrics)
    if found is None:
        return f"against {base.name}: nothing can be compared, for no clips share prompt, number and metric"
    if not found:
        return f"against {base.name}: no difference is clear"
    said: dict[str, list[str]] = {"moves more": [], "moves less": [], "better": [], "worse": []}
    for one in found:
        said[one.how].append(one.words)
    parts = [f"{how} ({', '.join(what)})" for how, what in said.items() if what]
    return f"against {base.name}: {', '.join(parts)}"


def in_a_sentence(base: Result, other: Result, metrics: Sequence[str]) -> str:
    """How a system's motion differs from another's, and of all else the clear gain and the clear loss farthest from zero.

    Farthest in halves of their intervals, for metrics have different units.
    """
    found = clear_differences(base, other, metrics)
    if found is None:
        return f"cannot be compared with {base.name}: no clips share prompt, number and metric"
    if not found:
        return f"differs clearly from {base.name} in nothing"
    gain, loss = (_firmest(found, how) for how in ("better", "worse"))
    if not gain and not loss:
        return f"{_motion(base.name, found)}; nothing else is clear"
    gained = f"gains most in {gain.words}" if gain else "gains nothing else"
    lost = f"loses most in {loss.words}" if loss else "loses nothing clearly"
    return f"{_motion(base.name, found)}, {gained} and {lost}"


def _motion(base: str, found: Sequence[Difference]) -> str:
    """Whether it moves more or less, by the metric where that is firmest; both where metrics of motion disagree."""
    more, less = (_firmest(found, how) for how in ("moves more", "moves less"))
    if more and less:
        return f"moves more than {base} by one measure ({more.words}) and less by another ({less.words})"
    if one := more or less:
        return f"{one.how} than {base} ({one.words})"
    return f"moves neither clearly more nor clearly less than {base}"


def _firmest(found: Sequence[Difference], how: str) -> Difference | None:
    return max((one for one in found if one.how == how), key=lambda one: one.firmness, default=None)


def _firmness(found: Interval) -> float:
    low, high = found.ci95 or (math.nan, math.nan)
    return 2 * abs(found.mean) / (high - low) if high > low else math.inf


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

    def clear_without(count: int) -> bool:
        out = set(order[:count])
        kept = [(sign * gap, prompt) for gap, prompt in zip(gaps, prompts, strict=True) if prompt not in out]
        ends = mean_interval([gap for gap, _ in kept], [prompt for _, prompt in kept]).ci95
        return ends is not None and ends[0] > 0  # clear the other way is lost, too

    # each prompt that is left out brings it nearer to zero, so halving finds where it ends
    clear, lost = 0, len(order) - 1
    while lost - clear > 1:
        middle = (clear + lost) // 2
        clear, lost = (middle, lost) if clear_without(middle) else (clear, middle)
    return (lost, order[0]) if lost < len(order) - 1 else (None, order[0])


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
