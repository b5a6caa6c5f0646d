"""How well a model predicts each latent frame of clips it has not seen, whole or from the clean frames before it.

python benchmarks/causal_start.py CACHE MODEL ...    prints a row per model: a folder of whole clips is measured both ways

Mean squared error of the velocity at levels 0.3, 0.6 and 0.9, one for all frames; the same noise for every model. Of a
few-step causal student also what it makes of the captions: variance over clips, by latent frame, as a share of real clips'.
"""

import sys
from pathlib import Path

import torch

from mogan.data.cache import open_cache
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.denoiser import Denoiser
from mogan.runs.generator import open_generator
from mogan.sampling.samplers import sample_student
from mogan.schedule import add_noise

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
def spread(student, clips, text, sigmas):
    """Per latent frame; 1 is as much as real clips have."""
    made = [
        sample_student(
            student, text[i : i + 32], tuple(clips.shape[1:]), sigmas, list(range(i, min(i + 32, len(clips))))
        )
        for i in range(0, len(clips), 32)
    ]
    return torch.cat(made).var(0).mean((0, 2, 3)) / clips.var(0).mean((0, 2, 3))


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
            if causal is not None and source.sigmas is not None and len(source.sigmas) < 8:
                row = spread(network, clips, text, source.sigmas)
                print(f"| {name}, spread |", " | ".join(f"{e:.2f}" for e in row), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
