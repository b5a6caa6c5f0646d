import os
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import flow_to_image

from mogan.data import video
from mogan.data.video import contact_sheet, flow_picture, moving_sheet, probe, read_frames, read_video, write_video
from mogan.errors import UserError


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose grey level says which they are."""
    levels = (20 + 200 * np.arange(count) / max(count - 1, 1)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def encode(path, frames, codec, pix_fmt, fps=16, stamps=None, rotation=None):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            out.mux(stream.encode(frame.reformat(format=pix_fmt)))
        out.mux(stream.encode(None))


def sound_only(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        wave = (0.1 * np.sin(np.arange(16000) / 20)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("fps", [16, 8, 24, 30, Fraction(30000, 1001)])
def test_what_is_written_is_read_with_exactly_the_rate_it_was_given(tmp_path, fps):
    frames = numbered(9)
    write_video(tmp_path / "a.mp4", frames, fps)
    back, rate = read_video(tmp_path / "a.mp4")
    assert rate == float(fps)
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).max() <= 3
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == fps
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_colours_survive(tmp_path):
    frames = np.empty((3, 32, 32, 3), np.uint8)
    frames[:] = (225, 55, 50)
    frames[:, :, 16:] = (60, 95, 230)
    write_video(tmp_path / "a.mp4", frames, 16)
    back, _ = read_video(tmp_path / "a.mp4")
    assert np.abs(back[:, :, [4, 28]].astype(int) - frames[:, :, [4, 28]]).max() <= 4


def test_same_frames_give_the_same_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", frames, 16)
    write_video(tmp_path / "b.mp4", iter(frames), 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


WRITE = """
import hashlib, sys
from pathlib import Path
import numpy as np
from mogan.data.video import write_video
for size, count in (((64, 64), 49), ((34, 98), 20), ((48, 80), 45), ((480, 832), 3)):
    blocks = np.random.default_rng(0).integers(0, 255, (size[0] // 8 + 1, size[1] // 8 + 1, 3)).astype(np.uint8)
    image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]
    write_video(Path(sys.argv[1]), [np.roll(image, (i, 2 * i), (0, 1)) for i in range(count)], 16)
    print(hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest())
"""


@pytest.mark.slow
def test_what_lies_in_fresh_memory_does_not_change_the_bytes(tmp_path):
    """Glibc fills what it hands out with the complement of MALLOC_PERTURB_."""
    said = {
        subprocess.run(
            [sys.executable, "-c", WRITE, str(tmp_path / "a.mp4")],
            env=os.environ | {"MALLOC_PERTURB_": str(fill)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for fill in (0, 1, 85, 255)
    }
    assert len(said) == 1
    assert len(said.pop().split()) == 4


@pytest.mark.skipif("asm" not in video._X264, reason="x264's names of instructions are those of x86")
def test_the_instructions_of_the_processor_do_not_change_the_bytes(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 255, (12, 48, 80, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", frames, 16)
    monkeypatch.setitem(video._ENCODER, "x264-params", "cpu-independent=1")
    write_video(tmp_path / "b.mp4", frames, 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    monkeypatch.setitem(video._ENCODER, "x264-params", "asm=0")
    write_video(tmp_path / "c.mp4", frames, 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


def test_failed_write_leaves_nothing_behind(tmp_path):
    def frames():
        yield numbered(1)[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "a.mp4", frames(), 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.zeros((2, 15, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.float32)])
def test_frames_that_yuv420_cannot_hold_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="even sides"):
        write_video(tmp_path / "a.mp4", bad, 16)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.webm", "libvpx", "yuv420p"),
        ("a.mov", "libx264", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mkv", "ffv1", "yuv444p"),
    ],
)
def test_reads_what_people_have(tmp_path, name, codec, pix_fmt):
    encode(tmp_path / name, numbered(10), codec, pix_fmt)
    frames, fps = read_video(tmp_path / name)
    assert len(frames) == 10
    assert fps == pytest.approx(16)
    assert np.abs(frames.mean((1, 2, 3)) - numbered(10).mean((1, 2, 3))).max() < 8


def test_reads_gif_with_its_own_delays(tmp_path):
    images = [Image.fromarray(f) for f in numbered(4)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 300, 100, 100])
    times = [round(f.time_s, 2) for f in read_frames(tmp_path / "a.gif")]
    assert times == [0.0, 0.1, 0.4, 0.5]
    assert len(list(read_frames(tmp_path / "a.gif", fps=10))) == 6


def test_resampling_takes_the_nearest_frame(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(30), 30)
    stamps = [f.time_s for f in read_frames(tmp_path / "a.mp4", fps=16)]
    assert len(stamps) == 16
    expected = [min(np.arange(30) / 30, key=lambda t: abs(t - k / 16)) for k in range(16)]
    np.testing.assert_allclose(stamps, expected, atol=1e-3)


def test_variable_rate_is_resampled_by_time_not_by_count(tmp_path):
    stamps = [0, 50, 100, 150, 500, 900, 950, 1000]
    encode(tmp_path / "a.mkv", numbered(8), "ffv1", "yuv444p", fps=20, stamps=stamps)
    levels = numbered(8)[:, 0, 0, 0].astype(int)
    shown = [int(np.abs(levels - f.image_HWC[0, 0, 0]).argmin()) for f in read_frames(tmp_path / "a.mkv", fps=10)]
    nearest = [int(np.abs(np.array(stamps) - 100 * k).argmin()) for k in range(11)]
    assert shown[:11] == nearest


def test_repeats_made_for_a_slow_source_are_the_same_array(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(8), 8)
    frames = list(read_frames(tmp_path / "a.mp4", fps=16))
    assert len(frames) == 16
    assert sum(a.image_HWC is b.image_HWC for a, b in pairwise(frames)) == 8


def test_only_wanted_frames_come_and_they_are_the_same(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(20), 24)
    everything = {f.number: f.image_HWC for f in read_frames(tmp_path / "a.mp4", fps=16, size=(32, 32))}
    some = list(read_frames(tmp_path / "a.mp4", fps=16, size=(32, 32), only={3, 4, 9}))
    assert [f.number for f in some] == [3, 4, 9]
    for frame in some:
        np.testing.assert_array_equal(frame.image_HWC, everything[frame.number])


def test_size_cuts_the_centre_and_averages(tmp_path):
    wide = np.zeros((3, 64, 192, 3), np.uint8)
    wide[:, :, 64:128] = 120  # only the centre square is grey
    wide[:, ::2, 64:128] = 240  # in stripes of one pixel, which averaging turns into 180
    encode(tmp_path / "a.mkv", wide, "ffv1", "yuv444p")
    image = next(read_frames(tmp_path / "a.mkv", size=(16, 16))).image_HWC
    assert image.shape == (16, 16, 3)
    assert np.abs(image[:, 1:-1].astype(int) - 180).max() <= 6


def test_rotation_that_the_file_asks_for_is_applied(tmp_path):
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 255  # top left
    encode(tmp_path / "a.mp4", frames, "libx264", "yuv420p", rotation=90)
    image = next(read_frames(tmp_path / "a.mp4")).image_HWC
    assert image.shape == (64, 32, 3)
    # 90 degrees counter-clockwise carries the top left to the bottom left
    assert image[48, 8].min() > 200
    assert image[16, 8].max() < 50
    found = probe(tmp_path / "a.mp4")
    assert (found.height, found.width) == (64, 32)
    assert next(read_frames(tmp_path / "a.mp4", size=(32, 16))).image_HWC.shape == (32, 16, 3)


def test_probe_says_what_the_file_holds(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(24), 12)
    found = probe(tmp_path / "a.mp4")
    assert (found.fps, found.width, found.height, found.frames) == (12.0, 64, 48, 24)
    assert found.duration_s == pytest.approx(2, abs=0.1)


def test_reading_does_not_hold_the_file_in_memory(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(60), 16)
    frames = read_frames(tmp_path / "a.mp4")
    first = next(frames)
    frames.close()  # an iterator that is dropped closes its file
    assert first.number == 0


def broken(tmp_path):
    whole = tmp_path / "whole.mp4"
    write_video(whole, np.random.default_rng(0).integers(0, 255, (64, 48, 64, 3)).astype(np.uint8), 16)
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "head.mp4").write_bytes(data[:100])
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    sound_only(tmp_path / "sound.mp4")
    return ["cut.mp4", "head.mp4", "zero.mp4", "text.mp4", "sound.mp4", "missing.mp4"]


def test_broken_files_end_in_one_sentence_with_their_name(tmp_path):
    for name in broken(tmp_path):
        with pytest.raises(UserError, match=name) as caught:
            read_video(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_name_with_a_colon_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("12:30").mkdir()
    write_video(Path("12:30/a.mp4"), numbered(8), 16)
    assert len(read_video(Path("12:30/a.mp4"))[0]) == 8


def test_a_file_cut_off_yields_what_it_has_before_it_says_so(tmp_path):
    broken(tmp_path)
    seen = []
    with pytest.raises(UserError, match=r"truncated|breaks"):
        seen.extend(frame.number for frame in read_frames(tmp_path / "cut.mp4"))
    assert 0 < len(seen) < 64


def test_contact_sheet_has_a_row_per_clip(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(9), 16)
    contact_sheet([tmp_path / "a.mp4", numbered(3)], tmp_path / "sheet.png", columns=4, titles=["a", "b"], height=24)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (24 + 18), 4 * 32, 3)
    levels = sheet[18 + 12, 16::32, 0].astype(int)  # first to last
    assert abs(levels[0] - 20) < 5
    assert abs(levels[-1] - 220) < 5


@pytest.mark.parametrize(("heads", "across"), [(3, 2), (8, 1)])
def test_moving_sheet_plays_in_step_with_narrow_rows_side_by_side(heads, across, tmp_path):
    paths = [[tmp_path / f"{row}{head}.mp4" for head in range(heads)] for row in range(2)]
    shades = 30 + 10 * np.arange(2 * heads).reshape(2, heads)  # of first frames; each further frame is 10 darker
    for row, head in np.ndindex(2, heads):
        write_video(paths[row][head], [np.full((64, 64, 3), shades[row, head] - 10 * t, np.uint8) for t in range(3)], 8)
    moving_sheet([("a", paths[0]), ("b", paths[1])], tmp_path / "sheet.gif", [str(h) for h in range(heads)], 8)
    with Image.open(tmp_path / "sheet.gif") as sheet:
        assert sheet.n_frames == 3
        assert sheet.width == across * (heads * 116 + 12) - 16
        for frame in range(3):
            sheet.seek(frame)
            picture = np.asarray(sheet.convert("RGB")).astype(int)
            for row, head in np.ndindex(2, heads):
                x = (row % across) * (heads * 116 + 12) + head * 116 + 56
                y = 36 + (row // across) * 130 + 56
                assert abs(picture[y, x] - (shades[row, head] - 10 * frame)).max() <= 4


def test_flow_picture_is_the_standard_wheel_when_the_fastest_pixel_has_max_flow():
    torch.manual_seed(0)
    flow = 3 * torch.randn(2, 16, 16)
    largest = float(flow.square().sum(0).sqrt().max())
    np.testing.assert_array_equal(flow_picture(flow, largest), flow_to_image(flow).permute(1, 2, 0).numpy())


def test_flow_picture_has_one_scale_whatever_it_shows():
    slow = np.zeros((2, 8, 8))
    slow[0, 0, 0] = 1.0
    fast = slow.copy()
    fast[1, 7, 7] = 8.0
    one, other = flow_picture(slow, 4.0), flow_picture(fast, 4.0)
    np.testing.assert_array_equal(one[0, 0], other[0, 0])
    assert (one[4, 4] == 255).all()  # still is white
    np.testing.assert_array_equal(other[7, 7], flow_picture(fast / 2, 4.0)[7, 7])  # beyond max_flow nothing changes
    assert flow_picture(np.stack([slow, fast]), 4.0).shape == (2, 8, 8, 3)
