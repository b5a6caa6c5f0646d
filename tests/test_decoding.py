"""Clips are decoded one after the other, frame by frame: the same frames in a fraction of the memory."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogan.cli import main
from mogan.estimate.check import allocated_peak
from mogan.models import autoencoder, wan
from mogan.models.autoencoder import decode_video, stream_video
from mogan.models.wan import Geometry, load_vae
from mogan.motion.flow import RaftFlow, flow_of_pieces, load_raft
from mogan.motion.pixel_flux import net_motion
from mogan.sampling import samplers
from mogan.sampling.samplers import CLIPS_AT_ONCE, PIXELS_AT_ONCE, clips_at_once, pictures, to_frames
from mogan.training.loop import run_training
from test_held_out import held_out, parts_of  # noqa: F401  # fixtures
from tiny_recipes import mogan


@pytest.fixture(scope="module")
def vae(family):
    return load_vae(family / "teacher", torch.float32)


def latents(vae, clips, frames=4, side=4):
    torch.manual_seed(clips)
    return torch.randn(clips, vae.config.z_dim, frames, side, side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_has_the_frames_of_the_whole_bit_for_bit(vae, family, dtype):
    vae = load_vae(family / "teacher", dtype)
    z = latents(vae, 2)
    pieces = list(stream_video(vae, z))
    with torch.no_grad():
        whole = decode_video(vae, z)
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert not any(piece.requires_grad for piece in stream_video(vae, z.requires_grad_(True)))
    (one, _) = z.split(1)
    assert np.array_equal(to_frames(decode_video(vae, one.detach()))[0], np.stack([*pictures(vae, one)]))


def test_the_flow_of_pieces_is_the_flow_of_the_whole(vae, family):
    flow, z = RaftFlow(load_raft(family / "raft"), 2), latents(vae, 1)
    video = decode_video(vae, z)
    fields = list(flow_of_pieces(stream_video(vae, z), flow))
    assert [field.shape[2] for field in fields] == [4, 4, 4]
    torch.testing.assert_close(torch.cat(fields, 2), flow(video), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net_motion(fields), net_motion([flow(video)]))


def test_many_clips_take_the_memory_of_one(vae):
    """Of the frames too: a clip four times as long takes no more."""

    def stream(clips, frames):
        z = latents(vae, clips, frames, side=8)
        return allocated_peak(lambda: [deque(stream_video(vae, one), maxlen=0) for one in z.split(1)])

    one, many, longer = stream(1, 4), stream(8, 4), stream(1, 16)
    assert many == pytest.approx(one, rel=0.05)
    assert longer == pytest.approx(one, rel=0.05)
    z = latents(vae, 8, side=8)
    with torch.no_grad():
        assert allocated_peak(lambda: decode_video(vae, z)) > 4 * many  # a CPU's convolutions unfold one clip at a time


@given(st.integers(1, 200), st.integers(1, 100), st.integers(1, 100), st.integers(1, 32))
def test_clips_made_together_fit_the_budget(frames, height, width, most):
    size = Geometry(16, 16 * height, 16 * width, 4 * frames + 1)
    count, pixels = clips_at_once(size, most), size.frames * size.height * size.width
    assert 1 <= count <= most
    assert count == 1 or count * pixels <= PIXELS_AT_ONCE
    assert count == most or (count + 1) * pixels > PIXELS_AT_ONCE


def test_the_budget_is_a_clip_of_wans_and_sixteen_of_the_labs():
    assert clips_at_once(wan.geometry(wan.lab_folder() / "teacher")) == CLIPS_AT_ONCE == 16
    assert clips_at_once(Geometry(16, 480, 832, 81)) == 1


@pytest.fixture
def decoded(monkeypatch):
    """How many clips and latent frames the decoder is given at a time."""
    seen, step = [], autoencoder._decoder_step

    def watched(vae, chunk, *rest):
        seen.append((len(chunk), chunk.shape[2]))
        return step(vae, chunk, *rest)

    monkeypatch.setattr(autoencoder, "_decoder_step", watched)
    return seen


@pytest.mark.parametrize(("most", "seen"), [(1, [(1, 1)] * 16), (6240, [(4, 1)] * 4)])
def test_sampling_decodes_frame_by_frame_and_small_clips_together(most, seen, family, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(samplers, "LATENTS_AT_ONCE", most)
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    words = ["sample", "--model", str(family / "student"), "--prompts", str(tmp_path / "p.txt"), "--seeds", "2"]
    assert main([*words, "--out", str(tmp_path / "s"), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "s").glob("*.mp4"))) == 4
    assert decoded == seen  # four clips of four latent frames


def test_clips_decoded_together_are_those_decoded_alone(vae):
    made = latents(vae, 3)
    together = [np.stack(list(clip)) for clip in samplers.clips_of(vae, made)]
    for ours, one in zip(together, made.split(1), strict=True):
        own = np.stack(list(pictures(vae, one)))
        assert ours.shape == own.shape
        assert np.abs(ours.astype(int) - own).max() <= 1  # kernels differ


def test_held_out_checks_and_sheets_decode_frame_by_frame(parts_of, held_out, tmp_path, decoded):  # noqa: F811
    from mogan.training.held_out import Gain

    parts = parts_of(tmp_path / "run")
    decoded.clear()
    Gain(tmp_path / "run", held_out, parts, 3).measure(parts)
    assert decoded == [(1, 1)] * 8  # two prompts
    parts = parts_of(tmp_path / "sheet", replace(mogan(), iterations=1, sample_every=1, sample_prompts=2, plan=()))
    decoded.clear()
    run_training(parts, tmp_path / "sheet")
    assert decoded == [(1, 1)] * 8
    assert {p.name for p in (tmp_path / "sheet/samples/000001").iterdir()} == {"0.mp4", "1.mp4", "sheet.png"}
