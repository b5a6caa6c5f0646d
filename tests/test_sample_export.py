"""Sampling and export: what leaves the house must be what the house samples."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_recipes
from conftest import CAPTIONS, SIGMAS
from mogan import __version__
from mogan.config import EULER
from mogan.data.cache import open_cache
from mogan.data.video import read_frames, read_video, write_video
from mogan.disk.files import write_atomically
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.exchange.card import model_card
from mogan.exchange.export import export, save_student
from mogan.exchange.schedulers import scheduler_for
from mogan.exchange.usage import FOLDER_USAGE
from mogan.models import attention, autoencoder, wan
from mogan.models.denoiser import Denoiser
from mogan.runs.generator import open_generator
from mogan.sampling.first_frames import sample_from_first_frames
from mogan.sampling.folder import Job, safe_name
from mogan.sampling.sample import sample
from mogan.sampling.samplers import sample_student, sample_teacher
from mogan.schedule import shifted_levels
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from tiny_recipes import mogan


@pytest.mark.parametrize(
    "sigmas",
    [
        (1.0, 0.757, 0.522),
        (1.0, 6 / 7, 0.6),
        (1.0, 0.9091, 0.7143),
        (1.0, 0.5),
        (1.0,),
        shifted_levels(4, 5.0),
        shifted_levels(4, 8.0),
        shifted_levels(4, 1.0),
        shifted_levels(8, 3.0),
    ],
)
def test_stock_scheduler_visits_exactly_these_levels(sigmas, tmp_path):
    scheduler_for(sigmas).save_pretrained(tmp_path)
    stock = FlowMatchLCMScheduler.from_pretrained(tmp_path)
    stock.set_timesteps(len(sigmas))
    np.testing.assert_allclose(stock.sigmas, [*sigmas, 0.0], atol=2e-6)
    np.testing.assert_allclose(stock.timesteps, [1000 * s for s in sigmas], atol=2e-3)


def visited(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler.sigmas[:-1].tolist()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.06, 0.98), st.floats(0.02, 0.98))
def test_every_list_of_three_levels_without_a_tiny_first_step_is_reached(first, b):
    a = 1 - first * (1 - b)
    np.testing.assert_allclose(visited(scheduler_for((1.0, a, b)), 3), [1.0, a, b], atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 8), st.floats(0.2, 15.0), st.floats(0.02, 0.9))
def test_longer_lists_are_reached_if_and_only_if_their_cross_ratios_are_those_of_equal_steps(steps, k, last):
    grid = np.array(shifted_levels(steps, k))
    levels = 1 - (1 - grid) * (1 - last) / (1 - grid[-1])  # stretched to end anywhere: still a Moebius map of the step
    if np.diff(levels).max() > -0.01:
        return
    np.testing.assert_allclose(visited(scheduler_for(tuple(levels)), steps), levels, atol=1e-4)
    bent = levels.copy()
    bent[2] += 0.4 * (bent[1] - bent[2])
    with pytest.raises(UserError, match="no stock scheduler visits"):
        scheduler_for(tuple(bent))


@pytest.mark.parametrize(
    "sigmas",
    [(1.0, 0.9, 0.8, 0.2), (1.0, 0.95, 0.9, 0.1), (1.0, 0.999, 0.5, 0.4), (1.0, 0.98, 0.5), (1.0, 0.9, 0.85, 0.4, 0.1)],
)
def test_levels_no_stock_scheduler_reaches_are_refused(sigmas):
    with pytest.raises(UserError, match="no stock scheduler visits"):
        scheduler_for(sigmas)


PUBLISHED = {
    "CausVid, FastVideo": (1.0, 0.757, 0.522),
    "Self-Forcing": (1.0, 0.9375, 0.83333, 0.625),
    "CausVid causal": (1.0, 0.96, 0.88889, 0.72727),
    "FastVideo dmd2": (1.0, 0.75, 0.5, 0.25),
    "two": (1.0, 0.908),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_stock_pipeline_visits_the_levels_of_published_students(name, family, tmp_path):
    sigmas, out = PUBLISHED[name], tmp_path / "out"
    save_student(
        wan.load_transformer(family / "teacher"), family / "teacher", out, sigmas, torch.float32, card="a test"
    )
    pipe, seen = WanPipeline.from_pretrained(out), []
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"][0].item()), with_kwargs=True
    )
    pipe(
        CAPTIONS[0],
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=len(sigmas),
        guidance_scale=1.0,
        output_type="latent",
    )
    np.testing.assert_allclose(seen, [1000 * s for s in sigmas], atol=0.1)


def test_a_student_of_euler_steps_is_sampled_by_us_as_by_the_stock_pipeline_of_its_export(family, tmp_path):
    sigmas, out = (1.0, 0.9, 0.75, 0.5), tmp_path / "out"
    teacher = wan.load_transformer(family / "teacher")
    save_student(teacher, family / "teacher", out, sigmas, torch.float32, card="a test", solver=EULER)
    pipe = WanPipeline.from_pretrained(out)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 1.0}
    draw = torch.Generator().manual_seed(3)
    stock = pipe(CAPTIONS[0], **size, output_type="latent", generator=draw).frames
    source = open_generator(str(out))
    assert (source.sigmas, source.solver) == (sigmas, EULER)
    text = attention.stack_text(wan.load_text(out)([CAPTIONS[0]]))
    student = source.load().eval()
    torch.testing.assert_close(
        sample_student(student, text, (4, 2, 4, 4), sigmas, [3], EULER), stock, atol=2e-4, rtol=0
    )
    fresh = sample_student(student, text, (4, 2, 4, 4), sigmas, [3])
    assert (fresh - stock).abs().max() > 0.1  # the other rule is another clip


@pytest.mark.parametrize("recipe", [tiny_recipes.redmd, tiny_recipes.vdot], ids=["redmd", "vdot"])
def test_the_stock_pipeline_samples_the_export_of_a_run_as_the_run_does(recipe, family, cache, tmp_path):
    config, run, out = recipe(), tmp_path / "run", tmp_path / "out"
    fast = config.optimizers | {"student": replace(config.optimizers["student"], lr=0.02)}
    config = replace(config, iterations=1, ema=0.0, optimizers=fast)
    run.mkdir()
    begin = tiny_recipes.start(config, family)
    write_atomically(run / "config.json", json.dumps(config.as_json()))
    write_atomically(run / "run.json", tiny_recipes.places(config, family, cache, begin))
    model = str(family / "teacher")
    run_training(assemble(config, open_cache(cache), model=model, student=begin, run=run, device="cpu"), run)
    export(run, out=out)
    pipe = WanPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    size = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": len(config.sigmas)}
    stock = pipe(CAPTIONS[0], **size, guidance_scale=1.0, output_type="latent").frames
    text = attention.stack_text(wan.load_text(out)([CAPTIONS[0]]))
    sources = [open_generator(str(where)) for where in (run, out, family / "teacher")]
    ours, exported, teacher = (sample_student(s.load().eval(), text, (4, 4, 4, 4), config.sigmas, [3]) for s in sources)
    assert torch.equal(ours, exported)
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=0)
    assert (teacher - stock).abs().max() > 0.1  # it has learnt


@pytest.fixture(scope="module")
def exported(family, cache, tmp_path_factory):
    monkey = pytest.MonkeyPatch()
    monkey.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    folder = tmp_path_factory.mktemp("exported")
    config = mogan()
    run = folder / "run"
    run.mkdir()
    parts = assemble(
        config, open_cache(cache), model=str(family / "teacher"), student=str(family / "student"), run=run, device="cpu"
    )
    from dataclasses import asdict

    write_atomically(run / "config.json", json.dumps(asdict(config)))
    write_atomically(run / "run.json", tiny_recipes.places(config, family, cache, str(family / "student")))
    run_training(parts, run)
    export(run, out=folder / "export")
    monkey.undo()
    return folder


@pytest.mark.slow
def test_export_opens_in_stock_diffusers_without_us_and_visits_the_levels(exported):
    code = """
