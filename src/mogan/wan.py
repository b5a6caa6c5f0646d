"""Every fact about Wan: where its parts lie, how it reads text, encodes, and decodes a window with gradient.

The stock diffusers classes are used as they are. Latents are always normalised by the autoencoder's stored mean and
deviation. Shapes: video ``B 3 F H W`` in [-1, 1], latents ``B C F H W``, text ``B L D``.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, UMT5EncoderModel

from mogan.errors import UserError
from mogan.flow import FlowEstimator, RaftFlow, load_raft
from mogan.weights import find_weights

TEXT_LENGTH = 512  # WanPipeline pads every prompt to this many tokens and attends to the padding

TextEncoder = Callable[[list[str]], list[Tensor]]


# ---------------------------------------------------------------------------------------------- where a model lies


@dataclass(frozen=True)
class Geometry:
    """What a model was made to generate."""

    fps: int = 16
    height: int = 480
    width: int = 832
    frames: int = 81


WAN_22 = Geometry(fps=24, height=704, width=1280, frames=121)  # TI2V-5B, whose autoencoder has 48 channels


def lab_folder() -> Path:
    """The packaged family: ``teacher/``, ``student/``, ``raft/``."""
    return Path(str(files("mogan.lab") / "family"))


def resolve_model(name: str | Path) -> Path:
    """Folder of a model: ``lab`` (the packaged student), ``lab-teacher``, a local diffusers folder, or a hub id."""
    if str(name) in ("lab", "lab-student", "lab-teacher"):
        folder = lab_folder() / ("teacher" if str(name) == "lab-teacher" else "student")
        if not folder.is_dir():
            raise UserError(f"the lab's family is not in this installation ({folder}); build it with `mogan lab build`")
        return folder
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        check_parts(folder)
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(
            f"{name} is not a diffusers folder (no model_index.json) nor a hub id such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(name), ignore_patterns=["*.msgpack", "assets/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"could not get {name} from the hub ({type(error).__name__}): give a local folder") from error
    check_parts(folder)
    return folder


def check_parts(model: Path) -> None:
    """Read the configs of a folder and raise a UserError if its parts cannot belong together or cannot be trained here."""
    index = _json(model / "model_index.json")
    if any(index.get("transformer_2") or ()):  # a stock folder of one transformer says [null, null]
        raise UserError(
            f"{model} holds two transformers, one for high and one for low noise (Wan2.2 A14B); models with one are what can be trained here"
        )
    transformer, vae, text = (_config(model, part) for part in ("transformer", "vae", "text_encoder"))
    if transformer is not None and not _from_text_alone(transformer):
        raise UserError(f"{model} is image-conditioned; text-to-video transformers are what can be trained here")
    for part, config, kind in (("transformer", transformer, WanTransformer3DModel), ("vae", vae, AutoencoderKLWan)):
        if config is not None:
            _check_class(model, part, config, kind)
    if vae is not None:
        channels = vae.get("z_dim", 16)
        if transformer is not None and transformer.get("out_channels", 16) != channels:
            raise UserError(
                f"{model}: the autoencoder has {channels} channels and the transformer {transformer['out_channels']}: they "
                "belong to different models, take both from one"
            )
        mean, deviation = (vae.get(key, [1.0] * 16) for key in ("latents_mean", "latents_std"))  # 16: diffusers' own
        numbers = len(mean) == len(deviation) == channels and all(map(math.isfinite, [*mean, *deviation]))
        if not numbers or min(deviation) <= 0:
            raise UserError(
                f"{model}/vae/config.json needs {channels} numbers in latents_mean and {channels} positive ones in latents_std: "
                "latents would be scaled wrongly, get the file again"
            )
    if transformer is not None and text is not None and transformer.get("text_dim", 4096) != text.get("d_model"):
        raise UserError(
            f"{model}: the text encoder gives {text.get('d_model')} numbers per token and the transformer reads "
            f"{transformer.get('text_dim', 4096)}: they belong to different models, take both from one"
        )


def _config(model: Path, part: str) -> dict | None:
    path = model / part / "config.json"
    return _json(path) if path.is_file() else None


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): it was cut short, get it again") from error


def _check_class(model: Path, part: str, config: dict, kind: type) -> None:
    found = config.get("_class_name")
    if found != kind.__name__:
        raise UserError(f"{model}/{part} holds a {found}, not a {kind.__name__}: only the Wan family is supported")


def _from_text_alone(transformer: dict) -> bool:
    """False for transformers that read an image: through attention (Wan2.1 I2V) or more channels (I2V, VACE)."""
    extra = transformer.get("image_dim") or transformer.get("added_kv_proj_dim")
    return not extra and transformer.get("in_channels", 16) == transformer.get("out_channels", 16)


def model_facts(model: Path) -> dict:
    """What ``mogan.json`` beside ``model_index.json`` says (fps, size, frames, sigmas); empty for a stock folder."""
    path = model / "mogan.json"
    return _json(path) if path.is_file() else {}


def geometry(model: Path) -> Geometry:
    """Frame rate and size the model was made for; where the folder does not say, those of Wan 2.1 or 2.2's TI2V-5B."""
    facts, vae = model_facts(model), _config(model, "vae") or {}
    usual = WAN_22 if vae.get("z_dim") == 48 else Geometry()
    return replace(usual, **{k: facts[k] for k in ("fps", "height", "width", "frames") if k in facts})


