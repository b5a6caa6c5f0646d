"""The data path with stand-ins for the networks: a latent is an average, an embedding a length, flow a difference."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mogan.cli import main
from mogan.data.batches import draw_batch
from mogan.data.cache import open_cache
from mogan.data.choice import entries as entries_of
from mogan.data.choice import vbench_threshold
from mogan.data.clips import clips_of, motion_of, shots
from mogan.data.listing import Source, scan
from mogan.data.measure import file_sha
from mogan.data.prepare_clips import prepare_clips
from mogan.data.prepare_prompts import prepare_prompts
from mogan.data.stream import picture
from mogan.data.video import Frame, read_frames, write_video
from mogan.errors import UserError
from mogan.models.discriminator import PROMPT
from mogan.world import scenes as world
from mogan.world.render import render_folder
from test_video import broken, numbered


class Geometry(NamedTuple):
    """As ``mogan.models.wan.Geometry``, without what that module imports: the processes that are killed start sooner."""

    fps: int
    height: int
    width: int
    frames: int


GEOMETRY = Geometry(fps=16, height=32, width=32, frames=9)
FACTS = {"model": "test", "vae": "v1", "text_encoder": "t1", "flow": "difference"}


def encode_video(video_BCFHW):
    assert video_BCFHW.shape[1:] == (3, 9, 32, 32)
    assert video_BCFHW.abs().max() <= 1
    return F.avg_pool3d(video_BCFHW, (1, 8, 8))[:, :, ::4].contiguous()


def encode_text(prompts):
    return [torch.full((len(p) + 1, 4), float(len(p))) for p in prompts]


def difference_flow(video_BCFHW):
    """Not flow, but grows with motion: the change of brightness, as if all of it were sideways."""
    change = (video_BCFHW[:, :, 1:] - video_BCFHW[:, :, :-1]).abs().mean(1, keepdim=True)
    return torch.cat([10 * change, torch.zeros_like(change)], 1)


def run(source, out, **how):
    how = {
        "geometry": GEOMETRY,
        "fingerprints": FACTS,
        "encode_video": encode_video,
        "encode_text": encode_text,
        "estimate_flow": difference_flow,
        "caption": "default",
    } | how
    return prepare_clips(source, out, **how)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    """Every file of a cache but the pictures and time stamps: name -> bytes."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".png":
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def textured(seed, count, height=48, width=64, step=1.0):
    """A picture of its own per seed, that slides sideways by ``step`` pixels per frame."""
    rng = np.random.default_rng(seed)
    big = Image.fromarray(rng.integers(0, 255, (6, 40, 3)).astype(np.uint8)).resize((width * 5, height), Image.BICUBIC)
    picture = np.asarray(big)
    return np.stack([picture[:, int(i * step) : int(i * step) + width] for i in range(count)])


# ---------------------------------------------------------------------------------------------- captions


def empty_videos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def captions(folder, default=None):
    return {s.name: s.caption for s in scan(folder, default)}


@pytest.mark.parametrize("file_column", ["file_name", "video", "video_path", "path"])
@pytest.mark.parametrize("caption_column", ["caption", "text", "prompt"])
def test_metadata_columns_go_by_many_names(tmp_path, file_column, caption_column):
    empty_videos(tmp_path, "clips/a.mp4", "b.webm")
    rows = [
        {file_column: "clips/a.mp4", caption_column: "one, two"},
        {file_column: "./b.webm", caption_column: "zwölf"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    assert captions(tmp_path) == {"clips/a.mp4": "one, two", "b.webm": "zwölf"}
    (tmp_path / "metadata.jsonl").unlink()
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, [file_column, caption_column])
        writer.writeheader()
        writer.writerows(rows)
    assert captions(tmp_path) == {"clips/a.mp4": "one, two", "b.webm": "zwölf"}


def test_captions_beside_the_video_and_a_default(tmp_path):
    empty_videos(tmp_path, "a.mp4", "sub/a.mp4", "sub/ä 鹦鹉.MOV", "c.gif")
    (tmp_path / "a.txt").write_text(" outer \n")
    (tmp_path / "sub/a.txt").write_text("inner")
    (tmp_path / "sub/ä 鹦鹉.txt").write_text("a parrot 鹦鹉", encoding="utf-8")
    assert captions(tmp_path) == {
        "a.mp4": "outer",
        "sub/a.mp4": "inner",
        "sub/ä 鹦鹉.MOV": "a parrot 鹦鹉",
        "c.gif": None,
    }
    assert captions(tmp_path, "a video")["c.gif"] == "a video"
    problems = {s.name: s.problem for s in scan(tmp_path)}
    assert "no caption" in problems.pop("c.gif")
    assert set(problems.values()) == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "a.mp4", "caption": "x"}\n{"file_name": ', "line 2 is not JSON"),
        ('["a.mp4", "x"]', "line 1 is not a JSON object"),
        ('{"name": "a.mp4", "caption": "x"}', "line 1 needs the columns file_name"),
        ('{"file_name": "a.mp4", "caption": "x"}\n{"path": "a.mp4", "text": "y"}', "line 2 names a.mp4 a second time"),
    ],
)
def test_metadata_that_cannot_be_meant_names_its_line(tmp_path, text, message):
    empty_videos(tmp_path, "a.mp4")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        scan(tmp_path)


