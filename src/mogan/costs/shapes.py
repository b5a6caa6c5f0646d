"""Configurations of published Wan models, and of any diffusers folder: what a network's shape is, without its weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mogan.disk.files import read_json
from mogan.errors import UserError, closest
from mogan.models.experts import boundary_of
from mogan.models.frame_sparse import read_mask
from mogan.models.parts import check_parts
from mogan.models.wan import WAN_22, Geometry, fit_latents, geometry, lab_folder


@dataclass(frozen=True)
class Shapes:
    """Configs as diffusers and transformers write them, and what the model generates.

    ``references``: of a frame-sparse student, how many each block has; its teachers are dense.
    """

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    size: Geometry
    boundary: float | None = None  # of two transformers; see mogan.models.experts
    references: tuple[int, ...] | None = None

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of a clip's latents."""
        return fit_latents(self.vae, self.transformer, self.size)


def _transformer(heads: int, ffn: int, layers: int, channels: int = 16) -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }


def _image_to_video(transformer: dict[str, Any], picture: int | None = None) -> dict[str, Any]:
    """Given the first frame: a latent and a mask as more channels; where it reads CLIP's features, their width."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    more = {} if picture is None else {"image_dim": picture, "added_kv_proj_dim": width}
    return transformer | {"in_channels": 36} | more


def _vace(transformer: dict[str, Any], every: int) -> dict[str, Any]:
    """With a block that reads a control beside every so-maniest."""
    return transformer | {"vace_layers": list(range(0, transformer["num_layers"], every)), "vace_in_channels": 96}


# google/umt5-xxl, the encoder of every Wan model (5.7 B parameters)
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}

# Wan2.1's autoencoder is the default of diffusers' AutoencoderKLWan, latents_mean and latents_std included.
VAE_21: dict[str, Any] = {}
# Wan2.2's (TI2V-5B): 48 channels, 16 x 16 pixels per latent. Its latent statistics do not change its cost.
VAE_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
WAN_21 = Geometry(fps=16, height=480, width=832, frames=81)

# transformer/config.json of the Wan-AI/...-Diffusers repositories, as diffusers' convert_wan_to_diffusers.py has them
PUBLISHED = {
    "wan2.1-t2v-1.3b": Shapes("Wan2.1-T2V-1.3B", _transformer(12, 8960, 30), VAE_21, UMT5_XXL, WAN_21),
    "wan2.1-t2v-14b": Shapes("Wan2.1-T2V-14B", _transformer(40, 13824, 40), VAE_21, UMT5_XXL, WAN_21),
    "wan2.2-t2v-a14b": Shapes("Wan2.2-T2V-A14B", _transformer(40, 13824, 40), VAE_21, UMT5_XXL, WAN_21, 0.875),
    "wan2.2-ti2v-5b": Shapes(
        "Wan2.2-TI2V-5B",
        _transformer(24, 14336, 30, 48),
        VAE_22,
        UMT5_XXL,
        WAN_22,
    ),
    "wan2.1-i2v-14b": Shapes(
        "Wan2.1-I2V-14B", _image_to_video(_transformer(40, 13824, 40), 1280), VAE_21, UMT5_XXL, WAN_21
    ),
    "wan2.2-i2v-a14b": Shapes(
        "Wan2.2-I2V-A14B", _image_to_video(_transformer(40, 13824, 40)), VAE_21, UMT5_XXL, WAN_21, 0.9
    ),
    "wan2.1-vace-1.3b": Shapes("Wan2.1-VACE-1.3B", _vace(_transformer(12, 8960, 30), 2), VAE_21, UMT5_XXL, WAN_21),
    "wan2.1-vace-14b": Shapes("Wan2.1-VACE-14B", _vace(_transformer(40, 13824, 40), 5), VAE_21, UMT5_XXL, WAN_21),
}


def read_shapes(model: str) -> Shapes:
    """Shapes of a published model by name, of the lab, or of a local folder that holds at least the config files.

    Raises:
        UserError: the model has no config files, or none of a published name.
    """
    if model.lower() in PUBLISHED:
        return PUBLISHED[model.lower()]
    folder = lab_folder() / "teacher" if model == "lab" else Path(model)
    configs = {}
    for part in ("transformer", "vae", "text_encoder"):
        path = folder / part / "config.json"
        if not path.is_file():
            if hint := closest(model, PUBLISHED) if not folder.exists() else "":
                raise UserError(f"no model {model!r}{hint}")
            raise UserError(
                f"{model} has no {part}/config.json: give a diffusers folder, lab, or {', '.join(PUBLISHED)}"
            )
        configs[part] = read_json(path)
    check_parts(folder)
    mask = read_mask(folder / "transformer")
    references = None if mask is None else mask.references
    return Shapes(
        folder.resolve().name, **configs, size=geometry(folder), boundary=boundary_of(folder), references=references
    )


def sparse(shapes: Shapes, references: Sequence[int]) -> Shapes:
    """With a frame-sparse student: one number of references for all blocks, or one for each. Raises UserError."""
    blocks, frames = shapes.transformer["num_layers"], shapes.latent[1]
    counts = tuple(references) * (blocks if len(references) == 1 else 1)
    if len(counts) != blocks or not all(1 <= count <= frames for count in counts):
        raise UserError(
            f"--references is from 1 to the {frames} latent frames of a clip, one number or one for each of {blocks} blocks, not "
            f"{' '.join(map(str, references))}"
        )
    return replace(shapes, references=counts)


def resized(shapes: Shapes, *, frames: int | None, height: int | None, width: int | None) -> Shapes:
    """The same model at another clip size; raises UserError if it does not fit the model."""
    chosen = {k: v for k, v in {"frames": frames, "height": height, "width": width}.items() if v is not None}
    shapes = replace(shapes, size=replace(shapes.size, **chosen))
    _ = shapes.latent
    return shapes
