"""Video files to a cache: scan, cut, measure motion, choose, encode.

Two passes over the videos. The first decodes everything and measures the motion of every clip; what is kept is then
known, and the second encodes only that. Both continue where a killed run stopped: every finished file is on disk under
its final name, and ``index.jsonl`` is derived from those at the end.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from torch import Tensor
from tqdm import tqdm

from mogan.data import cache as data
from mogan.data.clips import make_clip, to_video
from mogan.data.listing import Source, scan
from mogan.data.lists import SUFFIXES, printable, read_prompts, whole
from mogan.data.measure import Done, in_threads, known_record, measure
from mogan.data.tokens import Tokens, about_tokens, load_tokens
from mogan.data.video import read_frames
from mogan.disk.files import json_line, replacing, writable_folder, write_atomically
from mogan.disk.locks import LOCK, alone_in
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.models.defaults import WITHOUT_WEIGHTS, usual_flow
from mogan.motion import estimators
from mogan.motion.flow import FlowEstimator
from mogan.ranges import at_least, between

if TYPE_CHECKING:
    from mogan.models.wan import Geometry

TRAINS = "raft_large_C_T_SKHT_V2"  # the flow network of the full-size recipes
DISCRIMINATOR_PROMPT = "a video with good motion"  # MoGAN, section 3.3: what its discriminator is always told


@dataclass(frozen=True)
class Summary:
    """What a run of :func:`prepare_cache` found and did; ``notes`` are sentences worth telling the user."""

    kept: int
    dropped: int
    skipped: int
    encoded: int
    threshold: float | None
    notes: tuple[str, ...]


# ---------------------------------------------------------------------------------------------- the command


def prepare(
    source: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    model: str = "lab",
    motion_rich: bool = False,
    min_motion: float | None = None,
    motion_quantile: float | None = None,
    caption: str | None = None,
    uncaptioned: bool = False,
    flow: str | None = None,
    fps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    extra_prompts: tuple[str, ...] = (DISCRIMINATOR_PROMPT,),
    shard: str | None = None,
    workers: int = 2,
    device: str = "auto",
) -> None:
    """Turn a folder of videos, or a file of prompts, into a cache to train on.

    Captions come from `metadata.jsonl`, `.json`, `.csv` or `.tsv` in the folder, or from `name.txt` beside `name.mp4`. Videos
    are brought to the model's frame rate and size, split at shot cuts and into clips of the model's length; each clip's
    motion is measured, its latent and the embedding of its caption are stored. Run the same command again after a kill,
    or after adding videos: what is done is not done again.

    The cache says why a clip is not in it: `dropped.jsonl` (moves too little, shot too short), `skipped.jsonl` (broken
    file, no caption); `motion.png` shows how much the clips move.

    Args:
        source: a folder of videos, one video, or a list of prompts (for recipes that need no videos): a .txt file with one
            per line, or the captions of a .jsonl, .json, .csv or .tsv file.
        out: folder of the cache.
        model: "lab", a diffusers folder, or a hub id.
        motion_rich: keep only clips that move; the next two options say how much.
        min_motion: mean of the fastest 5 % of pixels, pixels per frame at the model's size. Default: VBench's threshold
            for a moving pair of frames, brought to this size and rate (0.75 for the lab, 5.6 for 480 x 832 at 16 fps).
        motion_quantile: keep only what moves more than this share of the clips, 0.7 for the liveliest 30 %. Beside
            min-motion both must hold.
        caption: for videos that have none.
        uncaptioned: keep videos without a caption too. They teach motion alone: `mogan train --prompts` says what about.
        flow: what measures motion: lab, farneback or dis (classical, no weights), a name from `mogan weights list`, or the
            path of RAFT weights. Default: the model's own (the lab's for the lab), else RAFT weights that were fetched,
            else dis; an existing cache keeps its own.
        fps: instead of the model's.
        height: instead of the model's, pixels.
        width: instead of the model's, pixels.
        frames: of a clip, 4 k + 1, instead of the model's.
        extra_prompts: prompts to embed besides the captions and the empty prompt.
        shard: i/n takes every n-th video, starting with the i-th: for many GPUs, into the same folder. When all are done, the
            command without a shard adds what is missing and lists the clips. With motion-quantile every shard runs twice: how
            much is enough is known when all are measured.
        workers: videos decoded at a time.
        device: auto, cpu or cuda: where the networks run.
    """
    from mogan.devices import choose_device
    from mogan.models import autoencoder, wan

    at_least(1, fps=fps, height=height, width=width, frames=frames, workers=workers)
    for option, words in (("--caption", [caption or ""]), ("--extra-prompts", extra_prompts)):
        whole(" ".join(words), option)
    at_least(0, min_motion=min_motion)
    between(0, 1, motion_quantile=motion_quantile)
    if not motion_rich and (min_motion is not None or motion_quantile is not None):
        raise UserError("--min-motion and --motion-quantile choose among clips: add --motion-rich")
    folder = wan.resolve_model(model)
    target = choose_device(device)
    text = once(lambda: wan.load_text(folder, target))
    tokens = load_tokens(folder)
    text_facts = {"model": model} | {part: wan.fingerprint(folder, part) for part in ("text_encoder", "tokenizer")}
    if source.suffix.lower() in SUFFIXES and not os.path.isdir(source):
        writable_folder(out)
        with alone_in(out):
            count = prepare_prompts(source, out, text_facts, lambda p: text()(p), extra_prompts, tokens)
        print(f"{count} prompts cached in {out}")
        return
    made_for = wan.geometry(folder)
    geometry = wan.Geometry(
        fps or made_for.fps, height or made_for.height, width or made_for.width, frames or made_for.frames
    )
    _check_geometry(geometry)
    wan.latent_shape(folder, geometry)  # some models want larger multiples
    vae = once(lambda: wan.load_vae(folder, wan.fast_dtype(target)).to(target))
    measures = _flow_of(flow, out, wan.defaults(folder).flow)
    estimator = once(lambda: estimators.load_flow(measures, device=target))
    if motion_rich and min_motion is None:
        min_motion = 0.0 if motion_quantile is not None else vbench_threshold(geometry)
    writable_folder(out)
    with alone_in(out, shard), _claimed_by_work_alone(out, shard):
        summary = prepare_cache(
            source,
            out,
            geometry=geometry,
            fingerprints=text_facts
            | {
                "vae": wan.fingerprint(folder, "vae"),
                "flow_name": measures,
                "flow": estimators.flow_fingerprint(measures),
            },
            encode_video=lambda video: autoencoder.encode_video(vae(), video.to(target)).cpu(),
            encode_text=lambda prompts: text()(prompts),
            tokens=tokens,
            estimate_flow=lambda video: estimator()(video.to(target)).cpu(),
            min_motion=min_motion,
            motion_quantile=motion_quantile,
            caption=caption,
            uncaptioned=uncaptioned,
            extra_prompts=extra_prompts,
            shard=shard,
            workers=workers,
        )
    if shard is not None:
        print(summary.notes[-1])
        return
    done = f"{summary.encoded} encoded now" if summary.encoded else "all were there already, nothing to do"
    moving = "" if summary.threshold is None else f" that move at least {summary.threshold:.2f} px/frame"
    why = f" (see {out / 'skipped.jsonl'})" if summary.skipped else ""
    print(
        f"{summary.kept} clips{moving} in {out} ({done}); {summary.dropped} dropped, {summary.skipped} files skipped{why}"
    )


def _flow_of(given: str | None, out: Path, models: str | None) -> str:
    """The estimator that measures motion; says on stderr what a user may not expect of it."""
    earlier = (data.read_facts(out) or {}).get("flow_name")
    name = given or earlier or models or usual_flow(TRAINS, "raft_large_C_T_V1")
    if name == "lab" and models != "lab":
        said = "the lab's flow network knows nothing but the lab's world and measures little here: leave --flow out"
    elif given or earlier or models:
        return name
    elif name == WITHOUT_WEIGHTS:
        said = f"motion is measured by classical flow ({name}), as no RAFT weights are here: `mogan weights fetch {TRAINS}` "
        said += "gets what the full-size recipes train with; then give another --out"
    else:
        said = f"motion is measured by {name}"
    print(said, file=sys.stderr)
    return name


def vbench_threshold(geometry: "Geometry") -> float:
    """Pixels per frame above which VBench's dynamic degree calls a pair moving: 6 at 256 px and 8 fps, scaled."""
    return 6.0 * min(geometry.height, geometry.width) / 256 * 8 / geometry.fps


