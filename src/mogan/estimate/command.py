"""``mogan estimate``: the question, and the answer as a table."""

import json
import sys
from dataclasses import asdict, replace
from typing import Annotated, Any

import tyro

from mogan.costs.machines import CONTEXT, FRAGMENTS, MACHINES, REACHED_BANDWIDTH, REACHED_COMPUTE
from mogan.errors import UserError, closest
from mogan.estimate.advice import Change, advise
from mogan.estimate.fit import fit as fitted
from mogan.estimate.predict import Estimate
from mogan.estimate.pricing import pricing
from mogan.ranges import at_least, between
from mogan.recipes import NAMES, find_recipe

GB = 1e9


def estimate(
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help=NAMES)],
    *,
    gpu: str = "h200",
    gpus: int = 1,
    model: str | None = None,
    lora: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    clips: int = 15000,
    references: tuple[int, ...] = (),
    fit: bool = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Predict memory, time and cost of a recipe, before paying for them.

    The networks are built from their configuration files without weights and the code that trains is run on them without
    contents, so shapes and operations are the real ones; nothing is downloaded. What a GPU reaches of its data sheet is an
    assumption (see docs/scaling.md). Where the run does not fit, it says what to change first.

    Args:
        recipe: a name such as mogan_wan_1_3b, or your own module:function.
        gpu: h200, h100, a100-80, a100-40, l40s or 4090.
        gpus: how many; networks are sharded over them with FSDP2, but for frozen weights that adapters share.
        model: a folder with transformer, vae and text_encoder config.json, lab, or a published model by name
            (wan2.1-t2v-1.3b, wan2.1-t2v-14b, wan2.2-t2v-a14b, wan2.2-ti2v-5b); the recipe's own by default.
        lora: rank of adapters that student, fake score and MoGAN's discriminator learn in place of all their weights.
        frames: of a clip, in place of the model's.
        height: pixels.
        width: pixels.
        clips: real clips (MoGAN: 15000). What the discriminator sees of those that the run draws is computed once, on the
            way; 0 if the cache has it.
        references: of a frame-sparse student (`mogan tiles`) how many frames all others see: one number for every block, or one
            for each; a folder that `mogan tiles` made says so itself. Teachers are dense.
        fit: with what `mogan train --fit` would choose for this GPU, which is said first.
        json_output: print JSON.
    """
    if gpu not in MACHINES:
        hint = closest(gpu, MACHINES) or f": use one of {', '.join(MACHINES)}"
        raise UserError(f"no machine {gpu!r}{hint}")
    at_least(1, frames=frames, height=height, width=width)
    between(1, 10_000, lora=lora)
    between(1, 4096, gpus=gpus)
    between(0, 10**7, clips=clips)  # their order is drawn
    config = find_recipe(recipe)
    lora = lora or config.lora
    if gpus > 1 and config.alone:
        raise UserError(f"{config.alone}: leave out --gpus, or estimate another recipe")
    size: dict[str, Any] = {"frames": frames, "height": height, "width": width}
    price = pricing(config, model, MACHINES[gpu], **size, clips=clips, references=references, lora=lora)
    if fit:
        config, said = fitted(replace(config, lora=lora), gpus, price)
        lora = config.lora
        print("\n".join(f"to fit the {MACHINES[gpu].name}: {line}" for line in said), file=sys.stderr)
    found = price(config, gpus, lora)
    changes = () if found.fits else advise(config, gpus, lora, price)
    if json_output:
        print(json.dumps(as_json(found, changes), indent=2))
    else:
        print(as_table(found, changes))


def as_json(found: Estimate, changes: tuple[Change, ...]) -> dict[str, Any]:
    """Everything in the table, in bytes, FLOPs and seconds."""
    return asdict(found) | {
        "peak": found.peak,
        "host": found.host,
        "fits": found.fits,
        "iteration_seconds": found.iteration_seconds,
        "hours": found.hours,
        "checkpoint": found.checkpoint,
        "gpu_hours": found.hours * found.gpus,
        "changes": [asdict(c) for c in changes],
    }


def as_table(found: Estimate, changes: tuple[Change, ...]) -> str:
    """The answer for people."""
    frames, height, width = found.clip
    adapters = f", adapters of rank {found.lora}" if found.lora else ""
    title = (
        f"{found.recipe} on {found.model}, {frames} x {height} x {width}, "
        f"{found.gpus} x {found.machine.name}{adapters}, checkpointing {'on' if found.checkpointing else 'off'}"
    )
    assumed = (
        f"assumed, not measured: {REACHED_COMPUTE:.0%} of peak FLOPS, {REACHED_BANDWIDTH:.0%} of memory bandwidth, "
        f"{CONTEXT / GB:g} GB and {FRAGMENTS:.0%} of memory lost to the driver and fragments"
    )
    blocks = [[title], _networks(found), _updates(found), _observation(found), _beside(found), _sampling(found)]
    blocks += [_whole(found), _changes(found, changes), [assumed]]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _networks(found: Estimate) -> list[str]:
    lines = [f"{'per GPU, GB':<20}{'parameters':>12}{'weights':>10}{'gradients':>11}{'Adam':>9}{'average':>9}"]
    for n in found.networks:
        numbers = (n.weights, n.gradients, n.moments, n.average)
        cells = "".join(
            f"{x / GB:>{w}.2f}" if x else f"{'-':>{w}}" for x, w in zip(numbers, (10, 11, 9, 9), strict=True)
        )
        lines.append(f"{n.name:<20}{n.parameters / 1e6:>10.0f} M{cells}")
    return lines


def _updates(found: Estimate) -> list[str]:
    head = f"{'update':<24}{'times':>6}{'clips':>7}{'at once':>9}{'activations':>13}{'peak GB':>9}{'PFLOP':>9}{'seconds':>9}"
    return [head] + [
        f"{s.label:<24}{s.times * s.share:>6.3g}{s.clips:>7g}{s.part:>9}{s.activations / GB:>13.1f}{s.peak / GB:>9.1f}"
        f"{s.flops / 1e15:>9.2f}{s.seconds:>9.1f}"
        for s in found.steps
    ]


def _observation(found: Estimate) -> list[str]:
    if not found.observation:
        return []
    head = f"{'motion observation, one clip':<35}{'kept GB':>9}{'peak GB':>13}{'PFLOP':>18}{'seconds':>9}"
    return [head] + [
        f"{s.name:<35}{s.held / GB:>9.1f}{s.peak / GB:>13.1f}{s.flops / 1e15:>18.2f}{s.seconds:>9.2f}"
        for s in found.observation
    ]


def _beside(found: Estimate) -> list[str]:
    head = f"{'beside the updates':<35}{'times':>9}{'peak GB':>13}{'seconds each':>18}{'hours':>9}"
    return [head] + [
        f"{b.name:<35}{b.times:>9g}{b.peak / GB:>13.1f}{b.seconds:>18.2f}{b.times * b.seconds / 3600:>9.2f}{' if asked' * b.asked}"
        for b in found.beside
    ]


def _sampling(found: Estimate) -> list[str]:
    head = f"{'sampling, one GPU':<35}{'peak GB':>22}{'seconds a clip':>18}"
    return [head] + [f"{b.name:<35}{b.peak / GB:>22.1f}{b.seconds:>18.1f}" for b in found.sampling]


def _whole(found: Estimate) -> list[str]:
    hours, more = found.hours, sum(b.hours for b in found.beside)
    lines = [
        f"iteration {found.iteration_seconds:.1f} s; {found.iterations} iterations and {more:.1f} h beside the updates: "
        f"{hours:.1f} h, {hours * found.gpus:.0f} GPU-hours",
        f"memory: {found.peak / GB:.1f} GB of {found.available / GB:.1f} that {found.machine.memory / GB:.0f} GB leave for tensors: "
        + ("it fits" if found.fits else "it does not fit"),
        f"main memory of a machine while starting: {found.main_memory / GB:.0f} GB, for the text encoder or for each GPU's "
        "transformer" + (f"; then {found.host / GB:.0f} GB per GPU" if found.host else ""),
        f"disk: {found.checkpoint / GB:.1f} GB a checkpoint, {found.checkpoints} kept and one more while it is written",
    ]
    return [*lines, found.note] if found.note else lines


def _changes(found: Estimate, changes: tuple[Change, ...]) -> list[str]:
    if not changes:
        return []
    head = f"change, in this order (`mogan train --fit {found.machine.memory / GB:g}` does what is no shard and no window):"
    return [head] + [f"  {c.what}: {c.peak / GB:.1f} GB{', fits' if c.fits else ''}" for c in changes]
