"""In from elsewhere: students and LoRAs made by other programs -> a diffusers folder that every command here reads."""

import json
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from zipfile import is_zipfile

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mogan import wan
from mogan.card import model_card
from mogan.errors import UserError
from mogan.export import DTYPES, FOLDER_USAGE, save_student, scheduler_for
from mogan.layouts import diffusers_name, is_lora, lora_changes

GENERATORS = (
    "generator_ema",
    "generator",
    "ema",
    "model",
    "module",
    "state_dict",
)  # of a training checkpoint, best first
CRITICS = ("critic", "fake_score")


def import_student(
    file: tyro.conf.Positional[Path],
    *,
    base: str,
    out: Path,
    sigmas: tuple[float, ...],
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> None:
    """Make a diffusers folder of a few-step student that another program trained.

    Reads weights (Self-Forcing, CausVid, FastVideo, the original Wan code, ComfyUI, diffusers) and LoRA files (diffusers,
    peft, ComfyUI, kohya), which are merged into the base. Nothing in a file is executed.

    Args:
        file: .safetensors, .pt, .pth, .ckpt or .bin, or a folder of .safetensors.
        base: the model it was made from: a diffusers folder or a hub id; everything but the transformer is taken from it.
        out: the folder to write; must not exist yet.
        sigmas: noise levels it samples at, from 1 downwards, final 0 left out (timesteps divided by 1000).
        dtype: precision of the saved transformer.
    """
    if out.exists():
        raise UserError(f"{out} exists already: give another --out or remove it")
    if sigmas[:1] != (1.0,) or any(not 0 < low < high for high, low in pairwise(sigmas)):
        raise UserError(f"--sigmas fall from 1 to above 0 (a timestep of 757 is 0.757), not {list(sigmas)}")
    scheduler_for(sigmas)  # refuse before reading gigabytes
    folder = wan.resolve_model(base)
    transformer = wan.load_transformer(folder)
    state, critic, part = read_student(file)
    if is_lora(state):
        changed = add_changes(transformer, lora_changes(state, _places(transformer), declared_alpha(file)), file)
        what = f"LoRA merged into {changed} tensors"
    else:
        set_weights(transformer, state, file)
        what = f"weights ({part})" if part else "weights"
    fake_score = None
    if critic is not None:
        fake_score = wan.load_transformer(folder)
        set_weights(fake_score, critic, file)
    note = f"- made from `{file.name}` ({what}) by `mogan import`; the licence of that file holds too"
    card = model_card("Few-step Wan student", folder, sigmas, [note], FOLDER_USAGE)
    save_student(transformer, folder, out, sigmas, DTYPES[dtype], card, fake_score)
    also = " and its critic as the fake score" if critic is not None else ""
    print(f"imported {what}{also} to {out}; try: mogan sample --model {out} --prompts prompts.txt --out clips")


def read_student(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, str | None]:
    """The student's tensors, its critic's if the file holds one, and under which entry the student was found."""
    whole = read_tensors(file)
    part = next((name for name in GENERATORS if isinstance(whole.get(name), dict)), None)
    critic = next((whole[name] for name in CRITICS if isinstance(whole.get(name), dict)), None)
    state = whole if part is None else whole[part]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no tensors but {', '.join(map(str, list(whole)[:5]))}; give a file of weights")
    return tensors, critic, part


def read_tensors(file: Path) -> dict[str, Any]:
    """What a file or a folder of safetensors holds; nothing in it is executed."""
    try:
        if file.is_dir():
            shards = sorted(file.glob("*.safetensors"))
            if not shards:
                raise UserError(f"{file} holds no .safetensors: name the folder of the transformer, or a file")
            return {k: v for shard in shards for k, v in load_file(shard).items()}
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, weights_only=True, map_location="cpu", mmap=is_zipfile(file))
    except FileNotFoundError as error:
        raise UserError(f"no file {file}: give the student's .safetensors or .pt") from error
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): get it again") from error
    except UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors and is not opened: ask its maker for a .safetensors file"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{file} holds a {type(loaded).__name__}, not named tensors; give a file of weights")
    return loaded


def declared_alpha(file: Path) -> float | None:
    """The alpha that diffusers keeps in a LoRA file's header, or peft in ``adapter_config.json`` beside it."""
    beside = (file if file.is_dir() else file.parent) / "adapter_config.json"
    about: dict[str, Any] = {}
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get("lora_adapter_metadata")
        about = {k.removeprefix("transformer."): v for k, v in json.loads(header).items()} if header else {}
    if not about and beside.is_file():
        about = json.loads(beside.read_text())
    if about.get("alpha_pattern") or about.get("use_rslora") or about.get("use_dora"):
        raise UserError(
            f"{file} scales its adapters one by one or is a DoRA: merge it where it was made, import weights"
        )
    return about.get("lora_alpha")


def set_weights(transformer: Any, state: dict[str, Tensor], file: Path) -> None:
    """Fill a transformer with a file's weights, all of them or none."""
    named = {diffusers_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    own = transformer.state_dict()
    wrong = [f"lacks {_some(own.keys() - named.keys())}"] if own.keys() - named.keys() else []
    wrong += [f"has {_some(named.keys() - own.keys())} too many"] if named.keys() - own.keys() else []
    misfits = {k for k in own.keys() & named.keys() if own[k].shape != named[k].shape}
    wrong += [f"has another shape for {_some(misfits)}"] if misfits else []
    if wrong:
        raise UserError(
            f"{file} does not fit this base: it {', and it '.join(wrong)}; give the --base it was made from"
        )
    transformer.load_state_dict(named)


@torch.no_grad()
def add_changes(transformer: Any, changes: dict[str, Tensor], file: Path) -> int:
    """Add changes to the parameters they name, all of them or none; returns how many."""
    own = dict(transformer.named_parameters())
    lost = {name for name, change in changes.items() if name not in own or own[name].numel() != change.numel()}
    if lost:
        raise UserError(
            f"{file} changes {_some(lost)} that this base lacks or has in another shape; give its own --base"
        )
    for name, change in changes.items():
        own[name] += change.reshape(own[name].shape)
    return len(changes)


def _places(transformer: Any) -> list[str]:
    """Modules with weights and parameters of blocks: what a LoRA file may name."""
    return sorted({n.removesuffix(".weight").removesuffix(".bias") for n, _ in transformer.named_parameters()})


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({first}{', ...' if len(names) > 3 else ''})"
