"""Frame-sparse self-attention: a frame sees itself and a few reference frames, which see all and are seen by all.

Efficient-vDiT (arXiv 2502.06155) found the attention of video transformers to repeat from frame to frame: what a frame gives
to itself differs, what it gives to others looks alike whichever others they are. A few references then stand for all, and the
cost is linear in the number of frames. Shape letters: B batch, H heads, N tokens of F frames, D width of a head.

What each block of a model sees lies beside its weights (:class:`Mask`), in a file that stock pipelines pass over.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mogan.disk.files import read_json, write_atomically
from mogan.errors import UserError
from mogan.models.attention import SelfAttention
from mogan.models.frame_levels import frames_of
from mogan.models.sight import Sight, flex_attention_on, flex_masked, runs

Attend = Callable[..., Tensor]
FILE = "frame_sparse.json"  # in the folder of a transformer's weights


def references(frames: int, count: int) -> tuple[int, ...]:
    """Which frames all others see: ``count`` of them, evenly spaced, the first among them."""
    if not 1 <= count <= frames:
        raise ValueError(f"of {frames} frames from 1 to {frames} may be references, not {count}")
    return tuple((2 * i * frames + count) // (2 * count) for i in range(count))


def kept_share(frames: int, count: int) -> float:
    """Share of the pairs of frames that see each other: ``F + 2k(F - k) + k(k - 1)`` of ``F^2``."""
    return (frames + 2 * count * (frames - count) + count * (count - 1)) / frames**2


def sees(frames: int, count: int) -> Tensor:
    """True where a frame (row) sees another (column), ``(F, F)``."""
    mask = torch.eye(frames, dtype=torch.bool)
    for reference in references(frames, count):
        mask[reference] = mask[:, reference] = True
    return mask


@cache
def sight(frames: int, count: int) -> Sight:
    """The same as what each frame sees."""
    return Sight(tuple(((f, f + 1), runs(row.nonzero()[:, 0].tolist())) for f, row in enumerate(sees(frames, count))))


@dataclass(frozen=True)
class Mask:
    """What the blocks of a transformer see of a clip.

    Attributes:
        frames: latent frames of the clips it is for.
        references: of each block, how many.
        chosen: how: model, threshold, errors of the blocks; for people.
    """

    frames: int
    references: tuple[int, ...]
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for count in self.references:
            references(self.frames, count)

    @property
    def kept(self) -> float:
        """Share of all pairs of frames that see each other, the mean over blocks."""
        return sum(kept_share(self.frames, count) for count in self.references) / len(self.references)

    def require(self, frames: int) -> None:
        """Refuse clips of another length: their tokens would be cut into frames wrongly. Raises UserError."""
        if frames != self.frames:
            raise UserError(
                f"this model's attention is frame-sparse for clips of {self.frames} latent frames, and one has {frames}: take "
                "clips of that length, or search again (`mogan tiles`)"
            )


def read_mask(part: Path) -> Mask | None:
    """The mask in the folder of a transformer's weights; None where there is none, which is dense. Raises UserError."""
    if not (part / FILE).is_file():
        return None
    facts = read_json(part / FILE)
    try:
        if any(type(number) is not int for number in (facts["frames"], *facts["references"])):
            raise ValueError("one is no whole number")
        return Mask(facts.pop("frames"), tuple(facts.pop("references")), facts)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{part / FILE} does not say how many frames and references there are ({error}): make it again (`mogan tiles`)"
        ) from error


def write_mask(part: Path, mask: Mask) -> None:
    """Beside a transformer's weights."""
    facts = {"frames": mask.frames, "references": mask.references, **mask.chosen}
    write_atomically(part / FILE, json.dumps(facts, indent=1) + "\n")


def masked(transformer: Any, part: Path) -> Any:
    """A transformer with the attention that the folder of its weights says, in place; dense where it says nothing.

    Raises:
        UserError: the mask is of a transformer with other blocks.
    """
    mask = read_mask(part)
    if mask is None:
        return transformer
    if len(mask.references) != len(transformer.blocks):
        raise UserError(
            f"{part / FILE} is for {len(mask.references)} blocks and the transformer has {len(transformer.blocks)}: make it "
            "again (`mogan tiles`)"
        )
    return set_mask(transformer, mask)


