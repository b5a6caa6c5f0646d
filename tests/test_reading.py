"""Prepare and evaluate see the same pictures at the same times, whatever is wrong with a file. All files are made here."""

import json
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph

from mogan.data import measure as first_pass
from mogan.data import stream
from mogan.data.clips import Held, ShortShot, clips_of
from mogan.data.listing import Source
from mogan.data.video import probe, read_frames, read_video, write_video
from mogan.errors import UserError
from mogan.evaluation.frames import Clip
from mogan.models.wan import Geometry
from mogan.survey.build import Unplayable, copy_clip

SIZE = (48, 64)


def moving(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A texture that moves: no two frames are equal, and none is taken for a cut."""
    blocks = np.random.default_rng(0).integers(60, 200, (height // 8, width // 8, 3)).astype(np.uint8)
    image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(image, i, 1) for i in range(count)])


def encode(path, frames, stamps_ms=None, codec="ffv1", pix_fmt="bgr0", fps=16, tag=None, rotation=0, **context):
    """Frames as a video; `tag` is the rate the container is told, `context` is set on the encoder."""
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=Fraction(tag or fps), options={"crf": "10"} if codec == "libx264" else {})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], pix_fmt
        for name, value in context.items():
            setattr(video.codec_context, name, value)
        if rotation:
            video.set_display_rotation(rotation)
        video.codec_context.time_base = Fraction(1, 1000 if stamps_ms is not None or tag else fps)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[-1] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt)
            stamp = round(1000 * i / fps) if stamps_ms is None else stamps_ms[i]
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            if stamps_ms is None and not tag:
                frame.pts, frame.time_base = i, Fraction(1, fps)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


def levels(nits):
    """SMPTE ST 2084: absolute luminance to a signal in [0, 1]."""
    y = (np.asarray(nits) / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 4096 * 32 * y) / (1 + 2392 / 4096 * 32 * y)) ** (2523 / 4096 * 128)


def hdr(path, nits, side=16):
    """Grey bars of known luminance in 10 bits, BT.2020, PQ."""
    signal = np.repeat((64 + 876 * levels(nits)).round().astype(np.uint16), side)
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=16)
        video.height, video.width, video.pix_fmt = side, len(signal), "yuv420p10le"
        context = video.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, 16, 9, 1
        for i in range(5):
            frame = av.VideoFrame(len(signal), side, "yuv420p10le")
            for plane, values in zip(frame.planes, (signal, None, None), strict=True):
                rows = np.full((plane.height, plane.line_size // 2), 512, np.uint16)
                if values is not None:
                    rows[:, : len(values)] = values
                plane.update(rows)
            frame.pts = i
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


def interlaced(path, frames):
    """Pairs of frames woven into one, as cameras of television do: top field first."""
    woven = frames[::2].copy()
    woven[:, 1::2] = frames[1::2, 1::2]
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"crf": "5", "x264-params": "tff=1"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        for i, image in enumerate(woven):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


def files(folder):
    """Path of each kind of file, the size it is shown at, its frames and its rate."""
    jump = [*range(0, 30 * 62, 62), *range(2_400_000, 2_400_000 + 30 * 62, 62)]
    clear = np.concatenate([moving(20), np.full((20, *SIZE, 1), 128, np.uint8)], -1)
    encode(folder / "turned.mp4", moving(17), codec="libx264", pix_fmt="yuv420p", rotation=90)
    encode(folder / "tag.mkv", moving(20), fps=20, tag=1000)
    encode(folder / "jump.mkv", moving(60), jump)
    encode(folder / "wide.mp4", moving(20), None, "libx264", "yuv420p", sample_aspect_ratio=Fraction(2, 1))
    encode(folder / "clear.mkv", clear, pix_fmt="bgra")
    write_video(folder / "plain.mp4", moving(20), 16)
    write_video(folder / "one.mp4", moving(1), 16)
    return {
        "turned.mp4": ((64, 48), 17, 16),
        "tag.mkv": (SIZE, 20, 20),
        "jump.mkv": (SIZE, 60, 16),
        "wide.mp4": ((48, 128), 20, 16),
        "clear.mkv": (SIZE, 20, 16),
        "plain.mp4": (SIZE, 20, 16),
        "one.mp4": (SIZE, 1, 16),
    }


def measured(folder, names, fps=16, frames=17):
    """The first pass of prepare."""
    sources = [Source(folder / name, name, "x") for name in names]
    flow = lambda video: video.new_zeros(video.shape[0], video.shape[2] - 1, 2, *video.shape[-2:])  # noqa: E731
    records = first_pass.measure(sources, folder / "out", Geometry(fps, 48, 64, frames), flow, 1)
    return dict(zip(names, records, strict=True))


def test_prepare_and_evaluate_agree_on_size_frames_and_rate(tmp_path):
    expected = files(tmp_path)
    records = measured(tmp_path, expected)
    for name, (size, count, fps) in expected.items():
        clip, record = Clip(tmp_path / name), records[name]
        assert record["error"] is None, name
        assert clip.shape == (count, *size), name
        assert clip.fps == pytest.approx(fps, rel=5e-3), name
        assert (record["source_height"], record["source_width"]) == size, name
        assert record["source_fps"] == clip.fps, name
        assert record["remarks"] == list(clip.remarks), name
        for seen, read in zip(clip, read_frames(tmp_path / name), strict=True):
            np.testing.assert_array_equal(seen, read.image_HWC)


def test_a_tag_is_believed_where_the_time_stamps_agree_and_contradicted_by_name(tmp_path):
    files(tmp_path)
    assert probe(tmp_path / "plain.mp4").remarks == ()
    assert probe(tmp_path / "one.mp4").remarks == ()
    assert probe(tmp_path / "tag.mkv").remarks == (stream.TAG,)
    uneven = np.cumsum([0, *np.random.default_rng(0).integers(16, 80, 29)])
    encode(tmp_path / "uneven.mkv", moving(30), [int(t) for t in uneven])
    found = probe(tmp_path / "uneven.mkv")
    assert stream.UNEVEN in found.remarks
    assert found.fps == pytest.approx(29_000 / uneven[-1], rel=1e-3)
    write_video(tmp_path / "ntsc.mp4", moving(20), 30000 / 1001)
    assert probe(tmp_path / "ntsc.mp4").fps == 30000 / 1001


def test_a_gap_between_time_stamps_costs_two_seconds_and_cuts(tmp_path):
    files(tmp_path)
    frames = list(read_frames(tmp_path / "jump.mkv", fps=16))
    assert 2 * 29 + 31 <= len(frames) <= 2 * 30 + 32
    assert frames[-1].number > 38_000
    found = list(clips_of(iter(frames), 17))
    assert sum(isinstance(clip, Held) for clip in found) == 1
    starts = [clip.start for clip in found]
    assert max(starts) >= 38_400
    for clip in found:
        assert isinstance(clip, Held | ShortShot) or len(clip.frames_FHWC) == 17
    assert probe(tmp_path / "jump.mkv").remarks[0] == stream.GAP


def test_frames_over_hours_cost_no_more_than_their_number(tmp_path):
    encode(tmp_path / "hours.mkv", moving(24), [*range(0, 23 * 62, 62), 3 * 3_600_000])
    assert len(list(read_frames(tmp_path / "hours.mkv", fps=16))) < 80
    record = measured(tmp_path, ["hours.mkv"])["hours.mkv"]
    assert len(record["clips"]) <= 3
    assert len(record["held"]) == 1


def test_numbers_in_a_gap_can_be_read_again(tmp_path):
    """The second pass of prepare asks for the numbers the first pass found."""
    files(tmp_path)
    everything = {f.number: f.image_HWC for f in read_frames(tmp_path / "jump.mkv", fps=16)}
    late = sorted(everything)[-10:]
    for frame in read_frames(tmp_path / "jump.mkv", fps=16, only=set(late)):
        np.testing.assert_array_equal(frame.image_HWC, everything[frame.number])


def test_repeats_are_counted_whether_the_reader_or_the_recorder_made_them(tmp_path):
    doubled = moving(20).repeat(2, 0)
    encode(tmp_path / "doubled.mkv", doubled)
    encode(tmp_path / "slow.mkv", moving(20), fps=8)
    records = measured(tmp_path, ["doubled.mkv", "slow.mkv"])
    for record in records.values():
        assert [clip["repeats"] for clip in record["clips"]] == [8, 8]


def test_hdr_is_shown_with_white_at_203_nits(tmp_path):
    """Below white the picture is (L / 203) ** (1 / 2.4), BT.1886's inverse; above, nothing is darker than white."""
    nits = np.array([0, 1, 5, 20, 50, 100, 150, 400, 1000])
    image = next(read_frames(hdr(tmp_path / "pq.mkv", nits))).image_HWC
    shown = image[8, 8::16].astype(float)
    expected = 255 * (nits / 203) ** (1 / 2.4)
    assert np.abs(shown[:7] - expected[:7, None]).max() <= 3
    assert (shown[7:] >= 250).all()
    assert probe(tmp_path / "pq.mkv").remarks == (stream.HDR,)


def test_transparency_lies_over_black(tmp_path):
    files(tmp_path)
    image = next(read_frames(tmp_path / "clear.mkv")).image_HWC
    np.testing.assert_allclose(image, moving(1)[0] * (128 / 255), atol=1)
    assert probe(tmp_path / "clear.mkv").remarks == (stream.ALPHA,)
    encode(tmp_path / "solid.mkv", np.pad(moving(3), [(0, 0)] * 3 + [(0, 1)], constant_values=255), pix_fmt="bgra")
    assert probe(tmp_path / "solid.mkv").remarks == ()
    np.testing.assert_array_equal(next(read_frames(tmp_path / "solid.mkv")).image_HWC, moving(1)[0])


def test_fields_are_taken_apart(tmp_path):
    """Rows of a woven frame differ by the motion between its fields; yadif leaves a tenth of that."""
    whole = np.zeros((40, *SIZE, 3), np.uint8)
    for i in range(40):
        whole[i, 8:40, i : i + 16] = 220
    frames = list(read_frames(interlaced(tmp_path / "a.mp4", whole)))
    assert len(frames) == 20
    assert [round(f.time_s, 3) for f in frames[:3]] == [0, 0.04, 0.08]

    def comb(image):
        rows = image[12:36].astype(int)
        return np.abs(rows[1:-1] * 2 - rows[:-2] - rows[2:]).mean()

    woven = whole[::2].copy()
    woven[:, 1::2] = whole[1::2, 1::2]
    assert comb(frames[10].image_HWC) < 0.1 * comb(woven[10])
    assert probe(tmp_path / "a.mp4").remarks == (stream.INTERLACED,)


def test_a_recording_that_kept_its_clock_is_not_truncated(tmp_path):
    stamps = [3600000 + 62 * i for i in range(30)]
    path = encode(tmp_path / "late.mkv", moving(30), stamps)
    assert len(list(read_frames(path))) == 30
    assert probe(path).duration_s == pytest.approx(30 * 0.062, abs=0.07)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=r"truncated|breaks"):
        list(read_frames(path))


