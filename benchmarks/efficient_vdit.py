"""What a mask costs a model, with and without the layer-wise search at an equal share of pairs, and what distillation brings back.

python benchmarks/efficient_vdit.py HELD_OUT_CACHE ATTENTION DENSE [MODEL ...]

DENSE is the model that ATTENTION (`mogan attention --thresholds`) was measured of; of it as it is, with the same number of
references in every block, and with those of the search at the share of two references, rows are printed; then of each MODEL
as it is, and densely. A row has: pairs of frames kept; squared error of the velocity over the square of DENSE's, on noised
held-out clips at DENSE's levels (a teacher: 0.3, 0.6, 0.9); the same of the clip that is made of 32 captions and seeds; its
sliced Wasserstein distance to real clips (512 directions, mean over latent frames; 32 real clips from 32 others: first row).
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from mogan.data.cache import open_cache
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.frame_sparse import kept_share, mask_of, search, set_frame_sparse
from mogan.runs.generator import open_generator
from mogan.sampling.samplers import sample_student, sample_teacher
from mogan.schedule import add_noise

CLIPS = 32


def sliced(x, y):
    """Mean over latent frames of the root of the mean squared distance between sorted projections."""
    found = []
    for a, b in zip(x.unbind(2), y.unbind(2), strict=True):
        along = F.normalize(torch.randn(512, a[0].numel(), generator=torch.Generator().manual_seed(0)), dim=1)
        a, b = ((z.flatten(1) @ along.T).sort(0).values for z in (a, b))
        found.append((a - b).square().mean().sqrt())
    return float(torch.stack(found).mean())


def share(found, meant):
    """Squared error over the square."""
    return float((found - meant).square().sum() / meant.square().sum())


class Measured:
    """Rows on the clips of a cache; the first network that is measured is what others are compared with."""

    def __init__(self, cache, source):
        entries, self.source = cache.entries[: 2 * CLIPS], source
        real = torch.stack([cache.latent(e["id"]).float() for e in entries])
        self.real, self.other = real[:CLIPS], real[CLIPS:]
        self.text = stack_text([cache.text(e["caption"]) for e in entries[:CLIPS]])
        self.null = stack_text([cache.text(wan.defaults(source.folder).negative_prompt)])
        self.dense = None
        print(f"| real clips of other captions | | | | {sliced(self.other, self.real):.3f} |", flush=True)

    @torch.no_grad()
    def row(self, name, network):
        """Print one; returns nothing."""
        velocity, made = [], []
        for number, level in enumerate(self.source.sigmas or (0.3, 0.6, 0.9)):
            noise = torch.randn(self.real.shape, generator=torch.Generator().manual_seed(number))
            sigma = torch.full((CLIPS,), level)
            velocity.append(network.velocity(add_noise(self.real, noise, sigma), sigma, self.text))
        for half in (range(CLIPS // 2), range(CLIPS // 2, CLIPS)):
            text, shape = self.text[list(half)], tuple(self.real.shape[1:])
            if self.source.sigmas is not None:
                made.append(sample_student(network, text, shape, self.source.sigmas, list(half), self.source.solver))
            else:
                usual = wan.defaults(self.source.folder)
                how = {"steps": usual.steps, "guidance": usual.guidance, "shift": usual.shift}
                made.append(sample_teacher(network, text, self.null, shape, list(half), **how))
        found = torch.cat(velocity), torch.cat(made)
        self.dense = self.dense or found
        mask = mask_of(network.transformer)
        errors = " | ".join(f"{share(a, b):.4f}" for a, b in zip(found, self.dense, strict=True))
        kept = 1.0 if mask is None else mask.kept
        print(f"| {name} | {kept:.0%} | {errors} | {sliced(found[1], self.real):.3f} |", flush=True)


def masks(attention):
    """Names and numbers of references: alike in all blocks, searched, and the searched ones the other way round."""
    facts = json.loads((Path(attention) / "attention.json").read_text())
    worst = torch.tensor([of["errors"] for of in facts["sparse"].values()]).amax(0)
    frames, blocks = facts["frames"], len(worst)

    def kept(counts):
        return sum(kept_share(frames, count) for count in counts) / blocks

    yield from ((f"{k} everywhere", frames, (k,) * blocks) for k in range(1, frames - 1))
    wanted = kept_share(frames, 2)
    found = min((search(worst, float(t)) for t in worst.flatten().unique()), key=lambda c: abs(kept(c) - wanted))
    yield f"searched: {' '.join(map(str, found))}", frames, found
    order = worst[:, 0].argsort()  # who bears most gets what who bears least got
    turned = [0] * blocks
    for place, count in zip(order.tolist(), sorted(found, reverse=True), strict=True):
        turned[place] = count
    yield f"the wrong way round: {' '.join(map(str, turned))}", frames, turned


def main(folder, attention, dense, *models):
    """The table."""
    torch.set_num_threads(1)
    source = open_generator(dense)
    measured = Measured(open_cache(Path(folder)), source)
    measured.row(f"{Path(dense).name}, dense", source.load().eval())
    for name, frames, counts in masks(attention):
        network = source.load().eval()
        set_frame_sparse(network.transformer, frames, counts)
        measured.row(name, network)
    for model in models:
        network = open_generator(model).load().eval()
        measured.row(Path(model).name, network)
        if (mask := mask_of(network.transformer)) is not None:
            set_frame_sparse(network.transformer, mask.frames, (mask.frames,) * len(mask.references))
            measured.row(f"{Path(model).name}, its weights with dense attention", network)


if __name__ == "__main__":
    if len(sys.argv) < 4 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
