import json
import re

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig
from safetensors.torch import save_file

from conftest import CAPTIONS, SIGMAS
from mogan.assemble import assemble
from mogan.cli import main
from mogan.data import open_cache
from mogan.errors import UserError
from mogan.imports import import_student
from mogan.layouts import diffusers_name, original_module, split_leaf
from mogan.lora import TARGETS
from mogan.sample import open_generator, sample
from mogan.wan import load_transformer
from tiny_recipes import mogan

FASTVIDEO = [  # its own table, diffusers -> FastVideo (fastvideo/configs/models/dits/wanvideo.py)
    (r"^patch_embedding\.(.*)$", r"patch_embedding.proj.\1"),
    (r"^condition_embedder\.text_embedder\.linear_1\.(.*)$", r"condition_embedder.text_embedder.fc_in.\1"),
    (r"^condition_embedder\.text_embedder\.linear_2\.(.*)$", r"condition_embedder.text_embedder.fc_out.\1"),
    (r"^condition_embedder\.time_embedder\.linear_1\.(.*)$", r"condition_embedder.time_embedder.mlp.fc_in.\1"),
    (r"^condition_embedder\.time_embedder\.linear_2\.(.*)$", r"condition_embedder.time_embedder.mlp.fc_out.\1"),
    (r"^condition_embedder\.time_proj\.(.*)$", r"condition_embedder.time_modulation.linear.\1"),
    (r"^blocks\.(\d+)\.attn1\.to_([qkv])\.(.*)$", r"blocks.\1.to_\2.\3"),
    (r"^blocks\.(\d+)\.attn1\.to_out\.0\.(.*)$", r"blocks.\1.to_out.\2"),
    (r"^blocks\.(\d+)\.attn1\.norm_([qk])\.(.*)$", r"blocks.\1.norm_\2.\3"),
    (r"^blocks\.(\d+)\.attn2\.to_out\.0\.(.*)$", r"blocks.\1.attn2.to_out.\2"),
    (r"^blocks\.(\d+)\.ffn\.net\.0\.proj\.(.*)$", r"blocks.\1.ffn.fc_in.\2"),
    (r"^blocks\.(\d+)\.ffn\.net\.2\.(.*)$", r"blocks.\1.ffn.fc_out.\2"),
    (r"^blocks\.(\d+)\.norm2\.(.*)$", r"blocks.\1.self_attn_residual_norm.norm.\2"),
]


def fastvideo(name):
    for pattern, there in FASTVIDEO:
        name = re.sub(pattern, there, name)
    return name


def original(name):
    module, leaf = split_leaf(name)
    return ".".join(filter(None, (original_module(module), leaf)))


def named(state, name, prefix=""):
    return {prefix + name(k): v.clone() for k, v in state.items()}


def same(name):
    return name


def shards(state, folder):
    folder.mkdir()
    names = sorted(state)
    save_file({k: state[k] for k in names[::2]}, folder / "a-00001-of-00002.safetensors")
    save_file({k: state[k] for k in names[1::2]}, folder / "a-00002-of-00002.safetensors")
    return folder


def tensors(content, path):
    save_file(content, path)
    return path


def pickled(content, path):
    torch.save(content, path)
    return path


WEIGHTS = {
    "diffusers": lambda s, p: tensors(named(s, same), p / "x.safetensors"),
    "diffusers shards": lambda s, p: shards(named(s, same), p / "transformer"),
    "original": lambda s, p: tensors(named(s, original), p / "x.safetensors"),
    "comfyui": lambda s, p: tensors(named(s, original, "model.diffusion_model."), p / "x.safetensors"),
    "causvid": lambda s, p: pickled({"generator": named(s, original, "model.")}, p / "model.pt"),
    "self-forcing": lambda s, p: pickled(
        {
            "generator": named({k: 0 * v for k, v in s.items()}, original, "model."),
            "critic": named({k: 2 * v for k, v in s.items()}, original, "model."),
            "generator_ema": named(s, original, "model._fsdp_wrapped_module."),
        },
        p / "model.pt",
    ),
    "fastvideo": lambda s, p: tensors(named(s, fastvideo), p / "x.safetensors"),
    "compiled": lambda s, p: pickled({"model": named(s, same, "_orig_mod.")}, p / "x.pth"),
}