def fingerprint(model: Path, part: str) -> str:
    """Sixteen hex digits that change when the config or the weights of ``part`` change.

    Of large files only the size and both ends are read: enough to tell files apart, in milliseconds.
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


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


# ---------------------------------------------------------------------------------------------- loading parts


def load_vae(model: Path, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
    """The frozen autoencoder, convolution weights in the layout CPUs convolve fastest."""
    vae = _from_pretrained(AutoencoderKLWan, model, "vae", dtype or fast_dtype())
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae.eval().requires_grad_(False)


def load_transformer(model: Path, part: str = "transformer") -> WanTransformer3DModel:
    """A transformer in fp32 whose cross-attention folds the text padding (see :class:`FoldedPadding`)."""
    transformer = _from_pretrained(WanTransformer3DModel, model, part, torch.float32)
    if not _from_text_alone(transformer.config):
        raise UserError(f"{model} is image-conditioned; text-to-video transformers are what can be trained here")
    return fold_padding(transformer)


def _from_pretrained(kind, model: Path, part: str, dtype: torch.dtype):
    config = _config(model, part)
    if config is None:
        raise UserError(f"{model} has no {part}/config.json: is it a complete diffusers folder of a Wan model?")
    _check_class(model, part, config, kind)
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
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{part} cannot be read ({type(error).__name__}: {why[:200]}): a file is missing or was cut short, get it again"
        ) from error


def load_text(model: Path, device: str | torch.device = "cpu") -> TextEncoder:
    """Text encoder as ``prompts -> embeddings (L, D)``, each trimmed to its tokens; cleaned as in ``WanPipeline``.

    The full-size encoder is held in bf16, as Wan's own code has it (``t5_dtype``), whatever the files hold: half of 23 GB.
    """
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    with _readable(model / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    width = (_config(model, "text_encoder") or {}).get("d_model", 0)
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


def load_flow(name: str, iterations: int | None = None, device: str | torch.device = "cpu") -> FlowEstimator:
    """A flow estimator by name: ``lab``, ``farneback`` (classical, no weights), a name that ``mogan weights list`` shows,
    or the path of RAFT weights. ``iterations`` are its refinements: 12, and 4 of the lab's, which sees no more with 12.
    """
    if name == "farneback":
        from mogan.evaluation.classical_flow import farneback

        return farneback
    raft = load_raft(lab_folder() / "raft" if name == "lab" else find_weights(name))
    return RaftFlow(raft, iterations or (4 if name == "lab" else 12)).to(device)


def flow_fingerprint(name: str) -> str:
    """What stands for a flow estimator in a cache: its name if it has no weights, else a hash of them."""
    if name == "farneback":
        return name
    path = (lab_folder() / "raft" if name == "lab" else find_weights(name)).resolve()
    if not path.exists():
        raise UserError(f"no flow network at {path}: --flow takes lab, farneback, or the path of RAFT weights")
    if path.is_dir():
        return fingerprint(path.parent, path.name)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- text


class FoldedPadding:
    """Cross-attention that computes one padding token and counts it as many.

    Wan attends to the zero rows that pad a prompt to 512 tokens, without a mask. Those rows are equal, so their keys and
    values are equal, and ``m`` equal keys weigh as much as one whose logit is raised by ``log m``. A text of ``L`` rows,
    the last one padding, therefore gives what the stock model gives for 512 rows, at a fraction of the cost.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, products: Callable[[], AbstractContextManager]):
        self.products = products

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """Same contract as diffusers' ``WanAttnProcessor`` for text cross-attention."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias, length = None, key.shape[2]
        if length < TEXT_LENGTH:
            # a tensor, not math.log of a number: one compiled graph then serves every length
            count = torch.full((1,), TEXT_LENGTH - length + 1, dtype=torch.float64, device=query.device)
            bias = F.pad(count.log().to(query.dtype), (length - 1, 0)).view(1, 1, 1, length)
        with self.products():
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


class SelfAttention(WanAttnProcessor):
    """The stock self-attention within a context that may change how it is computed."""

    def __init__(self, products: Callable[[], AbstractContextManager]):
        super().__init__()
        self.products = products

    def __call__(self, *args, **kwargs) -> Tensor:
        """Same contract as ``WanAttnProcessor``."""
        with self.products():
            return super().__call__(*args, **kwargs)


class _Fp32Attention(TorchFunctionMode):
    """Within it attention on a CPU ignores autocast: torch's bf16 kernel takes four times as long backwards as fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (args or tuple(kwargs.values()))[0].device.type != "cpu":
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def fold_padding(transformer: WanTransformer3DModel, fp32_on_cpu: bool = True) -> WanTransformer3DModel:
    """Install :class:`FoldedPadding` on every cross-attention; text must then come from :func:`stack_text`.

    On a CPU, self-attention too ignores autocast from then on; ``fp32_on_cpu=False`` leaves that out where a CPU is to do
    what a GPU does.
    """
    products = _Fp32Attention if fp32_on_cpu else nullcontext
    for block in transformer.blocks:
        block.attn1.set_processor(SelfAttention(products))
        block.attn2.set_processor(FoldedPadding(products))
    return transformer


