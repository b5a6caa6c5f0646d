"""``mogan train``: a recipe on a cache, into a folder."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

import torch
import tyro

from mogan.config import Config, Optimizer
from mogan.data.cache import Cache, open_cache
from mogan.disk.files import writable_folder, write_atomically
from mogan.disk.locks import alone_in
from mogan.distributed import ONE, World, join
from mogan.errors import UserError, goes_with
from mogan.estimate.fit import fit_run, would_fit
from mogan.ranges import above, at_least, between, is_seed
from mogan.recipes import NAMES, find_recipe
from mogan.runs.checkpoint import check_same_run
from mogan.runs.generator import open_generator
from mogan.runs.identity import check_same_parts, made_of, note_parts, refuse_other_folders
from mogan.training.assemble import assemble
from mogan.training.held_out import Gain
from mogan.training.load import filled, find_models
from mogan.training.loop import run_training
from mogan.training.steps import with_batch


def _slower(config: Config, lr: float) -> dict[str, Optimizer]:
    """The optimisers with ``lr`` as the student's learning rate; of several of the student, as that of its first update."""
    mine = [u.optimizer_name for u in config.plan if u.learns == "student"]
    first = config.optimizers[mine[0]].lr
    return {k: replace(o, lr=o.lr / first * lr) if k in mine else o for k, o in config.optimizers.items()}


def train(
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help=NAMES)],
    *,
    data: Path,
    out: Path,
    prompts: Path | None = None,
    model: str = "lab",
    student: str | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    lora: int | None = None,
    precision: Literal["auto", "bf16", "fp32"] | None = None,
    save_every: int | None = None,
    sample_every: int | None = None,
    held_out: Path | None = None,
    patience: int = 5,
    fit: float | None = None,
    compile: bool = False,
    device: str = "auto",
    hsdp: int = 1,
    context_parallel: int = 1,
    dry_run: bool = False,
) -> None:
    """Train a recipe on a cache; the same command again resumes where it stopped.

    Args:
        recipe: a name such as mogan_lab or mogan_wan_1_3b, or your own module:function.
        data: a cache made by `mogan prepare`.
        prompts: a second cache (`mogan prepare prompts.txt`), whose prompts the student makes clips of in place of the captions
            of data: clips then teach motion alone and need no captions.
        out: folder of the run: checkpoints, metrics.jsonl, tensorboard, samples.
        model: base model (teacher, autoencoder, text): lab, a diffusers folder or a hub id.
        student: few-step student to start from, a model or (with lora) a run with adapters; the lab's own for the lab.
        iterations: how many in all, in place of the recipe's.
        seed: of everything random, in place of the recipe's.
        batch: clips per update, in place of the recipe's.
        lr: learning rate of the student, in place of the recipe's; where updates have their own, the others keep their ratio.
        lora: learn adapters of this rank over one frozen base, instead of all weights of student, fake score and MoGAN's discriminator.
        precision: auto is bf16 where the hardware is fast at it; in place of the recipe's.
        save_every: iterations between checkpoints, in place of the recipe's; one is saved after every hour, too.
        sample_every: iterations between grids of sample clips, in place of the recipe's.
        held_out: a cache with prompts that are not trained on. Every --save-every iterations the student's motion on them is
            measured; training stops when it no longer rises, and sample and export take the checkpoint at which it was highest.
        patience: measurements without a new highest motion after which a run with held-out prompts stops.
        fit: gigabytes of a GPU's memory, such as 24: choose and say what makes the run fit, from what `mogan estimate` predicts:
            activations recomputed, one clip at a time, what waits kept in the host's memory, adapters (a minute of tracing).
            A student that is a run with adapters gives their rank.
        compile: compile the transformers' blocks with torch.compile: slow to start; a run may go on with or without it.
        device: auto, cpu or cuda.
        hsdp: with many processes, copies of the sharded networks: 1 shards over all of them.
        context_parallel: with many processes, how many share the tokens of one sample; it must divide the model's heads and a clip's
            tokens.
        dry_run: print the resolved config and stop.
    """
    at_least(1, iterations=iterations, batch=batch, save_every=save_every, sample_every=sample_every)
    between(1, 10_000, lora=lora)  # no Wan is wider
    at_least(1, patience=patience, hsdp=hsdp, context_parallel=context_parallel)
    goes_with("--held-out", held_out is not None, patience=patience != 5)
    is_seed(seed=seed)
    above(0, lr=lr, fit=fit)
    config = find_recipe(recipe)
    chosen: dict[str, Any] = {
        "iterations": iterations,
        "seed": seed,
        "precision": precision,
        "lora": lora,
        "compile": compile or None,
        "save_every": save_every,
        "sample_every": sample_every,
    }
    config = replace(config, **{k: v for k, v in chosen.items() if v is not None})
    if batch is not None:
        config = replace(config, plan=tuple(with_batch(u, batch) for u in config.plan))
    if lr is not None:
        config = replace(config, optimizers=_slower(config, lr))
    if dry_run:
        print(_as_text(_fitted(config, fit, data, model, student, out, ONE)))
        return
    with join(device, hsdp, context_parallel) as world:
        cache, words = open_cache(data), open_cache(prompts) if prompts else None
        config = _fitted(config, fit, data, model, student, out, world)
        if world.main:
            writable_folder(out)
        with alone_in(out) if world.main else nullcontext():
            _require_shared(out, world)
            refuse_other_folders(out)
            of = made_of(*find_models(config, model, student), cache, words) if world.main else {}
            resolved = filled(config, cache)
            check_same_run(out, resolved)
            if world.main:
                check_same_parts(out, of)

            def begin() -> None:
                write_atomically(out / "config.json", _as_text(resolved) + "\n")
                note_parts(out, of)

            with _memory_told(resolved, cache, model, student, out, world):
                parts = assemble(resolved, cache, model=model, student=student, prompts=words, run=out, world=world)
                run_training(parts, out, Gain(out, held_out, parts, patience) if held_out else None, begin)


