"""Networks that look at frames, each from files the user has: VBench's DINO, CLIP, aesthetic head and MUSIQ.

Nothing here downloads. A backbone is any callable from uint8 frames ``(B, H, W, 3)`` to features ``(B, D)`` or scores
``(B,)``; these are the ones VBench's numbers are defined with.
"""

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mogan.errors import UserError
from mogan.evaluation.preprocess import clip_input, dino_input, musiq_input

Backbone = Callable[[np.ndarray], np.ndarray]  # uint8 frames (B, H, W, 3) -> features (B, D) or scores (B,)


class Seen(nn.Module):
    """A network with how its frames are prepared and what is read off it; frozen, in float32."""

    def __init__(
        self, network: nn.Module, prepare: Callable[[np.ndarray], Tensor], read: Callable[[Any, Tensor], Tensor]
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False).float()
        self._prepare, self._read = prepare, read

    @torch.inference_mode()
    def forward(self, frames_BHWC: np.ndarray) -> np.ndarray:
        """uint8 frames ``(B, H, W, 3)`` to features ``(B, D)`` or scores ``(B,)``, float32."""
        device = next(self.network.parameters()).device
        return self._read(self.network, self._prepare(frames_BHWC).to(device)).float().cpu().numpy()


# ---------------------------------------------------------------------------------------------- the four networks


