import json
import os
import pickle
import re
import shutil
from zipfile import ZipFile

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig
from safetensors.torch import save_file

import tiny_recipes
from conftest import CAPTIONS, SIGMAS
from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.exchange.imports import import_student
from mogan.exchange.layouts import diffusers_name, original_module, split_leaf
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.lora import TARGETS
from mogan.models.wan import load_transformer, resolve_model
from mogan.runs.generator import open_generator
from mogan.sampling.sample import sample
from mogan.training.assemble import assemble
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


def test_a_lora_of_the_lab_is_merged_into_the_model_that_a_run_of_it_is_over(tmp_path):
    base = load_transformer(resolve_model("lab-teacher")).state_dict()
    name = "blocks.0.attn1.to_q"
    down, up = torch.randn(2, base[f"{name}.weight"].shape[1]), torch.randn(base[f"{name}.weight"].shape[0], 2)
    file = tensors(
        {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}, tmp_path / "l.safetensors"
    )
    import_student(file, base="lab", out=tmp_path / "in", sigmas=SIGMAS)
    torch.testing.assert_close(
        load_transformer(tmp_path / "in").state_dict()[f"{name}.weight"], base[f"{name}.weight"] + up @ down
    )
    card = (tmp_path / "in" / "README.md").read_text()
    assert "- base: `lab-teacher`" in card


def test_a_causal_student_is_one_if_it_is_said_to_be(student, family, tmp_path, capsys):
    arrived = brought_in(WEIGHTS["self-forcing"](student, tmp_path), family, tmp_path, chunks=(1, 2))
    assert all(torch.equal(arrived[k], student[k]) for k in student)
    source = open_generator(str(tmp_path / "in"))
    assert source.causal == Causal(1, 2)
    assert isinstance(source.load(), CausalDenoiser)
    assert "pipe(" not in (tmp_path / "in" / "README.md").read_text()
    sigmas = ["--sigmas", "1", "0.5", "--chunks", "0", "3", "--out", str(tmp_path / "other")]
    assert main(["import", "no-file.pt", "--base", str(family / "teacher"), *sigmas]) == 2
    assert "--chunks are two numbers of latent frames above 0" in capsys.readouterr().err
    with pytest.raises(UserError, match="no chunk can have 1000"):
        brought_in(WEIGHTS["self-forcing"](student, tmp_path), family, tmp_path / "longer", chunks=(1, 1000))


@pytest.mark.parametrize("recipe", ["self_forcing", "mogan_causal"])
def test_a_causal_file_of_nothing_but_weights_is_opened_and_trained_on(recipe, student, family, cache, tmp_path):
    """As Self-Forcing's trainer names weights, without an entry that holds them."""
    file, out, run = (
        pickled(named(student, original, "model."), tmp_path / "model.pt"),
        tmp_path / "in",
        tmp_path / "run",
    )
    config, teacher = getattr(tiny_recipes, recipe)(), str(family / "teacher")
    command = ["import", str(file), "--base", teacher, "--chunks", "1", "1", "--out", str(out)]
    assert main([*command, "--sigmas", *map(str, config.sigmas)]) == 0
    source = open_generator(str(out))
    assert (source.causal, source.sigmas) == (Causal(1, 1), config.sigmas)
    arrived = load_transformer(out).state_dict()
    assert all(torch.equal(arrived[k], student[k]) for k in student)
    train = ["train", f"tiny_recipes:{recipe}", "--model", teacher, "--student", str(out), "--data", str(cache)]
    assert main([*train, "--out", str(run), "--iterations", "1", "--device", "cpu"]) == 0
    learnt = open_generator(str(run)).load().transformer.state_dict()
    apart = [float((learnt[k] - student[k]).abs().max()) for k in student]
    assert 0 < max(apart) < 0.05  # it went on from what was brought in, which is 0.1 from the base


@pytest.mark.parametrize("blank", ["blocks.0.attn1.to_q.weight", ""])
def test_zeros_where_a_download_broke_off_are_refused(blank, student, family, tmp_path):
    save_file({k: torch.zeros_like(v) if k.startswith(blank) else v for k, v in student.items()}, tmp_path / "x.sft")
    with pytest.raises(UserError, match="nothing but zeros where weights should be"):
        brought_in(tmp_path / "x.sft", family, tmp_path)
    assert not (tmp_path / "in").exists()


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


