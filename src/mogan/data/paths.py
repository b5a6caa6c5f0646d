"""What a teacher passes on its way from noise to a clip: a file each in a store of ``mogan trajectories``."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mogan.errors import UserError

SAME = 1e-6  # levels that differ by less are one


def path_file(store: Path, clip: str) -> Path:
    """Where a path lies."""
    return store / "paths" / f"{clip}.safetensors"


def rows_of(kept: Sequence[float], levels: Sequence[float], store: Path) -> list[int]:
    """Places of ``levels`` among those that a store kept.

    Raises:
        UserError: it did not keep one of them. What lies at another level is not what a network that is told this one expects.
    """
    found = [next((row for row, one in enumerate(kept) if abs(one - level) < SAME), None) for level in levels]
    rows = [row for row in found if row is not None]
    if len(rows) < len(found):
        raise UserError(
            f"{store} keeps the levels {_told(kept)}, and the student's are {_told(levels)}: make the paths with a --shift and "
            "--steps that pass these, and --keep them"
        )
    return rows


def read_path(file: Path, rows: Sequence[int], shape: Sequence[int]) -> Float[Tensor, "k c f h w"]:
    """Some rows of a path that was kept as ``(K, C, F, H, W)``, and nothing else of the file.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    try:
        with safe_open(file, "pt") as opened:
            latents = opened.get_slice("latents")
            there = latents.get_shape()
            kept = torch.cat([latents[row : row + 1] for row in rows]) if there == list(shape) else None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): {AGAIN}") from error
    if kept is None:
        raise UserError(f"{file} holds latents of {tuple(there)}, not {tuple(shape)}: {AGAIN}")
    if not kept.isfinite().all():
        raise UserError(f"{file} holds numbers that are infinite or none (NaN): {AGAIN}")
    return kept


AGAIN = "delete it and run the same `mogan trajectories` command again"


def _told(levels: Sequence[float]) -> str:
    some = [f"{level:.4g}" for level in levels]
    return ", ".join(some if len(some) <= 9 else [*some[:4], "...", *some[-2:]])
