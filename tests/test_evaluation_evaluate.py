"""``mogan evaluate`` from folders to results.json: what it reads, what it says, what it survives."""

import json
import math
import platform
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from mogan.data.video import write_video
from mogan.errors import UserError
from mogan.evaluation.clips import find_systems, read_folder
from mogan.evaluation.evaluate import evaluate
from mogan.evaluation.frames import Clip, read_frames
from mogan.evaluation.kept import NEEDED, Kept
from mogan.evaluation.measure import measure
from mogan.evaluation.sets import appearance_distance
from mogan.evaluation.statistics import RESAMPLES, cluster_draws, moved_ends
from mogan.evaluation.table import table
from mogan.world.scenes import make_scene, render


def write_clips(folder, seed, *, motion="rich", prompts=2, count=2, fps=16):
    folder.mkdir(parents=True)
    lines = []
    for prompt in range(prompts):
        text = make_scene(1, prompt, motion="rich").caption
        for index in range(count):
            scene = make_scene(seed + index, prompt, motion=motion, frames=9)
            name = f"{text}-{index}.mp4"
            write_video(folder / name, render(scene), fps)
            lines.append({"file": name, "prompt": text, "index": index, "seed": 100 + index, "system": folder.name})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("systems")
    return write_clips(root / "teacher", 1), write_clips(root / "student", 50, motion="all")


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "results.json"
    evaluate(folders, out=out, flow="farneback", reference=folders[0])
    return out


def test_results_have_the_documented_shape(results):
    systems = json.loads(results.read_text())["systems"]
    assert list(systems) == ["teacher", "student"]
    for system in systems.values():
        assert set(system) == {"metrics", "how", "clips"}
        for metric in system["metrics"].values():
            assert set(metric) == {"mean", "ci95", "n"}
            low, high = metric["ci95"] or (-math.inf, math.inf)
            assert low - 1e-9 <= metric["mean"] <= high + 1e-9
        assert len(system["clips"]) == 4
        for clip in system["clips"]:
            assert (results.parent / clip["file"]).is_file()
            assert {"prompt", "index", "seed", "sha256", "frames", "fps", "values"} <= set(clip)
    expected = {
        "dynamic_degree", "motion_smoothness", "motion_score", "temporal_flickering", "flow_top5", "warping_error", "cuts",
        "saturation", "lab_speed", "lab_colour", "lab_speed_wasserstein",
    }  # fmt: skip
    assert expected <= set(systems["teacher"]["metrics"])
    assert systems["teacher"]["metrics"]["lab_speed_wasserstein"]["mean"] == 0
    assert "appearance_distance" not in systems["teacher"]["metrics"]  # four clips are no distribution


def test_results_say_how_they_were_made(results, folders):
    how = json.loads(results.read_text())["systems"]["student"]["how"]
    assert how["flow"]["name"] == "farneback"
    assert "OpenCV" in how["flow"]["version"]
    assert (how["fps"], how["frames"], how["resolution"]) == ([16.0], [9], [[64, 64]])
    assert how["seeds"] == [100, 101]
    assert how["prompts"]["count"] == 2
    assert len(how["prompts"]["sha256"]) == 64
    assert how["interpolator"] == "flow-warp"
    assert {"torch", "numpy", "av", "python", "opencv-python-headless"} <= set(how["packages"])
    assert "PyAV" in how["decoder"]
    assert (how["device"], how["packages"]["torch"]) == (f"cpu ({platform.machine()})", torch.__version__)
    assert any("only 2 prompts" in warning for warning in how["warnings"])


