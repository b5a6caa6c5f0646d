"""Does fine-tuning cost an image-to-video model its motion, does SHIFT give it back, do its rewards need refreshing?

The lab's teacher is made image-conditioned by supervised fine-tuning (SFT) on clips that move; then three runs start from
that model: SHIFT, SHIFT whose rewards stay as they were after their warm-up, and more SFT with as many updates. All are
sampled from the first frames of held-out clips and measured; the time of a student update comes from the runs' logs.
Killed and started again it goes on where it stopped.

    python benchmarks/shift_lab.py --out runs/shift          # about 20 minutes of one core
    python benchmarks/shift_lab.py --out /tmp/shift --tiny   # does it run at all
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from tqdm import tqdm

from mogan import attention, autoencoder, wan
from mogan.assemble import assemble
from mogan.checkpoint import check_same_run
from mogan.clips import to_video
from mogan.config import Config
from mogan.data import open_cache
from mogan.denoiser import Denoiser
from mogan.evaluation.motion import dynamic_degree
from mogan.export import export
from mogan.files import write_atomically
from mogan.lab.instruments import read_instruments
from mogan.lab.render import render
from mogan.lab.world import FPS, Scene, make_scene
from mogan.lab.world import render as draw_scene
from mogan.prepare import prepare
from mogan.recipes import sft_i2v_lab, shift_lab
from mogan.rollout import animate, normal
from mogan.sample import open_generator, seeded, to_frames
from mogan.train import run_training

TRAIN_SEED, HELD_OUT_SEED = 31, 32
INSTRUMENTS = ("speed", "net", "wobble", "physics", "identity", "shape")


def train(config: Config, cache: Path, run: Path, student: Path | None) -> Path:
    """What `mogan train` does, for a config that is no named recipe; returns the student's export."""
    out = run / "export"
    if not out.exists():
        run.mkdir(parents=True, exist_ok=True)
        check_same_run(run, config)
        parts = assemble(config, open_cache(cache), model="lab", student=student and str(student), run=run)
        write_atomically(run / "config.json", json.dumps(asdict(config)) + "\n")
        write_atomically(run / "run.json", json.dumps(parts.facts) + "\n")
        run_training(parts, run)
        export(run, out=out)
    return out


@torch.no_grad()
def sampled(model: Path | str, scenes: list[Scene], config: Config, batch: int = 8) -> list[np.ndarray]:
    """One clip per scene, from its first frame and caption, by the recipe's own sampler."""
    folder = open_generator(str(model)).folder
    vae, encode = wan.load_vae(folder), wan.load_text(folder)
    denoiser = Denoiser(wan.load_transformer(folder).eval())
    clips: list[np.ndarray] = []
    for first in tqdm(range(0, len(scenes), batch), desc=f"sample {model}", unit="batch"):
        part = scenes[first : first + batch]
        given = autoencoder.encode_video(vae, torch.cat([to_video(draw_scene(s)[:1]) for s in part]))
        text = attention.stack_text(encode([s.caption for s in part]))
        shape = wan.latent_shape(folder, wan.geometry(folder))
        noise = normal(torch.Size((len(part), *shape)), seeded([first + i for i in range(len(part))]), "cpu")
        clips += list(
            to_frames(autoencoder.decode_video(vae, animate(denoiser, noise, given, text, text, config.sigmas, 1.0)))
        )
    return clips


def measured(clips: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """Means over clips: VBench's dynamic degree with the lab's flow network, and the lab's flow-free instruments."""
    flow = wan.load_flow("lab", 6)
    rows = [read_instruments(c, s.caption) for c, s in zip(clips, scenes, strict=True)]
    degree = mean(dynamic_degree(iter(c), FPS, flow).decision for c in tqdm(clips, desc="measure", unit="clip"))
    found = {k: [r[k] for r in rows if np.isfinite(r[k])] for k in INSTRUMENTS}
    return {"dynamic_degree": degree} | {k: mean(v) for k, v in found.items() if v}  # absent: no subject was found


def logged(run: Path) -> dict[str, float | list[float]]:
    """Seconds per student update, everything of the run after the warm-up counted, and how rewards went."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    students = [line for line in lines if line["update"].startswith("student")]
    from_first = [line for line in lines if line["iteration"] >= students[0]["iteration"]]
    rewards = {
        k: [line[k] for line in students if line["repeat"] == 0]
        for k in ("reward", "real_reward", "motion")
        if k in students[0]
    }
    return {"seconds_per_update": sum(line["seconds"] for line in from_first) / len(students)} | rewards


def main() -> None:
    """Run what is missing, print a table, write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=96, help="to train on")
    parser.add_argument("--prompts", type=int, default=24, help="held-out first frames")
    parser.add_argument("--sft", type=int, default=300, help="iterations that make the teacher image-conditioned")
    parser.add_argument("--iterations", type=int, default=20, help="of SHIFT, its warm-up of 8 included")
    parser.add_argument("--weight", choices=("exp", "linear"), default="exp")
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    if a.tiny:
        a.clips, a.prompts, a.sft, a.iterations = 8, 2, 1, 2
    render(out=a.out / "videos", clips=a.clips, motion="rich", seed=TRAIN_SEED)
    cache = a.out / "cache"
    if not (cache / "index.jsonl").is_file():
        prepare(a.out / "videos", out=cache)

    sft = replace(sft_i2v_lab(), plan=(replace(sft_i2v_lab().plan[0], batch=8),), sample_prompts=0)
    shift = replace(shift_lab(), iterations=a.iterations, sample_prompts=0)
    shift = replace(shift, shift=replace(shift.shift, weight=a.weight))
    warm, student, refresh = shift.plan
    if a.tiny:
        warm, student = replace(warm, times=1, batch=2, stop=1), replace(student, times=1, batch=2, start=1)
        refresh = replace(refresh, times=1, batch=2, start=1)
        shift = replace(shift, sigmas=(1.0, 0.5), plan=(warm, student, refresh))
    updates = student.times * (a.iterations - student.start)
    frozen = replace(shift, recipe="shift_lab_frozen", plan=(warm, student))

    base = train(replace(sft, iterations=a.sft), cache, a.out / "sft", None)
    models: dict[str, Path | str] = {"teacher, first frame given": "lab-teacher", "sft": base}
    for name, config in (("shift", shift), ("shift_frozen", frozen), ("sft_more", replace(sft, iterations=updates))):
        models[name] = train(config, cache, a.out / name, base)

    path = a.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    scenes = [make_scene(HELD_OUT_SEED, i, motion="rich") for i in range(a.prompts)]
    for name, model in {"real": None, **models}.items():
        if name not in results:
            clips = sampled(model, scenes, shift) if model else [draw_scene(s) for s in scenes]
            results[name] = measured(clips, scenes)
            if name in ("shift", "shift_frozen", "sft_more"):
                results[name] |= logged(a.out / name)
            write_atomically(path, json.dumps(results, indent=2) + "\n")
    columns = ("dynamic_degree", *INSTRUMENTS, "seconds_per_update")
    print(f"{'':<28}" + "".join(f"{c:>19}" for c in columns))
    for name, row in results.items():
        print(f"{name:<28}" + "".join(f"{row.get(c, float('nan')):>19.3f}" for c in columns))
    cost = results["shift"]["seconds_per_update"] / results["sft_more"]["seconds_per_update"]
    print(f"a SHIFT update costs {cost:.2f} times an SFT update on as many real clips (paper, per epoch: 2.46)")


if __name__ == "__main__":
    main()
