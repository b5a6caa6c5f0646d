"""What the backward pass needs, in the host's memory from the forward pass until then; and an autoencoder in small pieces.

Only where things lie changes, and what is computed twice: gradients are those of the plain path, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

LEAST = 2**20  # bytes: what is smaller stays, since moving it frees next to nothing

# operations of their own, by which mogan.costs.trace tells the host's memory from the device's
_library = torch.library.Library("mogan", "DEF")
_library.define("to_host(Tensor x) -> Tensor[]")
_library.define("from_host(Tensor[] pieces, SymInt[] size, SymInt[] stride, Device device) -> Tensor")


@dataclass(frozen=True)
class _OnHost:
    """A tensor's numbers in the order of its memory, piece by piece, and what it takes to make it again."""

    pieces: list[Tensor]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device


def powers_of_two(count: int) -> list[int]:
    """Sizes of at most four pieces that hold so many numbers, a fourteenth to spare at most.

    Pinned memory comes in powers of two: of one piece nearly half may be lost, and of Wan's activations at 480 x 832 it is.
    """
    found: list[int] = []
    while count and len(found) < 3:
        found.append(1 << (count.bit_length() - 1))
        count -= found[-1]
    return [*found, 1 << (count - 1).bit_length()] if count else found


def _rooms(x: Tensor) -> list[Tensor]:
    """For ``x``, pinned where that is on a GPU."""
    place: dict[str, Any] = {"device": "cpu", "pin_memory": True} if x.is_cuda else {"device": x.device}
    return [torch.empty(count, dtype=x.dtype, **place) for count in powers_of_two(x.numel())]


def _parts(x: Tensor, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """The stretches of a dense tensor's memory that go into each piece."""
    flat, start = x.as_strided((x.numel(),), (1,)), 0
    for piece in pieces:
        yield flat[start : start + len(piece)]
        start += len(piece)


def _to_host(x: Tensor) -> list[Tensor]:
    # neither way waits: the copies stand in the stream before whatever uses or frees either side
    pieces = _rooms(x)
    for piece, part in zip(pieces, _parts(x, pieces), strict=True):
        piece[: len(part)].copy_(part, non_blocking=True)
    return pieces


def _from_host(pieces: list[Tensor], size: list[int], stride: list[int], device: torch.device) -> Tensor:
    x = torch.empty_strided(size, stride, dtype=pieces[0].dtype, device=device)
    for piece, part in zip(pieces, _parts(x, pieces), strict=True):
        part.copy_(piece[: len(part)], non_blocking=True)
    return x


_library.impl("to_host", _to_host, "CompositeExplicitAutograd")
_library.impl("from_host", _from_host, "CompositeExplicitAutograd")
_library.impl("to_host", _rooms, "Meta")
_library.impl(
    "from_host",
    lambda pieces, size, stride, device: torch.empty_strided(size, stride, dtype=pieces[0].dtype, device="meta"),
    "Meta",
)


def _pack(x: Tensor) -> Tensor | _OnHost:
    size = x.numel() * x.element_size()
    weights = isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)
    if weights or size < LEAST or size > x.untyped_storage().nbytes():  # the last: a little that is spread out
        return x.detach()
    dense = torch.empty_like(x, device="meta").stride() == x.stride()
    kept = x.detach() if dense else x.detach().contiguous()
    return _OnHost(torch.ops.mogan.to_host(kept), tuple(kept.shape), kept.stride(), x.device)


def _unpack(packed: Tensor | _OnHost) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return torch.ops.mogan.from_host(packed.pieces, packed.size, packed.stride, packed.device)


def kept_on_host(wanted: bool = True) -> AbstractContextManager[Any]:
    """Within the block what a forward pass saves for its backward pass goes to the host; weights and little things stay.

    Of what is recomputed these are its inputs alone.
    """
    return saved_tensors_hooks(_pack, _unpack) if wanted else nullcontext()


def set_aside(optimizer: torch.optim.Optimizer) -> None:
    """Send an optimiser's moments to the host; those of sharded weights stay where they are."""
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if not isinstance(value, DTensor) and value.is_cuda and value.numel() > 1:
                moments[name] = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value)


def resting(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let an optimiser's moments wait in the host's memory between its steps."""

    def fetch(*_: Any) -> None:
        for weight, moments in optimizer.state.items():
            moments |= {k: v.to(weight.device) for k, v in moments.items() if k != "step"}

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(lambda *_: set_aside(optimizer))
    return optimizer


_again: ContextVar[bool] = ContextVar("again", default=False)


@contextmanager
def once_more() -> Iterator[None]:
    """Within the block a step is recomputed: what it leaves to the next one is known, and pieces throw theirs away."""
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)


class _Compact(torch.autograd.Function):
    """Itself; its gradient, which may be a view of a larger one and keep that alive, as a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone(memory_format=torch.contiguous_format)


def in_pieces(vae: Any) -> Any:
    """Let every convolution of a Wan autoencoder's residual blocks, with the norm before it, and every resampling be
    recomputed by itself, in place.

    Within a step of :mod:`mogan.models.autoencoder` that is itself recomputed: its backward pass then holds what lies between
    the pieces and the inside of one.
    """
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            halves = [(module.norm1, module.conv1), (module.norm2, module.conv2)]
            pieces = [partial(_half, norm, module.nonlinearity, conv) for norm, conv in halves]
            module.forward = partial(_residual, module.conv_shortcut, pieces)
        elif isinstance(module, WanResample):
            module.forward = partial(_piece, module.forward, module.mode.endswith("3d"))
    for half in (vae.encoder, vae.decoder):
        if half is not None:
            half.norm_out.forward = partial(_plain_piece, half.norm_out.forward)
    return vae


def _plain_piece(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(forward, x, use_reentrant=False) if torch.is_grad_enabled() and x.requires_grad else forward(x)


def _residual(
    shortcut: Callable, pieces: Sequence[Callable], x: Tensor, feat_cache: Any = None, feat_idx: Any = (0,)
) -> Tensor:
    """A residual block's pass (eval mode, so its dropout does nothing)."""
    short = shortcut(x)
    for piece in pieces:
        x = _piece(piece, True, x, feat_cache, feat_idx)
    return x + short


def _half(norm: Callable, act: Callable, conv: Callable, x: Tensor, feat_cache: list, feat_idx: list[int]) -> Tensor:
    """A norm and the convolution after it, as in the block's own pass."""
    x = act(norm(x))
    before, last = feat_cache[feat_idx[0]], x[:, :, -2:].clone()
    if last.shape[2] < 2 and before is not None:
        last = torch.cat([before[:, :, -1:], last], dim=2)
    feat_cache[feat_idx[0]] = last
    feat_idx[0] += 1
    return conv(x, before)


def _piece(forward: Callable[..., Tensor], remembers: bool, x: Tensor, feat_cache: Any, feat_idx: Any) -> Tensor:
    """A module's pass, whose memory it reads and replaces in ``feat_cache``, as a pure function of both."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
    mine = slice(feat_idx[0], feat_idx[0] + remembers)

    def pure(x: Tensor, *before: Any) -> tuple[Any, ...]:
        cache = [_Compact.apply(m) if isinstance(m, Tensor) and m.requires_grad else m for m in before]
        return forward(x, feat_cache=cache, feat_idx=[0]), *cache

    out, *after = checkpoint(pure, x, *feat_cache[mine], use_reentrant=False)
    feat_cache[mine] = [None] * remembers if _again.get() else after
    feat_idx[0] += remembers
    return out
