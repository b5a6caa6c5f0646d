"""Runs of a VACE: controls from the cache to rollout, teacher and student, checkpoints, clips and a stock export."""

import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanVACEPipeline

import tiny_recipes
from conftest import CAPTIONS, SIGMAS, SIZE
from mogan.cli import main
from mogan.config import EULER, LCM
from mogan.data.batches import draw_batch
from mogan.data.cache import ensure_text, open_cache, save_control, save_latent
from mogan.data.video import read_frames, read_video, write_video
from mogan.errors import UserError
from mogan.estimate.random_wan import random_wan
from mogan.exchange.export import export, save_student
from mogan.models import wan
from mogan.models.autoencoder import encode_video
from mogan.models.conditions import Conditioned, encode_control, nothing_shown, pictures_of_references
from mogan.runs.checkpoint import latest_checkpoint
from mogan.runs.generator import open_generator
from mogan.runs.identity import of_cache
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, split, step
from pretended import a_pretended_gpu
from test_distributed import assert_same_trajectory, train_alone, train_together
from test_scale import CLIP, NARROW, videos

SHAPE = SIZE["frames"], SIZE["height"], SIZE["width"]


def fill(folder, vace, clips=6, references=1, controls=True, size=SIZE):
    """A cache of random clips with random controls, as ``mogan prepare --controls`` writes it."""
    shape = size["frames"], size["height"], size["width"]
    vae, draws = wan.load_vae(vace, torch.float32), torch.Generator().manual_seed(1)
    entries = []
    for number in range(clips):
        video, shown = (torch.rand(1, 3, *shape, generator=draws) * 2 - 1 for _ in range(2))
        mask = (torch.rand(1, 1, *shape, generator=draws) > 0.5).float()
        pictures = pictures_of_references(
            [np.full((9, 9, 3), 40 * number + i, np.uint8) for i in range(references)], *shape[1:]
        )
        with torch.no_grad():
            save_latent(folder, f"clip{number}", encode_video(vae, video)[0], {})
        if controls:
            save_control(folder, f"clip{number}", encode_control(vae, shown, mask, pictures[None])[0], 64, "a mark")
        entries.append(
            {"id": f"clip{number}", "caption": CAPTIONS[number % 4], "motion": 2.0, "control": f"of {number}"}
        )
    facts = {"format": "mogan-cache", "version": 1, "contents": "clips", "vae": wan.fingerprint(vace, "vae"), **size}
    facts |= {"controls": "files", "references": references} if controls else {}
    (folder / "cache.json").write_text(json.dumps(facts))
    (folder / "index.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    ensure_text(folder, ["", *CAPTIONS], wan.load_text(vace))
    return folder


@pytest.fixture(scope="module")
def shown(vace, tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shown"), vace)


def built(config, vace, cache, run=None, **more):
    return assemble(config, open_cache(cache), model=str(vace), run=run, device="cpu", **more)


def trained(config, vace, cache, run):
    run.mkdir(exist_ok=True)
    parts = built(config, vace, cache, run)
    (run / "config.json").write_text(json.dumps(config.as_json()))
    (run / "run.json").write_text(json.dumps({"model": str(vace), "student": str(vace), "data": str(cache)}))
    run_training(parts, run)
    return parts


# ---------------------------------------------------------------------------------------------- data


def test_a_control_comes_with_the_caption_and_references_stand_before_the_clip(shown, vace, tmp_path):
    cache, other = open_cache(shown), open_cache(fill(tmp_path / "other", vace, clips=3))
    draw_of = {"seed": 3, "iteration": 2, "update": 0, "size": 3, "want": ("latent",), "controls": True}
    batch = draw_batch(cache, **draw_of)
    for i, clip in enumerate(batch.ids):
        assert torch.equal(batch.control_BKFHW[i], cache.control(clip))
        assert torch.equal(batch.latent_BCFHW[i, :, 1:], cache.latent(clip))
        assert torch.equal(batch.latent_BCFHW[i, :, :1], cache.control(clip)[:4, :1])
    batch = draw_batch(cache, prompts=other, **draw_of)
    by_caption = {e["caption"]: e["id"] for e in other.entries}
    for i, caption in enumerate(batch.prompts):
        assert torch.equal(batch.control_BKFHW[i], other.control(by_caption[caption]))
        assert torch.equal(batch.latent_BCFHW[i, :, :1], cache.control(batch.ids[i])[:4, :1])
    told = split(batch, 3)[1].told("cpu")
    assert isinstance(told, Conditioned)
    assert torch.equal(told.control_BKFHW[0], batch.control_BKFHW[1])
    assert draw_batch(cache, **draw_of | {"controls": False}).control_BKFHW is None


def test_a_run_is_of_its_controls(shown, vace, tmp_path):
    cache = open_cache(fill(tmp_path / "same", vace))
    assert of_cache(cache) == of_cache(open_cache(shown))
    cache.entries[0]["control"] = "another"
    assert of_cache(cache) != of_cache(open_cache(shown))


# ---------------------------------------------------------------------------------------------- training

RECIPES = {"flow_matching": tiny_recipes.flow_matching, "dmd": tiny_recipes.dmd, "vdot": tiny_recipes.vdot}


@pytest.mark.parametrize("name", RECIPES)
def test_everybody_is_told_the_control_of_the_clip_and_the_student_learns_to_read_it(name, shown, vace):
    config = RECIPES[name]()
    parts, seen = built(config, vace, shown), []
    networks = {"student": parts.student.transformer}
    if name != "flow_matching":
        judge = parts.objectives["dmd"].judge
        networks |= {"teacher": judge.teacher.transformer, "fake_score": judge.fake_score.transformer}
    for who, network in networks.items():
        network.register_forward_pre_hook(
            lambda module, args, given, who=who: seen.append((who, given["control_hidden_states"], args[0].shape)),
            with_kwargs=True,
        )
    before = {k: v.clone() for k, v in parts.student.state_dict().items()}
    for number, update in enumerate(config.plan):
        where = Position(0, update.start, number, 0)
        wanted = draw(parts, where).control_BKFHW
        seen.clear()
        assert np.isfinite(step(parts, where)["loss"])
        assert seen
        for who, control, shape in seen:
            if len(control) == 2 * len(wanted):  # guidance: with the prompt and without, under one control
                assert who == "teacher"
                assert torch.equal(*control.chunk(2))
            assert torch.equal(control[: len(wanted)], wanted)
            assert shape[2] == 4 + 1
    moved = {k.split(".")[1] for k, v in parts.student.state_dict().items() if not torch.equal(v, before[k])}
    assert {"vace_blocks", "vace_patch_embedding", "blocks"} <= moved


def test_another_control_is_another_loss(shown, vace):
    parts = built(tiny_recipes.flow_matching(), vace, shown)
    where = Position(0, 0, 0, 0)
    batch = draw(parts, where)
    losses = []
    for control in (batch.control_BKFHW, batch.control_BKFHW, batch.control_BKFHW.flip(0)):
        parts = built(tiny_recipes.flow_matching(), vace, shown)
        losses.append(step(parts, where, replace(batch, control_BKFHW=control))["loss"])
    assert losses[0] == losses[1] != losses[2]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("dmd", 3),
        ("vace", None),
        pytest.param("dmd", None, marks=SLOW),
        pytest.param("vdot", None, marks=SLOW),
        pytest.param("vdot", 3, marks=SLOW),
        pytest.param("phased", None, marks=SLOW),
        pytest.param("phased", 3, marks=SLOW),
    ],
)
def test_a_run_goes_on_bit_for_bit(name, lora, shown, vace, tmp_path):
    config = replace(getattr(tiny_recipes, name)(), iterations=2, lora=lora)
    whole = trained(config, vace, shown, tmp_path / "whole")
    trained(replace(config, iterations=1), vace, shown, tmp_path / "parts")
    resumed = trained(config, vace, shown, tmp_path / "parts")
    assert latest_checkpoint(tmp_path / "parts").name == "000002"
    assert all(torch.equal(v, resumed.state()[k]) for k, v in whole.state().items())
    if lora:
        assert any("vace_blocks" in k for k in whole.state())


