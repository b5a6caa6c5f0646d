"""A Wan transformer that is told where its step ends, as diffusers' ``AnyFlowTransformer3DModel`` is (arXiv 2605.13724).

Beside the level ``t`` of its input such a network reads a second one, ``r``: the embedding of ``t`` becomes
``(1 - gate) E(t) + gate D(r)``. ``D`` starts as a copy of ``E``, so with ``r = t`` it is the model it was made of, to rounding.

On disk it is that stock class. In memory it stays a ``WanTransformer3DModel`` with another condition embedder, and its tensors
have the same names: attention, adapters, sharding, taps and compilation are Wan's, and a level stays one row per sample, where
the stock class spreads it over all tokens (1.2 GB a block at 480p).
"""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from mogan.errors import UserError

GATE = 0.25  # AnyFlow's gate_value, which its stock class has
CLASS = AnyFlowTransformer3DModel.__name__


class StepEmbedding(nn.Module):
    """Wan's condition embedder with a second level; takes the parts of ``stock`` over.

    It is called as Wan's, with the two levels one after the other: ``timestep (2 B)``, or ``(2 B L)`` with one per token.
    """

    def __init__(self, stock: Any, gate: float = GATE):
        super().__init__()
        self.timesteps_proj: Any = stock.timesteps_proj
        self.time_embedder: Any = stock.time_embedder
        self.delta_embedder: Any = copy.deepcopy(stock.time_embedder)
        self.act_fn: Any = stock.act_fn
        self.time_proj: Any = stock.time_proj
        self.text_embedder: Any = stock.text_embedder
        self.gate = gate

    def forward(
        self, timestep: Tensor, encoder_hidden_states: Tensor, image: None = None, timestep_seq_len: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Same contract as ``WanTimeTextImageEmbedding`` for text, ``(B, L, D)``."""
        waves = self.timesteps_proj(timestep)
        if timestep_seq_len is not None:
            waves = waves.unflatten(0, (-1, timestep_seq_len))
        at, to = waves.to(self.time_embedder.linear_1.weight.dtype).chunk(2)
        of_level, of_end = (
            e(x).type_as(encoder_hidden_states) for e, x in ((self.time_embedder, at), (self.delta_embedder, to))
        )
        told = (1 - self.gate) * of_level + self.gate * of_end
        return told, self.time_proj(self.act_fn(told)), self.text_embedder(encoder_hidden_states), None


def is_told(transformer: Any) -> bool:
    """Whether a transformer reads where its step ends."""
    return isinstance(getattr(transformer, "condition_embedder", None), StepEmbedding)


def tell_steps(transformer: Any) -> Any:
    """Let a Wan transformer read where its step ends, in place: whatever it is told, what it learnt is of ``r = t``."""
    if not is_told(transformer):
        transformer.condition_embedder = StepEmbedding(transformer.condition_embedder)
    return transformer


def from_stock(stock: AnyFlowTransformer3DModel, part: Path) -> WanTransformer3DModel:
    """The same network as we compute it, over the same tensors.

    Raises:
        UserError: it reads ``t - r`` instead of ``r``.
    """
    if stock.config["deltatime_type"] != "r":
        raise UserError(f"{part} is told the length of its step and not its end: it cannot be sampled or trained here")
    with torch.device("meta"):
        ours = WanTransformer3DModel(**arguments_of(WanTransformer3DModel, stock.config))
    ours.rope = type(ours.rope)(ours.rope.attention_head_dim, ours.rope.patch_size, ours.rope.max_seq_len)
    ours.condition_embedder = StepEmbedding(ours.condition_embedder, stock.config["gate_value"])
    ours.load_state_dict(stock.state_dict(), assign=True)
    return ours


def to_stock(transformer: Any) -> AnyFlowTransformer3DModel:
    """The stock class over the tensors of a transformer that is told."""
    own = arguments_of(AnyFlowTransformer3DModel, transformer.config)
    with torch.device("meta"):
        stock = AnyFlowTransformer3DModel(**own, gate_value=transformer.condition_embedder.gate)
    stock.load_state_dict(transformer.state_dict(), assign=True)
    return stock


def arguments_of(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config a class takes; the rest is the other's alone."""
    known = inspect.signature(kind).parameters
    return {k: v for k, v in config.items() if k in known}
