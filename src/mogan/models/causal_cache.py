"""What a causal student keeps of the past: keys and values of earlier frames, which of them, and where they stand.

Frames are counted in latents. Nothing here is changed in place and nothing carries gradient: a cache that grows is a new
object over the same tensors, so that a call that is recomputed in the backward pass meets the past it met first. A buffer
written in place would also lead gradient from a chunk to earlier ones, which Self-Forcing (arXiv 2506.08009) does not mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

KV = tuple[tuple[Tensor, Tensor], ...]  # by block: K before rotation and V, each (B, tokens, heads, width of a head)


@dataclass(frozen=True)
class Policy:
    """Which latent frames of the past a chunk sees, and how they are numbered. It is part of a student, as its weights are.

    Attributes:
        window: number of frames seen, including the chunk's own; ``None``: all.
        sink: how many of these are the first ones of the clip, which are never dropped.
        decay: alpha of an EMA sink (Reward Forcing, arXiv 2512.04678): when frames leave, ``S <- alpha S + (1 - alpha) them``.
        relative: frames seen are numbered 0, 1, 2, ...; else a frame keeps its number in the clip. Equal until one is dropped.
    """

    window: int | None = None
    sink: int = 0
    decay: float | None = None
    relative: bool = False

    def __post_init__(self):
        if self.sink < 0 or (self.window is not None and self.window <= self.sink):
            raise ValueError(f"a window of {self.window} frames has no room beside a sink of {self.sink}")
        if self.sink and self.window is None:
            raise ValueError("a sink is of a window: without one every frame is kept")
        if self.decay is not None and not (self.sink and 0 <= self.decay <= 1):
            raise ValueError(f"decay is of a sink and from 0 to 1, not {self.decay} of a sink of {self.sink} frames")

    def seen(self, chunks: Sequence[int]) -> list[tuple[int, ...]]:
        """Of a clip in such chunks: which earlier frames each of them sees.

        Raises:
            ValueError: a chunk does not fit into the window, or an EMA sink cannot take what leaves it.
        """
        cache, found = Cache(self), []
        for frames in chunks:
            cache = cache.make_room(frames)
            found.append(cache.frames)
            cache = cache.append((), frames)
        return found


FULL = Policy()


@dataclass(frozen=True)
class Causal:
    """How a causal student generates clips; stored beside its weights, as ``causal`` in ``mogan.json``.

    Attributes:
        first: latent frames of the first chunk; ``rest``: of every other one, but the last may be shorter.
        policy: what a chunk sees of the past.
        context_sigma: level to which a finished chunk is noised before later ones see it.
        first_sigmas: levels of the first chunk, whatever the number of steps of the others (First-Frame Enhancement, arXiv
            2511.01419); ``None``: the student's, as for all.
        sizes: sizes of chunks after the first, ascending, that one set of weights is trained for, ``rest`` among them; a clip
            has one of them (LLIA, arXiv 2506.05806). Small ones respond soon, large ones are cheap. ``None``: ``rest`` alone.
    """

    first: int
    rest: int
    policy: Policy = Policy()
    context_sigma: float = 0.0
    first_sigmas: tuple[float, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def __post_init__(self):
        own = self.first_sigmas
        if own is not None and (own[:1] != (1.0,) or any(a <= b for a, b in pairwise((*own, 0.0)))):
            raise ValueError(f"levels of the first chunk fall from 1 to above 0, not {own}")
        if min(self.first, self.rest) < 1 or not 0 <= self.context_sigma < 1:
            raise ValueError(
                f"chunks have at least one frame and a level of context below 1, not {self.first}, {self.rest}, {self.context_sigma}"
            )
        if self.sizes is not None and (list(self.sizes) != sorted({*self.sizes, self.rest}) or self.sizes[0] < 1):
            raise ValueError(f"sizes of chunks rise from at least 1 and {self.rest} is one of them, not {self.sizes}")

    @property
    def variants(self) -> "tuple[Causal, ...]":
        """One for each of the sizes."""
        return (self,) if self.sizes is None else tuple(replace(self, rest=n, sizes=None) for n in self.sizes)

    @property
    def fixed(self) -> "Causal":
        """The same in chunks of ``rest`` alone."""
        return replace(self, sizes=None)

    def chunks(self, frames: int) -> tuple[int, ...]:
        """Of a clip of so many latents."""
        first = min(self.first, frames)
        whole, over = divmod(frames - first, self.rest)
        return (first, *[self.rest] * whole, *[over] * (over > 0))

    def __str__(self) -> str:
        more = {name: value for name, value in self.facts().items() if name != "chunks" and value}
        return f"chunks of {self.first}, {self.rest}, ... latents" + "".join(f", {k} {v}" for k, v in more.items())

    def facts(self) -> dict[str, Any]:
        """For ``mogan.json``."""
        policy, chunks = self.policy, {"first": self.first, "rest": self.rest}
        own: dict[str, Any] = {
            "chunks": chunks,
            "window": policy.window,
            "sink": policy.sink,
            "sink_decay": policy.decay,
        }
        own |= {"relative": policy.relative, "context_sigma": self.context_sigma}
        own |= {} if self.first_sigmas is None else {"first_sigmas": list(self.first_sigmas)}
        return own | ({} if self.sizes is None else {"sizes": list(self.sizes)})

    @property
    def layout(self) -> "Causal":
        """What its weights must have learnt: all but in which steps a first chunk is made, and other sizes of chunks."""
        return replace(self, first_sigmas=None, sizes=None)

    def levels(self, number: int, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        """Of a chunk by its number, where the student's are ``sigmas``."""
        return sigmas if number or self.first_sigmas is None else self.first_sigmas


