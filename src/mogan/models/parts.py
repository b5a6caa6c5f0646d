"""Whether the parts of a Wan's folder belong together, and to what is supported here; read from their configs alone."""

import math
from inspect import signature
from pathlib import Path

from diffusers import AnyFlowTransformer3DModel, AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel

from mogan.disk.files import read_json
from mogan.errors import UserError
from mogan.models.conditions import channels_beside, channels_of, is_vace
from mogan.models.experts import LOW, check_experts
from mogan.models.step_condition import CLASS


def check_parts(model: Path) -> None:
    """Read the configs of a folder and raise a UserError if its parts cannot belong together or cannot be trained here."""
    index = read_json(model / "model_index.json") if (model / "model_index.json").is_file() else {}
    transformer, low, vae, text = (config_of(model, part) for part in ("transformer", LOW, "vae", "text_encoder"))
    for part, config in (("transformer", transformer), (LOW, low)):
        if config is not None:
            check_class(model, part, config, class_of(config))
            _check_kinds(model, part, config, class_of(config))
            check_first_frame(model, config)
    check_experts(model, index, transformer, low)
    if vae is not None:
        check_class(model, "vae", vae, AutoencoderKLWan)
        _check_kinds(model, "vae", vae, AutoencoderKLWan)
        if vae.get("out_channels", 3) != 3 * (vae.get("patch_size") or 1) ** 2:
            raise UserError(
                f"{model}/vae/config.json has {vae.get('out_channels', 3)} out_channels in patches of {vae.get('patch_size')}, "
                "which are no pictures of three colours: get the file again"
            )
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
    if is_vace(transformer) and vae is not None:
        _check_controls(model, transformer or {}, vae)
    if transformer is not None and text is not None and transformer.get("text_dim", 4096) != text.get("d_model"):
        raise UserError(
            f"{model}: the text encoder gives {text.get('d_model')} numbers per token and the transformer reads "
            f"{transformer.get('text_dim', 4096)}: they belong to different models, take both from one"
        )


def _check_kinds(model: Path, part: str, config: dict, kind: type) -> None:
    """Refuse settings that are not of the kind of diffusers' own: what comes of them is an error far away, or none."""
    for name, parameter in signature(kind.__init__).parameters.items():  # type: ignore[misc]
        value, own = config.get(name), parameter.default
        if value is None or own is None or own is parameter.empty or _alike(value, own):
            continue
        raise UserError(
            f"{model}/{part}/config.json has {value!r} for {name}, where a {kind.__name__} has such as {own!r}: get the file again"
        )


def _alike(value: object, own: object) -> bool:
    """Whether a setting could stand for diffusers' own: of its type, whole numbers positive where that one is."""
    if isinstance(own, (list, tuple)):
        if not isinstance(value, (list, tuple)) or (isinstance(own, tuple) and len(value) != len(own)):
            return False
        return not own or all(_alike(one, own[0]) for one in value)
    if isinstance(own, (bool, str)):
        return isinstance(value, type(own))
    if isinstance(value, bool) or not isinstance(value, int if isinstance(own, int) else (int, float)):
        return False
    return math.isfinite(value) and (isinstance(own, float) or value > 0 or own == 0)


def _check_controls(model: Path, transformer: dict, vae: dict) -> None:
    """A control has the autoencoder's latents twice, and its mask's pixels."""
    if transformer.get("vace_in_channels", 96) != channels_of(vae):
        raise UserError(
            f"{model}: the transformer reads controls of {transformer.get('vace_in_channels', 96)} channels and those of its "
            f"autoencoder have {channels_of(vae)}: they belong to different models, take both from one"
        )


def check_first_frame(model: Path, transformer: dict) -> None:
    """Of the transformers that are given a picture, those that are given the first frame and nothing else.

    Raises:
        UserError: another picture, or no image encoder where one is needed.
    """
    beside = channels_beside(transformer)
    if beside not in (0, transformer.get("out_channels", 16) + 4):
        raise UserError(
            f"{model}: the transformer reads {beside} channels beside the clip's; the first frame of an image-to-video model "
            "takes 20, and nothing here makes others"
        )
    if transformer.get("pos_embed_seq_len"):
        raise UserError(
            f"{model} is given the first and the last frame; models that are given the first alone can be trained here"
        )
    if sees_pictures_by(transformer) and not (beside and (model / "image_encoder" / "config.json").is_file()):
        raise UserError(
            f"{model}: the transformer reads what an image encoder sees of the first frame, and there is no image_encoder: get "
            "the whole folder"
        )


def sees_pictures_by(transformer: dict | None) -> bool:
    """Whether a transformer reads CLIP's features of the first frame (Wan2.1 I2V) beside its latent."""
    known = transformer or {}
    return bool(known.get("image_dim") or known.get("added_kv_proj_dim"))


def config_of(model: Path, part: str) -> dict | None:
    """The config of a part, if it is there."""
    path = model / part / "config.json"
    return read_json(path) if path.is_file() else None


def check_class(model: Path, part: str, config: dict, kind: type) -> None:
    """Refuse a part of another class than a Wan's."""
    found = config.get("_class_name")
    if found != kind.__name__:
        raise UserError(f"{model}/{part} holds a {found}, not a {kind.__name__}: only the Wan family is supported")


def class_of(transformer: dict | None) -> type:
    """The stock class of a transformer's config: Wan's, VACE's, or of one that is told where its step ends."""
    others = {CLASS: AnyFlowTransformer3DModel, WanVACETransformer3DModel.__name__: WanVACETransformer3DModel}
    return others.get((transformer or {}).get("_class_name", ""), WanTransformer3DModel)
