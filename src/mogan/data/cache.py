"""A cache of clips, of prompts, or of a teacher's paths to clips, on disk."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mogan.data.paths import path_file, read_path, rows_of
from mogan.disk.files import Entries, from_json, openable, replacing
from mogan.errors import UserError

FORMAT = "mogan-cache"
VERSION = 1
FACTS = {"clips": "cache.json", "prompts": "cache.json", "paths": "trajectories.json"}  # file of what it was made with
HOLD_BYTES = 2_000_000_000  # a cache smaller than this is read from disk once


@dataclass
class Cache:
    """A folder written by ``mogan prepare`` or ``mogan trajectories``, opened for reading.

    Attributes:
        path: the folder.
        facts: ``cache.json`` (of paths ``trajectories.json``): what it was made with.
        entries: ``index.jsonl``: one dict per clip, at least ``id`` and ``caption``; the order is that of training.
    """

    path: Path
    facts: dict
    entries: list[dict]
    _hold: bool = False
    _held: dict[tuple[Path, Any], Tensor] = field(default_factory=dict, repr=False)
    _shape: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_clips(self) -> bool:
        """Whether it holds real clips."""
        return self.facts["contents"] == "clips"

    @property
    def has_paths(self) -> bool:
        """Whether it holds a teacher's paths to clips."""
        return self.facts["contents"] == "paths"

    @property
    def command(self) -> str:
        """What makes such a folder."""
        return _command(self.facts)

    def latent(self, clip: str) -> Float[Tensor, "c f h w"]:
        """Normalised latent of a clip, ``(C, F, H, W)``.

        Raises:
            UserError: the file is missing, damaged, or of another shape than the others.
        """
        path = self.path / "clips" / f"{clip}.safetensors"
        latent = self._read(path, "latent")
        self._shape = self._shape or latent.shape
        if latent.shape != self._shape:
            raise UserError(
                f"{path} holds a latent of {tuple(latent.shape)} where others have {tuple(self._shape)}: delete the one that "
                "is wrong and run the same `mogan prepare` command again"
            )
        return latent

    @property
    def has_controls(self) -> bool:
        """Whether its clips have controls (see :mod:`mogan.data.controls`)."""
        return "controls" in self.facts

    @property
    def references(self) -> int:
        """Reference pictures of every clip, which stand before it as latent frames."""
        return int(self.facts.get("references", 0))

    def control(self, clip: str) -> Float[Tensor, "k f h w"]:
        """Control of a clip, ``(K, F, H, W)``, as the transformer reads it, references first."""
        path = control_path(self.path, clip)
        return torch.cat([self._read(path, "latent"), self._read(path, "places").float()])

    def picture(self, clip: str) -> Float[Tensor, "t d"] | None:
        """Image features of a clip's first frame, ``(T, D)``; ``None``: the cache's model has no image encoder."""
        return self._read(control_path(self.path, clip), "picture") if self.facts.get("pictures") else None

    def shown(self, clips: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """Controls of clips, ``(B, K, F, H, W)``; image features of their first frames, ``(B, T, D)``, if the model reads those."""
        pictures = [picture for clip in clips if (picture := self.picture(clip)) is not None]
        controls = torch.stack([self.control(clip) for clip in clips]).to(device)
        return controls, torch.stack(pictures).to(device) if pictures else None

    def whole(self, clip: str) -> Float[Tensor, "c f h w"]:
        """Latents of a clip's references, then its own: ``(C, R + F, H, W)``."""
        latent = self.latent(clip)
        return torch.cat([self.control(clip)[: len(latent), : self.references], latent], 1)

    def path_to(self, clip: str, levels: Sequence[float]) -> Float[Tensor, "k c f h w"]:
        """The teacher's trajectory to a clip at these levels, ``(K, C, F, H, W)``, in the precision it was kept in."""
        kept, file = self.facts["levels"], path_file(self.path, clip)
        rows = tuple(rows_of(kept, levels, self.path))
        found = self._held.get((file, rows))
        if found is None:
            found = read_path(file, rows, (len(kept), *self.facts["latent_shape"]))
            if self._hold:
                self._held[file, rows] = found
        return found

    def text(self, prompt: str | None) -> Float[Tensor, "l d"]:
        """Embedding of a cached prompt, ``(L, D)``, without padding.

        Raises:
            UserError: there is no caption, or it is not in the cache.
        """
        if prompt is None:
            raise UserError(f"a clip of {self.path} has no caption, and its caption is needed")
        path = text_path(self.path, prompt)
        if not path.exists():
            raise UserError(
                f"{self.path} has no embedding of {prompt!r}: run `{self.command}` again"
                + (
                    ""
                    if self.has_paths or any(entry.get("caption") == prompt for entry in self.entries)
                    else " with it as an extra prompt"
                )
            )
        return self._read(path, "embedding")

    def require(self, **facts) -> None:
        """Raise UserError unless the cache was made with these facts (``vae=...``, ``fps=...``)."""
        different = unlike(self.facts, facts)
        if different:
            raise UserError(f"{self.path} {different}: make it again for this model, into another --out")

    def require_clips(self) -> None:
        """Raise UserError unless the cache holds real clips."""
        if not self.has_clips:
            holds = "a teacher's paths" if self.has_paths else "prompts alone"
            raise UserError(f"{self.path} holds {holds}; this recipe needs videos: prepare a folder of them")

    def require_paths(self, levels: Sequence[float], teacher: str) -> None:
        """Raise UserError unless it holds paths of this teacher (:func:`mogan.runs.identity.of_model`) past these levels."""
        if not self.has_paths:
            raise UserError(
                f"{self.path} holds no paths of a teacher, which this recipe learns from: make them with `mogan trajectories`"
            )
        self.require(teacher=teacher)
        rows_of(self.facts["levels"], levels, self.path)

    def _read(self, path: Path, name: str) -> Tensor:
        if (path, name) not in self._held:
            try:
                tensor = load_file(path)[name]
            except (SafetensorError, OSError, KeyError) as error:
                why = f"it holds no {name}" if isinstance(error, KeyError) else error
                raise UserError(
                    f"{path} cannot be read ({why}): delete it and run the same `{self.command}` command again"
                ) from error
            if not tensor.isfinite().all():
                raise UserError(
                    f"{path} holds numbers that are infinite or none (NaN): delete it and run the same `{self.command}` again"
                )
            if not self._hold:
                return tensor
            self._held[path, name] = tensor
        return self._held[path, name]


def open_cache(path: str | Path) -> Cache:
    """Open and check a cache.

    Raises:
        UserError: there is none, it is not finished, was made by another version, or files are missing.
    """
    path = Path(path)
    openable(path)
    facts = read_facts(path)
    if facts is None:
        raise UserError(f"{path} is not a cache: {_instead(path)}")
    if not (path / "index.jsonl").is_file():
        raise UserError(f"{path} is not finished: run the same `{_command(facts)}` command again, without --shard")
    entries, contents = _read_index(path / "index.jsonl", _command(facts)), facts["contents"]
    if not entries:
        raise UserError(f"{path} holds no clip: see its dropped.jsonl and skipped.jsonl for the reasons")
    if contents != "prompts":
        there = {p.stem for p in (path / contents).glob("*.safetensors")}
        missing = [e["id"] for e in entries if e["id"] not in there]
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} {contents}, first {missing[0]}: run `{_command(facts)}` again"
            )
    if "controls" in facts:
        there = {p.stem for p in (path / "controls").glob("*.safetensors")}
        if missing := [e["id"] for e in entries if e["id"] not in there]:
            raise UserError(
                f"{path} lacks {len(missing)} controls, first {missing[0]}: run the same `mogan prepare` command again"
            )
    size = sum(p.stat().st_size for kind in (contents, "text", "controls") for p in (path / kind).glob("*.safetensors"))
    return Cache(path, facts, entries, size < HOLD_BYTES)


