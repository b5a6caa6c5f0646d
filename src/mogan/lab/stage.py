"""A stage of training the lab's family: a loop that saves itself every minute and goes on where it stopped."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mogan.disk.files import replacing
from mogan.lab.muon import muon_and_adamw
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
) -> nn.Module:
    """Minimise ``loss_of(step, share_done)`` with Muon, warm-up and a cosine; save every minute, resume by itself.

    Returns the model holding its averaged weights.
    """
    optimizers = muon_and_adamw(model, lr, is_matrix)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    path, saved = work / f"{name}.pt", time.monotonic()
    start = _restore(path, model, average, optimizers)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"lab {name}", mininterval=5)
    for step in bar:
        torch.manual_seed(step)
        share = step / steps
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        loss = loss_of(step, share)
        if not torch.isfinite(loss):
            raise RuntimeError(f"lab {name}: loss is {loss.item()} at step {step}; the last good state is {path}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        _follow(average, model, min(ema_decay, (1 + step) / (10 + step)))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if time.monotonic() - saved > 60:
            _save(path, model, average, optimizers, step + 1)
            saved = time.monotonic()
    if start < steps:
        _save(path, model, average, optimizers, steps)
    model.load_state_dict(average)
    return model


def _restore(path: Path, model: nn.Module, average: State, optimizers: Optimizers) -> int:
    """Take up what :func:`_save` wrote, if anything; returns how many steps were done."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.update(state["average"])
    for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(old)
    return state["step"]


def _save(path: Path, model: nn.Module, average: State, optimizers: Optimizers, step: int) -> None:
    states = [o.state_dict() for o in optimizers]
    with replacing(path) as new:
        torch.save({"model": model.state_dict(), "average": average, "optimizers": states, "step": step}, new)


@torch.no_grad()
def _follow(average: State, model: nn.Module, decay: float) -> None:
    for key, value in model.state_dict().items():
        average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)


def fast_products() -> torch.autocast:
    """bf16 products where the processor has them; where it emulates them they are ten times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)