def _check_geometry(geometry: "Geometry") -> None:
    if geometry.frames % 4 != 1 or geometry.frames < 5:
        raise UserError(f"--frames must be 4 k + 1 and at least 5 (the autoencoder's rule), not {geometry.frames}")
    if geometry.height % 16 or geometry.width % 16 or min(geometry.height, geometry.width, geometry.fps) <= 0:
        raise UserError(f"--height and --width must be multiples of 16, not {geometry.height} and {geometry.width}")


# ---------------------------------------------------------------------------------------------- the work


def prepare_prompts(
    source: str | Path,
    out: str | Path,
    fingerprints: dict[str, str],
    encode_text: Callable[[list[str]], list[Tensor]],
    extra_prompts: Sequence[str] = (),
    tokens: Tokens | None = None,
) -> int:
    """Cache prompts alone, those of :func:`mogan.data.lists.read_prompts`. Returns how many."""
    source, out = Path(source), Path(out)
    notes: list[str] = []
    prompts = read_prompts(source, notes.append)
    _claim(out, {"contents": "prompts"} | fingerprints)
    data.ensure_text(out, [*prompts, "", *extra_prompts], encode_text)
    _write_jsonl(out / "index.jsonl", [{"id": data.text_path(out, p).stem, "caption": p} for p in prompts])
    _tell(out, notes + (about_tokens({p: p for p in prompts}, tokens) if tokens else []))
    return len(prompts)


