"""How a causal student's clips are in 1, 2, 3 and 4 steps, its first chunk in as many or in all (FFE).

    mogan lab render --clips 64 --motion rich --seed 99 --out VIDEOS && mogan prepare VIDEOS --out CACHE
    python benchmarks/asd_steps.py CACHE MODEL ... --keep FOLDER --out docs/images/asd_steps.png     a name before "=" is its label

Models of one label are training seeds of one recipe, counted together. All are sampled at the levels of four steps or some of
them, whatever they were trained at. Of the clips of the cache's captions, one each:

- sliced Wasserstein distance (512 directions) of latent frames to those of the real clips, mean over frames: of the frames, and of
  the differences of neighbouring ones, where motion lies; least to most over models;
- what the lab's tracker finds, with 95 % intervals over captions and models.
"""

import argparse
import json
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from causal_start import sliced
from torch import Tensor

from mogan.data.cache import open_cache
from mogan.disk.files import replacing, write_atomically
from mogan.evaluation.statistics import mean_interval
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.autoencoder import decode_video
from mogan.models.causal import CausalDenoiser
from mogan.runs.generator import open_generator
from mogan.sampling.samplers import sample_student, to_frames
from mogan.schedule import levels_of, shifted_levels
from mogan.world.instruments import read_instruments

SIGMAS, BATCH, COLOURS = shifted_levels(4, 3.0), 16, ("#5C5C5C", "#0072B2", "#D55E00", "#009E73")
DISTANCES = {"frames": "distance of frames", "differences": "distance of differences"}
TRACKED = {"net": "net displacement, px/frame", "identity": "identity kept", "shape": "shape agrees"}


def way(enhanced: bool, count: int) -> str:
    """A setting's key; in all steps the first chunk has as many."""
    return f"{count}{'*' if enhanced or count == len(SIGMAS) else ''}"


def looked_at(made: Tensor, real: Tensor, vae: Any, captions: list[str]) -> dict[str, Any]:
    """Distances, and of each clip what the tracker finds."""
    pairs = {"frames": (made, real), "differences": (made.diff(dim=2), real.diff(dim=2))}
    found: dict[str, Any] = {
        name: sum(sliced(a[:, :, f].flatten(1), b[:, :, f].flatten(1)) for f in range(a.shape[2])) / a.shape[2]
        for name, (a, b) in pairs.items()
    }
    clips = [clip for part in made.split(BATCH) for clip in to_frames(decode_video(vae, part))]
    values = [read_instruments(clip, caption) for clip, caption in zip(clips, captions, strict=True)]
    return found | {name: [value[name] for value in values] for name in TRACKED}


@torch.no_grad()
def measured(model: str, real: Tensor, text: Tensor, captions: list[str], kept: Path) -> dict[str, dict[str, Any]]:
    """By setting what was found; read from ``kept`` if it is there."""
    about = [model, *captions]
    if kept.is_file() and (found := json.loads(kept.read_text()))["about"] == about:
        return found["ways"]
    source = open_generator(model)
    student, vae, ways = source.load().eval(), wan.load_vae(source.folder), {}
    assert isinstance(student, CausalDenoiser), f"{model} sees whole clips"
    for enhanced in (False, True):
        student.how = replace(student.how, first_sigmas=SIGMAS if enhanced else None)
        for count in range(1, len(SIGMAS) + enhanced):
            levels, shape = levels_of(SIGMAS, count), tuple(real.shape[1:])
            made = sample_student(student, text, shape, levels, list(range(len(captions))))
            ways[way(enhanced, count)] = looked_at(made, real, vae, captions)
    write_atomically(kept, json.dumps({"about": about, "ways": ways}))
    return ways


def told(runs: list[dict[str, Any]], name: str, captions: list[str]) -> tuple[float, float, float]:
    """Mean over models with the ends of its range or interval."""
    values = [run[name] for run in runs]
    if name in DISTANCES:
        return sum(values) / len(values), min(values), max(values)
    models = [number for number, of in enumerate(values) for _ in of]
    every = [value for of in values for value in of]
    found = mean_interval(every, captions * len(runs), *([models] if len(runs) > 1 else []))
    return found.mean, *(found.ci95 or (nan, nan))


def draw(found: dict[str, list[dict[str, dict[str, Any]]]], captions: list[str], out: Path) -> None:
    """A panel a number, over steps: a line a label, dashed with FFE."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from mogan.report.figures import STYLE

    steps, panels = range(1, len(SIGMAS) + 1), DISTANCES | TRACKED
    with rc_context(STYLE):
        figure = Figure(figsize=(3 * len(panels), 3.2), layout="constrained")
        for axis, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for (label, runs), colour in zip(found.items(), COLOURS, strict=False):
                for enhanced in (False, True):
                    points = [told([run[way(enhanced, count)] for run in runs], name, captions) for count in steps]
                    means, low, high = zip(*points, strict=True)
                    axis.plot(steps, means, "o--" if enhanced else "o-", color=colour, label="" if enhanced else label)
                    if enhanced:
                        axis.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
            axis.set(title=title, xlabel="steps (dashed: first chunk in 4)", xticks=steps)
        figure.axes[0].legend(frameon=False)
        with replacing(out) as temporary:
            figure.savefig(temporary, format="png", dpi=130)


def main() -> None:
    """Print the table; draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("models", nargs="+", metavar="[LABEL=]MODEL")
    parser.add_argument("--keep", type=Path, required=True, help="folder for what was measured, a file a model")
    parser.add_argument("--out", type=Path, help="PNG to draw")
    args = parser.parse_args()
    cache = open_cache(args.cache)
    captions = [entry["caption"] for entry in cache.entries]
    real = torch.stack([cache.latent(entry["id"]).float() for entry in cache.entries])
    text = stack_text([cache.text(caption) for caption in captions], "cpu")
    found: dict[str, list[dict[str, dict[str, Any]]]] = {}
    args.keep.mkdir(parents=True, exist_ok=True)
    for number, labelled in enumerate(args.models):
        label, _, model = labelled.rpartition("=")
        ways = measured(model, real, text, captions, args.keep / f"{number}.json")
        found.setdefault(label or model, []).append(ways)
    print(f"| | FFE | | {' | '.join(f'{count} steps' for count in range(1, 5))} |\n|---|---|---|---|---|---|---|")
    for name, title in (DISTANCES | TRACKED).items():
        for label, runs in found.items():
            for enhanced in (False, True):
                points = [told([run[way(enhanced, count)] for run in runs], name, captions) for count in range(1, 5)]
                cells = " | ".join(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in points)
                print(f"| {label} | {'yes' if enhanced else 'no'} | {title} | {cells} |")
    if args.out:
        draw(found, captions, args.out)


if __name__ == "__main__":
    main()
