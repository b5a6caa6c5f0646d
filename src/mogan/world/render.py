"""Clips of the rendered world as ordinary mp4 files with captions, and their truth beside them on request."""

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from mogan.data.controls import FASTEST
from mogan.data.video import flow_picture, write_video
from mogan.disk.files import link_or_copy, replacing, writable_folder, write_atomically
from mogan.disk.locks import LOCK, alone_in
from mogan.errors import UserError
from mogan.ranges import at_least, is_seed
from mogan.world import scenes as world
from mogan.world.following import DEPTHS
from mogan.world.states import make_state_scene

MAPS = ("depth", "flow", "mask")


def render(
    out: Path,
    clips: int = 256,
    motion: Literal["all", "rich", "states"] = "all",
    seed: int = 0,
    truth: bool = False,
    controls: Path | None = None,
) -> None:
    """Render captioned clips of moving sprites: a folder that `mogan prepare` reads like any other.

    Every clip is 64 x 64 pixels, 17 frames, 16 frames per second. The caption names shape, colour and kind of motion,
    never its speed. The same seed always gives the same clips, and clip number k does not depend on how many are made.
    Running the command again continues where it stopped; a larger number of clips adds to those that are there.

    Args:
        out: folder for the mp4 files and `metadata.jsonl`.
        clips: how many.
        motion: "all" has many still and slow clips, as the web has; in "rich" every clip moves; in "states" one thing is at rest,
            spins or bounces, which the column `state` says and not the caption, and half of them take it up on their way.
        seed: of the world.
        truth: also write `truth/<name>.npz` with the exact optical flow, where it is visible, and every sprite's path.
        controls: another folder, for the world's exact maps as videos: `depth` (nearer is brighter), `flow` (as colours) and `mask`
            (of everything that is not background), and `mixed`, where clips have one of these in turn; each of the four is one
            that `mogan prepare --controls` takes.
    """
    at_least(1, clips=clips)
    is_seed(seed=seed)
    if controls is not None and controls.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--controls {controls} lies in {out}, whose videos are all clips: give another folder")
    if controls is not None:
        writable_folder(controls, "--controls")
    writable_folder(out)
    with alone_in(out):
        made = render_folder(out, clips, motion, seed, truth, controls)
    print(f"{clips} clips in {out} ({made} new, {clips - made} were there)")


def render_folder(
    out: str | Path,
    clips: int,
    motion: str = "all",
    seed: int = 0,
    truth: bool = False,
    controls: Path | None = None,
) -> int:
    """What :func:`render` does, silently but for the progress bar; returns the number of clips that were not there yet.

    ``truth/<name>.npz`` holds ``flow`` (F-1 2 H W, float16, pixels per frame), ``visible`` (F-1 H W), ``centres``
    (sprites F 2), ``angles`` (sprites F) and ``kind``.

    Raises:
        UserError: the folder holds clips of another world, or more clips than asked for.
    """
    out = Path(out)
    writable_folder(out)
    for folder in filter(None, (out, controls)):
        _claim(folder, {"world": {"motion": motion, "seed": seed}})
    there = len(list(out.glob("[0-9]*.mp4")))
    if there > clips:
        raise UserError(f"{out} already holds {there} clips: ask for --clips {there} or more, or give another --out")
    made, rows, tasks = 0, [], list[dict]()
    for index in tqdm(range(clips), desc="render", unit="clip"):
        scene, told = _scene(seed, index, motion)
        name = f"{index:05d}"
        video, facts = out / f"{name}.mp4", out / "truth" / f"{name}.npz"
        if truth and not facts.exists():
            _write_truth(facts, scene)
        if controls is not None:
            _write_controls(controls, index, scene)
            tasks += _tasks(controls, out, index, scene)
        if not video.exists():
            write_video(video, world.render(scene), world.FPS)
            made += 1
        row = {"file_name": video.name, "caption": scene.caption, "motion_kind": scene.kind}
        rows.append(row | told | {"speed": round(scene.speed, 4), "seed": seed, "index": index})
    with replacing(out / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if controls is not None:
        write_atomically(controls / "tasks.jsonl", "".join(json.dumps(task) + "\n" for task in tasks))
    return made


def _scene(seed: int, index: int, motion: str) -> tuple[world.Scene, dict]:
    """A scene, and what its row says beside the caption."""
    if motion != "states":
        return world.make_scene(seed, index, motion=motion), {}
    scene, state, since = make_state_scene(seed, index)
    return scene, {"state": state, "state_from": since / world.FPS}


def _claim(out: Path, settings: dict) -> None:
    path = out / "render.json"
    if path.exists():
        there = path.read_text(encoding="utf-8", errors="replace").strip()
        if there != json.dumps(settings):
            raise UserError(f"{out} holds another world ({there[:200]}): give another --out")
    elif out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"{out} is not empty and was not rendered here: give another --out")
    else:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings) + "\n")


def _map_path(folder: Path, kind: str, index: int) -> Path:
    """Where a clip's map lies; a mask is told from a video by its name."""
    return folder / kind / f"{index:05d}{'.mask' if kind == 'mask' else ''}.mp4"


def _write_controls(folder: Path, index: int, scene: world.Scene) -> None:
    """Exact maps, without loss but for colours' half resolution."""
    paths = [_map_path(folder, kind, index) for kind in MAPS]
    mixed = folder / "mixed" / paths[index % len(MAPS)].name
    if all(path.exists() for path in (*paths, mixed)):
        return
    owners = np.stack([world.owner(scene, frame) for frame in range(scene.frames)])
    depth = np.array(DEPTHS, np.uint8)[np.minimum(owners, 1) + 1]  # sprites later in the scene are nearer
    flow, _ = world.exact_flow(scene)
    fields = flow_picture(np.concatenate([flow[:1], flow]), scene.size / FASTEST)
    mask = np.where(owners >= 0, np.uint8(255), np.uint8(0))
    maps = [np.repeat(depth[..., None], 3, -1), fields, np.repeat(mask[..., None], 3, -1)]
    for path, frames in zip(paths, maps, strict=True):
        write_video(path, frames, world.FPS, crf=0)
    mixed.parent.mkdir(exist_ok=True)
    mixed.unlink(missing_ok=True)
    link_or_copy(str(paths[index % len(MAPS)]), str(mixed))


def _tasks(folder: Path, out: Path, index: int, scene: world.Scene) -> list[dict]:
    """A task for each map of a clip: see :mod:`mogan.data.tasks`."""
    clip = {"clip": os.path.relpath(out / f"{index:05d}.mp4", folder)}
    return [
        {"task": kind, "kind": kind, "prompt": scene.caption}
        | ({"mask": place} | clip if kind == "mask" else {"control": place})
        for kind in MAPS
        for place in [_map_path(folder, kind, index).relative_to(folder).as_posix()]
    ]


def _write_truth(path: Path, scene: world.Scene) -> None:
    flow, visible = world.exact_flow(scene)
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            flow=flow.astype(np.float16),
            visible=visible,
            centres=np.stack([s.centres_F2 for s in scene.sprites]),
            angles=np.stack([s.angles_F for s in scene.sprites]),
            kind=np.array(scene.kind),
        )
