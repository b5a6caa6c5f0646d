"""First frames of clips, for models that are given one: which clip belongs to a prompt, and sampling from it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogan.autoencoder import encode_video
from mogan.clips import to_video
from mogan.denoiser import Denoiser
from mogan.errors import UserError
from mogan.listing import scan
from mogan.lists import printable
from mogan.rollout import animate, normal
from mogan.video import read_frames
from mogan.wan import Geometry


def clip_of_prompts(folder: Path, prompts: list[str]) -> dict[str, Path]:
    """For every prompt, the first clip of a folder (see :func:`mogan.listing.scan`) that has it as its caption.

    Raises:
        UserError: a prompt is no clip's caption.
    """
    clips: dict[str | None, Path] = {}
    problems: dict[str | None, str] = {}
    for source in scan(folder):
        if source.problem is None:
            clips.setdefault(source.caption, source.path)
        else:
            problems.setdefault(source.caption, f" ({printable(source.name)} {source.problem})")
    missing = [prompt for prompt in prompts if prompt not in clips]
    if missing:
        raise UserError(
            f"{folder} has no clip with the caption {missing[0]!r}{problems.get(missing[0], '')}: give --prompts that are captions of its clips"
        )
    return {prompt: clips[prompt] for prompt in prompts}


@torch.no_grad()
def sample_from_first_frames(
    student: Denoiser,
    vae: Any,
    clips: list[Path],
    text_BLD: Tensor,
    shape: tuple[int, ...],
    sigmas: tuple[float, ...],
    generators: list[torch.Generator],
    size: Geometry,
    *,
    null_1LD: Tensor,
    guidance: float,
) -> Tensor:
    """Latents of one clip per generator, by Euler steps, the first frame of ``clips`` given."""
    frames = [next(read_frames(path, size=(size.height, size.width), only={0})).image_HWC for path in clips]
    given = encode_video(vae, torch.cat([to_video(frame[None]) for frame in frames]).to(text_BLD.device))
    noise = normal(torch.Size((len(clips), *shape)), generators, text_BLD.device)
    return animate(student, noise, given, text_BLD, null_1LD, sigmas, guidance)
