"""What a discriminator sees of real clips: computed by the process that needs it, when a run first needs it, and kept in
the cache. Nobody waits for anybody: runs and processes that share a cache may compute the same one, to the same bits.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mogan.config import Config
from mogan.data.batches import Batch, clip_at, start_at
from mogan.data.cache import Cache, save_tensors
from mogan.disk.files import replacing
from mogan.errors import UserError
from mogan.terms import OBSERVATION

DISK_MARGIN = 2_000_000_000  # bytes that filling a cache leaves free


@dataclass(frozen=True)
class Observations:
    """Observations of a cache's clips, one file per clip and start of the window.

    Attributes:
        cache: whose clips.
        key: the settings that decide the result (flow network, window, scale ...); their hash names the folder.
        observe: ``(latent (1, C, F, H, W), start) -> observation (1, ...)``, stored in bf16. It gets one clip at a time, so
            that an observation does not depend on its company.
    """

    cache: Cache
    key: dict
    observe: Callable[[Tensor, int], Tensor]

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        settings = json.dumps(self.key, sort_keys=True)
        return self.cache.path / "observations" / hashlib.sha256(settings.encode()).hexdigest()[:16]

    def path(self, clip: str, start: int) -> Path:
        """Where one is kept."""
        return self.folder / str(start) / f"{clip}.safetensors"

    def read(self, clip: str, start: int) -> Tensor | None:
        """The observation ``(C, F, H, W)`` of a clip's window from latent frame ``start`` on; None: not computed yet.

        Raises:
            UserError: its file is damaged.
        """
        path = self.path(clip, start)
        try:
            return load_file(path)["observation"]
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError) as error:
            why = "it holds no observation" if isinstance(error, KeyError) else error
            raise UserError(f"{path} cannot be read ({why}): delete it, it is computed again") from error

    def get(self, clip: str, start: int) -> Tensor:
        """The observation ``(C, F, H, W)``, in bf16 as it is stored; computed first if it is missing. A resumed run sees the same."""
        seen = self.read(clip, start)
        if seen is not None:
            return seen
        with torch.no_grad():
            seen = self.observe(self.cache.latent(clip)[None], start)[0].to(torch.bfloat16).cpu()
        save_tensors(self.path(clip, start), {"observation": seen}, {})
        return seen

    def complete(self, batch: Batch) -> Batch:
        """The batch with its observations, those that were missing computed now.

        This is for the thread that trains: the networks are not made for two at a time, nor is the memory.
        """
        if batch.observation_BCFHW is not None:
            return batch
        assert batch.window_start is not None, "observations are made for window starts: say which"
        return replace(batch, observation_BCFHW=torch.stack([self.get(clip, batch.window_start) for clip in batch.ids]))

    def missing(self, needed: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of :func:`drawn` that are not there."""
        pairs = set(needed)
        there = {start: {p.stem for p in (self.folder / str(start)).glob("[!.]*")} for start in {s for _, s in pairs}}
        return {(clip, start) for clip, start in pairs if self.cache.entries[clip]["id"] not in there[start]}

    def announce(self, needed: Iterable[tuple[int, int]], each: int) -> str:
        """Note what the folder is for and say how many a run will compute, of ``each`` bytes; empty if it has them all.

        Raises:
            UserError: the disk has no room for them.
        """
        pairs = set(needed)
        missing = self.missing(pairs)
        if not missing:
            return ""
        size, free = len(missing) * each, shutil.disk_usage(self.cache.path).free
        if size > free - DISK_MARGIN:
            raise UserError(
                f"{self.folder} needs {size / 1e9:.1f} GB, and of the {free / 1e9:.1f} GB free there {DISK_MARGIN / 1e9:.0f} GB "
                "are left alone: free some space, train for fewer iterations, or put the cache on another disk"
            )
        with replacing(self.folder / "key.json") as temporary:
            temporary.write_text(json.dumps(self.key, sort_keys=True) + "\n")
        return (
            f"{len(missing)} of the {len(pairs)} observations of real clips that this run draws are not there yet: they are "
            f"computed when they are needed, {size / 1e6:.1f} MB in {self.folder}"
        )


def drawn(config: Config, clips: int, first: int = 0) -> set[tuple[int, int]]:
    """``(number of the clip, start of the window)`` of every observation that a run draws from iteration ``first`` on.

    A function of the config and the number of clips alone; how many processes share the run does not change it.
    """
    found: set[tuple[int, int]] = set()
    for number, update in enumerate(config.plan):
        lesson = config.lesson(update)
        if OBSERVATION not in lesson.clips:
            continue
        mine: set[tuple[int, int]] = set()
        last = config.iterations if update.stop is None else min(config.iterations, update.stop)
        for iteration in filter(update.happens, range(first, last)):
            if len(mine) == clips * len(set(lesson.starts)):
                break  # all there are: a run that is meant to be stopped by hand has millions of iterations
            for repeat in range(update.times):
                start = start_at(lesson.starts, config.seed, iteration, number, repeat)
                places = range(iteration * update.batch, (iteration + 1) * update.batch)
                mine |= {(clip_at(clips, config.seed, number, repeat, place), start) for place in places}
        found |= mine
    return found