def stack_text(embeddings: Iterable[Tensor], device: str | torch.device = "cpu") -> Float[Tensor, "b l d"]:
    """Pad embeddings ``(L, D)`` with zero rows to the longest plus one (at most 512): the last row is padding."""
    embeddings = [e.float() for e in embeddings]
    length = min(max(len(e) for e in embeddings) + 1, TEXT_LENGTH)
    return torch.stack([F.pad(e, (0, 0, 0, length - len(e))) for e in embeddings]).to(device)


# ---------------------------------------------------------------------------------------------- autoencoder


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=like.device).view(shape)
    return mean, torch.tensor(vae.config.latents_std, device=like.device).view(shape)


def _recurrent(
    step: Callable, chunks: list[tuple[Tensor, bool]], cache: list, checkpointed: bool
) -> tuple[list[Tensor], list]:
    """Run ``step(chunk, cache, first) -> (out, cache)`` along time; each step may be recomputed in the backward pass.

    diffusers hides the convolutions' memory in the module and refuses checkpointing; passing it explicitly makes every
    step a pure function, which gives the same frames and gradients bit for bit.
    """
    outs = []
    for chunk, first in chunks:
        if checkpointed and torch.is_grad_enabled():
            out, cache = checkpoint(step, chunk, cache, first, use_reentrant=False)
        else:
            out, cache = step(chunk, cache, first)
        outs.append(out)
    return outs, cache


def _decoder_step(vae: AutoencoderKLWan, chunk: Tensor, cache: list, first: bool) -> tuple[Tensor, list]:
    cache = list(cache)
    return vae.decoder(chunk, feat_cache=cache, feat_idx=[0], first_chunk=first), cache


def _encoder_step(vae: AutoencoderKLWan, chunk: Tensor, cache: list, first: bool) -> tuple[Tensor, list]:
    cache = list(cache)
    return vae.encoder(chunk, feat_cache=cache, feat_idx=[0]), cache


