"""Pairing folders of clips, and what must not be found in the result."""

import json
import shutil

import av
import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `survey`")

from mogan.errors import UserError
from mogan.survey import checks
from mogan.survey.build import build, copy_clip
from mogan.survey.folder import Item, read_survey
from mogan.survey.pairing import named_folders, read_samples
from test_survey_study import NAMES, PROMPTS, make_clip, make_folders, make_survey


def test_pairs_are_same_prompt_and_number_under_names_that_tell_nothing(tmp_path):
    survey = build(tuple(make_folders(tmp_path)), out=tmp_path / "survey")
    assert survey == read_survey(tmp_path / "survey")
    pairs = survey.of_kind("pair")
    assert sorted(item.prompt for item in pairs) == sorted(PROMPTS)
    assert all(item.systems == NAMES and item.index == 0 for item in pairs)
    files = {path.name for path in (tmp_path / "survey" / "clips").iterdir()}
    assert files == {clip.file for clip in survey.clips}
    for path in (tmp_path / "survey" / "clips").iterdir():
        assert len(path.stem) == 32
        assert not any(word in path.read_bytes() for word in (b"zebrafish", b"quagga", b"x264"))
    assert not list(tmp_path.glob(".survey*"))


def test_three_systems_are_compared_two_by_two(tmp_path):
    survey = read_survey(make_survey(tmp_path, ("a1", "b1", "c1")))
    assert {item.systems for item in survey.of_kind("pair")} == {("a1", "b1"), ("a1", "c1"), ("b1", "c1")}
    assert len(survey.of_kind("pair")) == 9


