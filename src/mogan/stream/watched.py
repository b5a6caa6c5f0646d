"""A stream that is watched: its pieces asked for by number, its text changed meanwhile, and optical flow to draw over it."""

import traceback
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mogan.data.video import flow_picture
from mogan.errors import UserError, too_little_memory
from mogan.models.defaults import Geometry
from mogan.motion.classical_flow import dis
from mogan.stream.engine import Studio, Times, pieces
from mogan.stream.script import Following

KEPT_SECONDS, KEPT_BYTES = 60, 2**29  # of pieces that were made, to be saved or asked for again

Text = Tensor | Following  # of a chunk, by its first latent


def kept_frames(size: Geometry) -> int:
    """How many frames of that size are kept: a minute of them, if they are small enough."""
    return min(KEPT_SECONDS * size.fps, KEPT_BYTES // (3 * size.height * size.width))


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
        most = max(kept_frames(self.studio.source.geometry), 2 * self.studio.frames_per_latent)
        while sum(map(len, self.kept.values())) > most:
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
