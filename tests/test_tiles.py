"""A model made frame-sparse: its mask lies beside the weights, and every command computes with it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline

import tiny_recipes
from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.frame_sparse import FILE, FrameSparse, Mask, mask_of, read_mask, set_mask, write_mask
from mogan.runs.generator import open_generator
from mogan.runs.identity import of_student
from mogan.training.assemble import assemble
from mogan.training.loop import run_training

BLOCKS, FRAMES = 4, 4


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moving left\n")
    return path


def run(*words):
    return main([str(word) for word in words])


def call(transformer):
    x = torch.randn(1, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return transformer(x, torch.tensor([400.0]), torch.zeros(1, 3, 64), return_dict=False)[0]


@pytest.fixture
def measured(family, prompts, tmp_path):
    words = ["--model", family / "student", "--levels", "0.9", "0.4", "--thresholds", "0.1"]
    assert run("attention", "--prompts", prompts, "--out", tmp_path / "measured", *words) == 0
    return tmp_path / "measured"


def test_what_the_search_found_lies_beside_the_weights(measured, family, tmp_path, capsys):
    facts = json.loads((measured / "attention.json").read_text())
    errors = torch.tensor([facts["sparse"][level]["errors"] for level in ("0.9", "0.4")]).amax(0)
    threshold = float(errors[:, 0].sort().values[1:3].mean())  # two blocks bear one reference
    assert run("tiles", measured, "--threshold", threshold, "--out", tmp_path / "made") == 0
    mask = read_mask(tmp_path / "made" / "transformer")
    assert mask.frames == FRAMES
    for block, count in enumerate(mask.references):
        assert errors[block, count - 1] <= threshold
        assert count == 1 or errors[block, count - 2] > threshold
    assert sum(count == 1 for count in mask.references) == 2
    assert mask.chosen["threshold"] == threshold
    assert mask.chosen["model"] == str(family / "student")
    assert f"{mask.kept:.0%} of pairs" in capsys.readouterr().out
    assert "attend densely" in (tmp_path / "made" / "README.md").read_text()
    assert not (family / "student" / "transformer" / FILE).exists()
    assert run("tiles", measured, "--references", "2", "--out", tmp_path / "alike") == 0
    assert read_mask(tmp_path / "alike" / "transformer").references == (2,) * BLOCKS
    assert open_generator(str(tmp_path / "alike")).sigmas == open_generator(str(family / "student")).sigmas


def test_what_makes_no_mask_is_refused(measured, family, tmp_path, capsys):
    path = measured / "attention.json"
    facts = json.loads(path.read_text())
    changed = {
        "measure again": {k: v for k, v in facts.items() if k != "weights"},
        "other weights": facts | {"weights": "0" * 16},
        "says no errors": {k: v for k, v in facts.items() if k != "sparse"},
    }
    level = next(iter(facts["blocks"]))
    for name, wrong in (
        ("frames", "4"),
        ("frames", 10**400),
        ("model", None),
        ("blocks", []),
        ("blocks", {"x": []}),
        ("sparse", {level: {"errors": [[0.1]]}}),
        ("sparse", {level: {"errors": [[]]}}),
        ("sparse", True),
    ):
        path.write_text(json.dumps(facts | {name: wrong}))
        assert run("tiles", measured, "--threshold", "0.1", "--out", tmp_path / "made") == 2, (name, wrong)
        assert str(path) in capsys.readouterr().err
    for said, other in changed.items():
        path.write_text(json.dumps(other))
        assert run("tiles", measured, "--threshold", "0.1", "--out", tmp_path / "made") == 2
        assert said in capsys.readouterr().err
    path.write_text(json.dumps(facts))
    for words, said in (([], "give --threshold"), (["--references", "5"], "at most the 4 latent frames")):
        assert run("tiles", measured, *words, "--out", tmp_path / "made") == 2
        assert said in capsys.readouterr().err
    assert run("tiles", tmp_path, "--threshold", "0.1", "--out", tmp_path / "made") == 2
    assert "no attention.json" in capsys.readouterr().err


def test_a_sparse_folder_is_sampled_sparse_and_opens_dense_elsewhere(sparse, family, prompts, tmp_path):
    for name, steps in (("student", []), ("teacher", ["--steps", "2"])):
        source = open_generator(str(sparse / name))
        network, dense = source.load().transformer.eval(), open_generator(str(family / name)).load().transformer.eval()
        meant = call(set_mask(open_generator(str(family / name)).load().transformer.eval(), source.mask))
        assert torch.equal(call(network), meant)
        assert not torch.equal(meant, call(dense))
        assert source.mark() != open_generator(str(family / name)).mark()
        words = ["--prompts", prompts, "--model", sparse / name, *steps]
        assert run("sample", *words, "--out", tmp_path / name) == 0
        assert len(list((tmp_path / name).glob("*.mp4"))) == 1
        stock = WanPipeline.from_pretrained(sparse / name).transformer
        x = torch.randn(1, 4, FRAMES, 4, 4)
        with torch.no_grad():
            found = [t(x, torch.tensor([9.0]), torch.zeros(1, 512, 64), return_dict=False)[0] for t in (stock, dense)]
        torch.testing.assert_close(*found)


def test_masks_that_do_not_fit_are_told_in_a_sentence(sparse, tmp_path, prompts, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(sparse / "teacher", folder)
    for mask, said in ((Mask(FRAMES, (1,) * 5), "for 5 blocks"), (Mask(6, (1,) * BLOCKS), "for clips of 6 latent")):
        write_mask(folder / "transformer", mask)
        assert run("sample", "--prompts", prompts, "--model", folder, "--out", tmp_path / "out", "--steps", "1") == 2
        assert said in capsys.readouterr().err
    (folder / "transformer" / FILE).write_text('{"frames": 4}')
    assert run("sample", "--prompts", prompts, "--model", folder, "--out", tmp_path / "out") == 2
    assert "how many frames and references" in capsys.readouterr().err
    words = ["--prompts", prompts, "--model", sparse / "teacher", "--thresholds", "0.1", "--out", tmp_path / "out"]
    assert run("attention", *words) == 2
    assert "frame-sparse already" in capsys.readouterr().err


def is_sparse(transformer):
    return any(isinstance(block.attn1.processor, FrameSparse) for block in transformer.blocks)


@pytest.mark.parametrize("lora", [None, 3])
def test_a_sparse_student_learns_beside_a_dense_teacher_and_is_exported_so(
    lora, sparse, family, cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    config = replace(tiny_recipes.mogan(), lora=lora, iterations=1)
    start, teacher, made = str(sparse / "student"), str(family / "teacher"), tmp_path / "run"
    made.mkdir()
    parts = assemble(config, open_cache(cache), model=teacher, student=start, run=made, device="cpu")
    assert mask_of(parts.student.transformer) == read_mask(sparse / "student" / "transformer")
    dmd = parts.objectives["dmd"].judge
    dense = (dmd.teacher.transformer, dmd.fake_score.transformer, parts.networks["discriminator"].transformer)
    assert is_sparse(parts.student.transformer)
    assert not any(map(is_sparse, dense))
    run_training(parts, made)
    (made / "config.json").write_text(json.dumps(config.as_json()))
    (made / "run.json").write_text(tiny_recipes.places(config, family, cache, start))
    assert is_sparse(open_generator(str(made)).load().transformer)
    assert run("export", made, "--out", tmp_path / "out", *([] if lora else ["--fake-score"])) == 0
    found, own = open_generator(str(tmp_path / "out")), open_generator(str(made)).load().transformer.eval()
    assert found.mask == read_mask(sparse / "student" / "transformer")
    assert torch.equal(call(found.load().transformer.eval()), call(own))
    assert not (tmp_path / "out" / "fake_score" / FILE).exists()
    assert "attend densely" in (tmp_path / "out" / "README.md").read_text()


def test_the_mask_is_part_of_what_a_run_starts_from(sparse, family):
    assert of_student(sparse / "student") != of_student(family / "student")


def test_a_sparse_start_is_refused_where_its_mask_would_be_lost(sparse, family, cache):
    config, data, start = tiny_recipes.self_forcing(), open_cache(cache), str(sparse / "teacher")
    with pytest.raises(UserError, match="which a causal student's chunks cannot keep"):
        assemble(config, data, model=str(family / "teacher"), student=start, run=None, device="cpu")
    assert wan.load_transformer(sparse / "teacher")._forward_pre_hooks == {}  # a teacher is dense