import sys, torch
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained(sys.argv[1])
seen = []
pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k["timestep"][0].item()), with_kwargs=True)
torch.manual_seed(3)
frames = pipe(sys.argv[2], height=32, width=32, num_frames=13, num_inference_steps=3, guidance_scale=1.0, output_type="np").frames[0]
assert "mogan" not in sys.modules
torch.save({"seen": seen, "frames": torch.from_numpy(frames)}, sys.argv[3])
"""
    out = exported / "stock.pt"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(exported / "export"), CAPTIONS[0], str(out)], check=True
    )
    stock = torch.load(out, weights_only=True)
    np.testing.assert_allclose(stock["seen"], [1000 * s for s in SIGMAS], atol=2e-3)

    sampled = exported / "sampled"
    (exported / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    sample(prompts=exported / "prompts.txt", out=sampled, model=str(exported / "export"), first_seed=3)
    student = Denoiser(wan.load_transformer(exported / "export").eval())
    text = attention.stack_text(wan.load_text(exported / "export")([CAPTIONS[0]]))
    latent = sample_student(student, text, (4, 4, 4, 4), SIGMAS, [3])
    video = autoencoder.decode_video(wan.load_vae(exported / "export", torch.float32), latent)
    ours = (video[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(ours, stock["frames"], atol=2e-4)
    frames, fps = read_video(sampled / f"{CAPTIONS[0]}-0.mp4")
    assert fps == 16
    alike, apart = (np.corrcoef(f.ravel(), ours.ravel())[0, 1] for f in (frames, frames[::-1]))
    assert alike > apart + 0.2, (alike, apart)  # H.264 of noise keeps no more


def test_export_does_not_tell_where_its_parts_lay(exported):
    assert json.loads((exported / "export" / "transformer" / "config.json").read_text())["_name_or_path"] == ""


def test_export_says_how_to_use_it(exported):
    card = (exported / "export" / "README.md").read_text()
    assert "num_inference_steps=3, guidance_scale=1.0" in card
    for fact in (
        "- recipe: `",
        "iteration ",
        "- data: 8 clips of 13 frames at 16 fps, 32 x 32",
        f"- made with mogan {__version__}",
    ):
        assert fact in card
    assert str(exported) not in card
    assert "- base: `teacher`; its licence holds" in card  # and not the student's folder that the run started from
    assert json.loads((exported / "export" / "mogan.json").read_text())["sigmas"] == list(SIGMAS)
    with pytest.raises(UserError, match="exists already"):
        export(exported / "run", out=exported / "export")
    with pytest.raises(UserError, match="not a training run"):
        export(exported, out=exported / "x")


def test_the_cards_lines_give_the_same_clip_again_which_a_generator_does_not(family):
    card = model_card("A student", family / "teacher", SIGMAS, [], FOLDER_USAGE)
    lines = re.search(r"```python\n(.+?)```", card, re.DOTALL)[1].replace("PATH", str(family / "student"))
    lines = lines.replace('"a prompt"', '"a prompt", output_type="np"')

    def made(by):
        space = {}
        exec(by, space)
        return space["video"]

    assert np.array_equal(made(lines), made(lines))
    with_generator = lines.replace("torch.manual_seed(0)", "given = torch.Generator().manual_seed(0)").replace(
        '"a prompt", ', '"a prompt", generator=given, '
    )
    assert np.abs(made(with_generator) - made(with_generator)).mean() > 0.01


def test_sampling_resumes_and_a_run_is_a_model(exported, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS[:2]))
    # one by one: in a batch of another size a clip may differ by rounding
    asked = {
        "prompts": tmp_path / "p.txt",
        "out": tmp_path / "s",
        "model": str(exported / "run"),
        "seeds": 2,
        "batch": 1,
    }
    sample(**asked)
    lines = [json.loads(line) for line in (tmp_path / "s" / "samples.jsonl").read_text().splitlines()]
    assert [(r["file"], r["seed"]) for r in lines] == [(f"{p}-{k}.mp4", k) for p in CAPTIONS[:2] for k in range(2)]
    before = {p: p.read_bytes() for p in (tmp_path / "s").glob("*.mp4")}
    removed = sorted(before)[1]
    removed.unlink()
    sample(**asked)
    assert {p: p.read_bytes() for p in (tmp_path / "s").glob("*.mp4")} == before
    sample(**asked)
    assert "all 4 clips are there" in capsys.readouterr().out
    removed.write_bytes(b"")  # what a copy leaves that was stopped
    sample(**asked)
    assert {p: p.read_bytes() for p in (tmp_path / "s").glob("*.mp4")} == before
    with pytest.raises(UserError, match="--solver says nothing without a teacher"):
        sample(**asked, solver="euler")


def test_a_teacher_has_a_mogan_json_without_levels(tmp_path, family):
    (tmp_path / "p.txt").write_text(CAPTIONS[0])
    with pytest.raises(UserError, match="no sigmas in a mogan"):
        sample(prompts=tmp_path / "p.txt", out=tmp_path / "s", model=str(family / "teacher"), mode="student")


def test_first_frames_are_those_of_the_clips_with_the_prompts_as_captions(exported, family, tmp_path, monkeypatch):
    videos, made = tmp_path / "videos", []
    videos.mkdir()
    for number, caption in enumerate(CAPTIONS[:2]):
        write_video(videos / f"{number}.mp4", np.full((13, 32, 32, 3), 60 + 120 * number, np.uint8), 16)
        (videos / f"{number}.txt").write_text(caption)

    def kept(student, vae, clips, *rest, **guided):
        made.append((vae, clips, sample_from_first_frames(student, vae, clips, *rest, **guided)))
        return made[-1][2]

    monkeypatch.setattr("mogan.sampling.sample.sample_from_first_frames", kept)
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS[1::-1]))
    common = {"model": str(exported / "export"), "precision": "fp32"}
    sample(prompts=tmp_path / "p.txt", out=tmp_path / "s", first_frames=videos, **common)
    vae, clips, latents = made.pop()
    assert [c.name for c in clips] == ["1.mp4", "0.mp4"]
    for clip, latent in zip(clips, latents, strict=True):
        frame = next(read_frames(clip, size=(32, 32))).image_HWC  # as models are given pictures
        first = torch.from_numpy(frame[None].copy()).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.no_grad():
            torch.testing.assert_close(latent[None, :, :1], autoencoder.encode_video(vae, first), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"lists .* with first_frames"):
        sample(prompts=tmp_path / "p.txt", out=tmp_path / "s", **common)
    (tmp_path / "q.txt").write_text("a moon\n")
    with pytest.raises(UserError, match="no clip with the caption 'a moon'"):
        sample(prompts=tmp_path / "q.txt", out=tmp_path / "t", first_frames=videos, **common)
    with pytest.raises(UserError, match="model trained with them"):
        sample(prompts=tmp_path / "p.txt", out=tmp_path / "t", first_frames=videos, model=str(family / "teacher"))


def test_teacher_sampling_integrates_a_known_velocity():
    class Known(torch.nn.Module):
        """Velocity of the straight path to the point 0.7: the exact solution is 0.7 from any noise."""

        def forward(self, x, timestep, text, return_dict=False):
            return ((x - 0.7) / (timestep / 1000).view(-1, 1, 1, 1, 1),)

    text = torch.zeros(2, 3, 8)
    for solver in ("unipc", "euler"):
        x = sample_teacher(
            Denoiser(Known()), text, text[:1], (2, 3, 4, 4), [0, 1], steps=10, guidance=1.0, shift=3.0, solver=solver
        )
        torch.testing.assert_close(x, torch.full_like(x, 0.7), atol=5e-3, rtol=0)  # UniPC rounds timesteps


def test_teacher_matches_the_stock_pipeline(family):
    pipe = WanPipeline.from_pretrained(family / "teacher")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    stock = pipe(
        CAPTIONS[0], height=32, width=32, num_frames=13, num_inference_steps=4, guidance_scale=3.0, output_type="latent"
    ).frames
    encode = wan.load_text(family / "teacher")
    teacher = Denoiser(wan.load_transformer(family / "teacher").eval())
    ours = sample_teacher(
        teacher,
        attention.stack_text(encode([CAPTIONS[0]])),
        attention.stack_text(encode([""])),
        (4, 4, 4, 4),
        [5],
        steps=4,
        guidance=3.0,
        shift=3.0,
    )
    torch.testing.assert_close(ours, stock, atol=1e-3, rtol=1e-3)


def test_shards_divide_the_clips():
    jobs = [Job("p", k, k) for k in range(5)]
    assert sorted((j for i in range(3) for j in share_of(jobs, f"{i}/3")), key=lambda j: j.seed) == jobs
    with pytest.raises(UserError, match="i/n"):
        share_of(jobs, "3/3")
    with pytest.raises(UserError, match="--shard takes i/n"):
        share_of(jobs, "0/" + "9" * 5000)  # more digits than Python reads as one number
    assert safe_name("a/b") == "a_b"
    assert len(safe_name("ä" * 500).encode()) <= 240
