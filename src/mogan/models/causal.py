"""A stock Wan transformer as a chunk-causal student: a chunk of frames sees itself and, clean, what came before it.

As Self-Forcing (arXiv 2506.08009) and CausVid (arXiv 2412.07772) have it; nothing of the weights changes, not even a name.
Three things of the stock class carry it: what its ``rope`` returns reaches the self-attention of every block untouched, so a
:class:`View` of the past goes that way; all else is done to each token by itself, so that every frame may have a level; frames meet
in self-attention alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.attention import FoldedPadding, SelfAttention, rotate
from mogan.models.causal_cache import FULL, KV, Cache, Causal, Policy, Words
from mogan.models.conditions import animates
from mogan.models.denoiser import Denoiser
from mogan.models.frame_levels import apart, whole
from mogan.models.sight import Sight, block_causal, flex_attention_on, flex_masked, teacher_forcing
from mogan.schedule import velocity_to_x0

FRAMEWISE = Causal(1, 1)


# ------------------------------------------------------------------------------------------------- what a call sees


class View:
    """What the self-attention of one call sees: positions, the past, who sees whom, and where its keys are put.

    A plain object, so that neither sharding nor recomputation looks into it; what a block is handed is its own part of it.
    """

    __slots__ = ("k_cos", "k_sin", "past", "q_cos", "q_sin", "sight", "store", "words")

    def __init__(
        self, q, k, past=(), sight: Sight | None = None, store: list | None = None, words: Words | None = None
    ):
        (self.q_cos, self.q_sin), (self.k_cos, self.k_sin) = q, k
        self.past, self.sight, self.store, self.words = past, sight, store, words

    def of_block(self, number: int) -> "View":
        """With the past of one block."""
        past = tuple(kv[number] for kv in self.past)
        return View((self.q_cos, self.q_sin), (self.k_cos, self.k_sin), past, self.sight, self.store)


class BlockText:
    """A text on its way to one block's cross-attention, with its keys and values or the list that gets them."""

    __slots__ = ("kv", "store", "text")

    def __init__(self, text: Tensor, kv: tuple[Tensor, Tensor] | None, store: list):
        self.text, self.kv, self.store = text, kv, store


