"""A VACE made of a text-to-video model: the same clips until it is trained; and what was fine-tuned, exported as a teacher."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline, WanVACEPipeline
from torch import nn

import tiny_recipes
from conftest import CAPTIONS
from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.models import wan
from mogan.models.conditions import conditioned
from mogan.models.denoiser import Denoiser
from mogan.runs.generator import open_generator
from mogan.training.assemble import assemble
from mogan.training.load import find_models
from mogan.training.loop import run_training
from test_vace_runs import fill

SIZE = {"fps": 16, "height": 32, "width": 32, "frames": 13}


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "vace"
    assert run("vace", family / "teacher", "--out", out) == 0
    return out


def velocity(model, control=None):
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 4, 4, 4, generator=draw), torch.randn(2, 3, 64, generator=draw)
    with torch.no_grad():
        return Denoiser(model).velocity(x, torch.tensor([0.9, 0.4]), conditioned(text, control))


def test_it_answers_as_the_model_does_whatever_it_is_shown(made, family):
    before, after = (wan.load_transformer(folder) for folder in (family / "teacher", made))
    assert after.config.vace_layers == [0, 2]
    same = velocity(before)
    for shown in (torch.zeros(2, 72, 4, 4, 4), torch.randn(2, 72, 4, 4, 4)):
        assert torch.equal(velocity(after, shown), same)
    for block, layer in zip(after.vace_blocks, after.config.vace_layers, strict=True):
        own = before.blocks[layer].state_dict()
        assert all(torch.equal(own[k], v) for k, v in block.state_dict().items() if not k.startswith("proj_"))
    with torch.no_grad():  # negative control: the projections are what hides it
        nn.init.normal_(after.vace_blocks[0].proj_out.weight)
    assert (velocity(after, torch.randn(2, 72, 4, 4, 4)) - same).abs().max() > 1e-3


def test_the_stock_pipeline_opens_it_and_makes_the_clips_of_the_model(made, family, tmp_path):
    size = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 3, "guidance_scale": 1.0}
    clips = []
    for kind, folder in ((WanPipeline, family / "teacher"), (WanVACEPipeline, made)):
        pipe = kind.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if kind is WanVACEPipeline:  # it reckons this from the autoencoder as if that were Wan 2.1's
            pipe.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial
        draw = torch.Generator().manual_seed(0)
        clips.append(pipe(CAPTIONS[0], **size, generator=draw, output_type="latent").frames)
    torch.testing.assert_close(clips[1], clips[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("student", "a student of a few steps"),
        ("causal", "a student of a few steps"),
        ("sparse", "a plain text-to-video model"),
    ],
)
def test_what_is_no_plain_teacher_gets_no_control_blocks(name, said, family, tmp_path, capsys):
    assert run("vace", family / name, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_of_two_experts_or_a_vace_none_is_made(two, vace, made, tmp_path, capsys):
    assert run("vace", two, "--out", tmp_path / "out") == 2
    assert "a plain text-to-video model" in capsys.readouterr().err
    assert run("vace", vace, "--out", tmp_path / "out") == 2
    assert "is a VACE, which reads control videos, and control blocks are added" in capsys.readouterr().err
    assert run("vace", vace, "--out", made) == 2
    assert "exists already" in capsys.readouterr().err


def trained(config, model, cache, out):
    out.mkdir(exist_ok=True)
    parts = assemble(config, open_cache(cache), model=str(model), run=out, device="cpu")
    (out / "config.json").write_text(json.dumps(config.as_json()))
    (out / "run.json").write_text(json.dumps({"model": str(model), "student": str(model), "data": str(cache)}))
    run_training(parts, out)


def test_it_learns_to_look_and_what_was_fine_tuned_is_a_teacher_again(made, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    cache = fill(tmp_path / "cache", made, size=SIZE)
    trained(tiny_recipes.vace(), made, cache, tmp_path / "run")
    assert run("export", tmp_path / "run", "--out", tmp_path / "teacher", "--to", "teacher") == 0
    assert wan.defaults(tmp_path / "teacher") == wan.defaults(made)
    assert find_models(tiny_recipes.dmd(), str(tmp_path / "teacher"), None)[0] == tmp_path / "teacher"
    transformer = WanVACEPipeline.from_pretrained(tmp_path / "teacher").transformer
    one, two = (velocity(transformer, torch.randn(2, 72, 4, 4, 4)) for _ in range(2))
    assert not torch.equal(one, two)
    card = (tmp_path / "teacher" / "README.md").read_text()
    assert "in many guided steps" in card
    assert "guidance_scale=5" in card
    assert "pipe.vae_scale_factor_spatial = " in card
    config = replace(tiny_recipes.dmd(), iterations=1)
    trained(config, tmp_path / "teacher", cache, tmp_path / "few")
    capsys.readouterr()
    assert run("export", tmp_path / "few", "--out", tmp_path / "not", "--to", "teacher") == 2
    assert "a teacher comes of fine-tuning by flow matching alone: leave out --to teacher" in capsys.readouterr().err
    assert run("export", tmp_path / "run", "--out", tmp_path / "not", "--to", "teacher", "--fake-score") == 2
    assert "leave out --fake-score" in capsys.readouterr().err
    assert run("export", tmp_path / "run", "--out", tmp_path / "usual") == 0  # without --to it is one, too
    assert wan.defaults(tmp_path / "usual") == wan.defaults(made)
    assert run("export", tmp_path / "few", "--out", tmp_path / "student") == 0  # negative control: a student is none
    assert wan.defaults(tmp_path / "student").sigmas == config.sigmas
    assert open_generator(str(tmp_path / "run")).fine_tuned
    assert not open_generator(str(tmp_path / "few")).fine_tuned
