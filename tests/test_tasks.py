"""Lists of tasks: clips made under the controls that rows name, and held to them; what following is, on the world's own clips."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from conftest import CAPTIONS
from mogan.cli import main
from mogan.data.controls import FASTEST
from mogan.data.tasks import Task, read_tasks
from mogan.data.video import flow_of_picture, flow_picture, read_video, write_video
from mogan.errors import UserError
from mogan.evaluation.evaluate import evaluate
from mogan.world.captions import parse_caption
from mogan.world.following import depth_followed, flow_followed, mask_followed
from mogan.world.scenes import SIZE, exact_flow, make_scene, owner, render
from test_vace_runs import prepared as prepared

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*words):
    return main([str(word) for word in words])


# ---------------------------------------------------------------------------------------------- following, in the world


def maps(scene):
    owners = np.stack([owner(scene, frame) for frame in range(scene.frames)])
    depth = np.array([0, 128, 255], np.uint8)[np.minimum(owners, 1) + 1]
    return owners >= 0, np.repeat(depth[..., None], 3, -1), exact_flow(scene)[0]


SCENES = [make_scene(32, index, motion="rich") for index in range(12)]


def followed(scene, shown):
    """Of a scene's clip, held to the maps of another."""
    mask, depth, flow = maps(shown)
    said, clip = parse_caption(scene.caption), render(scene)
    control = flow_of_picture(flow_picture(flow, SIZE / FASTEST), SIZE / FASTEST)
    return mask_followed(clip, said, mask) | depth_followed(clip, said, depth) | flow_followed(maps(scene)[2], control)


def test_the_worlds_clips_follow_their_own_maps_and_not_those_of_others():
    own = [followed(scene, scene) for scene in SCENES]
    other = [followed(one, two) for one, two in zip(SCENES, SCENES[1:] + SCENES[:1], strict=True)]
    for name, least in {"mask": 0.95, "depth": 0.9, "flow": 0.95}.items():
        assert np.mean([values[name] for values in own]) > least, name
        assert np.mean([values[name] for values in other]) < 0.15, name
    assert max(values["flow_error"] for values in own) < 0.15
    assert min(values["flow_error"] for values in other) > 0.5


def hidden(scene):
    """Pixels at which it matters which thing is in front."""
    turned = replace(scene, sprites=scene.sprites[::-1])
    return sum((owner(scene, f) == owner(turned, f)).sum() - (owner(scene, f) < 0).sum() for f in range(0, 17, 4))


def test_which_thing_is_in_front_is_told_where_they_touch():
    pairs = [s for i in range(40) if len((s := make_scene(32, i, motion="rich")).sprites) == 2]
    scene = max(pairs, key=hidden)
    mask, depth, _ = maps(scene)
    said = parse_caption(scene.caption)
    assert depth_followed(render(scene), said, depth)["order"] > 0.95
    turned = replace(scene, sprites=scene.sprites[::-1])  # the other thing lies in front
    assert depth_followed(render(turned), said, depth)["order"] < 0.5
    assert mask_followed(render(turned), said, mask)["mask"] > 0.9
    apart = depth.copy()
    apart[depth == 255] = 0
    assert np.isnan(depth_followed(render(scene), said, apart)["order"])


def test_stillness_follows_no_motion_and_a_still_control_asks_for_nothing():
    flow = maps(SCENES[0])[2]
    assert flow_followed(np.zeros_like(flow), flow)["flow"] == pytest.approx(0, abs=1e-6)
    assert flow_followed(flow, flow)["flow"] == 1
    assert flow_followed(-flow, flow)["flow"] == pytest.approx(0, abs=1e-6)
    assert flow_followed(flow / 2, flow)["flow"] == pytest.approx(2 / 3, abs=1e-6)
    assert np.isnan(flow_followed(flow, np.zeros_like(flow))["flow"])


def test_a_picture_of_flow_is_read_back():
    field = np.random.default_rng(0).normal(0, 1.5, (3, 2, 20, 20))
    field *= np.minimum(1, 3.1 / np.linalg.norm(field, axis=1))[:, None]
    assert np.abs(flow_of_picture(flow_picture(field, 3.2), 3.2) - field).max() < 0.1