def test_checkpointing_changes_nothing(shown, vace):
    losses = []
    for checkpointing in (False, True):
        parts = built(replace(tiny_recipes.vdot(), checkpointing=checkpointing), vace, shown)
        losses.append([step(parts, Position(0, u.start, n, 0)) for n, u in enumerate(parts.config.plan)])
    for one, two in zip(*losses, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["flow_matching", pytest.param("vdot", marks=SLOW)])
def test_controls_lie_where_the_networks_are(name, shown, vace, tmp_path):
    config = replace(RECIPES[name](), iterations=2, sample_prompts=1, sample_every=2)
    with a_pretended_gpu() as places:
        run_training(assemble(config, open_cache(shown), model=str(vace), run=tmp_path, device="cuda"), tmp_path)
        assert all("dropout" in name or "attention" in name for name in places.undetermined), places.undetermined
        vae = wan.load_vae(vace, torch.float32).to("cuda")
        video, mask = (t.to("cuda") for t in nothing_shown(*SHAPE))
        assert encode_control(vae, video, mask, torch.zeros(1, 2, 3, *SHAPE[1:]).to("cuda")).device.type == "cuda"


@pytest.mark.slow
def test_two_processes_follow_the_run_of_one(shown, vace, tmp_path, monkeypatch):
    monkeypatch.setenv("MOGAN_TEST_RAFT", "not looked at")
    config = replace(tiny_recipes.dmd(), iterations=2)
    before = train_alone(config, vace.parent, shown, tmp_path / "one")
    train_together(2, "dmd", vace.parent, shown, tmp_path / "two", "--iterations", "2")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_vace_1_3b_goes_through_every_command_at_its_own_shape_in_little(tmp_path):
    """Narrow, two of its layers, VDOT's full-size recipe: prepared, trained, gone on with, sampled, exported, opened by stock."""
    model, cache, run, out = (tmp_path / name for name in ("model", "cache", "run", "export"))
    random_wan(model, "wan2.1-vace-1.3b", layers=3, text_layers=1, clip=CLIP, changes=NARROW)
    clips = videos(tmp_path / "videos")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        PIL.Image.fromarray(np.full((40, 60, 3), 90 * number, np.uint8)).save(pictures / f"{number}.png")
    command = ["prepare", clips, "--model", model, "--out", cache, "--controls", "flow", "--flow", "farneback"]
    assert main([str(a) for a in [*command, "--references", pictures]]) == 0
    assert open_cache(cache).control(open_cache(cache).entries[0]["id"]).shape == (96, 4, 8, 8)
    train = ["train", "tiny_recipes:vdot_wan", "--model", str(model), "--data", str(cache), "--out", str(run)]
    assert main([*train, "--iterations", "1"]) == 0
    assert main([*train, "--iterations", "2"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["iteration"] for line in lines} == {0, 1}
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a square moving right, number 1, 向右\n")
    how = ["sample", "--model", run, "--prompts", prompts, "--out", tmp_path / "clips", "--controls", cache]
    assert main([str(a) for a in how]) == 0
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 1
    assert main(["export", str(run), "--out", str(out)]) == 0
    pipeline = WanVACEPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    frames = [f.image_HWC for f in read_frames(clips / "1.mp4", fps=16, only=range(9))]
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3}
    video = pipeline(
        "a square", video=[PIL.Image.fromarray(f) for f in frames], **size, guidance_scale=1.0, output_type="np"
    ).frames[0]
    assert video.shape == (9, 64, 64, 3)
    assert np.isfinite(video).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_recipes.sft_i2v, "is given its first frame by its level, and .* is a VACE"),
        (tiny_recipes.tdm, "is told where its steps end, and .* is a VACE"),
        (tiny_recipes.msm, "dmd asks networks under text alone"),
        (tiny_recipes.motion_score, "motion_score asks networks under text alone"),
    ],
)
def test_who_cannot_pass_controls_on_is_refused(config, message, shown, vace):
    with pytest.raises(UserError, match=message):
        built(config(), vace, shown)


