"""Rotary position embedding as stock diffusers computes it beside ours: forward and backward, milliseconds of a processor.

python benchmarks/rotary.py
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from mogan.models.attention import rotate

SHAPES = ((8, 80, 4, 32), (1, 2304, 12, 128))


def stock(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What diffusers' ``WanAttnProcessor`` does."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out


def milliseconds(function: Callable, x: Tensor, table: tuple[Tensor, Tensor], rounds: int = 12) -> float:
    """The least of some passes forward and back."""
    found = []
    for _ in range(rounds):
        x.grad, began = None, time.process_time()
        function(x, *table).float().sum().backward()
        found.append(time.process_time() - began)
    return 1e3 * min(found)


def main() -> None:
    """Print a row per shape and precision."""
    torch.set_num_threads(1)
    print("| shape | stock, ms | complex, ms |\n|---|---|---|")
    for shape in SHAPES:
        angle = torch.rand(1, shape[1], 1, shape[3] // 2).repeat_interleave(2, -1)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype).requires_grad_()
            one, other = (milliseconds(f, x, (angle.cos(), angle.sin())) for f in (stock, rotate))
            print(f"| {shape}, {str(dtype).removeprefix('torch.')} | {one:.2f} | {other:.2f} |")


if __name__ == "__main__":
    main()
