"""How near a causal student's clips are to real ones in 1, 2, 3 and 4 steps, its first chunk in as many or in all.

    python benchmarks/asd_steps.py CACHE MODEL ... --out docs/images/asd_steps.png     a name before "=" is its label

Models of one label are training seeds of one recipe, counted together.

Sliced Wasserstein distance (512 directions) of latent frames to those of the real clips of the same captions, mean over frames:
of the frames, and of the differences of neighbouring ones, where motion lies. The last 64 clips of the cache; three sets of
sampling seeds, least to most.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from causal_start import sliced
from torch import Tensor

from mogan.data.cache import open_cache
from mogan.disk.files import replacing
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.runs.generator import open_generator
from mogan.sampling.samplers import sample_student
from mogan.schedule import levels_of, shifted_levels

SIGMAS, SETS, COLOURS = shifted_levels(4, 3.0), 3, ("#5C5C5C", "#0072B2", "#D55E00", "#009E73")
SEEN = ("frames", "differences")


def distances(made: Tensor, real: Tensor) -> list[float]:
    """Of frames and of their differences."""
    pairs = (made, real), (made.diff(dim=2), real.diff(dim=2))
    return [
        sum(sliced(a[:, :, f].flatten(1), b[:, :, f].flatten(1)) for f in range(a.shape[2])) / a.shape[2]
        for a, b in pairs
    ]


def measured(model: str, clips: Tensor, text: Tensor) -> dict[tuple[bool, int], list[list[float]]]:
    """By FFE and number of steps: distances of each set of seeds."""
    source = open_generator(model)
    student, found = source.load().eval(), {}
    assert isinstance(student, CausalDenoiser)
    for enhanced in (False, True):
        student.how = replace(student.how, first_sigmas=SIGMAS if enhanced else None)
        for count in range(1, len(SIGMAS) + enhanced):  # in all steps they are the same
            runs = [[seed + 1000 * k for seed in range(len(clips))] for k in range(SETS)]
            levels, shape = levels_of(SIGMAS, count), tuple(clips.shape[1:])
            made = [sample_student(student, text, shape, levels, seeds) for seeds in runs]
            found[enhanced, count] = [distances(x, clips) for x in made]
    found[False, len(SIGMAS)] = found[True, len(SIGMAS)]
    return found


def draw(found: dict[str, dict], out: Path) -> None:
    """Distance over steps, a line a model, dashed with FFE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, (axis, seen) in enumerate(zip(figure.subplots(1, 2), SEEN, strict=True)):
        for (name, runs), colour in zip(found.items(), COLOURS, strict=False):
            for enhanced in (False, True):
                each = [[run[place] for run in runs[enhanced, count]] for count in range(1, 5)]
                axis.plot(
                    range(1, 5),
                    [sum(e) / len(e) for e in each],
                    color=colour,
                    ls="--" if enhanced else "-",
                    marker="o",
                    label="" if enhanced else name,
                )
        axis.set(xlabel="steps (dashed: first chunk in 4)", ylabel=f"distance of {seen}", xticks=range(1, 5))
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main() -> None:
    """Print the table; draw it if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cache", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cache = open_cache(args.cache)
    entries = cache.entries[-64:]
    clips = torch.stack([cache.latent(entry["id"]).float() for entry in entries])
    text = stack_text([cache.text(entry["caption"]) for entry in entries], "cpu")
    found: dict[str, dict] = {}
    for name in args.models:
        label, _, model = name.rpartition("=")
        for key, runs in measured(model, clips, text).items():
            found.setdefault(label or model, {}).setdefault(key, []).extend(runs)
    print("| | FFE | distance of | 1 step | 2 | 3 | 4 |\n|---|---|---|---|---|---|---|")
    for label, runs in found.items():
        for enhanced in (False, True):
            for place, seen in enumerate(SEEN):
                each = [[run[place] for run in runs[enhanced, count]] for count in range(1, 5)]
                cells = " | ".join(f"{min(e):.3f} to {max(e):.3f}" for e in each)
                print(f"| {label} | {'yes' if enhanced else 'no'} | {seen} | {cells} |", flush=True)
    if args.out:
        draw(found, args.out)


if __name__ == "__main__":
    main()
