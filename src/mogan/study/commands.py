"""The columns of a study as jobs: render, prepare, train, export, sample, measure; each an ordinary ``mogan`` command."""

from dataclasses import replace
from pathlib import Path

from mogan.study.columns import Column
from mogan.study.jobs import Job

TRAIN_SEED, PROMPT_SEED, RICH_SEED, WORLD_SEED = 21, 22, 23, 24  # worlds: no training sees the last three
TRAIN_VIDEOS, REFERENCE = 512, 256


def shared_jobs(out: Path, held_out: int | None = None) -> list[Job]:
    """What all columns need: captions, videos and their cache; and for image to video the first so many clips of the
    world that the held-out prompts come from.
    """
    cache = ("prepare", str(out / "videos"), "--out", str(out / "cache"), "--motion-rich", "--min-motion", "0.5")
    states = ("prepare", str(out / "states_videos"), "--out", str(out / "states"))
    paths = ("trajectories", "--prompts", str(out / "paths.txt"), "--steps", "48", "--keep", "0,16,32,48")
    return [
        Job("captions", ("prepare", str(out / "captions.txt"), "--out", str(out / "captions"))),
        _render(out, "videos", TRAIN_VIDEOS, "rich", TRAIN_SEED),
        Job("cache", cache, after=("videos",)),
        Job("paths", (*paths, "--out", str(out / "paths"))),
        _render(out, "states_videos", TRAIN_VIDEOS, "states", TRAIN_SEED),
        Job("states", states, after=("states_videos",)),
        *([_render(out, "held_out", held_out, "rich", PROMPT_SEED)] if held_out else []),
    ]


def reference_jobs(out: Path) -> list[Job]:
    """The two sets of real clips that every table is held against; nothing else waits for them."""
    return [
        _render(out, "rich", REFERENCE, "rich", RICH_SEED),
        _render(out, "world", REFERENCE, "all", WORLD_SEED),
        *(Job(f"{n}-measure", _evaluate(out / n, out / f"{n}.json"), after=(n,)) for n in ("rich", "world")),
    ]


def _render(out: Path, name: str, clips: int, motion: str, seed: int) -> Job:
    options = ("--clips", str(clips), "--motion", motion, "--seed", str(seed))
    return Job(name, ("lab", "render", "--out", str(out / name), *options))


def jobs_of(column: Column, seed: int, out: Path, clips: int, iterations: int | None) -> list[Job]:
    """Train, export, sample and measure one column with one training seed."""
    home, mark = out / column.name / f"seed{seed}", f"{column.name}-{seed}"
    jobs: list[Job] = []
    after_sample: list[str] = []
    model = "lab-teacher"
    if column.recipe is not None:
        data = ["--data", str(out / column.data)]
        train = ["train", column.recipe, *data, "--out", str(home / "run"), "--seed", str(seed)]
        after = [column.data]
        if column.start is not None:
            jobs, start, last = _begin(column, seed, out)
            train += ["--student", str(start), *_filled(column.training, column, seed, out)]
            after.append(last)
        train += ["--iterations", str(iterations)] if iterations else []
        jobs.append(Job(f"{mark}-train", tuple(train), after=tuple(after)))
        model = str(home / "export")
        export = ("export", str(home / "run"), "--out", model, *column.keeps)
        jobs.append(Job(f"{mark}-export", export, after=(f"{mark}-train",), makes=home / "export" / "model_index.json"))
        after_sample = [f"{mark}-export"]
    elif column.start is not None:  # another column's student, sampled otherwise
        model, after_sample = str(out / column.start / f"seed{seed}" / "export"), [f"{column.start}-{seed}-export"]
    sample = ["sample", "--prompts", str(out / "held_out.txt"), "--out", str(home / "samples"), "--model", model]
    sample += ["--seeds", str(clips), *column.sampling]
    if column.first_frames:
        sample += ["--first-frames", str(out / "held_out")]
        after_sample.append("held_out")
    jobs.append(Job(f"{mark}-sample", tuple(sample), after=tuple(after_sample)))
    measure = _evaluate(home / "samples", home / "results.json")
    return [*jobs, Job(f"{mark}-measure", measure, after=(f"{mark}-sample",))]


def _begin(column: Column, seed: int, out: Path) -> tuple[list[Job], Path, str]:
    """The commands before training, the folder it starts from, and the job that it waits for."""
    home, start = out / column.name / f"seed{seed}", out / str(column.start) / f"seed{seed}" / "export"
    jobs: list[Job] = []
    last = f"{column.start}-{seed}-export"
    for words in column.before:
        command = _filled(words, column, seed, out)
        job = Job(f"{column.name}-{seed}-start-{command[0]}", command, after=(last,))
        jobs.append(job)
        last = job.name
    if jobs:  # a folder is not written over: what is there is whole
        jobs[-1] = replace(jobs[-1], makes=home / "start")
    return jobs, home / "start" if jobs else start, last


def _filled(words: tuple[str, ...], column: Column, seed: int, out: Path) -> tuple[str, ...]:
    """The words of a column's own with the folders that they name."""
    before = out / str(column.start) / f"seed{seed}"
    places = {"start": before / "export", "run": before / "run", "home": out / column.name / f"seed{seed}", "out": out}
    return tuple(word.format(**places, seed=seed) for word in words)


def _evaluate(folder: Path, out: Path) -> tuple[str, ...]:
    return ("evaluate", str(folder), "--out", str(out), "--quick")
