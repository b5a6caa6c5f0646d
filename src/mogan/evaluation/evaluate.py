"""Folders of clips to ``results.json``: measured clip by clip, kept as it goes, averaged over prompts."""

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from mogan.errors import UserError
from mogan.evaluation.classical_flow import dis, farneback
from mogan.evaluation.clips import Entry, System, find_systems, read_folder, unshared_prompts
from mogan.evaluation.frames import DECODER, KEPT_BYTES, Clip
from mogan.evaluation.interpolators import blend, flow_warp
from mogan.evaluation.measure import VERSION, measure
from mogan.evaluation.motion import Interpolator
from mogan.evaluation.names import METRICS
from mogan.evaluation.pairs import device_of
from mogan.evaluation.provenance import how_measured, relative
from mogan.evaluation.sets import set_metrics
from mogan.evaluation.statistics import mean_interval
from mogan.evaluation.vbench import read_info, restrict
from mogan.flow import FlowEstimator, RaftFlow
from mogan.lab.instruments import parse_caption, read_instruments

ITERATIONS = 20  # of RAFT, as VBench

Record = dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """The flow estimator and the interpolator with what ``results.json`` says of them."""

    flow: FlowEstimator
    interpolate: Interpolator
    how: dict[str, Any]
    quick: bool
    lab: bool


