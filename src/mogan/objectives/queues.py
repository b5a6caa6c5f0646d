"""The student's own latents that wait at its levels: judged there without a rollout (AccVideo, arXiv 2503.19462)."""

import torch
from torch import Tensor

from mogan.data.cache import Cache
from mogan.distributed import World
from mogan.errors import UserError

EMPTY = -1  # no clip


class Queues:
    """The student's own latents, a batch at each key level below 1, without a rollout: a step takes from one level's queue and
    gives to the next one's.

    Every process holds all of them, so any number of processes can go on with a checkpoint.

    Args:
        cache: where the captions of clips are.
        world: the processes that have a part of the batch each.
        steps: levels.
        size: clips of a batch.
        shape: of a latent.

    Attributes:
        latents: ``(steps, size, C, F, H, W)``, row ``k`` at level ``s_{k + 1}``.
        clips: ``(steps, size)``, on the CPU: which clip's caption each was made of, ``EMPTY`` at first.
    """

    def __init__(self, cache: Cache, world: World, steps: int, size: int, shape: tuple[int, ...]):
        self.cache, self.world = cache, world
        self.latents = torch.zeros(steps, size, *shape, device=world.device)
        self.clips = torch.full((steps, size), EMPTY)
        self.number = {entry["id"]: number for number, entry in enumerate(cache.entries)}

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"latents": self.latents, "clips": self.clips}

    def take(self, row: int, places: list[int]) -> tuple[Tensor, list[int]]:
        """Latents ``(B, C, F, H, W)`` of some places of the batch, and the numbers of their clips.

        Raises:
            UserError: nothing has been given there yet.
        """
        numbers = self.clips[row, places].tolist()
        if EMPTY in numbers:
            raise UserError(
                f"no latents of the student wait at its level {row + 1}: let the updates of student and discriminator by one "
                f"objective happen in every iteration, from one on that {len(self.clips)} divides"
            )
        return self.latents[row, places], numbers

    def give(self, row: int, places: list[int], latents: Tensor, numbers: list[int]) -> None:
        """Put latents ``(B, C, F, H, W)`` there, those of all processes."""
        where, clips = self.world.rows(torch.tensor([places, numbers]).T).T
        self.latents[row, where.tolist()] = self.world.rows(latents)
        self.clips[row, where] = clips

    def text(self, numbers: list[int]) -> list[Tensor]:
        """The captions' embeddings, ``(L, D)`` each."""
        return [self.cache.text(self.cache.entries[number]["caption"]) for number in numbers]
