"""The training loop: a plan of updates, repeated, resumable bit for bit.

All randomness is a pure function of (seed, iteration, update, repeat, place in the batch), so a run resumed from a checkpoint
is the run that was never stopped, and a run of many processes is, but for rounding, the run of one.
"""

import json
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from mogan.config import Config, Optimizer, Update
from mogan.data.cache import Batch, draw_batch, one_ahead, open_cache
from mogan.data.observations import drawn
from mogan.disk.files import writable_folder, write_atomically
from mogan.disk.locks import alone_in
from mogan.distributed import join, whole
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.autoencoder import stream_video
from mogan.motion.flow import RaftFlow, flow_of_pieces
from mogan.objectives.shift import Shift
from mogan.ranges import above, at_least, is_seed
from mogan.recipes import ablate, find_recipe
from mogan.runs.checkpoint import (
    broken_checkpoints,
    check_same_run,
    held_out_motions,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stored,
)
from mogan.runs.identity import check_same_parts, made_of, note_parts, refuse_other_folders
from mogan.runs.journal import Journal
from mogan.sampling.rollout import Rollout, animate, normal, roll_out
from mogan.sampling.samplers import clips_at_once, sample_student, seeded, to_frames
from mogan.training.assemble import Assembly, assemble, with_scale
from mogan.training.held_out import Gain
from mogan.training.load import find_models


def generator_for(*keys: int) -> torch.Generator:
    """A generator that depends on ``keys`` alone."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in keys]).generate_state(2, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Position:
    """Where in a run a step stands."""

    seed: int
    iteration: int
    update: int
    repeat: int

    def generator(self, purpose: int, place: int = -1) -> torch.Generator:
        """Randomness for one purpose; ``place`` is a sample's number in the whole batch, left out for what all share."""
        return generator_for(self.seed, self.iteration, self.update, self.repeat, purpose, place)

    def generators(self, purpose: int, batch: Batch) -> list[torch.Generator]:
        """One generator per sample: its noise depends neither on how the batch is accumulated nor on who computes it."""
        return [self.generator(purpose, place) for place in batch.places]