def test_caches_and_models_that_do_not_go_with_controls_are_refused(shown, vace, family, tmp_path):
    bare = fill(tmp_path / "bare", vace, clips=2, controls=False)
    with pytest.raises(UserError, match="has no controls of its clips: prepare them with `mogan prepare --controls`"):
        built(tiny_recipes.dmd(), vace, bare)
    two = fill(tmp_path / "two", vace, clips=2, references=2)
    with pytest.raises(UserError, match=r"have 1 reference pictures and those of .* 2"):
        built(tiny_recipes.dmd(), vace, shown, prompts=open_cache(two))
    with pytest.raises(UserError, match="are told different things beside text"):
        built(tiny_recipes.dmd(), vace, shown, student=str(family / "teacher"))


# ---------------------------------------------------------------------------------------------- sampling and export


@pytest.fixture(scope="module")
def prepared(vace, tmp_path_factory):
    """Videos with captions, controls, masks and pictures; the cache that ``mogan prepare`` makes of them."""
    folder = tmp_path_factory.mktemp("prepared")
    draws = np.random.default_rng(0)
    for number in range(2):
        for name, suffix in (("videos", ""), ("shown", ""), ("shown", ".mask")):
            frames = draws.integers(0, 256, (1, *SHAPE[1:], 3), np.uint8).repeat(13, 0)
            if suffix:
                frames[:] = 0
                frames[:, 8:24, 8 * number :] = 255
            write_video(folder / name / f"{number}{suffix}.mp4", frames, 16, crf=0)
        (folder / "videos" / f"{number}.txt").write_text(CAPTIONS[number])
        (folder / "pictures").mkdir(exist_ok=True)
        PIL.Image.fromarray(draws.integers(0, 256, (32, 48, 3), np.uint8)).save(folder / "pictures" / f"{number}.png")
    command = ["prepare", folder / "videos", "--model", vace, "--out", folder / "cache", "--flow", "farneback"]
    command += ["--controls", folder / "shown", "--references", folder / "pictures", "--device", "cpu"]
    assert main([str(a) for a in command]) == 0
    return folder


