"""A stage of training the lab's family: a loop that saves itself every minute and goes on where it stopped.

On a GPU a step of networks this small is thousands of kernels of a few microseconds each, and the host cannot start them
that fast. Where every step computes the same, it is recorded once as a CUDA graph and replayed.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mogan.disk.files import replacing
from mogan.lab.muon import muon_and_adamw, set_rate
from mogan.models.wan import fast_dtype

State = dict[str, Tensor]
Optimizers = list[torch.optim.Optimizer]


def run_stage(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, float], Tensor],
    work: Path,
    *,
    steps: int,
    lr: float,
    is_matrix: Callable[[str, nn.Parameter], bool] = lambda name, p: p.ndim >= 2,
    ema_decay: float = 0.995,
    same_each_step: bool = False,
) -> nn.Module:
    """Minimise the scalar ``loss_of(step, share_done)`` with Muon, warm-up and a cosine; save every minute, resume by itself.

    Runs where the model is. ``same_each_step``: the loss looks at neither step nor share and makes tensors of the same
    shapes each time, all on the model's device, so that on a GPU it may be recorded and replayed.

    Returns the model holding its averaged weights.
    """
    device = next(model.parameters()).device
    optimizers = muon_and_adamw(model, lr, is_matrix)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    path, saved = work / f"{name}.pt", time.monotonic()
    start = _restore(path, model, average, optimizers)

    def update(step: int) -> Tensor:
        loss = loss_of(step, step / steps)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    advance = _recorded(update, start) if same_each_step and device.type == "cuda" else update
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"lab {name}", mininterval=5)
    for step in bar:
        torch.manual_seed(step)
        set_rate(
            optimizers, lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        loss = advance(step)
        _follow(average, model, min(ema_decay, (1 + step) / (10 + step)))
        if step % 20 == 0:
            if not torch.isfinite(loss):
                raise RuntimeError(f"lab {name}: loss is {loss.item()} at step {step}; the last good state is {path}")
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if time.monotonic() - saved > 60:
                _save(path, model, average, optimizers, step + 1)
                saved = time.monotonic()
    if start < steps:
        _save(path, model, average, optimizers, steps)
    model.load_state_dict(average)
    return model


def _recorded(update: Callable[[int], Tensor], start: int, eager: int = 5) -> Callable[[int], Tensor]:
    """``update`` as a CUDA graph, after a few steps by hand that make the optimisers' state and choose the kernels.

    Each replay draws from the generator as it stands, so a step draws what it would by hand.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    recorded: list[Tensor] = []

    def advance(step: int) -> Tensor:
        if step - start < eager:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = update(step)
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if not recorded:
            with torch.cuda.graph(graph):
                recorded.append(update(step))
        graph.replay()
        return recorded[0]

    return advance


def _restore(path: Path, model: nn.Module, average: State, optimizers: Optimizers) -> int:
    """Take up what :func:`_save` wrote, if anything; returns how many steps were done."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True, map_location=next(model.parameters()).device)
    model.load_state_dict(state["model"])
    average.update(state["average"])
    for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict({"state": old["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"]


def _save(path: Path, model: nn.Module, average: State, optimizers: Optimizers, step: int) -> None:
    states = [o.state_dict() for o in optimizers]
    with replacing(path) as new:
        torch.save({"model": model.state_dict(), "average": average, "optimizers": states, "step": step}, new)


@torch.no_grad()
def _follow(average: State, model: nn.Module, decay: float) -> None:
    now = model.state_dict()
    moving = [key for key, value in now.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in moving], [now[key] for key in moving], 1 - decay)
    for key in now.keys() - set(moving):
        average[key].copy_(now[key])


def fast_products(device: torch.device) -> torch.autocast:
    """bf16 products where the processor has them; where it emulates them they are ten times slower than fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)