def named_adapter_lora(adapters, p):
    """As LightX2V saves an adapter that has a name."""
    doubled = {n: (2 * a, b) for n, (a, b) in adapters.items()}
    state = pairs(
        doubled, lambda n: f"diffusion_model.{original_module(n)}", "lora_A.fast.weight", "lora_B.fast.weight"
    )
    return tensors(state, p / "x.safetensors")


def fastvideo_lora(adapters, p):
    doubled = {n: (2 * a, b) for n, (a, b) in adapters.items()}
    return tensors(pairs(doubled, lambda n: fastvideo(f"{n}.")[:-1]), p / "x.safetensors")


def folder_lora(adapters, p):
    """The alpha is in the header of the one file of a folder."""
    return diffusers_lora(adapters, p).parent


@pytest.mark.parametrize(
    "write",
    [
        diffusers_lora,
        peft_lora,
        comfyui_lora,
        kohya_lora,
        dotted_lora,
        named_adapter_lora,
        fastvideo_lora,
        folder_lora,
    ],
)
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
        "blocks.3.diff_m": "blocks.3.scale_shift_table",  # m for modulation, beside the module that holds it
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


@pytest.mark.parametrize("name", ["UPPER.SAFETENSORS", "x.sft", "x.pt", "no_suffix", "with a space.safetensors"])
def test_a_file_is_known_by_what_it_holds_and_not_by_its_name(name, student, family, tmp_path):
    arrived = brought_in(tensors(named(student, original), tmp_path / name), family, tmp_path)
    assert all(torch.equal(arrived[k], student[k]) for k in student)


def test_a_checkpoint_of_torch_may_be_called_safetensors(student, family, tmp_path):
    arrived = brought_in(pickled(named(student, original), tmp_path / "x.safetensors"), family, tmp_path)
    assert all(torch.equal(arrived[k], student[k]) for k in student)


@pytest.mark.parametrize("length", [ord("<"), ord("{"), 0x80, ord("\n")])
def test_the_length_of_a_header_is_not_taken_for_the_files_kind(length, student, family, tmp_path):
    """The first byte of safetensors is the lowest of its header's length, which may be any byte."""
    file = tensors(named(student, original), tmp_path / "x.safetensors")
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    longer = size + (length - size) % 256
    file.write_bytes(longer.to_bytes(8, "little") + whole[8 : 8 + size].ljust(longer) + whole[8 + size :])
    assert file.read_bytes()[0] == length
    arrived = brought_in(file, family, tmp_path)
    assert all(torch.equal(arrived[k], student[k]) for k in student)


def test_weights_in_eight_bits_without_scales_arrive_as_they_are(student, family, tmp_path):
    small = {k: v.to(torch.float8_e4m3fn) for k, v in student.items()}
    arrived = brought_in(tensors(named(small, original), tmp_path / "x.safetensors"), family, tmp_path)
    assert all(torch.equal(arrived[k], small[k].float()) for k in student)


Q, FFN = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"


def lora(**more):
    """One adapter, of a matrix that is 24 x 24, with other tensors in it."""
    pair = {f"{Q}.lora_A.weight": torch.ones(2, 24), f"{Q}.lora_B.weight": torch.ones(24, 2)}
    return pair | {k.replace("Q_", f"{Q}.").replace("FFN_", f"{FFN}.").replace("__", "."): v for k, v in more.items()}


def inf(*shape):
    return torch.full(shape, 1e6).half()


