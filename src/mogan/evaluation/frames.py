"""Frames of a video file, one at a time."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import av
import numpy as np

from mogan.data import video
from mogan.errors import UserError

Frames = Iterable[np.ndarray]
KEPT_BYTES = 128 * 2**20  # a clip that decodes to less than this is kept, a longer one is decoded again for every pass
DECODER = f"PyAV {av.__version__} (rgb24; equal to OpenCV's frames bit for bit on H.264 yuv420p)"


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Every frame of a file as uint8 ``(H, W, 3)``, RGB, as displayed, without holding more than one.

    Raises:
        UserError: the file cannot be opened, holds no picture, breaks in the middle or is cut short.
    """
    return (frame.image_HWC for frame in video.read_frames(path))


class Clip:
    """A file as an iterable of frames that can be gone through any number of times; short ones are decoded once."""

    def __init__(self, path: Path):
        self.path = path
        found = video.probe(path)
        self.fps, self.remarks = found.fps, found.remarks
        self._kept: list[np.ndarray] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[np.ndarray] | None = []
        for frame in read_frames(self.path):
            if kept is not None:
                kept.append(frame)
                if len(kept) * frame.nbytes > KEPT_BYTES:
                    kept = None
            yield frame
        self._kept = kept

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width, counted by decoding: containers' own counts can be wrong.

        Raises:
            UserError: the size changes within the file.
        """
        count, size = 0, (0, 0)
        for frame in self:
            if count and frame.shape[:2] != size:
                raise UserError(f"{self.path} changes its size in the middle: write it again at one size")
            count, size = count + 1, frame.shape[:2]
        return count, *size

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
