"""Out to what people run: a diffusers folder that stock ``WanPipeline`` samples in a few steps, or one LoRA file.

A student that is told where its steps end is a folder of stock ``AnyFlowPipeline``.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from mogan.config import EULER, LCM
from mogan.disk.files import new_folder, replacing, writable_folder, write_atomically
from mogan.errors import UserError
from mogan.exchange.card import metrics_table, model_card, model_name, run_notes
from mogan.exchange.layouts import original_module, split_leaf
from mogan.models import wan
from mogan.models.lora import decompose, factors, merge
from mogan.models.step_condition import is_told, to_stock
from mogan.ranges import at_least
from mogan.runs.checkpoint import load_part, student_checkpoint
from mogan.runs.generator import Generator, open_generator
from mogan.runs.identity import part_of_run
from mogan.schedule import levels_of, shifted_levels

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = 1e-4  # largest error of a level, in sigma
FOLDER_USAGE = ["from diffusers import WanPipeline\n", 'pipe = WanPipeline.from_pretrained("PATH")']
TOLD_INDEX = {"_class_name": "AnyFlowPipeline", "transformer": ["diffusers", "AnyFlowTransformer3DModel"]}
TOLD_USAGE = [line.replace("WanPipeline", "AnyFlowPipeline") for line in FOLDER_USAGE]


SCHEDULERS = {LCM: FlowMatchLCMScheduler, EULER: FlowMatchEulerDiscreteScheduler}  # of a student's steps


def scheduler_for(sigmas: tuple[float, ...], solver: str = LCM) -> FlowMatchEulerDiscreteScheduler:
    """A stock scheduler of the solver whose ``set_timesteps(len(sigmas))`` visits exactly these levels.

    ``WanPipeline`` takes no levels of its own, and the scheduler's default grid ends at sigma 0.024. Its two parameters,
    ``shift`` and ``shift_terminal``, reach every level list that is a Moebius function of the step: one or two levels,
    three (1, a, b) with ``1 - a`` at least 0.058 of ``1 - b``, and every shifted uniform grid. ``shift`` is found by
    bisection on the second level.

    Raises:
        UserError: the list cannot be reached; a stock pipeline would sample at other levels.
    """

    def build(shift: float) -> FlowMatchEulerDiscreteScheduler:
        terminal = sigmas[-1] if len(sigmas) > 1 else None
        return SCHEDULERS[solver](shift=shift, shift_terminal=terminal)

    def levels(shift: float) -> list[float]:
        scheduler = build(shift)
        scheduler.set_timesteps(len(sigmas))
        return scheduler.sigmas[:-1].tolist()

    low, high = 1e-4, 1 + 1000**0.5  # from there on the second level falls again: the scheduler shifts its end too
    if len(sigmas) > 2:
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if levels(middle)[1] < sigmas[1] else (low, middle)
    shift = (low * high) ** 0.5 if len(sigmas) > 2 else 1.0
    error = max(abs(a - b) for a, b in zip(levels(shift), sigmas, strict=True))
    if error > TOLERANCE:
        raise UserError(
            f"no stock scheduler visits the levels {list(sigmas)} (closest: {[round(x, 4) for x in levels(shift)]}); "
            "distil at a shifted uniform grid, or at three levels with no tiny first step, to export to diffusers"
        )
    return build(shift)


def flow_map_scheduler(sigmas: tuple[float, ...]) -> FlowMapEulerDiscreteScheduler:
    """The scheduler of ``AnyFlowPipeline`` that visits these levels, and with fewer steps every so-maniest of them.

    Raises:
        UserError: they are no shifted uniform grid, which is all that it has.
    """
    even = 1 - 1 / len(sigmas)  # the second level before the shift
    k = sigmas[1] * (1 - even) / (even * (1 - sigmas[1])) if len(sigmas) > 1 else 1.0
    if max(abs(a - b) for a, b in zip(shifted_levels(len(sigmas), k), sigmas, strict=True)) > TOLERANCE:
        raise UserError(f"AnyFlowPipeline samples at shifted uniform grids, and {list(sigmas)} is none: distil at one")
    return FlowMapEulerDiscreteScheduler(shift=round(k, 6))


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    to: Literal["diffusers", "lora"] = "diffusers",
    rank: int | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    results: Path | None = None,
    fake_score: bool = False,
) -> None:
    """Export a run's student (averaged weights) as a diffusers folder or as one LoRA file.

    Args:
        run: folder of a training run.
        out: where the export goes, a folder or (lora) a .safetensors file; must not exist yet.
        to: diffusers: a folder stock WanPipeline (AnyFlowPipeline, of a student that is told where its steps end) opens and
            samples with num_inference_steps and guidance_scale=1.
            lora: a file for pipe.load_lora_weights and for ComfyUI, with a card beside it.
        rank: of the LoRA file. A run with adapters is exported exactly if this is left out; the difference of any other
            student to the base model is approximated (rank 64 if left out), and the error printed.
        dtype: precision of the saved tensors.
        results: a results.json of mogan evaluate, whose metrics go into the card.
        fake_score: also save the run's fake score, which a later run that starts from this student then takes up.
    """
    at_least(1, rank=rank)
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a training run (no run.json)")
    if out.exists():
        raise UserError(f"{out} exists already: give another --out or remove it")
    if (to == "lora") != (out.suffix == ".safetensors"):
        raise UserError(
            f"--to {to} writes {'a file: end --out in' if to == 'lora' else 'a folder: --out is not a'} .safetensors"
        )
    if rank is not None and to != "lora":
        raise UserError("--rank is the rank of a LoRA file: give it with --to lora")
    writable_folder(out.parent)
    source, precision = open_generator(str(run)), DTYPES[dtype]
    assert source.sigmas is not None
    notes = run_notes(run) + metrics_table(results)
    if to == "lora":
        if source.told:
            raise UserError(
                f"{run} trained a student that is told where its steps end, which no LoRA of a stock Wan can be: leave out --to lora"
            )
        save_lora(run, source, out, rank, precision, notes)
        print(f"exported to {out}; use it with: pipe.load_lora_weights({str(out)!r})")
        return
    usage = TOLD_USAGE if source.told else FOLDER_USAGE
    notes = counts_notes(source) + notes
    card = model_card("Few-step Wan student", source.folder, source.sigmas, notes, usage, source.solver)
    fake = _fake_score(run, source) if fake_score else None
    how = source.solver, source.counts
    save_student(source.load(), source.folder, out, source.sigmas, precision, card, *how, fake_score=fake)
    print(f"exported to {out}; use it with: {usage[-1].removeprefix('pipe = ').replace('PATH', str(out))}")


def counts_notes(source: Generator) -> list[str]:
    """How a student of several numbers of steps is sampled in each."""
    if not source.counts or source.sigmas is None:
        return []
    offered = ", ".join(map(str, source.counts))
    if source.told:
        return [f"- `num_inference_steps` may be {offered}: it was trained for these, and is told which"]
    schedulers = {n: scheduler_for(levels_of(source.sigmas, n), source.solver) for n in source.counts}
    return [
        f"- in {n} steps: `pipe.scheduler = {type(s).__name__}(shift={s.config.shift}, "
        f"shift_terminal={s.config.shift_terminal})`, `num_inference_steps={n}`"
        for n, s in schedulers.items()
    ]


def _fake_score(run: Path, source: Generator) -> Any:
    weights = load_part(student_checkpoint(run), "fake_score.transformer")
    if not weights:
        raise UserError(f"{run} trained no fake score: leave --fake-score out")
    transformer = source.start()
    if source.lora is not None:
        merge(transformer, factors(weights))
    else:
        transformer.load_state_dict(weights)
    return transformer


def save_lora(run: Path, source: Generator, out: Path, rank: int | None, dtype: torch.dtype, notes: list[str]) -> None:
    """Write a student as one LoRA file that diffusers and ComfyUI both read, and its card beside it.

    Names are the original Wan code's under ``diffusion_model.``, which ComfyUI takes as they are and diffusers converts;
    there is no alpha, which both read as a scale of 1.
    """
    assert source.sigmas is not None
    if source.lora is not None and rank is None:
        base = source.folder
        tensors: dict[str, torch.Tensor] = {}
        for name, (a, b) in factors(source.average()).items():
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        print(f"the {len(tensors) // 2} adapters of rank {source.lora}, exactly")
    else:
        base = part_of_run(run, "model")
        tensors, summary = low_rank_difference(source.load(), wan.load_transformer(base), rank or 64)
        notes = [*notes, f"- {summary}"]
        print(summary)
    check_range(tensors, dtype)
    named = {}
    for name, tensor in tensors.items():
        module, leaf = split_leaf(name)
        named[f"diffusion_model.{original_module(module)}.{leaf}"] = tensor.to(dtype).contiguous()
    about = {"base": model_name(base), "sigmas": source.sigmas, "notes": notes}
    with replacing(out) as temporary:  # save_file lets nobody else read it
        temporary.write_bytes(save(named, {"format": "pt", "mogan": json.dumps(about)}))
    write_atomically(
        out.with_suffix(".md"),
        model_card(
            "Few-step Wan LoRA",
            base,
            source.sigmas,
            notes,
            lora_usage(base, source.sigmas, out.name, source.solver),
            source.solver,
        ),
    )


def lora_usage(base: Path, sigmas: tuple[float, ...], file: str, solver: str = LCM) -> list[str]:
    """Lines of Python that put a LoRA file and the levels it was trained for into a stock pipeline."""
    config, name = scheduler_for(sigmas, solver).config, SCHEDULERS[solver].__name__
    return [
        f"from diffusers import {name}, WanPipeline\n",
        f'pipe = WanPipeline.from_pretrained("{model_name(base)}")',
        f"pipe.scheduler = {name}(shift={config.shift}, shift_terminal={config.shift_terminal})",
        f'pipe.load_lora_weights("{file}")',
    ]


@torch.no_grad()
def low_rank_difference(student: Any, base: Any, rank: int) -> tuple[dict[str, torch.Tensor], str]:
    """The nearest LoRA of a rank to the difference of two transformers, and what it misses, in a sentence.

    Matrices are approximated, their biases kept whole (``diff_b``). Norms, modulation tables and the patch embedding
    have no place in a LoRA file that diffusers reads and are left out.
    """
    before = base.state_dict()
    differences = {k: v - before[k].to(v.device) for k, v in student.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    missed = whole = sum(float(d.double().square().sum()) for d in differences.values())
    layers = [n for n, m in student.named_modules() if isinstance(m, nn.Linear)]
    for name in tqdm(layers, desc=f"rank {rank}", unit="matrix"):
        difference, bias = differences[f"{name}.weight"], differences.get(f"{name}.bias")
        if not difference.any() and (bias is None or not bias.any()):
            continue
        a, b = decompose(difference, rank)
        left = float((difference - b @ a).double().square().sum())
        squared = float(difference.double().square().sum())
        errors[name] = (left / squared) ** 0.5 if squared else 0.0
        missed -= squared - left
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if bias is not None:
            tensors[f"{name}.diff_b"] = bias
            missed -= float(bias.double().square().sum())
    if not errors:
        raise UserError("the student does not differ from the base model in any matrix: train it first")
    worst = max(errors, key=errors.__getitem__)
    total = (max(missed, 0.0) / whole) ** 0.5 if whole else 0.0
    return tensors, (
        f"approximated at rank {rank}: relative error (Frobenius) of the change of a matrix {median(errors.values()):.2g} "
        f"in the median, {errors[worst]:.2g} at worst ({worst}); of the whole change, with what is left out, {total:.2g}"
    )


def save_student(
    transformer: Any,
    base: Path,
    out: Path,
    sigmas: tuple[float, ...],
    dtype: torch.dtype,
    card: str,
    solver: str = LCM,
    counts: tuple[int, ...] = (),
    fake_score: Any = None,
) -> None:
    """Write a student's folder under a temporary name, then rename it.

    Text encoder, tokenizer and autoencoder are the base model's own files, hard-linked where the disk allows it.
    """
    told = is_told(transformer)
    scheduler: Any = flow_map_scheduler(sigmas) if told else scheduler_for(sigmas, solver)
    for network in filter(None, (transformer, fake_score)):
        check_range(network.state_dict(), dtype)
    with new_folder(out) as temporary:
        for part in ("text_encoder", "tokenizer", "vae"):
            shutil.copytree(base / part, temporary / part, copy_function=_link_or_copy)
        for part, network in (("transformer", transformer), ("fake_score", fake_score)):
            if network is not None:
                network.register_to_config(_name_or_path="")  # else the folder tells where on this machine it came from
                nn.Module.to(network, dtype)  # what diffusers says of its own `to` is for inference
                (to_stock(network) if told else network).save_pretrained(temporary / part)
        scheduler.save_pretrained(temporary / "scheduler")
        index = json.loads((base / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        if told:
            others = ("_diffusers_version", "vae", "text_encoder", "tokenizer", "scheduler")
            index = {k: v for k, v in index.items() if k in others} | TOLD_INDEX
        write_atomically(temporary / "model_index.json", json.dumps(index, indent=2) + "\n")
        facts = replace(wan.defaults(base), sigmas=sigmas, solver=solver, counts=counts).facts()
        write_atomically(temporary / "mogan.json", json.dumps(facts, indent=2) + "\n")
        write_atomically(temporary / "README.md", card)


def check_range(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse a precision in which a weight would become infinite."""
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if tensor.numel() and (largest := float(tensor.abs().max())) > most:
            short = next(k for k, v in DTYPES.items() if v == dtype)
            raise UserError(f"{name} holds {largest:.3g}, and {short} ends at {most:.5g}: give --dtype bf16 or fp32")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