def test_a_folder_without_videos_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no video"):
        scan(tmp_path)
    with pytest.raises(UserError, match="is not there"):
        scan(tmp_path / "nowhere")
    (tmp_path / "a.odt").touch()
    with pytest.raises(UserError, match="is not a folder of videos"):
        scan(tmp_path / "a.odt")


# ---------------------------------------------------------------------------------------------- shots


def frames_of(*parts):
    return [Frame(i, i / 16, image) for i, image in enumerate(np.concatenate(parts))]


def starts(frames):
    return [frame.number for frame, first in shots(frames) if first]


def test_shots_are_split_where_the_picture_changes():
    assert starts(frames_of(textured(0, 30), textured(1, 5), textured(2, 70))) == [0, 30, 35]
    assert starts(frames_of(textured(0, 3))) == [0]
    assert starts([]) == []


def test_a_cut_blurred_by_rate_conversion_is_one_cut():
    one, other = textured(0, 20), textured(1, 20)
    mixture = ((one[-1:].astype(int) + other[:1]) // 2).astype(np.uint8)
    assert starts(frames_of(one, mixture, other)) == [0, 20]


@pytest.mark.parametrize("step", [0.0, 1.0, 6.0])
def test_motion_flashes_and_fades_are_no_cuts(step):
    clip = textured(3, 40, step=step)
    assert starts(frames_of(clip)) == [0]
    flash = clip.copy()
    flash[20] = 255
    assert starts(frames_of(flash)) == [0]
    fade = (clip * np.linspace(1, 0, 40)[:, None, None, None]).astype(np.uint8)
    assert starts(frames_of(fade)) == [0]


def test_a_burst_of_quick_motion_is_no_cut():
    offsets = np.cumsum([0] * 20 + [14, 25, 25, 14] + [0] * 20)
    picture = textured(4, 2, width=256)[0]
    clip = np.stack([picture[:, o : o + 64] for o in offsets])
    assert starts(frames_of(clip)) == [0]


@pytest.mark.parametrize("times", [2, 3, 4])
def test_frames_that_a_slow_video_repeats_make_no_cuts(times):
    """Differences of nothing between them would make every other seem large."""
    offsets = np.cumsum([0] + [3, 5, 8, 5, 3, 6, 9, 7] * 4)
    picture = textured(4, 2, width=320)[0]
    moving, other = [picture[:, o : o + 64] for o in offsets], list(textured(5, 12))
    assert starts([Frame(i, i / 16, image) for i, image in enumerate(moving)]) == [0]
    shown = [image for image in (*moving, *other) for _ in range(times)]
    assert starts([Frame(i, i / 16, image) for i, image in enumerate(shown)]) == [0, times * len(moving)]


def test_clips_never_cross_a_cut_and_short_shots_are_reported():
    parts = clips_of(frames_of(textured(0, 20), textured(1, 5), textured(2, 9)), 9)
    found = [(type(p).__name__, p.start) for p in parts]
    assert found == [("Clip", 0), ("Clip", 9), ("ShortShot", 20), ("Clip", 25)]


def test_the_lab_world_is_split_where_scenes_meet():
    scenes = [world.render(world.make_scene(0, i, motion="rich")) for i in range(12)]
    assert starts(frames_of(*scenes)) == [17 * i for i in range(12)]


def test_frames_are_handed_on_soon():
    taken = []

    def source():
        for frame in frames_of(textured(0, 200, step=0.5)):
            taken.append(frame.number)
            yield frame

    longest = max(len(taken) - given for given, _ in enumerate(shots(source()), 1))
    assert longest < 32


# ---------------------------------------------------------------------------------------------- motion


def test_motion_is_the_mean_of_the_fastest_twentieth():
    flow = torch.zeros(1, 2, 3, 10, 20)
    flow[:, 0, :, 0, :10] = 3.0  # 10 of 200 pixels, the fastest 5 %
    flow[:, 1, :, 0, :10] = 4.0
    flow[:, :, :, 5] = 1.0
    assert motion_of(np.zeros((4, 10, 20, 3), np.uint8), lambda video: flow) == pytest.approx(5.0)


def test_flow_that_is_no_number_is_told():
    """Counted as motion it would switch the choice by quantile off."""
    flow = torch.full((1, 2, 3, 10, 20), torch.nan)
    with pytest.raises(UserError, match="not finite"):
        motion_of(np.zeros((4, 10, 20, 3), np.uint8), lambda video: flow)


def test_motion_rich_keeps_what_moves_and_says_what_was_dropped(tmp_path):
    (tmp_path / "v").mkdir()
    for i, step in enumerate([0.0, 0.5, 1.0, 2.0]):
        write_video(tmp_path / f"v/{i}.mp4", textured(i, 9, step=step), 16)
    everything = run(tmp_path / "v", tmp_path / "c")
    assert (everything.kept, everything.threshold) == (4, None)
    motions = {e["source"]: e["motion"] for e in lines(tmp_path / "c/index.jsonl")}
    assert motions["0.mp4"] < 0.2 < motions["1.mp4"]

    middle = sorted(motions.values())[2]
    rich = run(tmp_path / "v", tmp_path / "c", min_motion=middle)
    assert (rich.kept, rich.dropped, rich.encoded) == (2, 2, 0)  # choosing again computes nothing
    dropped = lines(tmp_path / "c/dropped.jsonl")
    assert {d["source"] for d in dropped} == {s for s, m in motions.items() if m < middle}
    assert all("px/frame, less than" in d["reason"] for d in dropped)
    assert Image.open(tmp_path / "c/motion.png").width > 100

    assert run(tmp_path / "v", tmp_path / "c", motion_quantile=0.7).kept == 1
    assert run(tmp_path / "v", tmp_path / "c", motion_quantile=0.0).kept == 4
    assert run(tmp_path / "v", tmp_path / "c", min_motion=middle, motion_quantile=0.1).kept == 2


def test_an_impossible_threshold_says_how_much_the_clips_move_and_keeps_the_old_index(tmp_path):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 9), 16)
    run(tmp_path / "v", tmp_path / "c")
    with pytest.raises(UserError, match=r"/c keeps those it has\); the liveliest moves"):
        run(tmp_path / "v", tmp_path / "c", min_motion=1e6)
    assert len(open_cache(tmp_path / "c")) == 1
    assert lines(tmp_path / "c/dropped.jsonl") == []  # of the list that stands
    with pytest.raises(UserError, match=r"see .*/new/dropped\.jsonl"):
        run(tmp_path / "v", tmp_path / "new", min_motion=1e6)
    assert [row["source"] for row in lines(tmp_path / "new/dropped.jsonl")] == ["a.mp4"]


