"""The averaged student: what is sampled and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mogan.models.lora import learned_state, load_learned
from mogan.sharding import local


class Average:
    """Exponential moving average of what a network learns (its weights or its adapters), fp32.

    Args:
        network: whose.
        decay: of the average, per update.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = network, decay
        self.weights: dict[str, Tensor] = {k: v.detach().clone() for k, v in learned_state(network).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the live weights."""
        live = self.network.state_dict()
        average = [local(v) for v in self.weights.values()]
        torch._foreach_lerp_(average, [local(live[k]) for k in self.weights], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network with its averaged weights; the live ones come back afterwards."""
        live = {k: v.clone() for k, v in learned_state(self.network).items()}
        load_learned(self.network, self.weights)
        try:
            yield
        finally:
            load_learned(self.network, live)
