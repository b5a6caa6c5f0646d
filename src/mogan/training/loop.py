"""The training loop: a plan of updates, repeated, resumable bit for bit (MoGAN's Algorithm 1 for its recipes)."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from threading import current_thread, main_thread

import torch
from torch import Tensor
from tqdm import tqdm

from mogan.config import Config
from mogan.data.batches import Batch, one_ahead
from mogan.data.observations import drawn
from mogan.errors import UserError
from mogan.runs.checkpoint import (
    SAVE_WITHIN,
    broken_checkpoints,
    held_out_motions,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stored,
)
from mogan.runs.identity import begins_again
from mogan.runs.journal import Journal
from mogan.sampling.rollout import Rollout
from mogan.training.assemble import Assembly
from mogan.training.held_out import Gain
from mogan.training.sheet import sample_sheet
from mogan.training.steps import Position, complete, draw, learn, positions, read

Begun = Callable[[], None]


def run_training(parts: Assembly, run: Path, gain: Gain | None = None, begin: Begun = lambda: None) -> None:
    """Train until ``config.iterations``, from the newest checkpoint if there is one; or until ``gain`` is over.

    The first process calls ``begin`` once an iteration has been done, here or by whoever wrote the checkpoint: a start that
    fails leaves nothing in the folder.
    """
    config, world, start = parts.config, parts.world, resume(parts, run)
    if gain is not None and world.main:
        gain.forget_after(start)
    world.barrier()
    if world.main and start:
        begin()
    over = world.any(gain is not None and world.main and gain.over)
    todo = range(start, start if over else config.iterations)
    if world.main and todo:
        _tell_of_observations(parts, start)
    walk = one_ahead(lambda where: (where, draw(parts, where)), positions(config, start))
    records, saved = _Records(parts, run, start, begin), time.monotonic()
    bar = tqdm(initial=start, total=config.iterations, desc=config.recipe, disable=not world.main)
    with _graceful_stop(world.main) as stop, closing(walk), closing(records), bar:
        for iteration, steps in zip(todo, _by_iteration(walk, start), strict=False):
            learnt: list[tuple[Position, dict[str, Tensor]]] = []
            made: list[Rollout] = []
            for where, batch in steps:
                update = config.plan[where.update]
                whole_batch = complete(parts, update, batch)  # of a clip once: no part of what a step costs
                with records.clock:
                    done = learn(parts, where, whole_batch, made)
                learnt.append((where, done.numbers))
                made = done.rollouts if update.learns == "student" else made
            bar.set_postfix(records.write(learnt), refresh=False)
            bar.update()
            leaving, late = world.any(bool(stop)), world.any(world.main and time.monotonic() > saved + SAVE_WITHIN)
            over = _keep(parts, run, iteration + 1, gain, records, leaving or late)
            if leaving or late or _due(config, iteration + 1):
                saved = time.monotonic()
            if leaving:
                world.barrier()  # who ends first may end the others, of whom one may still be making a sheet
                bar.close()
                if world.main:
                    said = f"stopped after iteration {iteration + 1} and saved; the same command goes on from there"
                    print(said, file=sys.stderr)
                raise SystemExit(stop.code)
            if over:
                break
    if world.main and not todo and not over:
        print(f"{run} has its {start} iterations already: give --iterations a larger number to go on")
    if gain is not None and world.main and held_out_motions(run):
        print(gain.said())


Step = tuple[Position, Batch]


def _by_iteration(walk: Iterator[Step], start: int) -> Iterator[Iterator[Step]]:
    """The steps of one iteration after the other; an iteration may have none."""
    coming = next(walk, None)

    def of(iteration: int) -> Iterator[Step]:
        nonlocal coming
        while coming is not None and coming[0].iteration == iteration:
            yield coming
            coming = next(walk, None)

    for iteration in count(start):
        yield of(iteration)


def _due(config: Config, done: int) -> bool:
    """Whether the recipe saves after so many iterations."""
    return done == config.iterations or done % config.save_every == 0


def _keep(parts: Assembly, run: Path, done: int, gain: Gain | None, records: "_Records", save: bool) -> bool:
    """What is due after so many iterations: held-out motion, a checkpoint (or if asked to ``save``), a sheet. Returns whether
    motion no longer rises.
    """
    config, over = parts.config, False
    last, due = done == config.iterations, _due(config, done)
    if due and gain is not None:
        records.held_out(gain.check(parts, done), done)
        over = parts.world.any(parts.world.main and gain.over)
    if due or save:
        save_checkpoint(run, done, parts.state(), config, parts.world)
    if config.sample_prompts and (last or done % config.sample_every == 0):
        sample_sheet(parts, run, done)
    return over


class _Records:
    """What the steps of an iteration measured, read at its end and written down by the first process."""

    def __init__(self, parts: Assembly, run: Path, start: int, begin: Begun):
        self.parts, self.run, self.start, self.begin = parts, run, start, begin
        self.clock = _Clock(parts.device)
        self.journal: Journal | None = None

    def write(self, learnt: list[tuple[Position, dict[str, Tensor]]]) -> dict[str, str]:
        """Read an iteration's numbers and note them; returns what the bar shows."""
        records, seconds, shown = read(self.parts, learnt), self.clock.read(), {}
        if self.parts.world.main and self.journal is None and records:
            self.begin()
            self.journal = Journal(self.run, self.start, self.parts.config)
        for (where, _), record, spent in zip(learnt, records, seconds, strict=True):
            update = self.parts.config.plan[where.update]
            shown[update.label] = f"{record['loss']:.3f}"
            if self.journal is not None:
                self.journal.write(where.iteration, update, where.repeat, record | spent)
        return shown

    def held_out(self, motion: float, done: int) -> None:
        """Draw the curve of motion on held-out prompts."""
        if self.journal is not None:
            self.journal.writer.add_scalar("held_out/motion", motion, done)

    def close(self) -> None:
        """Flush what was written."""
        if self.journal is not None:
            self.journal.close()


