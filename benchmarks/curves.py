r"""Metrics of a study's columns over a number that they differ by, such as steps or beta: a line for each way, with 95 % intervals.

    python benchmarks/curves.py RESULTS.json --over steps --at 1 2 4 --figure FILE.png \
        --line "told=tdm_in_1,tdm_in_2,tdm" --line "not told=tdm_untold_in_1,tdm_untold_in_2,tdm_untold"

    python benchmarks/curves.py RESULTS.json --over "1 / beta" --at 1 2 5 --minus dmd_160 \
        --line "Re-DMD=redmd_1,redmd_half,redmd_fifth"

RESULTS.json is what `mogan study` writes. With --minus, what is shown is how columns differ from others, clip by clip: from one, or
from one for each number (--minus a,b,c); a study has the differences that its columns' `against` names. A column left empty
("a,,b") is a number that the line does not have; a line of one column is drawn across.
"""

import argparse
import json
from math import nan
from pathlib import Path
from typing import Any

from mogan.disk.files import replacing
from mogan.evaluation.names import METRICS
from mogan.study.collect import OWN

USUAL = ("dynamic_degree", "lab_net", "lab_identity", "lab_shape", "appearance_distance")


def point(system: dict[str, Any] | None, metric: str, base: str) -> tuple[float, float, float]:
    """Mean, and the ends of its interval; of the differences from ``base``, if it is named."""
    found = (system or {}).get(f"minus_{base}" if base else "metrics", {}).get(metric)
    if found is None:
        return nan, nan, nan
    return found["mean"], *(found["ci95"] or (nan, nan))


def title(metric: str) -> str:
    """In a panel of a few inches."""
    return (OWN.get(metric) or METRICS[metric].title).split(":")[0].split(" (")[0]


def draw(systems: dict[str, Any], lines: dict[str, list[str]], given: argparse.Namespace) -> None:
    """A panel a metric."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from mogan.report.figures import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(3 * len(given.metrics), 3.2), layout="constrained")
        for axis, metric in zip(figure.subplots(1, len(given.metrics), squeeze=False)[0], given.metrics, strict=True):
            for number, (name, columns) in enumerate(lines.items()):
                pairs = zip(columns, given.minus, strict=False)
                means, low, high = zip(
                    *(point(systems.get(column), metric, base) for column, base in pairs), strict=True
                )
                if len(columns) == 1:
                    axis.axhline(means[0], color=f"C{number}", ls="--", label=name)
                    axis.axhspan(low[0], high[0], color=f"C{number}", alpha=0.12, lw=0)
                    continue
                axis.plot(given.at, means, "o-", color=f"C{number}", label=name)
                axis.fill_between(given.at, low, high, color=f"C{number}", alpha=0.15, lw=0)
            if any(given.minus):
                axis.axhline(0, color="0.5", lw=1)
            axis.set(title=title(metric), xlabel=given.over, xticks=given.at)
        if len(lines) > 1:
            figure.axes[0].legend(frameon=False)
        with replacing(given.figure) as temporary:
            figure.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """Print the table; draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--line", action="append", required=True, help="NAME=COLUMN,COLUMN,...")
    parser.add_argument("--at", type=float, nargs="+", required=True)
    parser.add_argument("--over", default="", help="what --at counts")
    parser.add_argument("--minus", default="", help="COLUMN, or COLUMN,COLUMN,... for each number")
    parser.add_argument("--metrics", nargs="+", default=USUAL, choices=[*METRICS, *OWN], metavar="METRIC")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    systems = json.loads(given.results.read_text())["systems"]
    lines = {name: columns.split(",") for name, _, columns in (line.rpartition("=") for line in given.line)}
    for name, columns in lines.items():
        if len(columns) not in (1, len(given.at)):
            parser.error(f"{name} has {len(columns)} columns, --at has {len(given.at)} numbers")
        if missing := [column for column in columns if column and column not in systems]:
            parser.error(f"no column {missing[0]} in {given.results}, which has {', '.join(systems)}")
    bases = given.minus.split(",")
    given.minus = bases if len(bases) > 1 else bases * len(given.at)
    if len(given.minus) != len(given.at):
        parser.error(f"--minus names {len(bases)} columns, --at has {len(given.at)} numbers")
    print(f"| | {given.over} | {' | '.join(map(title, given.metrics))} |\n|---{'|---' * (len(given.metrics) + 1)}|")
    for name, columns in lines.items():
        for at, column, base in zip(given.at, columns, given.minus, strict=False):
            points = [point(systems.get(column), metric, base) for metric in given.metrics]
            sign = "+" if base else ""
            cells = " | ".join(f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]" for mean, low, high in points)
            print(f"| {name} | {f'{at:g}' if len(columns) > 1 else ''} | {cells} |")
    if given.figure:
        draw(systems, lines, given)


if __name__ == "__main__":
    main()
