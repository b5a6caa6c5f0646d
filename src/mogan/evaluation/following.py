"""Whether a clip follows the control that its list says it was made under."""

from pathlib import Path

import numpy as np

from mogan.data.controls import FASTEST
from mogan.data.tasks import Task
from mogan.data.video import flow_of_picture, read_frames
from mogan.errors import UserError
from mogan.evaluation.frames import Clip
from mogan.evaluation.measure import Values
from mogan.evaluation.pairs import flow_of_pairs, neighbours
from mogan.motion.flow import FlowEstimator
from mogan.world.captions import parse_caption
from mogan.world.following import depth_followed, flow_followed, mask_followed


def follow_values(clip: Clip, task: Task, prompt: str, flow: FlowEstimator) -> Values:
    """Shares by :mod:`mogan.world.following`: of ``flow`` as colours for clips of any kind, of ``depth`` and ``mask`` for the lab's.

    Raises:
        UserError: the control is not there, or is shorter than the clip.
    """
    said, shown = parse_caption(prompt), task.mask if task.kind == "mask" else task.control
    values: Values = {}
    if clip.shape[0] < 2:  # nothing moves in it
        return values
    if task.kind == "flow" and shown is not None:
        fields = np.stack(list(flow_of_pairs(neighbours(clip), flow)))
        values = flow_followed(fields, flow_of_picture(_as_large(shown, clip)[1:], clip.shape[1] / FASTEST))
    elif shown is not None and said is not None:
        control, frames = _as_large(shown, clip), np.stack(list(clip))
        values = (
            mask_followed(frames, said, control.mean(-1) > 127.5)
            if task.kind == "mask"
            else depth_followed(frames, said, control)
        )
    return {f"follow_{name}": value for name, value in values.items()}


def _as_large(path: Path, clip: Clip) -> np.ndarray:
    """A control's frames, of the clip's rate, size and number."""
    count, height, width = clip.shape
    if not path.is_file():
        raise UserError(f"{clip.path} was made under {path}, which is not there: put it back where it was")
    frames = [f.image_HWC for f in read_frames(path, fps=clip.fps, size=(height, width), only=range(count))]
    if len(frames) < count:
        raise UserError(f"{path} is shorter than {clip.path}, which was made under it: give the same control again")
    return np.stack(frames)
