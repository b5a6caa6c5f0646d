"""Optical flow without a network: OpenCV's Farneback and DIS, with the interface of :class:`mogan.motion.flow.RaftFlow`."""

from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np
import torch
from torch import Tensor

from mogan.errors import UserError


def farneback(video_BCFHW: Tensor) -> Tensor:
    """Polynomial-expansion flow (Farneback 2003) of a video in [-1, 1]: ``(B, 2, F - 1, H, W)`` pixels per frame."""
    return _over(video_BCFHW, _farneback_pair)


def dis(video_BCFHW: Tensor) -> Tensor:
    """Dense inverse search flow (Kroeger et al. 2016, medium preset) of a video in [-1, 1].

    ``(B, 2, F - 1, H, W)``, pixels per frame.

    Raises:
        UserError: frames are smaller than 16 x 16 pixels.
    """
    if min(video_BCFHW.shape[-2:]) < 16:
        raise UserError("dis needs clips of at least 16 x 16 pixels: use --flow farneback")
    solver = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return _over(video_BCFHW, lambda one, two: solver.calc(one, two, None))  # type: ignore[call-overload]


def _farneback_pair(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return cv2.calcOpticalFlowFarneback(  # type: ignore[call-overload]  # None lets OpenCV make the field
        one, two, None, pyr_scale=0.5, levels=5, winsize=15, iterations=3, poly_n=5, poly_sigma=1.1, flags=0
    )


def _over(video_BCFHW: Tensor, solve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Tensor:
    if video_BCFHW.shape[2] < 2:
        raise ValueError("optical flow needs at least two frames")
    levels = ((video_BCFHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    clips = []
    for clip in levels.permute(0, 2, 3, 4, 1).numpy():
        grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in clip]
        fields = [solve(one, two) for one, two in pairwise(grey)]
        clips.append(np.stack(fields).transpose(3, 0, 1, 2))
    return torch.from_numpy(np.stack(clips).astype(np.float32)).to(video_BCFHW.device)