# ---------------------------------------------------------------------------------------------- the whole path


def test_broken_files_are_named_and_the_others_are_unaffected(tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    bad = [name for name in broken(folder) if (folder / name).exists()]
    Image.fromarray(numbered(1)[0]).save(folder / "one.gif")
    write_video(folder / "odd.mp4", numbered(20, 50, 90), 16)  # 90 x 50: neither a square nor a multiple of 16
    images = [Image.fromarray(f) for f in numbered(12, 33, 47)]
    images[0].save(folder / "odd.gif", save_all=True, append_images=images[1:], duration=60)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.mp4", "caption": "x"}) + "\n")
    summary = run(folder, tmp_path / "c")
    skipped = {row["source"]: row["reason"] for row in lines(tmp_path / "c/skipped.jsonl")}
    assert set(skipped) == {*bad, "gone.mp4"}
    assert "0 bytes" in skipped["zero.mp4"]
    assert "only sound" in skipped["sound.mp4"]
    assert "not there" in skipped["gone.mp4"]
    assert {row["source"]: row["reason"] for row in lines(tmp_path / "c/dropped.jsonl")} == {
        "one.gif": "shot too short: 2 of 9 frames"
    }
    kept = [e["source"] for e in lines(tmp_path / "c/index.jsonl")]
    assert kept == ["odd.gif", "odd.mp4", "odd.mp4", *["whole.mp4"] * 7]
    assert summary.skipped == len(skipped)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy2(folder / "whole.mp4", alone)
    run(alone, tmp_path / "d")
    for path in (tmp_path / "d/clips").iterdir():
        assert path.read_bytes() == (tmp_path / "c/clips" / path.name).read_bytes()


def test_a_file_that_was_broken_is_tried_again_and_the_rest_is_not(tmp_path, monkeypatch):
    folder = tmp_path / "v"
    folder.mkdir()
    write_video(folder / "a.mp4", textured(0, 9), 16)
    (folder / "b.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    assert run(folder, tmp_path / "c").kept == 1
    write_video(folder / "b.mp4", textured(1, 9), 16)
    measured = []
    again = run(folder, tmp_path / "c", estimate_flow=lambda v: (measured.append(1), difference_flow(v))[1])
    assert (again.kept, again.skipped, again.encoded, len(measured)) == (2, 0, 1, 1)
    monkeypatch.setattr("mogan.data.measure.read_frames", None)  # nothing is opened a third time
    monkeypatch.setattr("mogan.data.clips.read_frames", None)
    third = run(folder, tmp_path / "c", encode_video=None, encode_text=None, estimate_flow=None)
    assert (third.kept, third.encoded) == (2, 0)


def test_clips_of_another_reader_are_encoded_anew():
    """Their file is the same, and their pictures need not be."""
    source = Source(Path("a.mp4"), "a.mp4", "a cat")
    clip = {"start": 0, "start_s": 0.0, "motion": 1.0, "repeats": 0}
    ids = [entries_of([source], [{"sha": "1", "reader": reader, "clips": [clip]}])[0]["id"] for reader in (1, 2, 3, 4)]
    assert ids[0] == ids[1]  # these wrote what is out there, where ids say nothing of a reader
    assert len(set(ids)) == 3
    assert [len(clip_id.split("-")[-2]) for clip_id in ids] == [8, 8, 16, 16]


def test_a_changed_video_is_measured_and_encoded_again(tmp_path):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 9), 16)
    run(tmp_path / "v", tmp_path / "c")
    (before,) = lines(tmp_path / "c/index.jsonl")
    write_video(tmp_path / "v/a.mp4", textured(1, 9, step=2), 16)
    assert run(tmp_path / "v", tmp_path / "c").encoded == 1
    (after,) = lines(tmp_path / "c/index.jsonl")
    assert before["id"] != after["id"]
    os.utime(tmp_path / "v/a.mp4")  # touched, not changed
    assert run(tmp_path / "v", tmp_path / "c").encoded == 0


