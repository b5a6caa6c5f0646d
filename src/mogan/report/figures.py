"""The pictures of a report: intervals, distributions, curves, as matplotlib figures; :func:`to_svg` inlines them."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mogan.evaluation.names import METRICS
from mogan.report.sources import Curves, Result

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9", "#5C5C5C", "#B22222")  # Okabe and Ito
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))  # another after each turn of the colours
HEADLINES = (
    "dynamic_degree", "motion_smoothness", "motion_score", "flow_top5", "lab_net", "lab_speed", "lab_wobble",
    "lab_pulsing",
    "warping_error", "log_jerk", "subject_consistency", "aesthetic_quality", "imaging_quality", "saturation",
    "appearance_distance", "cd_fvd",
)  # fmt: skip
SPREADS = (
    "flow_top5", "lab_speed", "lab_wobble", "motion_smoothness", "warping_error", "subject_consistency",
    "imaging_quality", "saturation",
)  # fmt: skip
SHORT = ("loss",)
TIMES = ("seconds", "core_seconds")  # drawn last
POINTS = 300
INK = "#1c2733"

STYLE = {
    "text.parse_math": False,  # a name with two dollar signs is a name
    "svg.fonttype": "none", "svg.hashsalt": "mogan", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8795a1", "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": "#e3e8ec", "grid.linewidth": 0.7, "axes.axisbelow": True,
}  # fmt: skip


@contextmanager
def characters_told(of: str | None = None) -> Iterator[None]:
    """What matplotlib warns of characters that its font lacks, as one sentence on the picture ``of``; of an SVG none, whose fonts
    are the reader's.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    lacking = dict.fromkeys(re.findall(r"Glyph (\d+) .*missing from", "\n".join(str(one.message) for one in caught)))
    if lacking and of is not None:
        shown = "".join(chr(int(number)) for number in lacking)
        print(
            f"{of}: matplotlib's font lacks {shown[:20]}, drawn as boxes: give such systems other names, as in NAME=DIR"
        )
    for one in caught:
        if "missing from" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


@rc_context(STYLE)
def to_svg(figure: Figure, label: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page, with a name for those who do not see it."""
    buffer = io.StringIO()
    with characters_told():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@rc_context(STYLE)
def interval_figure(results: Sequence[Result]) -> Figure | None:
    """One small panel per headline metric: mean and 95 % interval of every system."""
    names = [n for n in HEADLINES if any(n in r.metrics for r in results)]
    if not names:
        return None
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    size = (9, rows * (0.75 + 0.24 * len(results)))
    figure, axes = _panels(rows, columns, size, gap=0.06)  # with less the outermost numbers of neighbours meet
    for axis, name in zip(axes.flat, names, strict=False):
        for row, result in enumerate(results):
            metric = result.metrics.get(name)
            if metric is None:
                continue
            if metric["ci95"]:
                axis.plot(metric["ci95"], [row, row], color=COLOURS[row % len(COLOURS)], lw=2.4, solid_capstyle="round")
            axis.plot(metric["mean"], row, "o", color=COLOURS[row % len(COLOURS)], ms=5.5)
        axis.set_yticks(range(len(results)), [r.name for r in results])
        axis.set_ylim(len(results) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        _name_axis(axis, name)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[:, 1:].flat:
        axis.set_yticklabels([])
    return figure


@rc_context(STYLE)
def spread_figure(results: Sequence[Result]) -> Figure | None:
    """Every clip as a dot, per system, with quartiles; n beside the names."""
    names = [n for n in SPREADS if any(c["values"].get(n) is not None for r in results for c in r.good)]
    if not names:
        return None
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = _panels(rows, columns, (9, rows * (0.9 + 0.36 * len(results))))
    rng = np.random.default_rng(0)
    for axis, name in zip(axes.flat, names, strict=False):
        labels = []
        for row, result in enumerate(results):
            values = np.array([v for c in result.good if (v := c["values"].get(name)) is not None], float)
            labels.append(f"{result.name}  n={values.size}")
            if not values.size:
                continue
            shown = values if values.size <= POINTS else rng.choice(values, POINTS, replace=False)
            axis.plot(
                shown,
                row + rng.uniform(-0.26, 0.26, shown.size),
                ".",
                color=COLOURS[row % len(COLOURS)],
                ms=3.5 if shown.size > 60 else 6,
                alpha=0.55,
            )
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            axis.plot([low, high], [row, row], color=INK, lw=1.6)
            axis.plot([middle], [row], "|", color=INK, ms=13, mew=1.8)
        if name == "flow_top5":
            axis.axvline(6, color="#8795a1", lw=1, ls="--")
            axis.text(6, -0.58, " VBench's line", fontsize=7.5, color="#5b6b78", va="top")
        axis.set_yticks(range(len(results)), labels)
        axis.set_ylim(len(results) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        _name_axis(axis, name)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    return figure


@rc_context(STYLE)
def curve_figure(runs: Sequence[Curves]) -> Figure | None:
    """Every number a run logs, one panel per update and quantity, several runs in one panel."""
    keys = list(dict.fromkeys(key for run in runs for key, points in run.series.items() if len(points) > 1))
    keys.sort(key=lambda key: (key[1] in TIMES, key[1] not in SHORT))
    if not keys:
        return None
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, axes = _panels(rows, columns, (9, 1.75 * rows))
    for axis, key in zip(axes.flat, keys, strict=False):
        for number, run in enumerate(runs):
            if key not in run.series:
                continue
            x, y = np.array(run.series[key], float).T
            colour = COLOURS[number % len(COLOURS)]
            every = max(1, len(x) // POINTS)
            axis.plot(x[::every], y[::every], color=colour, lw=0.7, alpha=0.35)
            line = LINES[number // len(COLOURS) % len(LINES)]
            axis.plot(x[::every], _smooth(y)[::every], color=colour, ls=line, lw=1.6, label=run.name)
        axis.set_title(f"{key[0]}: {key[1]}" if key[0] else key[1])
        axis.locator_params(axis="both", nbins=4)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    if len(runs) > 1:
        lines = {line.get_label(): line for axis in axes.flat for line in axis.get_legend_handles_labels()[0]}
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=4, frameon=False)
    return figure


def _panels(rows: int, columns: int, size: tuple[float, float], gap: float = 0.02) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=gap))
    return figure, figure.subplots(rows, columns, squeeze=False)


def _name_axis(axis: Axes, name: str) -> None:
    axis.set_title(METRICS[name].title)
    axis.locator_params(axis="x", nbins=5)
    axis.ticklabel_format(axis="x", scilimits=(-3, 4), useOffset=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a twentieth of the run."""
    keep = math.exp(-1 / max(1.0, len(values) / 20))
    mean, out = values[0], []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        out.append(mean)
    return np.array(out)
