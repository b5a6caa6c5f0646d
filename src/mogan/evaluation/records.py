"""A record per clip: what was measured, or why it could not be; kept as it goes."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mogan.disk.locks import alone_at
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.evaluation import cd_fvd
from mogan.evaluation.clips import Entry, System
from mogan.evaluation.following import follow_values
from mogan.evaluation.frames import KEPT_BYTES, Clip
from mogan.evaluation.kept import Kept, Record
from mogan.evaluation.measure import measure
from mogan.evaluation.pairs import device_of
from mogan.evaluation.provenance import device_name
from mogan.evaluation.tools import Tools, choose_flow, gather_tools
from mogan.world.captions import parse_caption
from mogan.world.instruments import read_instruments


def measured(system: System, kept: Path) -> list[Record]:
    """Records of a system's clips by ``mogan evaluate --quick``, ``features`` included, with what its file kept before."""
    flow, _ = choose_flow(None, [system])
    tools = gather_tools(flow, "flow-warp", None, "auto", quick=True, lab=True, video=False)
    return measure_systems([system], tools, [Kept(kept)])[0]


def measure_systems(systems: Sequence[System], tools: Tools, kept: Sequence[Kept]) -> list[list[Record]]:
    """Records of the clips of systems, each system with what is known of its clips."""
    with tqdm(total=sum(len(s.clips) for s in systems), desc="evaluate", unit="clip") as bar:
        return [
            [_measure_entry(entry, tools, known, bar) for entry in system.clips]
            for system, known in zip(systems, kept, strict=True)
        ]


def measure_share(systems: list[System], shard: str, tools: Tools, kept: Kept, out: Path) -> None:
    """Keep the values of a shard's clips, whichever system they are of."""
    entries = share_of([entry for system in systems for entry in system.clips], shard)
    with alone_at(out, shard), tqdm(total=len(entries), desc=f"evaluate {shard}", unit="clip") as bar:
        records = [_measure_entry(entry, tools, kept, bar) for entry in entries]
    bad = [record["error"] for record in records if "error" in record]
    told = f"; {len(bad)} could not be measured, the first: {bad[0]}" if bad else ""
    print(
        f"{len(records)} clips of shard {shard} done{told}; after all shards, the command without --shard writes {out}"
    )


def _measure_entry(entry: Entry, tools: Tools, kept: Kept, bar: tqdm) -> Record:
    bar.set_postfix_str(entry.path.name, refresh=False)
    record: Record = {"prompt": entry.prompt, "index": entry.index, "seed": entry.seed}
    record |= {"task": entry.task.name} if entry.task else {}
    try:
        if entry.problem:
            raise UserError(f"{entry.path} {entry.problem}")
        record |= _measure_clip(entry, tools, kept)
    except UserError as error:
        record["error"] = str(error)
    bar.update()
    return record


def _measure_clip(entry: Entry, tools: Tools, kept: Kept) -> Record:
    clip = Clip(entry.path)
    tracked = tools.lab and parse_caption(entry.prompt) is not None
    held = entry.task if entry.task is not None and entry.task.kind else None
    settings = json.dumps(
        [tools.how, entry.prompt if tracked or held else None, *([held.mark()] if held else [])], sort_keys=True
    )
    key = f"{clip.sha256}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    record = kept.get(key)
    if record is None:
        found = measure(clip, tools.flow, tools.interpolate, quick=tools.quick, looks=tools.looks)
        values = dict(found.values)
        all_at_once = 3 * found.frames * found.height * found.width <= KEPT_BYTES  # the lab's instruments want them so
        if tracked and max(found.height, found.width) <= 256 and all_at_once:
            values |= {f"lab_{name}": value for name, value in read_instruments(list(clip), entry.prompt).items()}
        values |= follow_values(clip, held, entry.prompt, tools.flow) if held else {}
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
            "device": device_name(device_of(tools.flow)),
            "torch": torch.__version__,
        }
        if tools.video is not None and found.frames >= cd_fvd.FRAMES:
            seen = cd_fvd.clip_features(clip, found.frames, tools.video)
            record["video_features"] = [_rounded(float(x)) for x in seen]
        kept.put(key, record)
    return record


def _rounded(value: float) -> float | None:
    """Nine significant digits; None where nothing could be measured (JSON has no NaN)."""
    return float(f"{value:.9g}") if math.isfinite(value) else None