def dino(path: Path) -> Seen:
    """CLS features ``(B, 768)`` of DINO ViT-B/16, for subject consistency.

    Args:
        path: ``dino_vitbase16_pretrain.pth`` as published, or a transformers folder of facebook/dino-vitb16.

    Raises:
        UserError: the file or folder holds something else.
    """
    from transformers import ViTConfig, ViTModel

    if path.is_dir():  # its config has 1e-12 where DINO has 1e-6
        model = pretrained(ViTModel, path, add_pooling_layer=False, layer_norm_eps=1e-6)
    else:
        state = read_state(path, "cls_token")
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=count_blocks(state),
            num_attention_heads=width // 64,
            intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
            layer_norm_eps=1e-6,
            image_size=patch * math.isqrt(state["pos_embed"].shape[1] - 1),
            patch_size=patch,
        )
        model = pretrained(ViTModel, path, add_pooling_layer=False, config=config, state_dict=_named_as_vit(state))
    embeddings = model.embeddings
    embeddings.interpolate_pos_encoding = lambda tokens, height, width: dino_positions(
        embeddings.position_embeddings, height, width, embeddings.patch_embeddings.projection.kernel_size[0]
    )
    return Seen(
        model, dino_input, lambda net, pixels: net(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    )


def dino_positions(positions_1ND: Tensor, height: int, width: int, patch: int) -> Tensor:
    """DINO's position embeddings for another size of picture, ``(1, 1 + h w, D)``.

    Bicubic by a scale factor that is a tenth of a patch too large, as DINO's ``interpolate_pos_encoding`` has it; the
    features of a size other than 224 x 224 depend on it. transformers resizes to the exact size instead.
    """
    side = math.isqrt(positions_1ND.shape[1] - 1)
    rows, columns = height // patch, width // patch
    if height == width and rows * columns == side * side:
        return positions_1ND
    grid = positions_1ND[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
    return torch.cat([positions_1ND[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def clip(folder: Path) -> Seen:
    """Image features of CLIP from a transformers folder: openai/clip-vit-base-patch32 for background consistency."""
    return Seen(_clip(folder), clip_input, lambda net, pixels: net(pixels).image_embeds)


def aesthetic(folder: Path, head: Path) -> Seen:
    """LAION's score / 10 from CLIP ViT-L/14 and the linear head ``sa_0_4_vit_l_14_linear.pth``: ``(B,)``.

    Raises:
        UserError: the head is another model's.
    """
    model, state = _clip(folder), read_state(head, "weight")
    linear = nn.Linear(model.config.projection_dim, 1)
    if state["weight"].shape != linear.weight.shape:
        raise UserError(
            f"{head} takes {state['weight'].shape[-1]} features and {folder} gives {linear.in_features}: the head of "
            "ViT-L/14 goes with openai/clip-vit-large-patch14"
        )
    linear.load_state_dict(state)

    def score(nets: nn.ModuleList, pixels: Tensor) -> Tensor:
        return nets[1](F.normalize(nets[0](pixels).image_embeds, dim=-1)).squeeze(-1) / 10

    return Seen(nn.ModuleList([model, linear]), clip_input, score)


def musiq(path: Path) -> Seen:
    """MUSIQ trained on SPAQ, / 100: ``(B,)``, by the network of the user's own ``pyiqa`` (not a dependency).

    Raises:
        UserError: pyiqa is not installed.
    """
    try:
        from pyiqa.archs.musiq_arch import MUSIQ
    except ImportError as error:
        raise UserError(
            f"imaging quality needs the network of pyiqa ({error}): `pip install pyiqa`, whose licence is for "
            f"non-commercial use, or take {path.name} out of the folder"
        ) from error
    model = MUSIQ(pretrained_model_path=str(path))
    return Seen(
        model,
        musiq_input,
        lambda net, pixels: torch.cat([net(frame[None]).reshape(1) for frame in pixels]) / 100,
    )


# ---------------------------------------------------------------------------------------------- what a folder holds


@dataclass(frozen=True)
class Wanted:
    """Files a number needs, by the names they are published under, and where they are."""

    files: tuple[tuple[str, ...], ...]  # each: any of these names
    load: Callable[..., Seen]
    fetch: str


_DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
WANTED = {
    "subject_consistency": Wanted((("dino_vitbase16_pretrain.pth", "dino-vitb16"),), dino, _DINO_URL),
    "background_consistency": Wanted((("clip-vit-base-patch32",),), clip, "hf download openai/clip-vit-base-patch32"),
    "aesthetic_quality": Wanted(
        (("clip-vit-large-patch14",), ("sa_0_4_vit_l_14_linear.pth",)),
        aesthetic,
        "hf download openai/clip-vit-large-patch14, and https://github.com/LAION-AI/aesthetic-predictor",
    ),
    "imaging_quality": Wanted(
        (("musiq_spaq_ckpt-358bb6af.pth",),),
        musiq,
        "https://github.com/chaofengc/IQA-PyTorch/releases/tag/v0.1-weights, and `pip install pyiqa`",
    ),
}


def find_backbones(folder: Path, *, others: bool = False) -> tuple[dict[str, Seen], list[str]]:
    """Load what a folder holds.

    Args:
        folder: with files under the names they are published under.
        others: the folder holds another network of use, so that none of these is no mistake.

    Returns:
        Backbones by the metric they serve, and one sentence for each metric that lacks a file.

    Raises:
        UserError: the folder holds none of them, or a file is not what its name says.
    """
    found: dict[str, Seen] = {}
    lacking = []
    for metric, wanted in WANTED.items():
        paths = [next((folder / name for name in names if (folder / name).exists()), None) for names in wanted.files]
        if all(paths):
            found[metric] = wanted.load(*paths)
        else:
            names = " and ".join(
                f"{' or '.join(names)}" for names, path in zip(wanted.files, paths, strict=True) if path is None
            )
            lacking.append(f"{metric} is not measured: put {names} into {folder} ({wanted.fetch})")
    if not found and not others:
        raise UserError(
            f"{folder} holds none of VBench's networks: put there what you want measured, such as "
            f"dino_vitbase16_pretrain.pth for subject consistency ({_DINO_URL}), or leave --networks out"
        )
    return found, lacking


# ---------------------------------------------------------------------------------------------- reading files


def read_state(path: Path, known: str) -> dict[str, Tensor]:
    """A published state dict; ``known`` is a name it must hold.

    Raises:
        UserError: the file is something else, such as the HTML page a broken link gave.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"{path} is no file of plain weights ({type(error).__name__}): fetch it again, or, if you trust it to run code "
            f"on loading, save its state dict as {path.stem}.safetensors and give that"
        ) from error
    for part in ("model", "module", "state_dict"):
        found = found[part] if isinstance(found, Mapping) and part in found else found
    if not isinstance(found, Mapping) or known not in found:
        raise UserError(f"{path} holds no {known}: it is not the network its name says, fetch it again")
    return dict(found)


def pretrained(kind: Any, path: Path, **options: Any) -> Any:
    """A transformers model with all of its weights, from a folder or a given ``state_dict``; never from the network.

    Raises:
        UserError: weights are missing or damaged.
    """
    from transformers.utils import logging

    given = "state_dict" in options
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # CLIP's text half is not wanted here, and that is no news
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            None if given else path, output_loading_info=True, local_files_only=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is no complete {kind.__name__} ({str(error).splitlines()[0][:100]}): fetch it again"
        ) from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    wrong = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if wrong:
        raise UserError(f"{path} lacks {len(wrong)} tensors of a {kind.__name__}, such as {wrong[0]}: fetch it again")
    return model


def _clip(folder: Path) -> Any:
    from transformers import CLIPVisionModelWithProjection

    return pretrained(CLIPVisionModelWithProjection, folder)


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """How many transformer blocks a state dict in timm's names holds."""
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


_VIT_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def named_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a block in timm's names, under the names that transformers' checkpoints of ViTs have.

    ``tensor``: of the shape it has there; a joint ``qkv``, ``(3 D, ...)``, becomes three of ``(D, ...)``.
    """
    _, number, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    if part == "attn.qkv":
        thirds = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"encoder.layer.{number}.attention.attention.{third}.{kind}": chunk for third, chunk in thirds}
    if kind in ("q_bias", "v_bias"):
        third = {"q_bias": "query", "v_bias": "value"}[kind]
        return {f"encoder.layer.{number}.attention.attention.{third}.bias": tensor}
    return {f"encoder.layer.{number}.{_VIT_NAMES[part]}.{kind}": tensor}


def _named_as_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for name, tensor in state.items():
        if name.startswith("blocks."):
            named |= named_block(name, tensor)
    return named
