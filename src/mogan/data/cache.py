"""A cache of clips on disk, and batches of it as a pure function of (seed, rank, iteration, update, repeat)."""

import hashlib
import json
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mogan.disk.files import replacing
from mogan.errors import UserError

FORMAT = "mogan-cache"
VERSION = 1
Item = TypeVar("Item")
Made = TypeVar("Made")
HOLD_BYTES = 2_000_000_000  # a cache smaller than this is read from disk once


@dataclass(frozen=True)
class Batch:
    """What one update sees. Text is one embedding ``(L, D)`` per clip, trimmed to its tokens.

    ``places`` numbers the clips within the whole batch, whichever process holds them. ``more`` is what an objective made of
    the batch, by name: a list or tensor with one entry per clip, or anything else that a slice cuts.
    """

    ids: list[str]
    prompts: list[str]
    text: list[Tensor]
    latent_BCFHW: Tensor | None = None
    observation_BCFHW: Tensor | None = None
    window_start: int | None = None
    places: list[int] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Cache:
    """A folder written by ``mogan prepare``, opened for reading.

    Attributes:
        path: the folder.
        facts: ``cache.json``: what it was made with.
        entries: ``index.jsonl``: one dict per clip, at least ``id`` and ``caption``; the order is that of training.
        has_clips: False for a cache of prompts alone.
    """

    path: Path
    facts: dict
    entries: list[dict]
    has_clips: bool
    _hold: bool = False
    _held: dict[Path, Tensor] = field(default_factory=dict, repr=False)
    _shape: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def latent(self, clip: str) -> Float[Tensor, "c f h w"]:
        """Normalised latent of a clip."""
        path = self.path / "clips" / f"{clip}.safetensors"
        latent = self._read(path, "latent")
        self._shape = self._shape or latent.shape
        if latent.shape != self._shape:
            raise UserError(
                f"{path} holds a latent of {tuple(latent.shape)} where others have {tuple(self._shape)}: delete the one that "
                "is wrong and run the same `mogan prepare` command again"
            )
        return latent

    def text(self, prompt: str | None) -> Float[Tensor, "l d"]:
        """Embedding of a prompt that was cached."""
        if prompt is None:
            raise UserError(f"a clip of {self.path} has no caption, and its caption is needed")
        path = text_path(self.path, prompt)
        if not path.exists():
            raise UserError(
                f"{self.path} has no embedding of {prompt!r}: run `mogan prepare` again with it as an extra prompt"
            )
        return self._read(path, "embedding")

    def require(self, **facts) -> None:
        """Raise UserError unless the cache was made with these facts (``vae=...``, ``fps=...``)."""
        different = differences(self.facts, facts)
        if different:
            raise UserError(f"{self.path} {different}: prepare it again for this model, into another --out")

    def require_clips(self) -> None:
        """Raise UserError if the cache holds prompts alone."""
        if not self.has_clips:
            raise UserError(f"{self.path} holds prompts alone; this recipe needs videos: prepare a folder of them")

    def _read(self, path: Path, name: str) -> Tensor:
        if path not in self._held:
            try:
                tensor = load_file(path)[name]
            except (SafetensorError, OSError, KeyError) as error:
                raise UserError(
                    f"{path} cannot be read ({error}): delete it and run the same `mogan prepare` command again"
                ) from error
            if not tensor.isfinite().all():
                raise UserError(
                    f"{path} holds numbers that are infinite or none (NaN): delete it and run the same `mogan prepare` again"
                )
            if not self._hold:
                return tensor
            self._held[path] = tensor
        return self._held[path]


def open_cache(path: str | Path) -> Cache:
    """Open and check a cache.

    Raises:
        UserError: there is none, it is not finished, was made by another version, or files are missing.
    """
    path = Path(path)
    facts = read_facts(path)
    if facts is None:
        raise UserError(f"{path} is not a cache: make one with `mogan prepare VIDEOS --model M --out {path}`")
    if not (path / "index.jsonl").is_file():
        raise UserError(f"{path} is not finished: run the same `mogan prepare` command again, it continues")
    entries = _read_index(path / "index.jsonl")
    has_clips = facts["contents"] == "clips"
    if not entries:
        raise UserError(f"{path} holds no clip: see its dropped.jsonl and skipped.jsonl for the reasons")
    if has_clips:
        there = {p.stem for p in (path / "clips").glob("*.safetensors")}
        missing = [e["id"] for e in entries if e["id"] not in there]
        if missing:
            raise UserError(f"{path} lacks {len(missing)} clips, first {missing[0]}: run `mogan prepare` again")
    size = sum(p.stat().st_size for kind in ("clips", "text") for p in (path / kind).glob("*.safetensors"))
    return Cache(path, facts, entries, has_clips, size < HOLD_BYTES)