def test_a_video_that_changes_between_the_two_passes_is_named(tmp_path, monkeypatch):
    write_video(tmp_path / "v" / "a.mp4", textured(0, 9), 16)

    def replaced(path):
        write_video(path, textured(1, 9, step=2), 16)
        return file_sha(path)

    monkeypatch.setattr("mogan.data.encode.file_sha", replaced)
    with pytest.raises(UserError, match=r"a.mp4 changed while it was read \(its contents are others\)"):
        run(tmp_path / "v", tmp_path / "c")
    monkeypatch.undo()
    assert run(tmp_path / "v", tmp_path / "c").encoded == 1


def test_touched_videos_are_measured_as_they_were_by_shards_too(tmp_path):
    for name in ("a", "b"):
        write_video(tmp_path / "v" / f"{name}.mp4", textured(ord(name), 9), 16)
    words = {"motion_quantile": 0.5, "shard": "0/1"}
    run(tmp_path / "v", tmp_path / "c", **words)
    for name in ("a", "b"):
        os.utime(tmp_path / "v" / f"{name}.mp4")
    (note,) = run(tmp_path / "v", tmp_path / "c", **words).notes
    assert "1 clips of shard 0/1" in note


def test_a_video_too_oblong_to_be_scaled_does_not_stop_the_others(tmp_path, monkeypatch):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 9), 16)
    write_video(tmp_path / "v/b.mkv", np.zeros((9, 16384, 16, 3), np.uint8), 16)
    with pytest.raises(UserError, match="16 x 16384 cannot be scaled"):
        next(read_frames(tmp_path / "v/b.mkv", size=(480, 832)))

    def twice_as_large(reformatter, shown, size):
        if shown.frame.height > 1000:
            raise UserError("a picture of 16 x 16384 cannot be scaled")
        return picture(reformatter, shown, size)

    monkeypatch.setattr("mogan.data.video.picture", twice_as_large)  # at 32 x 32 it can
    assert run(tmp_path / "v", tmp_path / "c").kept == 1
    (skipped,) = lines(tmp_path / "c/skipped.jsonl")
    assert skipped == {"source": "b.mkv", "reason": "a picture of 16 x 16384 cannot be scaled"}