def test_the_labs_list_of_tasks_is_read_sampled_clips_are_held_to_it_and_told_by_task(tmp_path):
    words = [
        "--out",
        tmp_path / "world",
        "--clips",
        3,
        "--motion",
        "rich",
        "--seed",
        32,
        "--controls",
        tmp_path / "maps",
    ]
    assert run("lab", "render", *words) == 0
    tasks = read_tasks(tmp_path / "maps" / "tasks.jsonl")
    assert [task.name for _, task in tasks] == ["depth", "flow", "mask"] * 3
    assert all(file.is_file() for _, task in tasks for file in task.files)
    assert {p.name for p in (tmp_path / "maps" / "mixed").iterdir()} == {"00000.mp4", "00001.mp4", "00002.mask.mp4"}
    samples = tmp_path / "samples"  # the world's own clips, as if they were sampled
    samples.mkdir()
    rows = []
    for number, (prompt, task) in enumerate(tasks):
        shutil.copy(tmp_path / "world" / f"{number // 3:05d}.mp4", samples / f"{number}.mp4")
        rows.append({"file": f"{number}.mp4", "prompt": prompt, "index": number % 3} | task.told(samples))
    (samples / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate((samples,), out=tmp_path / "results.json", quick=True)["systems"]["samples"]
    means = {task: {k: v["mean"] for k, v in about["metrics"].items()} for task, about in found["tasks"].items()}
    assert set(means) == {"depth", "flow", "mask"}
    assert means["mask"]["follow_mask"] > 0.8
    assert means["depth"]["follow_depth"] > 0.8  # a thing is half hidden in one of them
    assert means["flow"]["follow_flow"] > 0.7  # estimated here
    assert "follow_mask" not in means["depth"]
    assert found["metrics"]["follow_mask"]["n"] == 3
    for number, row in enumerate(rows):  # negative control: the map of the next clip
        row |= tasks[(number + 3) % 9][1].told(samples)
    (samples / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = evaluate((samples,), out=tmp_path / "results.json", quick=True)["systems"]["samples"]["metrics"]
    for name in ("follow_mask", "follow_depth", "follow_flow"):
        assert other[name]["mean"] < 0.35, name
    shutil.rmtree(tmp_path / "maps" / "flow")
    (tmp_path / "results.clips.jsonl").unlink()
    how = evaluate((samples,), out=tmp_path / "results.json", quick=True)["systems"]["samples"]["how"]
    assert len(how["failed"]) == 3
    assert "which is not there: put it back where it was" in how["failed"][0]["reason"]


# ---------------------------------------------------------------------------------------------- lists


def test_a_clip_under_a_list_is_the_clip_under_a_cache(prepared, vace, tmp_path):
    shown, pictures = prepared / "shown", prepared / "pictures"
    rows = [
        {"task": f"number {n}", "prompt": CAPTIONS[n], "control": f"{shown}/{n}.mp4", "mask": f"{shown}/{n}.mask.mp4"}
        | {"references": f"{pictures}/{n}.png"}
        for n in range(2)
    ]
    rows.append({"task": "words alone", "prompt": CAPTIONS[0]})
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:2]))
    how = ["--model", vace, "--steps", 2, "--guidance", 1, "--precision", "fp32", "--device", "cpu"]
    under = ["--prompts", tmp_path / "prompts.txt", "--controls", prepared / "cache"]
    assert run("sample", *how, *under, "--out", tmp_path / "cache") == 0
    assert run("sample", *how, "--prompts", tmp_path / "tasks.jsonl", "--out", tmp_path / "list") == 0
    for n in range(2):
        one, two = (read_video(tmp_path / name / f"{CAPTIONS[n]}-0.mp4")[0].astype(int) for name in ("cache", "list"))
        assert np.abs(one - two).mean() < 2  # caches are encoded in bf16
    plain = read_video(tmp_path / "list" / f"{CAPTIONS[0]}-1.mp4")[0].astype(int)
    assert np.abs(plain - read_video(tmp_path / "list" / f"{CAPTIONS[0]}-0.mp4")[0]).mean() > 4
    said = [json.loads(line) for line in (tmp_path / "list" / "samples.jsonl").read_text().splitlines()]
    assert [row["task"] for row in said] == ["number 0", "number 1", "words alone"]
    assert (tmp_path / "list" / said[0]["control"]).resolve() == (shown / "0.mp4").resolve()
    assert said[0]["controls"] == "of its task"
    assert run("sample", *how, *under[2:], "--prompts", tmp_path / "tasks.jsonl", "--out", tmp_path / "both") == 2


def test_who_reads_no_controls_makes_the_clips_of_the_prompts(family, prepared, tmp_path, capsys):
    row = {"task": "depth", "prompt": CAPTIONS[0], "control": f"{prepared}/shown/0.mp4"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"task": "again"}) + "\n")
    how = ["--model", family / "student", "--prompts", tmp_path / "tasks.jsonl", "--out", tmp_path / "out"]
    assert run("sample", *how) == 0
    assert "made from the prompts alone" in capsys.readouterr().out
    said = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(row["task"], row["index"], row["seed"]) for row in said] == [("depth", 0, 0), ("again", 1, 0)]
    assert "controls" not in said[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "a", "kind": "pose", "control": "a.mp4"}, "kind is one of depth, flow, mask, not 'pose'"),
        ({"task": "a", "kind": "depth", "mask": "a.mp4", "clip": "a.mp4"}, "of kind depth and names no control"),
        ({"task": "a", "kind": "mask", "control": "a.mp4"}, "of kind mask and names no mask"),
        ({"task": "a", "mask": "a.mp4"}, "has a mask of nothing"),
        ({"task": "a", "control": "b.mp4"}, "names .*b.mp4, which is not there"),
        ({"task": "a", "references": 3}, "references are names of pictures"),
        ({}, "has no task, and others of the list have"),
        ({"task": "a", "prompt": ""}, "has no prompt, and others"),
    ],
)
def test_a_row_that_cannot_be_meant_is_a_sentence(row, said, tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((5, 16, 16, 3), np.uint8), 16)
    good = {"task": "b", "prompt": "a red circle falling", "control": "a.mp4"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "x"} | row) + "\n")
    with pytest.raises(UserError, match=said):
        read_tasks(tmp_path / "tasks.jsonl")


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.json"])
def test_a_bare_prompt_among_tasks_is_refused(name, tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((5, 16, 16, 3), np.uint8), 16)
    rows = [{"task": "b", "prompt": "a red circle falling", "control": "a.mp4"}, "a blue square falling"]
    text = json.dumps(rows) if name.endswith("json") else "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read_tasks(tmp_path / name)


def test_a_list_of_prompts_is_no_list_of_tasks(tmp_path):
    for name, text in (("a.txt", "a red circle falling\n"), ("a.json", '["a", "b"]'), ("a.jsonl", '{"prompt": "a"}\n')):
        (tmp_path / name).write_text(text)
        assert read_tasks(tmp_path / name) == []
    assert Task("words alone").told(tmp_path) == {"task": "words alone"}