def test_a_listing_gives_prompts_that_no_file_name_could_hold(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        make_clip(tmp_path / name / "0.mp4", 1)
        row = {"file": "0.mp4", "prompt": "is it a/b?\n" * 30, "index": 2, "seed": 7, "system": name}
        (tmp_path / name / "samples.jsonl").write_text(json.dumps(row) + "\n")
    survey = build(a=str(tmp_path / NAMES[0]), b=str(tmp_path / NAMES[1]), out=tmp_path / "survey")
    (pair,) = survey.of_kind("pair")
    assert (pair.prompt, pair.index, pair.seed, pair.systems) == (("is it a/b?\n" * 30).strip(), 2, 7, NAMES)


def test_metadata_and_sound_are_left_behind_and_frames_are_not_touched(tmp_path):
    make_clip(tmp_path / "in.mp4", 0)
    marked = tmp_path / "marked.mp4"
    with av.open(str(tmp_path / "in.mp4")) as given, av.open(str(marked), "w") as taken:
        taken.metadata["comment"] = "made by zebrafish"
        out = taken.add_stream_from_template(given.streams.video[0])
        out.metadata["handler_name"] = "zebrafish"
        sound = taken.add_stream("aac", rate=48000)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = out
                taken.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        silence.rate = 48000
        for packet in [*sound.encode(silence), *sound.encode(None)]:
            taken.mux(packet)
    assert b"zebrafish" in marked.read_bytes()
    clip = copy_clip(marked, tmp_path)
    copied = tmp_path / clip.file
    assert b"zebrafish" not in copied.read_bytes()
    with av.open(str(marked)) as a, av.open(str(copied)) as b:
        assert [stream.type for stream in b.streams] == ["video"]
        frames = [[frame.to_ndarray() for frame in container.decode(video=0)] for container in (a, b)]
    assert np.array_equal(frames[0], frames[1])
    assert (clip.frames, clip.fps, clip.width, clip.height) == (12, 16, 64, 64)


def test_checks_have_known_answers():
    frames = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
    assert checks.motion_of(checks.spoil(frames, "frozen", 16)) == 0
    shuffled = checks.spoil(frames, "shuffled", 16)
    assert not np.array_equal(shuffled, frames)
    assert np.array_equal(np.sort(shuffled, axis=0), np.sort(frames, axis=0))
    blocks = checks.spoil(frames, "pixelated", 16)
    assert np.array_equal(blocks[:, ::2, ::2], blocks[:, 1::2, 1::2])
    for manner, expect in checks.EXPECT.items():
        item = Item("i", "check", "p", "a", "b", manner=manner, expect=expect)
        right = {"motion": "tie", "quality": "tie", "text": "tie", **expect}
        assert checks.passed(item, right)
        assert not checks.passed(item, dict.fromkeys(right, "second"))
    assert checks.passed(item, {"motion": "tie", "quality": "first", "text": "tie"})  # identical: one may be imagined


def test_still_clips_are_not_used_to_show_missing_motion():
    from random import Random

    still = [checks.Source(f"{k}.mp4", PROMPTS[k], 0.0) for k in range(3)]
    manners = {manner for _, manner, _, _ in checks.choose(still, Random(0))}
    assert manners == {"pixelated", "swapped", "identical"}
    one = {manner for _, manner, _, _ in checks.choose([checks.Source("a", "x y", 9.0)], Random(0))}
    assert "swapped" not in one


def test_clips_that_differ_in_size_or_length_are_pointed_out(tmp_path, capsys):
    make_folders(tmp_path, ("a1",))
    make_folders(tmp_path, ("b1",), frames=8, fps=24.0)
    survey = build((str(tmp_path / "a1"), str(tmp_path / "b1")), out=tmp_path / "survey")
    assert len(survey.warnings) == 2
    assert "frame rate" in capsys.readouterr().out


def mistake(match: str):
    return pytest.raises(UserError, match=match)


def test_mistakes_are_told_in_one_sentence(tmp_path):
    folders = make_folders(tmp_path)
    out = tmp_path / "survey"
    empty = tmp_path / "empty"
    empty.mkdir()
    with mistake("at least two systems"):
        build((folders[0],), out=out)
    with mistake("holds no video"):
        build((folders[0], str(empty)), out=out)
    with mistake("is not a folder"):
        build((folders[0], "x=nowhere"), out=out)
    for text in ("=nowhere", "x=", "/"):
        with mistake(f"'{text}' lacks a name or a folder"):
            named_folders([folders[0], text])
    (tmp_path / "lr=1").mkdir()
    assert set(named_folders([folders[0], str(tmp_path / "lr=1")])) >= {"lr=1"}
    with mistake("Two systems are called"):
        named_folders([folders[0], folders[0]])
    (tmp_path / "link").symlink_to(folders[0].partition("=")[2])
    with mistake("are the same folder"):
        named_folders([folders[0], f"b={tmp_path / 'link'}"])
    with mistake("exists already"):
        build(tuple(folders), out=empty)
    with mistake("completion-code"):
        build(tuple(folders), out=out, completion_code="no spaces")
    with mistake("at least 1"):
        build(tuple(folders), out=out, raters=0)
    other = tmp_path / "other"
    other.mkdir()
    make_clip(other / "something else-0.mp4", 3)
    with mistake("no prompt in common"):
        build((folders[0], str(other)), out=out)
    make_clip(other / f"{PROMPTS[0]}-0.mp4", 3)
    with mistake("lack a partner.*--common to use the 1"):
        build((folders[0], str(other)), out=out)
    survey = build((folders[0], str(other)), out=out, common=True)
    assert [item.prompt for item in survey.of_kind("pair")] == [PROMPTS[0]]


def test_broken_and_unplayable_clips_are_told_by_name(tmp_path):
    folders = make_folders(tmp_path)
    bad = tmp_path / NAMES[1] / f"{PROMPTS[1]}-0.mp4"
    bad.write_bytes(b"no video at all")
    with mistake("snow falls over mountains-0.mp4 cannot be read"):
        build(tuple(folders), out=tmp_path / "survey")
    assert not list(tmp_path.glob("*survey*"))
    survey = build(tuple(folders), out=tmp_path / "common", common=True)
    assert PROMPTS[1] not in {item.prompt for item in survey.of_kind("pair")}
    assert any(f"A pair is left out: {bad} cannot be read" in warning for warning in survey.warnings)
    shown = {clip.file for clip in survey.clips}
    assert {path.name for path in (tmp_path / "common" / "clips").iterdir()} == shown
    with av.open(str(bad), "w") as taken:
        stream = taken.add_stream("mpeg4", rate=16, width=64, height=64, pix_fmt="yuv420p")
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
            for packet in stream.encode(frame):
                taken.mux(packet)
        for packet in stream.encode(None):
            taken.mux(packet)
    with mistake("mpeg4 yuv420p, which phones cannot play"):
        build(tuple(folders), out=tmp_path / "survey")
    for prompt in PROMPTS:
        shutil.copy(bad, tmp_path / NAMES[0] / f"{prompt}-0.mp4")
    with mistake("So are 2 more. Or pass --common"):
        build(tuple(folders), out=tmp_path / "survey")
    with mistake("No pair is left"):
        build(tuple(folders), out=tmp_path / "survey", common=True)


def test_folders_are_read_as_the_evaluation_reads_them(tmp_path):
    make_clip(tmp_path / "a.mp4", 0)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "caption": "a cat runs", "seed": 4}))
    ((key, entry),) = read_samples(tmp_path).items()
    assert (key, entry.path, entry.seed) == (("a cat runs", 0), tmp_path / "a.mp4", 4)


