"""Low-rank adapters (LoRA, arXiv 2106.09685): ``W x + B A x`` with ``W`` frozen; nothing is scaled, so alpha = rank.

Networks that start from the same weights hold the same tensors: each is a module tree of its own over one set of
frozen parameters, with adapters of its own. No adapter is ever switched on or off, so a recomputed activation cannot
meet the wrong one, and the tree without adapters is the teacher, bit for bit.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogan.errors import UserError
from mogan.models.step_condition import tell_steps

TARGETS = [  # every matrix of every block; of a transformer that is told where its step ends, what tells it
    *("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    *("delta_embedder.linear_1", "delta_embedder.linear_2"),
]

ROWS = "text_embedder.states"  # of states that a transformer is told: no matrix, so they learn beside the adapters

Factors = dict[str, tuple[Tensor, Tensor]]  # module name -> A (rank, in), B (out, rank)


class _Held(nn.Linear):
    """A linear layer whose weights are held in a lower precision than it may be asked to compute in."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def hold_in(transformer: Any, dtype: torch.dtype) -> Any:
    """Freeze a transformer and keep the matrices of its blocks in the dtype they are multiplied in.

    Autocast would round them to ``dtype`` at every call; rounded once they give the same bits from half the memory. Without
    autocast they are multiplied in the precision of their input.
    """
    for module in transformer.blocks.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
            module.__class__ = _Held
    return transformer.eval().requires_grad_(False)


def twin(base: Any) -> Any:
    """Another module tree over the same tensors."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def check_rank(rank: int, transformer: Mapping[str, Any]) -> None:
    """Refuse a rank above the width of a transformer, by its config. Raises UserError."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    if rank > width:
        raise UserError(
            f"adapters of rank {rank} are larger than what they adapt, matrices of {width} rows: give --lora {width} or less"
        )


def adapted(base: Any, rank: int, seed: int, told: bool = False) -> Any:
    """A second module tree over the frozen parameters of ``base``, with trainable fp32 adapters that start at nothing.

    Args:
        base: frozen transformer; stays as it is.
        rank: of every adapter.
        seed: of ``A``; ``B`` starts at zero.
        told: the tree reads where its step ends, whether ``base`` does or not.

    Raises:
        UserError: the rank is larger than the transformer is wide.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    check_rank(rank, base.config)
    tree = tell_steps(twin(base)) if told else twin(base)
    torch.manual_seed(seed)
    tree.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    for module in tree.modules():
        if isinstance(module, LoraLayer):  # peft would take every input to fp32, for autocast to take it back
            module.cast_input_dtype_enabled = False
    for parameter in tree.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return tree


def learned_state(network: nn.Module) -> dict[str, Tensor]:
    """The part of a state dict that training changes: all of it, but of a transformer with adapters these and rows of states alone."""
    adapted = tuple(
        f"{name}." if name else "" for name, module in network.named_modules() if hasattr(module, "peft_config")
    )
    return {
        k: v
        for k, v in network.state_dict().items()
        if ".lora_" in k or k.endswith(ROWS) or not adapted or not k.startswith(adapted)
    }


def load_learned(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`learned_state` gave.

    Raises:
        UserError: a tensor does not fit.
    """
    own = learned_state(network)
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise UserError(
            f"a checkpoint's {min(wrong)} does not fit this network: give the model and --lora it was made with"
        )
    network.load_state_dict(state, strict=False)


def factors(state: Mapping[str, Tensor]) -> Factors:
    """Adapters of a state dict by module: ``{"blocks.0.attn1.to_q": (A, B)}``; empty if it has none."""
    names = [m[1] for k in state if (m := re.fullmatch(r"(.+)\.lora_A\.default\.weight", k))]
    return {n: (state[f"{n}.lora_A.default.weight"], state[f"{n}.lora_B.default.weight"]) for n in names}


def merge_learned(transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a transformer without adapters what one with them learned (:func:`learned_state`), in place."""
    merge(transformer, factors(state))
    transformer.load_state_dict({k: v for k, v in state.items() if k.endswith(ROWS)}, strict=False)


@torch.no_grad()
def merge(transformer: nn.Module, adapters: Factors) -> None:
    """Add ``B A`` to the weights of the named modules, in place."""
    for name, (a, b) in adapters.items():
        weight = transformer.get_parameter(f"{name}.weight")
        weight.add_(b.to(weight.device).float() @ a.to(weight.device).float())


def decompose(difference_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A (rank, in)`` and ``B (out, rank)``, fp32, whose product is the nearest of that rank (Eckart-Young).

    The leading singular vectors of the shorter side are eigenvectors of a Gram matrix, and projecting on them is exact
    whatever their own error; for the wide matrices of a feed-forward layer this is far faster than an SVD. ``A`` and ``B``
    are of equal norm.
    """
    if difference_OI.shape[0] > difference_OI.shape[1]:
        b, a = decompose(difference_OI.T, rank)
        return a.T, b.T
    whole = difference_OI.double()
    left = torch.linalg.eigh(whole @ whole.T).eigenvectors.flip(1)[:, :rank]
    right = left.T @ whole
    size = right.norm(dim=1)  # the singular values
    root = size.clamp(min=1e-12 * float(size.max()) or 1.0).sqrt()
    return (right / root[:, None]).float(), (left * root).float()
