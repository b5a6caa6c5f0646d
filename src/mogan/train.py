"""The training loop: a plan of updates, repeated, resumable bit for bit.

All randomness is a pure function of (seed, rank, iteration, update, repeat, part), so a run resumed from a checkpoint is
the run that was never stopped.
"""

import json
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mogan.assemble import Assembly, assemble
from mogan.checkpoint import (
    check_same_run,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from mogan.config import Config, Update
from mogan.data import Batch, draw_batch, open_cache
from mogan.errors import UserError
from mogan.objectives.shift import Shift
from mogan.recipes import ablate, find_recipe
from mogan.rollout import Rollout, animate, normal, roll_out
from mogan.sample import sample_student, seeded, to_frames
from mogan.wan import stack_text
from mogan.watch import Watch

RANK = 0


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

    def generator(self, purpose: int, part: int = 0, rank: int | None = None) -> torch.Generator:
        """Randomness for one purpose; leave ``rank`` out for what all ranks must agree on."""
        who = -1 if rank is None else rank
        return generator_for(self.seed, who, self.iteration, self.update, self.repeat, part, purpose)


def draw_exit(config: Config, where: Position) -> int:
    """The step of the rollout that is judged: uniform over the student's steps, the same on every rank."""
    return int(torch.randint(len(config.sigmas), (1,), generator=where.generator(0)))


def draw(parts: Assembly, update: Update, where: Position) -> Batch:
    """The batch of one step: prompts and, where the update needs them, real clips or their observation of one window."""
    config = parts.config
    in_motion = update.by == "gan" and config.gan is not None and config.gan.space == "motion"
    if update.by in ("flow_matching", "shift") or (update.learns == "discriminator" and not in_motion):
        want: tuple[str, ...] = ("latent",)
    else:
        want = ("observation",) if update.learns == "discriminator" else ()
    return draw_batch(
        parts.cache,
        seed=where.seed,
        rank=RANK,
        iteration=where.iteration,
        update=where.update,
        repeat=where.repeat,
        size=update.batch,
        want=want,
        observations=parts.observations,
        starts=config.gan.starts if in_motion and config.gan is not None else (),
    )


def with_pairs(parts: Assembly, update: Update, batch: Batch, where: Position) -> Batch:
    """For SHIFT: pairs of real and freshly sampled clips, which all updates of an iteration share. Else the batch."""
    objective = parts.objectives[update.by]
    if not isinstance(objective, Shift):
        return batch
    if objective.latest is None or objective.latest[0] != where.iteration:
        pairs = objective.sample(batch, where.generator(2, 0, RANK), update.accumulate)
        objective.latest = where.iteration, pairs
    return objective.latest[1]


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into equal parts for accumulation."""
    size = len(batch.prompts) // parts
    pieces = []
    for i in range(parts):
        window = slice(i * size, (i + 1) * size)
        cut: dict[str, Any] = {
            name: None if (value := getattr(batch, name)) is None else value[window]
            for name in ("prompts", "text", "ids", "latent_BCFHW", "observation_BCFHW", "pairs")
        }
        pieces.append(replace(batch, **cut))
    return pieces


def rollout_for(parts: Assembly, update: Update, batch: Batch, where: Position, part: int) -> Rollout | None:
    """What the student makes of the batch's prompts; with gradient if it is the student that learns."""
    if not parts.objectives[update.by].needs_rollout:
        return None
    generator = where.generator(2, part, RANK)
    noise = normal(torch.Size((len(batch.prompts), *parts.latent_shape)), generator, parts.device)
    return roll_out(
        parts.student,
        noise,
        stack_text(batch.text, parts.device),
        parts.config.sigmas,
        generator,
        exit_step=draw_exit(parts.config, where),
        grad=update.learns == "student",
    )


def step(parts: Assembly, update: Update, where: Position) -> dict[str, float]:
    """One update: roll out, judge, back-propagate in parts, check, clip, optimise, average. Returns what to log."""
    objective, config = parts.objectives[update.by], parts.config
    network, optimizer = parts.networks[update.learns], parts.optimizers[update.optimizer_name]
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    batch = with_pairs(parts, update, draw(parts, update, where), where)
    for number, piece in enumerate(split(batch, update.accumulate)):
        rollout = rollout_for(parts, update, piece, where, number)
        judge = objective.student_loss if update.learns == "student" else objective.judge_loss
        loss, logs = judge(rollout, piece, where.generator(3, number, RANK))
        (loss / update.accumulate).backward()
        for key, value in ({"loss": loss.detach()} | logs).items():
            totals[key] = totals.get(key, 0) + value / update.accumulate
    trained = [p for p in network.parameters() if p.grad is not None]
    totals["grad_norm"] = nn.utils.clip_grad_norm_(trained, config.optimizers[update.optimizer_name].clip)
    record = {key: float(value) for key, value in totals.items()}  # the step's only host synchronisation
    if not np.isfinite([record["loss"], record["grad_norm"]]).all():
        raise _not_finite(parts, update, where, record)
    optimizer.step()
    if update.learns == "student":
        parts.update_average()
    return record


def _not_finite(parts: Assembly, update: Update, where: Position, record: dict) -> UserError:
    good = latest_checkpoint(parts.run) if parts.run else None
    return UserError(
        f"iteration {where.iteration}, {update.label}: the loss is {record['loss']} and the gradient norm "
        f"{record['grad_norm']}; the weights before this step are untouched and the last checkpoint is "
        f"{good or 'not written yet'}. Try a lower learning rate, --precision fp32, or a smaller clip"
    )


def run_training(parts: Assembly, run: Path) -> None:
    """Train until ``config.iterations``, from the newest checkpoint if there is one."""
    config = parts.config
    start, watch = resume(parts, run), Watch()
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)
    for line in _keep_before(run / "metrics.jsonl", start):
        watch.read(line)
    with _graceful_stop() as stop, (run / "metrics.jsonl").open("a") as log:
        bar = tqdm(range(start, config.iterations), initial=start, total=config.iterations, desc=config.recipe)
        for iteration in bar:
            shown = {}
            for index, update in enumerate(config.plan):
                for repeat in range(update.times if update.happens(iteration) else 0):
                    began = time.perf_counter()
                    record = step(parts, update, Position(config.seed, iteration, index, repeat))
                    record |= {"seconds": time.perf_counter() - began}
                    shown[update.label] = f"{record['loss']:.3f}"
                    _log(log, writer, iteration, update, repeat, record, watch, run)
            bar.set_postfix(shown)
            done = iteration + 1
            if done % config.save_every == 0 or done == config.iterations or stop:
                save_checkpoint(run, done, parts.state(), config)
            if (done % config.sample_every == 0 or done == config.iterations) and config.sample_prompts:
                sample_sheet(parts, run, done)
            if stop:
                raise SystemExit(f"stopped after iteration {done} and saved; the same command goes on from there")
    writer.close()