class CausalRope(nn.Module):
    """In the place of a transformer's ``rope``: hands the view of a call to its blocks."""

    def __init__(self, stock: Any):
        super().__init__()
        self.stock = stock
        self.view: View | None = None

    def forward(self, hidden_states: Tensor) -> View:
        """The view that :class:`CausalDenoiser` has set, whatever the shape of the input; there is no call without one."""
        assert self.view is not None, "a causal transformer is called through CausalDenoiser, chunk by chunk"
        return self.view

    def table(self, positions: Sequence[int], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(1, tokens, 1, d)`` of frames at time ``positions``, of ``height x width`` tokens each.

        Raises:
            UserError: the clip is longer than the model's positions in time.
        """
        stock = self.stock
        if max(positions, default=0) >= stock.max_seq_len:
            raise UserError(
                f"this model counts {stock.max_seq_len} places in time, and the clip is longer: make a shorter one, or take a "
                "student with a window and relative positions"
            )
        where = sent(torch.tensor(positions), stock.freqs_cos.device)
        found = []
        for buffer in (stock.freqs_cos, stock.freqs_sin):
            t, h, w = buffer.split([stock.t_dim, stock.h_dim, stock.w_dim], 1)
            sizes = (len(positions), height, width, -1)
            parts = (t[where][:, None, None], h[:height][None, :, None], w[:width][None, None])
            found.append(torch.cat([part.expand(*sizes) for part in parts], -1).flatten(0, 2)[None, :, None])
        return found[0], found[1]


class CausalAttention(SelfAttention):
    """Self-attention to a call's own tokens and to the past of its view."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """Same contract as ``WanAttnProcessor``, but that ``rotary_emb`` is a :class:`View`."""
        view = rotary_emb
        frames = view.q_cos.shape[1] // hidden_states.shape[1]
        hidden_states = whole(hidden_states, frames)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        if view.store is not None:
            assert not torch.is_grad_enabled(), "keys are stored by calls without gradient alone"
            view.store.append((key, value))
        if view.past:
            key = torch.cat([*(k.to(key.dtype) for k, _ in view.past), key], 1)
            value = torch.cat([*(v.to(value.dtype) for _, v in view.past), value], 1)
        query, key = rotate(query, view.q_cos, view.q_sin), rotate(key, view.k_cos, view.k_sin)
        with self.products():
            out = self._masked(query, key, value, view.sight) if view.sight else self.attend(query, key, value)
        out = apart(out.flatten(2, 3).type_as(query), frames)
        return attn.to_out[1](attn.to_out[0](out))

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        """Of each group what it sees is gathered: no mask is read; or flex attention, which skips what it hides."""
        if flex := flex_attention_on(query.device.type):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return flex_masked(flex, q, k, v, sight).transpose(1, 2)
        tokens, found = query.shape[1] // sight.frames, []
        for (start, stop), seen in sight.groups:
            k, v = (torch.cat([x[:, a * tokens : b * tokens] for a, b in seen], 1) for x in (key, value))
            found.append(self.attend(query[:, start * tokens : stop * tokens], k, v))
        return torch.cat(found, 1)


class TextOnce(FoldedPadding):
    """Cross-attention to a text whose keys and values are computed once where no gradient is asked for."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """Same contract as :class:`FoldedPadding`, or a :class:`BlockText`."""
        text: Any = encoder_hidden_states
        if isinstance(text, Tensor):
            return super().__call__(attn, hidden_states, text)
        if text.kv is None:
            text.store.append(self.keys(attn, text.text))
        return self.attend(attn, hidden_states, *(text.kv or text.store[-1]))


class HandOver:
    """Before a block is called: its part of the view, and the text with what is known of it."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, block: Any, args: tuple) -> tuple:
        """A forward pre-hook; the view is what tells it a causal call."""
        hidden, text, temb, view = args
        words = view.words
        if words is not None and not torch.is_grad_enabled() and isinstance(block.attn2.processor, TextOnce):
            kv = words.kv[self.number] if len(words.kv) > self.number else None
            text = BlockText(text, kv, words.kv)
        return hidden, text, temb, view.of_block(self.number)


def make_causal(transformer: Any) -> Any:
    """Replace a Wan transformer's ``rope`` and the processors of its blocks, in place; again changes nothing.

    Parameters, their names and everything else stay: adapters, taps, sharding, recomputation. To be called after
    :func:`mogan.models.attention.set_attention`, or again after it.

    Raises:
        UserError: its projections are fused, or its tokens are split over processes.
    """
    if any(getattr(a, "fused_projections", False) for block in transformer.blocks for a in (block.attn1, block.attn2)):
        raise UserError("the transformer's projections are fused: call unfuse_projections() on it first")
    if hasattr(transformer, "vace_blocks") or animates(getattr(transformer, "config", None)):
        raise UserError(
            "a VACE's control and a given first frame are of whole clips: a causal student starts from a text-to-video transformer"
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UserError("a causal student's tokens cannot be split over processes: leave --context-parallel out")
    fresh = not is_causal(transformer)
    if fresh:
        transformer.rope = CausalRope(transformer.rope)
    for number, block in enumerate(transformer.blocks):
        if not isinstance(block.attn1.processor, CausalAttention):
            products = getattr(block.attn1.processor, "products", nullcontext)
            block.attn1.set_processor(CausalAttention(products))
        if type(block.attn2.processor) is FoldedPadding:
            block.attn2.set_processor(TextOnce(block.attn2.processor.products))
        if fresh:
            block.register_forward_pre_hook(HandOver(number))
    return transformer


def is_causal(transformer: Any) -> bool:
    """Whether :func:`make_causal` has been here."""
    return isinstance(getattr(transformer, "rope", None), CausalRope)


# ------------------------------------------------------------------------------------------------- the student


class CausalDenoiser(Denoiser):
    """A causal transformer as ``x0 = chunk(x, sigma, text, cache)``: the next frames, given what the cache keeps.

    Args:
        transformer: made causal.
        dtype: as of :class:`Denoiser`.
        how: its clips come about.
    """

    def __init__(self, transformer: Any, dtype: torch.dtype = torch.float32, how: Causal = FRAMEWISE):
        super().__init__(make_causal(transformer), dtype)
        self.how = how

    def begin(self, text_BLD: Float[Tensor, "b l d"], policy: Policy = FULL) -> Cache:
        """The cache of a rollout without a past, for prompts ``(B, L, D)``."""
        return Cache(policy, words=Words(text_BLD))

    def chunk(
        self,
        x_BCFHW: Float[Tensor, "b c f h w"],
        sigma_B: Float[Tensor, " b"],
        text_BLD: Float[Tensor, "b l d"],
        cache: Cache,
    ) -> Float[Tensor, "b c f h w"]:
        """The clean latent ``(B, C, F, H, W)`` of the next chunk, levels ``(B,)``; gradient into ``x`` and weights, none into the past."""
        return velocity_to_x0(x_BCFHW, self.chunk_velocity(x_BCFHW, sigma_B, text_BLD, cache), sigma_B)

    def chunk_velocity(
        self, x_BCFHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, cache: Cache, to: float | None = None
    ) -> Tensor:
        """Velocity ``(B, C, F, H, W)`` of a chunk given the cache; ``to`` as of :meth:`Denoiser.velocity`."""
        with self._seeing(self._view(x_BCFHW, text_BLD, cache)):
            return self.velocity(x_BCFHW, sigma_B, text_BLD, to)

    @torch.no_grad()
    def remember(
        self, x_BCFHW: Float[Tensor, "b c f h w"], text_BLD: Float[Tensor, "b l d"], cache: Cache, sigma: float = 0.0
    ) -> Cache:
        """One more pass over a finished chunk, clean or noised to ``sigma``: the cache with its keys and values.

        A text other than the cache's begins here: from now on that one is kept.
        """
        frames = x_BCFHW.shape[2]
        store: list[tuple[Tensor, Tensor]] = []
        cache = cache.make_room(frames)
        if cache.words is None or cache.words.text is not text_BLD:
            cache = replace(cache, words=Words(text_BLD))
        view = self._view(x_BCFHW, text_BLD, cache)
        view.store = store
        with self._seeing(view):
            self.velocity(x_BCFHW, torch.full((len(x_BCFHW),), sigma, device=x_BCFHW.device), text_BLD)
        return cache.append(tuple(store), frames)

    def masked(
        self,
        x_BCFHW: Float[Tensor, "b c f h w"],
        sigma_BF: Float[Tensor, "b f"],
        text_BLD: Float[Tensor, "b l d"],
        chunks: Sequence[int],
        policy: Policy = FULL,
    ) -> Float[Tensor, "b c f h w"]:
        """Velocity of all chunks in one pass, each of which sees earlier ones at their own levels (diffusion forcing).

        That is another task than a rollout's, whose past is clean: see :meth:`teacher_forced`.
        """
        sight, frames = block_causal(chunks, policy), list(range(sum(chunks)))
        with self._seeing(self._masked_view(x_BCFHW, frames, sight)):
            return self.velocity(x_BCFHW, sigma_BF, text_BLD)

    def teacher_forced(
        self,
        clean_BCFHW: Float[Tensor, "b c f h w"],
        noisy_BCFHW: Float[Tensor, "b c f h w"],
        sigma_BF: Float[Tensor, "b f"],
        text_BLD: Float[Tensor, "b l d"],
        chunks: Sequence[int],
        policy: Policy = FULL,
        context_sigma: float = 0.0,
    ) -> Float[Tensor, "b c f h w"]:
        """Velocity of ``noisy``, whose chunks see the clean ones before them: what a rollout asks, of all chunks in one pass.

        ``clean`` is told level ``context_sigma``, to which the caller has then noised it.
        """
        sight, frames = teacher_forcing(chunks, policy), list(range(sum(chunks)))
        both = torch.cat([clean_BCFHW, noisy_BCFHW], 2)
        levels = torch.cat([torch.full_like(sigma_BF, context_sigma), sigma_BF], 1)
        with self._seeing(self._masked_view(both, frames * 2, sight)):
            return self.velocity(both, levels, text_BLD)[:, :, len(frames) :]

    def _view(self, x_BCFHW: Tensor, text_BLD: Tensor, cache: Cache) -> View:
        cache = cache.make_room(x_BCFHW.shape[2])
        before, own = cache.positions(x_BCFHW.shape[2])
        size = self._tokens(x_BCFHW)
        q, k = self.transformer.rope.table(own, *size), self.transformer.rope.table(before + own, *size)
        words = cache.words if cache.words is not None and cache.words.text is text_BLD else None
        past: tuple[KV, ...] = tuple(piece.kv for piece in cache.pieces)
        return View(q, k, past, words=words)

    def _masked_view(self, x_BCFHW: Tensor, positions: list[int], sight: Sight) -> View:
        table = self.transformer.rope.table(positions, *self._tokens(x_BCFHW))
        return View(table, table, sight=sight)

    def _tokens(self, x_BCFHW: Tensor) -> tuple[int, int]:
        _, patch_h, patch_w = self.transformer.config.patch_size
        return x_BCFHW.shape[-2] // patch_h, x_BCFHW.shape[-1] // patch_w

    @contextmanager
    def _seeing(self, view: View) -> Iterator[None]:
        rope = self.transformer.rope
        rope.view = view
        try:
            yield
        finally:
            rope.view = None
