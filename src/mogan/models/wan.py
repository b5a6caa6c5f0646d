"""A folder of Wan: where it lies, what it was made for, and loading its parts.

The stock diffusers classes are used as they are.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AnyFlowTransformer3DModel, AutoencoderKLWan
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from mogan.disk.files import openable, read_json
from mogan.errors import UserError, too_little_memory
from mogan.models.attention import TEXT_LENGTH, set_attention
from mogan.models.conditions import animates, reads_controls
from mogan.models.defaults import ANIMATING, ANIMATING_22, TWO_EXPERTS, WAN_22, Defaults, Geometry, read_defaults
from mogan.models.parts import check_class, check_first_frame, check_parts, class_of, config_of, sees_pictures_by
from mogan.models.states import attach_states, read_states
from mogan.models.step_condition import from_stock

TextEncoder = Callable[[list[str]], list[Tensor]]
Eye = Callable[[list[np.ndarray]], Tensor]


# ---------------------------------------------------------------------------------------------- where a model lies


def lab_folder() -> Path:
    """The packaged family: ``teacher/``, ``student/``, ``raft/``."""
    return Path(str(files("mogan.lab") / "family"))


def resolve_model(name: str | Path) -> Path:
    """Folder of a model: ``lab`` (the packaged student), ``lab-teacher``, a local diffusers folder, or a hub id.

    Raises:
        UserError: there is no such folder, or it cannot be downloaded.
    """
    if str(name) in ("lab", "lab-student", "lab-teacher"):
        folder = lab_folder() / ("teacher" if str(name) == "lab-teacher" else "student")
        if not folder.is_dir():
            raise UserError(f"the lab's family is not in this installation ({folder}); build it with `mogan lab build`")
        return folder
    folder = Path(name)
    openable(folder)
    if (folder / "model_index.json").is_file():
        check_parts(folder)
        return folder
    run = folder.absolute().parent.parent
    if folder.is_dir() and (run / "run.json").is_file() and folder.absolute().parent.name == "checkpoints":
        raise UserError(f"{name} is a checkpoint, and not a model by itself: give its run, {run}")
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(
            f"{name} is not a diffusers folder (no model_index.json) nor a hub id such as "
            f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers{_nearby(folder)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(name), ignore_patterns=["*.msgpack", "assets/*"]))
    except HFValidationError as error:
        raise UserError(
            f"{name} is neither a folder nor a name that the hub can have: give a diffusers folder"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"there is no folder {name}, and the hub gave no model of that name ({type(error).__name__}): give a local folder"
        ) from error
    check_parts(folder)
    return folder


def base_named(name: str | Path) -> str:
    """A model that something is made of, by name: of ``lab`` its teacher, as whose run or difference it then is."""
    return "lab-teacher" if str(name) == "lab" else str(name)


def _nearby(path: Path) -> str:
    """``: did you mean ...?`` where a folder of the hub's cache was named, one around the model's, or a file in it."""
    if path.is_file() and path.suffix in (".safetensors", ".pt", ".pth", ".ckpt"):
        return ": make one of this file by `mogan import`"
    near = (path.parent, *sorted(path.glob("snapshots/*")), *sorted(path.glob("*")))
    found = next((folder for folder in near if (folder / "model_index.json").is_file()), None)
    return f": did you mean {found}?" if found else ""


def has_controls(model: Path) -> bool:
    """Whether a folder's transformer is told more than text: controls, or a first frame (:mod:`mogan.models.conditions`)."""
    return reads_controls(config_of(model, "transformer"))


def is_image_to_video(model: Path) -> bool:
    """Whether a folder's transformer is given the first frame beside text."""
    return animates(config_of(model, "transformer"))


def sees_pictures(model: Path) -> bool:
    """Whether it is told what an image encoder sees of that frame, too."""
    return sees_pictures_by(config_of(model, "transformer"))


def is_told(model: Path, part: str = "transformer") -> bool:
    """Whether a folder's transformer reads where its step ends (see :mod:`mogan.models.step_condition`)."""
    return class_of(config_of(model, part)) is AnyFlowTransformer3DModel


def mask_channels(model: Path) -> int:
    """Channels of a control that are its mask's: of a VACE the pixels under each place, of a given first frame the frames."""
    vae = config_of(model, "vae") or {}
    return vae.get("scale_factor_temporal", 4) if is_image_to_video(model) else vae.get("scale_factor_spatial", 8) ** 2


def refuse_controls(model: Path, who: str) -> Path:
    """The folder; refused if its transformer is told more than text, which ``who`` has none of."""
    if has_controls(model):
        kind = "animates a first frame" if is_image_to_video(model) else "is a VACE, which reads control videos"
        raise UserError(f"{model} {kind}, and {who}: take a Wan that makes clips from text")
    return model