def read_causal(facts: Mapping[str, Any]) -> Causal:
    """The inverse of :meth:`Causal.facts`. Raises ValueError, TypeError or KeyError if they are none."""
    policy = Policy(facts["window"], facts["sink"], facts["sink_decay"], facts["relative"])
    own, sizes = (None if (value := facts.get(name)) is None else tuple(value) for name in ("first_sigmas", "sizes"))
    first, rest = facts["chunks"]["first"], facts["chunks"]["rest"]
    return Causal(first, rest, policy, facts["context_sigma"], own, sizes)


@dataclass(frozen=True)
class Piece:
    """Frames of one chunk by their numbers in the clip, with their keys and values."""

    frames: tuple[int, ...]
    kv: KV

    def part(self, start: int, stop: int) -> "Piece":
        """Some of its frames; of tensors a copy, so that the rest can be freed."""
        if (start, stop) == (0, len(self.frames)):
            return self
        cut = slice(start, stop)
        return Piece(self.frames[cut], tuple((self._cut(k, cut), self._cut(v, cut)) for k, v in self.kv))

    def _cut(self, tokens: Tensor, cut: slice) -> Tensor:
        return tokens.unflatten(1, (len(self.frames), -1))[:, cut].flatten(1, 2).contiguous()


@dataclass
class Words:
    """A text, and its keys and values by block once a call without gradient has computed them: one text, one rollout."""

    text: Tensor
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Cache:
    """The past of a rollout under a policy: pieces in order, the sink's first.

    Attributes:
        length: frames that were made, kept or not.
        words: what cross-attention sees.
    """

    policy: Policy
    pieces: tuple[Piece, ...] = ()
    length: int = 0
    words: Words | None = None

    @property
    def frames(self) -> tuple[int, ...]:
        """Numbers of the frames that are kept."""
        return tuple(frame for piece in self.pieces for frame in piece.frames)

    def append(self, kv: KV, frames: int) -> "Cache":
        """With a chunk of so many frames more."""
        start, kv = self.length, tuple((k.detach(), v.detach()) for k, v in kv)
        new = Piece(tuple(range(start, start + frames)), kv)
        border = min(max(self.policy.sink - start, 0), frames)
        parts = (new.part(a, b) for a, b in pairwise((0, border, frames)) if a < b)
        return replace(self, pieces=(*self.pieces, *parts), length=start + frames)

    def make_room(self, frames: int) -> "Cache":
        """Without what a new chunk of so many frames does not see; done before its first call, and again changes nothing.

        Without a sink whole chunks leave; with one no more frames than must.
        """
        policy = self.policy
        sink = [p for p in self.pieces if p.frames[0] < policy.sink]
        rest = [p for p in self.pieces if p.frames[0] >= policy.sink]
        if policy.window is None:
            return self
        if min(policy.sink, self.length) + frames > policy.window:
            raise ValueError(
                f"a chunk of {frames} frames does not fit into a window of {policy.window} beside a sink of {policy.sink}"
            )
        room, gone = policy.window - frames - sum(len(p.frames) for p in sink), []
        while (excess := sum(len(p.frames) for p in rest) - room) > 0:
            size = len(rest[0].frames)
            leaving = size if policy.sink == 0 else min(size, excess)
            gone.append(rest[0].part(0, leaving))
            rest[:1] = [rest[0].part(leaving, size)] if leaving < size else []
        if gone and policy.decay is not None:
            sink = _averaged(sink, gone, policy.decay)
        return replace(self, pieces=(*sink, *rest))

    def positions(self, frames: int) -> tuple[list[int], list[int]]:
        """Time positions of the past and of a new chunk."""
        past = list(self.frames)
        if self.policy.relative:
            return list(range(len(past))), list(range(len(past), len(past) + frames))
        return past, list(range(self.length, self.length + frames))


def _averaged(sink: list[Piece], gone: list[Piece], decay: float) -> list[Piece]:
    """``S <- decay S + (1 - decay) E``, token by token, in fp32: in bf16 a thousandth of ``E`` would be rounded off."""
    held, left = (sum(len(p.frames) for p in pieces) for pieces in (sink, gone))
    if held != left:
        raise ValueError(
            f"{left} frames leave the window at once and an EMA sink of {held} cannot take them: take chunks and a sink of one "
            "size, and a window that is a multiple of it"
        )
    start, found = 0, []
    for piece in sink:
        kv = []
        for block, own in enumerate(piece.kv):
            rows = slice(start, start + own[0].shape[1])
            other = [torch.cat([p.kv[block][i] for p in gone], 1)[:, rows] for i in (0, 1)]
            k, v = (decay * a.float() + (1 - decay) * b.float() for a, b in zip(own, other, strict=True))
            kv.append((k, v))
        start += piece.kv[0][0].shape[1] if piece.kv else 0
        found.append(replace(piece, kv=tuple(kv)))
    return found
