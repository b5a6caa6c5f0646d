"""A student as one LoRA file that diffusers and ComfyUI read."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from mogan.disk.files import replacing, write_atomically
from mogan.errors import UserError
from mogan.exchange.card import model_card, model_name
from mogan.exchange.layouts import original_module, split_leaf
from mogan.exchange.schedulers import SCHEDULERS, scheduler_for
from mogan.models import wan
from mogan.models.experts import LOW, boundary_of, low_noise, stock_boundary
from mogan.models.lora import decompose, factors
from mogan.runs.generator import Generator
from mogan.runs.identity import part_of_run

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def files_of_lora(out: Path, source: Generator) -> list[Path]:
    """What :func:`save_lora` writes beside its card: a file, or one for each of two experts."""
    return [out] if source.boundary is None else [out.with_stem(f"{out.stem}-{level}") for level in ("high", "low")]


def save_lora(
    run: Path, source: Generator, out: Path, rank: int | None, dtype: torch.dtype, notes: list[str]
) -> list[Path]:
    """Write a student as one LoRA file that diffusers and ComfyUI both read, and its card beside it; two experts as two. Returns the files.

    Names are the original Wan code's under ``diffusion_model.``, which ComfyUI takes as they are and diffusers converts;
    there is no alpha, which both read as a scale of 1. Without ``source.sigmas`` it is of a model of many guided steps.
    """
    exactly = source.lora is not None and rank is None
    base = source.folder if exactly else part_of_run(run, "model")
    student = None if exactly else source.load()
    files = files_of_lora(out, source)
    for number, file in enumerate(files):
        if student is None:
            prefix = "" if source.boundary is None else ("transformer.", f"{LOW}.")[number]
            own = {k.removeprefix(prefix): v for k, v in source.average().items() if k.startswith(prefix)}
            tensors: dict[str, torch.Tensor] = {}
            for name, (a, b) in factors(own).items():
                tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            print(f"the {len(tensors) // 2} adapters of rank {source.lora}, exactly")
        else:
            part = ("transformer", low_noise(base))[number]
            tensors, summary = low_rank_difference(
                student.experts[number], wan.load_transformer(base, part), rank or 64
            )
            notes = [*notes, f"- {summary}"]
            print(summary)
        levels = {"sigmas": source.sigmas} if source.sigmas else {}
        _write_lora(file, tensors, dtype, {"base": model_name(base), **levels, "notes": notes})
    lines = lora_usage(base, source, [file.name for file in files])
    title = "Few-step Wan LoRA" if source.sigmas else "Fine-tuned Wan LoRA"
    write_atomically(out.with_suffix(".md"), model_card(title, base, source.sigmas, notes, lines, source.solver))
    return files


def _write_lora(out: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, about: dict[str, Any]) -> None:
    check_range(tensors, dtype)
    named = {}
    for name, tensor in tensors.items():
        module, leaf = split_leaf(name)
        named[f"diffusion_model.{original_module(module)}.{leaf}"] = tensor.to(dtype).contiguous()
    with replacing(out) as temporary:  # save_file lets nobody else read it
        temporary.write_bytes(save(named, {"format": "pt", "mogan": json.dumps(about)}))


def lora_usage(base: Path, source: Generator, files: list[str]) -> list[str]:
    """Lines of Python that put LoRA files, and the levels a few-step student was trained for, into a stock pipeline."""
    name, several = model_name(base), ", WanTransformer3DModel" if len(files) > 1 else ""
    own = name if "/" in name else f"PATH/{name}"
    from_picture = source.animates or source.continues
    more = ", expand_timesteps=True" if from_picture else ""  # the first frame is given at level 0
    pipeline = "WanImageToVideoPipeline" if from_picture or wan.is_image_to_video(base) else "WanPipeline"
    scheduler = [SCHEDULERS[source.solver].__name__] if source.sigmas else []
    lines = [f"from diffusers import {', '.join([*scheduler, pipeline])}{several}\n"]
    boundary = "" if source.boundary is None else f"boundary_ratio={stock_boundary(source.boundary, source.sigmas)}"
    if len(files) > 1 and boundary_of(base) is None:
        lines.append(f'low = WanTransformer3DModel.from_pretrained("{own}", subfolder="transformer")')
        more += f", transformer_2=low, {boundary}"
    elif len(files) > 1:
        more += f", {boundary}"
    lines.append(f'pipe = {pipeline}.from_pretrained("{own}"{more})')
    if source.sigmas:
        told = scheduler_for(source.sigmas, source.solver).config
        lines.append(f"pipe.scheduler = {scheduler[0]}(shift={told.shift}, shift_terminal={told.shift_terminal})")
    lines.append(f'pipe.load_lora_weights("{files[0]}")')
    return lines + [f'pipe.load_lora_weights("{file}", load_into_transformer_2=True)' for file in files[1:]]


@torch.no_grad()
def low_rank_difference(student: Any, base: Any, rank: int) -> tuple[dict[str, torch.Tensor], str]:
    """The nearest LoRA of a rank to the difference of two transformers, and what it misses, in a sentence.

    Matrices are approximated, their biases kept whole (``diff_b``). Norms, modulation tables and the patch embedding
    have no place in a LoRA file that diffusers reads and are left out.

    Raises:
        UserError: no matrix differs.
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


def check_range(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse a precision in which a weight would become infinite."""
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if tensor.numel() and (largest := float(tensor.abs().max())) > most:
            short = next(k for k, v in DTYPES.items() if v == dtype)
            raise UserError(f"{name} holds {largest:.3g}, and {short} ends at {most:.5g}: give --dtype bf16 or fp32")
