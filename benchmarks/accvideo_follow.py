"""Does a student follow its teacher? Both start from the same noise under the same prompt; how far apart do their clips end?

    grep -vxFf paths.txt held_out.txt > unseen.txt          # prompts whose paths no student was trained on
    mogan trajectories --prompts unseen.txt --out HELD --seeds 4 --first-seed 100000 --steps 48 --keep 0,48
    python benchmarks/accvideo_follow.py HELD "AccVideo=MODEL" ... DMD=MODEL ... --sheet FILE.png

A model is an export or a run; models of one label are training seeds of one recipe, and intervals (95 %) are over prompts and seeds.
HELD has several of the teacher's clips of every prompt. Each clip of a student is held against the one from its own noise, and
against the others of that prompt, which say how near clips are that have no more than the prompt in common:

- latents: root mean square of the difference, in units of that between two of the teacher's clips of the prompt. Blur alone
  brings a clip nearer to all of them (the prompt's mean lies at 0.7), so only the gap between own noise and other noise counts;
- nearest: the share of clips that are nearer to the teacher's clip of their own noise than to any other; blur leaves it alone;
- paths: root mean square distance, in pixels, of where the tracker finds the caption's first thing, over frames where it finds
  it in both clips, if they are half of them; found: the share of a clip's frames where it does.

A student sampled by Euler (AccVideo, TDM, Phased DMD) is a function of that noise. One that draws fresh noise between its steps (DMD,
MoGAN, causal students) sees it in the first step alone, and of that prediction it keeps what the fresh noise leaves: it departs by
design, and part of its distance is the sampler's. Its first step alone, a blurred clip to which nothing was added, is a line of
its own.
"""

import argparse
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mogan.config import LCM
from mogan.data.cache import Cache, open_cache
from mogan.data.video import contact_sheet
from mogan.evaluation.statistics import mean_interval
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.runs.generator import open_generator
from mogan.sampling.rollout import normal
from mogan.sampling.samplers import clips_of, sample_student, seeded
from mogan.world.captions import parse_caption
from mogan.world.tracking import track

SHOWN = (
    "latents, own noise", "other noise", "own is nearest", "paths (px), own noise", "other noise", "found",
)  # fmt: skip


@dataclass(frozen=True)
class Clips:
    """Of one prompt, a clip a seed: latents ``(S, C, F, H, W)``, frames ``(S, F, H, W, 3)``, places ``(S, F, 2)``, NaN if not found."""

    latents: Tensor
    frames: np.ndarray
    paths: np.ndarray


def clips_from(vae, latents_SCFHW: Tensor, caption: str) -> Clips:
    """Decode latents and follow the caption's first thing."""
    said = parse_caption(caption)
    assert said is not None, f"not a caption of the lab: {caption!r}"
    frames = np.stack([np.stack(list(clip)) for clip in clips_of(vae, latents_SCFHW)])
    return Clips(latents_SCFHW, frames, np.stack([track(clip, said).centres_F2 for clip in frames]))


def rms(one: Tensor, two: Tensor) -> float:
    """Of the difference of two latents."""
    return float((one - two).square().mean().sqrt())


def path_distance(one_F2: np.ndarray, two_F2: np.ndarray) -> float:
    """Root mean square distance in pixels over frames where both are found; NaN if they are less than half."""
    gaps = np.square(one_F2 - two_F2).sum(1)
    both = np.isfinite(gaps)
    return float(np.sqrt(gaps[both].mean())) if 2 * both.sum() >= len(gaps) else np.nan


def followed(made: Clips, teacher: Clips) -> np.ndarray:
    """What is shown, of every clip of a prompt, ``(S, 6)``; clip ``s`` of both began as the same noise."""
    unit = np.mean(others(np.array([[rms(a, b) for b in teacher.latents] for a in teacher.latents])))
    latents = np.array([[rms(a, b) for b in teacher.latents] for a in made.latents]) / unit
    paths = np.array([[path_distance(a, b) for b in teacher.paths] for a in made.paths])
    nearest = latents.argmin(1) == np.arange(len(latents))
    found = np.isfinite(made.paths[..., 0]).mean(1)
    return np.stack([latents.diagonal(), others(latents), nearest, paths.diagonal(), others(paths), found], 1)


def others(square: np.ndarray) -> list[float]:
    """Of every row the mean of what is a number away from the diagonal; NaN if nothing is."""
    rows = [np.delete(row, s) for s, row in enumerate(square)]
    return [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else np.nan for row in rows]


