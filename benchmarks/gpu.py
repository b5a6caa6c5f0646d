"""One GPU, no network: one full iteration of mogan_wan_1_3b on random weights, beside what `mogan estimate` said.

Makes a random Wan2.1-T2V-1.3B folder (real configuration files, full depth, 7 GB) and a cache of random latents in --work,
runs every update of the plan at batch 1 in bf16, at 81 x 480 x 832 or the largest clip that fits, samples with 3 and with 50
steps, and writes the table between the markers of docs/performance.md. Without a GPU the same code runs narrow and small
and writes nothing.

    make gpu
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mogan.config import Config
from mogan.costs.machines import MACHINES
from mogan.data.cache import ensure_text, open_cache, save_latent, text_path
from mogan.disk.files import write_atomically
from mogan.estimate.command import pricing
from mogan.estimate.random_wan import random_wan
from mogan.models.attention import stack_text
from mogan.models.discriminator import PROMPT
from mogan.models.wan import fingerprint, geometry, latent_shape, load_text
from mogan.motion.flow import RaftConfig, save_raft
from mogan.recipes import find_recipe
from mogan.sampling.rollout import roll_out
from mogan.training.assemble import Assembly, assemble
from mogan.training.steps import Position, step

SIZES = ((81, 480, 832), (81, 320, 576), (49, 320, 576), (49, 256, 448))  # the next one where the last did not fit
DRY = (49, 64, 64)
NARROW = {
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 64, "freq_dim": 64},
    "vae": {"base_dim": 8},
    "text_encoder": {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16},
}
BEGIN, END = "<!-- make gpu writes below -->", "<!-- make gpu wrote above -->"


def one_clip(config: Config, frames: int) -> Config:
    """The recipe at batch 1, each update once, one window in the middle, RAFT with random weights."""
    plan = tuple(replace(u, batch=1, accumulate=1, times=1) for u in config.plan)
    middle = (1 + (frames - 1) // 4 - config.objectives["gan"].window) // 2
    return replace(config.changed("gan", starts=(middle,)), plan=plan, sample_prompts=0)


def random_raft(path: Path) -> Path:
    """A random raft_large of torchvision: time and memory do not depend on weights."""
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    torch.save(raft_large().state_dict(), path)
    return path


def random_cache(folder: Path, model: Path, clip: tuple[int, int, int]) -> Path:
    """Two clips of random latents, as `mogan prepare` would lay them out."""
    folder.mkdir(parents=True)
    size = replace(geometry(model), frames=clip[0], height=clip[1], width=clip[2])
    captions = [
        f"a random clip that is number {number} of two and moves well from left to right" for number in range(2)
    ]
    for number in range(2):
        save_latent(folder, f"clip{number}", torch.randn(latent_shape(model, size)), {})
    ensure_text(folder, ["", PROMPT, *captions], load_text(model))
    facts = {"format": "mogan-cache", "version": 1, "contents": "clips", "vae": fingerprint(model, "vae")}
    facts |= {"fps": size.fps, "frames": size.frames, "height": size.height, "width": size.width}
    entries = [{"id": f"clip{number}", "caption": caption, "motion": 15.0} for number, caption in enumerate(captions)]
    assert all(text_path(folder, c).exists() for c in captions)
    write_atomically(folder / "index.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
    write_atomically(folder / "cache.json", json.dumps(facts))
    return folder


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the GPU's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run_iteration(parts: Assembly) -> list[tuple[str, float, float, float]]:
    """Label, loss, seconds (of the second time) and peak bytes of each update; raises if a loss is not finite."""
    rows = []
    for index, update in enumerate(parts.config.plan):
        for iteration in (0, 1):  # the first one warms kernels up and makes the optimiser's moments
            if parts.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            record: dict[str, float] = {}
            where = Position(0, iteration, index, 0)
            seconds = timed(lambda r=record, w=where: r.update(step(parts, w)), parts.device)
        peak = torch.cuda.max_memory_allocated() if parts.device.type == "cuda" else math.nan
        assert math.isfinite(record["loss"]), f"{update.label}: the loss is {record['loss']}"
        rows.append((update.label, record["loss"], seconds, float(peak)))
    return rows


@torch.no_grad()
def sampling_seconds(parts: Assembly) -> tuple[float, float]:
    """3 steps of the student, and 50 of a guided teacher (two calls a step), without decoding."""
    text = stack_text([parts.cache.text(parts.cache.entries[0]["caption"])], parts.device)
    noise = torch.randn(1, *parts.latent_shape, device=parts.device)
    generator = torch.Generator().manual_seed(0)

    def few() -> None:
        roll_out(parts.student, noise, text, parts.config.sigmas, generator)

    def many() -> None:
        both, texts = torch.cat([noise, noise]), torch.cat([text, text])
        for i in range(50):
            parts.student.velocity(both, torch.full((2,), 1 - i / 50, device=parts.device), texts)

    few()
    return timed(few, parts.device), timed(many, parts.device)


def measure(work: Path, clip: tuple[int, int, int], device: str, narrow: bool) -> list[str]:
    """Lines of the table for one clip size."""
    raft = random_raft(work / "raft.pth")
    model = work / ("random-narrow" if narrow else "random-1.3b")
    if not model.exists():
        changes = NARROW if narrow else None
        random_wan(model, layers=16 if narrow else None, text_layers=1, clip=clip, changes=changes)
    config = one_clip(find_recipe("mogan_wan_1_3b"), clip[0])
    config = config.changed("gan", flow=str(raft))
    cache = work / f"cache-{'narrow-' if narrow else ''}{'x'.join(map(str, clip))}"
    if not cache.exists():
        random_cache(cache, model, clip)
    if narrow:  # raft_large needs 128 pixels, a small one reads 64
        save_raft(RaftConfig().build(), RaftConfig(), work / "raft")
        config = config.changed("gan", flow=str(work / "raft"), flow_iterations=2)
    parts = assemble(config, open_cache(cache), model=str(model), student=str(model), run=None, device=device)
    rows = run_iteration(parts)
    few, many = sampling_seconds(parts)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (dry run, narrow networks)"
    gpu = next((g for g in MACHINES if g.split("-")[0] in name.lower()), "h200")
    frames, height, width = clip
    price = pricing(config, str(model), gpu, frames=frames, height=height, width=width, clips=0)
    predicted = price(config, 1, None)
    lines = [
        f"{name}, torch {torch.__version__}, {frames} x {height} x {width}, batch 1, bf16, random weights, `make gpu`.",
        "",
    ]
    lines += [
        "| update | loss | seconds | estimated | peak GB | estimated | model FLOPs utilisation |",
        "|---|---|---|---|---|---|---|",
    ]
    for (label, loss, seconds, peak), said in zip(rows, predicted.steps, strict=True):
        share = said.model_flops / seconds / MACHINES[gpu].bf16
        lines.append(
            f"| {label} | {loss:.3g} | {seconds:.2f} | {said.seconds:.2f} | {peak / 1e9:.1f} | {said.peak / 1e9:.1f} "
            f"| {f'{share:.0%}' if device == 'cuda' else '-'} |"
        )
    lines += [
        "",
        f"Sampling without decode: 3 steps {few:.2f} s, 50 guided steps {many:.2f} s, {many / few:.1f} times as long.",
    ]
    return lines


def write_table(page: Path, lines: list[str]) -> None:
    """Replace what stands between the markers."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write_atomically(page, f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def main() -> None:
    """Measure, print, and on a GPU write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print("no GPU here: a dry run on narrow networks, nothing is written", file=sys.stderr)
        print("\n".join(measure(arguments.work, DRY, "cpu", narrow=True)))
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for clip in SIZES:
        try:
            lines = measure(arguments.work, clip, "cuda", narrow=False)
        except torch.cuda.OutOfMemoryError:
            print(f"{clip} does not fit", file=sys.stderr)
            torch.cuda.empty_cache()
            continue
        print("\n".join(lines))
        write_table(arguments.page, lines)
        return
    sys.exit("no size fits this GPU; see `mogan estimate mogan_wan_1_3b --gpu ...` for what to change")


if __name__ == "__main__":
    main()