def _empty_cache(module: nn.Module) -> list:
    return [None] * sum(isinstance(m, WanCausalConv3d) for m in module.modules())


def decode_window(
    vae: AutoencoderKLWan,
    latent_BCFHW: Float[Tensor, "b c f h w"],
    start: int = 0,
    length: int | None = None,
    checkpointing: bool = True,
) -> Float[Tensor, "b 3 g h2 w2"]:
    """Decode latent frames ``start ... start + length - 1`` exactly as a full decode would, and stop.

    The decoder is recurrent: the frames before the window are decoded without gradient for their state alone, which is
    detached (truncated back-propagation, MoGAN appendix A). With ``checkpointing`` each latent frame inside is recomputed in
    the backward pass, so memory does not grow with the window either. A window from the start has ``1 + 4 (length - 1)`` frames, any other ``4 length``.

    Returns fp32 video, clamped to [-1, 1] as the stock decoder does.
    """
    total = latent_BCFHW.shape[2]
    length = total - start if length is None else length
    if not (0 <= start and length > 0 and start + length <= total):
        raise ValueError(f"window {start}..{start + length} does not lie within {total} latent frames")
    mean, deviation = _statistics(vae, latent_BCFHW)
    z = (latent_BCFHW[:, :, : start + length].float() * deviation + mean).to(vae.dtype)
    x = vae.post_quant_conv(z)
    step = partial(_decoder_step, vae)
    chunks = [(x[:, :, i : i + 1], i == 0) for i in range(start + length)]
    with torch.no_grad():
        _, cache = _recurrent(step, chunks[:start], _empty_cache(vae.decoder), checkpointed=False)
    frames, _ = _recurrent(step, chunks[start:], cache, checkpointed=checkpointing)
    video = torch.cat(frames, 2)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video.float().clamp(-1.0, 1.0)


def decode_video(vae: AutoencoderKLWan, latent_BCFHW: Tensor) -> Tensor:
    """Decode a whole clip; fp32 in [-1, 1]."""
    return decode_window(vae, latent_BCFHW)


def encode_video(
    vae: AutoencoderKLWan, video_BCFHW: Float[Tensor, "b 3 f h w"], checkpointing: bool = True
) -> Float[Tensor, "b c g h2 w2"]:
    """Encode ``4 k + 1`` frames to ``k + 1`` normalised latent frames (mean of the posterior), fp32, with gradient."""
    if video_BCFHW.shape[2] % 4 != 1:
        raise ValueError(f"a clip must have 4 k + 1 frames to be encoded, not {video_BCFHW.shape[2]}")
    x = video_BCFHW.to(vae.dtype)
    if vae.config.patch_size is not None:
        x = patchify(x, patch_size=vae.config.patch_size)
    chunks = [(x[:, :, :1], True)] + [(x[:, :, i : i + 4], False) for i in range(1, x.shape[2], 4)]
    encoded, _ = _recurrent(partial(_encoder_step, vae), chunks, _empty_cache(vae.encoder), checkpointing)
    moments = vae.quant_conv(torch.cat(encoded, 2))
    mean, deviation = _statistics(vae, video_BCFHW)
    return (moments.chunk(2, dim=1)[0].float() - mean) / deviation


def latent_shape(model: Path, size: Geometry) -> tuple[int, int, int, int]:
    """``(C, F, H, W)`` of the latents of a clip of this geometry; the clip must fit the autoencoder and the patches."""
    vae, transformer = (_config(model, part) or {} for part in ("vae", "transformer"))  # without one: Wan 2.1's
    return fit_latents(vae, transformer, size)


def fit_latents(vae: dict, transformer: dict, size: Geometry) -> tuple[int, int, int, int]:
    """:func:`latent_shape` from the two configs."""
    patch = transformer.get("patch_size", (1, 2, 2))
    space, time = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    multiple = space * max(patch[1:])
    if size.frames % time != 1 or size.height % multiple or size.width % multiple:
        raise UserError(
            f"a clip of {size.frames} x {size.height} x {size.width} does not fit this model: frames must be "
            f"{time} k + 1, height and width multiples of {multiple}"
        )
    return vae.get("z_dim", 16), 1 + (size.frames - 1) // time, size.height // space, size.width // space
