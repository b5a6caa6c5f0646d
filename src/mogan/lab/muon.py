"""Muon: momentum with orthogonalised updates for matrices and convolutions (Keller Jordan et al., 2024).

``torch.optim.Muon`` takes matrices only, and the lab's autoencoder is made of convolutions, where Muon reaches in two
minutes what AdamW does not in ten. Used to train the lab's family from nothing, nowhere else.
"""

import torch
from torch import Tensor, nn

from mogan.models.wan import fast_dtype


def _orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each, approximately, by the quintic Newton-Schulz iteration; ``(N, R, C)``.

    In bf16 where that is fast: a processor that only emulates it takes several times longer than in fp32.
    """
    x = matrices.to(fast_dtype(matrices.device))
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Update every weight along its orthogonalised momentum, scaled to AdamW's usual root-mean-square of 0.2.

    Weights of one shape go through the iteration together: a few large products instead of many small ones.
    """

    def __init__(self, params, lr: float | Tensor, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in (p for p in group["params"] if p.grad is not None):
                shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
                gradients = [p.grad for p in same if p.grad is not None]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])).flatten(2)
                updates = _orthogonalise(updates) * (0.2 * max(updates.shape[1:]) ** 0.5 * group["lr"])
                torch._foreach_sub_(same, [u.view_as(p) for u, p in zip(updates, same, strict=True)])


def muon_and_adamw(model: nn.Module, lr: float, is_matrix=lambda name, p: p.ndim >= 2) -> list[torch.optim.Optimizer]:
    """Muon for hidden weights, AdamW for biases, gains and embeddings, both at ``lr``.

    On a GPU the rate is a tensor, which a recorded step reads each time it is replayed.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if is_matrix(n, p)]
    others = [p for n, p in named if not is_matrix(n, p)]
    device = named[0][1].device
    on_gpu = device.type == "cuda"

    def rate() -> float | Tensor:
        return torch.tensor(lr, device=device) if on_gpu else lr

    adamw = torch.optim.AdamW(others, lr=rate(), betas=(0.9, 0.99), weight_decay=0.0, capturable=on_gpu)
    return [Muon(matrices, rate()), adamw] if matrices else [adamw]


def set_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give every group of these optimisers a learning rate, in place where it is a tensor."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
