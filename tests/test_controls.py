"""Controls of clips: from the user's files and functions or by classical ways, into the cache, as the stock pipeline prepares them."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SIZE
from mogan.cli import main
from mogan.data import controls
from mogan.data.cache import control_path, open_cache
from mogan.data.clips import to_video
from mogan.data.video import read_frames, write_video
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.conditions import encode_control, pictures_of_references
from mogan.world.scenes import exact_flow, make_scene, owner

SHAPE = SIZE["frames"], SIZE["height"], SIZE["width"]


def noise(seed, frames=13):
    return np.random.default_rng(seed).integers(0, 256, (frames, *SHAPE[1:], 3), np.uint8)


@pytest.fixture
def videos(tmp_path):
    """Two videos, the second of two clips; their controls and masks, and two pictures of each."""
    for number, length in enumerate((13, 26)):
        base = noise(number, 1).repeat(length, 0)
        write_video(tmp_path / "videos" / "sub" / f"{number}.mp4", base, 16)
        write_video(tmp_path / "shown" / "sub" / f"{number}.mp4", noise(10 + number, 1).repeat(length, 0), 16)
        mask = np.zeros((length, *SHAPE[1:], 3), np.uint8)
        mask[:, 8:24, 16:32] = 255
        write_video(tmp_path / "masks" / "sub" / f"{number}.mask.mp4", mask, 16)
        for name in ("", ".1"):
            path = tmp_path / "pictures" / "sub" / f"{number}{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(20 + number + len(name), 1)[0]).save(path)
    return tmp_path / "videos"


def prepare(videos, vace, out, *more):
    arguments = ["prepare", videos, "--model", vace, "--out", out, "--caption", "a red circle", "--flow", "farneback"]
    return main([str(a) for a in [*arguments, "--device", "cpu", *more]])


def stored(out):
    return {p.stem: p.read_bytes() for p in (out / "controls").glob("*")}


def test_controls_of_files_are_encoded_beside_their_clips_and_only_once(videos, vace, tmp_path, capsys):
    out, more = tmp_path / "cache", ["--controls", tmp_path / "shown", "--references", tmp_path / "pictures"]
    assert prepare(videos, vace, out, *more) == 0
    cache = open_cache(out)
    assert (cache.has_controls, cache.references, len(cache)) == (True, 2, 3)
    vae = wan.load_vae(vace, wan.fast_dtype(torch.device("cpu")))
    for entry in cache.entries:
        only = range(entry["start"], entry["start"] + 13)
        read = read_frames(tmp_path / "shown" / entry["source"], fps=16, size=SHAPE[1:], only=only)
        frames = np.stack([frame.image_HWC for frame in read])
        stem = (tmp_path / "pictures" / entry["source"]).with_suffix("")
        pictures = [np.array(Image.open(f"{stem}{name}.png")) for name in ("", ".1")]
        references = pictures_of_references(pictures, *SHAPE[1:])[None]
        wanted = encode_control(vae, to_video(frames), torch.ones(1, 1, *SHAPE), references)[0]
        assert cache.control(entry["id"]).shape == (72, 6, 4, 6)
        torch.testing.assert_close(cache.control(entry["id"]), wanted, rtol=1e-4, atol=1e-5)
    before = stored(out)
    capsys.readouterr()
    assert prepare(videos, vace, out, *more) == 0
    assert "nothing to do" in capsys.readouterr().out
    # killed half way: what is missing is made again, byte for byte; so is what another file now gives
    control_path(out, cache.entries[0]["id"]).unlink()
    assert prepare(videos, vace, out, *more) == 0
    assert stored(out) == before
    write_video(tmp_path / "shown" / "sub" / "0.mp4", noise(99, 1).repeat(13, 0), 16)
    assert prepare(videos, vace, out, *more) == 0
    changed = [k for k, v in stored(out).items() if v != before[k]]
    assert changed == [cache.entries[0]["id"]]
    assert prepare(videos, vace, out, "--controls", "edges") == 2
    assert "was made with controls files, not edges" in capsys.readouterr().err


def test_controls_left_out_of_a_later_call_are_refused(videos, vace, tmp_path, capsys):
    assert prepare(videos, vace, tmp_path / "cache", "--controls", "edges") == 0
    marks = [entry["control"] for entry in open_cache(tmp_path / "cache").entries]
    assert prepare(videos, vace, tmp_path / "cache") == 2
    assert "was made with controls edges, not none" in capsys.readouterr().err
    assert [entry["control"] for entry in open_cache(tmp_path / "cache").entries] == marks


def test_controls_and_pictures_may_be_called_in_capitals(videos, vace, tmp_path):
    for folder, suffix in (("shown", ".mp4"), ("pictures", ".png")):
        for path in (tmp_path / folder / "sub").glob(f"*{suffix}"):
            path.rename(path.with_suffix(suffix.upper()))
    more = ["--controls", tmp_path / "shown", "--references", tmp_path / "pictures"]
    assert prepare(videos, vace, tmp_path / "cache", *more) == 0
    assert open_cache(tmp_path / "cache").references == 2


def test_pictures_that_would_be_left_out_are_named(videos, vace, tmp_path, capsys):
    pictures = sorted((tmp_path / "pictures" / "sub").glob("*.png"))
    stem = pictures[0].name.split(".")[0]
    shutil.copy(pictures[0], tmp_path / "pictures" / "sub" / f"{stem}.7.png")
    more = ["--controls", tmp_path / "shown", "--references", tmp_path / "pictures"]
    assert prepare(videos, vace, tmp_path / "cache", *more) == 2
    assert f"{stem}.7.png would be left out: pictures of a video are numbered .1, .2, .3" in capsys.readouterr().err


def test_two_videos_do_not_share_a_control(videos, vace, tmp_path, capsys):
    shutil.copy(videos / "sub" / "0.mp4", videos / "sub" / "0.mov")
    assert prepare(videos, vace, tmp_path / "cache", "--controls", tmp_path / "shown") == 2
    assert "two videos are called sub/0, and would have one control" in capsys.readouterr().err


def test_a_mask_alone_keeps_the_clip_but_for_what_is_to_be_made(videos, vace, tmp_path):
    assert prepare(videos, vace, tmp_path / "cache", "--controls", tmp_path / "masks") == 0
    cache = open_cache(tmp_path / "cache")
    control = cache.control(cache.entries[0]["id"])
    assert torch.equal(control[8:].amax(0), control[8])  # the box covers whole places
    assert control[8].nonzero().tolist() == [[f, y, x] for f in range(4) for y in (1, 2) for x in (2, 3)]
    vae = wan.load_vae(vace, wan.fast_dtype(torch.device("cpu")))
    read = read_frames(videos / cache.entries[0]["source"], fps=16, size=SHAPE[1:])
    frames = np.stack([frame.image_HWC for frame in read])
    mask = torch.zeros(1, 1, *SHAPE)
    mask[..., 8:24, 16:32] = 1
    grey = torch.where(mask > 0, to_video(np.full_like(frames, 128)), to_video(frames))
    torch.testing.assert_close(control[None], encode_control(vae, grey, mask), rtol=1e-4, atol=1e-5)


def test_shards_make_what_one_process_makes(videos, vace, tmp_path):
    assert prepare(videos, vace, tmp_path / "one", "--controls", "inpaint") == 0
    for shard in ("0/2", "1/2"):
        assert prepare(videos, vace, tmp_path / "two", "--controls", "inpaint", "--shard", shard) == 0
    assert prepare(videos, vace, tmp_path / "two", "--controls", "inpaint") == 0
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert len(stored(tmp_path / "two")) == 3


def test_the_worlds_exact_maps_are_controls_of_its_clips(vace, tmp_path, capsys):
    shown = tmp_path / "shown"
    command = ["lab", "render", "--out", tmp_path / "videos", "--clips", "6", "--motion", "rich", "--controls"]
    assert main([str(a) for a in [*command, tmp_path / "videos" / "x"]]) == 2
    assert "whose videos are all clips" in capsys.readouterr().err
    assert main([str(a) for a in [*command, shown]]) == 0
    several = 0
    for number in range(6):
        scene = make_scene(0, number, motion="rich")
        owners = np.stack([owner(scene, frame) for frame in range(17)])
        several += len(scene.sprites) > 1
        depth, mask = (
            np.stack([f.image_HWC for f in read_frames(shown / name, fps=16)])
            for name in (f"depth/{number:05d}.mp4", f"mask/{number:05d}.mask.mp4")
        )
        assert (np.abs(depth.mean(-1) - np.array([0, 128, 255])[owners + 1]) <= 3).all()
        assert ((mask.mean(-1) > 127.5) == (owners >= 0)).all()
        flow, _ = exact_flow(scene)
        drawn = next(read_frames(shown / "flow" / f"{number:05d}.mp4", fps=16)).image_HWC
        assert np.abs(drawn.astype(int) - controls.flow_picture(flow[0], 64 / 20)).mean() < 6
    assert several
    size = ["--height", "64", "--width", "64", "--frames", "17"]
    assert prepare(tmp_path / "videos", vace, tmp_path / "cache", "--controls", shown / "mask", *size) == 0
    cache = open_cache(tmp_path / "cache")
    places = cache.control(cache.entries[0]["id"])[8:]
    wanted = np.stack([owner(make_scene(0, 0, motion="rich"), frame) >= 0 for frame in (1, 5, 8, 11, 15)])
    pixels = places.view(8, 8, 5, 8, 8).permute(2, 3, 0, 4, 1).reshape(5, 64, 64)
    assert torch.equal(pixels, torch.from_numpy(wanted).float())


def test_classical_controls():
    frames = noise(0)
    shown, mask = controls.nothing(frames, "a")
    assert mask.all()
    assert (shown == 128).all()
    shown, mask = controls.inpaint(frames, "a")
    assert mask.mean() == pytest.approx(0.25)
    assert (shown[mask] == 128).all()  # nothing of what is to be made is told
    assert (shown[~mask] == frames[~mask]).all()
    assert (controls.inpaint(frames, "b").mask_FHW != mask).any()
    assert (controls.inpaint(frames, "a").mask_FHW == mask).all()
    shown, mask = controls.extend(noise(0, 33), "a")
    assert [int(m.all()) for m in mask] == [0] * 9 + [1] * 24
    assert (shown[9:] == 128).all()
    square = np.zeros_like(frames)
    square[:, 8:24, 16:32] = 255
    shown, mask = controls.edges(square, "a")
    assert mask.all()
    assert (shown[:, 10:22, 20:28] == 0).all()
    assert shown[:, 8:24, 15:33].max() == 255

    def right(video):
        flow = torch.zeros(1, 2, video.shape[2] - 1, *video.shape[3:])
        flow[:, 0] = 1000.0
        return flow

    shown, mask = controls.flow_shown(right)(frames, "a")
    assert shown.shape == frames.shape
    assert mask.all()
    assert (shown == shown[0, 0, 0]).all()
    assert shown[0, 0, 0, 0] > 200 > shown[0, 0, 0, 1]  # Baker's wheel: to the right is red


def test_a_function_of_the_users_makes_controls_and_is_told_what_is_wrong_with_them(
    videos, vace, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mine.py").write_text(
        "def dark(frames):\n    return frames // 2, frames.mean(-1) > 100\n\ndef bad(frames):\n    return frames[1:]\n"
        "\ndef fails(frames):\n    return frames @ 'x'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    assert prepare(videos, vace, tmp_path / "cache", "--controls", "mine:dark") == 0
    assert open_cache(tmp_path / "cache").facts["controls"] == "mine:dark"
    before = stored(tmp_path / "cache")
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("frames // 2", "frames // 4"))
    sys.modules.pop("mine", None)
    assert prepare(videos, vace, tmp_path / "cache", "--controls", "mine:dark") == 0
    after = stored(tmp_path / "cache")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)  # the function has changed
    assert prepare(videos, vace, tmp_path / "other", "--controls", "mine:bad") == 2
    assert "mine:bad returns uint8 (12, 32, 48, 3) for frames uint8 (13, 32, 48, 3)" in capsys.readouterr().err
    assert prepare(videos, vace, tmp_path / "failed", "--controls", "mine:fails") == 2
    said = capsys.readouterr().err
    assert "mine:fails failed\n" in said
    assert "return frames @ 'x'" in said
    assert "controls.py" not in said
    assert prepare(videos, vace, tmp_path / "third", "--controls", "mine:none") == 2
    assert "has no function 'none'" in capsys.readouterr().err


def test_what_does_not_fit_is_one_sentence_before_anything_is_made(videos, vace, family, tmp_path, capsys):
    def refused(*more, model=vace, source=videos):
        assert prepare(source, model, tmp_path / "out", *more) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*")), said
        return said

    assert "reads no controls" in refused("--controls", "edges", model=family / "teacher")
    assert "is not there: give nothing, inpaint, extend, edges, flow, module:function or a folder" in refused(
        "--controls", "depht"
    )
    assert "--references stand beside a control" in refused("--references", tmp_path / "pictures")
    shutil.copytree(tmp_path / "shown", videos / "inside")
    assert "whose videos are all clips" in refused("--controls", videos / "inside")
    shutil.rmtree(videos / "inside")
    (tmp_path / "shown" / "sub" / "0.mp4").unlink()
    assert "has no control of sub/0.mp4" in refused("--controls", tmp_path / "shown")
    (tmp_path / "pictures" / "sub" / "1.1.png").unlink()
    pictures = ["--controls", "nothing", "--references", tmp_path / "pictures"]
    assert "the same number of reference pictures; sub/1.mp4 has 1 and sub/0.mp4 has 2" in refused(*pictures)


def test_a_control_shorter_than_its_video_is_a_sentence(videos, vace, tmp_path, capsys):
    write_video(tmp_path / "shown" / "sub" / "1.mp4", noise(1, 1).repeat(20, 0), 16)
    assert prepare(videos, vace, tmp_path / "out", "--controls", tmp_path / "shown") == 2
    said = capsys.readouterr().err
    assert "sub/1.mp4 has no frames for the clip of sub/1.mp4 from 0.81 s on: it must be as long as its video" in said


def test_a_cache_that_lost_a_control_is_told_what_to_do(videos, vace, tmp_path):
    assert prepare(videos, vace, tmp_path / "cache", "--controls", "extend") == 0
    facts = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert (facts["controls"], facts["references"]) == ("extend", 0)
    next((tmp_path / "cache" / "controls").iterdir()).unlink()
    with pytest.raises(UserError, match="lacks 1 controls"):
        open_cache(tmp_path / "cache")