def test_files_of_one_name_in_two_folders_and_unicode_names_stay_apart(tmp_path):
    for seed, name in enumerate(["x/clip.mp4", "y/clip.mp4", "y/Ä 鹦鹉.mp4", "Ä/鹦鹉.mp4"]):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "v" / name, textured(seed, 9), 16)
    run(tmp_path / "v", tmp_path / "c")
    entries = lines(tmp_path / "c/index.jsonl")
    assert len({e["id"] for e in entries}) == 4
    assert all(e["id"].isascii() for e in entries)
    cache = open_cache(tmp_path / "c")
    latents = [cache.latent(e["id"]) for e in entries]
    assert all((a - b).abs().max() > 0.05 for i, a in enumerate(latents) for b in latents[:i])


def test_latents_are_those_of_the_clip_they_are_named_for(tmp_path):
    (tmp_path / "v").mkdir()
    clip = np.concatenate([textured(0, 25), textured(1, 4), textured(2, 12)])
    write_video(tmp_path / "v/a.mp4", clip, 16, crf=4)
    run(tmp_path / "v", tmp_path / "c")
    entries = lines(tmp_path / "c/index.jsonl")
    assert [e["start"] for e in entries] == [0, 9, 29]
    cache = open_cache(tmp_path / "c")
    for entry in entries:
        assert entry["start_s"] == pytest.approx(entry["start"] / 16, abs=1e-3)
        shown = torch.tensor(clip[entry["start"] : entry["start"] + 9, :, 8:56].copy())  # the centre square
        small = F.interpolate(shown.permute(0, 3, 1, 2).float(), (4, 4), mode="area").transpose(0, 1)[:, ::4]
        # 64 x 48 shrinks to 43 x 32, so the cut may lie half a pixel off; other clips differ by 0.5 and more
        assert (cache.latent(entry["id"]) - (small / 127.5 - 1)).abs().max() < 0.15


def test_a_slow_source_is_counted_and_mentioned(tmp_path):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 8), 8)
    write_video(tmp_path / "v/b.mp4", textured(0, 9, 16, 16), 16)
    summary = run(tmp_path / "v", tmp_path / "c")
    assert [e["repeats"] for e in lines(tmp_path / "c/index.jsonl")] == [4, 0]
    assert any("a.mp4" in n and "repeated" in n for n in summary.notes)
    assert any("b.mp4" in n and "enlarged" in n for n in summary.notes)


def test_prompts_are_stored_once_with_the_empty_one_and_the_extra_ones(tmp_path):
    (tmp_path / "v").mkdir()
    for i, caption in enumerate(["same", "same", "other"]):
        write_video(tmp_path / f"v/{i}.mp4", textured(i, 9), 16)
        (tmp_path / f"v/{i}.txt").write_text(caption)
    run(tmp_path / "v", tmp_path / "c", extra_prompts=["good motion"])
    names = {hashlib.sha256(p.encode()).hexdigest()[:32] for p in ["same", "other", "", "good motion"]}
    assert {p.stem for p in (tmp_path / "c/text").iterdir()} == names
    cache = open_cache(tmp_path / "c")
    assert cache.text("").shape == (1, 4)
    assert draw_batch(cache, seed=0, iteration=0, update=0, size=3, want=("latent",)).latent_BCFHW.shape[0] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"geometry": Geometry(8, 32, 32, 9)}, "fps 16, not 8"),
        ({"geometry": Geometry(16, 32, 48, 9)}, "width 32, not 48"),
        ({"geometry": Geometry(16, 32, 32, 13)}, "frames 9, not 13"),
        ({"fingerprints": FACTS | {"vae": "v2"}}, "vae v1, not v2"),
        ({"fingerprints": FACTS | {"flow": "other"}}, "flow difference, not other"),
    ],
)
def test_other_settings_do_not_enter_an_existing_cache(tmp_path, change, message):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 13), 16)
    run(tmp_path / "v", tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "v", tmp_path / "c", **change)
    assert contents(tmp_path / "c") == before
    run(tmp_path / "v", tmp_path / "c", fingerprints=FACTS | {"model": "the same weights elsewhere"})


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 9), 16)
    with pytest.raises(UserError, match="not empty and not a cache"):
        run(tmp_path / "v", tmp_path / "v")