def _instead(path: Path) -> str:
    """What to do where there is no cache; what lies there may be what one is made of, and is not written over."""
    if path.is_file() and read_facts(path.parent) is not None:
        return f"give its folder, {path.parent}"
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        return f"make one of it with `mogan prepare {quote(str(path))} --model M --out CACHE`, and give that"
    return f"make one with `mogan prepare VIDEOS --model M --out {quote(str(path))}`"


def _command(facts: dict) -> str:
    return "mogan trajectories" if facts["contents"] == "paths" else "mogan prepare"


def _read_index(path: Path, command: str) -> list[dict]:
    """Entries of ``index.jsonl``; captions may hold other ends of lines than a line feed."""
    found: list[dict] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            entry = from_json(line)
            good = isinstance(entry["id"], str) and isinstance(entry["caption"], str | None)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise UserError(f"{path} line {number} is damaged: run the same `{command}` again, it writes the file anew")
        if (first := seen.setdefault(entry["id"], number)) != number:  # it would be drawn twice as often as the others
            raise UserError(
                f"{path} line {number} names what line {first} names: run the same `{command}` again, it writes the file anew"
            )
        found.append(entry)
    return found


def read_facts(path: Path) -> dict | None:
    """``cache.json``, or ``trajectories.json``, of a cache this version can read; None where there is neither.

    Raises:
        UserError: that file is something else, or of another version.
    """
    file = next((path / name for name in FACTS.values() if (path / name).is_file()), None)
    if file is None:
        return None
    try:
        facts = from_json(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{file} was not written by mogan: give another folder")
    if facts.get("version") != VERSION:
        raise UserError(
            f"{path} is a cache of version {facts.get('version')}, this is {VERSION}: prepare it again elsewhere"
        )
    contents = str(facts.get("contents"))
    sizes = [facts[name] for name in ("fps", "height", "width", "frames") if name in facts]
    whole = all(type(number) is int and number > 0 for number in sizes)
    if FACTS.get(contents) != file.name or not isinstance(facts.get("flow_name"), str | None) or not whole:
        raise UserError(
            f"{file} is damaged (it does not say what the cache holds): put back a copy, or prepare elsewhere"
        )
    return Entries(facts, file, "put back a copy, or prepare elsewhere")


def unlike(have: dict, want: dict) -> str:
    """In words, where the facts ``want`` differ from those a cache was made with; empty if nowhere."""
    if have.get("contents") != want.get("contents", have.get("contents")):
        return f"was made of {have.get('contents')}, not of {want['contents']}"
    wrong = [f"{key} {have.get(key)}, not {value}" for key, value in want.items() if have.get(key) != value]
    return "was made with " + " and ".join(wrong) if wrong else ""


# ---------------------------------------------------------------------------------------------- filling a cache


def text_path(cache: Path, prompt: str) -> Path:
    """Where the embedding of a prompt lies."""
    return cache / "text" / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


def ensure_text(cache: str | Path, prompts: Iterable[str], encode: Callable[[list[str]], list[Tensor]]) -> int:
    """Cache the embeddings that are missing, each prompt once; returns how many were.

    ``encode`` maps prompts to embeddings ``(L, D)``, one at a time: none depends on its company or on where a run was interrupted.
    """
    missing = [p for p in dict.fromkeys(prompts) if not text_path(Path(cache), p).exists()]
    for prompt in tqdm(missing, desc="text", unit="prompt", disable=not missing):
        (embedding,) = encode([prompt])
        save_tensors(text_path(Path(cache), prompt), {"embedding": embedding}, {"prompt": prompt})
    return len(missing)


def save_latent(cache: Path, clip: str, latent: Float[Tensor, "c f h w"], facts: dict[str, str]) -> None:
    """Store a clip's latent, ``(C, F, H, W)``; ``facts`` go into the file's header."""
    save_tensors(clip_path(cache, clip), {"latent": latent}, facts)


def clip_path(cache: Path, clip: str) -> Path:
    """Where the latent of a clip lies."""
    return cache / "clips" / f"{clip}.safetensors"


def control_path(cache: Path, clip: str) -> Path:
    """Where the control of a clip lies."""
    return cache / "controls" / f"{clip}.safetensors"


def save_control(
    cache: Path,
    clip: str,
    control: Float[Tensor, "k f h w"],
    pixels: int,
    mark: str,
    picture: Float[Tensor, "t d"] | None = None,
) -> None:
    """Store a clip's control: latents in full, the mask's channels, the last ``pixels``, 0 or 1, in a byte each; ``mark``: of what
    it was made; ``picture``: features of its first frame, if a network reads them.
    """
    parts = {"latent": control[:-pixels], "places": control[-pixels:].byte()}
    parts |= {} if picture is None else {"picture": picture}
    save_tensors(control_path(cache, clip), parts, {"mark": mark})


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

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
    with replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, about)
