"""One figure of a study: motion against appearance, a point per training seed, and the metrics of motion and form with intervals."""

from pathlib import Path
from typing import Any

from mogan.disk.files import replacing
from mogan.evaluation.names import METRICS

PANELS = ("dynamic_degree", "lab_net", "lab_wobble", "lab_shape", "lab_identity")
MARKERS = "o^Dv"  # another after each 20 colours
LETTER, LINE = 0.057, 0.115  # inches that names beside points take, in width and height


def draw(systems: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG."""
    with replacing(path) as temporary:
        figure_of(systems).savefig(temporary, dpi=130)


def figure_of(systems: dict[str, Any]) -> Any:
    """The figure, as matplotlib has it: motion against appearance, then a panel for each of ``PANELS``."""
    from matplotlib import rc_context

    from mogan.report.figures import STYLE

    with rc_context(STYLE):
        return _figure(systems)


def _figure(systems: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4 + 0.16 * len(systems)), layout="constrained")
    axes = figure.subplots(1, 1 + len(PANELS), width_ratios=(3, *(1 for _ in PANELS)))
    looks = [_look(number, system) for number, system in enumerate(systems.values())]
    named = _points(axes[0], systems, looks)
    for panel, metric in zip(axes[1:], PANELS, strict=True):
        _intervals(panel, metric, list(systems.values()), looks)
    labels = [_label(name, system) for name, system in systems.items()]
    axes[1].set_yticks(range(len(systems)), labels)
    for panel in axes[2:]:
        panel.set_yticks(range(len(systems)), [""] * len(systems))
    figure.draw_without_rendering()  # now points have their places on the page
    figure.set_layout_engine("none")
    _name_points(axes[0], named)
    return figure


def _look(number: int, system: dict[str, Any]) -> dict[str, Any]:
    """How a system's marks look: 20 colours, then another shape; hollow if its first frame is given."""
    from matplotlib import colormaps

    colour = colormaps["tab20"].colors[number % 20]  # type: ignore[attr-defined]
    face = "none" if system.get("first_frames", False) else colour
    return {"marker": MARKERS[number // 20 % len(MARKERS)], "markerfacecolor": face, "color": colour, "markersize": 6}


def _label(name: str, system: dict[str, Any]) -> str:
    """The name, and how many calls of the network a clip takes where that is known."""
    if "calls" not in system:
        return name
    return f"{name}, {system['calls']:g} call{'' if system['calls'] == 1 else 's'}"


def _points(axis: Any, systems: dict[str, Any], looks: list[dict[str, Any]]) -> list[tuple[tuple[float, float], str]]:
    """A point per training seed; returns the last of each system, which is to be named."""
    named = []
    for (name, system), look in zip(systems.items(), looks, strict=True):
        points = [
            (means["lab_net"], means["appearance_distance"])
            for means in system["per_seed"].values()
            if {"lab_net", "appearance_distance"} <= means.keys()
        ]
        if points:
            axis.plot(*zip(*points, strict=True), linestyle="none", **look)
            named.append((max(points), name))
    hollow = any(system.get("first_frames") for system in systems.values())
    axis.set(
        xlabel="net displacement, px/frame (tracked, no flow network)",
        ylabel="appearance distance to the teacher's world",
        title="one point per training seed" + "; hollow: first frame given" * hollow,
    )
    axis.margins(x=0.16, y=0.08)  # room for the name of the last point
    heights = [height for line in axis.lines for height in line.get_ydata()]
    if heights and max(heights) > 4 * min(heights) > 0:  # one system far off would squeeze all others together
        _in_ratios(axis)
    return named


def _in_ratios(axis: Any) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.4, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _intervals(panel: Any, metric: str, systems: list[dict[str, Any]], looks: list[dict[str, Any]]) -> None:
    for number, (system, look) in enumerate(zip(systems, looks, strict=True)):
        found = system["metrics"].get(metric)
        if found is None:
            continue
        low, high = found["ci95"] or (found["mean"], found["mean"])
        error = [[found["mean"] - low], [high - found["mean"]]]
        panel.errorbar(found["mean"], number, xerr=error, capsize=3, **look)
    panel.set_ylim(len(systems) - 0.5, -0.5)
    label, unit = METRICS[metric].label, METRICS[metric].unit
    panel.set_title(f"{label}\n{unit}" if unit else label)
    panel.locator_params(axis="x", nbins=4)
    panel.grid(axis="x", alpha=0.3)


def _name_points(axis: Any, named: list[tuple[tuple[float, float], str]]) -> None:
    """Names beside points, from the lowest up; one that would lie on another moves up, and a line leads to its point."""
    from matplotlib.patheffects import withStroke

    dpi, halo = axis.figure.dpi, [withStroke(linewidth=1.2, foreground="white", alpha=0.7)]
    taken: list[tuple[float, float, float]] = []
    for point, name in sorted(named, key=lambda pair: pair[0][1]):
        left, y = axis.transData.transform(point)
        right, height = left + LETTER * dpi * (len(name) + 2), y
        while any(left < end and start < right and abs(height - low) < LINE * dpi for start, end, low in taken):
            height += 1
        taken.append((left, right, height))
        line = {"arrowstyle": "-", "lw": 0.4, "color": "0.6", "shrinkA": 0, "shrinkB": 0} if height > y else None
        offset = (6, (height - y) * 72 / dpi - 3)
        text = axis.annotate(name, point, xytext=offset, textcoords="offset points", fontsize=7, arrowprops=line)
        text.set_path_effects(halo)
