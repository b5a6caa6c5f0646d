"""The family that ships in the package: small, complete, and as good as it is said to be."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from mogan.lab.clips import HELD_OUT_SEED, rendered_clips, to_video
from mogan.models import attention, autoencoder, wan
from mogan.models.denoiser import Denoiser
from mogan.motion.flow import RaftFlow, load_raft
from mogan.sampling.samplers import sample_student, sample_teacher, to_frames
from mogan.world.captions import parse_caption
from mogan.world.instruments import read_instruments
from mogan.world.scenes import exact_flow, make_scene

FAMILY = wan.lab_folder()


def test_it_fits_in_25_megabytes():
    assert sum(p.stat().st_size for p in FAMILY.rglob("*") if p.is_file()) <= 25e6


@pytest.mark.parametrize(("name", "steps", "guidance"), [("teacher", 4, 3.0), ("student", 3, 1.0)])
def test_stock_pipeline_opens_and_runs_it(name, steps, guidance):
    pipe = WanPipeline.from_pretrained(FAMILY / name)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "a red circle bouncing",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).frames
    assert frames.shape == (1, 17, 64, 64, 3)
    if name == "student":
        expected = [1000 * s for s in wan.model_facts(FAMILY / "student")["sigmas"]]
        np.testing.assert_allclose(pipe.scheduler.timesteps, expected, atol=2e-3)


@pytest.fixture(scope="module")
def held_out():
    """Rendered clips no training saw, and what the autoencoder makes of them."""
    video = torch.cat([to_video(rendered_clips(12, HELD_OUT_SEED, motion)) for motion in ("all", "rich")])
    vae = wan.load_vae(FAMILY / "teacher")
    with torch.no_grad():
        return video, autoencoder.decode_video(vae, autoencoder.encode_video(vae, video))


def test_autoencoder_keeps_27_decibels_on_held_out_clips(held_out):
    video, decoded = held_out
    error = (decoded - video).square().flatten(1).mean(1)
    assert (10 * torch.log10(4 / error)).mean() >= 27


@pytest.mark.parametrize(("decoded", "bar"), [(False, 0.3), (True, 0.4)])
def test_flow_network_keeps_its_end_point_error_on_moving_pixels(held_out, decoded, bar):
    """The aim is 0.35; docs/lab.md says what is reached and why."""
    video = held_out[int(decoded)]
    scenes = [make_scene(HELD_OUT_SEED, i, motion=m) for m in ("all", "rich") for i in range(12)]
    with torch.no_grad():
        found = RaftFlow(load_raft(FAMILY / "raft"), iterations=4)(video).transpose(1, 2).numpy()
    errors = []
    for scene, flow in zip(scenes, found, strict=True):
        truth, visible = exact_flow(scene)
        moving = (np.linalg.norm(truth, axis=1) > 0.1) & visible
        errors.append(np.linalg.norm(flow - truth, axis=1)[moving])
    assert np.concatenate(errors).mean() <= bar


def test_teacher_and_student_share_everything_but_the_transformer():
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in (FAMILY / "teacher" / part).iterdir():
            assert path.read_bytes() == (FAMILY / "student" / part / path.name).read_bytes()


# ---------------------------------------------------------------------------------------------- what its clips show


def shown(name: str) -> dict[str, float]:
    """Means of the instruments over 64 held-out captions: of those that move, and of those at rest behind ``rest_``."""
    folder = FAMILY / name
    usual, facts = wan.defaults(folder), wan.model_facts(folder)
    captions = [make_scene(HELD_OUT_SEED, i).caption for i in range(64)]
    encode, vae = wan.load_text(folder), wan.load_vae(folder)
    denoiser, shape = Denoiser(wan.load_transformer(folder).eval()), wan.latent_shape(folder, usual.size)
    found = []
    for first in range(0, len(captions), 16):
        some, seeds = captions[first : first + 16], list(range(first, first + 16))
        text = attention.stack_text(encode(some))
        if "sigmas" in facts:
            latent = sample_student(denoiser, text, shape, tuple(facts["sigmas"]), seeds)
        else:
            null = attention.stack_text(encode([usual.negative_prompt]))
            told = {"steps": usual.steps, "guidance": usual.guidance, "shift": usual.shift}
            latent = sample_teacher(denoiser, text, null, shape, seeds, **told)
        with torch.no_grad():
            frames = to_frames(autoencoder.decode_video(vae, latent))
        found += [(caption, read_instruments(f, caption)) for f, caption in zip(frames, some, strict=True)]
    moves = [values for caption, values in found if parse_caption(caption).kind != "still"]
    rests = [values for caption, values in found if parse_caption(caption).kind == "still"]
    assert len(moves) > 40
    return {k: float(np.nanmean([v[k] for v in moves])) for k in moves[0]} | {
        f"rest_{k}": float(np.nanmean([v[k] for v in rests])) for k in ("still", "colour")
    }


@pytest.mark.slow
def test_the_teachers_clips_keep_to_their_captions():
    """docs/lab.md has the numbers over more clips; these bars leave room for rounding and for fewer clips."""
    found = shown("teacher")
    bars = {"shape": 0.75, "direction": 0.8, "travels": 0.8, "count": 0.8, "colour": 0.97, "identity": 0.95}
    for name, bar in bars.items():
        assert found[name] >= bar, (name, found)
    assert found["still"] <= 0.15
    assert found["rest_still"] >= 0.95
    assert found["physics"] <= 1.2


@pytest.mark.slow
def test_the_students_clips_keep_form_and_move():
    found = shown("student")
    for name, bar in {
        "shape": 0.72,
        "direction": 0.85,
        "travels": 0.8,
        "colour": 0.96,
        "identity": 0.94,
        "net": 0.35,
    }.items():
        assert found[name] >= bar, (name, found)
    assert found["still"] <= 0.12
