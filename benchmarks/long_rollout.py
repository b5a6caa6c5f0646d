"""What a sink does to long clips (Reward Forcing, arXiv 2512.04678): drift, motion, return to the first frame, chunk by chunk.

A causal student, trained on clips of 5 latents, makes longer ones under windows of as many: without a sink, with a static sink,
with EMA sinks of several decays. The same noise for all. The lab's instruments look at 17 frames at a time, as long as a clip of
training; captions should name what can go on for ever, so bouncing and spinning are what `--captions` writes.

    python benchmarks/long_rollout.py --captions 48 > endless.txt
    python benchmarks/long_rollout.py MODEL ... --prompts endless.txt --chunks 40 --out DIR --figure FILE.png

Several models are training seeds of one recipe: intervals are over captions and seeds.
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from mogan.disk.files import replacing, write_atomically
from mogan.evaluation.statistics import mean_interval
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Cache, Policy
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import sample_causal
from mogan.sampling.samplers import to_frames
from mogan.world.instruments import read_instruments
from mogan.world.scenes import COLOURS, SHAPES

FRAMES, STEP = 17, 16  # of a clip of training; from one look to the next
LOOKS = {
    "speed": "speed, px/frame",
    "colour": "colour found",
    "shape": "shape agrees",
    "identity": "identity kept",
    "away": "distance from the first frame (rms, 0 to 255)",
}
SHOWN = ("shape", "identity", "speed", "away")
LINES = ("#5C5C5C", "#D55E00", "#E69F00", "#56B4E9", "#0072B2")


def sinks(window: int) -> dict[str, Policy]:
    """Every policy that is compared, by its name; frames are numbered by their place in the window."""
    averaged = {f"EMA sink, {decay:g}": Policy(window, 1, decay, True) for decay in (0.999, 0.99, 0.9)}
    return {"no sink": Policy(window, 0, None, True), "static sink": Policy(window, 1, None, True)} | averaged


def bytes_of(cache: Cache) -> int:
    """Of keys and values that it keeps."""
    return sum(t.numel() * t.element_size() for piece in cache.pieces for pair in piece.kv for t in pair)


def look(frames: np.ndarray, caption: str) -> list[dict[str, float]]:
    """Of a whole clip, uint8 ``(F, H, W, 3)``, what the instruments say of 17 frames at a time."""
    first, found = frames[0].astype(np.float32), []
    for start in range(0, len(frames) - FRAMES + 1, STEP):
        part = frames[start : start + FRAMES]
        values = read_instruments(part, caption)
        values["away"] = float(np.sqrt(np.square(part - first).mean()))
        found.append({name: values[name] for name in LOOKS})
    return found


@torch.no_grad()
def measure(model: str, prompts: list[str], chunks: int, batch: int, out: Path) -> dict[str, list]:
    """By policy a row per prompt: looks; read from ``out`` if they are there."""
    source = open_generator(model)
    student = source.load().eval()
    assert isinstance(student, CausalDenoiser), f"{model} sees whole clips"
    channels, window, *sides = wan.latent_shape(source.folder, source.geometry)
    encode, vae = wan.load_text(source.folder), wan.load_vae(source.folder)
    shape, texts, found = (channels, 1 + chunks, *sides), encode(prompts), {}
    how, remember, most = student.how, student.remember, 0

    def watched(*args):
        nonlocal most
        cache = remember(*args)
        most = max(most, bytes_of(cache))
        return cache

    student.remember = watched
    for name, policy in sinks(window).items():
        path, about = out / f"{name.replace(', ', '_').replace(' ', '_')}.json", [str(model), chunks, prompts]
        if not path.is_file() or json.loads(path.read_text()).get("about") != about:
            student.how, rows, most = replace(how, policy=policy), [], 0
            for at in range(0, len(prompts), batch):
                numbers = range(at, min(at + batch, len(prompts)))
                text = stack_text([texts[n] for n in numbers], "cpu")
                made = torch.cat(list(sample_causal(student, vae, text, shape, source.sigmas, numbers)), 2)
                rows += [look(clip, prompts[n]) for n, clip in zip(numbers, to_frames(made), strict=True)]
            bytes_per_clip = most // min(batch, len(prompts))
            write_atomically(path, json.dumps({"about": about, "bytes_per_clip": bytes_per_clip, "clips": rows}))
        found[name] = json.loads(path.read_text())
        print(f"{model}, {name}: at most {found[name]['bytes_per_clip'] / 1e6:.2f} MB of keys and values a clip")
    return found


def means(found: list[dict], prompts: list[str], name: str, policy: str) -> list:
    """Over captions and models, look by look."""
    rows = [clip for one in found for clip in one[policy]["clips"]]
    models = np.repeat(np.arange(len(found)), len(prompts)).tolist()
    factors = [prompts * len(found), *([models] if len(found) > 1 else [])]
    return [mean_interval([row[k][name] for row in rows], *factors) for k in range(len(rows[0]))]


def figure(found: list[dict], prompts: list[str], path: Path) -> None:
    """A panel a number, a line a policy, with bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(SHOWN), figsize=(3.3 * len(SHOWN), 3.2), layout="constrained")
    for axis, name in zip(axes, SHOWN, strict=True):
        for policy, colour in zip(found[0], LINES, strict=True):
            intervals = means(found, prompts, name, policy)
            x = 4 * (1 + np.arange(len(intervals)))
            low, high = zip(*(i.ci95 or (np.nan, np.nan) for i in intervals), strict=True)
            axis.plot(x, [i.mean for i in intervals], color=colour, label=policy)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(title=LOOKS[name], xlabel="latents made")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small")
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format="png")


def main() -> None:
    """Write captions; or measure, print the table and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--captions", type=int, help="write so many captions, and nothing else")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--chunks", type=int, default=40, help="latents after the first")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.captions:
        every = list(product(("bouncing", "spinning"), SHAPES, COLOURS))
        print("\n".join(f"a {colour} {shape} {kind}" for kind, shape, colour in every[: args.captions]))
        return
    prompts = args.prompts.read_text().splitlines()
    found = []
    for number, model in enumerate(args.models):
        (args.out / str(number)).mkdir(parents=True, exist_ok=True)
        found.append(measure(model, prompts, args.chunks, args.batch, args.out / str(number)))
    print(f"\n| | {' | '.join(f'{text}: first, last' for text in LOOKS.values())} |\n|---|{'---|' * len(LOOKS)}")
    for policy in found[0]:
        cells = []
        for name in LOOKS:
            first, *_, last = means(found, prompts, name, policy)
            low, high = last.ci95 or (np.nan, np.nan)
            cells.append(f"{first.mean:.3g}, {last.mean:.3g} [{low:.3g}, {high:.3g}]")
        print(f"| {policy} | {' | '.join(cells)} |")
    if args.figure:
        figure(found, prompts, args.figure)


if __name__ == "__main__":
    main()
