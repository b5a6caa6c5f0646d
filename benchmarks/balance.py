"""How the gradients of the student's two updates in MoGAN grow with the size of a clip.

The lab's networks draw, judge and observe clips of other sizes than theirs, as they are. For every size: the norm of the DMD
and of the motion loss's gradient with respect to a sample (per clip) and to the student's parameters (of the recipe's batch),
over the steps of the rollout; and how long Adam's steps are when both share its moments, in units of steps with own moments.

    python benchmarks/balance.py --data runs/demo/cache --run runs/demo/run
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from mogan.config import Update
from mogan.data.cache import open_cache
from mogan.models.attention import stack_text
from mogan.recipes import find_recipe
from mogan.runs.checkpoint import checkpoints, load_checkpoint
from mogan.sampling.rollout import normal, roll_out
from mogan.training.assemble import Assembly, assemble
from mogan.training.steps import Position, draw

SIZES = ((5, 64, 3), (5, 128, 3), (9, 64, 5), (9, 128, 5))  # latent frames, pixels of a side, latent frames observed


def norms(parts: Assembly, update: Update, where: Position, exit_step: int) -> tuple[float, float]:
    """Of one loss's gradient: with respect to a sample (root mean square over clips), and to the student's parameters."""
    batch = draw(parts, where)
    seeds = where.generators(2, batch)
    noise = normal(torch.Size((len(seeds), *parts.latent_shape)), seeds, parts.device)
    text = stack_text(batch.text, parts.device)
    rollout = roll_out(parts.student, noise, text, parts.config.sigmas, seeds, exit_step=exit_step, grad=True)
    loss, _ = parts.objectives[update.by].losses["student"](rollout, batch, where.generators(3, batch))
    learned = [p for p in parts.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [rollout.sample_BCFHW, *learned], allow_unused=True)
    sample, *parameters = (g for g in found if g is not None)
    of_clips = len(sample) * sample.flatten(1).norm(dim=1)  # the loss is a mean over clips
    return of_clips.square().mean().sqrt().item(), torch.stack([g.norm() for g in parameters]).norm().item()


def resize(parts: Assembly, frames: int, side: int, window: int) -> None:
    """Let the run's clips be of another size."""
    channels, _, height, _ = parts.latent_shape
    of_latents = height * side // parts.geometry.height
    parts.latent_shape = (channels, frames, of_latents, of_latents)
    parts.geometry = dataclasses.replace(parts.geometry, height=side, width=side)
    parts.objectives["gan"].judge.observe = dataclasses.replace(parts.objectives["gan"].judge.observe, window=window)


def rms(values: list[float]) -> float:
    """Root mean square."""
    return Tensor(values).square().mean().sqrt().item()


def main() -> None:
    """Print a row per state of the run and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/demo/cache"), help="a cache of the lab")
    parser.add_argument("--run", type=Path, help="of mogan_lab: its checkpoints are measured, not the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    config = dataclasses.replace(find_recipe("mogan_lab"), precision="fp32")
    config = config.changed("gan", starts=(0,))
    parts = assemble(config, open_cache(arguments.data), model="lab", run=None, device="cpu")
    print(f"seed {arguments.seed}, batch {arguments.batch}, fp32\n")
    print(
        "| iteration | latent frames | side, px | numbers | sample: DMD | motion | student: DMD | motion | ratio | one Adam's step, DMD | motion |"
    )
    print("|" + "---|" * 11)
    for path in checkpoints(arguments.run) if arguments.run else (None,):
        if path is not None:
            load_checkpoint(path, parts.state())
        for frames, side, window in SIZES:
            resize(parts, frames, side, window)
            found = {}
            for number, update in enumerate(config.plan):
                if update.learns == "student":
                    one = dataclasses.replace(update, batch=arguments.batch)
                    steps = range(len(config.sigmas))
                    pairs = [norms(parts, one, Position(arguments.seed, s, number, 0), s) for s in steps]
                    found[update.by] = [rms(list(column)) for column in zip(*pairs, strict=True)]
            dmd, motion = found["dmd"], found["gan"]
            ratio = motion[1] / dmd[1]
            together = (2 / (1 + ratio**2)) ** 0.5
            row = [path.name.lstrip("0") if path else "0", frames, side, torch.Size(parts.latent_shape).numel()]
            values = (dmd[0], motion[0], dmd[1], motion[1], ratio, together, ratio * together)
            print("| " + " | ".join([*map(str, row), *(f"{v:.3g}" for v in values)]) + " |", flush=True)


if __name__ == "__main__":
    main()
