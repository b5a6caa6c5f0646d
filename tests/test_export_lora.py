import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import tiny_recipes
from conftest import SIGMAS
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.exchange.card import licence_of, model_card, model_name
from mogan.exchange.export import export
from mogan.exchange.imports import import_student
from mogan.exchange.layouts import original_module, split_leaf
from mogan.exchange.lora_file import low_rank_difference
from mogan.models import wan
from mogan.models.wan import load_transformer
from mogan.runs.generator import open_generator
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from tiny_recipes import dmd, flow_matching, sft_i2v


def made(config, family, cache, run):
    """A short run with a large learning rate: a student well away from its base."""
    config = replace(
        config, iterations=3, ema=0.5, optimizers={k: replace(o, lr=0.02) for k, o in config.optimizers.items()}
    )
    run.mkdir()
    parts = assemble(config, open_cache(cache), model=str(family / "teacher"), run=run, device="cpu")
    (run / "config.json").write_text(json.dumps(asdict(config)))
    (run / "run.json").write_text(tiny_recipes.places(config, family, cache))
    run_training(parts, run)
    return run


@pytest.fixture(scope="module")
def full(family, cache, tmp_path_factory):
    return made(flow_matching(), family, cache, tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def adapters(family, cache, tmp_path_factory):
    return made(replace(dmd(), lora=3), family, cache, tmp_path_factory.mktemp("adapters") / "run")


def in_diffusers(family, file):
    """Weights of the base after diffusers' own loader has read the file."""
    pipe = WanPipeline.from_pretrained(family / "teacher")
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.transformer.state_dict()


def in_comfyui(family, file):
    """The same by ComfyUI's rule (comfy/lora.py, comfy/weight_adapter/lora.py), transcribed."""
    base = load_transformer(family / "teacher").state_dict()
    model = {}
    for name, tensor in base.items():
        module, leaf = split_leaf(name)
        model["diffusion_model." + ".".join(filter(None, (original_module(module), leaf)))] = (name, tensor.clone())
    key_map = {k.removesuffix(".weight"): k for k in model}
    lora, loaded = load_file(file), set()
    for x, key in key_map.items():
        if f"{x}.lora_B.weight" in lora:
            model[key][1].add_(lora[f"{x}.lora_B.weight"] @ lora[f"{x}.lora_A.weight"])  # no alpha: scale 1
            loaded |= {f"{x}.lora_B.weight", f"{x}.lora_A.weight"}
        if f"{x}.diff_b" in lora:
            model[key.removesuffix(".weight") + ".bias"][1].add_(lora[f"{x}.diff_b"])
            loaded.add(f"{x}.diff_b")
    assert loaded == set(lora), "ComfyUI would warn: lora key not loaded"
    return dict(model.values())


def close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance)


