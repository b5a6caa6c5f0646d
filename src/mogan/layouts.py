"""What other programs call a Wan transformer's tensors: pure renaming, no weights.

Three layouts of weights: diffusers' (ours), the original Wan code's (also ComfyUI's, Self-Forcing's, CausVid's), and
FastVideo's own. Three layouts of LoRA files: peft's ``lora_A/lora_B``, kohya's ``lora_down/lora_up/alpha`` with dots,
and the same with the module's name flattened by underscores (``lora_unet_blocks_0_self_attn_q``).
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

ORIGINAL_TOP = {  # module or parameter in the original code -> in diffusers
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
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
    r"(?P<module>.+?)\.(?P<leaf>weight|bias|diff|diff_b|alpha|dora_scale"
    r"|lora_(?:A|B|down|up)(?:\.default)?\.(?:weight|bias))"
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
    return any(re.search(r"\.(lora_(A|B|down|up)\b|diff(_b)?$)", name) for name in names)


def lora_changes(state: Mapping[str, Tensor], modules: Iterable[str], alpha: float | None = None) -> dict[str, Tensor]:
    """Changes of parameters that a LoRA file of any layout describes, by diffusers' parameter name.

    ``lora_A`` and ``lora_down`` are ``A``, ``lora_B`` and ``lora_up`` are ``B``; the change is ``alpha / rank B A``, and
    ``B A`` where no alpha is given. ``diff`` and ``diff_b`` are changes of the weight and of the bias themselves.

    Args:
        state: the file's tensors.
        modules: diffusers' names of the modules and parameters that may change.
        alpha: of every adapter, where it is kept outside of the tensors.

    Returns:
        changes; what has no place keeps the file's name for it.
    """
    flat = {}
    for name in modules:
        flat[name.replace(".", "_")] = flat[original_module(name).replace(".", "_")] = name
    parts: dict[str, dict[str, Tensor]] = {}
    changes: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, leaf = split_leaf(bare(re.sub(r"^lora_(unet|transformer)_", "", name)))
        known = flat.get(module.replace(".", "_"))
        if known is None or leaf in ("", "weight", "bias", "dora_scale"):
            changes[name] = tensor
            continue
        kind = leaf.replace("lora_down", "lora_A").replace("lora_up", "lora_B").replace(".default", "")
        parts.setdefault(known, {})[kind] = tensor
    for module, found in parts.items():
        if {"lora_A.weight", "lora_B.weight"} <= found.keys():
            a, b = found.pop("lora_A.weight").float(), found.pop("lora_B.weight").float()
            strength = found.pop("alpha").item() if "alpha" in found else alpha
            scale = 1.0 if strength is None else strength / a.shape[0]
            changes[f"{module}.weight"] = scale * (b.flatten(1) @ a.flatten(1))
        weight = module if module.endswith("scale_shift_table") else f"{module}.weight"
        for kind, target in (("diff", weight), ("diff_b", f"{module}.bias")):
            if kind in found:
                changes[target] = changes.get(target, 0) + found.pop(kind).float()
        changes |= {f"{module}.{kind}": tensor for kind, tensor in found.items() if kind != "alpha"}
    return changes
