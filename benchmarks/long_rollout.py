"""What a sink does to long clips (Reward Forcing, arXiv 2512.04678): drift, motion, return to the first frame, chunk by chunk.

A causal student, trained on clips of 5 latents, makes longer ones under windows of as many: without a sink, with a static sink,
with EMA sinks of several decays. The same noise for all. The lab's instruments look at 17 frames at a time, as long as a clip of
training; captions should name what can go on for ever, so bouncing and spinning are what `--captions` writes.

    python benchmarks/long_rollout.py --captions 24 > endless.txt
    python benchmarks/long_rollout.py MODEL ... --prompts endless.txt --chunks 40 --out DIR --figure FILE.png
    python benchmarks/long_rollout.py MoGAN=MODEL ... DMD=MODEL ... --sinks "static sink" --prompts endless.txt --out DIR

A name before "=" is a label. Models of one label are training seeds of one recipe: intervals are over captions and seeds.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from mogan.disk.files import replacing, write_atomically
from mogan.evaluation.statistics import Interval, mean_interval
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
LATE = 5  # looks at the end that are counted together
LOOKS = {
    "speed": "speed, px/frame",
    "colour": "colour found",
    "shape": "shape agrees",
    "identity": "identity kept",
    "away": "distance from the first frame (rms, 0 to 255)",
}
SHOWN = ("shape", "identity", "speed", "away")
Rows = list[list[dict[str, float]]]  # clip by clip, look by look


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
def measure(model: str, prompts: list[str], given: argparse.Namespace, out: Path) -> dict[str, Rows]:
    """By policy a row per prompt: looks; read from ``out`` if they are there."""
    chunks, batch = given.chunks, given.batch
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
        if given.sinks and name not in given.sinks:
            continue
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
        kept = json.loads(path.read_text())
        found[name] = kept["clips"]
        print(f"{model}, {name}: at most {kept['bytes_per_clip'] / 1e6:.2f} MB of keys and values a clip", flush=True)
    return found


def interval(values_N: np.ndarray, models: int, prompts: list[str]) -> Interval:
    """Of a number of each clip, model by model."""
    factors = [prompts * models, *([np.repeat(np.arange(models), len(prompts)).tolist()] if models > 1 else [])]
    return mean_interval(values_N.tolist(), *factors)


def values(runs: list[Rows], name: str) -> np.ndarray:
    """Of all clips, look by look."""
    return np.array([[look[name] for look in clip] for run in runs for clip in run])


def table(pairs: Mapping[str, tuple[list[Rows], list[Rows] | None]], prompts: list[str]) -> None:
    """Print the first look and the mean of the last ones; of what has a base, how they differ from its, clip by clip."""
    print(f"\n| | {' | '.join(LOOKS.values())} |\n|---|{'---|' * len(LOOKS)}")
    for line, (runs, base) in pairs.items():
        cells = []
        for name in LOOKS:
            found = values(runs, name) - (0 if base is None else values(base, name))
            late = [np.nanmean(row) if np.isfinite(row).any() else np.nan for row in found[:, -LATE:]]
            ends = (interval(which, len(runs), prompts) for which in (found[:, 0], np.array(late)))
            cells.append("; ".join(f"{i.mean:.3g} [{', '.join(f'{end:.3g}' for end in i.ci95 or ())}]" for i in ends))
        print(f"| {line} | {' | '.join(cells)} |")


def figure(lines: Mapping[str, list[Rows]], bases: Mapping[str, list[Rows]], prompts: list[str], path: Path) -> None:
    """A panel a number, look by look; below what a line has more than its base, clip by clip, with bands."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from mogan.report.figures import STYLE

    rows = 2 if bases else 1
    with rc_context(STYLE):
        drawn = Figure(figsize=(3.4 * len(SHOWN), 0.5 + 2.6 * rows), layout="constrained")
        for column, axes in enumerate(drawn.subplots(rows, len(SHOWN), squeeze=False).T):
            name = SHOWN[column]
            for number, (line, runs) in enumerate(lines.items()):
                found, x = values(runs, name), STEP // 4 * (1 + np.arange(len(runs[0][0])))
                axes[0].plot(x, np.nanmean(found, 0), color=f"C{number}", label=line)
                if line in bases:
                    gaps = found - values(bases[line], name)
                    each = [interval(gap, len(runs), prompts) for gap in gaps.T]
                    low, high = zip(*(i.ci95 or (np.nan, np.nan) for i in each), strict=True)
                    axes[1].plot(x, [i.mean for i in each], color=f"C{number}")
                    axes[1].fill_between(x, low, high, color=f"C{number}", alpha=0.12, lw=0)
            axes[0].set_title(LOOKS[name].split(" (")[0])
            axes[-1].set_xlabel("latents made")
            if bases:
                axes[1].set_title("minus its base, clip by clip")
                axes[1].axhline(0, color="0.5", lw=0.8)
        drawn.legend(
            *drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines), frameon=False
        )
        with replacing(path) as temporary:
            drawn.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """Write captions; or measure, print the tables and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="[LABEL=]MODEL")
    parser.add_argument("--captions", type=int, help="write so many captions of 48, and nothing else")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--sinks", nargs="+", choices=list(sinks(5)), help="left out: all")
    parser.add_argument("--chunks", type=int, default=40, help="latents after the first")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.captions:
        every = list(product(("bouncing", "spinning"), SHAPES, COLOURS))
        spaced = [every[n * len(every) // args.captions] for n in range(args.captions)]
        print("\n".join(f"a {colour} {shape} {kind}" for kind, shape, colour in spaced))
        return
    prompts, lines = args.prompts.read_text().splitlines(), dict[tuple[str, str], list[Rows]]()
    for number, labelled in enumerate(args.models):
        label, _, model = labelled.rpartition("=")
        (args.out / str(number)).mkdir(parents=True, exist_ok=True)
        for policy, rows in measure(model, prompts, args, args.out / str(number)).items():
            lines.setdefault((label, policy), []).append(rows)
    names = {key: ", ".join(filter(None, key)) for key in lines}
    table({names[key]: (runs, None) for key, runs in lines.items()}, prompts)
    (first_label, first_policy), *_ = lines
    several = any(label != first_label for label, _ in lines)
    bases = {key: (first_label, key[1]) if several else (key[0], first_policy) for key in lines}
    pairs = {names[key]: (runs, lines[bases[key]]) for key, runs in lines.items() if bases[key] != key}
    if len({len(runs) for runs in lines.values()}) > 1:
        pairs = {}  # of unequal numbers of models nothing is clip by clip
    if pairs:
        print(f"\nMinus {f'{first_label} under the same sink' if several else first_policy}, clip by clip:")
        table(pairs, prompts)
    if args.figure:
        figure(
            {names[key]: runs for key, runs in lines.items()},
            {k: b for k, (_, b) in pairs.items()},
            prompts,
            args.figure,
        )


if __name__ == "__main__":
    main()
