"""A level per latent frame, without vectors per token: a clip's frames go through a transformer side by side, as a batch.

Stock Wan takes a level per token instead, and makes for each token the six vectors that modulate a block: in fp32 twelve times a
block's input in bf16, of which training keeps several. All that a Wan block does is done to each token by itself, but for attention,
whose processors are ours and put the frames together (:func:`whole`, :func:`apart`). Blocks and their numbers are the stock ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def takes_frames(transformer: Any) -> bool:
    """Whether :func:`by_frame` can call it: its attention is ours, its tokens are not split over processes, and it is no VACE."""
    first = next(iter(getattr(transformer, "blocks", ())), None)
    ours = first is not None and all(hasattr(attn.processor, "products") for attn in (first.attn1, first.attn2))
    split = getattr(transformer, "_parallel_config", None) is not None
    return ours and not split and not hasattr(transformer, "vace_blocks") and transformer.config.patch_size[0] == 1


def by_frame(transformer: Any, x_BCFHW: Tensor, timestep_BF: Tensor, text_BLD: Tensor, **more: Any) -> tuple[Tensor]:
    """What a transformer, its attention set by :func:`mogan.models.attention.set_attention`, predicts at a timestep per frame.

    ``(B, C, F, H, W)`` in a tuple, as the transformer itself gives it.
    """
    frames = x_BCFHW.shape[2]
    side_by_side = x_BCFHW.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    with _of_clips(transformer, x_BCFHW):
        out = transformer(side_by_side, timestep_BF.flatten(), text_BLD, return_dict=False, **more)[0]
    return (out.squeeze(2).unflatten(0, (-1, frames)).transpose(1, 2),)


@contextmanager
def _of_clips(transformer: Any, x_BCFHW: Tensor) -> Iterator[None]:
    """Within the block positions are those of whole clips, and :func:`frames_of` knows how many frames these have."""
    handle = transformer.rope.register_forward_pre_hook(lambda rope, args: (x_BCFHW,))
    transformer.blocks.frames = x_BCFHW.shape[2]
    try:
        yield
    finally:
        handle.remove()
        del transformer.blocks.frames


def frames_of(blocks: Any) -> int:
    """How many frames go through a transformer's blocks side by side in the call that is under way; 1 in any other call."""
    return getattr(blocks, "frames", 1)


def whole(x: Tensor, frames: int) -> Tensor:
    """Tokens of frames side by side ``(B F, n, D)`` as a clip's, ``(B, F n, D)``."""
    return x if frames == 1 else x.unflatten(0, (-1, frames)).flatten(1, 2)


def apart(x: Tensor, frames: int) -> Tensor:
    """The inverse of :func:`whole`: ``(B, F n, D)`` to ``(B F, n, D)``."""
    return x if frames == 1 else x.unflatten(1, (frames, -1)).flatten(0, 1)
