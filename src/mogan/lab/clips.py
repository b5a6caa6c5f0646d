"""Clips of the world as tensors, rendered by number: what the lab's family learns from and is judged on."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from mogan.world.scenes import render_numbers

TRAIN_SEED, HELD_OUT_SEED = 1, 2


def rendered_clips(count: int, seed: int, motion: str = "all", offset: int = 0) -> Tensor:
    """Render clips ``offset ... offset + count - 1`` of a world: uint8 ``(N, 3, F, H, W)``."""
    return _as_tensor(render_numbers(seed, range(offset, offset + count), motion))


def rendered_elsewhere(chunks: Sequence[range], seed: int) -> Iterator[Tensor]:
    """Render chunks of clips, uint8 ``(B, 3, F, H, W)``, in other processes, in order and few ahead of their use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # a fresh interpreter imports NumPy and no torch: forking a process with a GPU is not safe
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        ahead = [pool.submit(render_numbers, seed, chunk) for chunk in chunks[: 2 * cores]]
        for number in range(len(chunks)):
            yield _as_tensor(ahead.pop(0).result())
            if number + 2 * cores < len(chunks):
                ahead.append(pool.submit(render_numbers, seed, chunks[number + 2 * cores]))


def _as_tensor(clips: np.ndarray) -> Tensor:
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).contiguous()


def to_video(clips: Tensor) -> Tensor:
    """uint8 to float in [-1, 1], any shape."""
    return clips.float() / 127.5 - 1
