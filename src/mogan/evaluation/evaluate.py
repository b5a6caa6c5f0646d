"""Folders of clips to ``results.json``: measured clip by clip, kept as it goes, averaged over prompts."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from mogan.disk.files import writable_file, write_atomically
from mogan.disk.locks import alone_at, locked
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.evaluation import cd_fvd, official
from mogan.evaluation.clips import Entry, System, find_systems, read_folder, unshared_prompts
from mogan.evaluation.frames import KEPT_BYTES, Clip
from mogan.evaluation.measure import measure
from mogan.evaluation.names import METRICS
from mogan.evaluation.pairs import device_of
from mogan.evaluation.provenance import how_measured, relative
from mogan.evaluation.sets import set_metrics
from mogan.evaluation.statistics import mean_interval
from mogan.evaluation.tools import Tools, choose_flow, gather_tools
from mogan.evaluation.vbench import read_info, restrict
from mogan.world.captions import parse_caption
from mogan.world.instruments import read_instruments

Record = dict[str, Any]


def evaluate(
    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Path = Path("results.json"),
    flow: str | None = None,
    interpolator: str = "flow-warp",
    networks: Path | None = None,
    reference: Path | None = None,
    vbench_info: Path | None = None,
    vbench_dimensions: tuple[str, ...] = ("dynamic_degree", "motion_smoothness"),
    compare_vbench: str | None = None,
    lab: bool = True,
    quick: bool = False,
    shard: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure folders of clips and write results.json.

    Clips already measured with the same settings are not measured again, so a stopped evaluation continues.

    Args:
        dirs: folders of clips, one per system, as DIR or NAME=DIR. Prompts come from samples.jsonl, metadata.jsonl (or
            .json, .csv, .tsv), name.txt beside name.mp4, or names like {prompt}-{k}.mp4.
        out: file to write; values per clip are kept beside it.
        flow: lab, farneback, dis, a name from `mogan weights list` (raft_large_C_T_V1 for VBench's own dynamic degree), or
            a file of RAFT weights. By default the lab's network for the lab's clips alone; for others raft_large_C_T_V1 if
            it was fetched, else dis, which is classical.
        interpolator: flow-warp, blend, or your checkout of AMT with amt-s.pth in it, which makes motion smoothness VBench's.
        networks: folder with your files of VBench's other networks (dino_vitbase16_pretrain.pth, clip-vit-base-patch32,
            ...); what is there is measured.
        reference: a folder of real clips; adds distances to them.
        vbench_info: VBench_full_info.json; measure exactly the clips VBench averages, and stop if one is missing.
        vbench_dimensions: whose clips; they must share their prompts.
        compare_vbench: a Python that has the package vbench; runs it on the same clips and writes down the differences.
        lab: track the subjects of clips whose caption is the lab's.
        quick: leave out what needs flow in both directions.
        shard: i/n measures every n-th clip, starting with the i-th, and writes no results: for many GPUs, with the same
            --out. When all are done, the command without a shard finds their values and writes the results.
        device: auto, cpu or cuda: where flow and networks run.

    Returns:
        What was written; nothing of a shard.

    Raises:
        UserError: nothing to measure, or folders that cannot be compared.
    """
    writable_file(out, ours=rb'\s*\{\s*"systems"')
    systems = find_systems(dirs)
    if compare_vbench:
        official.check(compare_vbench)
    about: dict[str, Any] = {}
    if vbench_info:
        facts = read_info(vbench_info)
        checked = [restrict(system, facts, vbench_dimensions) for system in systems]
        systems = [system for system, _ in checked]
        notes = sorted({note for _, found in checked for note in found})
        about["vbench"] = {"dimensions": list(vbench_dimensions), "notes": notes}
    about["unshared_prompts"] = unshared_prompts(systems)
    real = read_folder(reference, "reference") if reference else None
    every = [*systems, *([real] if real else [])]
    flow, choice = choose_flow(flow, every)
    if choice:
        about["flow_choice"] = choice
        print(choice, file=sys.stderr)
    tools = gather_tools(flow, interpolator, networks, device, quick=quick, lab=lab, video=reference is not None)
    kept = _Kept(out.with_suffix(".clips.jsonl"))
    if shard is not None:
        _measure_share(every, shard, tools, kept, out)
        return {}
    with alone_at(out), tqdm(total=sum(len(s.clips) for s in every), desc="evaluate", unit="clip") as bar:
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
                {**_without(clip, "features", "video_features"), "file": relative(entry.path, out)}
                for clip, entry in zip(clips, system.clips, strict=True)
            ],
        }
    write_atomically(out, json.dumps(results, indent=1, allow_nan=False) + "\n")
    if compare_vbench:
        for system in systems:
            print(official.compare(compare_vbench, system, results["systems"][system.name], out))
        write_atomically(out, json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(table(results))
    for name, result in results["systems"].items():
        for warning in result["how"]["warnings"]:
            print(f"{name}: {warning}")
    print(f"written to {out}")
    return results


def measured(
    systems: Sequence[System],
    kept: Sequence[Path],
    *,
    flow: str | None = None,
    interpolator: str = "flow-warp",
    quick: bool,
) -> list[list[Record]]:
    """Records of the clips of systems, ``features`` included, each system with its own file of values kept before."""
    flow, _ = choose_flow(flow, systems)
    tools = gather_tools(flow, interpolator, None, "auto", quick=quick, lab=True, video=False)
    with tqdm(total=sum(len(s.clips) for s in systems), desc="evaluate", unit="clip") as bar:
        return [_measure_system(s, tools, _Kept(k), bar) for s, k in zip(systems, kept, strict=True)]


# ---------------------------------------------------------------------------------------------- clip by clip


NEEDED = {"sha256", "frames", "height", "width", "fps", "values", "pair_scores", "threshold", "features"}


class _Kept:
    """Values measured before, one JSON line each, by any number of processes; a torn or damaged line is not used."""

    def __init__(self, path: Path):
        self._path = path
        self._found: dict[str, Record] = {}
        if path.is_file():
            for line in path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                    if NEEDED <= row["record"].keys():
                        self._found[row["key"]] = row["record"]
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue

    def get(self, key: str) -> Record | None:
        return self._found.get(key)

    def put(self, key: str, record: Record) -> None:
        self._found[key] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file, locked(file.fileno()):
            file.write("\n" * (file.seek(0, os.SEEK_END) > 0) + json.dumps({"key": key, "record": record}))
            file.flush()


def _measure_system(system: System, tools: Tools, kept: _Kept, bar: tqdm) -> list[Record]:
    return [_measure_entry(entry, tools, kept, bar) for entry in system.clips]


def _measure_share(systems: list[System], shard: str, tools: Tools, kept: _Kept, out: Path) -> None:
    """Keep the values of a shard's clips, whichever system they are of."""
    entries = share_of([entry for system in systems for entry in system.clips], shard)
    with alone_at(out, shard), tqdm(total=len(entries), desc=f"evaluate {shard}", unit="clip") as bar:
        records = [_measure_entry(entry, tools, kept, bar) for entry in entries]
    bad = [record["error"] for record in records if "error" in record]
    told = f"; {len(bad)} could not be measured, the first: {bad[0]}" if bad else ""
    print(
        f"{len(records)} clips of shard {shard} done{told}; after all shards, the command without --shard writes {out}"
    )


def _measure_entry(entry: Entry, tools: Tools, kept: _Kept, bar: tqdm) -> Record:
    bar.set_postfix_str(entry.path.name)
    record: Record = {"prompt": entry.prompt, "index": entry.index, "seed": entry.seed}
    try:
        if entry.problem:
            raise UserError(f"{entry.path} {entry.problem}")
        record |= _measure_clip(entry, tools, kept)
    except UserError as error:
        record["error"] = str(error)
    bar.update()
    return record


def _measure_clip(entry: Entry, tools: Tools, kept: _Kept) -> Record:
    clip = Clip(entry.path)
    tracked = tools.lab and parse_caption(entry.prompt) is not None
    settings = json.dumps([tools.how, entry.prompt if tracked else None], sort_keys=True)
    key = f"{clip.sha256}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    record = kept.get(key)
    if record is None:
        found = measure(clip, tools.flow, tools.interpolate, quick=tools.quick, looks=tools.looks)
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
            "remarks": list(clip.remarks),
            "values": {name: _rounded(value) for name, value in values.items()},
            "pair_scores": [_rounded(score) for score in found.pair_scores],
            "threshold": found.threshold,
            "features": list(found.features),
        }
        if tools.video is not None and found.frames >= cd_fvd.FRAMES:
            seen = cd_fvd.clip_features(clip, found.frames, tools.video)
            record["video_features"] = [_rounded(float(x)) for x in seen]
        kept.put(key, record)
    return record


def _rounded(value: float) -> float | None:
    """Nine significant digits; None where nothing could be measured (JSON has no NaN)."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------- together


def _without(record: Record, *names: str) -> Record:
    return {key: value for key, value in record.items() if key not in names}


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
