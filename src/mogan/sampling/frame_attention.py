"""Where a model's attention goes, frame by frame, and what it would cost to leave most of it out: numbers and a picture."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from mogan.data.lists import read_prompts
from mogan.devices import choose_device
from mogan.disk.files import replacing, writable_file, writable_folder, write_atomically
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser
from mogan.models.frame_sparse import errors, kept_share, search, tiles, watched
from mogan.runs.generator import Generator, open_generator
from mogan.sampling.sample import encode_each
from mogan.sampling.samplers import sample_student, sample_teacher
from mogan.schedule import add_noise

Found = dict[float, dict[int, "_Sums"]]  # by level and block


def attention(
    *,
    prompts: Path,
    out: Path,
    model: str = "lab",
    levels: tuple[float, ...] = (0.9, 0.6, 0.3),
    thresholds: tuple[float, ...] = (),
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: str = "auto",
) -> None:
    """Show how much of a model's self-attention stays within a frame, and how alike the rest is: attention.json and .png.

    The model makes a clip for every prompt; at each level noise is added to it and every block's attention is read. With
    thresholds the frame-sparse attention of Efficient-vDiT is tried too, block by block: a few reference frames see all and
    are seen by all, every other frame sees those and itself.

    Args:
        prompts: list of prompts, as for `mogan sample`; a few are enough.
        out: folder for the two files.
        model: lab (its teacher), lab-student, a diffusers folder, a hub id or a training run.
        levels: of noise, above 0 and up to 1.
        thresholds: largest error of a block, relative to what it adds, such as 0.05: finds the fewest reference frames.
            `mogan tiles` makes a model of what was found.
        precision: of the network; auto is bf16 where the hardware is fast at it.
        device: auto, cpu or cuda.
    """
    if not levels or not all(0 < level <= 1 for level in levels):
        raise UserError(f"--levels lie above 0 and up to 1, at least one, not {' '.join(map(str, levels)) or 'none'}")
    if not all(threshold >= 0 for threshold in thresholds):
        raise UserError(f"--thresholds are at least 0, not {' '.join(map(str, thresholds))}")
    target = choose_device(device)
    lines = list(dict.fromkeys(read_prompts(prompts)))
    source = open_generator(wan.base_named(model))
    wan.refuse_controls(source.folder, "attention is measured without them")
    source.require_whole_clips(model)
    if thresholds and source.mask is not None:
        raise UserError(f"{model} is frame-sparse already: leave out --thresholds, or name the model it was made of")
    writable_folder(out)
    writable_file(out / "attention.json", rb'\s*\{\s*"model"')
    frames = wan.latent_shape(source.folder, source.geometry)[1]
    found: Found = {level: {} for level in levels}
    wrong: dict[float, Tensor] = {}
    dtype = wan.dtype_of(precision, target)
    for denoiser, clip, text in _clips(source, lines, target, dtype):
        for number, level in enumerate(levels):
            sigma = torch.full((1,), level, device=target)
            noisy = add_noise(
                clip,
                torch.randn(clip.shape, generator=torch.Generator().manual_seed(len(lines) + number)).to(clip),
                sigma,
            )
            expert = _expert(denoiser, level)

            def see(block: int, query: Tensor, key: Tensor, of: dict[int, "_Sums"] = found[level]) -> None:
                of.setdefault(block, _Sums(frames)).add(*tiles(query, key, frames))

            with torch.no_grad(), watched(expert, see):
                denoiser.velocity(noisy, sigma, text)
            if thresholds:
                cost = errors(expert, frames, partial(denoiser.velocity, noisy, sigma, text))
                wrong[level] = wrong.get(level, 0) + cost / len(lines)
    facts = {"model": model, "weights": source.mark(), "frames": frames, "prompts": lines, "levels": list(levels)}
    facts["blocks"] = {str(level): [sums.mean() for sums in of.values()] for level, of in found.items()}
    if thresholds:
        facts["sparse"] = {str(level): _sparse(cost, frames, thresholds) for level, cost in wrong.items()}
    write_atomically(out / "attention.json", json.dumps(facts, indent=1) + "\n")
    _draw(out / "attention.png", found, frames)
    print("\n".join(_told(facts, frames)))


def _expert(denoiser: Denoiser, level: float) -> Any:
    high = denoiser.boundary is None or level >= denoiser.boundary
    return denoiser.transformer if high else denoiser.transformer_2


def _clips(
    source: Generator, prompts: list[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Denoiser, Tensor, Tensor]]:
    """The network with a clean clip and the text of every prompt, one at a time."""
    usual = wan.defaults(source.folder)
    texts = encode_each([*prompts, usual.negative_prompt], source.folder, device)
    denoiser = source.load(dtype).to(device).eval()
    shape, null = wan.latent_shape(source.folder, source.geometry), stack_text([texts[usual.negative_prompt]], device)
    for seed, prompt in enumerate(tqdm(prompts, desc="attention", unit="clip")):
        text = stack_text([texts[prompt]], device)
        if source.sigmas is not None:
            clip = sample_student(denoiser, text, shape, source.sigmas, [seed], source.solver)
        else:
            clip = sample_teacher(
                denoiser, text, null, shape, [seed], steps=usual.steps, guidance=usual.guidance, shift=usual.shift
            )
        yield denoiser, clip, text


class _Sums:
    """Means over clips of what one block's attention does at one level."""

    def __init__(self, frames: int):
        self.mass, self.alike, self.count = torch.zeros(frames, frames), torch.zeros(frames), 0

    def add(self, mass: Tensor, alike: Tensor) -> None:
        """One call more."""
        self.mass, self.alike, self.count = self.mass + mass.cpu(), self.alike + alike.cpu(), self.count + 1

    def mean(self) -> dict[str, Any]:
        """As it stands in attention.json."""
        mass = self.mass / self.count
        own, alike = mass.diagonal().mean().item(), (self.alike / self.count).mean().item()
        return {"own": own, "alike": alike, "mass": mass.tolist()}


