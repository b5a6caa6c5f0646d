"""R1 at sigma 0.01 and its gradient in several arithmetics, against fp64, on a run's discriminator and its real clips.

python benchmarks/penalty.py --data CACHE --run RUN            # a run of mogan_lab with a checkpoint
"""

import argparse
import copy
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mogan.data.cache import open_cache
from mogan.models import attention
from mogan.models.discriminator import Discriminator
from mogan.objectives.gan import GAN
from mogan.recipes import find_recipe
from mogan.recipes.mogan import gan_of
from mogan.training.assemble import assemble

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class TF32(TorchDispatchMode):
    """What goes into products is rounded to TF32's ten bits, as a GPU's tensor cores do, forward and backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Round, then compute."""
        if func._schema.name.removeprefix("aten::") in PRODUCTS:
            args = tree_map_only(Tensor, _ten_bits, args)
        return func(*args, **(kwargs or {}))


def _ten_bits(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view(x.shape)


def penalty(weights: Discriminator, network: Any, real: Tensor, sigma: float = 0.01) -> tuple[float, Tensor, float]:
    """R1, its gradient with respect to ``weights`` as one fp64 vector, seconds; ``network`` is how they are called."""
    lab = gan_of(find_recipe("mogan_lab"))  # the logistic loss weighs nothing
    gan = GAN(network, None, replace(lab, judge_weight=0.0, r1=1.0, r2=0.0, noise=sigma))
    weights.zero_grad(set_to_none=False)
    began = time.perf_counter()
    loss, _ = gan.tell_apart(real, real, torch.Generator().manual_seed(3))
    loss.backward()
    took = time.perf_counter() - began
    zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights.parameters()]
    return loss.item(), torch.cat([g.flatten().double() for g in zero]), took


def main() -> None:
    """Print a line per arithmetic."""
    from mogan.training.loop import resume  # which reads videos; `make gpu` has no use for that

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = json.loads((options.run / "config.json").read_text())["recipe"]
    config = replace(find_recipe(recipe), precision="fp32")
    parts = assemble(config, open_cache(options.data), model="lab", run=options.run, device="cpu")
    print(f"{recipe}, {resume(parts, options.run)} iterations, R1 of {options.clips} real clips at sigma 0.01")
    network = parts.networks["discriminator"]
    assert isinstance(network, Discriminator)
    assert parts.observations is not None
    ids = [entry["id"] for entry in parts.cache.entries[: options.clips]]
    real = torch.stack([parts.observations.get(i, 0) for i in ids]).float()

    narrow, exact = torch.Tensor.float, copy.deepcopy(network).double()
    torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else narrow(t)  # type: ignore[method-assign]
    value, gradient, _ = penalty(exact, exact, real.double())
    limit = penalty(exact, exact, real.double(), 1e-4)
    torch.Tensor.float = narrow  # type: ignore[method-assign]

    rounded = copy.deepcopy(network)
    rounded.dtype = torch.bfloat16
    as_on_a_gpu = copy.deepcopy(rounded)
    attention.set_attention(as_on_a_gpu.transformer, fp32_on_cpu=False)
    own = lambda net: lambda shown, sigma, dtype: net(shown, sigma)  # noqa: E731  its own precision throughout
    rows = [
        ("as trained (fp32)", rounded, rounded, nullcontext()),
        ("TF32 products", network, network, TF32()),
        ("bf16, attention fp32", rounded, own(rounded), nullcontext()),
        ("bf16", as_on_a_gpu, own(as_on_a_gpu), nullcontext()),
    ]
    print(f"{'':24s}{'penalty':>10s}{'to fp64':>9s}{'cosine':>9s}{'norm':>7s}{'seconds':>9s}")

    def show(name: str, found: float, its_gradient: Tensor, took: float) -> None:
        cosine = F.cosine_similarity(its_gradient, gradient, dim=0).item()
        norm = (its_gradient.norm() / gradient.norm()).item()
        print(f"{name:24s}{found:10.5f}{found / value:9.3f}{cosine:9.4f}{norm:7.3f}{took:9.2f}")

    show("fp64, sigma 0.0001", *limit)
    for name, weights, called, arithmetic in rows:
        with arithmetic, sdpa_kernel(SDPBackend.MATH) if name.startswith("TF32") else nullcontext():
            show(name, *penalty(weights, called, real))


if __name__ == "__main__":
    main()
