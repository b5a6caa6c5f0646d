"""Causal students for LightX2V, FastVideo and ComfyUI: keys, shapes and settings by these programs' loading rules, transcribed."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

import tiny_recipes
from conftest import TRANSFORMER
from mogan.cli import main
from mogan.errors import UserError
from mogan.exchange.elsewhere import require_sampled_alike, thousandths
from mogan.exchange.imports import import_student
from mogan.models.causal_cache import Causal, Policy
from mogan.models.wan import load_transformer
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import Chunked
from mogan.schedule import shift, shifted_levels
from mogan.training.loop import run_training
from test_train import build

HOW = Causal(2, 2, Policy(window=4))
LINEAR = ("weight", "bias")


@pytest.fixture(scope="module")
def wide(family, tmp_path_factory):
    """The family with heads of width 128, which is what ComfyUI knows."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(family / "teacher", folder / "teacher")
    torch.manual_seed(1)
    heads = {"num_attention_heads": 1, "attention_head_dim": 128, "freq_dim": 256, "num_layers": 2}
    WanTransformer3DModel(**TRANSFORMER | heads).save_pretrained(folder / "teacher" / "transformer")
    return folder


@pytest.fixture(scope="module")
def run(wide, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = replace(tiny_recipes.self_forcing(), rollout=Chunked(Causal(2, 2)), iterations=1)
    (folder / "config.json").write_text(json.dumps(config.as_json()))
    (folder / "run.json").write_text(tiny_recipes.places(config, wide, cache))
    run_training(build(config, wide, cache, folder), folder)
    return folder


def exported(run, out, to):
    assert main(["export", str(run), "--out", str(out), "--to", to]) == 0
    return open_generator(str(run)).load().transformer.state_dict()


def original_names(depth):
    """What LightX2V asks of a text-to-video Wan: pre_weights.py, transformer_weights.py, post_weights.py in its networks/wan/weights."""
    top = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    top += ["time_projection.1", "head.head"]
    attention = [f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"]
    names = {f"{name}.{leaf}" for name in top for leaf in LINEAR} | {"head.modulation"}
    for block in range(depth):
        inner = [f"{name}.{leaf}" for name in (*attention, "ffn.0", "ffn.2", "norm3") for leaf in LINEAR]
        inner += [f"{kind}.norm_{part}.weight" for kind in ("self_attn", "cross_attn") for part in "qk"]
        names |= {f"blocks.{block}.{name}" for name in (*inner, "modulation")}
    return names


def fastvideo_names(depth):
    """Parameters of its CausalWanTransformer3DModel (models/dits/causal_wanvideo.py)."""
    embedder = "condition_embedder"
    top = ["patch_embedding.proj", f"{embedder}.text_embedder.fc_in", f"{embedder}.text_embedder.fc_out", "proj_out"]
    top += [f"{embedder}.time_embedder.mlp.fc_in", f"{embedder}.time_embedder.mlp.fc_out"]
    top += [f"{embedder}.time_modulation.linear"]
    attention = [f"{kind}{part}" for kind in ("", "attn2.") for part in ("to_q", "to_k", "to_v", "to_out")]
    names = {f"{name}.{leaf}" for name in top for leaf in LINEAR} | {"scale_shift_table"}
    for block in range(depth):
        others = ("ffn.fc_in", "ffn.fc_out", "self_attn_residual_norm.norm")
        inner = [f"{name}.{leaf}" for name in (*attention, *others) for leaf in LINEAR]
        inner += [f"{kind}norm_{part}.weight" for kind in ("", "attn2.") for part in "qk"]
        names |= {f"blocks.{block}.{name}" for name in (*inner, "scale_shift_table")}
    return names


def in_fastvideo(name):
    """Its renaming of a diffusers tensor (configs/models/dits/wanvideo.py), part by part."""
    parts = [
        (r"^patch_embedding\.", "patch_embedding.proj."),
        (r"text_embedder\.linear_1\.", "text_embedder.fc_in."),
        (r"text_embedder\.linear_2\.", "text_embedder.fc_out."),
        (r"time_embedder\.linear_1\.", "time_embedder.mlp.fc_in."),
        (r"time_embedder\.linear_2\.", "time_embedder.mlp.fc_out."),
        (r"time_proj\.", "time_modulation.linear."),
        (r"attn1\.to_out\.0\.", "to_out."),
        (r"attn1\.", ""),
        (r"attn2\.to_out\.0\.", "attn2.to_out."),
        (r"ffn\.net\.0\.proj\.", "ffn.fc_in."),
        (r"ffn\.net\.2\.", "ffn.fc_out."),
        (r"\.norm2\.", ".self_attn_residual_norm.norm."),
    ]
    for pattern, there in parts:
        name = re.sub(pattern, there, name)
    return name


def test_lightx2v_reads_the_file_of_self_forcings_layout(run, wide, tmp_path):
    own = exported(run, tmp_path / "student.pt", "self-forcing")
    opened = torch.load(
        tmp_path / "student.pt"
    )  # networks/wan/sf_model.py: the average if there is one, six letters cut off
    read = {name[6:]: tensor for name, tensor in opened.get("generator_ema", opened).items()}
    assert read.keys() == original_names(2)
    assert len(read) == len(own)
    assert {n: tuple(read[n].shape) for n in ("blocks.1.modulation", "head.modulation", "patch_embedding.weight")} == {
        "blocks.1.modulation": (1, 6, 128),
        "head.modulation": (1, 2, 128),
        "patch_embedding.weight": (128, 4, 1, 2, 2),
    }
    sigmas = open_generator(str(run)).sigmas
    card = (tmp_path / "student.md").read_text()
    config = json.loads(re.search(r"```json\n(.*?)```", card, re.S)[1])
    assert config["ar_config"] == {
        "num_frame_per_chunk": 2,
        "local_attn_size": -1,
        "sink_size": 0,
        "denoising_step_list": [1000.0, 857.143, 600.0],
    }
    table = shift(
        1 - torch.arange(1000, dtype=torch.float64) / 1000, config["sample_shift"]
    )  # its scheduler's, in denoise mode
    told = torch.tensor(config["ar_config"]["denoising_step_list"], dtype=torch.float64)
    visited = table[(1000 * table[:, None] - told).abs().argmin(0)]
    assert (visited - torch.tensor(sigmas)).abs().max() < 1e-3
    import_student(
        tmp_path / "student.pt", base=str(wide / "teacher"), out=tmp_path / "back", sigmas=sigmas, chunks=(2, 2)
    )
    back = load_transformer(tmp_path / "back").state_dict()
    assert all(torch.equal(back[name], own[name]) for name in own)
    assert open_generator(str(tmp_path / "back")).causal == open_generator(str(run)).causal


def test_fastvideo_reads_the_folder(run, wide, tmp_path):
    own = exported(run, tmp_path / "student", "fastvideo")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert "wancausaldmdpipeline" in index["_class_name"].lower()  # its registry's detector
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    assert parts == {"transformer", "text_encoder", "tokenizer", "vae", "scheduler"}
    assert all((tmp_path / "student" / part).is_dir() for part in parts)
    config = json.loads((tmp_path / "student" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == index["transformer"][1] == "CausalWanTransformer3DModel"
    assert (config["num_frames_per_block"], config["local_attn_size"], config["sink_size"]) == (2, -1, 0)
    assert config["rope_cache_policy"] == "absolute"
    weights = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {in_fastvideo(name) for name in weights} == fastvideo_names(2)
    assert all(torch.equal(weights[name], own[name]) for name in own)
    shape = (config["num_attention_heads"], config["attention_head_dim"], config["num_layers"], config["freq_dim"])
    assert shape == (1, 128, 2, 256)
    told = json.loads((tmp_path / "student" / "fastvideo.json").read_text())
    scheduler = json.loads((tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    assert told["warp_denoising_step"]
    assert told["flow_shift"] == scheduler["shift"] == 1.0
    table = shift(
        torch.arange(1000, 0, -1) / 1000, scheduler["shift"]
    )  # its scheduler's; the stage indexes it by 1000 - step
    visited = [float(table[1000 - step]) for step in told["dmd_denoising_steps"]]
    assert visited == pytest.approx(open_generator(str(run)).sigmas, abs=1e-3)
    for pipeline in (WanPipeline, DiffusionPipeline):  # they would sample whole clips
        with pytest.raises((AttributeError, ValueError), match=r"CausalWanTransformer3DModel|WanCausalDMDPipeline"):
            pipeline.from_pretrained(tmp_path / "student")
    assert "from_pretrained(" in (tmp_path / "student" / "README.md").read_text()


def test_comfyui_knows_the_file(run, tmp_path):
    own = exported(run, tmp_path / "student.safetensors", "comfyui")
    weights = load_file(tmp_path / "student.safetensors")
    with safe_open(tmp_path / "student.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])["transformer"]
    assert config == {"causal_ar": True}  # what makes its model_detection.py choose the autoregressive model
    width = weights["head.modulation"].shape[-1]  # the rest it sees in shapes
    found = {
        "num_heads": width // 128,
        "ffn_dim": weights["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "in_dim": weights["patch_embedding.weight"].shape[1],
        "out_dim": weights["head.head.weight"].shape[0] // 4,
        "text_dim": weights["text_embedding.0.weight"].shape[1],
    }
    assert found == {"num_heads": 1, "ffn_dim": 32, "num_layers": 2, "in_dim": 4, "out_dim": 4, "text_dim": 64}
    assert weights.keys() == original_names(2)
    assert len(own) == len(weights)
    assert "`num_frame_per_block` 2" in (tmp_path / "student.md").read_text()


def test_levels_are_named_in_a_grid_of_a_thousand():
    assert thousandths(shifted_levels(4, 5.0)) == (5.0, [1000, 750, 500, 250], pytest.approx(0, abs=1e-6))
    assert thousandths((1.0, 0.757, 0.522))[:2] == (1.0, [1000, 757, 522])
    assert thousandths((1.0,))[:2] == (1.0, [1000])
    k, steps, error = thousandths(shifted_levels(3, 3.0))  # 667 and 333 at shift 3 are farther off
    assert (k, steps) == (1.0, [1000, 857, 600])
    assert error == pytest.approx(6 / 7 - 0.857)


@pytest.mark.parametrize(
    ("to", "change", "why"),
    [
        ("self-forcing", {"causal": None}, "sees whole clips"),
        ("self-forcing", {"causal": Causal(1, 2)}, "makes a first chunk of 1 latents"),
        ("comfyui", {"causal": Causal(1, 1, first_sigmas=(1.0, 0.5))}, "levels of its own"),
        ("fastvideo", {"causal": Causal(1, 1, context_sigma=0.1)}, "sees a noised past"),
        ("fastvideo", {"causal": Causal(1, 1, Policy(3, 1, 0.9))}, "averages its sink"),
        ("fastvideo", {"causal": Causal(2, 2, Policy(3))}, "window of 3 latents in chunks of 2"),
        ("self-forcing", {"causal": Causal(1, 1, Policy(3, 1, relative=True))}, "numbers what it sees anew"),
        ("fastvideo", {"causal": Causal(4, 4)}, "more than 3 latents"),
        ("fastvideo", {"causal": Causal(3, 3)}, "makes 4 latents in chunks of 3, the last shorter"),
        ("self-forcing", {"causal": Causal(3, 3)}, "makes 4 latents in chunks of 3, the last shorter"),
        ("comfyui", {"causal": HOW}, "sees a window"),
        ("comfyui", {"solver": "euler"}, "takes Euler's steps"),
        ("comfyui", {"states": ("idle",)}, "is told states"),
        ("fastvideo", {"animates": True}, "goes on from a first frame"),
        ("fastvideo", {"told": True}, "is told where its steps end"),
    ],
)
def test_what_a_program_would_sample_otherwise_is_refused(to, change, why, run):
    source = open_generator(str(run))
    require_sampled_alike(source, to, run)
    with pytest.raises(UserError, match=why):
        require_sampled_alike(replace(source, **change), to, run)


def test_what_they_can_be_told_is_told(run, tmp_path, monkeypatch):
    source = open_generator(str(run))
    for how in (
        HOW,
        Causal(2, 2, Policy(4, 2)),
        Causal(2, 2, Policy(4, 2, relative=True)),
        Causal(2, 2, Policy(4, relative=True)),
    ):
        require_sampled_alike(replace(source, causal=how), "fastvideo", run)
    changed = replace(source, causal=Causal(2, 2, Policy(4, 2, relative=True)))
    monkeypatch.setattr("mogan.exchange.export.open_generator", lambda run: changed)
    exported(run, tmp_path / "student", "fastvideo")
    config = json.loads((tmp_path / "student" / "transformer" / "config.json").read_text())
    assert (config["local_attn_size"], config["sink_size"], config["rope_cache_policy"]) == (4, 2, "relativistic")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--to", "self-forcing", "--out", "x.safetensors"], "end --out in .pt"),
        (["--to", "fastvideo", "--out", "x.pt"], "give --out no suffix"),
        (["--to", "comfyui", "--out", "x"], "end --out in .safetensors"),
        (["--to", "comfyui", "--out", "x.safetensors", "--rank", "4"], "rank of a LoRA file"),
        (["--to", "fastvideo", "--out", "x", "--fake-score"], "--fake-score goes into a folder of diffusers"),
    ],
)
def test_names_and_options_that_do_not_go_together_are_refused(more, why, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *more]) == 2
    assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
