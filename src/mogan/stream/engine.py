"""What a causal student makes, piece by piece: a latent's frames each, the next chunk being made while one is decoded.

Nothing is made that nobody asks for: a piece asked for is decoded, and the chunk after it is begun, no more. Who stops asking
stops the work.
"""

import re
import time
import traceback
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mogan.data.batches import one_ahead
from mogan.data.clips import to_video
from mogan.data.lists import whole
from mogan.data.tokens import load_tokens
from mogan.data.video import flow_picture
from mogan.errors import UserError, too_little_memory
from mogan.models import wan
from mogan.models.attention import TEXT_LENGTH, stack_text
from mogan.models.autoencoder import encode_video, stream_chunks
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Policy
from mogan.models.int8 import in_int8
from mogan.models.states import told
from mogan.motion.classical_flow import dis
from mogan.runs.generator import Generator, open_generator
from mogan.sampling.endless import bounded, stream_endless
from mogan.sampling.first_frames import first_pictures
from mogan.sampling.samplers import refuse_what_is_no_number, to_frames
from mogan.world.scenes import COLOURS, DIRECTIONS, SHAPES

LONGEST = 2000  # characters of a prompt
KEPT_SECONDS, KEPT_BYTES = 60, 2**29  # of pieces that were made, to be saved or asked for again
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
        return stack_text([told(text, state, self.source.states) for text in self.encode([prompt])], self.device)

    @property
    def policy(self) -> Policy:
        """What a chunk of its endless clips sees of the past."""
        return bounded(self.student.how, 1 + (self.source.geometry.frames - 1) // self.frames_per_latent)

    @torch.no_grad()
    def picture(self, path: Path) -> Tensor:
        """A picture, or the first frame of a video, as the first latent ``(1, C, 1, h, w)`` of a clip."""
        return encode_video(
            self.vae, to_video(first_pictures([path], self.source.geometry)[0][None]).to(self.device), False
        )

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


# ---------------------------------------------------------------------------------------------- one that is watched


class Follows(Protocol):
    """A text that changes by itself, and the first latent with it; asked for a chunk by the number of its first latent."""

    def __call__(self, latent: int) -> Tensor:
        """The text ``(1, L, D)``."""

    def given(self, latent: int) -> Tensor | None:
        """The first latent ``(1, C, 1, h, w)``, or none."""


Text = Tensor | Follows


@dataclass
class Watched:
    """A stream under way: pieces by number, in turn, the last minute of them kept; its text may be changed at any time.

    ``piece`` and ``close`` are called from one thread, ``say`` from any.
    """

    studio: Studio
    seed: int
    texts: list[Text]
    times: Times = field(default_factory=Times)
    kept: dict[int, np.ndarray] = field(default_factory=dict)
    made: int = 0
    changes: list[tuple[int, int]] = field(default_factory=list)  # first latent of a chunk, number of its text
    failed: UserError | None = None
    given: Tensor | None = None  # the first latent that was last given

    def __post_init__(self):
        self.given = self.studio.given
        self.source = pieces(self.studio, self._text_at, self.seed, self.times, given_at=self._given_at)

    def say(self, text: Text) -> int:
        """From the next chunk on another text; its number."""
        self.texts.append(text)
        return len(self.texts) - 1

    def _text_at(self, latent: int) -> Tensor:
        number = len(self.texts) - 1
        if not self.changes or self.changes[-1][1] != number:
            self.changes.append((latent, number))
        text = self.texts[number]
        return text if isinstance(text, Tensor) else text(latent)

    def _given_at(self, latent: int) -> Tensor | None:
        text = self.texts[self.changes[-1][1]]  # that of the chunk, which was asked for first
        if not isinstance(text, Tensor):
            self.given = text.given(latent)
        return self.given

    def piece(self, number: int) -> np.ndarray | None:
        """Frames of a kept piece or the next one, uint8 ``(F, H, W, 3)``; ``None``: it is neither."""
        if number == self.made:
            if self.failed:
                raise self.failed
            try:
                frames = next(self.source)
            except Exception as error:
                self.failed = error if isinstance(error, UserError) else UserError(_sentence(error))
                raise self.failed from error
            self.kept[number] = frames
            self.made += 1
            self._forget()
        return self.kept.get(number)

    def text_of(self, number: int) -> int:
        """Number of the text that a piece was made under."""
        return max(text for latent, text in self.changes if latent <= number)

    def close(self) -> None:
        """End it, once a chunk that is being made is done."""
        self.source.close()
        self.failed = UserError("This stream has ended.")

    def _forget(self) -> None:
        size = self.studio.source.geometry
        most = min(KEPT_SECONDS * size.fps, KEPT_BYTES // (3 * size.height * size.width))
        while sum(map(len, self.kept.values())) > max(most, 2 * self.studio.frames_per_latent):
            del self.kept[min(self.kept)]


def _sentence(error: Exception) -> str:
    if sentence := too_little_memory(error):
        return sentence
    traceback.print_exception(error)
    return "This stream broke off with an error, which the terminal shows."


def flow_over(before: np.ndarray | None, frames: np.ndarray) -> np.ndarray:
    """Optical flow from the frame before each, RGBA ``(F, H, W, 4)``: hue is direction, opacity speed, full at a 20th of the width."""
    clip = frames if before is None else np.concatenate([before[-1:], frames])
    fields, most = np.zeros((len(frames), 2, *frames.shape[1:3]), np.float32), frames.shape[2] / 20
    if len(clip) > 1:
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        fields[1 - len(clip) :] = dis(video)[0].transpose(0, 1).numpy()
    speed = np.hypot(fields[:, 0], fields[:, 1])[:, None]
    hues = flow_picture(most * fields / np.maximum(speed, 1e-6), most)
    return np.concatenate([hues, np.rint(255 * np.clip(speed / most, 0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)], -1)
