"""How much a chunk's clean prediction still changes from step to step: the reason for First-Frame Enhancement (arXiv 2511.01419).

A causal student makes clips of a cache's captions in four steps a chunk. Of every chunk, the cosine between the clean latents
that consecutive steps predict, mean over clips, with its 95 % interval over clips. Several models are training seeds of one recipe: their
clips are counted together.

    python benchmarks/first_chunk.py CACHE MODEL ... --out docs/images/asd_first_chunk.png
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mogan.data.cache import open_cache
from mogan.disk.files import replacing
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import stream_causal
from mogan.schedule import shifted_levels

COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#5C5C5C")


@torch.no_grad()
def cosines(student: CausalDenoiser, text: Tensor, shape: tuple[int, ...], sigmas: tuple[float, ...]) -> Tensor:
    """``(chunks, steps - 1, clips)``, clip ``k`` from seed ``k``."""
    seen, chunk = [], student.chunk
    student.chunk = lambda *a: (seen.append(chunk(*a)), seen[-1])[1]
    list(stream_causal(student, text, shape, sigmas, list(range(len(text)))))
    student.chunk = chunk
    flat = [x0.flatten(1) for x0 in seen]
    near = [torch.cosine_similarity(a, b) for a, b in pairwise(flat)]
    steps = len(sigmas)
    return torch.stack([torch.stack(near[at : at + steps - 1]) for at in range(0, len(flat), steps)])


def figure(found: Tensor, path: Path) -> None:
    """Cosine over pairs of steps, a line a chunk."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mean, half = found.mean(2), 1.96 * found.std(2) / found.shape[2] ** 0.5
    fig, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    names = [f"{k + 1} and {k + 2}" for k in range(found.shape[1])]
    for number, colour in zip(range(len(found)), COLOURS, strict=False):
        axis.errorbar(names, mean[number], half[number], color=colour, marker="o", capsize=3, label=f"{number + 1}")
    axis.set(xlabel="steps", ylabel="cosine of clean predictions")
    axis.legend(title="chunk", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format="png")


def main() -> None:
    """Print the table; draw it if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cache", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cache = open_cache(args.cache)
    text = stack_text([cache.text(entry["caption"]) for entry in cache.entries[: args.clips]], "cpu")
    each = []
    for source in map(open_generator, args.models):
        student = source.load().eval()
        assert isinstance(student, CausalDenoiser)
        each.append(cosines(student, text, wan.latent_shape(source.folder, source.geometry), shifted_levels(4, 3.0)))
    found = torch.cat(each, 2)
    print("| chunk | steps 1 and 2 | 2 and 3 | 3 and 4 |\n|---|---|---|---|")
    for number, row in enumerate(found):
        half = 1.96 * row.std(1) / row.shape[1] ** 0.5
        cells = [f"{mean:.3f} ± {more:.3f}" for mean, more in zip(row.mean(1), half, strict=True)]
        print(f"| {number + 1} | {' | '.join(cells)} |")
    if args.out:
        figure(found, args.out)


if __name__ == "__main__":
    main()
