"""Which clips are kept of those that were measured, and why the others are not."""

import hashlib
import os
from pathlib import Path

import numpy as np

from mogan.data.listing import Source
from mogan.disk.files import replacing
from mogan.models.defaults import Geometry


def entries(sources: list[Source], records: list[dict]) -> list[dict]:
    """Index lines of the sources' clips."""
    return [entry for source, record in zip(sources, records, strict=True) for entry in _entries(source, record)]


def _entries(source: Source, record: dict) -> list[dict]:
    """An id follows from name, contents, start and who read it: a changed file gets new ones, and so does another reader."""
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in source.path.stem).strip("-")[:40] or "clip"
    reader = f"\0{record['reader']}" if record["reader"] > 2 else ""  # ids that are out there say nothing of it
    mark = hashlib.sha256(os.fsencode(f"{source.name}\0{record['sha']}{reader}")).hexdigest()
    mark = mark[:16] if reader else mark[:8]  # 32 bits are too few for 100,000 videos of one name, a folder each
    return [
        {"id": f"{stem}-{mark}-{clip['start']:06d}", "source": source.name, "caption": source.caption}
        | {"start": clip["start"], "start_s": clip["start_s"], "motion": clip["motion"], "repeats": clip["repeats"]}
        | {"sha": record["sha"]}
        | _state(source, clip["start_s"])
        for clip in record["clips"]
    ]


def _state(source: Source, start_s: float) -> dict:
    """Of a clip of a video whose list says in what state it is: that, and the second from which it holds."""
    if source.state is None:
        return {}
    return {"state": source.state, "state_from": round(max(0.0, source.state_from - start_s), 3)}


def vbench_threshold(geometry: Geometry) -> float:
    """Pixels per frame above which VBench's dynamic degree calls a pair moving: 6 at 256 px and 8 fps, scaled."""
    return 6.0 * min(geometry.height, geometry.width) / 256 * 8 / geometry.fps


def choose(
    found: list[dict], motions: list[float], min_motion: float | None, quantile: float | None
) -> tuple[list[dict], float | None]:
    """Those of the entries that move enough, and how much that is: at least ``min_motion`` and ``quantile`` of ``motions``."""
    if min_motion is None and quantile is None:
        return found, None
    threshold = min_motion or 0.0
    if quantile is not None and motions:
        threshold = max(threshold, float(np.quantile(motions, quantile)))
    return [entry for entry in found if entry["motion"] >= threshold], threshold


def dropped(
    sources: list[Source], records: list[dict], found: list[dict], threshold: float | None, geometry: Geometry
) -> list[dict]:
    """Lines on what is no clip, or one that moves too little, with the reason."""
    rows = [
        {"source": s.name, "start_s": short["start_s"]}
        | {"reason": f"shot too short: {short['frames']} of {geometry.frames} frames"}
        for s, r in zip(sources, records, strict=True)
        for short in r["short"]
    ]
    rows += [
        {"source": s.name, "start_s": start_s, "reason": "one frame held for as long as a clip"}
        for s, r in zip(sources, records, strict=True)
        for start_s in r["held"]
    ]
    slow = [e for e in found if threshold is not None and e["motion"] < threshold]
    return rows + [
        {"source": e["source"], "start_s": e["start_s"], "motion": e["motion"]}
        | {"reason": f"moves {e['motion']:.2f} px/frame, less than {threshold:.2f}"}
        for e in slow
    ]


def draw_motion(path: Path, motions: list[float], threshold: float | None) -> None:
    """A histogram of motion, with the threshold if there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(motions, bins=min(60, max(10, len(motions) // 4)), color="0.6")
    if threshold is not None:
        kept = sum(m >= threshold for m in motions)
        label = f"kept from {threshold:.2f}: {kept} of {len(motions)} clips"
        axes.axvline(threshold, color="tab:red", label=label)
        axes.legend()
    axes.set(xlabel="motion: mean of the fastest 5 % of pixels, pixels per frame", ylabel="clips")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
