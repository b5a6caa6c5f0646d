"""One student for 1, 2 and 4 steps, told which or not, where everything is known.

Data are eight Gaussians on a ring; a clip is 256 independent points, so that what is averaged over a clip is averaged over
many numbers, as of a video. The teacher's velocity is exact. Student and fake score start from one small network that has
learnt it, and train by the package's own ``DMD`` and ``Intervals``. What is measured needs no network: the sliced Wasserstein
distance between 32768 points of the averaged student and of the data.

    python benchmarks/tdm_steps.py --out docs/images/tdm_steps.png   # seven minutes on one core
"""

import argparse
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mogan.data.batches import Batch
from mogan.disk.files import replacing
from mogan.models.denoiser import Denoiser
from mogan.models.step_condition import GATE
from mogan.objectives.dmd import DMD, DMDConfig
from mogan.recipes import tdm_lab
from mogan.sampling.rollout import Intervals, Rollout, follow
from mogan.schedule import add_noise, levels_of

SIGMAS, COUNTS = tdm_lab().sigmas, (1, 2, 4)
SPREAD, BATCH, SIDE = 0.15, 4, 16  # deviation of each Gaussian; clips of a batch, points along each side of a clip
ANGLES = torch.arange(8) * math.pi / 4
CENTRES = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
TEXT, NOTHING = torch.zeros(1, 1, 1), Batch([], [], [])
EMA = 0.99


@dataclass(frozen=True)
class Arm:
    """What a student is trained for and by.

    Attributes:
        counts: numbers of steps.
        told: student and fake score are told which.
        fake: what the fake score is told: the ``number`` of steps, or the ``end`` of the step.
        reweighted: the fake score learns TDM's reweighted target.
    """

    counts: tuple[int, ...] = COUNTS
    told: bool = True
    fake: str = "number"
    reweighted: bool = False


ARMS = {
    "told": Arm(),
    "not told": Arm(told=False),
    "one student each": Arm(told=False),  # of each number, see run
    "told, fake score told the step's end": Arm(fake="end"),
    "told, reweighted target": Arm(reweighted=True),
}
COLOURS = ("#0072B2", "#D55E00", "#5C5C5C", "#56B4E9", "#E69F00")


def data(count: int, generator: torch.Generator) -> Tensor:
    """``(count, 2)``."""
    which = torch.randint(len(CENTRES), (count,), generator=generator)
    return CENTRES[which] + SPREAD * torch.randn(count, 2, generator=generator)


def clips(count: int, generator: torch.Generator) -> Tensor:
    """``(B, 2, 1, side, side)``."""
    return data(count * SIDE**2, generator).view(count, 1, SIDE, SIDE, 2).movedim(-1, 1)


class Exact(nn.Module):
    """The data's own velocity, called as a Wan transformer."""

    config = SimpleNamespace(patch_size=(1, 1, 1))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """``(x - E[x0 | x]) / sigma``, of a mixture of Gaussians."""
        s, points = (timestep / 1000).view(-1, 1, 1, 1, 1, 1), x.movedim(1, -1)[..., None, :]
        variance = (1 - s) ** 2 * SPREAD**2 + s**2
        away = points - (1 - s) * CENTRES
        weight = torch.softmax(-away.square().sum(-1, keepdim=True) / (2 * variance), -2)
        clean = (weight * (CENTRES + (1 - s) * SPREAD**2 / variance * away)).sum(-2)
        return ((points[..., 0, :] - clean).div(s[..., 0]).movedim(-1, 1),)


class Points(nn.Module):
    """A small network of every point by itself, with Wan's way of being told a level, and a second one as AnyFlow is."""

    config = SimpleNamespace(patch_size=(1, 1, 1))

    def __init__(self, width: int = 64, depth: int = 3):
        super().__init__()
        self.told = False
        self.embed = nn.Sequential(nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width))
        self.delta = copy.deepcopy(self.embed)
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.modulate = nn.Linear(width, 2 * depth * width)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """As a Wan transformer is called; ``timestep`` holds two levels, one after the other, if it is told."""
        level = timestep[:, None] / 1000
        waves = level * torch.pi * 2.0 ** torch.arange(8)
        known = torch.cat([level, waves.sin(), waves.cos()], 1)
        if self.told:
            at, to = known.chunk(2)
            told = (1 - GATE) * self.embed(at) + GATE * self.delta(to)
        else:
            told = self.embed(known)
        shifts = self.modulate(nn.functional.silu(told)).view(len(x), 1, 1, 1, 2, len(self.layers), -1)
        hidden = self.first(x.movedim(1, -1))
        for i, layer in enumerate(self.layers):
            scale, shift = shifts[..., 0, i, :], shifts[..., 1, i, :]
            hidden = hidden + nn.functional.silu(layer(hidden) * (1 + scale) + shift)
        return (self.last(hidden).movedim(-1, 1),)


def denoiser(network: Points, told: bool) -> Denoiser:
    """A copy that is told or not; its second embedder begins as a copy of the first."""
    own = copy.deepcopy(network)
    own.told, own.delta = told, copy.deepcopy(own.embed)
    found = Denoiser(own)
    found.told = told
    return found