def made_by(model: str, store: Cache, prompts: dict[str, list[dict]]) -> dict[str, dict[str, Tensor]]:
    """By way of sampling and prompt: latents from the store's own noise; "" is the student's own way."""
    source = open_generator(model)
    assert source.sigmas is not None, f"{model} is no few-step student"
    store.require(**{part: wan.fingerprint(source.folder, part) for part in ("text_encoder", "vae")})
    student, shape = source.load().eval(), tuple(store.facts["latent_shape"])
    ways = {"": source.sigmas}
    if source.solver == LCM and source.causal is None:
        ways[", first step alone"] = source.sigmas[:1]
    found: dict[str, dict[str, Tensor]] = {way: {} for way in ways}
    for caption, entries in prompts.items():
        seeds = [entry["seed"] for entry in entries]
        kept = torch.stack([store.path_to(entry["id"], (1.0,))[0] for entry in entries])
        noise = normal(torch.Size((len(seeds), *shape)), seeded(seeds), "cpu")
        assert torch.equal(noise.to(kept.dtype), kept), "a seed gives other noise here than where the store was made"
        text = stack_text([store.text(caption)] * len(seeds), "cpu")
        for way, sigmas in ways.items():
            found[way][caption] = sample_student(student, text, shape, sigmas, seeds, source.solver)
    return found


def table(lines: dict[str, np.ndarray], captions: list[str]) -> None:
    """Print means and intervals over prompts and, if there are several, training seeds; arrays are ``(models, clips, 6)``."""
    print(f"\n| | {' | '.join(SHOWN)} |\n|---|{'---|' * len(SHOWN)}")
    for line, values in lines.items():
        models = np.repeat(np.arange(len(values)), len(captions)).tolist()
        factors = [captions * len(values), *([models] if len(values) > 1 else [])]
        found = [mean_interval(column, *factors) for column in values.reshape(-1, len(SHOWN)).T.tolist()]
        ends = [f" [{i.ci95[0]:.2f}, {i.ci95[1]:.2f}]" if i.ci95 else "" for i in found]
        print(f"| {line} | {' | '.join(f'{i.mean:.2f}{end}' for i, end in zip(found, ends, strict=True))} |")


def main() -> None:
    """Print the table; draw a few prompts, everybody from the same noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("models", nargs="+", metavar="LABEL=MODEL")
    parser.add_argument("--sheet", type=Path, help="PNG: the teacher and each label's first model, a row each")
    parser.add_argument("--drawn", type=int, default=4, help="prompts in it")
    args = parser.parse_args()
    store = open_cache(args.store)
    entries = sorted(store.entries, key=lambda entry: (entry["caption"], entry["seed"]))
    prompts = {caption: list(some) for caption, some in groupby(entries, lambda entry: entry["caption"])}
    assert all(len(some) > 1 for some in prompts.values()), "make the store with two --seeds or more"
    vae = wan.load_vae(open_generator(args.models[0].partition("=")[2]).folder)
    ends = {c: torch.stack([store.path_to(e["id"], (0.0,))[0].float() for e in some]) for c, some in prompts.items()}
    teacher = {caption: clips_from(vae, latents, caption) for caption, latents in ends.items()}
    lines = {"teacher": [np.concatenate([followed(clips, clips) for clips in teacher.values()])]}
    drawn = list(prompts)[:: max(1, len(prompts) // args.drawn)][: args.drawn]
    strips = {caption: {"teacher": teacher[caption].frames[0]} for caption in drawn}
    for label, _, model in (labelled.partition("=") for labelled in args.models):
        for way, found in made_by(model, store, prompts).items():
            made = {caption: clips_from(vae, latents, caption) for caption, latents in found.items()}
            rows = [followed(made[caption], teacher[caption]) for caption in prompts]
            lines.setdefault(label + way, []).append(np.concatenate(rows))
            for caption in drawn:
                strips[caption].setdefault(label + way, made[caption].frames[0])
    print(f"{len(prompts)} prompts, {len(entries)} clips of each model")
    whole, captions = {line: np.stack(runs) for line, runs in lines.items()}, [entry["caption"] for entry in entries]
    table(whole, captions)
    base, *compared = list(whole)[1:]
    alike = {line: whole[line] - whole[base] for line in compared if len(whole[line]) == len(whole[base])}
    if alike:
        print(f"\nMinus {base}, clip by clip:")
        table(alike, captions)
    if args.sheet:
        titles = [f"{line}: {caption}" for caption in drawn for line in strips[caption]]
        edges = ((0, 0), (0, 0), (1, 1), (0, 0))  # white, between frames
        shown = [np.pad(strip, edges, constant_values=255) for c in drawn for strip in strips[c].values()]
        contact_sheet(shown, args.sheet, 9, titles, shown[0].shape[1])


if __name__ == "__main__":
    main()