def test_a_duration_tag_that_is_no_number_says_nothing(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video = out.add_stream("ffv1", rate=16)
        video.height, video.width, video.pix_fmt = *SIZE, "bgr0"
        video.metadata["DURATION"] = "unknown:a:b"
        for image in moving(20):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))

    class Said:
        duration, time_base, metadata = None, None, {"DURATION-eng": "soon"}

    class Nothing:
        duration, streams = None, (1,)

    assert stream.declared_duration(Nothing, Said) is None
    assert len(read_video(tmp_path / "a.mkv")[0]) == 20


def test_pictures_too_large_for_the_machine_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(3), 16)
    monkeypatch.setattr(stream, "MOST_PIXELS", 1000)
    for read in (probe, read_video, Clip):
        with pytest.raises(UserError, match=r"a.mp4 has pictures of 64 x 48: scale it down"):
            read(tmp_path / "a.mp4")


def test_what_is_no_file_or_cut_short_is_an_error_of_that_file_alone(tmp_path):
    write_video(tmp_path / "good.mp4", moving(20), 16)
    (tmp_path / "folder.mp4").mkdir()
    whole = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    bad = ["folder.mp4", "gone.mp4", "cut.mp4", "empty.mp4"]
    records = measured(tmp_path, ["good.mp4", *bad])
    assert len(records["good.mp4"]["clips"]) == 1
    for name in bad:
        assert records[name]["error"], name
        assert records[name]["clips"] == []
        with pytest.raises(UserError, match=name):
            Clip(tmp_path / name).shape  # noqa: B018
    json.dumps(records)


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile other.mp4\n",
        "ffconcat version 1.0\nfile 'sub/other.mp4'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.25,\nother.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_script_or_playlist_leads_to_no_other_file(script, tmp_path):
    write_video(tmp_path / "other.mp4", moving(20), 16)
    write_video(tmp_path / "sub" / "other.mp4", moving(20), 16)
    (tmp_path / "list.mp4").write_text(script)
    with pytest.raises(UserError, match=r"list\.mp4 is not a video"):
        read_video(tmp_path / "list.mp4")
    with pytest.raises(Unplayable, match=r"list\.mp4 cannot be read as a video"):
        copy_clip(tmp_path / "list.mp4", tmp_path)


