"""Commands with results on disk, run a few at a time, each once.

A job is an ordinary ``mogan`` command line that goes on where it stopped, so a study that is killed loses nothing: the
next call runs what is not done. Studies share one folder: what two of them need is done once.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread

from tqdm import tqdm

from mogan.disk.files import write_atomically
from mogan.errors import UserError


@dataclass(frozen=True)
class Job:
    """One command of a study.

    Attributes:
        name: unique; names its log and the file that says it is done.
        command: arguments of ``mogan``; the command must go on where it stopped, or refuse if its ``makes`` is there.
        after: names of jobs that must be done before.
        makes: what is there, whole, once it is done.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    makes: Path | None = None


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen
    places: int
    threads: int
    began: float = field(default_factory=time.perf_counter)


def told(job: Job, out: Path) -> str:
    """A job's command without the study's folder, which may be moved, or named otherwise."""
    return shlex.join(word.replace(f"{out}/", "") for word in job.command)


def run_jobs(jobs: list[Job], logs: Path, workers: int, on_done: Callable[[Job], None] = lambda job: None) -> None:
    """Run what is not done, ``workers`` at a time, the processor's cores shared between them: a job alone has them all.

    ``on_done`` is told of every job as soon as it is done, and at once of those that an earlier call has done.

    Raises:
        UserError: a command failed; the others that were running are stopped, and go on at the next call. Or an earlier
            call did the same job with other options.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done = {job.name for job in jobs if _is_done(job, logs)}
    waiting = [job for job in jobs if job.name not in done]
    running: dict[str, _Running] = {}
    idle, cores = workers, max(1, _cores() // workers)  # places for jobs, and the cores of each
    try:
        with (
            _alone(logs) as lock,
            _stopped_by_sigterm(),
            tqdm(total=len(jobs), initial=len(done), desc="study", unit="job", smoothing=0) as bar,
        ):
            for job in jobs:
                if job.name in done:
                    on_done(job)
            while waiting or running:
                ready = [job for job in waiting if set(job.after) <= done][:idle]
                for left, job in zip(range(len(ready), 0, -1), ready, strict=True):
                    waiting.remove(job)
                    places = idle // left
                    idle -= places
                    threads = places * cores
                    running[job.name] = _Running(job, _start(job, logs, threads, lock), places, threads)
                for name, one in list(running.items()):
                    if one.process.poll() is None:
                        continue
                    del running[name]
                    idle += one.places
                    _charge(one, logs)
                    if one.process.returncode:
                        raise UserError(_failure(one.job, logs))
                    write_atomically(logs / f"{name}.done", told(one.job, logs.parent) + "\n")
                    done.add(name)
                    on_done(one.job)
                    bar.update()
                names = ", ".join(running)
                bar.set_postfix_str(names, refresh=names != bar.postfix or sys.stderr.isatty())
                time.sleep(0.5)
    finally:
        for one in running.values():
            one.process.terminate()  # training saves first
        for one in running.values():
            one.process.wait()
            _charge(one, logs)


def core_seconds(jobs: list[Job], logs: Path) -> float:
    """Seconds that jobs have run, over all calls and times the cores each was given."""
    paths = [logs / f"{job.name}.core_seconds" for job in jobs]
    return sum(float(line) for path in paths if path.is_file() for line in path.read_text().splitlines())


def _charge(one: _Running, logs: Path) -> None:
    with (logs / f"{one.job.name}.core_seconds").open("a") as file:
        file.write(f"{one.threads * (time.perf_counter() - one.began):.1f}\n")


@contextmanager
def _alone(logs: Path) -> Iterator[tuple[int, ...]]:
    """Studies share jobs, so two in one folder would do them twice, each in the other's files.

    Yields what jobs inherit: they hold the lock too, since the jobs of a study that was killed run on.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows: the user's care
        yield ()
        return
    with (logs / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another study, or a job that a killed one left, is running in {logs.parent}: wait for it, or give another --out"
            ) from error
        yield (file.fileno(),)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """A study that is asked to end stops its jobs first, as on Ctrl-C."""

    def stop(*_: object) -> None:
        raise SystemExit("stopped; the same command goes on from there")

    if current_thread() is not main_thread():  # which alone may set them
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_done(job: Job, logs: Path) -> bool:
    mark = logs / f"{job.name}.done"
    if not mark.is_file():
        return job.makes is not None and job.makes.exists()
    older = shlex.join(job.command)  # as marks were written before
    if mark.read_text().strip() not in (told(job, logs.parent), older):
        raise UserError(f"{job.name} was done with other options (see {mark}): give another --out, or the same options")
    return True


def _cores() -> int:
    """Cores that this process may use, where the system says; else those there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(job: Job, logs: Path, threads: int, inherits: tuple[int, ...]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (logs / f"{job.name}.log").open("a") as log:
        log.write(f"$ mogan {shlex.join(job.command)}\n")
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "mogan", *job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=inherits,
        )


def _failure(job: Job, logs: Path) -> str:
    log = logs / f"{job.name}.log"
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "nothing was printed"
    return f"{job.name} failed: {last} (all of it in {log}); the same command goes on from there"