def resume(parts: Assembly, run: Path) -> int:
    """Load the newest checkpoint of ``run`` into ``parts``; returns the iteration to start with."""
    newest = latest_checkpoint(run)
    if newest is None:
        return 0
    state = load_checkpoint(newest)
    parts.load_state(state)
    return int(state["iteration"])


def _keep_before(path: Path, iteration: int) -> list[dict]:
    """Drop log lines of iterations that will be done again; returns the others."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a kill can cut the last line short
            records.append(json.loads(line))
    records = [r for r in records if r["iteration"] < iteration]
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in records))
    return records


def _log(log, writer, iteration: int, update: Update, repeat: int, record: dict, watch: Watch, run: Path) -> None:
    line = {"iteration": iteration, "update": update.label, "repeat": repeat} | record
    log.write(json.dumps(line) + "\n")
    log.flush()
    if repeat == update.times - 1:
        for key, value in record.items():
            writer.add_scalar(f"{update.label.replace('<', '_by_')}/{key}", value, iteration)
    for warning in watch.read(line):
        tqdm.write(f"iteration {iteration}: {warning}")
        with (run / "warnings.log").open("a") as file:
            file.write(f"{iteration} {warning}\n")


class _graceful_stop:
    """SIGTERM and SIGINT ask for a stop after the current iteration; a second one stops at once."""

    def __enter__(self):
        self.asked = False
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __bool__(self):
        return self.asked

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)


@torch.no_grad()
def sample_sheet(parts: Assembly, run: Path, iteration: int) -> None:
    """Clips of the averaged student on the first prompts (image to video: from the first clips' first frames), their
    flow, and one sheet of both.
    """
    from mogan.flow import RaftFlow
    from mogan.video import contact_sheet, flow_picture, write_video
    from mogan.wan import decode_video

    config = parts.config
    first = {e["caption"]: e["id"] for e in reversed(parts.cache.entries)}  # of each prompt, its first clip
    prompts = list(dict.fromkeys(e["caption"] for e in parts.cache.entries))[: config.sample_prompts]
    text, seeds = stack_text([parts.cache.text(p) for p in prompts], parts.device), list(range(len(prompts)))
    with parts.averaged_student() as student:
        if config.given:
            noise = normal(torch.Size((len(seeds), *parts.latent_shape)), seeded(seeds), parts.device)
            real = torch.stack([parts.cache.latent(first[p]) for p in prompts]).to(noise)
            latents = animate(student, noise, real[:, :, : config.given], text, text, config.sigmas, guidance=1.0)
        else:
            latents = sample_student(student, text, parts.latent_shape, config.sigmas, seeds)
    video = decode_video(parts.vae, latents)
    folder = run / "samples" / f"{iteration:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, titles = [], []
    for number, (prompt, frames) in enumerate(zip(prompts, to_frames(video), strict=True)):
        write_video(folder / f"{number}.mp4", frames, parts.geometry.fps)
        rows.append(frames)
        titles.append(prompt)
        if isinstance(parts.flow, RaftFlow) and parts.config.gan is not None:
            flow = parts.flow(video[number : number + 1])[0].transpose(0, 1).cpu().numpy()
            rows.append(flow_picture(flow, parts.config.gan.max_flow))
            titles.append(f"flow, {parts.config.gan.max_flow:g} px/frame")
    contact_sheet(rows, folder / "sheet.png", titles=titles)


def train(
    recipe: tyro.conf.Positional[str],
    *,
    data: Path,
    out: Path,
    model: str = "lab",
    student: str | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    ablation: str | None = None,
    precision: str | None = None,
    save_every: int | None = None,
    sample_every: int | None = None,
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Train a recipe on a cache; the same command again goes on where it stopped.

    Args:
        recipe: a name such as mogan_lab, dmd_lab, flow_matching_lab, shift_lab, mogan_wan_1_3b, or your own module:function.
        data: a cache made by `mogan prepare`.
        out: folder of the run: checkpoints, metrics.jsonl, tensorboard, samples.
        model: base model (teacher, autoencoder, text): lab, a diffusers folder or a hub id.
        student: few-step student to start from; the lab's own for the lab.
        iterations: how long to train in all.
        seed: of everything random.
        batch: clips per update, in place of the recipe's.
        lr: learning rate of the student, in place of the recipe's.
        ablation: leave one part out, as in the paper's Table 2: no-dmd, no-r1r2 or latent-gan.
        precision: auto, bf16 or fp32.
        save_every: iterations between checkpoints.
        sample_every: iterations between sheets of sample clips.
        device: auto, cpu or cuda.
        dry_run: print the resolved config and stop.
    """
    config = find_recipe(recipe)
    config = ablate(config, ablation) if ablation else config
    chosen: dict[str, Any] = {
        "iterations": iterations,
        "seed": seed,
        "precision": precision,
        "save_every": save_every,
        "sample_every": sample_every,
    }
    config = replace(config, **{k: v for k, v in chosen.items() if v is not None})
    if batch is not None:
        config = replace(config, plan=tuple(replace(u, batch=batch, accumulate=1) for u in config.plan))
    if lr is not None:
        slower = {k: replace(o, lr=lr) if k.startswith("student") else o for k, o in config.optimizers.items()}
        config = replace(config, optimizers=slower)
    text = json.dumps(asdict(config), indent=2, ensure_ascii=False)
    if dry_run:
        print(text)
        return
    out.mkdir(parents=True, exist_ok=True)
    check_same_run(out, config)
    parts = assemble(config, open_cache(data), model=model, student=student, run=out, device=device)
    write_atomically(out / "config.json", text + "\n")
    write_atomically(out / "run.json", json.dumps(parts.facts, indent=2) + "\n")
    run_training(parts, out)
