"""``mogan study``: render, prepare, train every column with every seed, sample, measure, and write the table."""

import json
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from mogan.data.lists import read_prompts
from mogan.disk.files import from_json, writable_folder, write_atomically
from mogan.errors import UserError, closest
from mogan.ranges import SEEDS, at_least, between
from mogan.report.page import Background, write_page
from mogan.study.bars import bars
from mogan.study.collect import combine, markdown, minus
from mogan.study.columns import MOGAN, Column, table1, table2
from mogan.study.commands import PROMPT_SEED, TRAIN_SEED, jobs_of, reference_jobs, shared_jobs
from mogan.study.cost import Cell, Trained, iterations_that_fit, training
from mogan.study.figure import draw
from mogan.study.jobs import Job, core_seconds, run_jobs
from mogan.study.measured import Measured, keep_measured, path_of, read_measured, records
from mogan.study.methods import methods
from mogan.study.signatures import signatures
from mogan.world.scenes import captions

STUDIES = {"table1": table1, "table2": table2, "methods": methods, "signatures": signatures}
TITLES = {  # of their reports
    "table1": "MoGAN's Table 1, in the laboratory",
    "table2": "MoGAN's Table 2: one part changed at a time",
    "methods": "Methods, at equal student updates",
    "signatures": "What the methods claim",
}
TRAIN_PROMPTS, PATHS, FEW = 4000, 512, 8  # to train on, for the teacher's paths, for an analysis of attention


def study(
    name: tyro.conf.Positional[Literal["table1", "table2", "methods", "signatures"]],
    *,
    out: Path = Path("runs/study"),
    seeds: int = 3,
    first_seed: int = 0,
    column: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    prompts: int = 128,
    clips: int = 5,
    iterations: int | None = None,
    workers: int = 2,
) -> None:
    """Repeat a table of the paper in the laboratory, or compare methods, with training seeds and intervals.

    Every column is trained with every seed, sampled on the same held-out prompts and seeds, and measured; the table, its
    figure and a report with clips are written into OUT under the study's name. Studies share OUT: the videos, and every
    column that two of them have, are made once. Stop it at any time: the same command goes on. The whole takes hours, one
    column half an hour: `--column mogan --seeds 1`. Machines can share the work, each with a `--first-seed` of its own:
    copy the others' OUT/COLUMN/seedN.json.gz into one OUT, and what they hold is not done again.

    Args:
        name: table1 (teacher, FlowMo, DMD, MoGAN), table2 (MoGAN with one part or setting changed), methods (every system
            of this package at equal student updates, some at equal seconds, and MoGAN on top of other students) or signatures
            (what the papers of other methods claim, each with the arms that would show it).
        out: folder for everything, the same for all studies.
        seeds: training seeds.
        first_seed: the first of them.
        column: only this column, and those it needs; may be given several times.
        prompts: held-out prompts.
        clips: clips per prompt, with seeds 0, 1, 2 ...
        iterations: of training, in place of the recipes'.
        workers: commands run at a time; the cores are shared between them.
    """
    at_least(1, prompts=prompts, iterations=iterations)
    between(1, 1000, seeds=seeds, clips=clips, workers=workers)
    between(0, SEEDS - seeds, first_seed=first_seed)
    writable_folder(out)
    columns = chosen(STUDIES[name](), column)
    scenes = write_prompts(out / "held_out.txt", PROMPT_SEED, prompts, "rich")
    for what, count in (("captions", TRAIN_PROMPTS), ("paths", PATHS), ("few", FEW)):
        write_prompts(out / f"{what}.txt", TRAIN_SEED, count, "all")
    numbers = range(first_seed, first_seed + seeds)
    shared = shared_jobs(out, scenes if any(c.first_frames for c in columns) else None)
    references = reference_jobs(out)

    def make(column: Column, seed: int, count: int | None) -> list[Job]:
        return jobs_of(column, seed, out, clips, iterations or count)

    def run(left: list[Job], on_done: Callable[[Job], None]) -> None:
        run_jobs(needed(shared, left) + left + references, out / "logs", workers, on_done)

    measured = measure_all(columns, numbers, out, make, run)
    seconds = core_seconds(shared + references, out / "logs") + sum(found.core_seconds for found in measured.values())
    systems = collect(columns, numbers, measured, out)
    results: dict[str, Any] = {"systems": systems, "bars": []}
    if name.startswith("table"):  # the paper's expect something
        results["bars"] = [vars(bar) for bar in bars(systems)]
    results["how"] = {
        "command": f"mogan study {shlex.join(sys.argv[2:])}" if sys.argv[1:2] == ["study"] else f"mogan study {name}",
        "sentence": f"{seeds} training seed{'s' if seeds > 1 else ''}, {prompts} held-out prompts, {clips} clips each; its jobs, those that other "
        f"studies share included, took {seconds / 60:.0f} core-minutes ({platform.machine()}).",
        "core_minutes": seconds / 60,
    }
    write_atomically(out / f"{name}.json", json.dumps(results, indent=1) + "\n")
    page = markdown(TITLES[name], results)
    write_atomically(out / f"{name}.md", page)
    draw(systems, out / f"{name}.png")
    print(page)
    print(f"written to {out}/{name}.json, .md and .png")
    if here := sampled_here(columns, numbers, out):
        clips_file = out / f"{name}.results.json"
        write_clips(here, clips_file)
        runs = [out / home / "run" for column, home in here if column.recipe]
        write_page((clips_file, *runs), out / f"{name}.html", title=TITLES[name], background=background(name, here))
        print(f"clips in {out}/{name}.html")


