"""Distribution matching and transport where student and teacher hardly overlap: two Gaussians ten deviations apart.

    python benchmarks/vdot_far.py [--figure docs/images/vdot_far.png]

Clips of one frame, 8 x 8 places of two numbers: the teacher's are N(10, 1) and N(0, 1), the student starts at N(0, 1) in both. Both scores
are small networks that learn from samples, as in training, the teacher's before and the fake score beside the student; so far
from its data the teacher's guess is a guess. The student learns by the package's ``DMD``, with ``rho`` of transport.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from mogan.data.batches import Batch
from mogan.models.denoiser import Denoiser
from mogan.objectives.dmd import DMD, DMDConfig, dmd_direction, dmd_scale
from mogan.objectives.ot import Transport, TransportConfig
from mogan.sampling.rollout import Rollout

SHAPE, BATCH, MEAN = (2, 1, 8, 8), 16, torch.tensor([10.0, 0.0]).view(1, 2, 1, 1, 1)
TEXT = torch.zeros(1, 1, 1)
RHOS = (0.0, 0.8)


class Places(nn.Module):
    """A velocity of each place by itself, from its numbers and the level."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x_BCFHW: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """As a transformer is called."""
        x = x_BCFHW.movedim(1, -1)
        level = (timestep / 1000).view(-1, 1, 1, 1, 1).expand(*x.shape[:-1], 1)
        return (self.layers(torch.cat([x, level], -1)).movedim(-1, 1),)


class Student(nn.Module):
    """A mean and a deviation of each number."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.zeros(1, 2, 1, 1, 1)), nn.Parameter(torch.ones(1, 2, 1, 1, 1))

    def forward(self, noise: Tensor) -> Tensor:
        """Samples."""
        return self.mean + self.spread * noise

    def distance(self) -> float:
        """2-Wasserstein distance of a place to the teacher's."""
        return float(
            ((self.mean.detach() - MEAN).square().sum() + (self.spread.detach().abs() - 1).square().sum()).sqrt()
        )


def learn(score: Denoiser, data, updates: int, g: torch.Generator) -> None:
    """Flow matching on what ``data`` draws."""
    optimizer = torch.optim.Adam(score.parameters(), lr=2e-3)
    matching = DMD(score, score, TEXT, DMDConfig(guidance=1.0, shift=1.0))
    for _ in range(updates):
        loss, _ = matching.fake_score_loss(Rollout(data(), 0, TEXT), Batch([], [], []), g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run(rho: float, seed: int, updates: int = 250) -> list[tuple[float, float]]:
    """Before every update: the distance to the teacher, and the mean cosine of what moves a place with the way there."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(BATCH, *SHAPE, generator=g)  # noqa: E731
    teacher, own, student = Denoiser(Places()), Denoiser(Places()), Student()
    learn(teacher, lambda: MEAN + draw(), 1000, g)
    learn(own, draw, 1000, g)
    direction = Transport(TransportConfig(rho=rho, eps=0.5), dmd_direction, dmd_scale) if rho else dmd_direction
    matching = DMD(teacher, own, TEXT, DMDConfig(guidance=1.0, shift=1.0), direction=direction)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05, betas=(0.0, 0.999))
    follows = torch.optim.Adam(own.parameters(), lr=2e-3, betas=(0.0, 0.999))
    found = []
    for _ in range(updates):
        x = student(draw())
        loss, _ = matching.student_loss(Rollout(x, 0, TEXT), Batch([], [], []), g)
        (moved,) = torch.autograd.grad(loss, x, retain_graph=True)
        way = (MEAN - student.mean.detach()).expand_as(moved)
        found.append((student.distance(), float(torch.cosine_similarity(-moved, way, dim=1).mean())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for _ in range(4):
            loss, _ = matching.fake_score_loss(Rollout(student(draw()).detach(), 0, TEXT), Batch([], [], []), g)
            follows.zero_grad()
            loss.backward()
            follows.step()
    return found


def main() -> None:
    """Print distances and cosines of three seeds; draw them over updates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    figure, seeds = vars(parser.parse_args()).values()
    found = {rho: torch.tensor([run(rho, seed) for seed in range(seeds)]) for rho in RHOS}
    for rho, paths in found.items():
        distance, cosine = paths.unbind(-1)
        print(f"rho {rho}: cosine in the first 20 updates", *(f"{c:.3f}" for c in cosine[:, :20].mean(1)))
        print(f"rho {rho}: distance after 100", *(f"{d:.2f}" for d in distance[:, 100]))
        print(f"rho {rho}: distance, mean of the last 50", *(f"{d:.2f}" for d in distance[:, -50:].mean(1)))
    if figure:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        picture, panels = plt.subplots(1, 2, figsize=(9, 3.2))
        for number, (panel, name) in enumerate(
            zip(panels, ("distance to the teacher", "cosine with the way there"), strict=True)
        ):
            for rho, paths in found.items():
                curve = paths[..., number]
                panel.fill_between(range(curve.shape[1]), curve.amin(0), curve.amax(0), alpha=0.25, lw=0)
                panel.plot(curve.mean(0), label="DMD" if rho == 0 else f"rho {rho:g}")
            panel.set(xlabel="updates of the student", ylabel=name)
        panels[0].legend(frameon=False)
        picture.tight_layout()
        picture.savefig(figure, dpi=110)


if __name__ == "__main__":
    main()