def _read_index(path: Path) -> list[dict]:
    """Entries of ``index.jsonl``; captions may hold other ends of lines than a line feed."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            good = isinstance(entry["id"], str) and isinstance(entry["caption"], str | None)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise UserError(
                f"{path} line {number} is damaged: run the same `mogan prepare` again, it writes the file anew"
            )
        found.append(entry)
    return found


def read_facts(path: Path) -> dict | None:
    """``cache.json`` of a cache this version can read; None where there is none.

    Raises:
        UserError: the folder's ``cache.json`` is something else, or of another version.
    """
    file = path / "cache.json"
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{file} was not written by mogan: give another folder")
    if facts.get("version") != VERSION:
        raise UserError(
            f"{path} is a cache of version {facts.get('version')}, this is {VERSION}: prepare it again elsewhere"
        )
    if facts.get("contents") not in ("clips", "prompts"):
        raise UserError(
            f"{file} is damaged (it does not say what the cache holds): put back a copy, or prepare elsewhere"
        )
    return facts


def differences(have: dict, want: dict) -> str:
    """In words, where the facts ``want`` differ from those a cache was made with; empty if nowhere."""
    wrong = [f"{key} {have.get(key)}, not {value}" for key, value in want.items() if have.get(key) != value]
    return "was made with " + " and ".join(wrong) if wrong else ""


# ---------------------------------------------------------------------------------------------- batches


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
        want: any of "latent", "observation"; text always comes.
        observation: reads that of a clip and a start, where it is there; if one is not, the batch has none.
        starts: where a window may start, latent frames; one is drawn, the same for all ranks.
        prompts: where the text comes from, if not from the clips' captions: a walk of its own.

    Raises:
        UserError: a clip whose caption is needed has none.
    """
    unknown = set(want) - {"latent", "observation"}
    assert not unknown, f"a batch has no {unknown}"
    if want:
        cache.require_clips()
    first = (iteration * ranks + rank) * size

    def walk(of: Cache) -> list[dict]:
        return [of.entries[clip_at(len(of), seed, update, repeat, first + i)] for i in range(size)]

    said = walk(prompts or cache)
    ids = [entry["id"] for entry in (walk(cache) if want else said)]
    start = start_at(starts, seed, iteration, update, repeat) if starts else None
    latent = seen = None
    if "latent" in want:
        latent = torch.stack([cache.latent(i) for i in ids])
    if "observation" in want:
        assert start is not None, "observations are made for window starts: say which"
        found = [observation(i, start) for i in ids]
        there = [one for one in found if one is not None]
        seen = torch.stack(there) if len(there) == size else None
    captions = [entry["caption"] for entry in said]
    text = [(prompts or cache).text(caption) for caption in captions]
    return Batch(ids, captions, text, latent, seen, start, list(range(rank * size, (rank + 1) * size)))


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


# ---------------------------------------------------------------------------------------------- filling a cache


def text_path(cache: Path, prompt: str) -> Path:
    """Where the embedding of a prompt lies."""
    return cache / "text" / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


def ensure_text(
    cache: str | Path, prompts: Iterable[str], encode: Callable[[list[str]], list[Tensor]], shared: bool = False
) -> int:
    """Cache the embeddings that are missing, each prompt once; returns how many were. ``shared`` if others may do so too.

    Prompts are encoded one at a time, so an embedding does not depend on its company or on where a run was interrupted.
    """
    missing = [p for p in dict.fromkeys(prompts) if not text_path(Path(cache), p).exists()]
    for prompt in tqdm(missing, desc="text", unit="prompt", disable=not missing):
        (embedding,) = encode([prompt])
        save_tensors(text_path(Path(cache), prompt), {"embedding": embedding}, {"prompt": prompt}, shared)
    return len(missing)


def save_latent(cache: Path, clip: str, latent: Float[Tensor, "c f h w"], facts: dict[str, str]) -> None:
    """Store a clip's latent; ``facts`` go into the file's header."""
    save_tensors(clip_path(cache, clip), {"latent": latent}, facts)


def clip_path(cache: Path, clip: str) -> Path:
    """Where the latent of a clip lies."""
    return cache / "clips" / f"{clip}.safetensors"


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str], shared: bool = False) -> None:
    """Write a safetensors file, whole or not at all; ``shared`` if other processes may write it at the same time.

    Raises:
        UserError: something is no number. A network that is damaged would spoil what is trained on it.
    """
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(
            f"{path} would hold numbers that are infinite or none (NaN), and is not written: the model that makes them is "
            "damaged, get it again"
        )
    # one key, since safetensors writes several in an order of its own and files would differ between runs
    about = {"about": json.dumps(facts, sort_keys=True)}
    with replacing(path, shared) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, about)
