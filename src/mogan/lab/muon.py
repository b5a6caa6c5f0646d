"""Muon: momentum with orthogonalised updates for matrices and convolutions (Keller Jordan et al., 2024).

``torch.optim.Muon`` takes matrices only, and the lab's autoencoder is made of convolutions, where Muon reaches in two
minutes what AdamW does not in ten. Used to train the lab's family from nothing, nowhere else.
"""

import torch
from torch import Tensor, nn

from mogan.models.wan import fast_dtype


def _orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately, by the quintic Newton-Schulz iteration.

    In bf16 where that is fast: a processor that only emulates it takes several times longer than in fp32.
    """
    x = matrix.to(fast_dtype())
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Update every weight along its orthogonalised momentum, scaled to AdamW's usual root-mean-square of 0.2."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = _orthogonalise(update) * (0.2 * max(update.shape) ** 0.5)
                p.add_(update.view_as(p), alpha=-group["lr"])


def muon_and_adamw(model: nn.Module, lr: float, is_matrix=lambda name, p: p.ndim >= 2) -> list[torch.optim.Optimizer]:
    """Muon for hidden weights, AdamW for biases, gains and embeddings, both at ``lr``."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if is_matrix(n, p)]
    others = [p for n, p in named if not is_matrix(n, p)]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    return [Muon(matrices, lr), adamw] if matrices else [adamw]