def chosen(columns: tuple[Column, ...], names: tuple[str, ...]) -> tuple[Column, ...]:
    """The named columns and those they need; all, if none is named. Raises UserError if one is not there."""
    known = {c.name: c for c in columns}
    unknown = [n for n in names if n not in known]
    if unknown:
        hint = closest(unknown[0], known) or f": the study has {', '.join(known)}"
        raise UserError(f"no column {unknown[0]!r}{hint}")
    wanted = set(names or known)
    while more := {n for name in wanted for n in known[name].needs} - wanted:
        wanted |= more
    return tuple(c for c in columns if c.name in wanted)


def seeds_of(column: Column, numbers: range) -> list[int]:
    """Training seeds of a column; what is not trained has one."""
    return list(numbers) if column.recipe or column.start else [0]


def write_prompts(path: Path, seed: int, count: int, motion: str) -> int:
    """So many different captions of a world, one a line; returns how many of its scenes hold them.

    Raises:
        UserError: the file was written for other numbers.
    """
    found, scenes = captions(seed, count, motion=motion)
    text = "\n".join(found) + "\n"
    if path.is_file() and path.read_text() != text:
        raise UserError(f"{path} was written for other numbers: give another --out, or the same --prompts")
    write_atomically(path, text)
    return scenes


# ---------------------------------------------------------------------------------------------- measured


def measure_all(
    columns: tuple[Column, ...],
    numbers: range,
    out: Path,
    make: Callable[[Column, int, int | None], list[Job]],
    run: Callable[[list[Job], Callable[[Job], None]], None],
) -> dict[Cell, Measured]:
    """Do what is not done, and gather every column and training seed, each into its file as soon as it is measured.

    ``make`` gives the jobs of a column, a seed and a number of iterations; ``run`` does them and what they need, and tells
    of each that is done.
    """
    known = {c.name: c for c in columns}
    jobs: dict[Cell, list[Job]] = {}
    measured: dict[Cell, Measured] = {}

    def keep(done: Job) -> None:
        for (name, seed), own in jobs.items():
            if own[-1] == done and (name, seed) not in measured:
                path, home = path_of(out, name, seed), out / name / f"seed{seed}"
                measured[name, seed] = keep_measured(path, home, out, own)

    for timed in sorted({bool(c.as_long_as) for c in columns}):  # what others take is known before some train as long
        trained = trainings(measured)
        for column in (c for c in columns if bool(c.as_long_as) == timed):
            for seed in seeds_of(column, numbers):
                count = iterations_that_fit(column, seed, known, trained) if timed else column.iterations
                jobs[column.name, seed] = make(column, seed, count)
        measured |= read_all({cell: own for cell, own in jobs.items() if cell not in measured}, out)
        run(left_to_do(jobs, set(measured), known), keep)
    return measured


def read_all(jobs: dict[Cell, list[Job]], out: Path) -> dict[Cell, Measured]:
    """What was measured before, here or where its file was copied from."""
    prompts = set(read_prompts(out / "held_out.txt"))
    found = {(n, s): read_measured(path_of(out, n, s), out, own, prompts) for (n, s), own in jobs.items()}
    return {cell: measured for cell, measured in found.items() if measured}


