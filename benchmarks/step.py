"""Time of one MoGAN iteration, split by update, beside the bare network calls it must make.

Bare calls are the forward and backward passes of an update written straight on the networks, without objectives, loop,
logging or optimiser. Both are timed in turn in one process and compared as ratios of medians.

    python benchmarks/step.py --data runs/demo/cache
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from mogan.config import Update
from mogan.data.cache import open_cache
from mogan.models.attention import stack_text
from mogan.models.denoiser import frozen
from mogan.recipes import find_recipe
from mogan.sampling.rollout import normal
from mogan.schedule import add_noise
from mogan.training.assemble import Assembly, assemble
from mogan.training.steps import Position, draw, step


def bare(parts: Assembly, update: Update, where: Position) -> None:
    """The network calls of one update and their backward pass, nothing else."""
    config, student = parts.config, parts.student
    batch = draw(parts, where)
    text = stack_text(batch.text)
    generator = where.generator(9)
    x = normal(torch.Size((update.batch, *parts.latent_shape)), generator, "cpu")
    trains_student = update.learns == "student"
    exit_step = parts.rollout.draw(config.sigmas, where.generator(0))
    for i in range(exit_step + 1):
        sigma = torch.full((update.batch,), config.sigmas[i])
        with torch.set_grad_enabled(trains_student and i == exit_step):
            x0 = student(x, sigma, text)
        if i < exit_step:
            x = add_noise(x0, normal(x0.shape, generator, "cpu"), torch.full((update.batch,), config.sigmas[i + 1]))
    sigma = torch.rand(update.batch, generator=generator)
    if update.by == "dmd":
        dmd = parts.objectives["dmd"].judge
        if trains_student:
            with torch.no_grad():
                dmd.teacher.velocity(torch.cat([x0, x0]), torch.cat([sigma, sigma]), torch.cat([text, text]))
                dmd.fake_score.velocity(x0, sigma, text)
            x0.square().mean().backward()
        else:
            dmd.fake_score.velocity(x0, sigma, text).square().mean().backward()
        return
    gan = parts.objectives["gan"].judge
    with torch.set_grad_enabled(trains_student):
        seen = gan.observe(x0, batch.window_start).latent_BCFHW
    if trains_student:
        with frozen(gan.discriminator):
            gan.discriminator(seen).mean().backward()
    else:
        real = batch.observation_BCFHW
        logits = [gan.discriminator(o) for o in (real, seen, real + 0.01, seen + 0.01)]
        sum(x.square().mean() for x in logits).backward()


def timed(function, *arguments) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def main() -> None:
    """Print a row per update and the overhead of a whole iteration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("runs/demo/cache"), help="a cache of the lab (made by the demo)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    config = find_recipe("mogan_lab")
    parts = assemble(config, open_cache(arguments.data), model="lab", run=None, device="cpu")
    whole = alone = 0.0
    print(f"{'update':<22}{'times':>6}{'step s':>10}{'bare s':>10}{'overhead':>10}")
    for index, update in enumerate(config.plan):
        rows = []
        for iteration in range(arguments.rounds + 1):
            where = Position(0, iteration, index, 0)
            rows.append((timed(step, parts, update, where), timed(bare, parts, update, where)))
        ours, theirs = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        whole, alone = whole + update.times * ours, alone + update.times * theirs
        print(f"{update.label:<22}{update.times:>6}{ours:>10.3f}{theirs:>10.3f}{100 * (ours / theirs - 1):>9.1f}%")
    print(f"{'iteration':<22}{'':>6}{whole:>10.3f}{alone:>10.3f}{100 * (whole / alone - 1):>9.1f}%")


if __name__ == "__main__":
    main()