def test_a_file_of_prompts_is_a_cache_too(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \na cat\n鹦鹉\n", encoding="utf-8")
    assert prepare_prompts(tmp_path / "p.txt", tmp_path / "c", {"text_encoder": "t1"}, encode_text, ["more"]) == 3
    cache = open_cache(tmp_path / "c")
    assert [e["caption"] for e in cache.entries] == ["a cat", "a dog", "鹦鹉"]
    assert not cache.has_clips
    assert draw_batch(cache, seed=0, iteration=0, update=0, size=2).latent_BCFHW is None
    cache.text("")
    cache.text("more")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no prompt"):
        prepare_prompts(tmp_path / "empty.txt", tmp_path / "d", {}, encode_text)


def test_a_mistake_in_a_network_is_not_taken_for_a_broken_file(tmp_path):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 90), 16)

    def fails(video):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "v", tmp_path / "c", estimate_flow=fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "v", tmp_path / "c", encode_video=fails)


def test_the_number_of_workers_changes_nothing(tmp_path):
    render_folder(tmp_path / "v", 6, "rich")
    for workers in (1, 3):
        run(tmp_path / "v", tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize("choice", [{}, {"min_motion": 0.5}, {"motion_quantile": 0.5}])
def test_shards_share_the_work_and_the_command_without_one_lists_the_clips(tmp_path, monkeypatch, choice):
    render_folder(tmp_path / "v", 7)
    (tmp_path / "v/broken.mp4").write_bytes(b"nothing")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tmp_path / "v", whole, extra_prompts=("extra",), **choice)
    how = {"extra_prompts": ("extra",), **choice}
    rounds = 2 if "motion_quantile" in choice else 1
    notes = [run(tmp_path / "v", parts, shard=f"{i}/3", **how).notes[-1] for _ in range(rounds) for i in range(3)]
    assert "after all shards, the command without --shard lists them" in notes[-1]
    if rounds == 2:
        assert "5 videos of others are not yet: run every shard once more" in notes[0]
    with pytest.raises(UserError, match="not finished"):
        open_cache(parts)
    fails = {name: lambda x: pytest.fail("done again") for name in ("encode_video", "encode_text")}
    monkeypatch.setattr("mogan.data.measure.motion_of", lambda *a: pytest.fail("measured again"))
    assert run(tmp_path / "v", parts, **how, **fails).encoded == 0
    assert contents(parts) == contents(whole)


def test_a_shard_that_is_none_is_one_sentence(tmp_path):
    render_folder(tmp_path / "v", 2)
    for shard in ("2/2", "a/2", "1", "-1/2"):
        with pytest.raises(UserError, match="--shard takes i/n"):
            run(tmp_path / "v", tmp_path / "c", shard=shard)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_prepares_videos_and_prompts_with_real_networks(tmp_path, family, capsys):
    from mogan.models.wan import fingerprint

    render_folder(tmp_path / "v", 4, "rich")
    model, flow = ["--model", str(family / "teacher")], ["--flow", str(family / "raft")]
    command = ["prepare", str(tmp_path / "v"), "--out", str(tmp_path / "c"), *model, *flow]
    assert main(command) == 0
    assert "4 encoded now" in capsys.readouterr().out
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    rows = (tmp_path / "v" / "metadata.jsonl").read_text().splitlines()
    words = [json.dumps(json.loads(row) | {"caption": "a mended caption"}) for row in rows]
    (tmp_path / "v" / "metadata.jsonl").write_text("\n".join(words))
    assert main(command) == 0
    assert "all were there already, their list or the embedded prompts are new" in capsys.readouterr().out
    (tmp_path / "v" / "metadata.jsonl").write_text("\n".join(rows))
    assert main([*command, "--shard", "1/2"]) == 0
    assert "2 clips of shard 1/2 are in" in capsys.readouterr().out
    cache = open_cache(tmp_path / "c")
    cache.require(vae=fingerprint(family / "teacher", "vae"), fps=16, height=32, width=32, frames=13)
    batch = draw_batch(cache, seed=0, iteration=0, update=0, size=2, want=("latent",))
    assert batch.latent_BCFHW.shape == (2, 4, 4, 4, 4)
    assert batch.text[0].shape[1] == 64
    cache.text(PROMPT)

    assert main([*command[:-1], "nowhere"]) == 2
    assert "no flow network at" in capsys.readouterr().err
    assert main([*command, "--frames", "12"]) == 2
    assert "4 k + 1" in capsys.readouterr().err
    assert main([*command, "--frames", "17"]) == 2
    assert "frames 13, not 17" in capsys.readouterr().err
    assert main([*command, "--min-motion", "1"]) == 2
    assert "add --motion-rich" in capsys.readouterr().err

    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    assert main(["prepare", str(tmp_path / "p.txt"), "--out", str(tmp_path / "p"), *model]) == 0
    assert len(open_cache(tmp_path / "p")) == 2


