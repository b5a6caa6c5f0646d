"""A cache of clips on disk, and batches of it as a pure function of (seed, rank, iteration, update, repeat)."""

import hashlib
import json
import shutil
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

from mogan.errors import UserError
from mogan.files import replacing

FORMAT = "mogan-cache"
VERSION = 1
Item = TypeVar("Item")
HOLD_BYTES = 2_000_000_000  # a cache smaller than this is read from disk once
DISK_MARGIN = 2_000_000_000  # bytes that filling a cache leaves free


@dataclass(frozen=True)
class Batch:
    """What one update sees. Text is one embedding ``(L, D)`` per clip, trimmed to its tokens.

    ``places`` numbers the clips within the whole batch, whichever process holds them.
    """

    ids: list[str]
    prompts: list[str]
    text: list[Tensor]
    latent_BCFHW: Tensor | None = None
    observation_BCFHW: Tensor | None = None
    window_start: int | None = None
    places: list[int] = field(default_factory=list)
    pairs: Any = None  # :class:`mogan.objectives.shift.Pairs`


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
    _held: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.entries)

    def latent(self, clip: str) -> Float[Tensor, "c f h w"]:
        """Normalised latent of a clip."""
        return self._read(self.path / "clips" / f"{clip}.safetensors")["latent"]

    def text(self, prompt: str) -> Float[Tensor, "l d"]:
        """Embedding of a prompt that was cached."""
        path = text_path(self.path, prompt)
        if not path.exists():
            raise UserError(
                f"{self.path} has no embedding of {prompt!r}: run `mogan prepare` again with it as an extra prompt"
            )
        return self._read(path)["embedding"]

    def observation(self, folder: Path, clip: str, start: int) -> Tensor:
        """What :func:`ensure_observations` stored in ``folder`` for the window that starts at ``start``."""
        return self._read(folder / f"{clip}.safetensors")[f"start_{start}"]

    def require(self, **facts) -> None:
        """Raise UserError unless the cache was made with these facts (``vae=...``, ``fps=...``)."""
        different = differences(self.facts, facts)
        if different:
            raise UserError(f"{self.path} {different}: prepare it again for this model, into another --out")

    def require_clips(self) -> None:
        """Raise UserError if the cache holds prompts alone."""
        if not self.has_clips:
            raise UserError(f"{self.path} holds prompts alone; this recipe needs videos: prepare a folder of them")

    def _read(self, path: Path) -> dict[str, Tensor]:
        if path not in self._held:
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} cannot be read ({error}): delete it and run the same `mogan prepare` command again"
                ) from error
            if not self._hold:
                return tensors
            self._held[path] = tensors
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
    lines = (path / "index.jsonl").read_text(encoding="utf-8").split("\n")  # captions may hold other ends of lines
    entries = [json.loads(line) for line in lines if line]
    has_clips = facts["contents"] == "clips"
    if not entries:
        raise UserError(f"{path} holds no clip: see its dropped.jsonl and skipped.jsonl for the reasons")
    if has_clips:
        there = {p.stem for p in (path / "clips").glob("*.safetensors")}
        missing = [e["id"] for e in entries if e["id"] not in there]
        if missing:
            raise UserError(f"{path} lacks {len(missing)} clips, first {missing[0]}: run `mogan prepare` again")
    size = sum(
        p.stat().st_size for kind in ("clips", "text", "observations") for p in (path / kind).rglob("*.safetensors")
    )
    return Cache(path, facts, entries, has_clips, size < HOLD_BYTES)


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
    if facts["version"] != VERSION:
        raise UserError(
            f"{path} is a cache of version {facts['version']}, this is {VERSION}: prepare it again elsewhere"
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
    observations: Path | None = None,
    starts: Sequence[int] = (),
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
        observations: folder returned by :func:`ensure_observations`.
        starts: where a window may start, latent frames; one is drawn, the same for all ranks.
    """
    unknown = set(want) - {"latent", "observation"}
    assert not unknown, f"a batch has no {unknown}"
    if want:
        cache.require_clips()
    first = (iteration * ranks + rank) * size
    chosen = [cache.entries[clip_at(len(cache), seed, update, repeat, first + i)] for i in range(size)]
    ids = [entry["id"] for entry in chosen]
    start = None
    if starts:
        rng = np.random.default_rng([seed, 1, update, repeat, iteration])
        start = int(starts[int(rng.integers(len(starts)))])
    latent = observation = None
    if "latent" in want:
        latent = torch.stack([cache.latent(i) for i in ids])
    if "observation" in want:
        assert observations is not None, "observations lie in the folder that ensure_observations returned"
        assert start is not None, "observations were made for window starts: say which"
        observation = torch.stack([cache.observation(observations, i, start) for i in ids])
    prompts = [entry["caption"] for entry in chosen]
    places = list(range(rank * size, (rank + 1) * size))
    return Batch(ids, prompts, [cache.text(p) for p in prompts], latent, observation, start, places)


def clip_at(count: int, seed: int, update: int, repeat: int, position: int) -> int:
    """Number of the clip at a position of the endless walk of ``(update, repeat)`` through ``count`` clips."""
    epoch, place = divmod(position, count)
    return int(_order(count, seed, update, repeat, epoch)[place])


@lru_cache(maxsize=64)
def _order(count: int, seed: int, update: int, repeat: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, update, repeat, epoch]).permutation(count)


def one_ahead(compute: Callable[[Item], Batch], items: Iterable[Item]) -> Generator[Batch, None, None]:
    """``compute(item)`` for each item, the next one already being computed in a thread: disks are read during a step."""
    with ThreadPoolExecutor(1, "mogan-data") as thread:
        coming: Future[Batch] | None = None
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


def ensure_text(cache: str | Path, prompts: Iterable[str], encode: Callable[[list[str]], list[Tensor]]) -> int:
    """Cache the embeddings that are missing, each prompt once; returns how many were.

    Prompts are encoded one at a time, so an embedding does not depend on its company or on where a run was interrupted.
    """
    missing = [p for p in dict.fromkeys(prompts) if not text_path(Path(cache), p).exists()]
    for prompt in tqdm(missing, desc="text", unit="prompt", disable=not missing):
        (embedding,) = encode([prompt])
        _save(text_path(Path(cache), prompt), {"embedding": embedding}, {"prompt": prompt})
    return len(missing)


def ensure_observations(
    cache: str | Path,
    key: dict,
    observe: Callable[[Tensor, int], Tensor],
    starts: Sequence[int],
    batch: int = 8,
    rank: int = 0,
    ranks: int = 1,
) -> Path:
    """Compute what a discriminator sees of every real clip, once; what is there is left alone.

    Args:
        cache: folder of the cache.
        key: the settings that decide the result (flow network, scale, window ...); their hash names the folder.
        observe: ``(latent_BCFHW, start) -> observation (B, ...)``, stored in bf16.
        starts: window starts, latent frames.
        batch: clips at a time. The same clips always share a batch, so an interrupted run gives the same numbers.
        rank: this process, of the ``ranks`` that share the work; the caller waits for all of them.
        ranks: processes in all.

    Returns:
        The folder, for :func:`draw_batch`.

    Raises:
        UserError: the cache holds no clips, or the disk has no room; nothing is written then.
    """
    opened = open_cache(cache)
    opened.require_clips()
    settings = json.dumps(key | {"starts": list(starts)}, sort_keys=True)
    folder = opened.path / "observations" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    ids = [entry["id"] for entry in opened.entries]
    groups = [ids[i : i + batch] for i in range(0, len(ids), batch)][rank::ranks]
    missing = [g for g in groups if not all((folder / f"{i}.safetensors").exists() for i in g)]
    if not missing:
        return folder
    if rank == 0:
        with replacing(folder / "key.json") as temporary:
            temporary.write_text(settings + "\n")
    with tqdm(total=sum(map(len, missing)), desc="observations", unit="clip", disable=rank > 0) as bar:
        for number, group in enumerate(missing):
            with torch.no_grad():
                latent_BCFHW = torch.stack([opened.latent(i) for i in group])
                seen = {start: observe(latent_BCFHW, start).to(torch.bfloat16).cpu() for start in starts}
            if number == 0 and rank == 0:
                each = sum(o[0].numel() * o.element_size() for o in seen.values())
                bar.write(f"observations of {len(ids)} clips take {len(ids) * each / 1e6:.1f} MB in {folder}")
                _check_space(folder, sum(map(len, missing)) * each)
            for row, clip in enumerate(group):
                tensors = {f"start_{start}": o[row] for start, o in seen.items()}
                _save(folder / f"{clip}.safetensors", tensors, {})
                bar.update()
    return folder


def save_latent(cache: Path, clip: str, latent: Float[Tensor, "c f h w"], facts: dict[str, str]) -> None:
    """Store a clip's latent; ``facts`` go into the file's header."""
    _save(clip_path(cache, clip), {"latent": latent}, facts)


def clip_path(cache: Path, clip: str) -> Path:
    """Where the latent of a clip lies."""
    return cache / "clips" / f"{clip}.safetensors"


def _check_space(folder: Path, needed: int) -> None:
    """Refuse, before anything is written, what would leave less than ``DISK_MARGIN`` on the disk."""
    free = shutil.disk_usage(folder).free
    if needed > free - DISK_MARGIN:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB, and of the {free / 1e9:.1f} GB free there {DISK_MARGIN / 1e9:.0f} GB "
            "are left alone: free some space, prepare fewer clips, or put the cache on another disk"
        )


def _save(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    # one key, since safetensors writes several in an order of its own and files would differ between runs
    about = {"about": json.dumps(facts, sort_keys=True)}
    with replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, about)
