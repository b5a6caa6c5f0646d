"""Files of tensors made by strangers: opened without running anything in them, and refused in a sentence that is true."""

import math
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mogan.disk.files import from_json
from mogan.errors import UserError

SAFETENSORS = (".safetensors", ".sft")  # in lower case
SHARD = re.compile(r"(.+?)[-_](\d+)[-_]of[-_](\d+)")
STRANGERS = {  # how files begin that are often taken for weights -> what they are, and what to do
    b"GGUF": "is a GGUF file, whose weights are quantised: get the .safetensors it was made from",
    b"version https://git-lfs": "is Git LFS's note of where the weights are: get the file itself (git lfs pull)",
    b"<": "is a web page, not the weights: get the file itself (a hub page has a download button)",
    b"{": "is JSON, not weights: name the .safetensors or .pt",
}


def files_of(path: Path) -> list[Path]:
    """A file of tensors, or those of a folder if they are the shards of one model.

    Raises:
        UserError: there is none; or a folder holds several that do not belong together, and one must be named.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no file {path}: give the student's .safetensors or .pt")
    if (path / "run.json").is_file():
        raise UserError(f"{path} is a run of `mogan train`: `mogan export` makes a folder of it")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SAFETENSORS and p.is_file())
    if not found:
        inside = f", such as {path / 'transformer'}" if (path / "transformer").is_dir() else ""
        raise UserError(f"{path} holds no .safetensors: name the folder of the transformer{inside}, or a file")
    shards = [SHARD.fullmatch(p.stem) for p in found]
    if len(found) > 1 and len({m and (m[1], m[3]) for m in shards}) + shards.count(None) > 1:
        some = ", ".join(p.name for p in found[:5]) + (", ..." if len(found) > 5 else "")
        raise UserError(f"{path} holds {len(found)} files that are not one model ({some}): name the one to import")
    if shards[0] is not None and len(found) != int(shards[0][3]):
        raise UserError(f"{path} holds {len(found)} of {int(shards[0][3])} shards of {shards[0][1]}: get the others")
    return found


def read_tensors(files: list[Path]) -> dict[str, Any]:
    """What a file, or all shards of one model, holds by name; nothing in it is executed.

    Raises:
        UserError: the file is damaged, or holds more than tensors.
    """
    found: dict[str, Any] = {}
    for file in files:
        more = _read(file)
        if not isinstance(more, dict) or any(not isinstance(name, str) for name in more):
            raise UserError(f"{file} holds a {type(more).__name__}, not named tensors; give a file of weights")
        if twice := found.keys() & more.keys():
            raise UserError(f"{file} holds {some(twice)} that another shard holds too: get the shards again")
        found |= more
    return found


def _read(file: Path) -> Any:
    try:
        with file.open("rb") as opened:
            head = opened.read(32)
        if not head:
            raise UserError(f"{file} is empty: get it again")
        if is_safetensors(head):
            return load_file(file)
        for start, what in STRANGERS.items():
            if head.lstrip().startswith(start):
                raise UserError(f"{file} {what}")
        if is_zipfile(file):
            with ZipFile(file) as archive:
                if not any(name.endswith("data.pkl") for name in archive.namelist()):
                    raise UserError(f"{file} is a zip archive, not weights: unpack it and name the file in it")
        elif head[:1] != b"\x80" and not head.startswith(b"PK"):
            raise UserError(
                f"{file} is neither safetensors nor a checkpoint of torch: it is damaged, or something else"
            )
        if file.suffix.lower() == ".safetensors":  # torch goes by the name of what it is given
            return torch.load(BytesIO(file.read_bytes()), weights_only=True, map_location="cpu")
        return torch.load(file, weights_only=True, map_location="cpu", mmap=is_zipfile(file))
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors and is not opened: ask its maker for a .safetensors file"
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever a reader makes of a stranger's bytes
        raise UserError(f"{file} cannot be read ({type(error).__name__}): it is damaged, get it again") from error


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins like this is safetensors: the length of a header, the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def declared_alpha(file: Path) -> float | None:
    """The alpha that diffusers keeps in a LoRA file's header, or peft in ``adapter_config.json`` beside it.

    Raises:
        UserError: they scale adapters in another way, or are damaged.
    """
    beside, place = file.parent / "adapter_config.json", "its header's lora_adapter_metadata"
    text = None
    with file.open("rb") as opened:
        head = opened.read(9)
    if is_safetensors(head):
        with safe_open(file, "pt") as header:
            text = (header.metadata() or {}).get("lora_adapter_metadata")
    if not text and beside.is_file():
        text, place = beside.read_text(encoding="utf-8", errors="replace"), beside.name
    if not text:
        return None
    try:
        about = {k.removeprefix("transformer."): v for k, v in from_json(text).items()}
        alpha = about.get("lora_alpha")
        usable = alpha is None or (math.isfinite(alpha) and not isinstance(alpha, bool))
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        usable = False
    if not usable:
        raise UserError(f"{file}: {place} does not say the adapters' alpha as peft writes it: get both again")
    if about.get("alpha_pattern") or about.get("use_rslora") or about.get("use_dora"):
        raise UserError(
            f"{file} scales its adapters one by one or is a DoRA: merge it where it was made, import weights"
        )
    return alpha


def check_numbers(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse what cannot be computed with, by name: numbers that are none, integers, sparse tensors, shapes without contents."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UserError(f"{file} holds shapes without numbers ({name}): it was saved before its weights were made")
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            raise UserError(f"{file} holds {kind} where numbers should be ({name}): get the fp32, fp16 or bf16 file")
        plain = tensor if tensor.element_size() in (2, 4) else tensor.float()  # eight bits have few functions
        if not plain.isfinite().all():
            raise UserError(f"{file} holds numbers that are infinite or none ({name}): it is damaged, get it again")


def some(names: set[str]) -> str:
    """How many tensors, and the first of them."""
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({first}{', ...' if len(names) > 3 else ''})"
