"""A complete diffusers folder of a published Wan model with random weights: the real shapes, nothing downloaded.

For checks of everything but quality: memory, time, file formats. Depth and vocabulary may be reduced; widths stay.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from mogan.costs.calls import kind_of
from mogan.costs.shapes import PUBLISHED, Shapes
from mogan.errors import UserError
from mogan.models.conditions import animates, is_vace

# of Wan2.1's image encoder (OpenCLIP's ViT-H/14) all but depth, which is 32: two layers, of which the first's output is read
CLIP = {"num_hidden_layers": 2, "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ``</s>`` at the end as T5 has it: reads any language, needs no vocabulary file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def random_wan(
    folder: Path,
    size: str = "wan2.1-t2v-1.3b",
    *,
    layers: int | None = None,
    text_layers: int = 2,
    clip: tuple[int, int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    changes: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write the folder; returns it.

    The text encoder keeps its width and has few layers and a vocabulary of bytes: embeddings have the real shape.

    Args:
        folder: where to; must not exist.
        size: name of a published model.
        layers: of the transformer; all of them by default.
        text_layers: of the text encoder (the real one has 24 and 5.7 billion weights).
        clip: ``(frames, height, width)`` noted as what the model generates; the published one by default.
        dtype: of the saved weights.
        seed: of the weights.
        changes: entries of ``transformer``, ``vae`` or ``text_encoder`` to change, for sizes in between.

    Raises:
        UserError: no such model, or the folder is there already.
    """
    if size.lower() not in PUBLISHED:
        raise UserError(f"no published model {size!r}: use one of {', '.join(PUBLISHED)}")
    if folder.exists():
        raise UserError(f"{folder} exists already: give another folder or remove it")
    shapes = _changed(PUBLISHED[size.lower()], layers, text_layers, clip, changes or {})
    _ = shapes.latent  # a clip that does not fit the model is found here
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        kind, eye = kind_of(shapes), {}
        pipelines = {is_vace: WanVACEPipeline, animates: WanImageToVideoPipeline}
        made = next((made for holds, made in pipelines.items() if holds(shapes.transformer)), WanPipeline)
        if width := shapes.transformer.get("image_dim"):
            seen = CLIPVisionConfig(**CLIP | {"hidden_size": width, "intermediate_size": 4 * width})
            eye = {"image_encoder": CLIPVisionModel(seen), "image_processor": CLIPImageProcessor()}
        pipeline = made(
            **eye,
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(UMT5Config(**shapes.text_encoder | {"vocab_size": len(tokenizer)})),
            vae=AutoencoderKLWan(**shapes.vae),
            transformer=kind(**shapes.transformer),
            transformer_2=None if shapes.boundary is None else kind(**shapes.transformer),
            boundary_ratio=shapes.boundary,
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        )
    finally:
        torch.set_default_dtype(usual)
    temporary = folder.with_name(f".{folder.name}.new")
    pipeline.save_pretrained(temporary)
    facts = {
        "fps": shapes.size.fps,
        "height": shapes.size.height,
        "width": shapes.size.width,
        "frames": shapes.size.frames,
    }
    (temporary / "mogan.json").write_text(json.dumps(facts, indent=2) + "\n")
    temporary.rename(folder)
    return folder


def random_text_encoder(
    folder: Path,
    size: str = "wan2.1-t2v-1.3b",
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a folder that holds a text encoder and nothing else, of full depth and vocabulary; returns it.

    It is written block by block, so it need not fit into memory here. `mogan prepare prompts.txt --model FOLDER` reads it.

    Args:
        folder: where to; must not exist.
        size: name of a published model.
        layers: fewer than all.
        dtype: of the weights.
        seed: of the weights.
        changes: entries of the text encoder's config to change.

    Raises:
        UserError: the folder is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: give another folder or remove it")
    shape = PUBLISHED[size.lower()].text_encoder | ({} if layers is None else {"num_layers": layers})
    config = UMT5Config(**shape | (changes or {}), dtype=str(dtype).removeprefix("torch."))
    config.architectures = ["UMT5EncoderModel"]
    temporary = folder.with_name(f".{folder.name}.new")
    config.save_pretrained(temporary / "text_encoder")
    byte_tokenizer().save_pretrained(temporary / "tokenizer")
    with torch.device("meta"):
        shapes = UMT5EncoderModel(config).state_dict()
    shapes.pop("encoder.embed_tokens.weight")  # tied to the shared embedding
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".layer.")[0], []).append(name)
    numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    files: dict[str, str] = {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _weights(numbers, len(files) + i, shapes[name].shape) for i, name in enumerate(names)}
        save_file(tensors, temporary / "text_encoder" / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    total = sum(t.numel() for t in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (temporary / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (temporary / "model_index.json").write_text('{"_class_name": "WanPipeline"}\n')
    temporary.rename(folder)
    return folder


def _weights(numbers: Tensor, turn: int, shape: torch.Size) -> Tensor:
    """Weights that keep activations of size one, from numbers drawn once: billions would take minutes to draw."""
    if len(shape) == 1:  # a norm
        return torch.ones(shape, dtype=numbers.dtype)
    count = math.prod(shape)
    whole = numbers.roll(7919 * turn).repeat(-(-count // len(numbers)))[:count]
    return whole.mul_(shape[-1] ** -0.5).view(shape)


def _changed(
    shapes: Shapes,
    layers: int | None,
    text_layers: int,
    clip: tuple[int, int, int] | None,
    changes: dict[str, dict[str, Any]],
) -> Shapes:
    transformer = shapes.transformer | ({} if layers is None else {"num_layers": layers})
    if is_vace(transformer):
        transformer["vace_layers"] = [i for i in transformer["vace_layers"] if i < transformer["num_layers"]]
    text = shapes.text_encoder | {"num_layers": text_layers}
    size = shapes.size
    if clip is not None:
        size = replace(size, frames=clip[0], height=clip[1], width=clip[2])
    return replace(
        shapes,
        transformer=transformer | changes.get("transformer", {}),
        vae=shapes.vae | changes.get("vae", {}),
        text_encoder=text | changes.get("text_encoder", {}),
        size=size,
    )
