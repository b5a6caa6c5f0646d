"""The command that turns videos or prompts into a cache: which model it is for, and what measures motion."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache as once
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from mogan.data import cache as data
from mogan.data.choice import vbench_threshold
from mogan.data.controls import FIRST_FRAME, KINDS, Show, own
from mogan.data.folder import claimed_by_work_alone
from mogan.data.lists import SUFFIXES, whole
from mogan.data.prepare_clips import Summary, prepare_clips
from mogan.data.prepare_prompts import prepare_prompts
from mogan.data.tokens import Tokens, load_tokens
from mogan.disk.files import writable_folder
from mogan.disk.locks import alone_in
from mogan.errors import UserError
from mogan.models.conditions import encode_control, encode_first_frame
from mogan.models.defaults import WITHOUT_WEIGHTS, Geometry, usual_flow
from mogan.models.discriminator import PROMPT
from mogan.motion import estimators
from mogan.motion.flow import FlowEstimator
from mogan.ranges import at_least, between

TRAINS = "raft_large_C_T_SKHT_V2"  # the flow network of the full-size recipes


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
    extra_prompts: tuple[str, ...] = (PROMPT,),
    controls: str | None = None,
    references: Path | None = None,
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
        model: "lab", a diffusers folder, or a hub id. For an image-to-video model each clip's first frame is kept, too.
        motion_rich: keep only clips that move; the next two options say how much.
        min_motion: mean of the fastest 5 % of pixels, pixels per frame at the model's size. Default: VBench's threshold
            for a moving pair of frames, brought to this size and rate (0.75 for the lab, 5.6 for 480 x 832 at 16 fps).
        motion_quantile: keep only what moves more than this share of the clips, 0.7 for the liveliest 30 %. With
            --min-motion both must hold.
        caption: for videos that have none.
        uncaptioned: keep videos without a caption too. They teach motion alone: `mogan train --prompts` says what about.
        flow: what measures motion: lab, farneback or dis (classical, no weights), a name from `mogan weights list`, or the
            path of RAFT weights. Default: the model's own (the lab's for the lab), else RAFT weights that were fetched,
            else dis; an existing cache keeps its own.
        fps: instead of the model's.
        height: instead of the model's, pixels.
        width: instead of the model's, pixels.
        frames: of a clip, 4 k + 1, instead of the model's.
        extra_prompts: prompts to embed besides the captions, the empty prompt and the model's negative one.
        controls: what a VACE is shown of each clip: nothing, inpaint (a box is to be made), extend (the first quarter is given),
            edges, flow; a folder of videos named as these are (and of masks, name.mask.mp4, white where something is to be made); or
            your own module:function from frames, uint8 (F, H, W, 3), to such frames, or to frames and a mask, bool (F, H, W).
        references: for a VACE, a folder of pictures of what is to be seen, named as the videos are: name.png, or name.1.png,
            name.2.png; as many for each.
        shard: i/n takes every n-th video, starting with the i-th: for many GPUs, into the same folder. When all are done, the
            command without a shard adds what is missing and lists the clips. With --motion-quantile every shard runs twice: how
            much is enough is known when all are measured.
        workers: videos decoded at a time.
        device: auto, cpu or cuda: where the networks run.
    """
    from mogan.devices import choose_device
    from mogan.models import autoencoder, wan

    at_least(1, height=height, width=width, frames=frames)
    between(1, 1000, fps=fps, workers=workers)
    for option, words in (("--caption", [caption or ""]), ("--extra-prompts", extra_prompts)):
        whole(" ".join(words), option)
    at_least(0, min_motion=min_motion)
    between(0, 1, motion_quantile=motion_quantile)
    if not motion_rich and (min_motion is not None or motion_quantile is not None):
        raise UserError("--min-motion and --motion-quantile choose among clips: add --motion-rich")
    if _is_list(source):
        of_videos: dict[str, Any] = {"caption": caption, "uncaptioned": uncaptioned, "shard": shard, "flow": flow}
        _refuse_given(
            source,
            of_videos | {"motion-rich": motion_rich, "fps": fps, "height": height, "width": width, "frames": frames},
        )
    folder = wan.resolve_model(model)
    target = choose_device(device)
    _check_controls(folder, model, source, controls, references)
    text = once(lambda: wan.load_text(folder, target))
    tokens = load_tokens(folder)
    extra_prompts = (*extra_prompts, wan.defaults(folder).negative_prompt)
    text_facts = {"model": model} | {part: wan.fingerprint(folder, part) for part in ("text_encoder", "tokenizer")}
    if _is_list(source):
        _prepare_list(source, out, text_facts, lambda prompts: text()(prompts), extra_prompts, tokens)
        return
    geometry = _geometry(wan.geometry(folder), fps=fps, height=height, width=width, frames=frames)
    wan.latent_shape(folder, geometry)  # some models want larger multiples
    vae = once(lambda: wan.load_vae(folder, wan.fast_dtype(target)).to(target))
    measures = _flow_of(flow, out, wan.defaults(folder).flow)
    flow_facts = {"flow_name": measures, "flow": estimators.flow_fingerprint(measures)}
    estimate_flow = _loaded_when_needed(measures, target)
    if motion_rich and min_motion is None:
        min_motion = 0.0 if motion_quantile is not None else vbench_threshold(geometry)
    show = None
    if wan.is_image_to_video(folder):
        show = _show_first_frames(folder, target, vae, estimate_flow)
    elif controls is not None:
        show = _show(controls, references, folder, target, vae, estimate_flow)
    writable_folder(out)
    with alone_in(out, shard), claimed_by_work_alone(out, shard):
        if data.read_facts(out) is None:
            vae()  # damaged weights are found before hours of measuring, and tie the folder to nothing
        summary = prepare_clips(
            source,
            out,
            geometry=geometry,
            fingerprints=text_facts | {"vae": wan.fingerprint(folder, "vae")} | flow_facts,
            encode_video=lambda video: autoencoder.encode_video(vae(), video.to(target)).cpu(),
            encode_text=lambda prompts: text()(prompts),
            tokens=tokens,
            estimate_flow=estimate_flow,
            min_motion=min_motion,
            motion_quantile=motion_quantile,
            caption=caption,
            uncaptioned=uncaptioned,
            extra_prompts=extra_prompts,
            shard=shard,
            workers=workers,
            show=show,
        )
    print(summary.notes[-1] if shard is not None else _in_words(summary, out))