class _Clock:
    """How long each step took, by the device's own events: nothing waits for it before it is read."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.spans: list[tuple] = []

    def __enter__(self):
        self.began = self._now()

    def __exit__(self, *error):
        self.spans.append((self.began, self._now()))

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter(), time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self) -> list[dict[str, float]]:
        """Of each step since the last call, and on a CPU its core seconds: what others do on the machine does not count."""
        spans, self.spans = self.spans, []
        if not self.on_gpu:
            return [{"seconds": b[0] - a[0], "core_seconds": b[1] - a[1]} for a, b in spans]
        torch.cuda.synchronize(self.device)
        return [{"seconds": a.elapsed_time(b) / 1000} for a, b in spans]


def _tell_of_observations(parts: Assembly, start: int) -> None:
    for objective in parts.objectives.values():
        if objective.observations is not None:
            needed = drawn(parts.config, len(parts.cache), start)
            told = objective.observations.announce(needed, objective.observation_bytes)
            if told:
                print(told)
            return


def resume(parts: Assembly, run: Path) -> int:
    """Load the newest checkpoint of ``run`` into ``parts``; returns the iteration to start with.

    Raises:
        UserError: no checkpoint can be read, or it belongs to another run.
    """
    newest, broken = parts.world.from_main(lambda: (latest_checkpoint(run), broken_checkpoints(run)))  # all the same
    if newest is None:
        if broken:
            raise UserError(
                f"{broken[-1]} lacks its config.json and there is no other checkpoint: put back what was taken from it, or "
                "remove it to begin again"
            )
        if (noted := begins_again(run)) and parts.world.main:
            print(f"{run} notes {noted} iterations and has no checkpoint of them: it begins again")
        return 0
    if broken and parts.world.main:
        print(f"{broken[-1]} lacks its config.json and is not used: going on from {newest}")
    parts.prepare_to_load(stored(newest))
    load_checkpoint(newest, parts.state(), parts.world)
    return int(newest.name)


class _graceful_stop:
    """SIGTERM and SIGINT ask for a stop after the current iteration; a second one stops at once. It ``tells`` so.

    ``torchrun`` passes a Ctrl-C on to processes that have already got it: two within a second are one. ``code`` is what a
    process that it ended leaves with: 130 after SIGINT, 143 after SIGTERM. Signals are the main thread's: in another, as a notebook
    may start one, none is asked.
    """

    def __init__(self, tells: bool):
        self.tells = tells

    def __enter__(self):
        self.asked, self.code = 0.0, 128 + signal.SIGINT
        heeded = (signal.SIGTERM, signal.SIGINT) if current_thread() is main_thread() else ()
        self.old = {number: signal.signal(number, self._ask) for number in heeded}
        return self

    def _ask(self, number, frame):
        if self.asked and time.monotonic() > self.asked + 1:
            raise KeyboardInterrupt
        if self.tells and not self.asked:
            print("\nstopping after this iteration; once more stops at once, and loses it", file=sys.stderr)
        self.code = 128 + number
        self.asked = self.asked or time.monotonic()

    def __bool__(self):
        return self.asked > 0

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)
