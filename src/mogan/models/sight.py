"""Which frames see which in a pass over many chunks at once, and flex attention under such a mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mogan.models.causal_cache import FULL, Policy

BLOCK = 128  # tokens, in which flex attention skips what is not seen


@dataclass(frozen=True)
class Sight:
    """Which frames see which, in a pass over many chunks at once.

    Attributes:
        groups: consecutive frames that see the same: ``(start, stop)`` and what they see, in runs ``(start, stop)``.
    """

    groups: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...]

    @property
    def frames(self) -> int:
        """Of the pass."""
        return self.groups[-1][0][1]

    def mask(self, tokens: int = 1) -> Tensor:
        """True where a query (row) sees a key (column), ``(L, L)`` with ``L = frames * tokens``."""
        mask = torch.zeros(self.frames, self.frames, dtype=torch.bool)
        for (start, stop), seen in self.groups:
            for first, last in seen:
                mask[start:stop, first:last] = True
        return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def runs(frames: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending frames as runs ``(start, stop)``."""
    found: list[tuple[int, int]] = []
    for frame in frames:
        if found and found[-1][1] == frame:
            found[-1] = (found[-1][0], frame + 1)
        else:
            found.append((frame, frame + 1))
    return tuple(found)


def block_causal(chunks: Sequence[int], policy: Policy = FULL) -> Sight:
    """Every chunk sees itself and, as noisy as they are, the earlier ones that the policy keeps."""
    stops = list(accumulate(chunks))
    spans = [(stop - frames, stop) for frames, stop in zip(chunks, stops, strict=True)]
    return Sight(
        tuple((span, runs((*past, *range(*span)))) for span, past in zip(spans, _seen(chunks, policy), strict=True))
    )


def teacher_forcing(chunks: Sequence[int], policy: Policy = FULL) -> Sight:
    """Of ``[clean | noisy]``: clean chunks are block-causal, a noisy one sees itself and the clean ones before it."""
    clean, total = block_causal(chunks, policy).groups, sum(chunks)
    noisy = []
    for ((start, stop), _), past in zip(clean, _seen(chunks, policy), strict=True):
        own = (start + total, stop + total)
        noisy.append((own, (*runs(past), own)))
    return Sight((*clean, *noisy))


def _seen(chunks: Sequence[int], policy: Policy) -> list[tuple[int, ...]]:
    seen = policy.seen(chunks)
    evicted = any(len(past) < sum(chunks[:number]) for number, past in enumerate(seen))
    if evicted and (policy.relative or policy.decay is not None):
        raise ValueError(
            "in one pass a frame has one position and one key: relative positions and EMA sinks need a pass per chunk"
        )
    return seen


@once
def flex_attention_on(device: str) -> Any:
    """Flex attention, compiled, on a GPU where it works; ``None``: what is seen is gathered."""
    if device != "cuda":
        return None
    try:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention)
        x = torch.zeros(1, 1, 128, 64, device=device)
        compiled(x, x, x)
    except Exception:  # whatever a compiler may say: gathering needs none
        return None
    return compiled


def flex_masked(flex: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """The same by flex attention: ``(B, heads, tokens, width)`` in and out; under autocast in its dtype, as other attention is."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    mask = _block_mask(sight, query.shape[2], query.device)
    return flex(*(x.to(dtype) for x in (query, key, value)), block_mask=mask)


@once
def _block_mask(sight: Sight, length: int, device: torch.device) -> Any:
    """What ``create_block_mask`` makes of the frames that are seen; that would need ten bytes for every pair of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    mask, tokens = sight.mask(), length // sight.frames
    seen, some, all_of = (x.to(device) for x in (mask, *_blocks(mask, length)))
    listed = [_listed(blocks) for blocks in (some & ~all_of, all_of)]
    return BlockMask.from_kv_blocks(
        *listed[0], *listed[1], BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, q, k: seen[q // tokens, k // tokens],
        seq_lengths=(length, length),
    )  # fmt: skip


def _blocks(seen_FF: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of blocks of tokens ``(Q, K)``: is a pair in it seen, and are all. What lies beyond the last token is not."""
    tokens, starts = length // len(seen_FF), torch.arange(0, length, BLOCK)
    first, last = starts // tokens, (starts + BLOCK).clamp(max=length).sub(1) // tokens
    sums = F.pad(seen_FF.long().cumsum(0).cumsum(1), (1, 0, 1, 0))  # of the pairs of frames above and to the left
    upper, lower = first[:, None], last[:, None] + 1
    left, right = first[None], last[None] + 1
    count = sums[lower, right] - sums[upper, right] - sums[lower, left] + sums[upper, left]
    whole = starts + BLOCK <= length
    return count > 0, (count == (lower - upper) * (right - left)) & whole[:, None] & whole[None]


def _listed(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks a row has, and which, before all others, as flex attention reads them: ``(1, 1, Q)`` and ``(1, 1, Q, K)``."""
    order = torch.argsort(blocks_QK.int(), dim=1, descending=True, stable=True)
    return blocks_QK.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]