def _refuse_given(prompts: Path, of_videos: dict[str, Any]) -> None:
    """Refuse options that a list of prompts has no use for."""
    if given := [f"--{name}" for name, value in of_videos.items() if value not in (None, False)]:
        raise UserError(
            f"{given[0]} is of videos, and {prompts} is a list of prompts: leave it out, or give a folder of videos"
        )


def _prepare_list(
    prompts: Path,
    out: Path,
    facts: dict[str, str],
    encode: Callable[[list[str]], list[Tensor]],
    extra: tuple[str, ...],
    tokens: Tokens,
) -> None:
    writable_folder(out)
    with alone_in(out), claimed_by_work_alone(out, None):
        count = prepare_prompts(prompts, out, facts, encode, extra, tokens)
    print(f"{count} prompts cached in {out}")


def _loaded_when_needed(name: str, device: torch.device) -> FlowEstimator:
    """The flow estimator of that name, on the device."""
    estimator = once(lambda: estimators.load_flow(name, device=device))
    return lambda video: estimator()(video.to(device)).cpu()


def _show(
    controls: str,
    references: Path | None,
    folder: Path,
    target: torch.device,
    vae: Callable[[], Any],
    estimate_flow: FlowEstimator,
) -> Show:
    """How clips of a VACE get their controls; the networks are loaded when the first is needed."""
    from mogan.models import wan

    def encode(video: Tensor, mask: Tensor, pictures: Tensor | None) -> Tensor:
        shown = None if pictures is None else pictures.to(target)
        return encode_control(vae(), video.to(target), mask.to(target), shown).cpu()

    kind, of_files = ("files", Path(controls)) if _is_folder(controls) else (controls, None)
    return Show(kind, encode, estimate_flow, wan.mask_channels(folder), of_files, references)


