"""Run code on tensors that have shapes and no contents; note what it computes, what it moves and what it keeps alive.

The code that is traced is the code that trains. Nothing is allocated: a 14 B network is traced on a laptop.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mogan.costs.machines import HOST_LINK, REACHED_BANDWIDTH, REACHED_COMPUTE, Machine

_ATEN = torch.ops.aten
# attention as a CPU computes it, which torch 2.11 does not count
_FORMULAS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
} | flop_registry
_UNTOUCHED = ("aten.empty", "aten.new_empty", "aten.detach", "prim.")  # allocate or look, and move nothing


@dataclass(frozen=True)
class Work:
    """Operations as ``{(flops, bytes moved, precision): how often}``. Adds, subtracts and scales."""

    operations: Counter = field(default_factory=Counter)

    def __add__(self, other: "Work") -> "Work":
        total = Counter(self.operations)
        for key, times in other.operations.items():
            total[key] += times
        return Work(total)

    def __mul__(self, times: float) -> "Work":
        return Work(Counter({key: n * times for key, n in self.operations.items()}))

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1

    @property
    def flops(self) -> float:
        """Floating-point operations (a multiply-add counts as two) of matrix products, convolutions and attention."""
        return sum(flops * n for (flops, _, _), n in self.operations.items())

    def seconds(self, machine: Machine) -> float:
        """Each operation takes what its slower limit says: arithmetic or memory traffic (a roofline per kernel). What goes to
        the host and back crosses :data:`HOST_LINK`.
        """
        peak = {"bf16": machine.bf16, "tf32": machine.tf32, "fp32": machine.fp32, "host": machine.fp32}
        memory = REACHED_BANDWIDTH * machine.bandwidth
        return sum(
            n * max(flops / (REACHED_COMPUTE * peak[kind]), moved / (HOST_LINK if kind == "host" else memory))
            for (flops, moved, kind), n in self.operations.items()
        )


@dataclass(frozen=True)
class Call:
    """A traced call, without the weights and their gradients.

    Attributes:
        work: what it computes.
        held: bytes alive after the forward pass for the backward pass to use.
        peak: most bytes alive at once.
        copies: bytes of weights that autocast keeps in lower precision while the call is alive (in neither of the above).
        host: bytes in the host's memory after the forward pass (see :mod:`mogan.models.host`), also in neither.
    """

    work: Work
    held: float
    peak: float
    copies: float = 0.0
    host: float = 0.0

    def times(self, count: float) -> "Call":
        """The call on so many inputs at once."""
        return Call(self.work * count, self.held * count, self.peak * count, self.copies, self.host * count)

    def apart(self, count: int) -> "Call":
        """The call on so many inputs one by one, and the backward pass of all."""
        return replace(self.times(count), peak=(count - 1) * self.held + self.peak)

    def freed(self) -> "Call":
        """The call, of whose tensors nothing stays."""
        return Call(self.work, 0.0, self.peak, self.copies, self.host)

    def along(self, longer: "Call", steps: float, shorter: "Call | None" = None) -> "Call":
        """What the call costs after ``steps`` more of the step that leads from it (or from ``shorter``) to ``longer``.

        Depth, window and clip length repeat equal pieces, so cost is a straight line in them.
        """
        start = shorter or self
        line = {
            k: getattr(self, k) + steps * (getattr(longer, k) - getattr(start, k))
            for k in ("held", "peak", "copies", "host")
        }
        return Call(self.work + (longer.work - start.work) * steps, **line)


class Tape(TorchDispatchMode):
    """Notes every operation: its work, and when each storage is born and freed."""

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__()
        self.work: Counter = Counter()
        self.events: list[tuple[int, int]] = []  # (storage number, bytes born or -bytes freed)
        self.numbers: dict[int, int] = {}  # id of a living storage -> its number
        self.copies: set[int] = set()
        self.on_host: set[int] = set()
        self.born = 0
        self.weights = {id(w.untyped_storage()) for w in weights}
        self.known = set(self.weights)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, then note it."""
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x for x in outputs if self._note_birth(x, func, inputs)]
        if (fresh or func._schema.is_mutable) and not str(func).startswith(_UNTOUCHED):
            self._note_work(func, args, kwargs or {}, out, inputs, fresh or outputs)
        return out

    def _note_birth(self, tensor: Tensor, func, inputs: list[Tensor]) -> bool:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.numbers or key in self.known:
            return False
        number, size = self.born, storage.nbytes()
        self.born += 1
        self.numbers[key] = number
        self.events.append((number, size))
        if str(func).startswith("aten._to_copy") and id(inputs[0].untyped_storage()) in self.weights:
            self.copies.add(number)
        if str(func).startswith("mogan.to_host"):
            self.on_host.add(number)
        weakref.finalize(storage, self._note_death, key, number, size)
        return True

    def _note_death(self, key: int, number: int, size: int) -> None:
        if self.numbers.get(key) == number:
            del self.numbers[key]
        self.events.append((number, -size))

    def _note_work(self, func, args, kwargs, out, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in [*inputs, *outputs])
        formula = _FORMULAS.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        kind = "bf16"
        if str(func).startswith("mogan."):
            kind, moved = "host", moved // 2  # read here and written there
        elif flops and inputs[0].dtype == torch.float32:  # PyTorch's defaults: TF32 in convolutions, not in products
            kind = "tf32" if "conv" in str(func) else "fp32"
        self.work[flops, moved, kind] += 1

    def alive(self, until: int | None = None, without: Iterable[int] = ()) -> tuple[float, float]:
        """Bytes alive now (or after ``until`` events), and the most there ever were, leaving some storages out."""
        skip, now, most = set(without), 0, 0
        for number, change in self.events[:until]:
            if number not in skip:
                now += change
                most = max(most, now)
        return now, most


def trace(weights: Iterable[Tensor], forward: Callable[[], Tensor], *, backward: bool) -> Call:
    """Trace ``forward()`` and, if asked, the backward pass from the sum of what it returns. Call within :func:`fake`.

    ``weights`` and what ``forward`` returns are tensors of any shape. Without ``backward`` the pass runs without gradient and
    ``held`` is what it returned.
    """
    weights = list(weights)
    tape = Tape(weights)
    with tape, torch.set_grad_enabled(backward):
        out = forward()
        middle = len(tape.events)
        if backward:
            out.sum().backward()
    gradients = {tape.numbers.get(id(w.grad.untyped_storage()), -1) for w in weights if w.grad is not None}
    for w in weights:
        w.grad = None
    apart = gradients | tape.copies | tape.on_host
    held, _ = tape.alive(middle, apart)
    _, peak = tape.alive(None, apart)
    _, everything = tape.alive(None, gradients | tape.on_host)
    host, _ = tape.alive(middle, set(range(tape.born)) - tape.on_host)
    return Call(Work(tape.work), held, peak, everything - peak, host)


def fake() -> Any:
    """Within this context tensors have shapes, dtypes and a device, and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)  # a small real network may take part


def sizes(network: nn.Module) -> tuple[int, int]:
    """Number of parameters, and of those that learn."""
    parameters = list(network.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