def _sparse(cost_LF: Tensor, frames: int, thresholds: tuple[float, ...]) -> dict[str, Any]:
    """Errors by number of references, and what each threshold leads to."""
    chosen = {}
    for threshold in thresholds:
        counts = search(cost_LF, threshold)
        chosen[str(threshold)] = {
            "references": counts,
            "kept": sum(kept_share(frames, count) for count in counts) / len(counts),
        }
    return {"errors": cost_LF.tolist(), "thresholds": chosen}


def _told(facts: dict[str, Any], frames: int) -> Iterator[str]:
    yield f"level  own frame (even: {1 / frames:.2f})  likeness of other frames' tiles"
    for level, blocks in facts["blocks"].items():
        own, alike = ([block[name] for block in blocks] for name in ("own", "alike"))
        yield f"{level:>5}  {min(own):.2f} to {max(own):.2f}  {min(alike):.2f} to {max(alike):.2f}"
    for level, sparse in facts.get("sparse", {}).items():
        for threshold, found in sparse["thresholds"].items():
            counts = " ".join(map(str, found["references"]))
            yield f"level {level}, error {threshold}: {found['kept']:.0%} of pairs of frames kept; references {counts}"


def _draw(path: Path, found: Found, frames: int) -> None:
    """A heat map of the mass per pair of frames: a column per block, a row per level."""
    blocks = max(len(of) for of in found.values())
    figure = Figure(figsize=(1.3 * blocks + 0.6, 1.4 * len(found) + 0.5), layout="constrained")
    grid = figure.subplots(len(found), blocks, squeeze=False)
    most = max(float((sums.mass / sums.count).max()) for of in found.values() for sums in of.values())
    for place, (row, (level, of)) in enumerate(zip(grid, found.items(), strict=True)):
        for number, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            if number in of:
                axes.imshow(of[number].mass / of[number].count, vmin=0, vmax=most, cmap="magma")
            if place == 0:
                axes.set_title(f"block {number}", fontsize=8)
        row[0].set_ylabel(f"level {level}", fontsize=8)
    figure.suptitle(f"from a frame (row) to a frame (column) of {frames}; black 0, white {most:.2f}", fontsize=8)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)
