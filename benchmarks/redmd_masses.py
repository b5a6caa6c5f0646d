"""Whether weighted distribution matching reaches the distribution it is derived from: a mixture of three modes, exact scores.

    python benchmarks/redmd_masses.py [--figure docs/images/redmd_masses.png]

A student of clips of one pixel and two channels learns by the package's ``DMD`` and ``clip_weights``. The teacher is the exact
denoiser of a mixture with masses .6, .3, .1, whose modes are rewarded 0, 1, 2; the fake score is the exact denoiser of 512 of
the student's own samples. Two students: one that can make the mixture (a network), one that cannot (a single Gaussian).
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from mogan.data.batches import Batch
from mogan.distributed import ONE
from mogan.objectives.dmd import DMD, DMDConfig
from mogan.objectives.redmd import clip_weights
from mogan.sampling.rollout import Rollout

MASSES, REWARDS, WIDTH = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.0, 1.0, 2.0]), 0.25
CENTRES = 1.5 * torch.tensor([[math.cos(a), math.sin(a)] for a in (math.pi / 2, 7 * math.pi / 6, 11 * math.pi / 6)])
TEXT, BATCH, BANK = torch.zeros(1, 1, 1), 128, 512
BETAS = (math.inf, 1.0, 0.5)


class Points(nn.Module):
    """The exact denoiser of a mixture of equally wide Gaussians."""

    def __init__(self, centres: Tensor, masses: Tensor, width: float):
        super().__init__()
        self.centres, self.masses, self.width = centres, masses, width

    def forward(self, x_BCFHW: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """``E[x0 | x_t]``."""
        x, s = x_BCFHW.flatten(1), sigma[:, None]
        variance = (1 - s) ** 2 * self.width**2 + s**2
        gap = x[:, None] - (1 - s)[..., None] * self.centres
        chance = torch.softmax(self.masses.log() - gap.square().sum(-1) / (2 * variance), 1)
        pulled = self.centres + ((1 - s) * self.width**2 / variance)[..., None] * gap
        return (chance[..., None] * pulled).sum(1).view_as(x_BCFHW)

    def velocity(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """``(x_t - x0) / sigma``."""
        return (x - self(x, sigma, text)) / sigma.view(-1, 1, 1, 1, 1)


class Network(nn.Sequential):
    """A student that can make the mixture."""

    def __init__(self):
        super().__init__(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))


class Gaussian(nn.Module):
    """A student that cannot: a mean and a deviation."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

    def forward(self, noise: Tensor) -> Tensor:
        """Samples."""
        return self.mean + self.spread * noise


def mode_of(x_B2: Tensor) -> Tensor:
    """The nearest mode."""
    return torch.cdist(x_B2, CENTRES).argmin(1)


def tilted(beta: float) -> Tensor:
    """The masses of ``p exp(r / beta)``."""
    weight = MASSES * (REWARDS / beta).exp()
    return weight / weight.sum()


def train(student: nn.Module, beta: float, updates: int, seed: int = 0, every: int = 50) -> list[list[float]]:
    """Masses of the modes in the student's samples, at the start and after every ``every`` updates."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.0, 0.99))
    teacher, kept = Points(CENTRES, MASSES, WIDTH), []
    for update in range(updates + 1):
        with torch.no_grad():
            bank = student(torch.randn(BANK, 2, generator=g))
        if update % every == 0:
            kept.append((torch.bincount(mode_of(bank), minlength=3) / BANK).tolist())
        own = Points(bank, torch.full((BANK,), 1 / BANK), 1e-3)
        matching = DMD(teacher, own, TEXT, DMDConfig(guidance=1.0, shift=1.0, low=0.1))
        x = student(torch.randn(BATCH, 2, generator=g))
        weight, _ = clip_weights(REWARDS[mode_of(x.detach())], beta, True, ONE)
        rollout = Rollout(x.view(BATCH, 2, 1, 1, 1), 0, TEXT)
        loss, _ = matching.student_loss(rollout, Batch([], [], [], more={"weight": weight}), g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kept


def run(kind: type[nn.Module], betas: tuple[float, ...], seed: int, first: int = 1000, then: int = 1500) -> Tensor:
    """Plain distribution matching first, then weighted by each ``beta``: masses ``(beta, time, mode)``."""
    torch.manual_seed(seed)
    student = kind()
    before = train(student, math.inf, first, seed)[:-1]
    return torch.tensor([before + train(copy.deepcopy(student), beta, then, seed + 100) for beta in betas])


def main() -> None:
    """Print final masses (mean over the last 500 updates) of three seeds; draw them over updates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    figure, seeds = vars(parser.parse_args()).values()
    found = {kind: torch.stack([run(kind, BETAS, seed) for seed in range(seeds)]) for kind in (Network, Gaussian)}
    for kind, masses in found.items():
        for number, beta in enumerate(BETAS):
            last = masses[:, number, -10:].mean(1)
            print(kind.__name__, f"beta {beta}: tilted {show(tilted(beta))}, reached", *map(show, last))
    if figure:
        draw(found, figure)


def show(masses: Tensor) -> str:
    """Three digits."""
    return "/".join(f"{m:.3f}" for m in masses)


def draw(found: dict, path: Path) -> None:
    """Mass of the most rewarded mode over updates, a band over seeds; where the derivation says that it ends, dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for panel, kind, title in zip(
        panels, (Network, Gaussian), ("a student that can match", "one that cannot"), strict=True
    ):
        for number, (beta, colour) in enumerate(zip(BETAS, ("black", "tab:blue", "tab:red"), strict=True)):
            mass = found[kind][:, number, :, 2]
            at = [50 * i for i in range(mass.shape[1])]
            panel.fill_between(at, mass.amin(0), mass.amax(0), color=colour, alpha=0.25, lw=0)
            panel.plot(at, mass.mean(0), color=colour, label=f"beta {beta:g}")
            panel.axhline(tilted(beta)[2], color=colour, ls="--", lw=0.8)
        panel.axvline(1000, color="grey", lw=0.6)
        panel.set(title=title, xlabel="updates (weighted from 1000 on)")
    panels[0].set_ylabel("mass of the most rewarded mode")
    panels[0].legend(frameon=False)
    picture.tight_layout()
    picture.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