def test_a_name_like_an_address_is_a_file(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(20), 16)
    for name, count in (("concat:a.mp4", 3), ("http://a.mp4", 4), ("cache:a.mp4", 5)):
        write_video(tmp_path / name, moving(count), 16)
        monkeypatch.chdir((tmp_path / name).parent)
        assert len(read_video(Path(name).name)[0]) == count
        monkeypatch.chdir(tmp_path)
        assert len(read_video(name)[0]) == count


def test_yadif_is_part_of_the_ffmpeg_that_is_installed():
    Graph().add("yadif", "deint=interlaced")


def test_a_codec_nobody_knows_and_pixels_nobody_has_are_one_sentence(tmp_path):
    encode(tmp_path / "whole.mp4", moving(20), None, "libx264", "yuv420p", sample_aspect_ratio=Fraction(2, 1))
    data = (tmp_path / "whole.mp4").read_bytes()
    at = data.rindex(b"avc1")  # of the sample's description; as players mark what is encrypted
    (tmp_path / "locked.mp4").write_bytes(data[:at] + b"encv" + data[at + 4 :])
    at = data.index(b"pasp") + 4
    for name, sides in {"wide.mp4": (1000, 1), "huge.mp4": (2**31 - 1, 1), "tall.mp4": (1, 65535)}.items():
        (tmp_path / name).write_bytes(data[:at] + struct.pack(">II", *sides) + data[at + 8 :])
    for name, says in {"locked": "cannot decode", "wide": "pixels", "huge": "pixels", "tall": "pixels"}.items():
        for read in (probe, lambda path: list(read_frames(path, size=(32, 32)))):
            with pytest.raises(UserError, match=says):
                read(tmp_path / f"{name}.mp4")
