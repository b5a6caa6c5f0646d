"""Out to what people run: a diffusers folder that stock ``WanPipeline`` samples in a few steps, or one LoRA file.

A student that is told where its steps end is a folder of stock ``AnyFlowPipeline``. A causal one is a folder that no stock
pipeline opens, since none samples it as it was trained: its clips would look plausible and be wrong.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from mogan.config import LCM
from mogan.disk.files import link_or_copy, new_folder, writable_folder, write_atomically
from mogan.disk.locks import alone_at
from mogan.errors import UserError
from mogan.exchange.card import mask_notes, metrics_table, model_card, origin_of, run_notes, states_notes
from mogan.exchange.elsewhere import PROGRAMS, UNTRIED, for_fastvideo, require_sampled_alike, save_original
from mogan.exchange.elsewhere import usage as how_to_call
from mogan.exchange.lora_file import DTYPES, check_range, files_of_lora, save_lora
from mogan.exchange.schedulers import flow_map_scheduler, scheduler_for
from mogan.exchange.stock_sampler import stock_sampler
from mogan.exchange.usage import CONTINUING, usage_of
from mogan.models import wan
from mogan.models.causal_cache import Causal
from mogan.models.experts import LOW, stock_boundary
from mogan.models.frame_sparse import mask_of, write_mask
from mogan.models.lora import factors, merge
from mogan.models.states import detach_states, write_states
from mogan.models.step_condition import is_told, tell_steps, to_stock
from mogan.ranges import at_least
from mogan.runs.checkpoint import load_part, student_checkpoint
from mogan.runs.generator import Generator, open_generator
from mogan.runs.identity import part_of_run, read_config
from mogan.schedule import levels_of

SUFFIXES = {"lora": ".safetensors", "self-forcing": ".pt", "comfyui": ".safetensors"}  # the others write folders
TOLD_INDEX = {"_class_name": "AnyFlowPipeline", "transformer": ["diffusers", "AnyFlowTransformer3DModel"]}
CAUSAL_INDEX = {"_class_name": "MoganCausalStudent", "transformer": ["mogan", "CausalWan"]}  # names that are nowhere
BY_LEVEL_INDEX = {
    "_class_name": "WanImageToVideoPipeline",
    "expand_timesteps": True,  # the first frame is given at level 0
    "image_encoder": [None, None],
    "image_processor": [None, None],
}


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    to: Literal["diffusers", "teacher", "lora", "self-forcing", "fastvideo", "comfyui"] = "diffusers",
    rank: int | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    results: Path | None = None,
    fake_score: bool = False,
) -> None:
    """Export a run's student (averaged weights) as a diffusers folder, as one LoRA file, or as other programs read it.

    Args:
        run: folder of a training run.
        out: where the export goes, a folder or a file (lora and comfyui .safetensors, self-forcing .pt); must not exist yet.
        to: diffusers: a folder stock WanPipeline (AnyFlowPipeline, of a student that is conditioned on its number of steps) opens;
            sample with guidance_scale=1 and num_inference_steps.
            teacher: of a fine-tuned model (flow matching) a folder that is sampled as its base is, in many guided steps, and
            distilled from: name it as --model.
            lora: a file for pipe.load_lora_weights and for ComfyUI, with a card beside it; of two experts a file each,
            whose names end in -high and -low.
            Of a causal student: self-forcing: a file of the original code's weights for LightX2V and Self-Forcing's code, comfyui:
            one for ComfyUI's autoregressive sampler, each with a card beside it; fastvideo: a folder for FastVideo.
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
    if (suffix := SUFFIXES.get(to)) != (out.suffix if out.suffix in SUFFIXES.values() else None):
        raise UserError(
            f"--to {to} writes a {f'file: end --out in {suffix}' if suffix else 'folder: give --out no suffix'}"
        )
    if rank is not None and to != "lora":
        raise UserError("--rank is the rank of a LoRA file: give it with --to lora")
    if fake_score and to not in ("diffusers", "teacher"):
        raise UserError(f"--fake-score goes into a folder of diffusers: leave it or --to {to} out")
    writable_folder(out.parent)
    source, precision = open_generator(str(run)), DTYPES[dtype]
    assert source.sigmas is not None
    if to in PROGRAMS:
        require_sampled_alike(source, to, run)
    beside = files_of_lora(out, source) if to == "lora" else []
    beside += [out.with_suffix(".md")] if to in SUFFIXES else []
    if there := [file for file in beside if file.exists()]:
        raise UserError(f"{there[0]} exists already: give another --out or remove it")
    notes = run_notes(run) + mask_notes(source.mask) + metrics_table(results)
    if to == "lora":
        _require_lora(source, run)
        guided = source.fine_tuned or source.continues
        with alone_at(out):
            files = save_lora(run, replace(source, sigmas=None) if guided else source, out, rank, precision, notes)
        use = (
            f"use it with: pipe.load_lora_weights({str(out)!r})"
            if files == [out]
            else f"use: see {out.with_suffix('.md')}"
        )
        print(f"exported to {' and '.join(map(str, files))}; {use}")
        return
    if to in PROGRAMS:
        _to_program(source, run, out, to, precision, notes)
        return
    if to == "diffusers" and source.fine_tuned and not fake_score:
        to = "teacher"
        print("fine-tuned on clips: exported to be sampled as its base is, in many guided steps (--to teacher)")
    if to == "teacher":
        _refuse_as_teacher(run, source, fake_score)
        if source.continues:
            notes.append(
                "- it was trained to go on from a first frame that it is given at level 0: name it as `--model` of a distillation"
            )
        source = replace(source, sigmas=None)
    usage = usage_of(source)
    notes = counts_notes(source) + states_notes(source.states) + notes + stock_sampler(source)
    card = model_card(
        "Few-step Wan student" if source.sigmas and not source.continues else "Fine-tuned Wan",
        source.folder,
        source.sigmas,
        notes,
        usage,
        source.solver,
        source.causal,
        origin_of(run),
        CONTINUING if source.continues and source.sigmas else None,
    )
    _save_folder(source, out, precision, card, _fake_score(run, source) if fake_score else None)
    print(f"exported to {out}; use it with: {usage[1].removeprefix('pipe = ').replace('PATH', str(out))}")


