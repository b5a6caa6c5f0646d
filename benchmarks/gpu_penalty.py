"""The discriminator's R1 penalty and its gradient in a GPU's arithmetics against fp64, on random weights; for `make gpu`.

`benchmarks/penalty.py` asks the same of a trained discriminator of the lab on a CPU, where TF32 is imitated.
"""

import copy
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_inputs import Inputs
from gpu_measure import DEVICE, Report, forget
from gpu_networks import ARITHMETICS, discriminator_of
from penalty import penalty as r1

FRAMES = 3  # latent frames: fp64 attention keeps whole matrices, and multiplies at a fifteenth of bf16's rate


@contextmanager
def doubles_stay():
    """Within it ``.float()`` leaves fp64 alone: networks take some of their inner results to fp32."""
    narrow = torch.Tensor.float
    torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else narrow(t)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = narrow  # type: ignore[method-assign]


def penalty(report: Report, inputs: Inputs, seconds: float) -> None:
    """Value, relative error of the gradient and its cosine with fp64's, of each arithmetic."""
    network = discriminator_of(inputs)
    latent = inputs.cache(inputs.clip).latent("clip0")[None, :, :FRAMES].to(DEVICE)

    def exactly() -> tuple[float, torch.Tensor, float]:
        exact = copy.deepcopy(network).double()
        with doubles_stay():
            return r1(exact, exact, latent.double())

    value, truth, took = exactly()
    forget()
    report.add("fp64", value=value, seconds=took, frames=FRAMES)
    own: Any = lambda shown, sigma, dtype: network(shown, sigma)  # noqa: E731  its own precision throughout

    def one(name: str) -> None:
        torch.set_float32_matmul_precision("high" if name.endswith("TF32") else "highest")
        network.dtype = torch.bfloat16 if name == "bf16" else torch.float32
        found, gradient, took = r1(network, own if name == "bf16" else network, latent)
        error = ((gradient - truth).norm() / truth.norm()).item()
        cosine = F.cosine_similarity(gradient, truth, dim=0).item()
        report.add(name, value=found, ratio=found / value, error=error, cosine=cosine, seconds=took)

    for name in ARITHMETICS:
        report.attempt(name, partial(one, name))
    torch.set_float32_matmul_precision("highest")
