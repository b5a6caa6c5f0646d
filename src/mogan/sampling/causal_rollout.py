"""A causal student's rollout: chunk after chunk, each by the student's few steps, each on what it made before.

Self-Forcing (arXiv 2506.08009): what was made is clean when the next chunk sees it, through a pass of its own whose keys and
values are kept. Gradient flows through every chunk's judged step and through nothing else.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.config import LCM
from mogan.models.autoencoder import stream_chunks
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import FULL, Cache, Causal, Policy
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, levels_of

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class Chunked:
    """Chunk by chunk, each by the student's few steps, all of them stopped after the one step that is drawn (Self-Forcing).

    Attributes:
        causal: how clips come about.
        counts: numbers of steps, ascending, of which one is drawn for the whole clip; their levels are
            :func:`mogan.schedule.levels_of` all. ``None``: all of the student's steps, always.

    Of a student for chunks of several sizes one is drawn for the whole batch. A fixed warm-up is an update with another
    rollout: ``Update(..., stop=100, rollout=Chunked(causal.fixed))`` before ``Update(..., start=100)``.
    """

    causal: Causal
    counts: tuple[int, ...] | None = None
    solver: ClassVar[str] = LCM

    def stages(self, sigmas: tuple[float, ...]) -> list[tuple[int, int, int]]:
        """What can be drawn, each as likely: a number of steps, the last step of the first chunk and that of the others.

        A first chunk with levels of its own is stopped as far along its steps as the others along theirs: of every chunk every
        step is judged as often as any other, and where the others end whole, so may it.
        """
        counts, own = self.counts or (len(sigmas),), self.causal.first_sigmas
        every = math.lcm(*counts, *([len(own)] if own else []))
        return [(n, k * len(own or range(n)) // every, k * n // every) for n in counts for k in range(every)]

    def draw(self, sigmas: tuple[float, ...], generator: torch.Generator) -> int:
        """The place in :meth:`stages`; of a student for several sizes of chunks, in as many copies of it."""
        stages, sizes = len(self.stages(sigmas)), len(self.causal.variants)
        place = int(torch.randint(stages, (1,), generator=generator))
        return place if sizes == 1 else place + stages * int(torch.randint(sizes, (1,), generator=generator))

    def whole(self, sigmas: tuple[float, ...], count: int) -> int:
        """The place of a clip that takes all of so many steps."""
        return max(place for place, (steps, *_) in enumerate(self.stages(sigmas)) if steps == count)

    def steps(self, sigmas: tuple[float, ...]) -> float:
        """Steps before the judged one, a mean, but for a first chunk with levels of its own. Raises ValueError for counts that
        the student has not.
        """
        counts = self.counts or (len(sigmas),)
        if list(counts) != sorted({*counts} & {*range(1, len(sigmas) + 1)}):
            raise ValueError(
                f"rollout: counts {counts} must rise and lie within 1 and the student's {len(sigmas)} levels"
            )
        return sum((count - 1) / 2 for count in counts) / len(counts)

    def make(
        self,
        student: CausalDenoiser,
        noise: Tensor,
        text: Tensor,
        sigmas: tuple[float, ...],
        generator: Generators,
        step: int,
        grad: bool,
    ) -> Rollout:
        """:func:`roll_out_causal` from noise ``(B, C, F, H, W)`` for texts ``(B, L, D)``; ``step`` is a place in :meth:`stages`."""
        stages = self.stages(sigmas)
        how, (count, first, last) = self.causal.variants[step // len(stages)], stages[step % len(stages)]
        levels = levels_of(sigmas, count)
        made = roll_out_causal(
            student, noise, text, levels, generator, chunks=how.chunks(noise.shape[2]), policy=how.policy, grad=grad,
            steps_of=lambda number: how.levels(number, levels)[: (last if number else first) + 1],
            context_sigma=how.context_sigma,
        )  # fmt: skip
        return replace(made, exit_step=last, count=count)


def roll_out_causal(
    student: CausalDenoiser,
    noise_BCFHW: Float[Tensor, "b c f h w"],
    text_BLD: Float[Tensor, "b l d"],
    sigmas: tuple[float, ...],
    generator: Generators,
    *,
    chunks: Sequence[int],
    policy: Policy = FULL,
    exit_step: int | None = None,
    grad: bool = False,
    steps_of: Callable[[int], tuple[float, ...]] | None = None,
    given_BCFHW: Float[Tensor, "b c g h w"] | None = None,
    context_sigma: float = 0.0,
) -> Rollout:
    """:func:`mogan.sampling.rollout.roll_out`, chunk by chunk; in one chunk the same bit for bit.

    The step that ends one chunk ends them all, and its prediction, however early, is the chunk and the next one's past.

    Args:
        student: the few-step generator.
        noise_BCFHW: starting noise of the whole clip; fresh noise is drawn chunk by chunk, step by step.
        text_BLD: as of ``roll_out``.
        sigmas: as of ``roll_out``.
        generator: as of ``roll_out``.
        exit_step: as of ``roll_out``.
        grad: as of ``roll_out``.
        chunks: latent frames of each chunk.
        policy: what a chunk sees of the past.
        steps_of: levels of a chunk by its number, where they are not ``sigmas``.
        given_BCFHW: first frames, in whole chunks; they stay as they are.
        context_sigma: level to which a finished chunk is noised for those after it to see.
    """
    step = len(sigmas) - 1 if exit_step is None else exit_step
    parts = _chunks(
        student, noise_BCFHW, text_BLD, sigmas, generator, chunks=chunks, policy=policy, exit_step=exit_step, grad=grad,
        steps_of=steps_of, given_BCFHW=given_BCFHW, context_sigma=context_sigma,
    )  # fmt: skip
    return Rollout(torch.cat(list(parts), 2), step, text_BLD)


@torch.no_grad()
def stream_causal(
    student: CausalDenoiser,
    text_BLD: Float[Tensor, "b l d"],
    shape: tuple[int, ...],
    sigmas: tuple[float, ...],
    seeds: Sequence[int],
    given_BCFHW: Float[Tensor, "b c g h w"] | None = None,
) -> Iterator[Float[Tensor, "b c f h w"]]:
    """Latents of one clip per seed, chunk by chunk as they are made; given ones come first. ``shape``: C, F, H, W of clips."""
    how, generators = student.how, [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = normal(torch.Size((len(seeds), *shape)), generators, text_BLD.device)
    yield from _chunks(
        student, noise, text_BLD, sigmas, generators, chunks=how.chunks(shape[1]), policy=how.policy,
        steps_of=partial(how.levels, sigmas=sigmas), given_BCFHW=given_BCFHW, context_sigma=how.context_sigma,
    )  # fmt: skip


def sample_causal(
    student: CausalDenoiser,
    vae: Any,
    text_BLD: Float[Tensor, "b l d"],
    shape: tuple[int, ...],
    sigmas: tuple[float, ...],
    seeds: Sequence[int],
) -> Iterator[Float[Tensor, "b 3 g h w"]]:
    """Frames of :func:`stream_causal`'s clips, in [-1, 1]: a chunk's are decoded before the next begins, as in the whole clip's decode.

    Args:
        student: causal; its ``how`` says chunks and window.
        vae: decodes a latent frame at a time.
        text_BLD: prompts.
        shape: ``(C, F, H, W)`` of a clip's latent.
        sigmas: the student's levels, descending, final 0 implied.
        seeds: one per clip.
    """
    return stream_chunks(vae, stream_causal(student, text_BLD, shape, sigmas, seeds))


def _chunks(
    student: CausalDenoiser,
    noise: Tensor,
    text: Tensor,
    sigmas: tuple[float, ...],
    generator: Generators,
    *,
    chunks: Sequence[int],
    policy: Policy,
    exit_step: int | None = None,
    grad: bool = False,
    steps_of: Callable[[int], tuple[float, ...]] | None = None,
    given_BCFHW: Tensor | None = None,
    context_sigma: float = 0.0,
) -> Iterator[Tensor]:
    total, given, start = sum(chunks), 0 if given_BCFHW is None else given_BCFHW.shape[2], 0
    if total != noise.shape[2]:
        raise ValueError(f"chunks {tuple(chunks)} are {total} frames, the noise {noise.shape[2]}")
    if given not in [sum(chunks[:number]) for number in range(len(chunks))]:
        raise ValueError(f"{given} given frames are not the first of chunks {tuple(chunks)}")
    cache = student.begin(text, policy)
    for number, frames in enumerate(chunks):
        stop = start + frames
        if given_BCFHW is not None and stop <= given:
            x0 = given_BCFHW[:, :, start:stop]
        else:
            levels = sigmas if steps_of is None else steps_of(number)
            last = len(levels) - 1 if exit_step is None else min(exit_step, len(levels) - 1)
            cache = cache.make_room(frames)
            x0 = take_steps(student, noise[:, :, start:stop], text, levels[: last + 1], generator, cache, grad)
        yield x0
        if stop < total:
            level = context_sigma if stop > given else 0.0
            cache = student.remember(noised_to(x0.detach(), level, generator), text, cache, level)
        start = stop


def take_steps(
    student: CausalDenoiser,
    x: Tensor,
    text: Tensor,
    levels: Sequence[float],
    generator: Generators,
    cache: Cache,
    learns: bool = False,
) -> Tensor:
    """A chunk ``(B, C, F, H, W)`` from noise ``x``, at ``levels``, fresh noise between them; gradient through the last step alone."""
    last = len(levels) - 1
    for step, level in enumerate(levels):
        with torch.set_grad_enabled(learns and step == last):
            x0 = student.chunk(x, _level(x, level), text, cache)
        if step < last:
            x = noised_to(x0, levels[step + 1], generator)
    return x0


def noised_to(x0: Tensor, level: float, generator: Generators) -> Tensor:
    """A latent ``(B, C, F, H, W)`` noised to ``level``; at level 0 the same tensor, and nothing is drawn."""
    return add_noise(x0, normal(x0.shape, generator, x0.device), _level(x0, level)) if level else x0


def _level(x: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x),), sigma, device=x.device)