def stock_latents(folder, prepared, steps, seed, number=0, solver=LCM):
    """Of the stock pipeline, under one clip's control and reference."""
    pipe = WanVACEPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def pictures(name):
        frames = [f.image_HWC for f in read_frames(prepared / "shown" / name, fps=16, size=SHAPE[1:])]
        return [
            PIL.Image.fromarray(np.where(f > 127, 255, 0).astype(np.uint8) if "mask" in name else f) for f in frames
        ]

    torch.manual_seed(seed)
    draw = {"generator": torch.Generator().manual_seed(seed)} if solver == EULER else {}
    return pipe(
        **draw,
        prompt=CAPTIONS[number],
        video=pictures(f"{number}.mp4"),
        mask=pictures(f"{number}.mask.mp4"),
        reference_images=[PIL.Image.open(prepared / "pictures" / f"{number}.png")],
        height=SHAPE[1],
        width=SHAPE[2],
        num_frames=SHAPE[0],
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
    ).frames[:, :, 1:]  # decoded without the reference


def sampled(folder, monkeypatch, *arguments):
    """What ``mogan sample`` decodes, clip by clip."""
    found = []
    real = __import__("mogan.sampling.sample", fromlist=["clips_of"])

    def clips_of(vae, latents):
        found.append(latents)
        return decode(vae, latents)

    decode = real.clips_of
    monkeypatch.setattr(real, "clips_of", clips_of)
    assert (
        main([str(a) for a in ["sample", *arguments, "--model", folder, "--precision", "fp32", "--device", "cpu"]]) == 0
    )
    return torch.cat(found)


