"""One figure of a study: motion against appearance, a point per training seed, and the headline metrics as bars."""

from pathlib import Path
from typing import Any

from mogan.disk.files import replacing
from mogan.evaluation.names import METRICS

PANELS = ("dynamic_degree", "lab_net", "lab_wobble")


def draw(systems: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG."""
    from matplotlib import rc_context

    from mogan.report.figures import STYLE

    with rc_context(STYLE):
        _draw(systems, path)


def _draw(systems: dict[str, Any], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4 + 0.12 * len(systems)), layout="constrained")
    axes = figure.subplots(1, 1 + len(PANELS), width_ratios=(2.2, *(1 for _ in PANELS)))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    named = []
    for number, (name, system) in enumerate(systems.items()):
        points = [
            (means["lab_net"], means["appearance_distance"])
            for means in system["per_seed"].values()
            if {"lab_net", "appearance_distance"} <= means.keys()
        ]
        if points:
            colour, given = colours[number % 20], system.get("first_frames", False)
            marker, face = ("s", "none") if given else ("o", colour)
            axes[0].scatter(*zip(*points, strict=True), marker=marker, facecolors=face, edgecolors=colour)
            named.append((max(points), name))
        for panel, metric in zip(axes[1:], PANELS, strict=True):
            found = system["metrics"].get(metric)
            if found is None:
                continue
            low, high = found["ci95"] or (found["mean"], found["mean"])
            error = [[found["mean"] - low], [high - found["mean"]]]
            panel.errorbar(found["mean"], number, xerr=error, fmt="o", color=colours[number % 20], capsize=3)
    squares = any(system.get("first_frames") for system in systems.values())
    axes[0].set(
        xlabel="net displacement, px/frame (tracked, no flow network)",
        ylabel="appearance distance to the teacher's world",
        title="one point per training seed" + "; squares: first frame given" * squares,
    )
    axes[0].margins(x=0.16, y=0.08)  # room for the name of the last point
    for panel, metric in zip(axes[1:], PANELS, strict=True):
        panel.set_yticks(range(len(systems)), list(systems) if panel is axes[1] else [""] * len(systems))
        panel.invert_yaxis()
        panel.set_title(METRICS[metric].title)
        panel.grid(axis="x", alpha=0.3)
    figure.canvas.draw()  # now points have their places on the page
    _name_points(axes[0], named)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _name_points(axis: Any, named: list[tuple[tuple[float, float], str]]) -> None:
    """Names beside points, from the lowest up; one that would lie on another moves up, and a line leads to its point."""
    taken: list[tuple[float, float]] = []
    for point, name in sorted(named, key=lambda pair: pair[0][1]):
        x, y = axis.transData.transform(point)
        height = y
        while any(abs(x - left) < 70 and abs(height - low) < 11 for left, low in taken):
            height += 1
        taken.append((x, height))
        line = {"arrowstyle": "-", "lw": 0.4, "color": "0.6", "shrinkA": 0, "shrinkB": 0} if height > y else None
        offset = ((6, (height - y) * 72 / axis.figure.dpi - 3), "offset points")
        axis.annotate(name, point, xytext=offset[0], textcoords=offset[1], fontsize=7, arrowprops=line)