def mask_of(transformer: Any) -> Mask | None:
    """The mask that a transformer computes with; None of a dense one."""
    return next((hook.mask for hook in transformer._forward_pre_hooks.values() if isinstance(hook, _OfLength)), None)


def attend(
    query_BHND: Float[Tensor, "b h n d"],
    key_BHND: Float[Tensor, "b h n d"],
    value_BHND: Float[Tensor, "b h n d"],
    frames: int,
    count: int,
    **settings: Any,
) -> Float[Tensor, "b h n d"]:
    """Exact masked attention without a mask: two dense ones, of the references over everything and of the others over few.

    With all frames or all but one as references it is dense attention itself. On a GPU that compiles it, flex attention skips what is
    not seen, and nothing is gathered. ``settings`` go to ``scaled_dot_product_attention``.
    """
    if count >= frames - 1:
        return F.scaled_dot_product_attention(query_BHND, key_BHND, value_BHND, **settings)
    if flex := flex_attention_on(query_BHND.device.type):
        return flex_masked(flex, query_BHND, key_BHND, value_BHND, sight(frames, count))
    chosen = references(frames, count)
    others = [frame for frame in range(frames) if frame not in chosen]
    query, key, value = (x.unflatten(2, (frames, -1)) for x in (query_BHND, key_BHND, value_BHND))
    of_references = F.scaled_dot_product_attention(
        query[:, :, chosen].flatten(2, 3), key_BHND, value_BHND, **settings
    ).unflatten(2, (count, -1))

    def shown(x: Tensor) -> Tensor:
        """What each other frame sees, the references and itself, as samples of their own: ``(B O, H, (k + 1) n, D)``."""
        shared = x[:, :, chosen].flatten(2, 3)[:, None].expand(-1, len(others), -1, -1, -1)
        return torch.cat([shared, x[:, :, others].transpose(1, 2)], 3).flatten(0, 1)

    own = query[:, :, others].transpose(1, 2).flatten(0, 1)
    of_others = F.scaled_dot_product_attention(own, shown(key), shown(value), **settings)
    of_others = of_others.unflatten(0, (-1, len(others))).transpose(1, 2)
    order = sorted(range(frames), key=[*chosen, *others].__getitem__)
    return torch.cat([of_references, of_others], 2)[:, :, order].flatten(2, 3)


def tiles(query_BHND: Tensor, key_BHND: Tensor, frames: int) -> tuple[Float[Tensor, "f f"], Float[Tensor, " f"]]:
    """How attention is spread over frames, and how much it repeats: means over samples and heads.

    First the attention that the tokens of a frame (row) give to those of another (column); rows sum to 1. Then of each frame
    the cosine between the tiles, token by token, by which it sees one and another frame, itself left out: 1 if it sees all
    others alike. That is what the paper calls the attention tile. NaN of clips with less than three frames.
    """
    shares = torch.zeros(frames, frames, device=query_BHND.device)
    alike = torch.zeros(frames, device=query_BHND.device)
    heads = list(zip(query_BHND.flatten(0, 1), key_BHND.flatten(0, 1), strict=True))
    for number, query_ND in enumerate(zip(*(q.unflatten(0, (frames, -1)) for q, _ in heads), strict=True)):
        for q, (_, k) in zip(query_ND, heads, strict=True):  # one at a time: at Wan's size a frame's is 0.2 GB
            found = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1).unflatten(-1, (frames, -1))
            shares[number] += found.sum(-1).mean(0)
            others = torch.cat([found[:, :number], found[:, number + 1 :]], 1)
            units = others / others.square().sum((0, 2), keepdim=True).sqrt()
            alike[number] += (units.sum(1).square().sum() - (frames - 1)) / (
                (frames - 1) * (frames - 2) or float("nan")
            )
    return shares / len(heads), alike / len(heads)


class _Instead(TorchFunctionMode):
    """Within it attention is computed by a function of our own."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        settings = {name: value for name, value in kwargs.items() if value is not None}
        return self.attend(*args, **settings)


@contextmanager
def _both(products: Callable[[], AbstractContextManager], attend: Attend) -> Iterator[None]:
    with products(), _Instead(attend):
        yield


def _within(stock: SelfAttention, attend: Attend) -> SelfAttention:
    """A block's self-attention with another function in the place of the product, computed in the same arithmetic."""
    return SelfAttention(partial(_both, stock.products, attend))