LORAS = {  # changes of one adapter -> what the sentence must say
    "infinite": (lora(Q_lora_A__weight=inf(2, 24)), r"infinite or none \(.*self_attn.q.lora_A.weight\)"),
    "too large": (lora(Q_lora_A__weight=torch.full((2, 24), 3e38)), "makes blocks.0.attn1.to_q.weight infinite"),
    "nan alpha": (lora(Q_alpha=torch.tensor(float("nan"))), r"infinite or none \(.*q.alpha\)"),
    "two alphas": (lora(Q_alpha=torch.ones(2)), "alpha is not one number"),
    "ranks differ": (lora(Q_lora_A__weight=torch.ones(3, 24)), r"ranks of .*lora_A.weight \(3, 24\) and .* differ"),
    "one side": (lora(Q_lora_A__weight=torch.ones(2)), "ranks of"),
    "no rank": (
        lora(Q_lora_A__weight=torch.ones(0, 24), Q_lora_B__weight=torch.ones(24, 0), Q_alpha=torch.ones(())),
        "differ or are 0: it is damaged",
    ),
    "another width": (
        lora(Q_lora_A__weight=torch.ones(2, 48), Q_lora_B__weight=torch.ones(48, 2)),
        r"as \(48, 48\), which this base has as \(24, 24\); give the --base it was made from",
    ),
    "turned": (lora(FFN_diff=torch.ones(24, 32)), r"as \(24, 32\), which this base has as \(32, 24\)"),
    "half": ({f"{Q}.lora_A.weight": torch.ones(1, 24)}, "q.lora_A.weight without its other factor"),
    "a block too many": (
        {k.replace("blocks.0", "blocks.9"): v for k, v in lora().items()},
        "block 9, the base 4 blocks: give the --base it was made from",
    ),
    "of another model": (
        {k.replace("blocks.0", "layers.0"): v for k, v in lora().items()},
        "it is no LoRA of a Wan transformer alone",
    ),
    "image to video": (
        lora(**{"diffusion_model__blocks__0__cross_attn__k_img__diff_b": torch.ones(24)}),
        "image-to-video Wan with CLIP",
    ),
    "LoKr": (lora(Q_lokr_w1=torch.ones(2, 2), Q_lokr_w2=torch.ones(12, 12)), r"is a LoKr \(.*lokr_w1\)"),
    "LoHa": ({f"{Q}.hada_w1_a": torch.ones(24, 2), f"{Q}.alpha": torch.tensor(1.0)}, "is a LoHa"),
    "DoRA": (lora(Q_dora_scale=torch.ones(24, 1)), "is a DoRA"),
    "Tucker": (lora(Q_lora_mid__weight=torch.ones(2, 2)), "is a LoRA in three factors"),
    "two adapters": (
        lora(**{"Q_lora_A__a__weight": torch.ones(2, 24), "Q_lora_A__b__weight": torch.ones(2, 24)}),
        r"several adapters \(a, b\)",
    ),
    "said twice": (lora(blocks__0__attn1__to_q__lora_A__weight=torch.ones(2, 24)), "says twice"),
    "weights beside": (lora(Q_weight=torch.ones(24, 24)), "beside changes"),
    "whole numbers": (
        lora(Q_lora_A__weight=torch.ones(2, 24).to(torch.int8)),
        r"int8 where numbers should be \(.*lora_A",
    ),
    "nothing": ({k: 0 * v for k, v in lora().items()}, "changes nothing"),
}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_that_cannot_be_merged_is_refused_for_what_it_is(kind, family, tmp_path):
    state, message = LORAS[kind]
    with pytest.raises(UserError, match=message) as error:
        brought_in(tensors(state, tmp_path / "x.safetensors"), family, tmp_path)
    assert "\n" not in str(error.value)
    assert ("give the --base" in str(error.value)) == (
        kind in ("another width", "turned", "a block too many", "image to video")
    )
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    "about",
    [
        "{not json",
        "[1]",
        '{"transformer.lora_alpha": "8"}',
        '{"transformer.lora_alpha": NaN}',
        '{"transformer.lora_alpha": 1' + "0" * 400 + "}",
        "[" * 100_000,
    ],
    ids=range(6),
)
def test_a_scale_that_cannot_be_read_is_not_guessed(about, family, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(lora(), file, {"lora_adapter_metadata": about})
    with pytest.raises(UserError, match="does not say the adapters' alpha"):
        brought_in(file, family, tmp_path)
    (tmp_path / "adapter_config.json").write_text(about)
    with pytest.raises(UserError, match=r"adapter_config.json does not say the adapters' alpha"):
        brought_in(tensors(lora(), file), family, tmp_path)


class Surprise:
    def __reduce__(self):
        return (print, ("code of a stranger was run",))


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


def written(content, path):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cut(file, left):
    file.write_bytes(file.read_bytes()[:left])
    return file


def shards_named(s, p, *names):
    for name in names:
        tensors(s, p / f"{name}.safetensors")
    return p


def steps(s, p):
    for step in (100, 200):
        tensors(lora(), p / f"lora-{step:06d}.safetensors")
    return p


def archive(s, p):
    with ZipFile(p / "x.pt", "w") as file:
        file.writestr("model.safetensors", b"x")
    return p / "x.pt"


def fp8(s, p):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in s.items()}
    return tensors(state | {"blocks.0.self_attn.q.scale_weight": torch.ones(1)}, p / "x.safetensors")


def run_folder(s, p):
    written("{}", p / "run.json")
    return p