def evaluate(
    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Path = Path("results.json"),
    flow: str = "lab",
    interpolator: str = "flow-warp",
    reference: Path | None = None,
    vbench_info: Path | None = None,
    vbench_dimensions: tuple[str, ...] = ("dynamic_degree", "motion_smoothness"),
    lab: bool = True,
    quick: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure folders of clips and write results.json.

    Clips already measured with the same settings are not measured again, so a stopped evaluation continues.

    Args:
        dirs: folders of clips, one per system, as DIR or NAME=DIR. Prompts come from samples.jsonl, metadata.jsonl, or
            names like {prompt}-{k}.mp4.
        out: file to write; values per clip are kept beside it.
        flow: lab, farneback, dis, a name from `mogan weights list` (raft_large_C_T_V1 for VBench's own dynamic degree), or
            a file of RAFT weights.
        interpolator: flow-warp or blend; neither is AMT-S.
        reference: a folder of real clips; adds distances to them.
        vbench_info: VBench_full_info.json; measure exactly the clips VBench averages, and stop if one is missing.
        vbench_dimensions: whose clips; they must share their prompts.
        lab: track the subjects of clips whose caption is the lab's.
        quick: leave out what needs flow in both directions.
        device: where flow is estimated; a GPU if there is one.

    Returns:
        What was written.

    Raises:
        UserError: nothing to measure, or folders that cannot be compared.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder: give a file to write, such as {out / 'results.json'}")
    systems = find_systems(dirs)
    about: dict[str, Any] = {}
    if vbench_info:
        facts = read_info(vbench_info)
        checked = [restrict(system, facts, vbench_dimensions) for system in systems]
        systems = [system for system, _ in checked]
        notes = sorted({note for _, found in checked for note in found})
        about["vbench"] = {"dimensions": list(vbench_dimensions), "notes": notes}
    about["unshared_prompts"] = unshared_prompts(systems)
    tools = _tools(flow, interpolator, device, quick=quick, lab=lab)
    real = read_folder(reference, "reference") if reference else None
    kept = _Kept(out.with_suffix(".clips.jsonl"))
    every = [*systems, *([real] if real else [])]
    with tqdm(total=sum(len(s.clips) for s in every), desc="evaluate", unit="clip") as bar:
        records = [_measure_system(system, tools, kept, bar) for system in every]
    target = records.pop() if real else None
    if target is not None and all("error" in clip for clip in target):
        raise UserError(f"no clip of the reference could be measured; the first says: {target[0]['error']}")
    results: dict[str, Any] = {"systems": {}}
    for system, clips in zip(systems, records, strict=True):
        good = [clip for clip in clips if "error" not in clip]
        if not good:
            raise UserError(f"no clip of {system.name} could be measured; the first says: {clips[0]['error']}")
        results["systems"][system.name] = {
            "metrics": _metrics(good, target),
            "how": how_measured(system, clips, tools.how | about, device_of(tools.flow), out, real),
            "clips": [
                {**_without(clip, "features"), "file": relative(entry.path, out)}
                for clip, entry in zip(clips, system.clips, strict=True)
            ],
        }
    _write(out, results)
    print(table(results))
    for name, result in results["systems"].items():
        for warning in result["how"]["warnings"]:
            print(f"{name}: {warning}")
    print(f"written to {out}")
    return results


def estimator(name: str, device: str | None = None) -> tuple[FlowEstimator, dict[str, Any]]:
    """A flow estimator by name, and what to write down about it."""
    classical: dict[str, FlowEstimator] = {"farneback": farneback, "dis": dis}
    if name in classical:
        return classical[name], {
            "name": name,
            "version": f"OpenCV {importlib.metadata.version('opencv-python-headless')}",
        }
    from mogan.wan import load_flow

    found = load_flow(name, iterations=ITERATIONS)
    how: dict[str, Any] = {"name": name, "iterations": ITERATIONS}
    if isinstance(found, RaftFlow):
        try:
            found = found.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"--device {device} is not to be had here ({str(error).splitlines()[0]}): try cpu"
            ) from error
        how["weights_sha256"] = _hash_weights(found)
    return found, how


def measured(
    systems: Sequence[System], kept: Sequence[Path], *, flow: str = "lab", interpolator: str = "flow-warp", quick: bool
) -> list[list[Record]]:
    """Records of the clips of systems, ``features`` included, each system with its own file of values kept before."""
    tools = _tools(flow, interpolator, None, quick=quick, lab=True)
    with tqdm(total=sum(len(s.clips) for s in systems), desc="evaluate", unit="clip") as bar:
        return [_measure_system(s, tools, _Kept(k), bar) for s, k in zip(systems, kept, strict=True)]


def _tools(flow: str, interpolator: str, device: str | None, *, quick: bool, lab: bool) -> Tools:
    estimate, about = estimator(flow, device)
    makers: dict[str, Callable[[], Interpolator]] = {"flow-warp": lambda: flow_warp(estimate), "blend": lambda: blend}
    if interpolator not in makers:
        raise UserError(f"interpolator must be {' or '.join(makers)}, not {interpolator!r}")
    how = {"version": VERSION, "flow": about, "interpolator": interpolator, "decoder": DECODER, "quick": quick}
    return Tools(estimate, makers[interpolator](), how, quick, lab)


def _hash_weights(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- clip by clip


class _Kept:
    """Values measured before, one JSON line each; a line torn by a kill is not used."""

    def __init__(self, path: Path):
        self._path = path
        self._found: dict[str, Record] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                    self._found[row["key"]] = row["record"]
                except (ValueError, KeyError, TypeError):
                    continue

    def get(self, key: str) -> Record | None:
        return self._found.get(key)

    def put(self, key: str, record: Record) -> None:
        self._found[key] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write("\n" * (file.tell() > 0) + json.dumps({"key": key, "record": record}))


def _measure_system(system: System, tools: Tools, kept: _Kept, bar: tqdm) -> list[Record]:
    records = []
    for entry in system.clips:
        bar.set_postfix_str(system.name)
        about = {"prompt": entry.prompt, "index": entry.index, "seed": entry.seed}
        try:
            records.append({**about, **_measure_clip(entry, tools, kept)})
        except UserError as error:
            records.append({**about, "error": str(error)})
        bar.update()
    return records


def _measure_clip(entry: Entry, tools: Tools, kept: _Kept) -> Record:
    clip = Clip(entry.path)
    tracked = tools.lab and parse_caption(entry.prompt) is not None
    settings = json.dumps([tools.how, entry.prompt if tracked else None], sort_keys=True)
    key = f"{clip.sha256}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    record = kept.get(key)
    if record is None:
        found = measure(clip, tools.flow, tools.interpolate, quick=tools.quick)
        values = dict(found.values)
        all_at_once = 3 * found.frames * found.height * found.width <= KEPT_BYTES  # the lab's instruments want them so
        if tracked and max(found.height, found.width) <= 256 and all_at_once:
            values |= {f"lab_{name}": value for name, value in read_instruments(list(clip), entry.prompt).items()}
        record = {
            "sha256": clip.sha256,
            "frames": found.frames,
            "height": found.height,
            "width": found.width,
            "fps": found.fps,
            "values": {name: _rounded(value) for name, value in values.items()},
            "pair_scores": [_rounded(score) for score in found.pair_scores],
            "threshold": found.threshold,
            "features": list(found.features),
        }
        kept.put(key, record)
    return record


def _rounded(value: float) -> float | None:
    """Nine significant digits; None where nothing could be measured (JSON has no NaN)."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------- together


def _without(record: Record, name: str) -> Record:
    return {key: value for key, value in record.items() if key != name}


def _column(clips: list[Record], metric: str) -> list[float]:
    return [math.nan if (v := clip["values"].get(metric)) is None else v for clip in clips]


def _metrics(clips: list[Record], target: list[Record] | None) -> dict[str, Any]:
    prompts = [clip["prompt"] for clip in clips]
    measured = {name for clip in clips for name in clip["values"]}
    metrics: dict[str, Any] = {}
    for name in METRICS:
        if name in measured:
            found = mean_interval(_column(clips, name), prompts)
            if found.n:
                metrics[name] = found.to_json()
    if target is not None:
        real = [clip for clip in target if "error" not in clip]
        metrics |= {name: found.to_json() for name, found in set_metrics(clips, real).items()}
    return metrics


def _write(out: Path, results: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    part.replace(out)


def table(results: dict[str, Any]) -> str:
    """Metrics by systems as text, each as mean and interval."""
    systems = results["systems"]
    names = [name for name in METRICS if any(name in s["metrics"] for s in systems.values())]
    rows = [["", *systems]]
    for name in names:
        unit = f" ({METRICS[name].unit})" if METRICS[name].unit else ""
        rows.append([METRICS[name].label + unit, *(_cell(s["metrics"].get(name)) for s in systems.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    interval = f" [{metric['ci95'][0]:.3g}, {metric['ci95'][1]:.3g}]" if metric["ci95"] else ""
    return f"{metric['mean']:.3g}{interval}"
