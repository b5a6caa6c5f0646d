"""What people get wrong at full scale: one sentence, exit code 2, nothing lost. More of it beside what it belongs to."""

import json
import shutil

import pytest

from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.data.video import write_video
from mogan.disk.files import replacing, writable_folder
from mogan.errors import UserError
from mogan.models.wan import Geometry, fingerprint, latent_shape, load_text, load_transformer, resolve_model
from mogan.training.loop import run_training
from mogan.world.scenes import make_scene, render
from test_train import build
from tiny_recipes import flow_matching


@pytest.fixture
def model(family, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(family / "teacher", tmp_path / "model")


@pytest.fixture
def own_cache(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


def told(arguments, capsys):
    """What a command that must fail says, one sentence with nothing around it."""
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"mogan {arguments[0]}: ")
    return said


def train_on(model, cache, out):
    return ["train", "tiny_recipes:flow_matching", "--model", model, "--data", cache, "--out", out, "--device", "cpu"]


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def cut_short(path):
    """As an interrupted download leaves a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_model_of_another_family_is_refused_before_a_video_is_read(model, cache, tmp_path, capsys):
    shutil.rmtree(
        model / "transformer"
    )  # Stable Diffusion has a unet, and text encoder and tokenizer under Wan's names
    (model / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 4}')
    said = told(["prepare", tmp_path / "no videos", "--model", model, "--out", tmp_path / "c"], capsys)
    assert "holds a AutoencoderKL, not a AutoencoderKLWan: only the Wan family" in said
    assert "only the Wan family" in told(train_on(model, cache, tmp_path / "run"), capsys)
    assert not (tmp_path / "c").exists()


def test_a_part_that_is_not_there_is_named(model, cache, tmp_path, capsys):
    shutil.rmtree(model / "transformer")
    assert "has no transformer/config.json" in told(train_on(model, cache, tmp_path / "run"), capsys)
    shutil.rmtree(model / "vae")
    with pytest.raises(UserError, match="has no vae"):
        fingerprint(model, "vae")


def test_a_size_the_model_cannot_take_is_refused_before_it_is_prepared(model, tmp_path, capsys):
    edit(model / "vae" / "config.json", scale_factor_spatial=16)  # as Wan2.2 TI2V-5B: multiples of 32
    command = ["prepare", tmp_path / "no videos", "--model", model, "--out", tmp_path / "c"]
    assert "multiples of 32" in told([*command, "--height", 48, "--width", 64], capsys)
    assert "multiples of 16, not 40" in told([*command, "--height", 40, "--width", 64], capsys)
    assert "4 k + 1" in told([*command, "--frames", 16], capsys)
    assert latent_shape(model, Geometry(16, 64, 64, 13))[1] == 4


def test_too_few_clips_for_a_batch_say_how_many_there_are(model, own_cache, tmp_path, capsys):
    with replacing(own_cache / "index.jsonl") as file:
        file.write_text((own_cache / "index.jsonl").read_text().splitlines()[0] + "\n")
    said = told(train_on(model, own_cache, tmp_path / "run"), capsys)
    assert "takes 2 clips at a time" in said
    assert "holds 1: make more, or give --batch 1" in said


def test_a_cache_of_another_autoencoder_is_refused(model, own_cache, tmp_path, capsys):
    edit(own_cache / "cache.json", vae="0123456789abcdef")
    said = told(train_on(model, own_cache, tmp_path / "run"), capsys)
    assert "was made with vae 0123456789abcdef, not" in said
    assert "make it again" in said


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_cache_whose_prompts_were_read_by_another_network_is_refused(part, model, own_cache, tmp_path, capsys):
    """Its embeddings have the right shape and mean something else: the run would learn wrong colours."""
    edit(own_cache / "cache.json", **{part: "0123456789abcdef"})
    said = told(train_on(model, own_cache, tmp_path / "run"), capsys)
    assert f"{part} 0123456789abcdef, not" in said
    assert "make it again" in said


@pytest.mark.parametrize(("part", "what"), [("vae", "videos"), ("text_encoder", "prompts.txt")])
def test_a_cache_is_tied_to_nothing_by_weights_that_broke_off(part, what, model, family, tmp_path, capsys):
    (weights,) = (model / part).glob("*.safetensors")
    cut_short(weights)
    (tmp_path / "prompts.txt").write_text("a red circle falling\n")
    (tmp_path / "videos").mkdir()
    scene = make_scene(0, 0, motion="rich", frames=17)
    write_video(tmp_path / "videos" / f"{scene.caption}.mp4", render(scene), 16)
    words = [
        "prepare",
        tmp_path / what,
        "--model",
        model,
        "--out",
        tmp_path / "cache",
        "--caption",
        "a red circle falling",
    ]
    words = [str(word) for word in (words if what == "videos" else words[:-2])]
    assert main(words) == 2
    assert "get it again" in capsys.readouterr().err
    weights.unlink()
    shutil.copy(family / "teacher" / part / weights.name, weights)
    assert main(words) == 0


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_download_that_broke_off_is_named_with_its_part(part, model, cache, tmp_path, capsys):
    (weights,) = (model / part).glob("*.safetensors")
    cut_short(weights)
    if part == "text_encoder":
        with pytest.raises(UserError, match=r"text_encoder cannot be read .*was cut short, get it again"):
            load_text(model)
        return
    own = shutil.copytree(cache, tmp_path / "cache")
    edit(own / "cache.json", vae=fingerprint(model, "vae"))
    said = told(train_on(model, own, tmp_path / "run"), capsys)
    assert f"model/{part} cannot be read" in said
    assert "get it again" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_part_without_its_folder_or_files_is_named_and_no_hub(model):
    for path in (model / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"tokenizer cannot be read") as told:
        load_text(model)
    assert "huggingface" not in str(told.value)
    (model / "tokenizer").rmdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_text(model)


def test_a_shard_that_is_missing_is_named(model):
    transformer = load_transformer(model)
    shutil.rmtree(model / "transformer")
    transformer.save_pretrained(model / "transformer", max_shard_size="20KB")
    shards = sorted((model / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    load_transformer(model)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"transformer cannot be read .*missing or was cut short, get it again"):
        load_transformer(model)


def test_weights_of_a_variant_are_named_with_the_name_that_is_looked_for(model):
    (weights,) = (model / "transformer").glob("*.safetensors")
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(
        UserError, match=r"fp16.safetensors is of a variant.* name it diffusion_pytorch_model\.safetensors"
    ):
        load_transformer(model)


def test_the_folder_that_was_meant_is_named_for_one_near_it(model, tmp_path):
    revision = tmp_path / "models--me--clips" / "snapshots" / "0a1b2c"
    shutil.copytree(model, revision)
    for given in (revision / "model_index.json", revision / "vae", revision.parent, revision.parent.parent):
        with pytest.raises(UserError, match=rf"did you mean {revision}\?"):
            resolve_model(given)
    (weights,) = (model / "transformer").glob("*.safetensors")
    with pytest.raises(UserError, match="make one of this file by `mogan import`"):
        resolve_model(weights)


def test_a_configuration_cut_short_is_named(model):
    cut_short(model / "vae" / "config.json")
    with pytest.raises(UserError, match=r"vae/config\.json is no JSON .*get it again"):
        resolve_model(model)


def test_a_cached_clip_cut_short_is_named_and_the_run_keeps_its_checkpoint(family, own_cache, tmp_path):
    run_training(build(flow_matching(), family, own_cache, tmp_path / "run"), tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for clip in (own_cache / "clips").iterdir():
        cut_short(clip)
    longer = build(flow_matching().with_budget(5), family, own_cache, tmp_path / "run")
    with pytest.raises(UserError, match=r"clip\d\.safetensors cannot be read .*delete it and run .*mogan prepare"):
        run_training(longer, tmp_path / "run")
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == kept
    assert len(open_cache(own_cache)) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "--prompts", "x", "--motion-ratio", "0.9"], "--motion-ratio says nothing without --motion"),
        (["train", "dmd_lab", "--data", "x", "--patience", "3"], "--patience says nothing without --held-out"),
        (["prepare", "a.txt", "--fps", "8"], "--fps is of videos, and a.txt is a list of prompts"),
        (["prepare", "a.jsonl", "--shard", "0/2"], "--shard is of videos"),
        (
            ["train", "dmd_lab", "--data", "x", "--seed", "1" + "0" * 400],
            "--seed takes a number from 0 to 4294967295, not 1",
        ),
        (
            ["sample", "--prompts", "x", "--first-seed", str(2**63)],
            "from 0 to 9223372036854775807, not 9223372036854775808",
        ),
        (["sample", "--prompts", "x", "--guidance", "inf"], "of at least 0, and finite, not inf"),
        (
            ["prepare", "x", "--extra-prompts", "a", ""],
            "x is not there: give a folder of videos, a video, or a file of prompts (.txt",
        ),
    ],
)
def test_what_would_say_nothing_or_what_is_said_of_numbers(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--out", "made"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


def test_a_student_of_a_few_steps_is_no_teacher(family, cache, tmp_path, capsys):
    student, teacher, prompts = str(family / "student"), str(family / "teacher"), tmp_path / "a.txt"
    prompts.write_text("a red circle")
    for words in (
        ["train", "dmd_lab", "--data", str(cache), "--model", student, "--student", teacher],
        ["trajectories", "--prompts", str(prompts), "--model", student],
    ):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        assert "is a student of a few steps, which a teacher is not" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.*")) == [prompts]


def test_a_link_that_leads_nowhere_is_one(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="is a link that leads nowhere"):
        writable_folder(tmp_path / "link")


def test_a_checkpoint_is_no_model_and_its_run_is_named(tmp_path):
    (tmp_path / "run" / "checkpoints" / "000020").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a checkpoint, .*give its run, \S+run$"):
        resolve_model(tmp_path / "run" / "checkpoints" / "000020")
