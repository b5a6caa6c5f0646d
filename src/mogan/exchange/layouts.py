"""What other programs call a Wan transformer's tensors: pure renaming, no weights.

Three layouts of weights: diffusers' (ours), the original Wan code's (also ComfyUI's, Self-Forcing's, CausVid's), and
FastVideo's own. Three layouts of LoRA files: peft's ``lora_A/lora_B`` (an adapter's name may follow), kohya's ``lora_down/lora_up/alpha`` with dots,
and the same with the module's name flattened by underscores (``lora_unet_blocks_0_self_attn_q``).
"""

import re
from collections.abc import Iterable

ORIGINAL_TOP = {  # module or parameter in the original code -> in diffusers
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    # of image-to-video models that see the picture through CLIP
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
ORIGINAL_BLOCK = {
    **{
        f"{theirs}.{a}": f"{ours}.{b}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the one norm with weights; the two codes number it differently
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
FASTVIDEO_TOP = {
    "patch_embedding.proj": "patch_embedding",
    "condition_embedder.text_embedder.fc_in": "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.fc_out": "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_embedder.mlp.fc_in": "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.mlp.fc_out": "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_modulation.linear": "condition_embedder.time_proj",
    "condition_embedder.image_embedder.ff.fc_in": "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image_embedder.ff.fc_out": "condition_embedder.image_embedder.ff.net.2",
}
FASTVIDEO_BLOCK = {
    "to_q": "attn1.to_q",
    "to_k": "attn1.to_k",
    "to_v": "attn1.to_v",
    "to_out": "attn1.to_out.0",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "attn2.to_out": "attn2.to_out.0",
    "ffn.fc_in": "ffn.net.0.proj",
    "ffn.fc_out": "ffn.net.2",
    "self_attn_residual_norm.norm": "norm2",
}
TOP, BLOCK = FASTVIDEO_TOP | ORIGINAL_TOP, FASTVIDEO_BLOCK | ORIGINAL_BLOCK

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")  # anywhere in a name
HOLDERS = ("model", "module", "generator", "diffusion_model", "transformer", "base_model")  # only in front
LEAF = re.compile(
    r"(?P<module>.+?)\.(?P<leaf>weight|bias|diff|diff_b|alpha|lora_(?:A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.(?:weight|bias))"
)
FACTORS = {"down": "A", "up": "B"}
UNMERGED = {  # what only such files' names have -> what they are
    r"\.lokr_\w+$": "a LoKr",
    r"\.hada_\w+$": "a LoHa",
    r"\.(dora_scale|lora_magnitude_vector(\..+)?)$": "a DoRA",
    r"\.(oft_blocks|oft_diag|oft_R(\..+)?)$": "an OFT",
    r"\.lora_mid\.weight$": "a LoRA in three factors",
}
QUANTISED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale|qweight|absmax|quant_map|wscales|comfy_quant)(\.|$)"
)
IMAGE = re.compile(
    r"\b(img_emb|image_embedder|k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k)\b|_[kv]_img\b"
)


def bare(name: str) -> str:
    """A tensor's name without what training code wrapped around the network."""
    words = [w for w in name.split(".") if w not in WRAPPERS]
    while len(words) > 1 and words[0] in HOLDERS:
        words = words[1:]
    return ".".join(words)


def split_leaf(name: str) -> tuple[str, str]:
    """``blocks.0.attn1.to_q.lora_A.weight`` -> module and the rest; a bare parameter has no rest."""
    found = LEAF.fullmatch(name)
    return (found["module"], found["leaf"]) if found else (name, "")


def diffusers_module(name: str) -> str:
    """The diffusers name of a module or parameter named in any of the layouts; names of its own stay."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    return block[1] + BLOCK.get(block[2], block[2]) if block else TOP.get(name, name)


def diffusers_name(name: str) -> str:
    """The diffusers name of a tensor of any layout of weights."""
    module, leaf = split_leaf(bare(name))
    return ".".join(filter(None, (diffusers_module(module), leaf)))


def original_module(name: str) -> str:
    """The original code's name of a diffusers module or parameter; inverse of :func:`diffusers_module` on its names."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if block:
        return block[1] + {v: k for k, v in ORIGINAL_BLOCK.items()}.get(block[2], block[2])
    return {v: k for k, v in ORIGINAL_TOP.items()}.get(name, name)


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file holds changes of weights rather than weights."""
    return any(re.search(r"\.(lora_(A|B|down|up)\b|diff(_[bm])?$)", name) for name in names)


def parts_of_lora(names: Iterable[str], modules: Iterable[str]) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Which tensors of a LoRA file of any layout belong together.

    Args:
        names: of the file's tensors.
        modules: diffusers' names of the modules and parameters that may change.

    Returns:
        by diffusers' module and by what it is there (``A``, ``B``, ``alpha``, ``diff``, ``diff_b``, or the file's own word
        for anything else) the file's names for it, which should be one; and the names of what has no place in this model.
    """
    theirs = {ours: [their for their, our in (BLOCK | TOP).items() if our == ours] for ours in (BLOCK | TOP).values()}
    flat: dict[str, str] = {}
    for name in modules:
        block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
        start, rest = (block[1], block[2]) if block else ("", name)
        flat |= {f"{start}{other}".replace(".", "_"): name for other in (rest, *theirs.get(rest, ()))}
    parts: dict[str, dict[str, list[str]]] = {}
    lost = []
    for name in names:
        whole = re.sub(r"\.diff_m$", ".modulation.diff", re.sub(r"^(lora_unet|lora_transformer|lycoris)_+", "", name))
        module, leaf = split_leaf(bare(whole))
        known = flat.get(module.replace(".", "_"))
        if known is None:
            lost.append(name)
            continue
        factor = re.fullmatch(r"lora_(A|B|down|up)(\..+)?\.weight", leaf)
        kind = FACTORS.get(factor[1], factor[1]) if factor else leaf
        parts.setdefault(known, {}).setdefault(kind, []).append(name)
    return parts, lost


def adapters_in(names: Iterable[str]) -> set[str]:
    """Names that peft gave adapters: ``default`` in ``lora_A.default.weight``."""
    found = (LEAF.fullmatch(name) for name in names)
    return {m["adapter"] for m in found if m and m["adapter"]}
