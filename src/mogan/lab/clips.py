"""Clips of the world as tensors, rendered by number: what the lab's family learns from and is judged on."""

import numpy as np
import torch
from torch import Tensor

from mogan.world.scenes import make_scene, render

TRAIN_SEED, HELD_OUT_SEED = 1, 2


def rendered_clips(count: int, seed: int, motion: str = "all", offset: int = 0) -> Tensor:
    """Render clips ``offset ... offset + count - 1`` of a world: uint8 ``(N, 3, F, H, W)``."""
    clips = [render(make_scene(seed, offset + i, motion=motion)) for i in range(count)]
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()


def to_video(clips: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return clips.float() / 127.5 - 1
