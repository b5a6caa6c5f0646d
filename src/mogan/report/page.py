"""``mogan report``: results and runs to one HTML file that opens anywhere."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from jinja2 import Environment, PackageLoader, StrictUndefined

from mogan import __version__
from mogan.data.lists import whole
from mogan.data.video import contact_sheet, moving_sheet
from mogan.disk.files import replacing, writable_file, writable_folder
from mogan.errors import UserError
from mogan.evaluation.names import METRICS, Metric
from mogan.evaluation.sets import paired
from mogan.evaluation.statistics import mean_interval
from mogan.ranges import at_least
from mogan.report.figures import COLOURS, characters_told, curve_figure, interval_figure, spread_figure, to_svg
from mogan.report.footage import AT_ONCE, SPEEDS, Footage, gather
from mogan.report.sources import Curves, Result, read_sources
from mogan.report.verdict import FACTORS, held_against, in_a_sentence, in_full, signed, threshold_table, verdicts

GROUPS = {
    "Motion by VBench's rules": (
        "dynamic_degree", "motion_smoothness", "motion_score", "temporal_flickering", "static",
    ),
    "Look by VBench's networks": (
        "subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality",
    ),
    "Truth of the lab, tracked without flow": tuple(name for name in METRICS if name.startswith("lab_")),
    "Flow": (
        "flow_mean", "flow_median", "flow_top5", "flow_px_mean", "flow_px_top5", "moving_share", "camera_motion",
        "object_motion", "round_trip", "occluded", "warping_error", "acceleration", "log_jerk",
    ),
    "Pixels and look": ("pixel_jerk", "frozen", "cuts", "saturation", "contrast", "appearance_distance", "cd_fvd", "cd_fvd_floor"),
}  # fmt: skip
ARROWS = {"higher": "↑", "lower": "↓", None: ""}
COMPARED = (
    "dynamic_degree",
    "motion_smoothness",
    "subject_consistency",
    "aesthetic_quality",
    "imaging_quality",
    "flow_top5",
    "lab_net",
    "lab_speed",
    "lab_wobble",
    "lab_pulsing",
    "lab_identity",
    "lab_travels",
    "lab_physics",
    "lab_shape",
    "saturation",
)


@dataclass(frozen=True)
class Line:
    """One metric of the headline table: a cell per system."""

    label: str
    unit: str
    arrow: str
    about: str
    cells: tuple[tuple[str, str, str], ...]  # mean, interval, n


@dataclass(frozen=True)
class Background:
    """What results and runs do not say of themselves.

    Attributes:
        note: a sentence under the heading.
        link: where it leads, relative to the page.
        against: per system the names of those it is held against, the first in the verdict; the others against the first system.
    """

    note: str = ""
    link: str = ""
    against: Mapping[str, Sequence[str]] = field(default_factory=dict)


def report(
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Path = Path("report.html"),
    clips: int = 6,
    title: str = "How it moves",
    figures: Path | None = None,
) -> None:
    """Write one HTML page from results and runs; it needs no network and no other file.

    Args:
        inputs: results.json files and folders of runs (metrics.jsonl), in the order to show them.
        out: the page.
        clips: prompts shown side by side.
        title: heading of the page.
        figures: folder for the figures and sheets of clips as PNG, for papers, and the clips side by side as a GIF.

    Raises:
        UserError: nothing to show, or an input of another format.
    """
    write_page(inputs, out, clips=clips, title=title, figures=figures)


def write_page(
    inputs: Sequence[Path],
    out: Path,
    *,
    clips: int = 6,
    title: str = "How it moves",
    figures: Path | None = None,
    background: Background = Background(),
) -> None:
    """What :func:`report` does, with what else is known of the systems.

    Raises:
        UserError: nothing to show, or an input of another format.
    """
    if not inputs:
        raise UserError("name at least one results.json or folder of a run: mogan report results.json RUN")
    at_least(1, clips=clips)
    whole(title, "--title")
    writable_file(out, ours=rb"(?i)\s*<!doctype html", suffix=".html")
    if figures:
        writable_folder(figures, "--figures")
    results, curves = read_sources(tuple(inputs))
    shown = [r for r in results if r.clips]
    held = held_against(shown, background.against)
    pairs = [(other, bases[0]) for other, bases in held]
    footage = gather(shown, clips) if shown else Footage((), (), 1.0, "px/frame", "", "", (), (), 0)
    pictures = {
        "intervals": (interval_figure(results), "Means and 95 % intervals of the headline metrics, by system"),
        "spread": (spread_figure(shown), "Distributions over clips, by system"),
        "curves": (curve_figure(curves), "Training curves"),
    }
    svg = {name: to_svg(figure, label) for name, (figure, label) in pictures.items() if figure is not None}
    environment = Environment(
        loader=PackageLoader("mogan.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        title=title,
        version=__version__,
        systems=[(r.name, COLOURS[i % len(COLOURS)], len(r.good)) for i, r in enumerate(results)],
        background=background,
        lead=[(other.name, in_a_sentence(base, other, COMPARED)) for other, base in pairs],
        in_full=[(other.name, [in_full(base, other, COMPARED) for base in bases]) for other, bases in held],
        groups=_groups(results),
        pairs=[(other.name, base.name) for other, base in pairs],
        differences=_differences(pairs),
        verdicts=verdicts(pairs, COMPARED),
        thresholds=threshold_table(shown),
        factors=FACTORS,
        svg=svg,
        footage=footage,
        at_once=footage.systems[:AT_ONCE] if footage.rows else footage.systems,
        prompts=_prompts(shown),
        warnings=_warnings(results, curves),
        how=[(r.name, _how(r)) for r in results if r.how],
        failed=[(r.name, f["file"], f["reason"]) for r in results for f in r.how.get("failed", [])],
        runs=[run.name for run in curves],
    )
    with replacing(out) as temporary:
        temporary.write_text(html, encoding="utf-8")
    if figures:
        _write_pictures(figures, pictures, shown, footage)
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MB)")


# ---------------------------------------------------------------------------------------------- tables


def _groups(results: list[Result]) -> list[tuple[str, list[Line]]]:
    known = {name for names in GROUPS.values() for name in names}
    others = tuple(dict.fromkeys(name for r in results for name in r.metrics if name not in known))
    groups = []
    for title, names in ({**GROUPS, "Other": others}).items():
        lines = [_line(name, results) for name in names if any(name in r.metrics for r in results)]
        if lines:
            groups.append((title, lines))
    return groups


def _line(name: str, results: list[Result]) -> Line:
    metric = METRICS.get(name)
    cells = []
    for result in results:
        value = result.metrics.get(name)
        if value is None:
            cells.append(("–", "", ""))
            continue
        ends = value.get("ci95")
        digits = _digits(value["mean"], ends)
        interval = f"{ends[0]:.{digits}g} to {ends[1]:.{digits}g}" if ends else "no interval"
        cells.append((f"{value['mean']:.{digits}g}", interval, str(value["n"])))
    if metric is None:
        return Line(name, "", "", "", tuple(cells))
    return Line(metric.label, metric.unit, ARROWS[metric.better], metric.about, tuple(cells))


def _digits(mean: float, ends: Sequence[float] | None) -> int:
    """Three significant digits, or as many as show the width of the interval to two: smoothness is 0.9954."""
    if not ends or not mean or ends[1] - ends[0] < 1e-6 * abs(mean):
        return 3
    return max(3, 2 + math.floor(math.log10(abs(mean))) - math.floor(math.log10(abs(ends[1] - ends[0]))))


def _differences(pairs: Sequence[tuple[Result, Result]]) -> list[tuple[Metric, str, list[tuple[str, str, bool]]]]:
    """Every system minus its base, clip by clip on the same prompt and number, with an interval; which way is better."""
    table = []
    for name in COMPARED:
        cells = []
        for other, base in pairs:
            found = mean_interval(*paired(base.good, other.good, name))
            if not found.n:
                cells.append(("–", "", False))
            elif found.ci95 is None:
                cells.append((signed(found.mean), "", False))
            else:
                low, high = found.ci95
                interval = f"{signed(low)} to {signed(high)} · n {found.n}"
                cells.append((signed(found.mean), interval, low > 0 or high < 0))
        if any(mean != "–" for mean, _, _ in cells):
            table.append((METRICS[name], ARROWS[METRICS[name].better], cells))
    return table


def _prompts(results: list[Result]) -> dict[str, Any]:
    """Mean per prompt, system and metric, for the table that sorts."""
    if not results:
        return {}
    measured = [n for n in METRICS if any(c["values"].get(n) is not None for r in results for c in r.good)]
    if not measured:
        return {}
    names = [n for n in SPEEDS if n in measured] + [n for n in measured if n not in SPEEDS]
    by_prompt: dict[str, list[list[dict[str, Any]]]] = {}
    for number, result in enumerate(results):
        for clip in result.good:
            by_prompt.setdefault(clip["prompt"], [[] for _ in results])[number].append(clip["values"])
    rows = []
    for prompt, of_results in sorted(by_prompt.items()):
        row: dict[str, list[float | None]] = {}
        for name in names:
            row[name] = []
            for found in of_results:
                values = [v for all_of in found if (v := all_of.get(name)) is not None]
                row[name].append(float(f"{sum(values) / len(values):.4g}") if values else None)
        rows.append({"prompt": prompt, "values": row})
    return {"rows": rows, "metrics": {n: METRICS[n].title for n in names}, "systems": [r.name for r in results]}


def _warnings(results: list[Result], curves: list[Curves]) -> list[tuple[str, str]]:
    """What would mislead, once each: the systems and runs it is true of, and what it is."""
    found = [(r.name, text) for r in results for text in r.how.get("warnings", [])]
    found += [(run.name, text) for run in curves for text in run.warnings[-3:]]
    of_whom: dict[str, list[str]] = {}
    for name, text in found:
        of_whom.setdefault(text, []).append(name)
    told = [(", ".join(dict.fromkeys(names)), text) for text, names in of_whom.items()]
    flows = {json.dumps(r.how.get("flow"), sort_keys=True) for r in results if r.how}
    if len(flows) > 1:
        told.append(("all", "systems were measured with different flow estimators: their motion cannot be compared"))
    prompts = {r.how["prompts"]["sha256"] for r in results if "prompts" in r.how}
    if len(prompts) > 1:
        told.append(
            ("all", "systems were measured on different sets of prompts: compare the differences on those they share")
        )
    return told


def _how(result: Result) -> list[tuple[str, str]]:
    facts = {name: value for name, value in result.how.items() if name not in ("warnings", "failed")}
    return [
        (label, ", ".join(map(_said, value)) if isinstance(value, list) else _said(value))
        for label, value in _given(facts)
    ]


def _given(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Labels and values of what was given."""
    return [
        (name.replace("_", " "), value) for name, value in facts.items() if value is not None and value not in ({}, [])
    ]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{label} {_said(one)}" for label, one in _given(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return "(empty)" if value == "" else str(value)


def _write_pictures(folder: Path, pictures: dict[str, Any], results: list[Result], footage: Footage) -> None:
    for name, (figure, _) in pictures.items():
        if figure is not None:
            with replacing(folder / f"{name}.png") as temporary, characters_told(str(folder / f"{name}.png")):
                figure.savefig(temporary, dpi=200)
    complete = []
    for number, row in enumerate(footage.rows):
        chosen = [(r, c) for r in results for c in r.good if (c["prompt"], c["index"]) == (row.title, row.index)]
        present = [(r, r.base / c["file"]) for r, c in chosen if (r.base / c["file"]).is_file()]
        if present:
            titles = [f"{r.name}: {row.title}" for r, _ in present]
            contact_sheet([path for _, path in present], folder / f"clips-{number}.png", titles=titles)
        if len(present) == len(results):
            complete.append((row.title, [path for _, path in present]))
    if complete:
        rate = next((c["fps"] for r in results for c in r.good if c["fps"]), 8.0)
        moving_sheet(complete, folder / "clips.gif", [r.name for r in results], rate)
