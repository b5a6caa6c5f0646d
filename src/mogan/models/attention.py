"""How Wan's attention is computed here: text padding once instead of some five hundred times, positions as complex numbers, fp32 on a CPU."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mogan.devices import sent
from mogan.models.conditions import blocks_of
from mogan.models.frame_levels import apart, whole

TEXT_LENGTH = 512  # WanPipeline pads every prompt to this many tokens and attends to the padding


class RMSNorm(torch.nn.RMSNorm):
    """Takes its weight to the dtype of what it norms, as autocast does a product's, and returns that dtype.

    Of two dtypes torch makes a chain of passes over memory, each with its result kept in fp32, where one kernel does. On a GPU
    autocast would make the result fp32: queries and keys of another dtype than values, which attention over several processes
    refuses in its backward pass, and keys of twice the size in a causal student's cache. The kernel itself adds in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same contract as ``torch.nn.RMSNorm``: ``(..., D)`` to the same shape."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class FoldedPadding:
    """Cross-attention that computes one padding token and counts it as many.

    Wan attends to the zero rows that pad a prompt to 512 tokens, without a mask. Those rows are equal, so their keys and
    values are equal, and ``m`` equal keys weigh as much as one whose logit is raised by ``log m``. A text of ``L`` rows,
    the last one padding, therefore gives what the stock model gives for 512 rows, at a fraction of the cost.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, products: Callable[[], AbstractContextManager]):
        self.products = products

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """Same contract as diffusers' ``WanAttnProcessor`` for cross-attention, but for shorter texts.

        Of an image-to-video transformer the rows before the last 512 are a picture's.
        """
        seen = 0 if attn.add_k_proj is None else max(0, encoder_hidden_states.shape[1] - TEXT_LENGTH)
        key, value = self.keys(attn, encoder_hidden_states[:, seen:])
        if not seen:
            return self.attend(attn, hidden_states, key, value)
        picture = encoder_hidden_states[:, :seen]
        more = _by_head(attn, attn.norm_added_k(attn.add_k_proj(picture))), _by_head(attn, attn.add_v_proj(picture))
        return self.attend(attn, hidden_states, key, value, more)

    def keys(self, attn, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a text, each ``(B, heads, L, width of a head)``."""
        return _by_head(attn, attn.norm_k(attn.to_k(text))), _by_head(attn, attn.to_v(text))

    def attend(
        self, attn, hidden_states: Tensor, key: Tensor, value: Tensor, picture: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Attention of ``hidden_states``, ``(B, L, D)``, to keys and values ``(B, heads, T, d)``; to those of a picture apart, added."""
        frames = len(hidden_states) // len(key)
        hidden_states = whole(hidden_states, frames)
        query = _by_head(attn, attn.norm_q(attn.to_q(hidden_states)))
        bias, length = None, key.shape[2]
        if length < TEXT_LENGTH:
            # a tensor, not math.log of a number: one compiled graph then serves every length
            count = torch.full((1,), TEXT_LENGTH - length + 1, dtype=torch.float64, device=query.device)
            bias = F.pad(count.log().to(query.dtype), (length - 1, 0)).view(1, 1, 1, length)
        with self.products():
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            if picture is not None:
                out = out + F.scaled_dot_product_attention(query, *picture)
        out = apart(out.transpose(1, 2).flatten(2, 3).type_as(query), frames)
        return attn.to_out[1](attn.to_out[0](out))


def _by_head(attn: Any, x_BLD: Tensor) -> Tensor:
    """``(B, heads, L, width of a head)``."""
    return x_BLD.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def rotate(
    x_BLHD: Float[Tensor, "b l h d"], cos: Float[Tensor, "_ l 1 d"], sin: Float[Tensor, "_ l 1 d"]
) -> Float[Tensor, "b l h d"]:
    """Rotary position embedding as the stock processor has it, pairs of neighbours taken for complex numbers.

    One product in place of four, each with its pass over memory: the same numbers in a fourth to a seventh of the time on a CPU.
    """
    if torch.compiler.is_compiling():  # inductor fuses real products, and leaves complex ones alone
        a, b = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[..., 0::2], sin[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x_BLHD)
    exact = x_BLHD if x_BLHD.dtype == torch.float64 else x_BLHD.float()
    turn = torch.complex(cos[..., 0::2].to(exact.dtype), sin[..., 1::2].to(exact.dtype))
    turned = torch.view_as_complex(exact.unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(turned).flatten(-2).type_as(x_BLHD)


class SelfAttention(WanAttnProcessor):
    """The stock self-attention within a context that may change how it is computed."""

    def __init__(self, products: Callable[[], AbstractContextManager]):
        super().__init__()
        self.products = products

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        """Same contract as ``WanAttnProcessor``, ``(B, L, D)``; frames may come side by side (:mod:`mogan.models.frame_levels`)."""
        frames = rotary_emb[0].shape[1] // hidden_states.shape[1]
        clip = whole(hidden_states, frames)
        query, key = attn.norm_q(attn.to_q(clip)), attn.norm_k(attn.to_k(clip))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(clip)))
        query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        with self.products():
            out = self.attend(query, key, value)
        out = apart(out.flatten(2, 3).type_as(query), frames)
        return attn.to_out[1](attn.to_out[0](out))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of ``(B, L, heads, d)``, by the backend and the processes that diffusers was told."""
        own = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
        return dispatch_attention_fn(query, key, value, **own)


class _Fp32Attention(TorchFunctionMode):
    """Within it attention on a CPU ignores autocast: torch's bf16 kernel takes four times as long backwards as fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (args or tuple(kwargs.values()))[0].device.type != "cpu":
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def set_attention(transformer: Any, fp32_on_cpu: bool = True) -> Any:
    """Give every block of a Wan transformer our attention and its norms, in place; text must then come from :func:`stack_text`.

    Parameters and their names stay. Cross-attention folds the padding. On a CPU both kinds ignore autocast;
    ``fp32_on_cpu=False`` leaves that out where a CPU is to do what a GPU does.
    """
    products = _Fp32Attention if fp32_on_cpu else nullcontext
    for block in blocks_of(transformer):
        block.attn1.set_processor(SelfAttention(products))
        block.attn2.set_processor(FoldedPadding(products))
        for attention in (block.attn1, block.attn2):
            for name in ("norm_q", "norm_k"):
                stock = getattr(attention, name)
                norm = RMSNorm(stock.normalized_shape, stock.eps, device="meta")
                norm.weight = stock.weight
                setattr(attention, name, norm)
    return transformer


def stack_text(embeddings: Iterable[Tensor], device: str | torch.device = "cpu") -> Float[Tensor, "b l d"]:
    """Pad embeddings ``(L, D)`` to ``(B, L, D)`` with zero rows to the longest plus one (at most 512): the last row is padding."""
    embeddings = [e.float() for e in embeddings]
    length = min(max(len(e) for e in embeddings) + 1, TEXT_LENGTH)
    return sent(torch.stack([F.pad(e, (0, 0, 0, length - len(e))) for e in embeddings]), device)