def with_batch(update: Update, batch: int) -> Update:
    """The same update on another batch, computed in parts no larger than the recipe's: those are what fits."""
    return replace(update, batch=batch, accumulate=parts_of(batch, update.batch // update.accumulate))


def draw_exit(config: Config, where: Position) -> int:
    """The step of the rollout that is judged: uniform over the student's steps, the same on every process."""
    return int(torch.randint(len(config.sigmas), (1,), generator=where.generator(0)))


def draw(parts: Assembly, update: Update, where: Position) -> Batch:
    """Our share of the batch of one step: prompts and, where needed, real clips or their observations of one window."""
    config, gan = parts.config, parts.config.gan
    in_motion = gan is not None and gan.space == "motion" and not {"gan", "surrogate"}.isdisjoint(update.judges)
    more: dict[str, Any] = {} if parts.observations is None else {"observation": parts.observations.read}
    return draw_batch(
        parts.cache,
        seed=where.seed,
        rank=parts.world.share,
        ranks=parts.world.shares,
        iteration=where.iteration,
        update=where.update,
        repeat=where.repeat,
        size=update.batch // parts.world.shares,
        want=config.takes(update),
        starts=gan.starts if gan is not None and in_motion else (),
        prompts=None if update.from_clips else parts.prompts,
        **more,
    )


def complete(parts: Assembly, update: Update, batch: Batch) -> Batch:
    """The batch with the observations that nobody had computed when it was drawn."""
    wanted = "observation" in parts.config.takes(update)
    return parts.observations.complete(batch) if wanted and parts.observations is not None else batch


def parts_of(size: int, most: int) -> int:
    """The fewest equal parts of ``size`` clips that hold at most ``most`` each."""
    return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= most)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into equal parts for accumulation."""
    size = len(batch.prompts) // parts
    pieces = []
    for i in range(parts):
        window = slice(i * size, (i + 1) * size)
        cut: dict[str, Any] = {
            name: None if (value := getattr(batch, name)) is None else value[window]
            for name in ("prompts", "text", "ids", "latent_BCFHW", "observation_BCFHW", "places", "pairs")
        }
        pieces.append(replace(batch, **cut))
    return pieces


def rollout_for(parts: Assembly, update: Update, batch: Batch, where: Position) -> Rollout | None:
    """What the student makes of the batch's prompts; with gradient if it is the student that learns."""
    from_memory = update.learns == "surrogate"
    if from_memory or not parts.objectives[update.by].needs_rollout:
        return None
    generators = where.generators(2, batch)
    noise = normal(torch.Size((len(batch.prompts), *parts.latent_shape)), generators, parts.device)
    return roll_out(
        parts.student,
        noise,
        stack_text(batch.text, parts.device),
        parts.config.sigmas,
        generators,
        exit_step=draw_exit(parts.config, where),
        grad=update.learns == "student",
    )


def step(parts: Assembly, update: Update, where: Position, batch: Batch | None = None) -> dict[str, float]:
    """One update: roll out, judge, back-propagate in parts, check, clip, optimise, average. Returns what to log.

    Every process does this on its share of the batch; the backward pass averages gradients over them (see
    :func:`mogan.distributed.shard`), and what is logged is the mean.
    """
    objective, config = parts.objectives[update.by], parts.config
    network, optimizer = parts.networks[update.learns], parts.optimizers[update.optimizer_name]
    totals: dict[str, Tensor] = {}
    most = update.batch // update.accumulate  # clips at a time
    batch = complete(parts, update, batch or draw(parts, update, where))
    if isinstance(objective, Shift):
        batch = objective.pairs_for(where.iteration, batch, where.generators(2, batch), most)
    pieces = split(batch, parts_of(len(batch.ids), most))
    rollouts: list[Rollout] = []
    for number, piece in enumerate(pieces):
        rollout = parts.rollouts[number] if update.again else rollout_for(parts, update, piece, where)
        judge = getattr(objective, f"{update.learns}_loss", objective.judge_loss)
        loss, logs = judge(rollout, piece, where.generators(3, piece))
        (loss / len(pieces)).backward()
        if update.learns == "student" and rollout is not None:
            rollouts.append(replace(rollout, x0_BCFHW=rollout.x0_BCFHW.detach()))
        for key, value in ({"loss": loss.detach()} | logs).items():
            totals[key] = totals.get(key, 0) + value / len(pieces)
    trained = [p for p in network.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(trained, config.optimizers[update.optimizer_name].clip)
    record = parts.world.mean(totals | {"grad_norm": whole(norm)})
    if not np.isfinite([record["loss"], record["grad_norm"]]).all():
        raise _not_finite(parts, update, where, record)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # a network that rests keeps no gradients
    if update.learns == "student":
        parts.rollouts = rollouts
        parts.update_average()
    return record


def _not_finite(parts: Assembly, update: Update, where: Position, record: dict) -> UserError:
    good = latest_checkpoint(parts.run) if parts.run else None
    return UserError(
        f"iteration {where.iteration}, {update.label}: the loss is {record['loss']} and the gradient norm "
        f"{record['grad_norm']}; the weights before this step are untouched and the last checkpoint is "
        f"{good or 'not written yet'}. Try a lower learning rate, --precision fp32, or a smaller clip"
    )


def run_training(
    parts: Assembly, run: Path, gain: Gain | None = None, begin: Callable[[], None] = lambda: None
) -> None:
    """Train until ``config.iterations``, from the newest checkpoint if there is one; or until ``gain`` is over.

    The first process calls ``begin`` once a step has been done, here or by whoever wrote the checkpoint: a start that
    fails leaves nothing in the folder.
    """
    config, world, start = parts.config, parts.world, resume(parts, run)
    if gain is not None and world.main:
        gain.forget_after(start)
    world.barrier()
    journal: Journal | None = None
    if world.main and start:
        begin()
    batches = one_ahead(lambda where: draw(parts, config.plan[where.update], where), positions(config, start))
    over = world.any(gain is not None and world.main and gain.over)
    todo = range(start, start if over else config.iterations)
    if world.main and todo and (told := _about_observations(parts, start)):
        print(told)
    with _graceful_stop() as stop, closing(batches):
        bar = tqdm(todo, initial=start, total=config.iterations, desc=config.recipe, disable=not world.main)
        for iteration in bar:
            shown = {}
            for index, update in enumerate(config.plan):
                for repeat in range(update.times if update.happens(iteration) else 0):
                    batch = complete(parts, update, next(batches))  # of a clip once: no part of what a step costs
                    began, spent = time.perf_counter(), time.process_time()
                    record = step(parts, update, Position(config.seed, iteration, index, repeat), batch)
                    record |= {"seconds": time.perf_counter() - began}
                    if world.device.type == "cpu":  # what others do on the machine does not count
                        record |= {"core_seconds": time.process_time() - spent}
                    if world.main and journal is None:
                        begin()
                        journal = Journal(run, start, config)
                    shown[update.label] = f"{record['loss']:.3f}"
                    if journal is not None:
                        journal.write(iteration, update, repeat, record)
            bar.set_postfix(shown)
            done, leaving = iteration + 1, world.any(bool(stop))
            due = done % config.save_every == 0 or done == config.iterations
            if due and gain is not None:
                motion = gain.check(parts, done)
                over = world.any(world.main and gain.over)
                if journal is not None:
                    journal.writer.add_scalar("held_out/motion", motion, done)
            if due or leaving:
                save_checkpoint(run, done, parts.state(), config, world)
            if (done % config.sample_every == 0 or done == config.iterations) and config.sample_prompts:
                sample_sheet(parts, run, done)
            if leaving:
                if world.main:
                    said = f"stopped after iteration {done} and saved; the same command goes on from there"
                    print(f"\n{said}", file=sys.stderr)
                raise SystemExit(stop.code)
            if over:
                break
    if journal is not None:
        journal.close()
    elif world.main and not over:
        print(f"{run} has its {start} iterations already: give --iterations a larger number to go on")
    if gain is not None and world.main and held_out_motions(run):
        print(gain.said())


def _about_observations(parts: Assembly, start: int) -> str:
    config = parts.config
    if parts.observations is None or config.gan is None:
        return ""
    channels, _, height, width = parts.latent_shape
    size = channels * config.gan.window * height * width * torch.bfloat16.itemsize
    return parts.observations.announce(drawn(config, len(parts.cache), start), size)


def positions(config: Config, start: int) -> Iterator[Position]:
    """Every step of a run from iteration ``start`` on, in order."""
    for iteration in range(start, config.iterations):
        for index, update in enumerate(config.plan):
            for repeat in range(update.times if update.happens(iteration) else 0):
                yield Position(config.seed, iteration, index, repeat)


def resume(parts: Assembly, run: Path) -> int:
    """Load the newest checkpoint of ``run`` into ``parts``; returns the iteration to start with."""
    newest, broken = latest_checkpoint(run), broken_checkpoints(run)
    if newest is None:
        if broken:
            raise UserError(
                f"{broken[-1]} lacks its config.json and there is no other checkpoint: put back what was taken from it, or "
                "remove it to begin again"
            )
        return 0
    if broken and parts.world.main:
        print(f"{broken[-1]} lacks its config.json and is not used: going on from {newest}")
    parts.prepare_to_load(stored(newest))
    load_checkpoint(newest, parts.state(), parts.world)
    return int(newest.name)


class _graceful_stop:
    """SIGTERM and SIGINT ask for a stop after the current iteration; a second one stops at once.

    ``torchrun`` passes a Ctrl-C on to processes that have already got it: two within a second are one. ``code`` is what a
    process that it ended leaves with: 130 after SIGINT, 143 after SIGTERM.
    """

    def __enter__(self):
        self.asked, self.code = 0.0, 128 + signal.SIGINT
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number, frame):
        if self.asked and time.monotonic() > self.asked + 1:
            raise KeyboardInterrupt
        self.code = 128 + number
        self.asked = self.asked or time.monotonic()

    def __bool__(self):
        return self.asked > 0

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)


