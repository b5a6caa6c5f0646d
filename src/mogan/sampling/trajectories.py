"""A teacher's whole denoising paths, from noise to clip, kept for students that learn to follow them."""

from dataclasses import replace
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mogan.data import cache as data
from mogan.data.folder import claim, claimed_by_work_alone, tell, write_lines
from mogan.data.lists import read_prompts, whole
from mogan.data.paths import path_file
from mogan.data.prompts import fingerprint
from mogan.data.tokens import about_tokens, load_tokens
from mogan.devices import choose_device
from mogan.disk.files import writable_folder
from mogan.disk.locks import alone_in
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.defaults import Defaults
from mogan.ranges import at_least, between
from mogan.runs.generator import Generator, open_generator
from mogan.runs.identity import TEACHER, of_model
from mogan.sampling.samplers import clips_at_once, refuse_what_is_no_number, sample_teacher
from mogan.schedule import shifted_levels


def trajectories(
    *,
    prompts: Path,
    out: Path,
    model: str = "lab",
    keep: str = "all",
    seeds: int = 1,
    first_seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    negative_prompt: str | None = None,
    batch: int | None = None,
    shard: str | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: str = "auto",
) -> None:
    """Keep a teacher's sampling trajectories, from noise to clip, to train on; run it again to go on where it stopped.

    Every path is made by guided Euler steps from noise of its own. What is not given follows the model, as in `mogan sample`.
    The folder is the --data of recipes whose students follow a teacher.

    Args:
        prompts: list of prompts, as for `mogan sample`.
        out: folder of the store: trajectories.json, index.jsonl, paths, text.
        model: lab (its teacher), a diffusers folder, or a hub id. The student's run takes the same one.
        keep: numbers of the steps to keep, 0 for the noise to the number of steps for the clip, such as 0,16,32,48; or all.
        seeds: paths per prompt.
        first_seed: seed of the first path; every other one has the next.
        steps: Euler steps.
        guidance: of the teacher.
        shift: of the levels.
        negative_prompt: negative prompt of guidance; "" for none.
        batch: paths made at once; by default as many as fit into the pixels of one clip of 81 x 480 x 832, at most 16.
        shard: i/n makes every n-th path, starting with the i-th: for many GPUs, into the same folder.
        precision: of the networks; auto is bf16 where the hardware is fast at it.
        device: auto, cpu or cuda.
    """
    at_least(1, batch=batch)
    between(1, 1000, seeds=seeds, steps=steps)
    between(0.001, 1000, shift=shift)  # beyond, all levels round to one
    at_least(0, guidance=guidance)
    whole(negative_prompt or "", "--negative-prompt")
    between(0, 2**63 - seeds, first_seed=first_seed)  # torch takes 64 bits
    target = choose_device(device)
    lines = read_prompts(prompts)
    between(0, 2**63 - seeds * len(lines), first_seed=first_seed)
    if (Path(model) / "run.json").is_file():
        raise UserError(f"{model} is a training run: give its export (`mogan export`) as --model")
    source = open_generator(wan.base_named(model))
    source.require_whole_clips(model)
    wan.refuse_few_steps(source.folder, model)
    wan.refuse_controls(source.folder, "a store of paths keeps none")
    own: dict[str, Any] = {"steps": steps, "guidance": guidance, "shift": shift, "negative_prompt": negative_prompt}
    how = replace(wan.defaults(source.folder), **{name: value for name, value in own.items() if value is not None})
    dtype = wan.dtype_of(precision, target)
    facts = {"model": model, **_facts(source, how, kept_of(keep, how.steps)), "prompts_sha256": fingerprint(lines)}
    facts["precision"] = str(dtype).removeprefix("torch.")
    # in the order of their text: equal lists in another order are the same store
    words = [prompt for prompt in sorted(lines) for _ in range(seeds)]
    entries: list[dict] = [
        {"id": f"{data.text_path(out, caption).stem}-{first_seed + n}", "caption": caption, "seed": first_seed + n}
        for n, caption in enumerate(words)
    ]
    mine = share_of(entries, shard)
    writable_folder(out)
    with alone_in(out, shard), claimed_by_work_alone(out, shard):
        claim(out, facts)
        _encode(out, source.folder, [entry["caption"] for entry in mine] + ["", how.negative_prompt], target)
        _fill(data.Cache(out, facts, mine), source, dtype, target, batch or clips_at_once(source.geometry))
        lacking = sum(not path_file(out, entry["id"]).is_file() for entry in entries)
        if not lacking:
            write_lines(out / "index.jsonl", entries)
            tell(out, about_tokens({line: line for line in lines}, load_tokens(source.folder)))
    left = f"; {lacking} are left to other shards" if lacking else f", {len(facts['kept'])} levels of each"
    print(f"{len(entries) - lacking} paths in {out}{left}")


