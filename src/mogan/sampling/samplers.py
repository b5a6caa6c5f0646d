"""Samplers: a student by its own levels, a teacher by many guided steps of UniPC (arXiv 2302.04867); latents to clips' frames.

A clip depends on its prompt and its seed alone, not on the batch it was made in: seed ``k`` gives what
``torch.manual_seed(k)`` followed by a call of the stock pipeline on a CPU gives.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from mogan.config import EULER, LCM
from mogan.errors import UserError
from mogan.models import autoencoder
from mogan.models.causal import CausalDenoiser
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.models.wan import Geometry
from mogan.sampling.causal_rollout import stream_causal
from mogan.sampling.flowmo import FLOWMO_STEPS, FlowMo
from mogan.sampling.rollout import follow, normal, roll_out
from mogan.schedule import shifted_levels

PIXELS_AT_ONCE = 81 * 480 * 832  # of the clips that are made together: a clip of Wan's size keeps a GPU busy alone
LATENTS_AT_ONCE = 60 * 104  # of a frame, of the clips that are decoded together: one of Wan's
CLIPS_AT_ONCE = 16  # of clips however small: a run that is stopped loses no more
HELD_OUT, HELD_OUT_AT_ONCE = 64, 8  # judged, so that one clip more or less does not decide; sampled together at most


def clips_at_once(size: Geometry, most: int = CLIPS_AT_ONCE) -> int:
    """How many clips of a size are made together: as many as ``PIXELS_AT_ONCE`` holds, at least one."""
    return max(1, min(most, PIXELS_AT_ONCE // (size.frames * size.height * size.width)))


def seeded(seeds: list[int]) -> list[torch.Generator]:
    """One generator per clip."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def sample_student(
    student: Denoiser,
    text_BLD: Tensor,
    shape: tuple[int, ...],
    sigmas: tuple[float, ...],
    seeds: list[int],
    solver: str = LCM,
) -> Tensor:
    """Latents ``(B, C, F, H, W)``, a clip per seed, by the student's own steps: fresh noise between them, or Euler along its flow.

    A step-conditioned student gets the ends of its steps; a causal one generates chunk by chunk.

    Args:
        student: few-step or causal.
        text_BLD: prompts.
        shape: ``(C, F, H, W)`` of a clip's latent.
        sigmas: its levels, descending, final 0 implied.
        seeds: one per clip.
        solver: ``lcm`` or ``euler``.
    """
    if isinstance(student, CausalDenoiser):
        return torch.cat(list(stream_causal(student, text_BLD, shape, sigmas, seeds)), 2)
    generators = seeded(seeds)
    noise = normal(torch.Size((len(seeds), *shape)), generators, text_BLD.device)
    if solver == EULER:
        return follow(student, noise, text_BLD, (*sigmas, 0.0), told=student.told)[0]
    return roll_out(student, noise, text_BLD, sigmas, generators).sample_BCFHW


@torch.no_grad()
def sample_teacher(
    teacher: Denoiser,
    text_BLD: Tensor,
    null_1LD: Tensor,
    shape: tuple[int, ...],
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    shift: float,
    solver: str = "unipc",
    flowmo: bool = False,
    change: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    see: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Latents ``(B, C, F, H, W)``, a clip per seed, by ``steps`` guided steps of UniPC (Wan's own solver) or Euler.

    ``shape`` is a clip's latent's, ``(C, F, H, W)``.

    Euler's levels are the shifted uniform grid from 1, and each is told to the network as it is; UniPC's begin a little
    lower. With ``flowmo`` the first 12 steps are guided towards latents whose temporal variance is low. ``change`` maps
    ``(velocity, x, sigma)`` to the velocity that is followed; see :func:`mogan.sampling.motion_score.steer`. ``see`` is given
    the number of every step and the latents before it, and at last ``steps`` and the final ones.
    """
    x = normal(torch.Size((len(seeds), *shape)), seeded(seeds), text_BLD.device)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(steps, device=x.device)
    # UniPC rounds timesteps; the network is told what Wan tells it
    levels, tell = scheduler.sigmas.to(x.device), scheduler.timesteps / 1000
    if solver == "euler":
        levels = torch.tensor((*shifted_levels(steps, shift), 0.0), device=x.device)
        tell = levels[:-1]
    smoother = FlowMo() if flowmo else None
    for i, (level, timestep) in enumerate(zip(tell, scheduler.timesteps, strict=True)):
        if see is not None:
            see(i, x)
        told = level.expand(len(x)).float()
        predict = partial(guided_velocity, teacher, sigma=told, text_BLD=text_BLD, null_BLD=null_1LD, guidance=guidance)
        if smoother is not None and i < FLOWMO_STEPS:
            x = smoother(x, predict, levels[i])
        velocity = predict(x)
        if change is not None:
            velocity = change(velocity, x, told)
        if solver == EULER:
            x = x + (levels[i + 1] - levels[i]) * velocity
        else:
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    if see is not None:
        see(steps, x)
    return x


def clips_of(vae: Any, latents_BCFHW: Tensor) -> list[Iterator[np.ndarray]]:
    """Each clip as a stream of frames, uint8 ``(H, W, 3)``, which are decoded when the first of them is asked for.

    Clips whose frames together are no larger than one of Wan's are decoded together: on a CPU torch convolves a clip alone, in
    fp32, by slower code, and takes twice as long.

    Raises:
        UserError: one is not made of numbers; it would be shown as black.
    """
    refuse_what_is_no_number(latents_BCFHW)
    at_once = max(1, LATENTS_AT_ONCE // latents_BCFHW[0, 0, 0].numel())
    return [clip for part in latents_BCFHW.split(at_once) for clip in _decoded_together(vae, part)]


def _decoded_together(vae: Any, latents_BCFHW: Tensor) -> list[Iterator[np.ndarray]]:
    if len(latents_BCFHW) == 1:
        return [pictures(vae, latents_BCFHW)]

    @cache
    def pieces() -> list[np.ndarray]:
        return [to_frames(piece) for piece in autoencoder.stream_video(vae, latents_BCFHW)]

    def clip(number: int) -> Iterator[np.ndarray]:
        for piece in pieces():
            yield from piece[number]

    return [clip(number) for number in range(len(latents_BCFHW))]


def refuse_what_is_no_number(latents: Tensor) -> None:
    """Raise UserError if latents of any shape hold a number that is infinite or NaN."""
    if not latents.isfinite().all():
        raise UserError(
            "sampling ended in numbers that are infinite or none (NaN): take a guidance and a shift nearer to the model's own, or "
            "--precision fp32; if it samples so by itself, its weights are damaged"
        )


def pictures(vae: Any, latent_1CFHW: Tensor) -> Iterator[np.ndarray]:
    """Frames of one clip, uint8 ``(H, W, 3)``, as they are decoded."""
    for piece in autoencoder.stream_video(vae, latent_1CFHW):
        yield from to_frames(piece)[0]


def to_frames(video_BCFHW: Tensor) -> np.ndarray:
    """Video in [-1, 1] to uint8 arrays ``(B, F, H, W, 3)``."""
    return ((video_BCFHW + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy()
