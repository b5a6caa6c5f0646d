"""One part of `make gpu`, in a process of its own: `python benchmarks/gpu_parts.py --part NAME --work W`; see benchmarks/gpu.py."""

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_inputs import FULL, NEIGHBOURS, OFFLOAD, SMALLER, Clip, Inputs, config_of, observe, recipe_key
from gpu_measure import CUDA, DEVICE, FAST, Report, Row, forget, in_a_line, measured, timed

from mogan.costs.machines import usable
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser
from mogan.models.wan import load_transformer, load_vae
from mogan.training.assemble import Assembly, assemble
from mogan.training.steps import Position, complete, draw, learn, read


def card(report: Report, inputs: Inputs, seconds: float) -> None:
    """Bytes per second of a copy, read and written, and operations per second of matrix products on random numbers."""
    driver = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if CUDA:
        report.add("driver", says=subprocess.run(driver, capture_output=True, text=True, check=False).stdout.strip())
    side, many = (8192, 1 << 31) if CUDA else (256, 1 << 20)
    source = torch.randn(many, device=DEVICE)
    target = torch.empty_like(source)
    found = measured(lambda: target.copy_(source), 1.0)
    report.add("copy", seconds=found["seconds"], bandwidth=2 * 4 * many / found["seconds"])
    del source, target
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        found = measured(partial(torch.mm, a, b), 1.0, most=30)
        report.add(f"matrix product, {name}", seconds=found["seconds"], flops=2 * side**3 / found["seconds"])


# ---------------------------------------------------------------------------------------------- whole updates


def recipe(
    name: str,
    sizes: tuple[Clip, ...],
    lora: int | None,
    report: Report,
    inputs: Inputs,
    seconds: float,
    compiled: bool = False,
) -> None:
    """Every update of a recipe, at the largest of the sizes that fits: once, and again while ``seconds`` last."""
    wanted: set[int] | None = None
    for clip in sizes if CUDA else (inputs.clip,):
        about = {"recipe": name, "clip": clip, "lora": lora, "compiled": compiled}
        said = predicted_peak(inputs, name, clip, lora)
        if CUDA and wanted is None and said > usable(torch.cuda.get_device_properties(0).total_memory):
            report.add("size", **about, note=f"the estimate says {said / 1e9:.0f} GB: not tried")
            continue
        too_large: set[int] = set()
        failed = report.attempt("start", partial(updates, report, inputs, about, seconds, wanted, too_large), **about)
        if failed is not None and not isinstance(failed, torch.cuda.OutOfMemoryError):
            raise SystemExit(in_a_line(failed))
        if failed is None and not too_large:
            return
        wanted = too_large or wanted  # smaller, what did not fit alone
    raise SystemExit("no size of clip fits")


def fitted(report: Report, inputs: Inputs, seconds: float) -> None:
    """MoGAN as `mogan train --fit 24` makes it, with no more memory than such a card leaves."""
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, usable(24e9) / torch.cuda.get_device_properties(0).total_memory)
        )
    recipe(f"mogan_wan_1_3b{OFFLOAD}", (FULL,), 64, report, inputs, seconds)


def predicted_peak(inputs: Inputs, name: str, clip: Clip, lora: int | None) -> float:
    """Bytes that the estimate, which is made beside the parts, gives a recipe; 0 where it is not there yet."""
    try:
        known = json.loads((inputs.work / "results" / "predicted.json").read_text())
    except (OSError, ValueError):
        return 0.0
    return known.get(recipe_key(name, clip, lora), {}).get("peak", 0.0)


def updates(
    report: Report, inputs: Inputs, about: Row, seconds: float, wanted: set[int] | None, too_large: set[int]
) -> None:
    """Assemble a recipe and run its updates, or the ``wanted`` ones; numbers of those that do not fit go to ``too_large``."""
    name, clip, lora = about["recipe"], about["clip"], about["lora"]
    config = config_of(name, inputs, clip, lora, about["compiled"])
    model = str(inputs.model)
    began = time.perf_counter()
    parts = assemble(
        config,
        inputs.data(config, clip),
        model=model,
        student=model if config.post_trains else None,
        run=None,
        device=DEVICE.type,
    )
    observe(parts, parts.config)
    prime(parts)
    held = float(torch.cuda.memory_allocated()) if CUDA else math.nan
    report.add("assembled", **about, loading=time.perf_counter() - began, held=held)
    began = time.perf_counter()
    spent: dict[int, float] = {}
    plan = [(index, update.label) for index, update in enumerate(config.plan) if wanted is None or index in wanted]

    def once(index: int, label: str, round_: int) -> None:
        found = one_update(parts, index, round_)
        spent[index] = found["seconds"]
        report.add(label, **about, **found, time=round_ + 1)

    for round_ in range(3):  # again from the end: what comes last has the most that is new
        for index, label in reversed(plan) if round_ else plan:
            if round_ and (index not in spent or time.perf_counter() - began + spent[index] > seconds):
                continue
            failed = report.attempt(label, partial(once, index, label, round_), **about)
            if failed is not None:
                for optimizer in parts.optimizers.values():
                    optimizer.zero_grad(set_to_none=True)
                spent.pop(index, None)
            if isinstance(failed, torch.cuda.OutOfMemoryError):
                too_large.add(index)