def _facts(source: Generator, how: Defaults, kept: list[int]) -> dict[str, Any]:
    """What ``trajectories.json`` says of how paths are made."""
    folder, levels = source.folder, (*shifted_levels(how.steps, how.shift), 0.0)
    return {
        "contents": "paths",
        "teacher": of_model(folder, TEACHER),
        **{part: wan.fingerprint(folder, part) for part in ("text_encoder", "tokenizer", "vae")},
        **vars(source.geometry),
        "solver": "euler",
        **{name: getattr(how, name) for name in ("steps", "guidance", "shift", "negative_prompt")},
        "kept": kept,
        "levels": [levels[number] for number in kept],
        "latent_shape": list(wan.latent_shape(folder, source.geometry)),
    }


def kept_of(keep: str, steps: int) -> list[int]:
    """Numbers of the steps that ``--keep`` names, ascending.

    Raises:
        UserError: it names others than 0 to ``steps``, or not both ends: a path leads from noise to a clip.
    """
    if keep == "all":
        return list(range(steps + 1))
    words = [word.strip() for word in keep.split(",")]
    kept = [int(word) for word in words if word.isdecimal() and len(word) < 10]
    if len(kept) < len(words) or kept != sorted(set(kept)) or kept[:1] != [0] or kept[-1] != steps:
        raise UserError(f"--keep is all, or numbers that rise from 0 to {steps}, the number of steps, not {keep}")
    return kept


def _encode(out: Path, model: Path, texts: list[str], device: torch.device) -> None:
    """Keep the embeddings of texts. The encoder, Wan's largest part, is loaded if one is missing, and gone afterwards."""
    encoder = once(lambda: wan.load_text(model, device))
    data.ensure_text(out, texts, lambda missing: encoder()(missing))


def _fill(store: data.Cache, source: Generator, dtype: torch.dtype, device: torch.device, batch: int) -> None:
    """Make the paths that a store lacks, a few at a time."""
    todo = [entry for entry in store.entries if not path_file(store.path, entry["id"]).is_file()]
    if not todo:
        return
    facts, teacher = store.facts, source.load(dtype).to(device).eval()
    null = stack_text([store.text(facts["negative_prompt"])], device)
    with tqdm(
        total=len(store), initial=len(store) - len(todo), desc=f"paths {store.path.resolve().name}", unit="path"
    ) as bar:
        for first in range(0, len(todo), batch):
            part = todo[first : first + batch]
            text = stack_text([store.text(entry["caption"]) for entry in part], device)
            rows: list[Tensor] = []
            sample_teacher(
                teacher, text, null, facts["latent_shape"], [entry["seed"] for entry in part], steps=facts["steps"],
                guidance=facts["guidance"], shift=facts["shift"], solver=facts["solver"],
                see=partial(_keep, rows, facts["kept"]),
            )  # fmt: skip
            refuse_what_is_no_number(torch.stack(rows))
            for entry, latents in zip(part, torch.stack(rows, 1), strict=True):
                about = {"prompt": entry["caption"], "seed": str(entry["seed"])}
                data.save_tensors(path_file(store.path, entry["id"]), {"latents": latents}, about)
                bar.update()


def _keep(rows: list[Tensor], kept: list[int], number: int, x: Tensor) -> None:
    """Keep what lies before a step, if it is one of those; fp16 rounds by 2^-11 of a number, bf16 by 2^-8."""
    if number in kept:
        rows.append(x.to(torch.float16).cpu())
