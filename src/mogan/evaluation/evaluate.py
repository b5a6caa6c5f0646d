"""Folders of clips to ``results.json``: measured clip by clip, averaged over prompts."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from mogan.data.lists import printable
from mogan.disk.files import from_json, writable_file, write_atomically
from mogan.disk.locks import alone_at
from mogan.errors import UserError, goes_with
from mogan.evaluation import official
from mogan.evaluation.clips import System, find_systems, read_folder, unshared_prompts
from mogan.evaluation.kept import Kept, Record
from mogan.evaluation.names import METRICS
from mogan.evaluation.provenance import how_measured, relative
from mogan.evaluation.records import measure_share, measure_systems
from mogan.evaluation.sets import column_of, set_metrics
from mogan.evaluation.statistics import mean_interval
from mogan.evaluation.table import table, tables_of_tasks
from mogan.evaluation.tools import choose_flow, gather_tools
from mogan.evaluation.vbench import read_info, restrict
from mogan.evaluation.warnings import about_reference

MOTION_DIMENSIONS = ("dynamic_degree", "motion_smoothness")


def evaluate(
    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Path = Path("results.json"),
    flow: str | None = None,
    interpolator: str = "flow-warp",
    networks: Path | None = None,
    reference: Path | None = None,
    vbench_info: Path | None = None,
    vbench_dimensions: tuple[str, ...] = (),
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
        vbench_dimensions: whose clips (dynamic_degree motion_smoothness if left out); they must share their prompts.
        compare_vbench: a Python that has the package vbench; runs it on the same clips and writes down the differences.
        lab: subjects of clips whose caption is the lab's are tracked; --no-lab leaves that out.
        quick: leave out what needs flow in both directions.
        shard: i/n measures every n-th clip, starting with the i-th, and writes no results: for many GPUs, with the same
            --out. When all are done, the command without a shard finds their values and writes the results.
        device: auto, cpu or cuda: where flow and networks run.

    Returns:
        What was written; nothing of a shard.

    Raises:
        UserError: nothing to measure, or folders that cannot be compared.
    """
    writable_file(out, ours=rb'\s*\{\s*"systems"', suffix=".json")
    goes_with("--vbench-info", vbench_info is not None, vbench_dimensions=bool(vbench_dimensions))
    systems = find_systems(dirs)
    if compare_vbench:
        official.check(compare_vbench)
    about: dict[str, Any] = {}
    if vbench_info:
        systems, about["vbench"] = _restricted(systems, vbench_info, vbench_dimensions or MOTION_DIMENSIONS)
    about["unshared_prompts"] = unshared_prompts(systems)
    real = read_folder(reference, "reference") if reference else None
    every = [*systems, *([real] if real else [])]
    flow, choice = choose_flow(flow, every)
    if choice:
        about["flow_choice"] = choice
        print(choice, file=sys.stderr)
    tools = gather_tools(flow, interpolator, networks, device, quick=quick, lab=lab, video=reference is not None)
    kept = Kept(out.with_suffix(".clips.jsonl"))
    if shard is not None:
        measure_share(every, shard, tools, kept, out)
        return {}
    with alone_at(out):
        records = measure_systems(every, tools, [kept] * len(every))
    target = records.pop() if real else None
    if target is not None and all("error" in clip for clip in target):
        raise UserError(f"no clip of the reference could be measured; the first says: {target[0]['error']}")
    results: dict[str, Any] = {"systems": {}}
    for system, clips in zip(systems, records, strict=True):
        metrics = _metrics(system, clips, target)
        how = how_measured(system, clips, tools.how | about, out, real)
        how["warnings"] += about_reference(clips, target) if target is not None else []
        results["systems"][system.name] = {"metrics": metrics, "how": how, "clips": _told(system, clips, out)}
        if by_task := _by_task(system, clips):
            results["systems"][system.name]["tasks"] = by_task
    earlier = _systems_in(out)
    _write(out, results)
    if compare_vbench:
        for system in systems:
            print(official.compare(compare_vbench, system, results["systems"][system.name], out))
        _write(out, results)
    print(table(results))
    print(tables_of_tasks(results), end="")
    for name, result in results["systems"].items():
        for warning in result["how"]["warnings"]:
            print(f"{name}: {warning}")
    if lost := [name for name in earlier if name not in results["systems"]]:
        print(f"{out} holds {printable(', '.join(lost))} no longer: name their folders, too, to have them back")
    print(f"written to {out}")
    return results


def _systems_in(out: Path) -> list[str]:
    """Names of the systems that results held before they are written anew."""
    try:
        return list(map(str, from_json(out.read_text(encoding="utf-8"))["systems"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _restricted(systems: list[System], info: Path, dimensions: tuple[str, ...]) -> tuple[list[System], dict[str, Any]]:
    """The systems with the clips that VBench averages alone, and what results say of that."""
    facts = read_info(info)
    checked = [restrict(system, facts, dimensions) for system in systems]
    notes = sorted({note for _, found in checked for note in found})
    return [system for system, _ in checked], {"dimensions": list(dimensions), "notes": notes}


def _metrics(system: System, clips: list[Record], target: list[Record] | None) -> dict[str, Any]:
    """Means over a system's clips, and distances to the reference's."""
    good = [clip for clip in clips if "error" not in clip]
    if not good:
        raise UserError(f"no clip of {system.name} could be measured; the first says: {clips[0]['error']}")
    prompts = [clip["prompt"] for clip in good]
    measured = {name for clip in good for name in clip["values"]}
    found = {name: mean_interval(column_of(good, name), prompts) for name in METRICS if name in measured}
    metrics = {name: interval.to_json() for name, interval in found.items() if interval.n}
    if target is not None:
        real = [clip for clip in target if "error" not in clip]
        metrics |= {name: interval.to_json() for name, interval in set_metrics(good, real).items()}
    return metrics


def _by_task(system: System, clips: list[Record]) -> dict[str, dict[str, Any]]:
    """The same means over the clips of each task, where the list of a system names tasks."""
    groups: dict[str, list[Record]] = {}
    for clip in clips:
        if "task" in clip and "error" not in clip:
            groups.setdefault(clip["task"], []).append(clip)
    return {task: {"metrics": _metrics(system, group, None)} for task, group in groups.items()}


def _told(system: System, clips: list[Record], out: Path) -> list[Record]:
    """Records as results have them: without features, with their files."""
    return [
        {key: value for key, value in clip.items() if key not in ("features", "video_features", "device", "torch")}
        | {"file": relative(entry.path, out)}
        for clip, entry in zip(clips, system.clips, strict=True)
    ]


def _write(out: Path, results: dict[str, Any]) -> None:
    write_atomically(out, json.dumps(results, indent=1, allow_nan=False) + "\n")