def prepare_cache(
    source: str | Path,
    out: str | Path,
    *,
    geometry: "Geometry",
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
) -> Summary:
    """Fill a cache from a folder of videos; see :func:`prepare` for what the options mean.

    Args:
        source: folder of videos, or one video.
        out: folder of the cache.
        geometry: frame rate, size and length of a clip.
        fingerprints: what else decides the contents; kept in ``cache.json`` and compared by later runs (``model`` and
            ``flow_name`` are names and are not compared).
        encode_video: ``(1, 3, F, H, W)`` in [-1, 1] to a normalised latent ``(1, C, F', H', W')``.
        encode_text: prompts to embeddings ``(L, D)``.
        estimate_flow: video to flow in pixels per frame.
        tokens: prompts to token numbers, to tell of captions that are cut.
        min_motion: keep clips that move at least so much, pixels per frame.
        motion_quantile: keep clips at or above this quantile of motion.
        caption: for videos that have none.
        uncaptioned: keep those that have none; their caption in ``index.jsonl`` is null.
        extra_prompts: embedded besides the captions and "".
        shard: of many processes that share the work; the clips are listed by the call without one.
        workers: videos decoded at a time; each holds about two clips in memory.

    Raises:
        UserError: the cache was made with other settings, or no clip is left.
    """
    out = Path(out)
    if motion_quantile is not None and not 0 <= motion_quantile < 1:
        raise UserError(f"--motion-quantile must be at least 0 and below 1, not {motion_quantile}")
    if workers < 1:
        raise UserError("--workers must be at least 1")
    sources = scan(source, caption, uncaptioned)
    size = {k: getattr(geometry, k) for k in ("fps", "height", "width", "frames")}
    _claim(out, {"contents": "clips"} | size | fingerprints)

    usable = [s for s in sources if s.problem is None]
    if shard is not None:
        return _prepare_share(
            usable, shard, out, geometry, encode_video, encode_text, estimate_flow,
            min_motion=min_motion, motion_quantile=motion_quantile, extra_prompts=extra_prompts, workers=workers,
        )  # fmt: skip
    records = measure(usable, out, geometry, estimate_flow, workers)
    skipped = [{"source": s.name, "reason": s.problem} for s in sources if s.problem]
    skipped += [{"source": s.name, "reason": r["error"]} for s, r in zip(usable, records, strict=True) if r["error"]]
    found = [entry for s, r in zip(usable, records, strict=True) for entry in _entries(s, r)]
    threshold = _threshold([e["motion"] for e in found], min_motion, motion_quantile)
    kept = [e for e in found if threshold is None or e["motion"] >= threshold]
    dropped = _dropped(usable, records, found, threshold, geometry)
    _write_jsonl(out / "skipped.jsonl", skipped)
    _write_jsonl(out / "dropped.jsonl", dropped)
    if found:
        _draw_motion(out / "motion.png", [e["motion"] for e in found], threshold)

    if not kept:
        most = f"; the liveliest moves {max(e['motion'] for e in found):.2f} px/frame" if found else ""
        first = f"; first of the skipped: {printable(skipped[0]['source'])}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"no clip is left of {source} (see {out}/dropped.jsonl and skipped.jsonl){most}{first}")
    encoded = _encode(usable, kept, out, geometry, encode_video, workers)
    captions = {e["source"]: e["caption"] for e in kept if e["caption"] is not None}
    data.ensure_text(out, [*captions.values(), "", *extra_prompts], encode_text)
    _write_jsonl(out / "index.jsonl", kept)
    notes = _notes(usable, records, geometry)
    if bare := [e["id"] for e in kept if e["caption"] is None]:
        notes.append(
            f"{len(bare)} clips have no caption (first {bare[0]}): they teach motion alone, with `mogan train --prompts`"
        )
    notes += about_tokens(captions, tokens) if tokens else []
    _tell(out, notes)
    return Summary(len(kept), len(dropped), len(skipped), encoded, threshold, tuple(notes))


