"""Batches of a cache: a pure function of (seed, rank, iteration, update, repeat); one read ahead."""

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mogan.data.cache import Cache
from mogan.devices import sent
from mogan.models.attention import stack_text
from mogan.models.conditions import conditioned
from mogan.terms import KINDS, LATENT, OBSERVATION, PATH

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """The data of one update, on the CPU.

    Attributes:
        ids: of the clips; ``prompts``: their captions.
        text: one embedding ``(L, D)`` per clip, trimmed to its tokens.
        latent_BCFHW: normalised latents of real clips, fp32.
        observation_BCFHW: what MoGAN's discriminator gets of real clips, bf16.
        window_start: latent frame at which a window begins.
        places: numbers of the clips within the whole batch, whichever process holds them.
        more: additions of an objective, by name: a list or tensor with one entry per clip, or anything else that can be sliced.
        path_BKCFHW: a teacher's trajectory to each clip, at the student's levels, most noisy first, the clip last; fp32.
        control_BKFHW: controls of a VACE, whose references precede ``latent_BCFHW`` too; or given first frames, as an
            image-to-video model reads them, or their latents.
        picture_BTD: image features of given first frames.
    """

    ids: list[str]
    prompts: list[str]
    text: list[Tensor]
    latent_BCFHW: Tensor | None = None
    observation_BCFHW: Tensor | None = None
    window_start: int | None = None
    places: list[int] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    path_BKCFHW: Tensor | None = None
    control_BKFHW: Tensor | None = None
    picture_BTD: Tensor | None = None

    def told(self, device: torch.device | str, text_BLD: Tensor | None = None) -> Any:
        """The clips' conditions: text ``(B, L, D)`` and controls (:mod:`mogan.models.conditions`); ``text_BLD`` replaces the text."""
        text = stack_text(self.text, device) if text_BLD is None else text_BLD
        return conditioned(
            text, *(None if t is None else sent(t, device) for t in (self.control_BKFHW, self.picture_BTD))
        )


def draw_batch(
    cache: Cache,
    *,
    seed: int,
    iteration: int,
    update: int,
    size: int,
    repeat: int = 0,
    rank: int = 0,
    ranks: int = 1,
    want: Collection[str] = (),
    observation: Callable[[str, int], Tensor | None] = lambda clip, start: None,
    starts: Sequence[int] = (),
    prompts: Cache | None = None,
    levels: Sequence[float] = (),
    controls: bool = False,
    given: int = 0,
) -> Batch:
    """The batch of one update: a pure function of its arguments, so a resumed run sees what it would have seen.

    Every ``(update, repeat)`` walks through the clips in its own random order, a new one each epoch; the ranks of an
    iteration take neighbouring stretches of it, so no clip comes twice in an epoch.

    Args:
        cache: where from.
        seed: of the run.
        iteration: from 0.
        update: number of the update in the plan.
        size: clips per rank.
        repeat: from 0, for an update that is done several times in an iteration.
        rank: this process.
        ranks: processes in all.
        want: any of "latent" and "observation", or "path"; text always comes.
        observation: reads that of a clip and a start, where it is there; if one is not, the batch has none.
        starts: where a window may start, latent frames; one is drawn, the same for all ranks.
        prompts: where the text comes from, if not from the clips' captions: in a random order, that of clips if they are as many.
        levels: at which trajectories are read.
        controls: those of the clips whose captions are the text come too.
        given: or so many of their first latent frames.

    Raises:
        UserError: a clip whose caption is needed has none.
    """
    unknown = set(want) - {*KINDS}
    assert not unknown, f"a batch has no {unknown}"
    if set(want) - {PATH}:
        cache.require_clips()
    first = (iteration * ranks + rank) * size

    def walk(of: Cache) -> list[dict]:
        return [of.entries[clip_at(len(of), seed, update, repeat, first + i)] for i in range(size)]

    said = walk(prompts or cache)
    ids = [entry["id"] for entry in (walk(cache) if want else said)]
    start = start_at(starts, seed, iteration, update, repeat) if starts else None
    latent = (
        torch.stack([cache.whole(i) if controls else cache.latent(i) for i in ids]).float() if LATENT in want else None
    )
    shown, pictures = (prompts or cache).shown([entry["id"] for entry in said]) if controls else (None, None)
    if given:
        shown = torch.stack([(prompts or cache).latent(entry["id"])[:, :given] for entry in said]).float()
    passed = torch.stack([cache.path_to(i, levels) for i in ids]).float() if PATH in want else None
    seen = None
    if OBSERVATION in want:
        assert start is not None, "observations are made for window starts: say which"
        found = [observation(i, start) for i in ids]
        there = [one for one in found if one is not None]
        seen = torch.stack(there) if len(there) == size else None
    captions = [entry["caption"] for entry in said]
    text = [(prompts or cache).text(caption) for caption in captions]
    places = list(range(rank * size, (rank + 1) * size))
    return Batch(
        ids, captions, text, latent, seen, start, places, path_BKCFHW=passed, control_BKFHW=shown, picture_BTD=pictures
    )


def start_at(starts: Sequence[int], seed: int, iteration: int, update: int, repeat: int) -> int:
    """Where the window of a step starts, latent frames: drawn from ``starts``, the same on every process."""
    rng = np.random.default_rng([seed, 1, update, repeat, iteration])
    return int(starts[int(rng.integers(len(starts)))])


def clip_at(count: int, seed: int, update: int, repeat: int, position: int) -> int:
    """Number of the clip at a position of the endless walk of ``(update, repeat)`` through ``count`` clips."""
    epoch, place = divmod(position, count)
    return int(_order(count, seed, update, repeat, epoch)[place])


@lru_cache(maxsize=64)
def _order(count: int, seed: int, update: int, repeat: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, update, repeat, epoch]).permutation(count)


def one_ahead(compute: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made, None, None]:
    """``compute(item)`` for each item, the next one already being computed in a thread: disks are read during a step."""
    with ThreadPoolExecutor(1, "mogan-data") as thread:
        coming: Future[Made] | None = None
        for item in items:
            ready, coming = coming, thread.submit(compute, item)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
