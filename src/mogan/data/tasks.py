"""A list of tasks: prompts, each with the control that its clip is to be made under, and the name of the task it belongs to.

One row per clip, in any format of :mod:`mogan.data.lists`; benchmarks of video creation such as UVCBench fit into it.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mogan.data.clips import clips_at, to_video
from mogan.data.controls import Control, everywhere, put_together, read_picture
from mogan.data.lists import CAPTION_COLUMNS, TABLES, Row, read_rows
from mogan.disk.files import from_json
from mogan.errors import UserError
from mogan.models.conditions import encode_control, pictures_of_references
from mogan.models.defaults import Geometry

KINDS = ("depth", "flow", "mask")  # of which is known what following means
FILES = ("control", "mask", "clip")


@dataclass(frozen=True)
class Task:
    """What a clip is made under.

    Attributes:
        name: of the task, by which results are put together.
        kind: one of ``KINDS`` if a clip is to be held to it.
        control: a video of what is to be made; ``mask``: white where something is to be; ``clip``: without a ``control`` the
            video that is kept outside the mask.
        references: pictures of what is to be seen.
    """

    name: str
    kind: str | None = None
    control: Path | None = None
    mask: Path | None = None
    clip: Path | None = None
    references: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        """All that it names."""
        return [*filter(None, (self.control, self.mask, self.clip)), *self.references]

    def told(self, folder: Path) -> dict[str, Any]:
        """As a row of a list in ``folder``, which may move together with its files."""
        root = folder.resolve()
        named = {name: _relative(path, root) for name in FILES if (path := getattr(self, name)) is not None}
        named |= {"kind": self.kind} if self.kind else {}
        return {"task": self.name, **named} | (
            {"references": [_relative(path, root) for path in self.references]} if self.references else {}
        )

    def mark(self) -> str:
        """Changes with what is in the files that a clip is held to."""
        held = [path for path in (self.control, self.mask) if path is not None and path.is_file()]
        parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in held]
        return "-".join([str(self.kind), *parts])


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path.resolve(), root)).as_posix()


def read_task(row: Row, folder: Path) -> Task | None:
    """The task of a row, whose files are named from ``folder`` on; None of a row without one.

    Raises:
        UserError: a kind that is not known, or lacks its file.
    """
    name = row.text(["task"])
    if name is None:
        return None
    pictures = row.values.get("references") or []
    pictures = [pictures] if isinstance(pictures, str) else pictures
    if not isinstance(pictures, list) or not all(isinstance(name, str) for name in pictures):
        raise UserError(f"{row.where}: references are names of pictures: write one, or [...] around several")
    control, mask, clip = (folder / file if (file := row.text([column])) else None for column in FILES)
    kind = row.text(["kind"])
    if kind is not None and kind not in KINDS:
        raise UserError(f"{row.where}: kind is one of {', '.join(KINDS)}, not {kind!r}: leave it out for others")
    if (kind == "mask" and mask is None) or (kind in ("depth", "flow") and control is None):
        raise UserError(f"{row.where} is of kind {kind} and names no {'mask' if kind == 'mask' else 'control'}: add it")
    if mask is not None and control is None and clip is None:
        raise UserError(f"{row.where} has a mask of nothing: add the clip that is kept outside it, or a control")
    return Task(name, kind, control, mask, clip, tuple(folder / picture for picture in pictures))


def read_tasks(path: Path) -> list[tuple[str, Task]]:
    """Prompts of a list and what their clips are made under; empty where no row names a task.

    Raises:
        UserError: a row cannot be meant, names a file that is not there, or names no task where others do.
    """
    if path.suffix.lower() not in (".jsonl", ".json", *TABLES):
        return []
    try:
        rows = read_rows(path, CAPTION_COLUMNS)
    except UserError:  # prompts need not be rows; who reads those says what is wrong
        if _names_task(path):
            raise
        return []
    found = [(row, read_task(row, path.parent)) for row in rows]
    if all(task is None for _, task in found):
        return []
    for row, task in found:
        if row.caption is None or task is None:
            raise UserError(f"{row.where} has no {'prompt' if task else 'task'}, and others of the list have: add it")
        if lacking := [file for file in task.files if not file.is_file()]:
            raise UserError(f"{row.where} names {lacking[0]}, which is not there: correct the name")
    return [(row.caption or "", task) for row, task in found if task is not None]


def _names_task(path: Path) -> bool:
    """Whether a list of JSON that is not all rows has one with a task, whose controls would be left out."""
    if path.suffix.lower() not in (".jsonl", ".json"):
        return False
    try:
        text = path.read_text(encoding="utf-8")
        lines = (
            from_json(text)
            if path.suffix.lower() == ".json"
            else [from_json(line) for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(lines, list) and any(isinstance(line, dict) and line.get("task") for line in lines)


def control_of(vae: Any, task: Task, size: Geometry) -> Tensor:
    """What a VACE reads of a task's files, ``(1, K, F, H, W)``; see :func:`mogan.models.conditions.encode_control`.

    Raises:
        UserError: a video is shorter than the clip.
    """
    control, mask, clip = (
        None if path is None else _frames(path, size) for path in (task.control, task.mask, task.clip)
    )
    nothing = np.full((size.frames, size.height, size.width, 3), 128, np.uint8)
    made: Control = put_together(nothing if clip is None else clip, control, mask) or everywhere(nothing)
    pictures = [read_picture(path) for path in task.references]
    references = pictures_of_references(pictures, size.height, size.width)[None] if pictures else None
    device = next(vae.parameters()).device
    where = torch.from_numpy(made.mask_FHW)[None, None].float().to(device)
    return encode_control(
        vae, to_video(made.frames_FHWC).to(device), where, None if references is None else references.to(device)
    )


def _frames(path: Path, size: Geometry) -> np.ndarray:
    frames = next(clips_at(path, {0: {}}, size), None)
    if frames is None:
        raise UserError(
            f"{path} is shorter than the {size.frames} frames at {size.fps} fps of a clip: give a longer one"
        )
    return frames[1]
