"""Video files to a cache: scan, cut, measure motion, choose, encode.

Two passes over the videos. The first decodes everything and measures the motion of every clip; what is kept is then
known, and the second encodes only that. Both continue where a killed run stopped: every finished file is on disk under
its final name, and ``index.jsonl`` is derived from those at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mogan.data import cache as data
from mogan.data.choice import choose, draw_motion, dropped, entries
from mogan.data.controls import Show, encode_controls
from mogan.data.encode import encode
from mogan.data.folder import claim, tell, write_lines
from mogan.data.listing import Source, scan
from mogan.data.lists import printable
from mogan.data.measure import known_record, measure
from mogan.data.tokens import Tokens, about_tokens
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.models.defaults import Geometry
from mogan.motion.flow import FlowEstimator


@dataclass(frozen=True)
class Summary:
    """What a run of :func:`prepare_clips` found and did; ``notes`` are sentences worth telling the user.

    ``changed``: the list of clips or the embedded prompts are not those of before.
    """

    kept: int
    dropped: int
    skipped: int
    encoded: int
    threshold: float | None
    notes: tuple[str, ...]
    changed: bool = False


def prepare_clips(
    source: str | Path,
    out: str | Path,
    *,
    geometry: Geometry,
    fingerprints: dict[str, str],
    encode_video: Callable[[Tensor], Tensor],
    encode_text: Callable[[list[str]], list[Tensor]],
    estimate_flow: FlowEstimator,
    tokens: Tokens | None = None,
    min_motion: float | None = None,
    motion_quantile: float | None = None,
    caption: str | None = None,
    uncaptioned: bool = False,
    extra_prompts: Sequence[str] = (),
    shard: str | None = None,
    workers: int = 2,
    show: Show | None = None,
) -> Summary:
    """Fill a cache from a folder of videos; the options are those of :func:`mogan.data.prepare.prepare`.

    ``fingerprints`` is what else decides the contents: kept in ``cache.json`` and compared by later runs, but for ``model`` and
    ``flow_name``, which are names. ``encode_video`` takes ``(1, 3, F, H, W)`` in [-1, 1] to a normalised latent
    ``(1, C, F', H', W')``, ``encode_text`` prompts to embeddings ``(L, D)``, ``estimate_flow`` a video to pixels per frame,
    ``tokens`` prompts to token numbers, to tell of captions that are cut. ``show`` is how clips get controls, if they do. Each of
    the ``workers`` holds about two clips in memory.

    Raises:
        UserError: the cache was made with other settings, no clip is left, or a video has no control that fits.
    """
    out = Path(out)
    if motion_quantile is not None and not 0 <= motion_quantile < 1:
        raise UserError(f"--motion-quantile must be at least 0 and below 1, not {motion_quantile}")
    if workers < 1:
        raise UserError("--workers must be at least 1")
    sources = scan(source, caption, uncaptioned)
    size = {k: getattr(geometry, k) for k in ("fps", "height", "width", "frames")}
    usable = [s for s in sources if s.problem is None]
    claim(out, {"contents": "clips"} | size | fingerprints | (show.facts(usable) if show else {}))
    if shard is not None:
        return _prepare_share(
            usable, shard, out, geometry, encode_video, encode_text, estimate_flow,
            min_motion=min_motion, motion_quantile=motion_quantile, extra_prompts=extra_prompts, workers=workers, show=show,
        )  # fmt: skip
    records = measure(usable, out, geometry, estimate_flow, workers)
    found = entries(usable, records)
    motions = [entry["motion"] for entry in found]
    kept, threshold = choose(found, motions, min_motion, motion_quantile)
    left_out = dropped(usable, records, found, threshold, geometry)
    skipped = [{"source": s.name, "reason": s.problem} for s in sources if s.problem]
    skipped += [{"source": s.name, "reason": r["error"]} for s, r in zip(usable, records, strict=True) if r["error"]]
    index = out / "index.jsonl"
    keeps = not kept and index.is_file()  # a cache that was made before stays as it is
    if not keeps:
        write_lines(out / "skipped.jsonl", skipped)
        write_lines(out / "dropped.jsonl", left_out)
    if found and not keeps:
        draw_motion(out / "motion.png", motions, threshold)
    if not kept:
        look = f"{out} keeps those it has" if keeps else f"see {out}/dropped.jsonl and skipped.jsonl"
        most = f"; the liveliest moves {max(motions):.2f} px/frame" if found else ""
        first = f"; first of the skipped: {printable(skipped[0]['source'])}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"no clip is left of {source} ({look}){most}{first}")
    encoded = encode(usable, kept, out, geometry, encode_video, workers)
    encoded = max(encoded, encode_controls(usable, kept, out, geometry, show, workers) if show else 0)
    captions = {e["source"]: e["caption"] for e in kept if e["caption"] is not None}
    embedded = data.ensure_text(out, [*captions.values(), "", *extra_prompts], encode_text)
    before = index.read_bytes() if index.is_file() else b""
    write_lines(index, kept)
    changed = embedded > 0 or index.read_bytes() != before
    notes = _notes(usable, records, kept, geometry) + (about_tokens(captions, tokens) if tokens else [])
    tell(out, notes)
    return Summary(len(kept), len(left_out), len(skipped), encoded, threshold, tuple(notes), changed)


def _prepare_share(
    usable: list[Source],
    shard: str,
    out: Path,
    geometry: Geometry,
    encode_video: Callable[[Tensor], Tensor],
    encode_text: Callable[[list[str]], list[Tensor]],
    estimate_flow: FlowEstimator,
    *,
    min_motion: float | None,
    motion_quantile: float | None,
    extra_prompts: Sequence[str],
    workers: int,
    show: Show | None,
) -> Summary:
    """Measure and encode a shard's videos, and embed the captions of which it has the first video."""
    mine = share_of(usable, shard)
    found = entries(mine, measure(mine, out, geometry, estimate_flow, workers))
    motions = [entry["motion"] for entry in found]
    if motion_quantile is not None:
        everyone = [known_record(out, s) for s in usable]
        missing = sum(record is None for record in everyone)
        if missing:
            note = f"shard {shard} is measured, {missing} videos of others are not yet: run every shard once more after that"
            return Summary(0, 0, 0, 0, None, (note,))
        motions = [clip["motion"] for record in everyone if record for clip in record["clips"]]
    kept, threshold = choose(found, motions, min_motion, motion_quantile)
    encoded = encode(mine, kept, out, geometry, encode_video, workers)
    encoded = max(encoded, encode_controls(mine, kept, out, geometry, show, workers) if show else 0)
    first = {s.caption: s.name for s in reversed(usable)}
    captions = [e["caption"] for e in kept if e["caption"] is not None and first[e["caption"]] == e["source"]]
    data.ensure_text(out, [*captions, *share_of(["", *extra_prompts], shard)], encode_text)
    note = f"{len(kept)} clips of shard {shard} are in {out}; after all shards, the command without --shard lists them"
    return Summary(len(kept), 0, 0, encoded, threshold, (note,))


def _notes(sources: list[Source], records: list[dict], kept: list[dict], geometry: Geometry) -> list[str]:
    read = [(s, r) for s, r in zip(sources, records, strict=True) if r["done"]]
    outside = [s.name for s in sources if s.outside]
    shares = {s.name: _repeated(r, geometry.frames) for s, r in read}
    slow = [name for name, share in shares.items() if share > 0.25]
    small = [s.name for s, r in read if r["source_height"] < geometry.height or r["source_width"] < geometry.width]
    notes = []
    if outside:
        notes.append(
            f"{len(outside)} videos lie outside the folder (first {printable(outside[0])}): its list names them, so they were read"
        )
    if slow:
        notes.append(
            f"{len(slow)} videos repeat more than a quarter of their frames at {geometry.fps} frames per second (first "
            f"{printable(slow[0])}: {shares[slow[0]]:.0%}): see `repeats` in index.jsonl; repeated frames teach stutter"
        )
    if small:
        size = f"{geometry.height} x {geometry.width}"
        notes.append(f"{len(small)} videos are smaller than {size} (first {printable(small[0])}): they were enlarged")
    odd: dict[str, list[str]] = {}
    for source, record in read:
        for remark in record["remarks"]:
            odd.setdefault(remark, []).append(printable(source.name))
    notes += [f"{len(names)} videos (first {names[0]}) {remark}" for remark, names in odd.items()]
    if bare := [e["id"] for e in kept if e["caption"] is None]:
        notes.append(
            f"{len(bare)} clips have no caption (first {bare[0]}): they teach motion alone, with `mogan train --prompts`"
        )
    return notes


def _repeated(record: dict, length: int) -> float:
    """Share of a file's clips that only repeats the frame before."""
    clips = record["clips"]
    return sum(clip["repeats"] for clip in clips) / (length * len(clips)) if clips else 0.0