@torch.no_grad()
def sample_sheet(parts: Assembly, run: Path, iteration: int) -> None:
    """Clips of the averaged student on the first prompts (image to video: from the first clips' first frames), their
    flow, and one sheet of both.
    """
    from mogan.data.video import contact_sheet, flow_picture, write_video

    config = parts.config
    texts = parts.cache if config.given else parts.texts
    first = {e["caption"]: e["id"] for e in reversed(texts.entries)}  # of each prompt, its first clip
    prompts = list(dict.fromkeys(e["caption"] for e in texts.entries))[: config.sample_prompts]
    latents: list[Tensor] = []
    together = clips_at_once(parts.geometry)
    with parts.averaged_student() as student:
        for begin in range(0, len(prompts), together):
            part = prompts[begin : begin + together]
            seeds = list(range(begin, begin + len(part)))
            text = stack_text([texts.text(p) for p in part], parts.device)
            if config.given:
                noise = normal(torch.Size((len(seeds), *parts.latent_shape)), seeded(seeds), parts.device)
                real = torch.stack([parts.cache.latent(first[p]) for p in part]).to(noise)
                made = animate(student, noise, real[:, :, : config.given], text, text, config.sigmas, guidance=1.0)
            else:
                made = sample_student(student, text, parts.latent_shape, config.sigmas, seeds)
            latents += made.split(1)
    if not parts.world.main:
        return
    folder = run / "samples" / f"{iteration:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, titles = [], []
    for number, (prompt, latent) in enumerate(zip(prompts, latents, strict=True)):
        frames, flow = _frames_and_flow(parts, latent)
        write_video(folder / f"{number}.mp4", frames, parts.geometry.fps)
        rows.append(frames)
        titles.append(prompt)
        if flow is not None and parts.config.gan is not None:
            scale = parts.config.gan.max_flow
            assert scale is not None
            rows.append(flow_picture(flow, scale))
            titles.append(f"flow, {scale:g} px/frame")
    contact_sheet(rows, folder / "sheet.png", titles=titles)


