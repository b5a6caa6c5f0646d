"""What points that the teacher never visits cost a student, where everything is known: data are one number (after AccVideo).

The teacher is the exact flow from noise to two narrow modes. Students learn its mean velocity between the levels 1, .857, .6
and 0 by the package's own ``Trajectory``, the same network for as long: from the teacher's paths, or from where other data lie
when they are noised, ``M`` away from the teacher's. Targets are the teacher's own in both. What is measured is how far from
the teacher's clip three Euler steps from the same noise end, and how far all of them lie from the data.

    python benchmarks/useless_points.py --out docs/images/useless_points.png   # four minutes on one core
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mogan.data.batches import Batch
from mogan.disk.files import replacing
from mogan.objectives.accvideo import Trajectory
from mogan.sampling.rollout import follow
from mogan.schedule import shifted_levels

POINTS, BATCH, TEXT = 4096, 256, torch.zeros(1, 1, 1)
MODES, DEVIATION = torch.tensor([-1.0, 1.0]), 0.1
LEVELS = (*shifted_levels(3, 3.0), 0.0)
GRID = (*shifted_levels(48, 3.0), 0.0)  # every 16th is one of LEVELS
MISMATCH = (0.0, 1.0, 2.0, 3.0)


class Teacher(nn.Module):
    """The exact velocity for the two modes."""

    def velocity(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """``(x - E[x0 | x]) / sigma``."""
        s = sigma.view(-1, 1, 1, 1, 1)
        variance = (1 - s) ** 2 * DEVIATION**2 + s**2
        gaps = x[..., None] - (1 - s)[..., None] * MODES
        weight = torch.softmax(-(gaps**2) / (2 * variance[..., None]), -1)
        x0 = (weight * (MODES + (1 - s)[..., None] * DEVIATION**2 / variance[..., None] * gaps)).sum(-1)
        return (x - x0) / s


class Student(nn.Module):
    """A small network of the number and the level."""

    def __init__(self, width: int = 48):
        super().__init__()
        sizes = [9, width, width, 1]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers[:-1])

    def velocity(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """As a denoiser's."""
        waves = sigma[:, None] * torch.pi * 2.0 ** torch.arange(4)
        known = torch.cat([x.flatten(1), waves.sin(), waves.cos()], 1)
        return self.net(known).view_as(x)


@torch.no_grad()
def step_of_teacher(x: Tensor, k: int) -> Tensor:
    """From one key level to the next by 16 small steps."""
    return follow(Teacher(), x, TEXT, GRID[16 * k : 16 * k + 17])[0]


def pairs(mismatch: float | None, generator: torch.Generator) -> list[Tensor]:
    """Of each step ``(N, 2, 1, 1, 1, 1)``: a point and where the teacher gets from there; ``None``: its own points."""
    noise = torch.randn(POINTS, 1, 1, 1, 1, generator=generator)
    found, x = [], noise
    for k, level in enumerate(LEVELS[:-1]):
        if mismatch is not None:
            mode = MODES[torch.randint(2, (POINTS,), generator=generator)].view_as(noise)
            data = mode + mismatch + DEVIATION * torch.randn(noise.shape, generator=generator)
            x = (1 - level) * data + level * torch.randn(noise.shape, generator=generator)
        after = step_of_teacher(x, k)
        found.append(torch.stack([x, after], 1))
        x = after
    return found


def train(mismatch: float | None, updates: int, seed: int) -> Student:
    """A student of such points."""
    torch.manual_seed(seed)
    generator, student = torch.Generator().manual_seed(seed), Student()
    steps = [Trajectory(student, levels) for levels in pairwise(LEVELS)]
    optimizer, store = torch.optim.AdamW(student.parameters(), 1e-2), pairs(mismatch, generator)
    for number in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / updates)
        optimizer.zero_grad(set_to_none=True)
        drawn = torch.randint(POINTS, (BATCH,), generator=generator)
        for step, paths in zip(steps, store, strict=True):
            batch = Batch([""] * BATCH, [""] * BATCH, [TEXT[0]] * BATCH, path_BKCFHW=paths[drawn])
            step.student_loss(None, batch, generator)[0].backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return student


@torch.no_grad()
def measure(student: Student) -> tuple[float, float]:
    """On 4000 noises: mean distance of its clip to the teacher's, and Wasserstein-1 distance of all to the data."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4000, 1, 1, 1, 1, generator=generator)
    made, taught = (
        follow(network, noise, TEXT, levels)[0].flatten() for network, levels in ((student, LEVELS), (Teacher(), GRID))
    )
    data = MODES[torch.randint(2, (4000,), generator=generator)] + DEVIATION * torch.randn(4000, generator=generator)
    return float((made - taught).abs().mean()), float((made.sort().values - data.sort().values).abs().mean())


def main() -> None:
    """Print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="figure to write")
    a = parser.parse_args()
    arms = [None, *MISMATCH]
    found = {arm: [measure(train(arm, a.updates, seed)) for seed in range(a.seeds)] for arm in tqdm(arms, unit="arm")}
    print("\n| points | distance to the teacher's clip | distance of all to the data |\n|---|---|---|")
    for arm, runs in found.items():
        cells = [f"{min(c):.3g} to {max(c):.3g}" for c in zip(*runs, strict=True)]
        print(f"| {'the teacher passes' if arm is None else f'noised data, M = {arm:g}'} | " + " | ".join(cells) + " |")
    if a.out:
        draw(found, a.out)


def draw(found: dict, out: Path) -> None:
    """A panel per distance, a point per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    titles = ("to the teacher's clip of the same noise", "of all clips to the data")
    for number, (axis, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
        for seed in range(len(found[None])):
            once = seed == 0
            values = [found[m][seed][number] for m in MISMATCH]
            axis.plot(MISMATCH, values, "o-", ms=3, lw=1, color="#D55E00", label="noised data" if once else None)
            own = found[None][seed][number]
            axis.axhline(own, color="#0072B2", lw=1, label="the teacher's paths" if once else None)
        axis.set(title=title, xlabel="M: how far the data lie from the teacher's", yscale="log")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("distance")
    figure.axes[0].legend(frameon=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150)


if __name__ == "__main__":
    main()
