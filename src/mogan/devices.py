"""Where networks run."""

import re

import torch
from torch import Tensor

from mogan.errors import UserError


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    With ``auto`` and ``cuda`` each process of a machine takes the GPU of its number, or the only one it sees; what asks for a
    GPU without a number gets this one from then on. Products of fp32 numbers are then computed in fp32, whatever the environment says of TF32: what asks for fp32 here needs it.

    Raises:
        UserError: there is no such device.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if not found:
        raise UserError(f"--device takes auto, cpu, cuda or cuda:N, not {name}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if seen == 0:
        raise UserError(f"--device {name} is not to be had here: PyTorch finds no GPU; try cpu")
    number = int(found[1]) if found[1] else 0 if seen == 1 else local_rank
    if number >= seen:
        raise UserError(
            f"process {local_rank} of this machine asks for GPU {number} and finds {seen}: start one process per GPU, or "
            "--device cpu"
        )
    torch.set_float32_matmul_precision("highest")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def settled(x: Tensor) -> Tensor:
    """A tensor of any shape once a GPU has computed it, or received it: another stream may then read it."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return x


def sent(x: Tensor, device: str | torch.device) -> Tensor:
    """A tensor of any shape, made on the CPU, on a device. On a GPU the CPU goes on: from pinned memory a copy waits for nobody,
    while any other waits until all that was asked of the GPU is done.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
