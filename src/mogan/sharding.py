"""Networks over the processes of a run: weights sharded with FSDP2, block by block; tokens of one sample; gradients averaged.

Everything is torch's and diffusers' own; in a :class:`mogan.distributed.World` of one process nothing here does anything.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.hooks.context_parallel import EquipartitionSharder
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mogan.distributed import World
from mogan.errors import UserError


def split_tokens(transformer: Any, world: World) -> None:
    """Let the processes of ``world.sequence`` share the tokens of a Wan transformer (Ulysses, arXiv 2309.14509).

    It still takes and returns whole latents; between, each process computes its part of the tokens, and self-attention
    trades them for a part of the heads. These are the steps of diffusers' ``enable_parallelism``, which is for GPUs only.
    The processes' gradients of the weights then add up to the gradient: see :func:`shard`.

    Raises:
        UserError: the processes do not divide the heads.
    """
    if world.sequence is None:
        return
    count, heads = world.sequence.size(), transformer.config.num_attention_heads
    if heads % count:
        raise UserError(f"--context-parallel {count} does not divide the {heads} attention heads of this model")
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=count))
    config.setup(world.rank, world.ranks, world.device, mesh=world.sequence)
    transformer._parallel_config = config
    for block in transformer.blocks:
        block.attn1.processor._parallel_config = config
    apply_context_parallel(transformer, config.context_parallel_config, transformer._cp_plan)
    # it warns at every pass that levels are one per sample and cannot be split, which is right
    logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)


def all_tokens(features_BLD: Tensor, transformer: Any) -> Tensor:
    """What a block of a transformer returns, ``(B, L, D)`` of all tokens: after :func:`split_tokens` each process has its part.

    Gradient of the whole comes back to each process's part, so the processes' gradients still add up.
    """
    config = getattr(transformer, "_parallel_config", None)
    if config is None:
        return features_BLD
    return EquipartitionSharder.unshard(features_BLD, 1, config.context_parallel_config._flattened_mesh)


def shard(
    network: nn.Module, blocks: nn.ModuleList, world: World, dtype: torch.dtype, partial: bool = False
) -> nn.Module:
    """Shard a network in place with FSDP2, each transformer block on its own, the rest as one more group.

    Weights, gradients and optimiser moments are kept in fp32, one part per process. A block is gathered just before it
    computes and freed just after; if ``dtype`` is bf16 it is gathered in bf16. Weights outside the blocks are gathered in
    fp32; what products are computed in is autocast's to say, there as inside. Gradients are averaged over the shares of the
    batch in fp32. Inputs are never cast: noise levels do not survive bf16.

    Args:
        network: the module that is called; its weights all have one dtype.
        blocks: its transformer blocks.
        world: over which processes.
        dtype: dtype the network computes in.
        partial: the processes of one share each have a part of the gradient (:func:`split_tokens`), not all of it.
    """
    if world.mesh is None:
        return network
    narrow = dtype if dtype != torch.float32 else None
    inside = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    outside = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=inside)
    fully_shard(network, mesh=world.mesh, mp_policy=outside, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo can only sum
            # where every process holds a whole copy, FSDP2 divides by a given factor twice, and by its own, the ranks, once
            if world.mesh.size(-1) > 1:
                module.set_gradient_divide_factor(world.shares if partial else world.ranks)
    return network


def average_gradients(network: nn.Module, world: World, partial: bool) -> None:
    """Average over the processes, in place, the gradients of weights that each of them holds whole, as adapters are.

    FSDP2 has done so with those it shards; the others are alike on all processes before and, added up in one order, after.

    Args:
        network: that learns; its backward pass is done.
        world: the processes.
        partial: as for :func:`shard`.
    """
    found = [p.grad for p in network.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
    if world.mesh is None or not found:
        return
    flat = torch.cat([gradient.flatten() for gradient in found])
    dist.all_reduce(flat)
    flat /= world.shares if partial else world.ranks
    for gradient, mean in zip(found, flat.split([g.numel() for g in found]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def tapped(network: nn.Module) -> nn.Module:
    """A sharded network that is left by its features, and gradient comes back through them.

    FSDP2 gathers what lies outside the blocks for the backward pass when gradient reaches the network's own output, which
    here it never does: so those weights stay gathered.
    """
    if isinstance(network, FSDPModule):
        network.set_reshard_after_forward(False, recurse=False)
    return network


def local(tensor: Tensor) -> Tensor:
    """Our part of a sharded tensor of any shape; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor of any shape, on every process; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