def prime(parts: Assembly) -> None:
    """Give every optimiser its moments, as it has them after its first step, so that the first update counts."""
    for optimizer in parts.optimizers.values():
        learnable = [p for group in optimizer.param_groups for p in group["params"]]
        for p in learnable:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def one_update(parts: Assembly, index: int, round_: int) -> Row:
    """One update on a rollout as long as the mean one; raises if loss or gradient is no number."""
    update = parts.config.plan[index]
    where = Position(0, mean_iteration(parts, index, 100 * round_), index, 0)
    batch = complete(parts, update, draw(parts, where))
    learnt: list[Any] = []
    found = timed(lambda: learnt.append(learn(parts, where, batch)))
    (record,) = read(parts, [(where, learnt[0].numbers)])
    return found | {"loss": record["loss"], "clips": len(batch.ids)}


def mean_iteration(parts: Assembly, index: int, first: int) -> int:
    """An iteration, from ``first`` on, whose rollout has about as many steps as a mean one."""
    update = parts.config.plan[index]
    if not parts.config.lesson(update).rollout:
        return first
    kind, sigmas = parts.rollout(update), parts.config.sigmas
    stages = kind.stages(sigmas) if hasattr(kind, "stages") else None

    def off(iteration: int) -> float:
        drawn = kind.draw(sigmas, Position(0, iteration, index, 0).generator(0))
        return abs((stages[drawn][1] if stages else drawn) - kind.steps(sigmas))

    return min(range(first, first + 50), key=off)


# ---------------------------------------------------------------------------------------------- sampling


def sample(report: Report, inputs: Inputs, seconds: float) -> None:
    """A student's three steps and a teacher's guided ones, of which a few are taken, and a clip decoded as it is shown."""
    from mogan.recipes import find_recipe
    from mogan.sampling.samplers import clips_of, sample_student, sample_teacher

    cache = inputs.cache(inputs.clip)
    text, null = (stack_text([cache.text(t)], DEVICE) for t in (cache.entries[0]["caption"], ""))
    shape = tuple(cache.latent("clip0").shape)
    sigmas = find_recipe("dmd2_wan_1_3b").sigmas
    network = Denoiser(load_transformer(inputs.model).eval().requires_grad_(False).to(DEVICE), FAST)
    few = measured(lambda: sample_student(network, text, shape, sigmas, [0]), 8.0, most=2)
    report.add(f"{len(sigmas)} steps", **few, steps=len(sigmas), of=len(sigmas))
    steps = 5 if CUDA else 2

    def guided() -> None:
        sample_teacher(network, text, null, shape, [0], steps=steps, guidance=5.0, shift=3.0)

    many = measured(guided, 0.0, warm=lambda: None)
    report.add("50 guided steps", **many | {"seconds": many["seconds"] * 50 / steps}, steps=steps, of=50)
    del network
    forget()
    vae = load_vae(inputs.model, FAST).to(DEVICE)
    latent = torch.randn(1, *shape, device=DEVICE)

    def decode(z: torch.Tensor) -> None:
        for frames in clips_of(vae, z):
            for _ in frames:
                pass

    report.add(
        "decode, frame by frame", **measured(lambda: decode(latent), 6.0, 3, warm=lambda: decode(latent[:, :, :3]))
    )


# ---------------------------------------------------------------------------------------------- compiled


def compile_(report: Report, inputs: Inputs, seconds: float) -> None:
    """The transformer, and an update of DMD, eager and compiled."""
    from gpu_networks import transformer_calls

    from mogan.models.denoiser import compile_blocks

    network = load_transformer(inputs.model).to(DEVICE).train()
    network.enable_gradient_checkpointing()
    forward, train = transformer_calls(network, inputs)
    report.add("forward, eager", **measured(forward, 2.0))
    report.add("forward and backward, eager", **measured(train, 4.0))
    compile_blocks([network], DEVICE)

    def compiled(name: str, call: Callable[[], None]) -> None:
        first = timed(call)
        found = measured(call, 4.0, warm=lambda: None)
        report.add(name, **found, compiling=first["seconds"] - found["seconds"])

    for name, call in (("forward, compiled", forward), ("forward and backward, compiled", train)):
        report.attempt(name, partial(compiled, name, call))
    del network, forward, train, call
    forget()
    recipe("dmd2_wan_1_3b", (FULL,), None, report, inputs, seconds / 2, compiled=True)


# ---------------------------------------------------------------------------------------------- which there are


def measures() -> dict[str, Callable[[Report, Inputs, float], None]]:
    """What every part does."""
    from gpu_networks import networks

    def penalty(report: Report, inputs: Inputs, seconds: float) -> None:
        from gpu_penalty import penalty as measure

        measure(report, inputs, seconds)

    parts: dict[str, Callable[[Report, Inputs, float], None]] = {
        "card": card,
        "dmd": partial(recipe, "dmd2_wan_1_3b", (FULL, *SMALLER), None),
        "mogan_lora": partial(recipe, "mogan_wan_1_3b", (FULL, *SMALLER), 64),
        "mogan": partial(recipe, "mogan_wan_1_3b", SMALLER, None),
        "mogan_fit": fitted,
        "networks": networks,
        "penalty": penalty,
        "sample": sample,
        "compile": compile_,
    }
    return parts | {name: partial(recipe, f"{name}_wan_1_3b", (FULL, *SMALLER), None) for name in NEIGHBOURS}


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", required=True)
    parser.add_argument("--narrow", action="store_true", help="a dry run")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="repeat no longer than this")
    arguments = parser.parse_args()
    inputs = Inputs(arguments.work, arguments.narrow)
    if arguments.part == "inputs":
        inputs.make()
        inputs.cache(inputs.clip)
        return
    report = Report(arguments.work / "results" / f"{arguments.part}.json", arguments.part)
    measures()[arguments.part](report, inputs, arguments.seconds)
    report.facts["done"] = True
    report.write()


if __name__ == "__main__":
    main()
