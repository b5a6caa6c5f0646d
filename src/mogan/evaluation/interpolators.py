"""Frames between two frames, for motion smoothness. None of these is AMT-S, and none is called so.

VBench's smoothness is defined with AMT-S, whose code is licensed for non-commercial use (CC BY-NC 4.0); a user who has
it passes any callable of the same shape. What the callable is decides the number: see ``docs/evaluation.md``.
"""

import torch
from torch import Tensor

from mogan.evaluation.motion import Interpolator
from mogan.flow import FlowEstimator, warp


def blend(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """The mean of both frames. Foretells fades perfectly and motion not at all."""
    return (first_BCHW + second_BCHW) / 2


def flow_warp(flow: FlowEstimator) -> Interpolator:
    """Both frames warped half way to each other along their flow, and averaged ("flow-warp").

    The flow at the middle is approximated from the two directions as in Super SloMo (Jiang et al. 2018, eq. 4 at t =
    1/2); there is no refinement and no reasoning about occlusion, so it is as good as the flow and ghosts at outlines.
    The result is rounded to 8-bit levels here, so that the truncation of VBench's formula costs nothing.
    """

    @torch.inference_mode()
    def interpolate(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        there = _flow(flow, first_BCHW, second_BCHW)
        back = _flow(flow, second_BCHW, first_BCHW)
        to_first = (back - there) / 4
        middle = (warp(first_BCHW, to_first) + warp(second_BCHW, -to_first)) / 2
        return (middle * 255).round() / 255

    return interpolate


def _flow(flow: FlowEstimator, one: Tensor, two: Tensor) -> Tensor:
    return flow(2 * torch.stack([one, two], dim=2) - 1)[:, :, 0].to(one.device)