def test_listings_are_checked_line_by_line(tmp_path):
    make_clip(tmp_path / "0.mp4", 0)
    make_clip(tmp_path / "2.mp4", 0)
    listing = tmp_path / "samples.jsonl"
    good = {"file": "0.mp4", "prompt": "p", "index": 0, "seed": 1}
    for line, match in (
        ("{", "samples.jsonl line 1 is not JSON"),
        ('{"file": "0.mp4"}', "gives 0.mp4 no caption"),
        (json.dumps({**good, "file": "1.mp4"}), "none of the 1 files"),
        (json.dumps(good) + "\n" + json.dumps({**good, "file": "1.mp4", "index": 1}), "1.mp4, which is not there"),
        (json.dumps(good) + "\n" + json.dumps({**good, "file": "2.mp4"}), "two clips"),
    ):
        listing.write_text(line)
        with mistake(match):
            read_samples(tmp_path)
    listing.write_text(json.dumps(good) + "\n" + json.dumps({**good, "file": "./0.mp4", "seed": 2}))
    ((_, entry),) = read_samples(tmp_path).items()  # one file under two names, the last line counts
    assert (entry.path, entry.seed) == (tmp_path / "0.mp4", 2)


def test_a_clip_that_cannot_be_opened_lacks_nobody_but_its_partner(tmp_path, capsys):
    folders = make_folders(tmp_path)
    bad = tmp_path / NAMES[1] / f"{PROMPTS[1]}-0.mp4"
    bad.unlink()
    bad.mkdir()
    with mistake("lack a partner"):
        build(tuple(folders), out=tmp_path / "survey")
    assert f"left out: {bad} is a folder, not a file" in capsys.readouterr().out
    survey = build(tuple(folders), out=tmp_path / "survey", common=True)
    assert PROMPTS[1] not in {item.prompt for item in survey.of_kind("pair")}


def test_different_seeds_are_not_paired(tmp_path):
    for seed, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        make_clip(tmp_path / name / "0.mp4", seed)
        row = {"file": "0.mp4", "prompt": "p", "index": 0, "seed": seed}
        (tmp_path / name / "samples.jsonl").write_text(json.dumps(row))
    with mistake("seeds of 'p' number 0 differ"):
        build(a=str(tmp_path / NAMES[0]), b=str(tmp_path / NAMES[1]), out=tmp_path / "survey")


def test_a_damaged_survey_folder_is_told(tmp_path):
    with mistake("holds no survey.json"):
        read_survey(tmp_path)
    (tmp_path / "survey.json").write_text('{"format": 1}')
    with mistake("is damaged"):
        read_survey(tmp_path)
    (tmp_path / "survey.json").write_text('{"format": 99}')
    with mistake("format 99"):
        read_survey(tmp_path)
    folder = make_survey(tmp_path / "whole")
    whole = json.loads((folder / "survey.json").read_text())
    edited = {
        "raters is nan": {"raters": float("nan")},
        "per_rater is '9'": {"per_rater": "9"},
        "checks_per_rater is -1": {"checks_per_rater": -1},
        "repeats_per_rater is True": {"repeats_per_rater": True},
        "title is None": {"title": None},
        "one_side is inf": {"rules": {**whole["rules"], "one_side": float("inf")}},
        "fps is '8'": {"clips": [{**clip, "fps": "8"} for clip in whole["clips"]]},
        "first is 3": {"items": [{**item, "first": 3} for item in whole["items"]]},
    }
    for said, change in edited.items():
        (folder / "survey.json").write_text(json.dumps({**whole, **change}))
        with mistake(said):
            read_survey(folder)
    (folder / "survey.json").write_text(json.dumps(whole))
    next((folder / "clips").iterdir()).unlink()
    with mistake("1 clips are missing"):
        read_survey(folder)