def _show_first_frames(
    folder: Path, target: torch.device, vae: Callable[[], Any], estimate_flow: FlowEstimator
) -> Show:
    """Clips of an image-to-video model are given their own first frames."""
    from mogan.models import wan

    eye = once(lambda: wan.load_eye(folder, target))

    def encode(video: Tensor, mask: Tensor, pictures: Tensor | None) -> Tensor:
        return encode_first_frame(vae(), video[:, :, 0].to(target), video.shape[2]).cpu()

    look = (lambda frame: eye()([frame])[0].cpu()) if wan.sees_pictures(folder) else None
    return Show(FIRST_FRAME, encode, estimate_flow, wan.mask_channels(folder), look=look)


def _is_list(source: Path) -> bool:
    return source.suffix.lower() in SUFFIXES and not os.path.isdir(source)


def _is_folder(controls: str) -> bool:
    return controls not in KINDS and ":" not in controls


def _check_controls(folder: Path, model: str, source: Path, controls: str | None, references: Path | None) -> None:
    """Refuse controls that cannot be read, or by nobody."""
    from mogan.models import wan

    if wan.is_image_to_video(folder):
        if controls is not None or references is not None:
            raise UserError(
                f"{model} is given the first frame of each clip, and reads nothing else: leave out --controls and --references"
            )
        if _is_list(source):
            raise UserError(f"{model} animates first frames, which prompts alone do not have: give a folder of videos")
        return
    if references is not None and controls is None:
        raise UserError("--references stand beside a control: add --controls, nothing for text and references alone")
    if controls is None:
        return
    if not wan.has_controls(folder):
        raise UserError(f"{model} reads no controls: leave out --controls, or give a VACE as --model")
    if _is_list(source):
        raise UserError("--controls belong to videos, and a list of prompts has none: leave them out")
    for option, path in (
        ("--controls", Path(controls) if _is_folder(controls) else None),
        ("--references", references),
    ):
        if path is None:
            continue
        if not path.is_dir():
            kinds = f"{', '.join(KINDS)}, module:function or " if option == "--controls" else ""
            raise UserError(f"{option} {path} is not there: give {kinds}a folder")
        here, there = path.resolve(), source.resolve()
        if option == "--controls" and source.is_dir() and here != there and here.is_relative_to(there):
            raise UserError(f"--controls {path} lies in {source}, whose videos are all clips: move it elsewhere")
    if ":" in controls:
        own(controls)


def _in_words(summary: Summary, out: Path) -> str:
    news = "their list or the embedded prompts are new" if summary.changed else "nothing to do"
    done = f"{summary.encoded} encoded now" if summary.encoded else f"all were there already, {news}"
    moving = "" if summary.threshold is None else f" that move at least {summary.threshold:.2f} px/frame"
    why = f" (see {out / 'skipped.jsonl'})" if summary.skipped else ""
    made = f"{summary.kept} clips{moving} in {out} ({done})"
    return f"{made}; {summary.dropped} dropped, {summary.skipped} files skipped{why}"


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


def _geometry(made_for: Geometry, **asked: int | None) -> Geometry:
    """The model's clips, but for what was asked for."""
    geometry = replace(made_for, **{name: number for name, number in asked.items() if number is not None})
    if geometry.frames % 4 != 1 or geometry.frames < 5:
        raise UserError(f"--frames must be 4 k + 1 and at least 5 (the autoencoder's rule), not {geometry.frames}")
    if geometry.height % 16 or geometry.width % 16 or min(geometry.height, geometry.width, geometry.fps) <= 0:
        raise UserError(f"--height and --width must be multiples of 16, not {geometry.height} and {geometry.width}")
    return geometry