def refuse_few_steps(model: Path, name: str) -> None:
    """Raise UserError for a student of a few steps where a teacher is wanted: guided as one it makes no clips."""
    if defaults(model).sigmas is not None:
        raise UserError(
            f"{name} is a student of a few steps, which a teacher is not: name the model that it was made from"
        )


def model_facts(model: Path) -> dict:
    """What ``mogan.json`` beside ``model_index.json`` says; empty for a stock folder."""
    path = model / "mogan.json"
    return read_json(path) if path.is_file() else {}


def defaults(model: Path) -> Defaults:
    """What a model is sampled and measured with; where its folder does not say, as Wan's own model of that kind."""
    vae = config_of(model, "vae") or {}
    usual = WAN_22 if vae.get("z_dim") == 48 else Geometry()
    two, animates = (model / "transformer_2").is_dir(), is_image_to_video(model)
    own: dict = (ANIMATING_22 if two else ANIMATING) if animates else TWO_EXPERTS if two else {}
    return read_defaults(own | model_facts(model), usual, model / "mogan.json")


def geometry(model: Path) -> Geometry:
    """Frame rate and size of a model's clips; see :func:`defaults`."""
    return defaults(model).size


def fingerprint(model: Path, part: str) -> str:
    """Sixteen hex digits that change when the config or the weights of ``part`` change.

    Of large files only the size and both ends are read: enough to tell files apart, in milliseconds.

    Raises:
        UserError: the part is missing.
    """
    digest = hashlib.sha256()
    if not (model / part).is_dir():
        raise UserError(f"{model} has no {part}: is it a complete diffusers folder of a Wan model?")
    for path in sorted((model / part).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                if path.stat().st_size > 1 << 21:
                    file.seek(-(1 << 20), 2)
                    digest.update(file.read())
    return digest.hexdigest()[:16]


def latent_shape(model: Path, size: Geometry) -> tuple[int, int, int, int]:
    """``(C, F, H, W)`` of the latents of a clip of this geometry; the clip must fit the autoencoder and the patches."""
    vae, transformer = (config_of(model, part) or {} for part in ("vae", "transformer"))  # without one: Wan 2.1's
    return fit_latents(vae, transformer, size)


def fit_latents(vae: dict, transformer: dict, size: Geometry) -> tuple[int, int, int, int]:
    """:func:`latent_shape` from the two configs.

    Raises:
        UserError: the clip size does not fit the model.
    """
    patch = transformer.get("patch_size", (1, 2, 2))
    space, time = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    multiple = space * max(patch[1:])
    if size.frames % time != 1 or size.height % multiple or size.width % multiple:
        raise UserError(
            f"a clip of {size.frames} x {size.height} x {size.width} does not fit this model: frames must be "
            f"{time} k + 1, height and width multiples of {multiple}"
        )
    latent = 1 + (size.frames - 1) // time, size.height // space, size.width // space
    longest = transformer.get("rope_max_seq_len", 1024)
    if max(side // step for side, step in zip(latent, patch, strict=True)) > longest:
        raise UserError(
            f"a clip of {size.frames} x {size.height} x {size.width} is too large for this model, which counts {longest} places "
            "a side: make it shorter or smaller"
        )
    return vae.get("z_dim", 16), *latent


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def dtype_of(precision: str, device: str | torch.device, few_steps: bool = False) -> torch.dtype:
    """What networks compute in by ``--precision``: auto, bf16 or fp32; auto is :func:`fast_dtype`, and fp32 for a student of
    ``few_steps`` on a CPU.
    """
    auto = torch.float32 if few_steps and torch.device(device).type == "cpu" else fast_dtype(device)
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]


# ---------------------------------------------------------------------------------------------- loading parts


def load_vae(model: Path, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
    """The frozen autoencoder."""
    vae = fast_convolutions(_from_pretrained(AutoencoderKLWan, model, "vae", dtype or fast_dtype()))
    return vae.eval().requires_grad_(False)


def fast_convolutions(vae: nn.Module) -> Any:
    """Its convolutions' weights in the layout that CPUs convolve fastest, in place."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def load_transformer(model: Path, part: str = "transformer") -> Any:
    """A transformer in fp32 whose cross-attention folds the text padding (see :class:`FoldedPadding`); it reads the states that the
    folder has rows for (:mod:`mogan.models.states`).
    """
    transformer = _from_pretrained(class_of(config_of(model, part)), model, part, torch.float32)
    check_first_frame(model, dict(transformer.config))
    if isinstance(transformer, AnyFlowTransformer3DModel):
        transformer = from_stock(transformer, model / part)
    if part == "transformer" and (rows := read_states(model, transformer.config.text_dim)):
        attach_states(transformer, rows)
    return set_attention(transformer)


def _from_pretrained(kind, model: Path, part: str, dtype: torch.dtype):
    config = config_of(model, part)
    if config is None:
        raise UserError(f"{model} has no {part}/config.json: is it a complete diffusers folder of a Wan model?")
    check_class(model, part, config, kind)
    with _readable(model / part):
        loaded, info = kind.from_pretrained(
            model / part, torch_dtype=dtype, output_loading_info=True, local_files_only=True
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info.get("mismatched_keys", [])]
    if wrong:
        raise UserError(f"{model}/{part}: {len(wrong)} tensors do not fit its config, first {wrong[0]}; get it again")
    return loaded


@contextmanager
def _readable(part: Path) -> Iterator[None]:
    """What diffusers and transformers say of a file that is missing or cut short, each in its own way, as one sentence."""
    if not part.is_dir():
        raise UserError(f"{part.parent} has no {part.name}: is it a complete diffusers folder of a Wan model?")
    try:
        yield
    except Exception as error:  # of every kind: a tokenizer's are `Exception` itself
        if isinstance(error, UserError) or too_little_memory(error):
            raise
        why = " ".join(str(error).split())
        if "huggingface.co" in why:  # where transformers would look for a file that is not there
            why = "a file is not there"
        if variant := next(part.glob("*model.*.safetensors"), None):
            why = f"{variant.name} is of a variant, which is not looked for: name it {variant.name.split('.')[0]}.safetensors"
            raise UserError(f"{part} cannot be read ({why})") from error
        lost = isinstance(error, OSError | ValueError | SafetensorError)
        what = "is missing or was cut short" if lost else "was changed"
        raise UserError(
            f"{part} cannot be read ({type(error).__name__}: {why[:200]}): a file {what}, get it again"
        ) from error


def load_eye(model: Path, device: str | torch.device = "cpu") -> Eye:
    """The image encoder as ``pictures, uint8 (H, W, 3) -> features (B, T, D)``, as in stock ``WanImageToVideoPipeline``."""
    with _readable(model / "image_encoder"):
        processor = CLIPImageProcessor.from_pretrained(model / "image_processor", local_files_only=True)
        encoder = CLIPVisionModel.from_pretrained(model / "image_encoder", local_files_only=True, dtype=torch.float32)
    encoder = encoder.to(device).eval()

    @torch.no_grad()
    def look(pictures: list[np.ndarray]) -> Tensor:
        seen = processor(images=pictures, return_tensors="pt").to(device)
        return encoder(**seen, output_hidden_states=True).hidden_states[-2]

    return look


def load_tokenizer(model: Path):
    """The tokenizer, which is read in a moment where the text encoder is not."""
    with _readable(model / "tokenizer"):
        return AutoTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)


def load_text(model: Path, device: str | torch.device = "cpu") -> TextEncoder:
    """Text encoder as ``prompts -> embeddings (L, D)``, each trimmed to its tokens; cleaned as in ``WanPipeline``.

    The full-size encoder is held in bf16, as Wan's own code has it (``t5_dtype``), whatever the files hold: half of 23 GB.

    Raises:
        UserError: the text encoder is incomplete.
    """
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    tokenizer = load_tokenizer(model)
    width = (config_of(model, "text_encoder") or {}).get("d_model", 0)
    dtype: torch.dtype | str = torch.bfloat16 if width >= 4096 else "auto"  # Wan's is UMT5-XXL, 5.7 billion weights
    with _readable(model / "text_encoder"):
        encoder, info = UMT5EncoderModel.from_pretrained(
            model / "text_encoder", local_files_only=True, output_loading_info=True, dtype=dtype
        )
    lacking = [k for k in info["missing_keys"] if "embed_tokens" not in k]  # tied to the shared embedding
    if lacking:
        raise UserError(f"{model}/text_encoder lacks {len(lacking)} tensors, first {lacking[0]}; get it again")
    if len(tokenizer) > encoder.config.vocab_size:
        raise UserError(
            f"{model}: the tokenizer knows {len(tokenizer)} tokens and the text encoder {encoder.config.vocab_size}: they "
            "belong to different models, take both from one"
        )
    encoder = encoder.to(device).eval()

    @torch.no_grad()
    def encode(prompts: list[str]) -> list[Tensor]:
        tokens = tokenizer(
            [prompt_clean(p) for p in prompts],
            padding="longest",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [h[:n].float().cpu() for h, n in zip(hidden, lengths, strict=True)]

    return encode
