"""What a causal student makes, piece by piece: a latent's frames each, the next chunk being made while one is decoded.

Nothing is made that nobody asks for: a piece asked for is decoded, and the chunk after it is begun, no more. Who stops asking
stops the work.
"""

import re
import time
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mogan.data.batches import one_ahead
from mogan.data.clips import to_video
from mogan.data.lists import whole
from mogan.data.tokens import load_tokens
from mogan.devices import settled
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import TEXT_LENGTH, stack_text
from mogan.models.autoencoder import encode_video, stream_chunks
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Policy
from mogan.models.int8 import in_int8
from mogan.models.states import told
from mogan.runs.generator import Generator, open_generator
from mogan.sampling.endless import bounded, stream_endless
from mogan.sampling.first_frames import first_pictures
from mogan.sampling.samplers import refuse_what_is_no_number, to_frames
from mogan.world.scenes import COLOURS, DIRECTIONS, SHAPES

LONGEST = 2000  # characters of a prompt
MANNERS = {  # kinds of motion in captions of the lab's world
    "at rest": "{} at rest",
    **{d: f"{{}} moving {d}" for d in DIRECTIONS},
    "bouncing": "{} bouncing",
    "falling": "{} falling",
    "spinning": "{} spinning",
    **{f"camera {d}": f"the camera pans {d} over {{}}" for d in DIRECTIONS},
}


