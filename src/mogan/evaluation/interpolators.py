"""Frames between two frames, for motion smoothness: two of our own, which are not AMT-S, and AMT-S as the user has it.

VBench's smoothness is defined with AMT-S, whose code is licensed for non-commercial use (CC BY-NC 4.0) and therefore no
part of this package. What interpolates decides the number: see ``docs/evaluation.md``.
"""

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mogan.errors import UserError
from mogan.evaluation.backbones import read_state
from mogan.evaluation.motion import Interpolator
from mogan.evaluation.pairs import device_of
from mogan.motion.flow import FlowEstimator, warp


def blend(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """The mean of both frames, ``(B, 3, H, W)`` in [0, 1]. Predicts fades perfectly and motion not at all."""
    return (first_BCHW + second_BCHW) / 2


def flow_warp(flow: FlowEstimator) -> Interpolator:
    """Both frames warped half way to each other along their flow, and averaged ("flow-warp").

    The flow at the middle is approximated from the two directions as in Super SloMo (Jiang et al. 2018, eq. 4 at t =
    1/2); there is no refinement and no reasoning about occlusion, so it is as good as the flow and ghosts at outlines.
    The result is rounded to 8-bit levels here, so that the truncation of VBench's formula costs nothing.
    """

    @torch.inference_mode()
    def interpolate(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        device = device_of(flow)
        in_a_row = torch.equal(first_BCHW[1:], second_BCHW[:-1])
        first_BCHW, second_BCHW = first_BCHW.to(device), second_BCHW.to(device)
        if in_a_row:  # RAFT then encodes every frame once
            row = torch.cat([first_BCHW, second_BCHW[-1:]])
            there, back = _along(flow, row), _along(flow, row.flip(0)).flip(0)
        else:
            there, back = _between(flow, first_BCHW, second_BCHW), _between(flow, second_BCHW, first_BCHW)
        to_first = (back - there) / 4
        middle = (warp(first_BCHW, to_first) + warp(second_BCHW, -to_first)) / 2
        return (middle * 255).round() / 255

    return interpolate


AMT_LICENCE = "AMT-S is licensed CC BY-NC 4.0: for non-commercial use only"


def amt_weights(checkout: Path) -> Path:
    """The weights in a checkout of AMT, beside its code or in ``pretrained``; safetensors first.

    Raises:
        UserError: the checkout or its weights are missing.
    """
    names = [
        folder / f"amt-s.{kind}" for kind in ("safetensors", "pth") for folder in (checkout, checkout / "pretrained")
    ]
    weights = next((path for path in names if path.is_file()), None)
    if weights is None or not (checkout / "networks" / "AMT-S.py").is_file():
        raise UserError(
            f"{checkout} is no checkout of AMT with its weights: `git clone https://github.com/MCG-NKU/AMT` and put "
            "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth into it"
        )
    return weights


def amt_s(checkout: Path, device: str | torch.device = "cpu") -> Interpolator:
    """AMT-S (Li et al. 2023) from the user's own checkout of MCG-NKU/AMT with its weights in it.

    As VBench runs it: pairs one by one, edges repeated to multiples of 16, centred, no scaling.

    Args:
        checkout: the folder with ``networks/AMT-S.py``, whose code is run, and what :func:`amt_weights` finds.
        device: where to run.

    Raises:
        UserError: the checkout lacks its code or weights.
    """
    weights = amt_weights(checkout)
    sys.path.insert(0, str(checkout.resolve()))  # its modules import each other as `networks...`
    try:
        model = importlib.import_module("networks.AMT-S").Model(corr_radius=3, corr_lvls=4, num_flows=3)
    except ImportError as error:
        raise UserError(f"the code in {checkout} does not import ({error}): install what it needs") from error
    finally:
        sys.path.remove(str(checkout.resolve()))
    model.load_state_dict(read_state(weights, "comb_block.0.weight"))
    model = model.to(device).eval().requires_grad_(False)
    half = torch.full((1, 1, 1, 1), 0.5, device=device)

    @torch.inference_mode()
    def interpolate(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        height, width = first_BCHW.shape[-2:]
        tall, wide = -height % 16, -width % 16
        around = (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)
        middles = []
        for pair in zip(first_BCHW, second_BCHW, strict=True):
            one, two = (F.pad(frame[None].to(device), around, mode="replicate") for frame in pair)
            middles.append(model(one, two, half, scale_factor=1, eval=True)["imgt_pred"])
        inside = torch.cat(middles)[..., tall // 2 : tall // 2 + height, wide // 2 : wide // 2 + width]
        return inside.to(first_BCHW.device)

    return interpolate


def _along(flow: FlowEstimator, frames_FCHW: Tensor) -> Tensor:
    """Flow ``(F - 1, 2, H, W)`` between frames in a row."""
    return flow((2 * frames_FCHW - 1).transpose(0, 1)[None].contiguous())[0].transpose(0, 1)


def _between(flow: FlowEstimator, one_BCHW: Tensor, two_BCHW: Tensor) -> Tensor:
    """Flow ``(B, 2, H, W)`` from every first frame to its second."""
    return flow(2 * torch.stack([one_BCHW, two_BCHW], dim=2) - 1)[:, :, 0]