def _prepare_share(
    usable: list[Source],
    shard: str,
    out: Path,
    geometry: "Geometry",
    encode_video: Callable[[Tensor], Tensor],
    encode_text: Callable[[list[str]], list[Tensor]],
    estimate_flow: FlowEstimator,
    *,
    min_motion: float | None,
    motion_quantile: float | None,
    extra_prompts: Sequence[str],
    workers: int,
) -> Summary:
    """Measure and encode a shard's videos, and embed the captions of which it has the first video."""
    mine = share_of(usable, shard)
    found = [
        e
        for s, r in zip(mine, measure(mine, out, geometry, estimate_flow, workers), strict=True)
        for e in _entries(s, r)
    ]
    motions = [e["motion"] for e in found]
    if motion_quantile is not None:
        everyone = [known_record(out, s) for s in usable]
        missing = sum(record is None for record in everyone)
        if missing:
            note = f"shard {shard} is measured, {missing} videos of others are not yet: run every shard once more after that"
            return Summary(0, 0, 0, 0, None, (note,))
        motions = [clip["motion"] for record in everyone if record for clip in record["clips"]]
    threshold = _threshold(motions, min_motion, motion_quantile)
    kept = [e for e in found if threshold is None or e["motion"] >= threshold]
    encoded = _encode(mine, kept, out, geometry, encode_video, workers)
    first = {s.caption: s.name for s in reversed(usable)}
    captions = [e["caption"] for e in kept if e["caption"] is not None and first[e["caption"]] == e["source"]]
    data.ensure_text(out, [*captions, *share_of(["", *extra_prompts], shard)], encode_text, shared=True)
    note = f"{len(kept)} clips of shard {shard} are in {out}; after all shards, the command without --shard lists them"
    return Summary(len(kept), 0, 0, encoded, threshold, (note,))


def _tell(out: Path, notes: list[str]) -> None:
    """Print what the user should know, and keep it in the cache."""
    for note in notes:
        print(note)
    write_atomically(out / "warnings.log", "".join(f"{note}\n" for note in notes))


def _claim(out: Path, facts: dict[str, Any]) -> None:
    """Write ``cache.json``, or make sure that an earlier run wrote the same."""
    there = data.read_facts(out)
    if there is not None:
        different = data.differences(there, {k: v for k, v in facts.items() if k not in ("model", "flow_name")})
        if different:
            raise UserError(f"the cache in {out} {different}: use the same options, or another --out")
        return
    if out.exists() and any(not path.name.startswith((LOCK, ".tmp-", "cache.json")) for path in out.iterdir()):
        raise UserError(f"{out} is not empty and not a cache: give another --out")
    with replacing(out / "cache.json", shared=True) as temporary:
        temporary.write_text(json.dumps({"format": data.FORMAT, "version": data.VERSION} | facts, indent=2) + "\n")