def _require_lora(source: Generator, run: Path) -> None:
    """Refuse a student of which no LoRA file is written. Raises UserError."""
    if source.told:
        raise UserError(
            f"{run} trained a student that is told where its steps end, which no LoRA of a stock Wan can be: leave out --to lora"
        )
    if wan.has_controls(source.folder) and not wan.is_image_to_video(source.folder):
        raise UserError(f"{run} trained a VACE, of which no LoRA file is written here: leave out --to lora")
    if source.states:
        raise UserError(f"{run} trained states, of which a LoRA file has no room: leave out --to lora")
    if source.causal:
        raise UserError(
            f"{run} trained a causal student, which a stock Wan with a LoRA would sample wrongly: leave out --to lora"
        )


def _to_program(source: Generator, run: Path, out: Path, to: str, dtype: torch.dtype, notes: list[str]) -> None:
    """Write a causal student as a program reads it, and say how that is called."""
    assert source.sigmas is not None
    use = f"{how_to_call(source, to, out.name)}\n\n{UNTRIED}"
    card = model_card(
        "Causal Wan student",
        source.folder,
        source.sigmas,
        notes,
        [],
        causal=source.causal,
        origin=origin_of(run),
        use=use,
    )
    if to == "fastvideo":
        _save_folder(source, out, dtype, card, finish=partial(for_fastvideo, source=source))
        print(f"exported to {out}; how FastVideo opens it is in {out / 'README.md'}")
        return
    with alone_at(out):
        save_original(source.load().transformer, out, to, dtype)
        write_atomically(out.with_suffix(".md"), card)
    print(f"exported to {out}; how {PROGRAMS[to]} opens it is in {out.with_suffix('.md')}")