def _frames_and_flow(parts: Assembly, latent_1CFHW: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """A clip ``(F, H, W, 3)``, and its flow ``(F - 1, 2, H, W)`` where a discriminator sees RAFT's; made as it is decoded."""
    frames: list[np.ndarray] = []

    def decoded() -> Iterator[Tensor]:
        for piece in stream_video(parts.vae, latent_1CFHW):
            frames.extend(to_frames(piece)[0])
            yield piece

    flow = None
    if isinstance(parts.flow, RaftFlow) and parts.config.gan is not None:
        fields = torch.cat([field.cpu() for field in flow_of_pieces(decoded(), parts.flow)], 2)
        flow = fields[0].transpose(0, 1).numpy()
    else:
        deque(decoded(), maxlen=0)
    return np.stack(frames), flow


def _slower(config: Config, lr: float) -> dict[str, Optimizer]:
    """The optimisers with ``lr`` as the student's learning rate; of several of the student, as that of its first update."""
    mine = [u.optimizer_name for u in config.plan if u.learns == "student"]
    first = config.optimizers[mine[0]].lr
    return {k: replace(o, lr=o.lr / first * lr) if k in mine else o for k, o in config.optimizers.items()}


def train(
    recipe: tyro.conf.Positional[str],
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
    ablation: str | None = None,
    precision: Literal["auto", "bf16", "fp32"] | None = None,
    save_every: int | None = None,
    sample_every: int | None = None,
    held_out: Path | None = None,
    patience: int = 5,
    compile: bool = False,
    device: str = "auto",
    hsdp: int = 1,
    context_parallel: int = 1,
    dry_run: bool = False,
) -> None:
    """Train a recipe on a cache; the same command again goes on where it stopped.

    Args:
        recipe: a name such as mogan_lab, dmd_lab, flow_matching_lab, shift_lab, mogan_wan_1_3b, or your own module:function.
        data: a cache made by `mogan prepare`.
        prompts: a second cache (`mogan prepare prompts.txt`), whose prompts the student makes clips of in place of the captions
            of data: clips then teach motion alone and need no captions.
        out: folder of the run: checkpoints, metrics.jsonl, tensorboard, samples.
        model: base model (teacher, autoencoder, text): lab, a diffusers folder or a hub id.
        student: few-step student to start from, a model or (with lora) a run with adapters; the lab's own for the lab.
        iterations: how long to train in all.
        seed: of everything random.
        batch: clips per update, in place of the recipe's.
        lr: learning rate of the student, in place of the recipe's; where updates have their own, the others keep their ratio.
        lora: learn adapters of this rank over one frozen base, instead of all weights of student and fake score.
        ablation: leave one part out, as in the paper's Table 2: no-dmd, no-r1r2 or latent-gan.
        precision: auto, bf16 or fp32.
        save_every: iterations between checkpoints.
        sample_every: iterations between sheets of sample clips.
        held_out: a cache with prompts that are not trained on. At every checkpoint the student's motion on them is measured;
            training stops when it no longer rises, and sample and export take the checkpoint at which it was highest.
        patience: checkpoints without a new highest motion after which a run with held-out prompts stops.
        compile: compile the transformers' blocks with torch.compile: slow to start; a run may go on with or without it.
        device: auto, cpu or cuda.
        hsdp: with many processes, copies of the sharded networks: 1 shards over all of them.
        context_parallel: with many processes, how many share the tokens of one sample; it must divide the model's heads.
        dry_run: print the resolved config and stop.
    """
    at_least(1, iterations=iterations, batch=batch, lora=lora, save_every=save_every, sample_every=sample_every)
    at_least(1, patience=patience, hsdp=hsdp, context_parallel=context_parallel)
    is_seed(seed=seed)
    above(0, lr=lr)
    config = find_recipe(recipe)
    config = ablate(config, ablation) if ablation else config
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
        print(_as_text(config))
        return
    with join(device, hsdp, context_parallel) as world:
        cache, words = open_cache(data), open_cache(prompts) if prompts else None
        if world.main:
            writable_folder(out)
        with alone_in(out) if world.main else nullcontext():
            refuse_other_folders(out)
            resolved = with_scale(config, cache)
            check_same_run(out, resolved)
            of = made_of(*find_models(resolved, model, student), cache, words) if world.main else {}
            if world.main:
                check_same_parts(out, of)

            def begin() -> None:
                write_atomically(out / "config.json", _as_text(resolved) + "\n")
                note_parts(out, of)

            parts = assemble(resolved, cache, model=model, student=student, prompts=words, run=out, world=world)
            run_training(parts, out, Gain(out, held_out, parts, patience) if held_out else None, begin)


def _as_text(config: Config) -> str:
    return json.dumps(asdict(config), indent=2, ensure_ascii=False)