@dataclass(frozen=True)
class Studio:
    """A causal student, loaded: all that a stream of it needs."""

    name: str
    source: Generator
    student: CausalDenoiser
    vae: Any
    device: torch.device
    encode: Callable[[list[str]], list[Tensor]]
    tokens: Callable[[list[str]], list[list[int]]]
    unknown: int | None  # the tokenizer's number for words it does not know
    of_lab: bool  # it reads the captions of the lab's world, and nothing else
    given: Tensor | None = None  # the first chunk's latent, of a first frame
    again: bool = True  # what is kept of the past is run again under another text or state

    def text(self, prompt: str, state: str | None = None) -> Tensor:
        """A prompt as the student reads it, and the state it is told, ``(1, L, D)``."""
        texts = [told(text, state, self.source.states) for text in self.encode([prompt])]
        return settled(stack_text(texts, self.device))

    @property
    def policy(self) -> Policy:
        """What a chunk of its endless clips sees of the past."""
        return bounded(self.student.how, 1 + (self.source.geometry.frames - 1) // self.frames_per_latent)

    @torch.no_grad()
    def picture(self, path: Path) -> Tensor:
        """A picture, or the first frame of a video, as the first latent ``(1, C, 1, h, w)`` of a clip."""
        frames = to_video(first_pictures([path], self.source.geometry)[0][None]).to(self.device)
        return settled(encode_video(self.vae, frames, False))

    def another_picture(self, path: Path, where: str) -> Tensor:
        """The same, ``(1, C, 1, h, w)``, to take the first one's place on the way.

        Raises:
            UserError: it cannot be read, or the student does not go on seeing its first latent, or as it was.
        """
        policy = self.policy
        if self.student.how.first != 1 or not policy.sink or policy.decay is not None:
            raise UserError(
                f"{where} gives a picture, and {self.name} does not keep one: its first chunk would have to be one latent, and "
                "the sink of its window, not averaged"
            )
        if not self.again:
            raise UserError(
                f"{where} gives a picture, which is seen where the past is run again: leave out --no-recache"
            )
        return self.picture(path)

    @property
    def usual(self) -> str:
        """A prompt of the lab's world; who is told states is not told in words what to do."""
        return "a red circle" if self.source.states else lab_prompt("red", "circle", "bouncing")

    def chunk_of(self, latent: int) -> tuple[int, int]:
        """The first latent of the chunk that a latent is in, and that of the next."""
        how, frames = self.student.how, 1 + (self.source.geometry.frames - 1) // self.frames_per_latent
        first, rest = min(how.first, frames), min(how.rest, frames)
        start = 0 if latent < first else latent - (latent - first) % rest
        return start, start + (rest if start else first)

    def notes(self, prompt: str) -> list[str]:
        """Sentences on what of a prompt the student does not read."""
        count, words = len(self.tokens([prompt])[0]), list(dict.fromkeys(re.findall(r"[\w'-]+", prompt)))
        strange = [word for word, row in zip(words, self.tokens(words), strict=True) if self.unknown in row]
        found = [f"Of its {count} tokens the model reads {TEXT_LENGTH}."] if count > TEXT_LENGTH else []
        return found + ([f"Words that the model does not know: {', '.join(strange)[:200]}."] if strange else [])

    @property
    def frames_per_latent(self) -> int:
        """But for the first latent, which is one frame."""
        return self.vae.config.scale_factor_temporal


def open_studio(
    model: str,
    device: torch.device,
    precision: str = "auto",
    steps: int | None = None,
    chunk: int | None = None,
    first_frame: Path | None = None,
    again: bool = True,
) -> Studio:
    """Load a causal student: a run or a folder.

    Args:
        model: which.
        device: where it computes.
        precision: auto, bf16, fp32 or int8.
        steps: of one that was trained for several numbers of steps.
        chunk: latents of every chunk but the first, of one that was trained for several sizes.
        first_frame: a picture, or a video whose first frame is meant: the stream begins with it.
        again: see :class:`Studio`.

    Raises:
        UserError: it is none, or was not trained for so many steps, such chunks, or a first chunk of one picture.
    """
    source = open_generator(model)
    if source.causal is None or source.sigmas is None:
        raise UserError(
            f"{model} makes all frames of a clip at once, so there is nothing to show before its end: --model takes a causal "
            "student, such as a run of self_forcing_lab"
        )
    if steps is not None and not source.counts:
        raise UserError(f"{model} was trained for {len(source.sigmas)} steps alone: leave out --steps")
    source = source if steps is None else source.in_steps(steps)
    source = source if chunk is None else source.in_chunks(chunk)
    assert source.causal is not None
    if first_frame is not None and source.causal.first != 1:
        raise UserError(
            f"a picture is one latent and the first chunk of {model} is {source.causal.first}: leave out --first-frame"
        )
    dtype = wan.dtype_of("auto" if precision == "int8" else precision, device, few_steps=True)
    student = source.load(dtype).to(device).eval()
    assert isinstance(student, CausalDenoiser)
    if precision == "int8":
        in_int8(student.transformer)
    vae, tokenizer = wan.load_vae(source.folder, dtype).to(device), wan.load_tokenizer(source.folder)
    tokens = load_tokens(source.folder)
    known = len(tokenizer) < 100 and all(
        tokenizer.unk_token_id not in row
        for row in tokens([lab_prompt(c, s, m) for c in COLOURS for s in SHAPES for m in MANNERS])
    )
    name, encode = Path(model).resolve().name, wan.load_text(source.folder, device)
    studio = Studio(name, source, student, vae, device, encode, tokens, tokenizer.unk_token_id, known, again=again)
    if (policy := studio.policy).window is not None and policy.window - policy.sink - source.causal.rest < 1:
        print(
            f"{name}: chunks of {source.causal.rest} latents leave no room in a window of {policy.window} for the chunk before; "
            "each begins anew from what the sink keeps"
        )
    return studio if first_frame is None else replace(studio, given=studio.picture(first_frame))


def lab_prompt(colour: str, shape: str, manner: str) -> str:
    """A caption of the lab's world."""
    return MANNERS[manner].format(f"a {colour} {shape}")


def checked(prompt: str, where: str) -> str:
    """A prompt without white space around it. Raises UserError where nothing of use is left."""
    text = whole(prompt, where).strip()
    if not text or len(text) > LONGEST:
        raise UserError(f"{where} takes 1 to {LONGEST} characters, not {len(text)}")
    return text


# ---------------------------------------------------------------------------------------------- pieces


@dataclass
class Times:
    """Seconds that the two stages have taken, and how many frames came of it."""

    make: float = 0.0
    decode: float = 0.0
    frames: int = 0


def pieces(
    studio: Studio,
    text_at: Callable[[int], Tensor],
    seed: int,
    times: Times | None = None,
    overlap: bool = True,
    given_at: Callable[[int], Tensor | None] | None = None,
) -> abc.Generator[np.ndarray, None, None]:
    """Frames uint8 ``(1 or 4, H, W, 3)``, a latent's at a time, without an end; of one studio one at a time, until it is closed.

    Args:
        studio: whose.
        text_at: as of :func:`mogan.sampling.endless.stream_endless`.
        seed: of the noise.
        times: where what the stages take is added up.
        overlap: make a chunk while the one before it is decoded, in a thread; the frames are the same.
        given_at: the first latent, if another one may take its place, asked for as ``text_at`` is; else the studio's.

    Raises:
        UserError: what is made are no numbers, or the model counts no further in time.
    """
    spent, source = times or Times(), studio.source
    shape = wan.latent_shape(source.folder, source.geometry)
    assert source.sigmas is not None
    made = stream_endless(studio.student, text_at, shape, source.sigmas, seed, studio.again, given_at or studio.given)
    side = torch.cuda.Stream(studio.device) if overlap and studio.device.type == "cuda" else None

    def chunk(_: int) -> Tensor:
        """On a GPU by a stream of its own, at whose end this thread waits: what is handed over is there."""
        with _clock(spent, "make"), torch.cuda.stream(side) if side else nullcontext():
            latents = next(made)
            refuse_what_is_no_number(latents)
        if side:
            side.synchronize()
            latents.record_stream(torch.cuda.default_stream(studio.device))
        return latents

    chunks = one_ahead(chunk, count()) if overlap else map(chunk, count())
    frames = stream_chunks(studio.vae, _timed_out(chunks, spent))
    while True:
        with _clock(spent, "decode"):
            piece = to_frames(next(frames))[0]
        spent.frames += len(piece)
        yield piece


@contextmanager
def _clock(spent: Times, stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    setattr(spent, stage, getattr(spent, stage) + time.perf_counter() - begun)


def _timed_out(chunks: Iterator[Tensor], spent: Times) -> Iterator[Tensor]:
    """The same, without the time they are waited for in what decoding takes."""
    while True:
        begun = time.perf_counter()
        chunk = next(chunks)
        spent.decode -= time.perf_counter() - begun
        yield chunk


def cut(made: Iterator[np.ndarray], frames: int) -> Iterator[np.ndarray]:
    """The first so many frames, uint8 ``(H, W, 3)``, one by one, of pieces ``(F, H, W, 3)``."""
    left = frames
    for piece in made:
        yield from piece[:left]
        left -= len(piece)
        if left <= 0:
            return
