"""The figure of MoGAN's survey: one stacked bar of win / tie / lose per comparison and question, in per cent."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from mogan.report.figures import characters_told
from mogan.survey.folder import Survey

COLOURS = {"win": "#2a6f97", "tie": "#c9ccd1", "lose": "#b9603a"}


@rc_context({"text.parse_math": False})  # a name with two dollar signs is a name
def draw(survey: Survey, comparisons: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG. A bar's whisker at the edge of "win" is that share's 95 % interval."""
    groups = [(a, b) for a, b in {(c["first"], c["second"]): None for c in comparisons}]
    rows = len(comparisons) + len(groups)
    figure = Figure(figsize=(7.0, 0.9 + 0.36 * rows), layout="constrained")
    axes = figure.subplots()
    titles = {question.id: question.title for question in survey.questions}
    y, ticks = 0.0, []
    for first, second in groups:
        axes.text(0, y, f"{first} against {second}", ha="left", va="center", fontsize=9, fontweight="bold")
        y += 0.95
        for comparison in comparisons:
            if (comparison["first"], comparison["second"]) == (first, second):
                _bar(axes, y, comparison)
                ticks.append((y, f"{titles[comparison['question']]} (n = {comparison['votes']})"))
                y += 1
        y += 0.15
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set(xlim=(0, 100), ylim=(y - 0.3, -0.7), xlabel="share of answers, %")
    axes.axvline(50, color="black", linewidth=0.6, linestyle=":")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    for name, colour in COLOURS.items():
        axes.barh(0, 0, color=colour, label=f"{name} (first named)" if name == "win" else name)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    temporary = path.with_name(path.name + ".tmp")
    with characters_told(str(path)):
        figure.savefig(temporary, dpi=200, format="png")
    temporary.rename(path)


def _bar(axes: Any, y: float, comparison: dict[str, Any]) -> None:
    if not comparison["votes"]:
        axes.text(1, y, "no votes", va="center", fontsize=8, color="#666666")
        return
    left = 0.0
    for name, colour in COLOURS.items():
        width = 100 * comparison[name]["value"]
        axes.barh(y, width, left=left, height=0.72, color=colour)
        if width >= 4:
            ink = "black" if name == "tie" else "white"
            axes.text(left + width / 2, y + 0.02, f"{width:.1f}", ha="center", va="center", fontsize=8, color=ink)
        left += width
    interval = comparison["win"]["ci95"]
    if interval:
        low, high = (100 * value for value in interval)
        axes.plot([low, high], [y + 0.3, y + 0.3], color="black", linewidth=1.2, solid_capstyle="butt")