def _save_folder(
    source: Generator,
    out: Path,
    dtype: torch.dtype,
    card: str,
    fake: Any = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write what a run made as a folder of its base model's kind."""
    student = source.load()
    save_student(
        student.transformer,
        source.folder,
        out,
        source.sigmas,
        dtype,
        card,
        source.solver,
        source.counts,
        fake_score=fake,
        low=student.transformer_2,
        boundary=source.boundary,
        causal=source.causal,
        animates=source.animates,
        finish=finish,
    )


def _refuse_as_teacher(run: Path, source: Generator, fake_score: bool) -> None:
    """A teacher is what was trained on clips at all levels, and by nothing else."""
    config = read_config(run)
    plain = set(config["objectives"]) == {"flow_matching"} and not (source.told or source.causal)
    if not plain or fake_score:
        raise UserError(
            f"{run} trained {config['recipe']}, and a teacher comes of fine-tuning by flow matching alone: leave out "
            + ("--fake-score" if plain else "--to teacher")
        )


def counts_notes(source: Generator) -> list[str]:
    """How a student of several numbers of steps is sampled in each."""
    if not source.counts or source.sigmas is None:
        return []
    offered = ", ".join(map(str, source.counts))
    if source.causal:
        return [f"- `--steps` of `mogan sample` may be {offered}; left out: {len(source.sigmas)}"]
    if source.told:
        return [f"- `num_inference_steps` may be {offered}: it was trained for these, and is told which"]
    schedulers = {n: scheduler_for(levels_of(source.sigmas, n), source.solver) for n in source.counts}
    return [
        f"- in {n} steps: `pipe.scheduler = {type(s).__name__}(shift={s.config.shift}, "
        f"shift_terminal={s.config.shift_terminal})`, `num_inference_steps={n}`"
        for n, s in schedulers.items()
    ]


def _fake_score(run: Path, source: Generator) -> Any:
    if source.boundary is not None:
        raise UserError(f"{run} trained two experts, whose fake scores no later run takes up: leave --fake-score out")
    weights = load_part(student_checkpoint(run), "fake_score.transformer")
    if not weights:
        raise UserError(f"{run} trained no fake score: leave --fake-score out")
    if source.lora is None:
        transformer = source.start()
        detach_states(transformer)  # a fake score is told none
        transformer.load_state_dict(weights)
        return transformer
    has_own = (source.folder / "fake_score" / "config.json").is_file()  # what its adapters were learnt over
    base = (source.folder, "fake_score") if has_own else (part_of_run(run, "model"), "transformer")
    transformer = wan.load_transformer(*base)
    transformer = tell_steps(transformer) if source.told else transformer
    merge(transformer, factors(weights))
    return transformer


def save_student(
    transformer: Any,
    base: Path,
    out: Path,
    sigmas: tuple[float, ...] | None,
    dtype: torch.dtype,
    card: str,
    solver: str = LCM,
    counts: tuple[int, ...] = (),
    fake_score: Any = None,
    low: Any = None,
    boundary: float | None = None,
    causal: Causal | None = None,
    animates: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a student's folder under a temporary name, then rename it; ``finish`` may change it before.

    A causal student's folder is one that no stock pipeline opens: they make whole clips, which would look plausible and be wrong.

    Without ``sigmas`` it is a teacher, sampled as the base model is. A student of two experts has a ``low`` one for levels
    below ``boundary``. Text encoder, tokenizer, autoencoder and image encoder are the base model's own files, hard-linked where
    the disk allows it.
    """
    told = is_told(transformer)
    scheduler: Any = None if sigmas is None else flow_map_scheduler(sigmas) if told else scheduler_for(sigmas, solver)
    rows = detach_states(transformer)
    for network in filter(None, (transformer, low, fake_score)):
        check_range(network.state_dict(), dtype)
    with new_folder(out) as temporary:
        eye = ("image_encoder", "image_processor") if wan.sees_pictures(base) else ()
        for part in ("text_encoder", "tokenizer", "vae", *eye, *(("scheduler",) if scheduler is None else ())):
            shutil.copytree(base / part, temporary / part, copy_function=link_or_copy)
        for part, network in (("transformer", transformer), (LOW, low), ("fake_score", fake_score)):
            if network is not None:
                network.register_to_config(_name_or_path="")  # else the folder tells where on this machine it came from
                nn.Module.to(network, dtype)  # what diffusers says of its own `to` is for inference
                (to_stock(network) if told else network).save_pretrained(temporary / part)
                if network is not fake_score and (mask := mask_of(network)) is not None:
                    write_mask(temporary / part, mask)
        if rows:
            write_states(temporary, rows)
        index = json.loads((base / "model_index.json").read_text())
        if scheduler is not None:
            scheduler.save_pretrained(temporary / "scheduler")
            index["scheduler"] = ["diffusers", type(scheduler).__name__]
        if low is not None and boundary is not None:
            index |= {LOW: index["transformer"], "boundary_ratio": stock_boundary(boundary, sigmas)}
        if told:
            others = ("_diffusers_version", "vae", "text_encoder", "tokenizer", "scheduler")
            index = {k: v for k, v in index.items() if k in others} | TOLD_INDEX
        if causal is not None:
            index |= CAUSAL_INDEX
        if animates:
            index |= BY_LEVEL_INDEX
        write_atomically(temporary / "model_index.json", json.dumps(index, indent=2) + "\n")
        facts = replace(wan.defaults(base), sigmas=sigmas, solver=solver, counts=counts, causal=causal).facts()
        write_atomically(temporary / "mogan.json", json.dumps(facts, indent=2) + "\n")
        write_atomically(temporary / "README.md", card)
        if finish is not None:
            finish(temporary)