class FrameSparse(SelfAttention):
    """A block's self-attention, of frames that see themselves and ``count`` references."""

    def __init__(self, before: SelfAttention, frames: int, count: int):
        self.stock: SelfAttention = before.stock if isinstance(before, FrameSparse) else before
        super().__init__(partial(_both, self.stock.products, partial(_sparse, frames=frames, count=count)))


def _sparse(query: Tensor, key: Tensor, value: Tensor, frames: int, count: int, **settings: Any) -> Tensor:
    return attend(query, key, value, frames, count, **settings)


def set_frame_sparse(transformer: Any, frames: int, counts: Sequence[int]) -> Any:
    """Make the self-attention of every block frame-sparse, in place, with so many references each; names stay.

    ``frames`` are latent frames of the clips: the mask is static, and others are refused. ``counts`` of ``frames`` leave a
    block dense. What was set before is replaced.
    """
    return set_mask(transformer, Mask(frames, tuple(counts)))


def set_mask(transformer: Any, mask: Mask) -> Any:
    """The same, of a mask."""
    if len(mask.references) != len(transformer.blocks):
        raise ValueError(
            f"{len(transformer.blocks)} blocks need as many numbers of references, not {len(mask.references)}"
        )
    for block, count in zip(transformer.blocks, mask.references, strict=True):
        block.attn1.set_processor(FrameSparse(block.attn1.processor, mask.frames, count))
    for number, hook in list(transformer._forward_pre_hooks.items()):
        if isinstance(hook, _OfLength):
            del transformer._forward_pre_hooks[number], transformer._forward_pre_hooks_with_kwargs[number]
    transformer.register_forward_pre_hook(_OfLength(mask), with_kwargs=True)
    return transformer


class _OfLength:
    """Refuses clips of another length."""

    def __init__(self, mask: Mask):
        self.mask = mask

    def __call__(self, transformer: Any, args: tuple, kwargs: dict) -> None:
        clip: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.mask.require(frames_of(transformer.blocks) * clip.shape[2] // transformer.config.patch_size[0])


@contextmanager
def watched(transformer: Any, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the block ``see`` gets each block's number, queries and keys ``(B, H, N, D)`` as attention is computed.

    Dense or sparse, it is computed as it was.
    """
    stock = [block.attn1.processor for block in transformer.blocks]

    def look(query: Tensor, key: Tensor, value: Tensor, number: int, **settings: Any) -> Tensor:
        see(number, query, key)
        return F.scaled_dot_product_attention(query, key, value, **settings)

    for number, block in enumerate(transformer.blocks):
        block.attn1.set_processor(_within(block.attn1.processor, partial(look, number=number)))
    try:
        yield
    finally:
        for block, processor in zip(transformer.blocks, stock, strict=True):
            block.attn1.set_processor(processor)


@torch.no_grad()
def errors(transformer: Any, frames: int, call: Callable[[], object]) -> Float[Tensor, "l f"]:
    """What frame-sparseness costs each block alone, for 1 to all frames as references: of what the block adds to its input,
    the squared error over the square, summed over all that ``call`` makes of the dense transformer.

    Inputs are the dense model's, so a block's error does not hang on what is chosen for those before it.
    """
    blocks = transformer.blocks
    wrong, whole = torch.zeros(len(blocks), frames), torch.zeros(len(blocks))

    def measure(number: int, block: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
        stock, before = block.attn1.processor, args[0]
        added = (out - before).float()
        whole[number] += added.square().sum().cpu()
        try:
            for count in range(1, frames):
                block.attn1.set_processor(FrameSparse(stock, frames, count))
                wrong[number, count - 1] += (block.forward(*args, **kwargs) - out).float().square().sum().cpu()
        finally:
            block.attn1.set_processor(stock)

    handles = [
        block.register_forward_hook(
            lambda module, args, kwargs, out, number=number: measure(number, module, args, kwargs, out),
            with_kwargs=True,
        )
        for number, block in enumerate(blocks)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return wrong / whole[:, None]


def search(errors_LF: Tensor, threshold: float) -> list[int]:
    """The fewest references of each block whose error is at most ``threshold``: Efficient-vDiT's layer-wise search."""
    return [int((row <= threshold).nonzero()[0]) + 1 for row in errors_LF]
