"""How well a model predicts each latent frame of clips it has not seen, whole or from the clean frames before it.

python benchmarks/causal_start.py CACHE MODEL ...    prints a row per model: a folder of whole clips is measured both ways

Mean squared error of the velocity at levels 0.3, 0.6 and 0.9, one for all frames; the same noise for every model. Of what a
model that sees the past alone makes of 64 of the captions, in its few steps or in three without guidance: sliced Wasserstein
distance of its latents to the real ones, by latent frame (512 directions).
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from mogan.data.cache import open_cache
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.denoiser import Denoiser
from mogan.runs.generator import open_generator
from mogan.sampling.samplers import sample_student
from mogan.schedule import add_noise, shifted_levels

LEVELS = (0.3, 0.6, 0.9)


@torch.no_grad()
def errors(network, clips, text, causal):
    """Per latent frame."""
    total = torch.zeros(clips.shape[2])
    for number, level in enumerate(LEVELS):
        noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(number))
        sigma = torch.full((len(clips), clips.shape[2]), level)
        x = add_noise(clips, noise, sigma)
        if causal is None:
            velocity = network.velocity(x, sigma, text)
        else:
            velocity = network.teacher_forced(clips, x, sigma, text, causal.chunks(clips.shape[2]), causal.policy)
        total += (velocity - (noise - clips)).square().mean((0, 1, 3, 4))
    return total / len(LEVELS)


@torch.no_grad()
def distances(student, clips, text, sigmas):
    """Per latent frame."""
    halves, shape = (range(32), range(32, 64)), tuple(clips.shape[1:])
    made = torch.cat([sample_student(student, text[list(h)], shape, sigmas, list(h)) for h in halves])
    return torch.tensor([sliced(made[:, :, f].flatten(1), clips[:64, :, f].flatten(1)) for f in range(clips.shape[2])])


def sliced(x, y):
    """Root of the mean squared distance between sorted projections."""
    along = F.normalize(torch.randn(512, x.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    x, y = ((z @ along.T).sort(0).values for z in (x, y))
    return float((x - y).square().mean().sqrt())


def main(folder, *models):
    """The table."""
    cache = open_cache(Path(folder))
    entries = cache.entries[:96]
    clips = torch.stack([cache.latent(e["id"]).float() for e in entries])
    text = stack_text([cache.text(e["caption"]) for e in entries], "cpu")
    for name in models:
        source = open_generator(name)
        ways = [source.causal] if source.causal else [None, Causal(1, 1)]
        for causal in ways:
            transformer = source.load().transformer if source.causal else wan.load_transformer(source.folder)
            network = Denoiser(transformer) if causal is None else CausalDenoiser(transformer)
            row = errors(network.eval(), clips, text, causal)
            print(f"| {name}, {'whole' if causal is None else 'causal'} |", " | ".join(f"{e:.3f}" for e in row), "|")
            if causal is not None:
                few = source.sigmas if source.sigmas is not None and len(source.sigmas) < 8 else shifted_levels(3, 3.0)
                row = distances(network, clips, text, few)
                print(f"| {name}, made in {len(few)} steps |", " | ".join(f"{d:.2f}" for d in row), "|")


if __name__ == "__main__":
    if len(sys.argv) < 3 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