def test_videos_without_captions_are_kept_where_they_are_asked_for(tmp_path, capsys):
    render_folder(tmp_path / "v", 4, "rich")
    rows = (tmp_path / "v/metadata.jsonl").read_text().splitlines()
    (tmp_path / "v/metadata.jsonl").write_text(rows[0] + "\n")
    assert run(tmp_path / "v", tmp_path / "some", caption=None).kept == 1
    assert "--uncaptioned" in (tmp_path / "some/skipped.jsonl").read_text()
    summary = run(tmp_path / "v", tmp_path / "all", caption=None, uncaptioned=True)
    assert (summary.kept, summary.skipped) == (4, 0)
    assert "3 clips have no caption" in capsys.readouterr().out
    entries = open_cache(tmp_path / "all").entries
    captions = [entry["caption"] for entry in entries]
    assert captions.count(None) == 3
    assert json.loads(rows[0])["caption"] in captions
    assert len(list((tmp_path / "all/text").iterdir())) == len(list((tmp_path / "some/text").iterdir()))


def test_the_default_threshold_is_vbenchs():
    assert vbench_threshold(Geometry(8, 256, 256, 9)) == 6.0  # where VBench states it
    assert vbench_threshold(Geometry(16, 64, 64, 17)) == 0.75
    assert vbench_threshold(Geometry(16, 480, 832, 81)) == pytest.approx(5.625)


# ---------------------------------------------------------------------------------------------- killed


def slow_run(source, out):
    """For the process that is killed: every network takes its time."""

    def late(function):
        return lambda x: (time.sleep(0.05), function(x))[1]

    run(Path(source), Path(out), encode_video=late(encode_video), estimate_flow=late(difference_flow))


def killed_when(source, out, ready):
    command = [sys.executable, "-c", f"import test_prepare; test_prepare.slow_run({str(source)!r}, {str(out)!r})"]
    where = {"cwd": Path(__file__).parent, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(command, **where, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    limit = time.time() + 300  # a busy machine takes its time to import torch
    while not ready() and process.poll() is None and time.time() < limit:
        time.sleep(0.005)
    assert process.poll() is None, "the process ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_twice_and_run_again_equals_a_run_that_was_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("mogan.data.measure.RENEW", 1)
    render_folder(tmp_path / "v", 8, "rich")
    write_video(tmp_path / "v/long.mp4", textured(0, 9 * 24, step=0.5), 16)  # 24 clips in one file
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    killed_when(tmp_path / "v", parts, lambda: len(list((parts / "sources").glob("*.json"))) >= 4)
    assert not (parts / "index.jsonl").exists()
    killed_when(tmp_path / "v", parts, lambda: len(list((parts / "clips").glob("[!.]*.safetensors"))) >= 5)
    finished = {p: p.stat().st_mtime_ns for p in (parts / "clips").glob("[!.]*.safetensors")}
    assert finished
    with pytest.raises(UserError, match="not finished"):
        open_cache(parts)
    run(tmp_path / "v", whole)
    summary = run(tmp_path / "v", parts)
    assert summary.encoded == summary.kept - len(finished)
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())
    assert contents(parts) == contents(whole)
    next(iter(finished)).write_bytes(b"")  # power was lost before the disk had it
    assert run(tmp_path / "v", parts).encoded == 1
    assert contents(parts) == contents(whole)