@pytest.fixture(scope="module")
def student(family):
    """Weights of a student that is not the base."""
    torch.manual_seed(9)
    return {k: v + 0.1 * torch.randn_like(v) for k, v in load_transformer(family / "teacher").state_dict().items()}


def brought_in(file, family, tmp_path, **more):
    import_student(file, base=str(family / "teacher"), out=tmp_path / "in", sigmas=SIGMAS, **more)
    return load_transformer(tmp_path / "in").state_dict()


def test_diffusers_own_converter_agrees_with_our_table(student):
    there = named(student, original)
    assert set(there) != set(student)
    back = convert_wan_transformer_to_diffusers(dict(there))
    assert set(back) == set(student)
    for name in there:
        assert torch.equal(back[diffusers_name(name)], there[name]), name


@pytest.mark.parametrize("layout", WEIGHTS)
def test_weights_of_every_layout_arrive_whole(layout, student, family, tmp_path):
    arrived = brought_in(WEIGHTS[layout](student, tmp_path), family, tmp_path)
    assert arrived.keys() == student.keys()
    assert all(torch.equal(arrived[k], student[k]) for k in student)
    if layout == "self-forcing":  # its critic is the fake score
        critic = load_transformer(tmp_path / "in", "fake_score").state_dict()
        assert all(torch.equal(critic[k], 2 * student[k]) for k in student)


def adapters(family, rank=3):
    """Random adapters of every matrix of the blocks, by diffusers module."""
    torch.manual_seed(5)
    found = {}
    for name, module in load_transformer(family / "teacher").named_modules():
        if any(name.endswith(f".{t}") for t in TARGETS):
            out, into = module.weight.shape
            found[name] = (torch.randn(rank, into), torch.randn(out, rank))
    assert len(found) == 40
    return found


def pairs(adapters, name, a="lora_A.weight", b="lora_B.weight"):
    return {f"{name(n)}.{leaf}": t for n, pair in adapters.items() for leaf, t in zip((a, b), pair, strict=True)}


