"""A Wan that makes clips from text -> a VACE (arXiv 2503.07598) that makes the same ones: control blocks are added, and say nothing yet."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import WanVACETransformer3DModel
from torch import nn

from mogan.disk.files import link_or_copy, new_folder, writable_folder, write_atomically
from mogan.errors import UserError
from mogan.exchange.lora_file import DTYPES, check_range
from mogan.models import wan
from mogan.models.conditions import channels_of
from mogan.models.parts import config_of
from mogan.ranges import at_least
from mogan.runs.generator import Generator, open_generator


def vace(
    model: tyro.conf.Positional[str],
    *,
    out: Path,
    every: int = 2,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> None:
    """Make a text-to-video Wan one that reads controls: its folder again, with VACE's control blocks added.

    The blocks begin as copies of the model's own, behind projections that are zero, so the model makes the clips it made
    before, whatever control it is shown, until it is trained: prepare clips with `mogan prepare --controls` and fine-tune it on them.

    Args:
        model: lab-teacher, a diffusers folder or a hub id; a model of many guided steps.
        out: the new folder; must not exist yet.
        every: every so many blocks, from the first on, one is added (VACE-1.3B: 2, of 14B: 5).
        dtype: precision of the saved transformer.
    """
    at_least(1, every=every)
    if out.exists():
        raise UserError(f"{out} exists already: give another --out or remove it")
    writable_folder(out.parent)
    source = open_generator(wan.base_named(model))
    _refuse_others(model, source)
    transformer = with_control_blocks(source.start(), channels_of(config_of(source.folder, "vae")), every)
    check_range(transformer.state_dict(), DTYPES[dtype])
    with new_folder(out) as new:
        own = shutil.ignore_patterns("transformer", "README.md", ".*")
        shutil.copytree(source.folder, new, copy_function=link_or_copy, ignore=own, dirs_exist_ok=True)
        nn.Module.to(transformer, DTYPES[dtype])  # what diffusers says of its own `to` is for inference
        transformer.save_pretrained(new / "transformer")
        index = json.loads((source.folder / "model_index.json").read_text())
        for name in ("expand_timesteps", "image_encoder", "image_processor"):  # that pipeline has none
            index.pop(name, None)
        index |= {"_class_name": "WanVACEPipeline", "transformer": ["diffusers", WanVACETransformer3DModel.__name__]}
        write_atomically(new / "model_index.json", json.dumps(index, indent=2) + "\n")
    added = sum(p.numel() for n, p in transformer.named_parameters() if n.startswith("vace_"))
    print(f"made {out}: {len(transformer.vace_blocks)} control blocks, {added / 1e6:.1f} M weights more")


def _refuse_others(model: str, source: Generator) -> None:
    wan.refuse_controls(source.folder, "control blocks are added to one that reads text alone")
    if source.run is not None:
        raise UserError(f"{model} is a training run: export it with `mogan export --to teacher` and name the export")
    wan.refuse_few_steps(source.folder, model)
    if source.boundary is not None or wan.is_told(source.folder) or source.mask is not None or source.states:
        raise UserError(
            f"{model} is more than one Wan transformer that reads text and its level: name a plain text-to-video model"
        )


def with_control_blocks(transformer: nn.Module, channels: int, every: int) -> Any:
    """A VACE in fp32 that answers as a Wan ``transformer`` does under any control of so many ``channels``.

    A control block is a copy of the block that it stands beside, as in VACE's own training; what leads into and out of
    them is zero. The embedding of controls alone is drawn.
    """
    config: Any = transformer.config
    own = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("added_kv_proj_dim", "image_dim")}
    layers = list(range(0, config.num_layers, every))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = WanVACETransformer3DModel(**own, vace_layers=layers, vace_in_channels=channels)
    made.load_state_dict(made.state_dict() | transformer.state_dict())
    for block, layer in zip(made.vace_blocks, layers, strict=True):
        block.load_state_dict(block.state_dict() | transformer.blocks[layer].state_dict())  # type: ignore[index, union-attr]
        for projection in filter(None, (block.proj_in, block.proj_out)):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
    return made
