"""What autoencoder and optical flow cost, traced on the real networks at the real shapes, batch 1."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torchvision.models.optical_flow import raft_large

from mogan.costs.shapes import Shapes
from mogan.costs.trace import Call, Work, fake, sizes, trace
from mogan.errors import UserError
from mogan.models.autoencoder import decode_window, encode_video, stream_video
from mogan.models.host import in_pieces
from mogan.motion.estimators import CLASSICAL
from mogan.motion.flow import RaftConfig, RaftFlow, read_raft_config


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``AutoencoderKLWan`` among a config file's entries."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "clip_output"}


class Codec:
    """The autoencoder of some shapes, on the meta device; every call is traced once. ``pieces``: in the smallest."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, pieces: bool = False):
        self.shapes = shapes
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                self.vae: Any = AutoencoderKLWan(**arguments(shapes.vae)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(usual)
        self.vae = in_pieces(self.vae) if pieces else self.vae
        self._traced: dict[tuple, Call] = {}

    def decode(self, length: int, start: int = 0, grad: bool = False, checkpointing: bool = False) -> Call:
        """Decode of ``length`` latent frames after ``start`` others. From the third latent frame on all cost the same, and
        from the fourth on none needs more memory than the one before; the first and the last of a window need less.
        """
        if not grad:
            if start + length <= 4:
                return self._decode(start, length)
            line = self._decode(0, 3).along(self._decode(0, 4), start + length - 3)
            return Call(line.work, line.held, max(line.peak, 2 * line.held))  # the frames, and the clip put together
        if start + length <= 5 or length <= 3:
            return self._decode(start, length, True, checkpointing)
        window = self._decode(2, 3, True, checkpointing).along(self._decode(2, 4, True, checkpointing), length - 3)
        prefix = self._decode(0, 3).work - self._decode(0, 2).work
        return replace(window, work=window.work + prefix * (start - 2))

    def encode(self, frames: int, grad: bool = False, checkpointing: bool = False) -> Call:
        """Encode of ``4 k + 1`` frames. From the third chunk on all cost the same: the second one's memories are shorter."""
        if frames <= 17:
            return self._encode(frames, grad, checkpointing)
        four, five = (self._encode(n, grad, checkpointing) for n in (13, 17))
        return four.along(five, (frames - 13) / 4)

    def stream(self) -> Call:
        """Decode of a clip whose frames are given away as they come: from the fourth latent frame on none needs more memory."""
        channels, frames, height, width = self.shapes.latent
        z = torch.empty(1, channels, min(frames, 4), height, width, device="meta")

        def last() -> torch.Tensor:
            piece = torch.empty(0, device="meta")
            for piece in stream_video(self.vae, z):  # noqa: B007  # what the loop leaves is held, one latent frame's
                pass
            return piece

        short = self._once(("stream", 0, 0, False, False), last)
        return Call(self.decode(frames).work, short.held, short.peak)

    def _decode(self, first: int, count: int, grad: bool = False, checkpointing: bool = False) -> Call:
        channels, _, height, width = self.shapes.latent
        z = torch.empty(1, channels, first + count, height, width, device="meta", requires_grad=grad)
        return self._once(
            ("decode", first, count, grad, checkpointing),
            lambda: decode_window(self.vae, z, first, count, checkpointing),
        )

    def _encode(self, frames: int, grad: bool, checkpointing: bool) -> Call:
        size = self.shapes.size
        video = torch.empty(1, 3, frames, size.height, size.width, device="meta", requires_grad=grad)
        return self._once(
            ("encode", frames, 0, grad, checkpointing), lambda: encode_video(self.vae, video, checkpointing)
        )

    def _once(self, key: tuple, call: Callable[[], torch.Tensor]) -> Call:
        if key not in self._traced:
            self._traced[key] = trace((), call, backward=key[3])
        return self._traced[key]


def random_flow(name: str, iterations: int, one_by_one: bool) -> tuple[RaftFlow | None, int]:
    """The recipe's RAFT with random weights; None for a classical estimator, whose cost is the CPU's."""
    if name in CLASSICAL:
        return None, 0
    settings = Path(name) / "config.json"
    if settings.is_file():
        network = read_raft_config(settings).build()
    else:
        network = RaftConfig().build() if name == "lab" else raft_large()
    return RaftFlow(network, iterations, 1 if one_by_one else 16), sizes(network)[0]


def estimate_flow(flow: RaftFlow | None, shapes: Shapes, frames: int, grad: bool, checkpointing: bool) -> Call:
    """RAFT on a window: chunks of pairs one after the other, ``iterations`` refinements each. Raises UserError for one frame."""
    if flow is None:
        return Call(Work(), 0.0, 0.0)
    if frames < 2:
        raise UserError("optical flow is between frames: give --frames 5 or more, or a recipe that sees no motion")
    size = shapes.size
    pairs = min(flow.pairs_at_once(size.height, size.width), frames - 1)
    flow.checkpointing = checkpointing
    wanted, calls = flow.iterations, []
    for flow.iterations in (1, 2):
        with fake():
            video = torch.empty(1, 3, pairs + 1, size.height, size.width, requires_grad=grad)
            calls.append(trace((), partial(flow, video), backward=grad))
    flow.iterations = wanted
    chunk = calls[0].along(calls[1], wanted - 1)
    chunks = (frames - 1) / pairs
    held = chunk.held * chunks
    return Call(chunk.work * chunks, held, held - chunk.held + chunk.peak, host=chunk.host * chunks)
