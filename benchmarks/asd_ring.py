"""One student for 1 to 4 steps, by distribution matching alone and with itself in one step more, where everything is known.

The ring of ``tdm_steps.py``: eight Gaussians, an exact teacher, small networks that start from one which has learnt its velocity.
A clip is one chunk. Student, fake score and critic train by the package's own ``Chunked``, ``DMD`` and ``ASD``. Measured is the
sliced Wasserstein distance between points of the averaged student and of the data.

    python benchmarks/asd_ring.py     # a minute of a core a seed
"""

import argparse
import copy

import torch
from tdm_steps import BATCH, NOTHING, SIDE, TEXT, Exact, Points, data, denoiser, learnt, optimise
from torch import Tensor, nn

from mogan.models.causal_cache import Cache, Causal, Policy
from mogan.models.denoiser import Denoiser
from mogan.models.discriminator import Heads
from mogan.objectives.asd import ASD, ASDConfig
from mogan.objectives.dmd import DMD, DMDConfig
from mogan.objectives.relativistic import Relativistic, RelativisticConfig
from mogan.sampling.causal_rollout import Chunked
from mogan.schedule import shifted_levels

SIGMAS, COUNTS, EMA = shifted_levels(4, 3.0), (1, 2, 3, 4), 0.99
ARMS = {"DMD alone": 0.0, "alpha 0.03": 0.03, "alpha 0.1": 0.1, "alpha 0.3": 0.3, "alpha 1": 1.0}
KIND, BELOW = Chunked(Causal(1, 1), COUNTS), Chunked(Causal(1, 1), COUNTS[:-1])


class OneChunk(nn.Module):
    """A denoiser, called as a causal student of one chunk is."""

    def __init__(self, network: Denoiser):
        super().__init__()
        self.network = network

    def begin(self, text: Tensor, policy: Policy) -> Cache:
        """No past."""
        return Cache(policy)

    def chunk(self, x: Tensor, sigma: Tensor, text: Tensor, cache: Cache) -> Tensor:
        """The clean points."""
        return self.network(x, sigma, text)


class OfPoints(Relativistic):
    """Whose trunk has a feature a point."""

    def features(self, x_t: Tensor, sigma: Tensor, text_BLD: Tensor) -> list[Tensor]:
        """``(B, points, width)``."""
        return [features.flatten(1, 3) for features in super().features(x_t, sigma, text_BLD)]


@torch.no_grad()
def distance(student: OneChunk, count: int) -> float:
    """Sliced Wasserstein-1 distance, over 64 directions, of samples in ``count`` steps to data."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(128, 2, 1, SIDE, SIDE, generator=generator)
    place = KIND.whole(SIGMAS, count)
    made = KIND.make(student, noise, TEXT, SIGMAS, generator, place, False).sample_BCFHW.movedim(1, -1).reshape(-1, 2)
    real, turn = data(len(made), generator), torch.arange(64) * torch.pi / 64
    across = torch.stack([turn.cos(), turn.sin()])
    return float(((made @ across).sort(0).values - (real @ across).sort(0).values).abs().mean())


def train(weight: float, start: Points, updates: int, seed: int) -> OneChunk:
    """The averaged student."""
    torch.manual_seed(seed)
    generator, student, fake = (
        torch.Generator().manual_seed(seed),
        OneChunk(denoiser(start, False)),
        denoiser(start, False),
    )
    average, fake.transformer.blocks = copy.deepcopy(student), fake.transformer.layers
    judge = DMD(Denoiser(Exact()), fake, TEXT, DMDConfig(guidance=1.0, shift=1.0))
    settings = ASDConfig(critic=RelativisticConfig(taps=(0, 1, 2), shift=1.0), weight=weight)
    heads = Heads(64, 4, 3, outputs=3)
    asd = ASD(student, KIND, SIGMAS, OfPoints(fake, heads, settings.critic), settings)
    rates = ((student, 5e-4), (fake, 1e-3), (heads, 1e-3))
    learners = [torch.optim.AdamW(network.parameters(), lr, betas=(0.0, 0.999)) for network, lr in rates]

    def rollout(kind: Chunked, grad: bool):
        noise = torch.randn(BATCH, 2, 1, SIDE, SIDE, generator=generator)
        return kind.make(student, noise, TEXT, SIGMAS, generator, kind.draw(SIGMAS, generator), grad)

    for i in range(updates):
        for learner, (_, lr) in zip(learners, rates, strict=True):
            learner.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - i / updates))
        optimise(learners[1], judge.fake_score_loss(rollout(KIND, False), NOTHING, generator)[0], fake)
        if weight:
            optimise(learners[2], asd.critic_loss(rollout(BELOW, False), NOTHING, generator)[0], heads)
        made = rollout(KIND, True)
        loss = judge.student_loss(made, NOTHING, generator)[0]
        optimise(learners[0], loss + (asd.student_loss(made, NOTHING, generator)[0] if weight else 0.0), student)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - EMA)
    return average


def main() -> None:
    """Print a row per arm and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    args = parser.parse_args()
    print("| | seed | " + " | ".join(f"{n} steps" for n in COUNTS) + " |\n|---|---|---|---|---|---|")
    for seed in args.seeds:
        start = learnt(seed, updates=1000)
        before = OneChunk(denoiser(start, False))
        rows = {"before": before} | {name: train(ARMS[name], start, args.updates, seed) for name in args.arms}
        for name, student in rows.items():
            print(
                f"| {name} | {seed} | " + " | ".join(f"{distance(student, n):.3f}" for n in COUNTS) + " |", flush=True
            )


if __name__ == "__main__":
    main()