def trainings(measured: dict[Cell, Measured]) -> Trained:
    """How what is trained was trained."""
    return {cell: found.training for cell, found in measured.items() if found.training}


def left_to_do(jobs: dict[Cell, list[Job]], measured: set[Cell], known: dict[str, Column]) -> list[Job]:
    """Jobs of what is not measured, and of the students that it starts from, in an order that they can run in."""
    starts = set()
    for name, seed in jobs.keys() - measured:
        while (start := known[name].start) is not None:
            starts.add((start, seed))
            name = start
    to_train = {job.name for cell in starts for job in jobs[cell][:-2]}  # without sampling and measuring
    return [j for cell, own in jobs.items() for j in own if cell not in measured or j.name in to_train]


def needed(shared: list[Job], left: list[Job]) -> list[Job]:
    """The shared jobs that these wait for."""
    names = set().union(*(job.after for job in left))
    for job in reversed(shared):
        names |= set(job.after) if job.name in names else set()
    return [job for job in shared if job.name in names]


# ---------------------------------------------------------------------------------------------- collect


def collect(columns: tuple[Column, ...], numbers: range, measured: dict[Cell, Measured], out: Path) -> dict[str, Any]:
    """Everything measured, by system, as in ``results.json``, with ``per_seed`` and what training took."""
    rich, world = (records(out / name, out / f"{name}.json") for name in ("rich", "world"))
    trained = trainings(measured)
    systems, known = {}, {c.name: c for c in columns}
    clips_of = {c.name: {str(s): measured[c.name, s].clips for s in seeds_of(c, numbers)} for c in columns}
    for column in columns:
        clips = clips_of[column.name]
        systems[column.name] = combine(column, clips, rich, world) | {"first_frames": column.first_frames}
        systems[column.name] |= {"calls": column.calls} | sampling(measured, column.name)
        bases = [base for base in column.against if base != column.name and base in clips_of]
        systems[column.name] |= {f"minus_{base}": minus(clips, clips_of[base]) for base in bases}
        if column.recipe:
            systems[column.name] |= training(column, seeds_of(column, numbers), known, trained)
    return systems


def sampling(measured: dict[Cell, Measured], name: str) -> dict[str, float]:
    """Core-seconds for a clip, mean over training seeds; nothing where they were not kept."""
    found = [(m.sampling, len(m.clips)) for (column, _), m in measured.items() if column == name and m.sampling]
    return {"seconds_a_clip": sum(s for s, _ in found) / sum(clips for _, clips in found)} if found else {}


def sampled_here(columns: tuple[Column, ...], numbers: range, out: Path) -> list[tuple[Column, Path]]:
    """Columns with clips in this folder, each with that of its first training seed that has them, relative to ``out``."""
    found = []
    # the report holds systems against its first
    for column in sorted(columns, key=lambda column: column.name != MOGAN.name):
        homes = (Path(column.name) / f"seed{seed}" for seed in seeds_of(column, numbers))
        home = next((home for home in homes if (out / home / "results.json").is_file()), None)
        found += [(column, home)] if home else []
    return found


def background(name: str, here: list[tuple[Column, Path]]) -> Background:
    """What the report says of its clips' training seeds, where the table with all of them is, and what columns are held against."""
    by_seed: dict[str, list[str]] = {}
    for column, home in here:
        if column.recipe or column.start:
            by_seed.setdefault(home.name.removeprefix("seed"), []).append(column.name)
    most, *others = sorted(by_seed, key=lambda seed: -len(by_seed[seed])) or ["0"]
    besides = "".join(f" (of {', '.join(by_seed[seed])}: {seed})" for seed in others)
    note = f"Clips and numbers of training seed {most}{besides}, with intervals over prompts alone; the table with all seeds is"
    return Background(note, f"{name}.md", {column.name: column.against for column, _ in here})


def write_clips(here: list[tuple[Column, Path]], path: Path) -> None:
    """A ``results.json`` with the clips of these columns, for the report."""
    systems = {}
    for column, home in here:
        found = from_json((path.parent / home / "results.json").read_text())["systems"]["samples"]
        clips = [clip | {"file": str(home / clip["file"])} for clip in found["clips"]]
        systems[column.name] = found | {"clips": clips}
    write_atomically(path, json.dumps({"systems": systems}, indent=1) + "\n")
