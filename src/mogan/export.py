"""Out to what people run: a complete diffusers folder that stock ``WanPipeline`` opens and samples in a few steps."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import FlowMatchLCMScheduler

from mogan import wan
from mogan.checkpoint import latest_checkpoint, load_checkpoint, stored, write_atomically
from mogan.errors import UserError
from mogan.sample import open_generator

TOLERANCE = 1e-4  # largest error of a level, in sigma


def scheduler_for(sigmas: tuple[float, ...]) -> FlowMatchLCMScheduler:
    """A stock scheduler whose ``set_timesteps(len(sigmas))`` visits exactly these levels.

    ``WanPipeline`` takes no levels of its own, and the scheduler's default grid ends at sigma 0.024. Its two parameters,
    ``shift`` and ``shift_terminal``, reach every level list that is a Moebius function of the step: any list of up to
    three levels from 1, and every shifted uniform grid. ``shift`` is found by bisection on the second level.

    Raises:
        UserError: the list cannot be reached; a stock pipeline would sample at other levels.
    """

    def build(shift: float) -> FlowMatchLCMScheduler:
        terminal = sigmas[-1] if len(sigmas) > 1 else None
        return FlowMatchLCMScheduler(shift=shift, shift_terminal=terminal)

    def levels(shift: float) -> list[float]:
        scheduler = build(shift)
        scheduler.set_timesteps(len(sigmas))
        return scheduler.sigmas[:-1].tolist()

    low, high = 1e-4, 1e4
    if len(sigmas) > 2:
        for _ in range(200):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if levels(middle)[1] < sigmas[1] else (low, middle)
    shift = (low * high) ** 0.5 if len(sigmas) > 2 else 1.0
    error = max(abs(a - b) for a, b in zip(levels(shift), sigmas, strict=True))
    if error > TOLERANCE:
        raise UserError(
            f"no stock scheduler visits the levels {list(sigmas)} (closest: {[round(x, 4) for x in levels(shift)]}); "
            "distil at a shifted uniform grid, or at three levels, to export to diffusers"
        )
    return build(shift)


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    to: Literal["diffusers"] = "diffusers",
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    fake_score: bool = False,
) -> None:
    """Export a run's student (averaged weights) as a complete diffusers folder.

    Args:
        run: folder of a training run.
        out: where the export goes; must not exist yet.
        to: diffusers: a folder stock WanPipeline opens and samples with num_inference_steps and guidance_scale=1.
        dtype: precision of the saved transformer.
        fake_score: also save the run's fake score, which a later run that starts from this student then takes up.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a training run (no run.json)")
    if out.exists():
        raise UserError(f"{out} exists already: give another --out or remove it")
    source = open_generator(str(run))
    assert source.sigmas is not None
    save_student(
        source.load(),
        source.folder,
        out,
        source.sigmas,
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype],
        card=model_card(run, source.folder, source.sigmas),
        fake_score=_fake_score(run, source.folder) if fake_score else None,
    )
    print(f"exported to {out}; use it with: WanPipeline.from_pretrained({str(out)!r})")


def _fake_score(run: Path, base: Path) -> Any:
    newest = latest_checkpoint(run)
    prefix = "fake_score.transformer."
    if newest is None or not any(name.startswith(prefix) for name in stored(newest)):
        raise UserError(f"{run} trained no fake score: leave --fake-score out")
    transformer = wan.load_transformer(base)
    load_checkpoint(newest, {prefix + k: v for k, v in transformer.state_dict().items()})
    return transformer


def save_student(
    transformer: Any,
    base: Path,
    out: Path,
    sigmas: tuple[float, ...],
    dtype: torch.dtype,
    card: str,
    fake_score: Any = None,
) -> None:
    """Write a student's folder under a temporary name, then rename it.

    Text encoder, tokenizer and autoencoder are the base model's own files, hard-linked where the disk allows it.
    """
    scheduler = scheduler_for(sigmas)
    temporary = out.with_name(f".{out.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(base / part, temporary / part, copy_function=_link_or_copy)
    transformer.to(dtype).save_pretrained(temporary / "transformer")
    if fake_score is not None:
        fake_score.to(dtype).save_pretrained(temporary / "fake_score")
    scheduler.save_pretrained(temporary / "scheduler")
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchLCMScheduler"]
    write_atomically(temporary / "model_index.json", json.dumps(index, indent=2) + "\n")
    size = wan.geometry(base)
    facts = {"fps": size.fps, "height": size.height, "width": size.width, "frames": size.frames, "sigmas": sigmas}
    write_atomically(temporary / "mogan.json", json.dumps(facts, indent=2) + "\n")
    write_atomically(temporary / "README.md", card)
    temporary.rename(out)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def model_card(run: Path, base: Path, sigmas: tuple[float, ...]) -> str:
    """What a stranger must know to use the export: how to call it, where it came from."""
    config = json.loads((run / "config.json").read_text())
    newest = latest_checkpoint(run)
    size = wan.geometry(base)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-video
tags: [text-to-video, distillation, mogan]
---

# Few-step Wan student ({config["recipe"]})

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("PATH")
pipe("a prompt", height={size.height}, width={size.width}, num_frames={size.frames},
     num_inference_steps={len(sigmas)}, guidance_scale=1.0)
```

It samples at noise levels {", ".join(f"{s:.4g}" for s in sigmas)}; the scheduler in this folder visits exactly these with
`num_inference_steps={len(sigmas)}`. Use no guidance.

- recipe: `{config["recipe"]}`, seed {config["seed"]}, iteration {int(newest.name) if newest else 0}
- base: `{base.name}`; its licence holds for these weights
- frames: {size.frames} at {size.fps} fps, {size.height} x {size.width}
"""