def optimise(optimizer: torch.optim.Optimizer, loss: Tensor, network: nn.Module) -> None:
    """One step, gradients clipped as in training."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def learnt(seed: int, updates: int = 2000) -> Points:
    """A network that has learnt the teacher's velocity."""
    torch.manual_seed(seed)
    generator, network, exact = torch.Generator().manual_seed(seed), Points(), Exact()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / updates)
        x0 = clips(BATCH, generator)
        sigma = torch.rand(BATCH, generator=generator).clamp(min=0.005)
        x = add_noise(x0, torch.randn(x0.shape, generator=generator), sigma)
        gap = network(x, 1000 * sigma, TEXT)[0] - exact(x, 1000 * sigma, TEXT)[0]
        optimise(optimizer, gap.square().mean(), network)
    return network


@torch.no_grad()
def distance(student: Denoiser, count: int, generator: torch.Generator) -> float:
    """Sliced Wasserstein-1 distance, over 64 directions, of samples in ``count`` steps to data."""
    noise = torch.randn(128, 2, 1, SIDE, SIDE, generator=generator)
    made = (
        follow(student, noise, TEXT, (*levels_of(SIGMAS, count), 0.0), told=student.told)[0]
        .movedim(1, -1)
        .reshape(-1, 2)
    )
    real = data(len(made), generator)
    turn = torch.arange(64) * math.pi / 64
    across = torch.stack([turn.cos(), turn.sin()])
    return float(((made @ across).sort(0).values - (real @ across).sort(0).values).abs().mean())


def train(arm: Arm, start: Points, updates: int, seed: int) -> Denoiser:
    """The averaged student."""
    generator, kind = torch.Generator().manual_seed(seed), Intervals(counts=arm.counts, told=arm.told)
    student, fake = denoiser(start, arm.told), denoiser(start, arm.told)
    average = copy.deepcopy(student)
    settings = tdm_lab().objectives["dmd"]
    judge = DMD(
        Denoiser(Exact()),
        fake,
        TEXT,
        DMDConfig(guidance=1.0, shift=1.0, huber=settings.huber, reweighted=arm.reweighted),
    )
    learners = [
        torch.optim.AdamW(network.parameters(), lr, betas=betas, weight_decay=0.0)
        for network, lr, betas in ((student, 5e-4, (0.0, 0.999)), (fake, 1e-3, (0.0, 0.95)))
    ]
    sigmas = levels_of(SIGMAS, max(arm.counts))

    def rollout(grad: bool) -> Rollout:
        noise = torch.randn(BATCH, 2, 1, SIDE, SIDE, generator=generator)
        made = kind.make(student, noise, TEXT, sigmas, generator, kind.draw(sigmas, generator), grad)
        return replace(made, toward=made.level) if arm.fake == "end" else made

    for i in range(updates):
        for learner, lr in zip(learners, (5e-4, 1e-3), strict=True):
            learner.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - i / updates))  # constant, then down to nothing
        optimise(learners[1], judge.fake_score_loss(rollout(False), NOTHING, generator)[0], fake)
        optimise(learners[0], judge.student_loss(rollout(True), NOTHING, generator)[0], student)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - EMA)
    return average


def run(name: str, start: Points, updates: int, seed: int) -> list[float]:
    """Distances in 1, 2 and 4 steps."""
    arms = (
        [replace(ARMS[name], counts=(n,)) for n in COUNTS] if name == "one student each" else [ARMS[name]] * len(COUNTS)
    )
    made = {arm: train(arm, start, updates, seed) for arm in dict.fromkeys(arms)}
    generator = torch.Generator().manual_seed(1)
    return [distance(made[arm], count, generator) for arm, count in zip(arms, COUNTS, strict=True)]


def main() -> None:
    """Print the table, draw the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=600, help="of the student, and as many of the fake score")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="figure to write")
    a = parser.parse_args()
    found: dict[str, list[list[float]]] = {name: [] for name in ("untrained", *ARMS)}
    for seed in tqdm(range(a.seeds), unit="seed"):
        start = learnt(seed)
        generator = torch.Generator().manual_seed(1)
        found["untrained"].append([distance(denoiser(start, False), n, generator) for n in COUNTS])
        for name in ARMS:
            found[name].append(run(name, start, a.updates, seed))
    print("| distance in steps | " + " | ".join(map(str, COUNTS)) + " |\n" + "|---" * (1 + len(COUNTS)) + "|")
    for name, runs in found.items():
        cells = [[one[i] for one in runs] for i in range(len(COUNTS))]
        print(f"| {name} | " + " | ".join(f"{min(c):.3f} to {max(c):.3f}" for c in cells) + " |")
    if a.out:
        draw(found, a.out)


def draw(found: dict[str, list[list[float]]], out: Path) -> None:
    """Distance over the number of steps, a line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(ARMS, COLOURS, strict=True):
        for seed, one in enumerate(found[name]):
            axis.plot(COUNTS, one, marker="o", color=colour, alpha=0.8, label="" if seed else name)
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="sliced Wasserstein distance to the data")
    axis.set_xticks(COUNTS, map(str, COUNTS))
    axis.minorticks_off()
    axis.legend(frameon=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    main()