def diffusers_lora(adapters, p):
    """As diffusers itself saves an adapter of alpha 6: the alpha is in the header."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS).to_dict()
    about = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    WanPipeline.save_lora_weights(
        p, transformer_lora_layers=pairs(adapters, same), transformer_lora_adapter_metadata=about
    )
    return p / "pytorch_lora_weights.safetensors"


def peft_lora(adapters, p):
    (p / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    return tensors(pairs(adapters, lambda n: f"base_model.model.{n}"), p / "adapter_model.safetensors")


def comfyui_lora(adapters, p):
    doubled = {n: (2 * a, b) for n, (a, b) in adapters.items()}
    return tensors(pairs(doubled, lambda n: f"diffusion_model.{original_module(n)}"), p / "x.safetensors")


def kohya_lora(adapters, p):
    def flat(n):
        return f"lora_unet_{original_module(n)}".replace(".", "_")

    state = pairs(adapters, flat, "lora_down.weight", "lora_up.weight")
    return tensors(state | {f"{flat(n)}.alpha": torch.tensor(6.0) for n in adapters}, p / "x.safetensors")


def dotted_lora(adapters, p):
    def dotted(n):
        return f"diffusion_model.{original_module(n)}"

    state = pairs(adapters, dotted, "lora_down.weight", "lora_up.weight")
    return tensors(state | {f"{dotted(n)}.alpha": torch.tensor(6.0) for n in adapters}, p / "x.safetensors")


@pytest.mark.parametrize("write", [diffusers_lora, peft_lora, comfyui_lora, kohya_lora, dotted_lora])
def test_a_lora_of_every_layout_is_merged_with_its_own_scale(write, family, tmp_path):
    found = adapters(family)
    arrived = brought_in(write(found, tmp_path), family, tmp_path)
    expected = load_transformer(family / "teacher").state_dict()
    for name, (a, b) in found.items():
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + 6 / 3 * torch.einsum("or,ri->oi", b, a)
    for name in expected:
        torch.testing.assert_close(arrived[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("write", [diffusers_lora, comfyui_lora, kohya_lora, dotted_lora])
def test_diffusers_own_loader_merges_the_same_weights(write, family, tmp_path):
    file = write(adapters(family), tmp_path)
    arrived = brought_in(file, family, tmp_path)
    pipe = WanPipeline.from_pretrained(family / "teacher")
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, tensor in pipe.transformer.state_dict().items():
        torch.testing.assert_close(arrived[name], tensor, atol=1e-5, rtol=1e-5)


def test_whole_differences_in_a_lora_file_are_added(family, tmp_path):
    before = load_transformer(family / "teacher").state_dict()
    there = {
        "blocks.1.cross_attn.q.diff_b": "blocks.1.attn2.to_q.bias",
        "blocks.2.norm3.diff": "blocks.2.norm2.weight",
        "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.modulation.diff": "scale_shift_table",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    torch.manual_seed(1)
    state = {f"diffusion_model.{k}": torch.randn_like(before[v]) for k, v in there.items()}
    arrived = brought_in(tensors(state, tmp_path / "x.safetensors"), family, tmp_path)
    changed = {v: before[v] + state[f"diffusion_model.{k}"] for k, v in there.items()}
    for name, tensor in (before | changed).items():
        torch.testing.assert_close(arrived[name], tensor)


def test_an_import_can_be_sampled_and_trained_on(student, family, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    brought_in(WEIGHTS["self-forcing"](student, tmp_path), family, tmp_path, dtype="bf16")
    assert open_generator(str(tmp_path / "in")).sigmas == SIGMAS
    parts = assemble(
        mogan(), open_cache(cache), model=str(family / "teacher"), student=str(tmp_path / "in"), run=None, device="cpu"
    )
    key = "blocks.0.attn1.to_q.weight"
    assert torch.equal(parts.student.transformer.state_dict()[key], student[key].bfloat16().float())
    assert torch.equal(parts.networks["fake_score"].transformer.state_dict()[key], 2 * student[key].bfloat16().float())
    (tmp_path / "p.txt").write_text(CAPTIONS[0])
    sample(prompts=tmp_path / "p.txt", out=tmp_path / "clips", model=str(tmp_path / "in"))
    assert (tmp_path / "clips" / f"{CAPTIONS[0]}-0.mp4").is_file()
    assert "mogan import" in (tmp_path / "in" / "README.md").read_text()


class Surprise:
    def __reduce__(self):
        return (print, ("code of a stranger was run",))


def broken(kind, student, folder):
    """A file that must be refused, and what the sentence must say."""
    state = named(student, original)
    if kind == "missing":
        del state["blocks.0.self_attn.q.weight"], state["head.modulation"]
        return tensors(
            state, folder / "x.safetensors"
        ), r"lacks 2 tensors \(blocks.0.attn1.to_q.weight, scale_shift_table\)"
    if kind == "unexpected":
        extra = {"img_emb.proj.1.weight": torch.zeros(2, 2)}
        return tensors(state | extra, folder / "x.safetensors"), r"has 1 tensor \(img_emb.proj.1.weight\) too many"
    if kind == "another shape":
        wrong = {"blocks.0.self_attn.q.weight": torch.zeros(48, 48)}
        return tensors(state | wrong, folder / "x.safetensors"), "another shape for 1 tensor"
    if kind == "code":
        return pickled({"generator": Surprise()}, folder / "x.pt"), "more than tensors"
    if kind == "not tensors":
        return pickled({"step": 3}, folder / "x.pt"), "holds no tensors"
    if kind == "cut short":
        file = tensors(state, folder / "x.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        return file, "get it again"
    if kind == "no file":
        return folder / "x.pt", "no file"
    if kind == "empty folder":
        return folder, "no .safetensors"
    lora = {"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(1, 24)}
    if kind == "half a lora":
        lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 24)}
    return tensors(lora, folder / "x.safetensors"), r"changes 1 tensor \(.*lora_A.weight\)"


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "unexpected",
        "another shape",
        "code",
        "not tensors",
        "cut short",
        "no file",
        "empty folder",
        "a block too many",
        "half a lora",
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence_and_nothing_is_written(kind, student, family, tmp_path, capsys):
    file, message = broken(kind, student, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        brought_in(file, family, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "in").exists()
    assert "stranger" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "sigmas", [["1000", "757", "522"], ["0.999", "0.5"], ["1", "0.5", "0.5"], ["1", "0.9", "0.8", "0.2"]]
)
def test_levels_that_cannot_be_are_refused_before_anything_is_read(sigmas, family, tmp_path, capsys):
    arguments = ["import", "no-file.pt", "--base", str(family / "teacher"), "--out", str(tmp_path / "in"), "--sigmas"]
    assert main([*arguments, *sigmas]) == 2
    said = capsys.readouterr().err
    assert "--sigmas" in said or "no stock scheduler" in said
