"""Optical flow between chosen frames, in batches whose size does not depend on the length of the clip."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from mogan.errors import UserError
from mogan.evaluation.frames import KEPT_BYTES, Frames
from mogan.motion.flow import FlowEstimator

PIXELS_AT_ONCE = 2_000_000  # about five pairs at 832 x 480, where RAFT's correlation takes 0.2 GB a pair

Pair = tuple[np.ndarray, np.ndarray]


def to_video(frames: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """uint8 frames ``(H, W, 3)`` as one video ``(1, 3, F, H, W)`` in [-1, 1]; exact for all 256 levels."""
    stack = torch.from_numpy(np.stack(list(frames))).to(device)
    return (2 * (stack.permute(3, 0, 1, 2)[None].float() / 255) - 1).contiguous()


@torch.inference_mode()
def flow_of_pairs(pairs: Iterable[Pair], flow: FlowEstimator) -> Iterator[np.ndarray]:
    """Flow from the first to the second frame of every pair: float32 ``(2, H, W)``, one at a time.

    Pairs in a row, each beginning with the frame the last one ended with, go to the estimator as one video: RAFT then
    encodes every frame once.

    Raises:
        UserError: flow is not finite.
    """
    device = device_of(flow)
    source = iter(pairs)
    first = next(source, None)
    if first is None:
        return
    size = pairs_at_once(first[0])
    batch = [first, *islice(source, size - 1)]
    while batch:
        if all(before[1] is after[0] for before, after in pairwise(batch)):
            video = to_video([batch[0][0], *(second for _, second in batch)], device)
            fields = flow(video)[0].transpose(0, 1).float().cpu().numpy()
        else:
            videos = torch.cat([to_video(pair, device) for pair in batch])
            fields = flow(videos)[:, :, 0].float().cpu().numpy()
        if len(fields) != len(batch):
            raise ValueError(f"the flow estimator gives {len(fields)} fields for {len(batch) + 1} frames in a row")
        if not np.isfinite(fields).all():
            raise UserError(
                "the flow network gives numbers that are not finite: its weights are damaged, or no weights of flow"
            )
        yield from fields
        batch = list(islice(source, size))


def pairs_at_once(frame_HWC: np.ndarray) -> int:
    """How many pairs of frames of this size are worked on together."""
    return max(1, min(32, PIXELS_AT_ONCE // (frame_HWC.shape[0] * frame_HWC.shape[1])))


def neighbours(frames: Frames) -> Iterator[Pair]:
    """Every frame with the one after it."""
    return pairwise(frames)


class EachPairOnce:
    """A flow estimator that answers the same video a second time from memory: numbers of one clip share their fields.

    Dynamic degree looks at the frames that motion smoothness interpolates between, at 16 frames a second, and at
    neighbouring frames, at 8. The last answers are kept, up to as many bytes as a clip's own frames.
    """

    def __init__(self, flow: FlowEstimator):
        self._flow = flow
        self._answers: OrderedDict[str, Tensor] = OrderedDict()
        self.parameters = getattr(flow, "parameters", None)

    def __call__(self, video_BCFHW: Tensor) -> Tensor:
        """Flow between neighbouring frames, ``(B, 2, F - 1, H, W)``."""
        content = video_BCFHW.cpu().numpy().tobytes()
        key = f"{tuple(video_BCFHW.shape)} {hashlib.sha256(content).hexdigest()}"
        if key not in self._answers:
            self._answers[key] = self._flow(video_BCFHW)
            while len(self._answers) > 1 and sum(a.nbytes for a in self._answers.values()) > KEPT_BYTES:
                self._answers.popitem(last=False)
        return self._answers[key]


def device_of(flow: FlowEstimator) -> torch.device:
    """Where the estimator wants its frames."""
    parameters = getattr(flow, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")
