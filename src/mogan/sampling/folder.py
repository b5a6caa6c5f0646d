"""A folder of clips: how they are called, which of them it lacks, and filling it."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mogan.data.lists import printable
from mogan.data.tasks import Task
from mogan.data.video import write_video
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.sampling.samples import append_samples, listed_samples, refuse_others


@dataclass(frozen=True)
class Job:
    """One clip to make: ``index`` counts the clips of a prompt from 0, those of its seeds and, in a list of tasks, of its rows."""

    prompt: str
    index: int
    seed: int
    task: Task | None = None

    @property
    def file(self) -> str:
        """VBench's name, ``{prompt}-{index}.mp4``."""
        return f"{safe_name(self.prompt)}-{self.index}.mp4"

    def told(self, folder: Path) -> dict:
        """As ``samples.jsonl`` in ``folder`` has it."""
        own = {"file": self.file, "prompt": self.prompt, "index": self.index, "seed": self.seed}
        return own | (self.task.told(folder) if self.task else {})


def safe_name(prompt: str) -> str:
    """A prompt as a file name: the prompt itself, path separators replaced, cut to what file systems take."""
    name = prompt.replace("/", "_").replace("\0", "").strip() or "empty"
    return name.encode()[:240].decode(errors="ignore")


def jobs_of(prompts: list[str], seeds: int, first_seed: int, tasks: list[tuple[str, Task]] | None = None) -> list[Job]:
    """Clips of every prompt and seed, in order; of a list of tasks those of every row.

    Raises:
        UserError: two prompts would have clips of one name.
    """
    jobs, made = [], Counter[str]()
    for prompt, task in tasks or zip(prompts, [None] * len(prompts), strict=True):
        jobs += [Job(prompt, made[prompt] + k, first_seed + k, task) for k in range(seeds)]
        made[prompt] += seeds
    prompt_of: dict[str, str] = {}
    for job in jobs:
        if prompt_of.setdefault(job.file, job.prompt) != job.prompt:
            raise UserError(f"two prompts would both be called {job.file[:60]}...: sample them into different folders")
    return jobs


def fill(
    out: Path,
    wanted: list[Job],
    shard: str | None,
    about_all: dict,
    batch: int,
    maker: Callable[[list[str]], Callable],
) -> None:
    """Make the clips that a folder lacks of a shard's; ``maker`` loads what makes them of these prompts.

    Raises:
        UserError: clips lie there that no line lists.
    """
    listed, jobs = listed_samples(out), share_of(wanted, shard)

    def record(job: Job) -> dict:
        return json.loads(json.dumps(job.told(out) | about_all))  # as it is read again

    there = {job for job in jobs if _holds_something(out / job.file)}
    if strange := [job.file for job in jobs if job in there and job.file not in listed]:
        raise UserError(
            f"{out} holds {len(strange)} of these clips in no line of samples.jsonl, first {strange[0][:60]}, so nobody knows "
            "what made them: move them away, or give another --out"
        )
    made = {file: row for file, row in listed.items() if (out / file).is_file()}
    if jobs:
        refuse_others(out, made, [record(job) for job in jobs])
    _tell_of_other_prompts(out, made, {job.prompt for job in wanted})
    todo = [job for job in jobs if job not in there]
    if not todo:
        print(f"{out}: all {len(jobs)} clips are there" if jobs else f"{out}: this shard has no clip to make")
        return
    make = maker([job.prompt for job in todo])
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=f"sample {out.resolve().name}", unit="clip") as bar:
        for first in range(0, len(todo), batch):
            part = todo[first : first + batch]
            for job, frames in zip(part, make(part), strict=True):
                if listed.get(job.file) != record(job):  # before the clip: a kill leaves no clip that no line names
                    append_samples(out, [record(job)])
                write_video(out / job.file, frames, about_all["fps"])
                bar.update()


def _holds_something(file: Path) -> bool:
    """Whether a clip is there, and not the empty file of a copy that was stopped."""
    return file.is_file() and file.stat().st_size > 0


def _tell_of_other_prompts(out: Path, made: dict[str, dict], prompts: set[str]) -> None:
    others = [file for file, row in made.items() if row.get("prompt") not in prompts]
    if others:
        print(
            f"{out} also holds {len(others)} clips of other prompts, such as {printable(others[0][:60])}: `mogan evaluate` "
            "measures all, so move away those that are not meant"
        )