def test_numbers_of_a_clip_are_those_of_the_pure_functions(results, folders):
    from mogan.evaluation.interpolators import flow_warp
    from mogan.evaluation.motion import dynamic_degree, static_filter, temporal_flickering
    from mogan.motion.classical_flow import farneback

    record = json.loads(results.read_text())["systems"]["teacher"]["clips"][0]
    clip = Clip(results.parent / record["file"])
    values = record["values"]
    assert values["temporal_flickering"] == pytest.approx(temporal_flickering(clip))
    degree = dynamic_degree(clip, 16, farneback)
    assert record["pair_scores"] == pytest.approx(degree.scores)
    assert values["dynamic_degree"] == float(degree.decision)
    assert values["static"] == float(static_filter(clip, farneback).decision)
    assert measure(clip, farneback, flow_warp(farneback)).values["warping_error"] == pytest.approx(
        values["warping_error"]
    )


def test_a_stopped_evaluation_goes_on_where_it_was(results, folders, tmp_path, monkeypatch):
    kept = results.with_suffix(".clips.jsonl")
    out = tmp_path / "results.json"
    shutil.copy(kept, out.with_suffix(".clips.jsonl"))
    with out.with_suffix(".clips.jsonl").open("a") as file:
        file.write('\n{"key": "torn by a ki')

    def forbidden(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("mogan.evaluation.records.measure", forbidden)
    monkeypatch.setattr(torch, "__version__", "99.0")
    again = evaluate(folders, out=out, flow="farneback", reference=folders[0])
    before = json.loads(results.read_text())
    for name, system in before["systems"].items():
        assert again["systems"][name]["metrics"] == system["metrics"]
        # of what measured, not of what wrote
        assert again["systems"][name]["how"]["packages"] == system["how"]["packages"]
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(folders, out=out, flow="dis")


def test_kept_values_that_are_no_numbers_are_measured_again(tmp_path):
    sound = dict.fromkeys(NEEDED) | {"values": {"cuts": 0.0, "lab_net": None}, "pair_scores": [1.5, None]}
    path = tmp_path / "kept.jsonl"
    rows = {
        "sound": sound,
        "nested": sound | {"pair_scores": [[1], [2, 3]]},
        "huge": sound | {"values": {"cuts": 1e308}},
        "words": sound | {"features": "x"},
    }
    path.write_text("\n".join(json.dumps({"key": key, "record": record}) for key, record in rows.items()))
    assert [key for key in rows if Kept(path).get(key)] == ["sound"]


def test_shards_share_the_work_and_the_command_without_one_finishes_it(results, folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    words = {"out": out, "flow": "farneback", "reference": folders[0]}
    for shard in ("0/2", "1/2"):
        evaluate(folders, shard=shard, **words)
        assert not out.exists()
    assert "after all shards, the command without --shard writes" in capsys.readouterr().out
    monkeypatch.setattr("mogan.evaluation.records.measure", lambda *a, **k: pytest.fail("measured again"))
    evaluate(folders, **words)
    ours, theirs = (json.loads(path.read_text())["systems"] for path in (out, results))
    assert {name: s["metrics"] for name, s in ours.items()} == {name: s["metrics"] for name, s in theirs.items()}
    with pytest.raises(UserError, match="--shard takes i/n"):
        evaluate(folders, shard="2/2", **words)


WRITER = """
import sys
from pathlib import Path
from mogan.evaluation.kept import NEEDED, Kept
kept = Kept(Path(sys.argv[1]))
for number in range(40):
    kept.put(f"{sys.argv[2]}-{number}", dict.fromkeys(NEEDED) | {"values": [number] * 5000})
"""


def test_values_kept_by_many_processes_at_once_are_all_there(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text(json.dumps({"key": "old", "record": dict.fromkeys(NEEDED)}) + '\n{"key": "torn by a ki')
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(name)]) for name in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    kept = Kept(path)
    assert kept.get("old") == dict.fromkeys(NEEDED)
    assert all(kept.get(f"{n}-{i}")["values"] == [i] * 5000 for n in range(3) for i in range(40))


def test_a_corrupt_clip_is_named_and_the_others_are_unaffected(results, folders, tmp_path):
    broken = tmp_path / "teacher"
    shutil.copytree(folders[0], broken)
    victim = sorted(broken.glob("*.mp4"))[1]
    victim.write_bytes(victim.read_bytes()[:300])
    found = evaluate((broken,), out=tmp_path / "r.json", flow="farneback")["systems"]["teacher"]
    assert [f["file"] for f in found["how"]["failed"]] == [victim.name]
    assert found["metrics"]["dynamic_degree"]["n"] == 3
    assert any("1 of 4 clips could not be read" in warning for warning in found["how"]["warnings"])
    whole = json.loads(results.read_text())["systems"]["teacher"]["clips"]
    same = {clip["sha256"]: clip["values"] for clip in whole}
    for clip in found["clips"]:
        assert "error" in clip or clip["values"] == same[clip["sha256"]]


def test_a_file_cut_in_the_middle_of_its_data_is_an_error_or_counted_honestly(folders, tmp_path):
    source = sorted(folders[0].glob("*.mp4"))[0]
    data = source.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(len(data) * 0.7)])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        print(Clip(cut).shape)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: (), "name at least one folder"),
        (lambda root: (root / "absent",), "is no folder"),
        (lambda root: ((root / "empty"),), "holds no video"),
        (lambda root: (root / "ghosts",), "none of the 1 files"),
        (lambda root: (root / "torn",), r"samples\.jsonl line 1 is not JSON"),
        (lambda root: (root / "a", root / "b"), "no prompt in common"),
        (lambda root: (root / "a", root / "deep" / "a"), "two folders are called 'a'"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(tmp_path, make, words):
    for name, files in {
        "a": ["x-0.mp4"],
        "b": ["y-0.mp4"],
        "deep/a": ["x-0.mp4"],
        "empty": [],
        "ghosts": [],
        "torn": [],
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_bytes(b"not a video")
    (tmp_path / "ghosts" / "samples.jsonl").write_text('{"file": "gone-0.mp4", "prompt": "gone"}\n')
    (tmp_path / "torn" / "samples.jsonl").write_text('{"file": "gone')
    with pytest.raises(UserError, match=words) as error:
        evaluate(make(tmp_path), out=tmp_path / "r.json", flow="farneback")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r.json").exists()


def test_a_folder_of_nothing_but_rubbish_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x-0.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match="no clip of a could be measured"):
        evaluate((tmp_path / "a",), out=tmp_path / "r.json", flow="farneback")


def test_networks_that_cannot_measure_say_so(folders, tmp_path, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, video):
            return torch.full((video.shape[0], 2, video.shape[2] - 1, *video.shape[3:]), torch.nan)

    clip = Clip(sorted(folders[0].glob("*.mp4"))[0])
    with pytest.raises(UserError, match="not finite"):
        measure(clip, Broken(), lambda first, second: first)
    monkeypatch.setattr("mogan.evaluation.tools.estimator", lambda *_: (Broken(), {"name": "broken"}))
    with pytest.raises(UserError, match="no clip of teacher could be measured; the first says: the flow network"):
        evaluate((folders[0],), out=tmp_path / "r.json")


@pytest.mark.parametrize(("flow", "side"), [("lab", 12), ("dis", 8)])
def test_clips_too_small_for_the_flow_are_failures_with_a_reason(tmp_path, flow, side):
    (tmp_path / "a").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (3, side, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "a" / "x-0.mp4", frames, 16)
    with pytest.raises(UserError, match=r"needs clips of at least \d\d x \d\d pixels.*use --flow farneback"):
        evaluate((tmp_path / "a",), out=tmp_path / "r.json", flow=flow)
    with pytest.raises(UserError, match="no clip of the reference could be measured"):
        evaluate((tmp_path / "a",), out=tmp_path / "r.json", flow=flow, reference=tmp_path / "a")
    assert evaluate((tmp_path / "a",), out=tmp_path / "r.json", flow="farneback")["systems"]["a"]["metrics"]


def test_folders_that_share_only_some_prompts_are_compared_with_a_warning(folders, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(folders[0], part)
    rows = [json.loads(line) for line in (part / "samples.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["prompt"] == rows[0]["prompt"]]
    (part / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in kept + kept)
    )  # listed twice, measured once
    found = evaluate((folders[0], part), out=tmp_path / "r.json", flow="farneback", quick=True)["systems"]
    assert found["part"]["metrics"]["dynamic_degree"]["n"] == 2
    for system in found.values():
        assert any("1 prompts are not in every folder" in warning for warning in system["how"]["warnings"])


def test_a_reference_of_another_frame_rate_is_told(results, folders, tmp_path):
    slow = write_clips(tmp_path / "slow", 1, fps=8)
    told = evaluate(folders[:1], out=tmp_path / "r.json", flow="farneback", quick=True, reference=slow)
    (said,) = [w for w in told["systems"]["teacher"]["how"]["warnings"] if "reference" in w]
    assert said == "the reference's clips have other frame rates: distances to it tell of these, too"
    assert "reference's clips" not in results.read_text()


def test_systems_that_results_hold_no_longer_are_named(folders, tmp_path, capsys):
    out = tmp_path / "r.json"
    evaluate(folders, out=out, flow="farneback", quick=True)
    assert "no longer" not in capsys.readouterr().out
    evaluate(folders[:1], out=out, flow="farneback", quick=True)
    assert f"{out} holds student no longer: name their folders" in capsys.readouterr().out
    evaluate(folders, out=out, flow="farneback", quick=True)
    assert "no longer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    ['{"file": "a.mp4", "prompt": "a", "index": "two"}', "[1]", '{"prompt": "a"}', '{"file": "a.mp4", "prompt": 3}'],
)
def test_a_list_with_a_line_that_cannot_be_used_is_refused(tmp_path, row):
    (tmp_path / "samples.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl line 1"):
        read_folder(tmp_path, "x")


def test_out_must_be_a_file(folders, tmp_path):
    with pytest.raises(UserError, match=r"--out .* is a folder: give a file to write, such as"):
        evaluate(folders, out=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_one_sentence(folders, tmp_path):
    with pytest.raises(UserError, match="--device cuda is not to be had here"):
        evaluate(folders, out=tmp_path / "r.json", device="cuda")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path, monkeypatch):
    """What is held on purpose is cut down to 1 MB; a few KB a frame remain, the paths of the tracked points."""
    monkeypatch.setattr("mogan.evaluation.frames.KEPT_BYTES", 2**20)
    # copies, for tracemalloc sees NumPy's memory and not FFmpeg's
    monkeypatch.setattr("mogan.evaluation.frames.read_frames", lambda path: (f.copy() for f in read_frames(path)))
    flow = np.zeros((1, 2, 1, 128, 128), np.float32)
    scene = list(render(make_scene(0, 1, motion="rich", frames=8, size=128)))

    def peak(frames):
        path = tmp_path / f"{frames}.mp4"
        write_video(path, (scene[number % 8] for number in range(frames)), 16)
        tracemalloc.start()
        try:
            found = measure(
                Clip(path),
                lambda video: torch.from_numpy(flow).expand(len(video), -1, video.shape[2] - 1, -1, -1),
                lambda first, second: (first + second) / 2,
            )
            return tracemalloc.get_traced_memory()[1], found.frames
        finally:
            tracemalloc.stop()

    short, long = peak(140), peak(280)  # both more than two batches of every second pair
    assert (short[1], long[1]) == (140, 280)
    assert long[0] < short[0] + 1.5 * 2**20, (short, long)  # the frames between are 6.9 MB


def test_unknown_tools_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="flow-warp or blend"):
        evaluate(folders, out=tmp_path / "r.json", flow="farneback", interpolator="amt-s")
    with pytest.raises(UserError, match="no flow network"):
        evaluate(folders, out=tmp_path / "r.json", flow="/nowhere/raft.pth")


@pytest.mark.parametrize("listed", [False, True])
def test_a_clip_that_is_not_there_moves_no_other(listed, tmp_path):
    """Captions stand beside the clips or in a list, whose numbers their names have."""
    for system, numbers in {"a": (0, 1, 2, 10), "b": (0, 2, 10)}.items():
        (tmp_path / system).mkdir()
        names = [f"{prompt}-{n}" for prompt in ("cat", "dog") for n in numbers]
        for name in names:
            (tmp_path / system / f"{name}.mp4").touch()
            if not listed:
                (tmp_path / system / f"{name}.txt").write_text(f"A {name.partition('-')[0]}.")
        if listed:
            rows = [f"{name}.mp4,A {name.partition('-')[0]}." for name in names]
            (tmp_path / system / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
        found = {(e.prompt, e.index): e.path.stem for e in read_folder(tmp_path / system, system).clips}
        assert found == {(f"A {name.partition('-')[0]}.", int(name.partition("-")[2])): name for name in names}


def test_names_that_do_not_go_with_prompts_are_counted(tmp_path):
    for name, caption in {"shot-7": "a cat", "shot-9": "a dog", "shot-12": "a cat"}.items():
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text(caption)
    assert {(e.prompt, e.index) for e in read_folder(tmp_path, "x").clips} == {("a cat", 0), ("a dog", 0), ("a cat", 1)}


def test_two_clips_of_a_name_in_two_folders_have_numbers_of_their_own(tmp_path):
    rows = ["file_name,caption"]
    for folder in ("seed0", "seed1"):
        for number in range(2):
            write_video(tmp_path / folder / f"a cat-{number}.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
            rows.append(f"{folder}/a cat-{number}.mp4,a cat")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    assert sorted(entry.index for entry in read_folder(tmp_path, "x").clips) == [0, 1, 2, 3]


def test_how_clips_were_sampled_is_what_is_said_of_those_that_are_there(tmp_path):
    write_video(tmp_path / "a-0.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    line = {"file": "a-0.mp4", "prompt": "a", "index": 0}
    rows = [line | {"guidance": g, "prompts_sha256": str(g)} for g in (5, 6)]
    rows.append(line | {"file": "gone-0.mp4", "guidance": 7, "prompts_sha256": "7"})
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_folder(tmp_path, "x")
    assert [way["guidance"] for way in found.sampling] == [6]
    assert found.prompt_lists == ("6",)


def test_names_prompts_and_numbers_are_read_from_lists_and_from_file_names(tmp_path):
    (tmp_path / "plain").mkdir()
    for name in ("a red fox-0.mp4", "a red fox-1.mp4", "well-known-12.mp4", "no number.mp4"):
        (tmp_path / "plain" / name).touch()
    found = {entry.path.stem: (entry.prompt, entry.index) for entry in read_folder(tmp_path / "plain", "x").clips}
    assert found["a red fox-1"] == ("a red fox", 1)
    assert found["well-known-12"] == ("well-known", 12)
    assert found["no number"] == ("no number", 0)
    (tmp_path / "plain" / "metadata.csv").write_text("file_name,caption\nno number.mp4,a cat\ngone.mp4,a dog\n")
    listed = read_folder(tmp_path / "plain", "x")
    assert [(e.prompt, e.index) for e in listed.clips] == [("a cat", 0)]
    assert listed.missing == ("gone.mp4",)
    assert len(listed.unlisted) == 3
    assert [s.name for s in find_systems((f"first={tmp_path / 'plain'}",))] == ["first"]


def test_tags_that_mislead_are_pointed_out(tmp_path):
    folder = write_clips(tmp_path / "ten", 1, prompts=1, count=1, fps=10)
    short = make_scene(1, 0, frames=3)
    write_video(folder / "short-0.mp4", render(short), 16)
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"file": "short-0.mp4", "prompt": "short"}) + "\n")
    warnings = " ".join(
        evaluate((folder,), out=tmp_path / "r.json", flow="farneback", quick=True)["systems"]["ten"]["how"]["warnings"]
    )
    for words in (
        "tagged 10",
        "frame rates differ",
        "so short that dynamic degree",
        "differ in length",
        "only 2 prompts",
    ):
        assert words in warnings


def test_the_table_names_every_system_and_metric(results):
    text = table(json.loads(results.read_text()))
    assert "teacher" in text.splitlines()[0]
    assert "Dynamic degree" in text
    assert "Net displacement (px/frame)" in text


def test_every_estimator_of_the_same_interface_will_do(folders):
    class Still(torch.nn.Module):
        def forward(self, video):
            return torch.zeros(video.shape[0], 2, video.shape[2] - 1, *video.shape[3:])

    values = measure(Clip(sorted(folders[0].glob("*.mp4"))[0]), Still(), lambda first, second: first).values
    assert values["dynamic_degree"] == 0
    assert values["flow_top5"] == 0
    assert values["camera_motion"] == pytest.approx(0, abs=1e-4)

    class Pan(torch.nn.Module):
        def forward(self, video):
            field = (
                torch.tensor([2.0, -1.0])
                .view(1, 2, 1, 1, 1)
                .repeat(len(video), 1, video.shape[2] - 1, *video.shape[3:])
            )
            field[..., : video.shape[3] // 3, : video.shape[4] // 3] = (
                0  # a ninth stands still: it moves against the camera
            )
            return field

    values = measure(Clip(sorted(folders[0].glob("*.mp4"))[0]), Pan(), lambda first, second: first).values
    assert values["camera_motion"] == pytest.approx(5**0.5, rel=0.05)
    assert values["object_motion"] == pytest.approx(5**0.5, rel=0.05)


def test_distance_of_looks_is_small_for_equal_worlds_and_large_for_another():
    rng = np.random.default_rng(0)
    one, same = rng.normal(size=(200, 10)), rng.normal(size=(200, 10))
    prompts = [i // 4 for i in range(200)]
    near = appearance_distance(one, same, prompts)
    far = appearance_distance(one + 1.0, same, prompts)
    assert near.ci95[0] <= near.mean <= near.ci95[1]
    assert far.mean > near.mean + 5


def test_distance_of_several_models_looks_is_the_mean_of_theirs():
    """Pooled, three sets of 100 would seem nearer than each is: the distance is biased by the number of clips."""
    rng = np.random.default_rng(0)
    looks, real = rng.normal(size=(300, 10)), rng.normal(size=(200, 10))
    looks[200:] += 0.5
    prompts, models = [i % 25 for i in range(300)], [i // 100 for i in range(300)]
    found = appearance_distance(looks, real, prompts, models)
    alone = [appearance_distance(looks[k : k + 100], real, prompts[k : k + 100]) for k in (0, 100, 200)]
    assert found.mean == pytest.approx(np.mean([one.mean for one in alone]), rel=1e-12)
    assert appearance_distance(looks, real).mean < found.mean  # as one set
    assert appearance_distance(looks, real).ci95 is None
    low, high = found.ci95
    assert low <= found.mean <= high
    assert high - low > max(one.ci95[1] - one.ci95[0] for one in alone)  # the third model lies apart

    def drawn(prompts_N, models_N):
        """The distance of a resample written out: copies of clips, and of models."""
        own = [looks[np.repeat(np.arange(k, k + 100), prompts_N[k : k + 100])] for k in (0, 100, 200)]
        copies = [one for one, k in zip(own, (0, 100, 200), strict=True) for _ in range(models_N[k])]
        return np.mean([appearance_distance(one, real).mean for one in copies])

    draws = [drawn(*rows) for rows in zip(*cluster_draws([prompts, models], RESAMPLES // 20), strict=True)]
    assert found.ci95 == pytest.approx(moved_ends(found.mean, draws))