@contextmanager
def _claimed_by_work_alone(out: Path, shard: str | None) -> Iterator[None]:
    """Take a new ``cache.json`` away again if nothing was made: a failed start, as with damaged weights, ties the folder to
    nothing. Other shards may be at work under what one of them wrote.
    """
    new = shard is None and data.read_facts(out) is None
    try:
        yield
    except BaseException:
        if new and all(path.name.startswith((LOCK, ".tmp-", "cache.json")) for path in out.iterdir()):
            (out / "cache.json").unlink(missing_ok=True)
        raise


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(map(json_line, rows)))


# ---------------------------------------------------------------------------------------------- choose


def _entries(source: Source, record: dict) -> list[dict]:
    """Index lines of a source's clips. An id follows from name, contents and start: a changed file gets new ones."""
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in source.path.stem).strip("-")[:40] or "clip"
    mark = hashlib.sha256(os.fsencode(f"{source.name}\0{record['sha']}")).hexdigest()[:8]
    return [
        {"id": f"{stem}-{mark}-{clip['start']:06d}", "source": source.name, "caption": source.caption}
        | {"start": clip["start"], "start_s": clip["start_s"], "motion": clip["motion"], "repeats": clip["repeats"]}
        | {"sha": record["sha"]}
        for clip in record["clips"]
    ]


def _threshold(motions: list[float], min_motion: float | None, quantile: float | None) -> float | None:
    if min_motion is None and quantile is None:
        return None
    least = min_motion or 0.0
    return max(least, float(np.quantile(motions, quantile))) if quantile is not None and motions else least


def _dropped(sources, records, found, threshold, geometry) -> list[dict]:
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


def _notes(sources: list[Source], records: list[dict], geometry: "Geometry") -> list[str]:
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
    return notes + [f"{len(names)} videos (first {names[0]}) {remark}" for remark, names in odd.items()]


def _repeated(record: dict, length: int) -> float:
    """Share of a file's clips that only repeats the frame before."""
    clips = record["clips"]
    return sum(clip["repeats"] for clip in clips) / (length * len(clips)) if clips else 0.0


def _draw_motion(path: Path, motions: list[float], threshold: float | None) -> None:
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


# ---------------------------------------------------------------------------------------------- pass 2: encode


def _encode(
    sources: list[Source], kept: list[dict], out: Path, geometry: "Geometry", encode_video: Callable, workers: int
) -> int:
    """Store the latents of kept clips that are not there yet; returns how many."""
    missing: dict[str, list[dict]] = {}
    for entry in kept:
        if not data.clip_path(out, entry["id"]).exists():
            missing.setdefault(entry["source"], []).append(entry)
    jobs = [s for s in sources if s.name in missing]
    total = sum(map(len, missing.values()))
    size = (geometry.height, geometry.width)

    def read(source: Source) -> Iterator[tuple[dict, np.ndarray]]:
        entries = {e["start"]: e for e in missing[source.name]}
        only = {start + i for start in entries for i in range(geometry.frames)}
        held = []
        for frame in read_frames(source.path, fps=geometry.fps, size=size, only=only):
            held.append(frame)
            if len(held) == geometry.frames:
                yield entries[held[0].number], make_clip(held).frames_FHWC
                held = []

    with tqdm(total=total, desc="encode", unit="clip", disable=not total) as bar:
        for source, item in in_threads(jobs, read, workers):
            if isinstance(item, Done):
                if item.error:
                    raise UserError(
                        f"{source.path} changed while it was read ({item.error}): run the same command again"
                    )
                continue
            entry, frames_FHWC = item
            latent = encode_video(to_video(frames_FHWC))[0]
            data.save_latent(out, entry["id"], latent, {"source": source.name, "sha": entry["sha"]})
            bar.update()
    return total