def _require_shared(out: Path, world: World) -> None:
    """Raises UserError where a process sees another folder of that name: each would save its part of a checkpoint there."""
    if world.mesh is None:
        return

    def leave_mark() -> str:
        name = f".seen-{uuid4().hex}"
        (out / name).touch()
        return name

    mark = out / world.from_main(leave_mark)
    for wait in (0.0, 1.0, 4.0, 15.0):  # NFS may remember for a while that the folder was not there
        time.sleep(wait)
        if mark.is_file():
            break
    unseen = world.any(not mark.is_file())
    if world.main:
        mark.unlink()
    if unseen:
        raise UserError(
            f"{out} is not one folder for all processes: give a folder that every machine sees, at the same path"
        )


def _fitted(
    config: Config, fit: float | None, data: Path, model: str, student: str | None, out: Path, world: World
) -> Config:
    """With what makes it fit, said once."""
    if fit is None:
        return config
    if config.lora is None and student is not None and (rank := open_generator(student).lora) is not None:
        config = replace(config, lora=rank)
        if world.main:
            print(f"to fit {fit:g} GB: learn adapters of rank {rank}, which is what {student} has", file=sys.stderr)
    folder = find_models(config, model, student)[0]
    chosen, said = world.from_main(
        lambda: fit_run(config, fit, folder, open_cache(data), out, world.ranks, world.copies)
    )
    if world.main:
        print("\n".join(f"to fit {fit:g} GB: {line}" for line in said), file=sys.stderr)
    return chosen


@contextmanager
def _memory_told(
    config: Config, cache: Cache, model: str, student: str | None, out: Path, world: World
) -> Iterator[None]:
    """Where a GPU's memory does not suffice, what would have."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        memory = torch.cuda.get_device_properties(world.device).total_memory / 1e9
        print("out of memory; looking for settings that fit ...", file=sys.stderr, flush=True)
        said = would_fit(config, memory, find_models(config, model, student)[0], cache, world.ranks, world.copies)
        if (out / "config.json").is_file():
            said += ", and another --out, for this run goes on with what it began with"
        raise UserError(f"the GPU's {memory:.0f} GB do not suffice: {said}") from error


def _as_text(config: Config) -> str:
    return json.dumps(config.as_json(), indent=2, ensure_ascii=False)
