"""A clip without an end: chunk after chunk, the text asked for before each, of the past no more than a window.

A text that changes reaches what was made before it, too: the past that is kept is run again under the new one (LongLive,
arXiv 2509.22622). Else its keys and values, made of features that had attended to the old text, go on asking for that.
So does a first latent that is replaced by another one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, groupby, repeat

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Cache, Causal, Policy
from mogan.sampling.causal_rollout import noised_to, take_steps
from mogan.sampling.rollout import normal

# by number of the frame: its chunk's first frame, its latent as later chunks saw it, and the level of that
Past = dict[int, tuple[int, Tensor, float]]
Given = Float[Tensor, "1 c g h w"] | None


def bounded(how: Causal, frames: int) -> Policy:
    """What an endless clip sees of its past: the student's own window, else one as long as the ``frames`` it was trained on.

    Such a window keeps the first chunk if another one fits beside it, since its latents are unlike all others (Self-Forcing, section
    3.4), and counts from 0 what it holds: places in time stay those of training.
    """
    first, rest = (min(size, frames) for size in (how.first, how.rest))
    sink = first if first + rest <= frames else 0
    return Policy(frames, sink, None, True) if how.policy.window is None else how.policy


@torch.no_grad()
def stream_endless(
    student: CausalDenoiser,
    text_at: Callable[[int], Float[Tensor, "1 l d"]],
    shape: tuple[int, ...],
    sigmas: tuple[float, ...],
    seed: int,
    again: bool = True,
    given: Given | Callable[[int], Given] = None,
) -> Iterator[Float[Tensor, "1 c f h w"]]:
    """Latents, chunk by chunk as they are made; as long as nothing has left the window those of a clip of ``shape``.

    Args:
        student: as its ``how`` says, within :func:`bounded`.
        text_at: the text of the chunk that begins with a latent of this number, asked just before it is made.
        shape: C, F, H, W of the clips it was trained on.
        sigmas: as of :func:`mogan.sampling.rollout.roll_out`.
        seed: of its noise, which is drawn ``F`` latents at a time.
        again: run the past again under a text that is new.
        given: the first chunk ``(1, C, G, h, w)``, which is seen clean and not made; or what says it, asked as ``text_at`` is.
            Another one than before takes its place in the past, as long as a sink keeps that, and the past is run again.
    """
    how, generator = student.how, [torch.Generator().manual_seed(seed)]
    given_at = given if callable(given) else lambda start: given
    text, shown, past, start = text_at(0), given_at(0), {}, 0  # type: Tensor, Given, Past, int
    cache = student.begin(text, bounded(how, shape[1]))
    noise = normal(torch.Size((1, *shape)), generator, text.device)
    for frames in (min(size, shape[1]) for size in chain([how.first], repeat(how.rest))):
        cache = cache.make_room(frames)
        past = {number: past[number] for number in cache.frames}
        now, other = (text_at(start), given_at(start)) if start else (text, shown)
        again_now = again and now is not text
        if other is not None and other is not shown:
            past |= {number: (0, one, 0.0) for number, one in enumerate(other.split(1, 2)) if number in past}
            shown, again_now = other, True
        if again_now:
            cache = retold(student, cache, past, now)
        text = now
        while noise.shape[2] < frames:
            noise = torch.cat([noise, normal(torch.Size((1, *shape)), generator, text.device)], 2)
        x, noise = noise[:, :, :frames], noise[:, :, frames:]
        if start > 0 or shown is None:
            x0 = take_steps(student, x, text, how.levels(min(start, 1), sigmas), generator, cache)
            level = how.context_sigma
        else:
            x0, level = shown, 0.0
        yield x0
        seen = noised_to(x0, level, generator)
        cache = student.remember(seen, text, cache, level)
        past |= {start + i: (start, latent, level) for i, latent in enumerate(seen.split(1, 2))}
        start += frames


def retold(student: CausalDenoiser, cache: Cache, past: Past, text: Tensor) -> Cache:
    """The frames that a cache keeps, recomputed under another text ``(1, L, D)``, chunk by chunk.

    An EMA sink, which is no frame's, stays as it is.
    """
    policy = cache.policy
    averaged = () if policy.decay is None else tuple(p for p in cache.pieces if p.frames[0] < policy.sink)
    new = replace(cache, pieces=averaged)
    left = enumerate(cache.frames[len(new.frames) :])
    for _, run in groupby(left, lambda place: (place[1] - place[0], past[place[1]][0])):
        numbers = [number for _, number in run]
        latents = torch.cat([past[number][1] for number in numbers], 2)
        new = student.remember(latents, text, replace(new, length=numbers[0]), past[numbers[0]][2])
    return replace(new, length=cache.length)