Q0 = "blocks.0.self_attn.q.weight"
BROKEN = {  # a file that must be refused (from a whole student in the original layout), and what the sentence must say
    "missing": (
        lambda s, p: tensors(without(s, Q0, "head.modulation"), p / "x.safetensors"),
        r"lacks 2 tensors \(blocks.0.attn1.to_q.weight, scale_shift_table\); it is damaged",
    ),
    "unexpected": (
        lambda s, p: tensors(s | {"vace_blocks.0.x": torch.zeros(2)}, p / "x.safetensors"),
        r"has 1 tensor \(vace_blocks.0.x\) too many; it is damaged, or of another kind",
    ),
    "image to video": (
        lambda s, p: tensors(s | {"img_emb.proj.1.weight": torch.zeros(2, 2)}, p / "x.safetensors"),
        r"image-to-video Wan with CLIP \(img_emb",
    ),
    "another shape": (
        lambda s, p: tensors(s | {Q0: torch.zeros(48, 48)}, p / "x.safetensors"),
        "another shape for 1 tensor .*4 blocks of width 48, the base 4 blocks of width 24: give the --base",
    ),
    "fewer blocks": (
        lambda s, p: tensors({k: v for k, v in s.items() if "blocks.3." not in k}, p / "x.safetensors"),
        "it has 3 blocks of width 24, the base 4 blocks of width 24: give the --base",
    ),
    "another network": (
        lambda s, p: tensors({"encoder.x.weight": torch.zeros(2)}, p / "x.safetensors"),
        r"no Wan transformer but 1 tensor \(encoder.x.weight\)",
    ),
    "two networks": (
        lambda s, p: tensors(s | {f"generator.{Q0}": s[Q0].clone()}, p / "x.safetensors"),
        "two networks in one list",
    ),
    "not a number": (
        lambda s, p: tensors(s | {Q0: s[Q0] * float("nan")}, p / "x.safetensors"),
        rf"infinite or none \({Q0}\)",
    ),
    "a number of eight bytes": (
        lambda s, p: tensors(s | {Q0: s[Q0].double() * 1e300}, p / "x.safetensors"),
        rf"infinite or none \({Q0}\)",
    ),
    "a critic that is none": (
        lambda s, p: pickled({"generator": s, "critic": s | {Q0: s[Q0] / 0}}, p / "x.pt"),
        rf"infinite or none \({Q0}\)",
    ),
    "scaled fp8": (fp8, r"scaled weights \(blocks.0.self_attn.q.scale_weight\): get the fp32"),
    "whole numbers": (lambda s, p: tensors(s | {Q0: s[Q0].to(torch.int8)}, p / "x.safetensors"), "int8 where numbers"),
    "sparse": (lambda s, p: pickled(s | {Q0: s[Q0].to_sparse()}, p / "x.pt"), "sparse_coo where numbers"),
    "shapes alone": (lambda s, p: pickled({k: v.to("meta") for k, v in s.items()}, p / "x.pt"), "shapes without numbers"),
    "code": (lambda s, p: pickled({"generator": Surprise()}, p / "x.pt"), "more than tensors"),
    "code called safetensors": (lambda s, p: pickled(Surprise(), p / "x.safetensors"), "more than tensors"),
    "plain pickle": (lambda s, p: written(pickle.dumps({"x": Surprise()}), p / "x.pth"), "more than tensors"),
    "not tensors": (lambda s, p: pickled({"step": 3}, p / "x.pt"), "holds no tensors, nothing but step"),
    "nothing": (lambda s, p: pickled({}, p / "x.pt"), "holds no tensors, nothing"),
    "a list": (lambda s, p: pickled([s[Q0]], p / "x.pt"), "holds a list, not named tensors"),
    "numbered": (lambda s, p: pickled({0: s[Q0]}, p / "x.pt"), "not named tensors"),
    "cut short": (lambda s, p: cut(tensors(s, p / "x.safetensors"), -100), "damaged, get it again"),
    "cut in the header": (lambda s, p: cut(tensors(s, p / "x.safetensors"), 300), "damaged, get it again"),
    "cut pickle": (lambda s, p: cut(pickled(s, p / "x.pt"), 5000), "damaged, get it again|cannot be read"),
    "bad header": (lambda s, p: written((20).to_bytes(8, "little") + b'{"x": not a header!', p / "x.safetensors"), "damaged"),
    "empty": (lambda s, p: written("", p / "x.safetensors"), "is empty"),
    "text": (lambda s, p: written("these are my weights\n", p / "x.safetensors"), "neither safetensors nor"),
    "json": (lambda s, p: written('{"weight_map": {}}', p / "x.index.json"), "is JSON, not weights"),
    "web page": (lambda s, p: written("<!DOCTYPE html><html>", p / "x.safetensors"), "is a web page"),
    "git lfs": (lambda s, p: written("version https://git-lfs.github.com/spec/v1\n", p / "x.safetensors"), "Git LFS"),
    "gguf": (lambda s, p: written(b"GGUF" + bytes(60), p / "x.gguf"), "GGUF file, whose weights are quantised"),
    "archive": (archive, "is a zip archive"),
    "no file": (lambda s, p: p / "x.pt", "no file"),
    "empty folder": (lambda s, p: p, "no .safetensors"),
    "a run": (run_folder, "is a run of `mogan train`: `mogan export`"),
    "two steps of a lora": (steps, r"2 files that are not one model \(lora-000100.safetensors, lora-000200.safetensors\): name"),
    "shards of two models": (
        lambda s, p: shards_named(s, p, "a-00001-of-00001", "b-00001-of-00001"),
        "2 files that are not one model",
    ),
    "a shard missing": (lambda s, p: tensors(s, p / "a-00001-of-00002.safetensors").parent, "1 of 2 shards of a: get"),
    "a shard twice": (
        lambda s, p: shards_named(s, p, "a-1-of-2", "a-2-of-2"),
        "that another shard holds too",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_named_in_one_sentence_and_nothing_is_written(kind, student, family, tmp_path, capsys):
    make, message = BROKEN[kind]
    (tmp_path / "of").mkdir()
    file = make(named(student, original), tmp_path / "of")
    with pytest.raises(UserError, match=message) as error:
        brought_in(file, family, tmp_path)
    assert "\n" not in str(error.value)
    assert ("give the --base" in str(error.value)) == (kind in ("another shape", "fewer blocks", "image to video"))
    assert not (tmp_path / "in").exists()
    assert "stranger" not in capsys.readouterr().out


def test_of_a_critic_what_is_no_tensor_is_left_out(student, family, tmp_path):
    state = named(student, original)
    file = pickled({"generator": state, "critic": {**state, "step": 5, 3: state[Q0]}}, tmp_path / "x.pt")
    brought_in(file, family, tmp_path)
    assert (tmp_path / "in" / "fake_score").is_dir()


def test_a_critic_that_is_no_fake_score_of_the_base_is_left_out_and_the_student_is_imported(
    student, family, tmp_path, capsys
):
    state = named(student, original)
    critic = state | {"heads.0.weight": state[Q0]}
    brought_in(pickled({"generator": state, "critic": critic}, tmp_path / "x.pt"), family, tmp_path)
    assert not (tmp_path / "in" / "fake_score").exists()
    said = capsys.readouterr().out
    assert "its critic is left out" in said
    assert "as the fake score" not in said


def test_a_base_of_two_experts_is_refused_before_anything_is_read(student, family, tmp_path):
    base = tmp_path / "two"
    shutil.copytree(family / "teacher", base)
    shutil.copytree(base / "transformer", base / "transformer_2")
    index = json.loads((base / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has two experts"):
        import_student(
            written("never read", tmp_path / "x.safetensors"), base=str(base), out=tmp_path / "in", sigmas=(1.0, 0.5)
        )


def test_a_named_pipe_is_not_waited_for(family, tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no file"):
        brought_in(tmp_path / "x.safetensors", family, tmp_path)


def test_a_precision_too_small_for_a_weight_is_refused(student, family, tmp_path):
    state = named(student, original)
    state[Q0][3, 5] = -7e4
    file = tensors(state, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"blocks.0.attn1.to_q.weight holds 7e\+04, and fp16 ends at 65504: .* bf16 or fp32"
    ):
        brought_in(file, family, tmp_path, dtype="fp16")
    assert list(tmp_path.iterdir()) == [file]
    arrived = brought_in(file, family, tmp_path, dtype="bf16")
    assert arrived["blocks.0.attn1.to_q.weight"][3, 5] == torch.tensor(-7e4).bfloat16()


@pytest.mark.parametrize(
    "sigmas", [["1000", "757", "522"], ["0.999", "0.5"], ["1", "0.5", "0.5"], ["1", "0.9", "0.8", "0.2"]]
)
def test_levels_that_cannot_be_are_refused_before_anything_is_read(sigmas, family, tmp_path, capsys):
    arguments = ["import", "no-file.pt", "--base", str(family / "teacher"), "--out", str(tmp_path / "in"), "--sigmas"]
    assert main([*arguments, *sigmas]) == 2
    said = capsys.readouterr().err
    assert "--sigmas" in said or "no stock scheduler" in said
