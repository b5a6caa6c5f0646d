"""The main job at lab scale: videos in, a better-moving 3-step student and a report out."""

import shutil
import time
from pathlib import Path

from mogan.data.prepare import prepare
from mogan.disk.files import writable_folder, write_atomically
from mogan.evaluation.evaluate import evaluate
from mogan.exchange.export import export
from mogan.ranges import at_least, is_seed
from mogan.report.page import Background, write_page
from mogan.runs.checkpoint import student_checkpoint
from mogan.sampling.sample import sample
from mogan.training.train import train
from mogan.world.render import render
from mogan.world.scenes import captions

VIDEO_SEED, PROMPT_SEED = 11, 12


def demo(
    *,
    out: Path = Path("runs/demo"),
    clips: int = 192,
    iterations: int | None = None,
    prompts: int = 32,
    seeds: int = 2,
    seed: int = 0,
) -> None:
    """Post-train the shipped 3-step student with MoGAN on freshly rendered videos, and show what it changed.

    Renders a folder of clips that move, prepares it, trains, exports the student, samples teacher (50 steps), DMD student
    and MoGAN student (3 steps) on held-out prompts with the same seeds, evaluates, and writes report.html. About six
    minutes on two cores; the same command goes on where it stopped.

    Args:
        out: folder for everything.
        clips: videos to render.
        iterations: of training, in place of the recipe's.
        prompts: held-out prompts to sample.
        seeds: clips per prompt.
        seed: of the training run.
    """
    began = time.perf_counter()
    at_least(8, clips=clips)  # MoGAN's discriminator takes so many at a time
    at_least(1, iterations=iterations, prompts=prompts, seeds=seeds)
    is_seed(seed=seed)
    writable_folder(out)
    render(out=out / "videos", clips=clips, motion="rich", seed=VIDEO_SEED)
    prepare(out / "videos", out=out / "cache", motion_rich=True, min_motion=0.5)
    train("mogan_lab", data=out / "cache", out=out / "run", iterations=iterations, seed=seed)
    _forget_older_student(out)
    if not (out / "export").exists():
        export(out / "run", out=out / "export")
    held_out, _ = captions(PROMPT_SEED, prompts, motion="rich")
    write_atomically(out / "prompts.txt", "\n".join(held_out) + "\n")
    for name, model in (("teacher", "lab-teacher"), ("dmd", "lab"), ("mogan", str(out / "export"))):
        sample(prompts=out / "prompts.txt", out=out / "samples" / name, model=model, seeds=seeds)
    folders = tuple(Path(f"{name}={out / 'samples' / name}") for name in ("teacher", "dmd", "mogan"))
    render(out=out / "real", clips=prompts, motion="rich", seed=PROMPT_SEED)
    evaluate(folders, out=out / "results.json", reference=out / "real", quick=True)
    before = Background(against={"mogan": ("dmd", "teacher")})
    write_page((out / "results.json", out / "run"), out / "report.html", background=before)
    print(f"\nreport: {out / 'report.html'}\nexport: {out / 'export'} (opens in stock WanPipeline)")
    print(f"this call took {(time.perf_counter() - began) / 60:.1f} minutes")


def _forget_older_student(out: Path) -> None:
    """Remove the export, and its clips, that an earlier call made before the run went on with more iterations."""
    export_of_run, clips = out / "export", out / "samples" / "mogan"
    if export_of_run.exists() and export_of_run.stat().st_mtime < student_checkpoint(out / "run").stat().st_mtime:
        print(f"the run went on since {export_of_run} was made: exporting and sampling again")
        if clips.exists():  # before the export, by whose age a killed call knows what to do
            shutil.rmtree(clips)
        shutil.rmtree(export_of_run.rename(export_of_run.with_name(".tmp-export")))
