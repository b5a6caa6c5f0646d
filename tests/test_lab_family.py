"""The family that ships in the package: small, complete, and as good as it is said to be."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from mogan.lab.clips import HELD_OUT_SEED, rendered_clips, to_video
from mogan.models import autoencoder, wan
from mogan.motion.flow import RaftFlow, load_raft
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