@pytest.mark.parametrize(
    "recipe",
    [tiny_recipes.dmd, tiny_recipes.phased, pytest.param(tiny_recipes.vdot, marks=SLOW)],
    ids=["dmd", "phased", "vdot"],
)
def test_the_stock_pipeline_samples_the_export_under_a_control_as_we_do(recipe, prepared, vace, tmp_path, monkeypatch):
    config = recipe()
    trained(config, vace, prepared / "cache", tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "WanVACEPipeline"
    assert "WanVACEPipeline.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    how = ["--prompts", tmp_path / "prompts.txt", "--controls", prepared / "cache", "--first-seed", 3]
    stock = stock_latents(tmp_path / "out", prepared, len(config.sigmas), 3, solver=config.solver)
    assert stock.shape == (1, 4, 4, 4, 6)
    for name in ("run", "out"):
        ours = sampled(tmp_path / name, monkeypatch, *how, "--out", tmp_path / f"clips of {name}")
        torch.testing.assert_close(ours, stock, atol=1e-3, rtol=0)
    record = json.loads((tmp_path / "clips of out" / "samples.jsonl").read_text().splitlines()[0])
    assert record["controls"] == str(prepared / "cache")
    assert read_video(tmp_path / "clips of out" / record["file"])[0].shape == (*SHAPE, 3)
    # negative control: under the other clip's control it is another clip
    other = stock_latents(tmp_path / "out", prepared, len(config.sigmas), 3, number=1, solver=config.solver)
    assert (other - stock).abs().max() > 0.05


def test_without_controls_a_vace_makes_clips_from_text_as_the_stock_pipeline_does(vace, tmp_path, monkeypatch):
    save_student(wan.load_transformer(vace), vace, tmp_path / "out", SIGMAS, torch.float32, card="a test")
    pipe = WanVACEPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    size = {"height": SHAPE[1], "width": SHAPE[2], "num_frames": SHAPE[0]}
    stock = pipe(CAPTIONS[0], **size, num_inference_steps=3, guidance_scale=1.0, output_type="latent").frames
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    how = ["--prompts", tmp_path / "prompts.txt", "--first-seed", 5, "--out", tmp_path / "clips"]
    torch.testing.assert_close(sampled(tmp_path / "out", monkeypatch, *how), stock, atol=1e-3, rtol=0)


def test_a_teacher_samples_under_controls_in_one_batch_as_one_by_one(prepared, vace, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:2]))
    how = ["--prompts", tmp_path / "prompts.txt", "--controls", prepared / "cache", "--steps", 3, "--guidance", 2]
    how += ["--negative-prompt", ""]
    together = sampled(vace, monkeypatch, *how, "--out", tmp_path / "together")
    alone = sampled(vace, monkeypatch, *how, "--out", tmp_path / "alone", "--batch", 1)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_sampling_refuses_what_does_not_go_with_controls(prepared, shown, vace, family, cache, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a green cross at rest\n")

    def refused(model, *more):
        arguments = [
            "sample",
            "--prompts",
            tmp_path / "prompts.txt",
            "--model",
            model,
            "--out",
            tmp_path / "out",
            *more,
        ]
        assert main([str(a) for a in arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "reads no controls" in refused(family / "student", "--controls", shown)
    assert "has no clip with the caption 'a green cross at rest'" in refused(vace, "--controls", prepared / "cache")
    assert "have no controls" in refused(vace, "--controls", cache)
    assert "give --controls in place of --motion" in refused(vace, "--motion", tmp_path)


def test_a_vace_is_exported_as_no_lora_file(shown, vace, tmp_path):
    trained(replace(tiny_recipes.dmd(), iterations=1, lora=2), vace, shown, tmp_path / "run")
    with pytest.raises(UserError, match="trained a VACE, of which no LoRA file is written here: leave out --to lora"):
        export(tmp_path / "run", out=tmp_path / "a.safetensors", to="lora")
    export(tmp_path / "run", out=tmp_path / "out")
    merged = open_generator(str(tmp_path / "run")).load().transformer.state_dict()
    stock = WanVACEPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    assert all(torch.equal(stock[k], v) for k, v in merged.items())


def test_sheets_show_the_first_clips_under_their_controls(shown, vace, tmp_path):
    config = replace(tiny_recipes.dmd(), iterations=1, sample_prompts=2, sample_every=1)
    trained(config, vace, shown, tmp_path / "run")
    assert read_video(tmp_path / "run" / "samples" / "000001" / "0.mp4")[0].shape == (*SHAPE, 3)
