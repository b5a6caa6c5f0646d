"""First frames of clips, for models that are given one: which clip belongs to a prompt, and sampling from it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mogan.data.clips import to_video
from mogan.data.controls import PICTURES, read_picture
from mogan.data.listing import Source, scan
from mogan.data.lists import printable
from mogan.data.video import read_frames
from mogan.errors import UserError
from mogan.models.autoencoder import encode_video
from mogan.models.causal import CausalDenoiser
from mogan.models.denoiser import Denoiser
from mogan.models.wan import Geometry
from mogan.sampling.causal_rollout import stream_causal
from mogan.sampling.rollout import animate, normal


def clip_of_prompts(folder: Path, prompts: list[str]) -> dict[str, Path]:
    """For every prompt, the first clip of a folder (see :func:`mogan.data.listing.scan`) that has it as its caption and a first
    frame that can be read.

    Raises:
        UserError: a prompt is no clip's caption, or all its clips are broken.
    """
    clips: dict[str | None, list[Source]] = {}
    for source in scan(folder):
        clips.setdefault(source.caption, []).append(source)
    found = {prompt: _first_readable(clips.get(prompt, [])) for prompt in prompts}
    for prompt, (path, problem) in found.items():
        if path is None:
            raise UserError(
                f"{folder} has no clip with the caption {prompt!r}{problem}: give --prompts that are captions of its clips"
            )
    return {prompt: path for prompt, (path, _) in found.items() if path is not None}


def _first_readable(sources: list[Source]) -> tuple[Path | None, str]:
    problem = ""
    for source in sources:
        if source.problem is None:
            try:
                next(read_frames(source.path, only={0}))
                return source.path, ""
            except UserError as error:
                problem = problem or f" ({error})"
        problem = problem or f" ({printable(source.name)} {source.problem})"
    return None, problem


def first_pictures(clips: list[Path], size: Geometry) -> list[np.ndarray]:
    """The first frame of each clip, or of a picture that, scaled until it covers a frame, and of that the centre; uint8 ``(H, W, 3)``.

    What is transparent lies over black, as in videos.
    """
    fit = (size.width, size.height)
    return [
        np.array(ImageOps.fit(Image.fromarray(read_picture(path, "black")), fit, Image.Resampling.LANCZOS))
        if path.suffix.lower() in PICTURES
        else next(read_frames(path, size=(size.height, size.width), only={0})).image_HWC
        for path in clips
    ]


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
    """Latents ``(B, C, F, H, W)``, a clip per generator, first frames of ``clips`` given: Euler steps, or a causal student's chunks.

    Raises:
        UserError: a causal student's first chunk is longer than a latent, or a clip cannot be read.
    """
    frames = first_pictures(clips, size)
    given = encode_video(vae, torch.cat([to_video(frame[None]) for frame in frames]).to(text_BLD.device))
    if isinstance(student, CausalDenoiser):
        if student.how.first != 1:
            raise UserError(
                f"a picture is one latent and this student's first chunk is {student.how.first}: leave out --first-frames"
            )
        seeds = [generator.initial_seed() for generator in generators]
        return torch.cat(list(stream_causal(student, text_BLD, shape, sigmas, seeds, given)), 2)
    noise = normal(torch.Size((len(clips), *shape)), generators, text_BLD.device)
    return animate(student, noise, given, text_BLD, null_1LD, sigmas, guidance)