def test_a_run_with_adapters_is_exported_exactly_for_both_programs_and_for_us(adapters, family, tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    export(adapters, out=file, to="lora")
    assert "40 adapters of rank 3, exactly" in capsys.readouterr().out
    expected = open_generator(str(adapters)).load().transformer.state_dict()
    base = load_transformer(family / "teacher").state_dict()
    assert any(not torch.allclose(expected[k], base[k], atol=1e-3) for k in base)
    close(in_diffusers(family, file), expected)
    close(in_comfyui(family, file), expected)
    export(
        adapters, out=tmp_path / "same.safetensors", to="lora", rank=3
    )  # by way of the difference, of that very rank
    assert {n for n in load_file(tmp_path / "same.safetensors") if "lora_" in n} == set(load_file(file))
    close(in_diffusers(family, tmp_path / "same.safetensors"), expected)
    import_student(file, base=str(family / "teacher"), out=tmp_path / "back", sigmas=SIGMAS)
    close(load_transformer(tmp_path / "back").state_dict(), expected)


def test_a_run_with_adapters_is_exported_merged(adapters, tmp_path):
    export(adapters, out=tmp_path / "folder")
    close(
        load_transformer(tmp_path / "folder").state_dict(),
        open_generator(str(adapters)).load().transformer.state_dict(),
    )
    assert "adapters of rank 3" in (tmp_path / "folder" / "README.md").read_text()


def test_a_full_student_is_approximated_better_with_every_rank_and_exactly_at_the_full_one(full, family):
    student, base = open_generator(str(full)).load().transformer, load_transformer(family / "teacher")
    want, start = student.state_dict(), base.state_dict()
    layers = [n for n, m in student.named_modules() if isinstance(m, torch.nn.Linear)]
    last = {name: float("inf") for name in layers}
    for rank in (1, 2, 4, 8, 16, 32, 96):
        tensors, said = low_rank_difference(student, base, rank)
        for name in layers:
            difference = want[f"{name}.weight"] - start[f"{name}.weight"]
            missing = difference - tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            error = (missing.norm() / difference.norm()).item()
            assert error <= last[name] + 1e-6
            last[name] = error
            torch.testing.assert_close(start[f"{name}.bias"] + tensors[f"{name}.diff_b"], want[f"{name}.bias"])
        worst = float(said.split(" at worst")[0].split()[-1])
        assert worst == pytest.approx(max(last.values()), rel=0.06, abs=1e-6)
    assert max(last.values()) < 1e-5
    rest = {k for k in want if k.rsplit(".", 1)[0] not in layers}
    left_out = sum((want[k] - start[k]).square().sum() for k in rest)
    whole = sum((want[k] - start[k]).square().sum() for k in want)
    assert float(said.split()[-1]) == pytest.approx((left_out / whole).sqrt().item(), rel=0.06)


def test_both_programs_read_a_full_students_file_alike(full, family, tmp_path):
    file = tmp_path / "x.safetensors"
    export(full, out=file, to="lora", rank=96)
    read = in_diffusers(family, file)
    close(read, in_comfyui(family, file))
    expected = open_generator(str(full)).load().transformer.state_dict()
    layers = {k.rsplit(".", 1)[0] for k in read if f"{k.rsplit('.', 1)[0]}.bias" in read and "norm" not in k}
    layers.discard("patch_embedding")
    carried = {k for k in read if k.rsplit(".", 1)[0] in layers}
    assert len(carried) == 2 * (40 + 6)  # the blocks' matrices, time and text embedders, time_proj, proj_out
    close({k: read[k] for k in carried}, {k: expected[k] for k in carried})


def test_the_header_and_the_card_say_what_the_file_is(adapters, tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    results = tmp_path / "results.json"
    metric = {"smoothness": {"mean": 0.98765, "ci95": [0.98, 0.99], "n": 9}, "odd": {"mean": None, "n": 0}}
    results.write_text(json.dumps({"systems": {"mine": {"metrics": metric}, "base": {"metrics": {}}}}))
    export(adapters, out=file, to="lora", rank=2, dtype="bf16", results=results)
    said = capsys.readouterr().out
    assert "rank 2" in said
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["mogan"])
    assert tuple(about["sigmas"]) == tuple(json.loads((adapters / "config.json").read_text())["sigmas"])
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    card = (tmp_path / "x.md").read_text()
    assert "| smoothness | 0.988 [0.98, 0.99] | - |" in card
    line = re.search(r"pipe.scheduler = (.*)", card)[1]
    scheduler = eval(line, {"FlowMatchLCMScheduler": FlowMatchLCMScheduler, "__builtins__": {}})
    scheduler.set_timesteps(len(about["sigmas"]))
    torch.testing.assert_close(scheduler.sigmas[:-1].tolist(), about["sigmas"], atol=1e-4, rtol=0)
    assert "load_lora_weights" in card
    assert "rank 2" in card
    assert "dmd_lab" in card


@pytest.mark.parametrize("config", [flow_matching(), sft_i2v()], ids=["captions", "first frames"])
def test_a_model_of_many_guided_steps_is_not_called_a_few_step_student(config, family, cache, tmp_path):
    run = made(config, family, cache, tmp_path / "run")
    file = tmp_path / "x.safetensors"
    export(run, out=file, to="lora", rank=2)
    with safe_open(file, "pt") as opened:
        assert "sigmas" not in json.loads(opened.metadata()["mogan"])
    card = (tmp_path / "x.md").read_text()
    assert "# Fine-tuned Wan LoRA" in card
    assert "FlowMatchLCMScheduler" not in card
    assert "in many guided steps" in card
    assert "guidance_scale=1.0" not in card
    export(run, out=tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "# Fine-tuned Wan" in card
    assert "guidance_scale=1.0" not in card
    assert ("mogan sample --model PATH --first-frames CLIPS" in card) == bool(config.given)


def test_a_teachers_card_says_how_it_is_sampled_here(family, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(family / "teacher", base)
    (base / "mogan.json").write_text(json.dumps({"negative_prompt": 'a "still" picture', "shift": 5.0}))
    scheduler = json.loads((base / "scheduler" / "scheduler_config.json").read_text()) | {"flow_shift": 3.0}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    card = model_card("T", base, None, [], ["pipe = 1"])
    assert r'negative = "a \"still\" picture"' in card
    assert "negative_prompt=negative" in card
    assert "from_config(pipe.scheduler.config, flow_shift=5)" in card
    few = model_card("T", base, SIGMAS, [], ["pipe = 1"])
    assert "negative" not in few
    assert "flow_shift" not in few


def test_a_students_mistakes_at_export(full, tmp_path):
    with pytest.raises(UserError, match=r"end --out in .safetensors"):
        export(full, out=tmp_path / "x", to="lora")
    with pytest.raises(UserError, match="give --out no suffix"):
        export(full, out=tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--to lora"):
        export(full, out=tmp_path / "x", rank=4)
    with pytest.raises(UserError, match=r"results.json"):
        export(full, out=tmp_path / "x", results=tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []
    base = load_transformer(wan.resolve_model(json.loads((full / "run.json").read_text())["model"]))
    with pytest.raises(UserError, match="train it first"):
        low_rank_difference(base, base, 2)


def test_the_card_carries_the_name_and_the_licence_of_the_base(family, tmp_path):
    snapshot = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers" / "snapshots" / "0123abc"
    shutil.copytree(family / "teacher", snapshot, symlinks=True)
    assert licence_of(snapshot) is None
    silent = model_card("T", snapshot, SIGMAS, [], ["pipe = 1"])
    assert "does not say" in silent
    assert "license:" not in silent
    (snapshot / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Wan\n")
    card = model_card("T", snapshot, SIGMAS, ["- recipe: `x`, seed 7"], ["pipe = 1"])
    front = card.split("---")[1]
    assert "license: apache-2.0" in front
    assert "base_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in front
    assert "seed 7" in card
    assert model_name(family / "teacher") == "teacher"


@pytest.mark.parametrize("file", ["config.json", "run.json"])
@pytest.mark.parametrize("content", [None, b"{}", b"[]", b"{not", b"\xff"])
def test_a_run_whose_description_is_damaged_is_named(file, content, full, tmp_path):
    run = shutil.copytree(full, tmp_path / "run")
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}"):
        export(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
