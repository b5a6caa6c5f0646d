"""VBench's names, checked strictly."""

import json
import shutil

import pytest

from mogan.cli import main
from mogan.data.video import write_video
from mogan.errors import UserError
from mogan.evaluation import vbench as checker
from mogan.evaluation.evaluate import evaluate
from mogan.evaluation.vbench import DIMENSIONS, check_folder, read_info, vbench
from mogan.world.scenes import make_scene, render

MOTION = ["a person is running very fast over a wide field", "a dog"]
ROWS = [
    *({"prompt_en": prompt, "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]} for prompt in MOTION),
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "A beach", "dimension": ["scene", "background_consistency"]},
    {"prompt_en": "A beach", "dimension": ["appearance_style"]},
]  # fmt: skip


@pytest.fixture
def info(tmp_path):
    (tmp_path / "info.json").write_text(json.dumps(ROWS))
    return tmp_path / "info.json"


def fill(folder, prompts, count=5):
    folder.mkdir(exist_ok=True)
    for prompt in prompts:
        for k in range(count):
            (folder / f"{prompt}-{k}.mp4").write_bytes(b"x")
    return folder


def test_a_whole_folder_is_complete(info, tmp_path, capsys):
    fill(tmp_path / "clips", MOTION)
    assert main(["vbench", str(tmp_path / "clips"), "--info", str(info), "--dimensions", "dynamic_degree"]) == 0
    shown = capsys.readouterr().out
    assert "dynamic_degree" in shown
    assert "10 of 10" in shown
    assert "complete: dynamic_degree" in shown
    assert "need all sixteen" in shown
    assert "info.json has 5 entries; VBench's has 946" in shown
    assert "does not hold VBench's prompts" in shown


def test_what_is_missing_and_what_is_not_asked_for_is_listed(info, tmp_path, capsys):
    folder = fill(tmp_path / "clips", MOTION)
    (folder / "a dog-3.mp4").unlink()
    (folder / "a dog-7.mp4").write_bytes(b"x")
    (folder / "a dog-4.mp4").write_bytes(b"")
    (folder / "a cat-0.gif").write_bytes(b"x")
    (folder / ".tmp-a dog-3.mp4").write_bytes(b"x")
    (folder / "samples.jsonl").write_text("")
    found = check_folder(folder, read_info(info), ("dynamic_degree",))
    assert (found.expected, found.missing) == (10, ("a dog-3.mp4",))
    assert found.unexpected == ("a cat-0.gif", "a dog-7.mp4")
    notes = " ".join(found.notes)
    assert "1 files are empty, such as a dog-4.mp4" in notes
    assert "a cat-0.gif lies beside the clips" in notes
    assert main(["vbench", str(folder), "--info", str(info), "--dimensions", "dynamic_degree"]) == 2
    shown = capsys.readouterr()
    assert "missing: a dog-3.mp4\n" in shown.out
    assert "not asked for: a dog-7.mp4\n" in shown.out
    assert "lacks 1 of 10 clips" in shown.err


def test_without_dimensions_a_part_is_warned_of(info, tmp_path, capsys):
    folder = fill(tmp_path / "clips", MOTION)
    fill(folder, ["A beach"], count=2)
    assert main(["vbench", str(folder), "--info", str(info)]) == 0
    shown = capsys.readouterr().out
    assert "of a part only: background_consistency, scene, appearance_style" in shown
    assert "complete: subject_consistency, motion_smoothness, dynamic_degree" in shown
    assert main(["vbench", str(fill(tmp_path / "few", ["A beach"], count=2)), "--info", str(info)]) == 2


def test_prompts_named_twice_are_one_set_of_clips(info, tmp_path):
    found = check_folder(fill(tmp_path / "c", ["A beach"]), read_info(info), ("scene", "appearance_style"))
    assert (found.expected, found.missing, found.unexpected) == (5, (), ())


def test_flickering_wants_twenty_five(info, tmp_path):
    still = [row["prompt_en"] for row in ROWS if row["dimension"] == ["temporal_flickering"]]
    few = check_folder(fill(tmp_path / "few", still), read_info(info), ("temporal_flickering",))
    assert few.missing == ()
    assert any("fewer than 25 clips" in note for note in few.notes)
    many = check_folder(fill(tmp_path / "many", still, count=25), read_info(info), ("temporal_flickering",))
    assert not any("fewer than 25 clips" in note for note in many.notes)
    assert many.unexpected == ()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda name: name[:30] + name[-6:], "names look cut short"),
        (lambda name: name.upper().replace("MP4", "mp4"), "differ only in case"),
        (lambda name: name.replace(" ", "_"), "differ only in case, spaces"),
    ],
)
def test_names_that_nearly_match_are_explained(info, tmp_path, wrong, words):
    folder = fill(tmp_path / "clips", MOTION)
    for path in folder.glob("a person*"):
        path.rename(folder / wrong(path.name))
    notes = check_folder(folder, read_info(info), ("dynamic_degree",)).notes
    assert any(words in note for note in notes)


def test_a_stray_file_whose_name_begins_as_the_whole_of_another_is_no_mistake_of_ours(info, tmp_path):
    folder = fill(tmp_path / "clips", MOTION)
    for path in folder.glob("a person*"):
        path.rename(folder / f"{path.name}-1.mp4")
    assert check_folder(folder, read_info(info), ("dynamic_degree",)).missing


def test_prompts_that_cannot_be_names_are_pointed_out(tmp_path):
    rows = [{"prompt_en": text, "dimension": ["scene"]} for text in ("either/or", "why?", "x" * 260)]
    (tmp_path / "info.json").write_text(json.dumps(rows))
    notes = " ".join(check_folder(tmp_path, read_info(tmp_path / "info.json"), ("scene",)).notes)
    assert "2 prompts cannot be names of files, such as 'either/or'" in notes
    assert "1 prompts hold one of" in notes


def test_the_true_file_raises_no_note(tmp_path, monkeypatch):
    monkeypatch.setattr(checker, "ENTRIES", len(ROWS))
    monkeypatch.setattr(checker, "about", lambda prompts: {"set": "VBench (944 prompts)", "sha256": "0" * 64})
    (tmp_path / "info.json").write_text(json.dumps(ROWS))
    assert read_info(tmp_path / "info.json").oddities == ()
    assert len(set(DIMENSIONS)) == 16


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "[]",
        '[{"prompt_en": "a"}]',
        '{"a": {"b": 1}}',
        "7",
        '[{"prompt_en": "a", "dimension": "scene"}]',
        '[{"prompt_en": 1, "dimension": ["scene"]}]',
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(UserError, match=r"is not VBench_full_info\.json") as error:
        read_info(tmp_path / "info.json")
    assert "\n" not in str(error.value)


def test_mistakes_of_the_command(info, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        check_folder(tmp_path / "absent", read_info(info), ("scene",))
    with pytest.raises(UserError, match="no dimension is called speed: there are subject_consistency"):
        check_folder(tmp_path, read_info(info), ("speed",))
    with pytest.raises(UserError, match="is no file: give VBench_full_info"):
        read_info(tmp_path / "absent.json")
    info.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["speed"]}]))
    with pytest.raises(UserError, match="asks for none of VBench's dimensions"):
        vbench(tmp_path, info=info)


def test_evaluate_measures_exactly_vbenchs_clips_or_stops(info, tmp_path):
    folder = fill(tmp_path / "model", MOTION)
    write_video(tmp_path / "clip.mp4", render(make_scene(0, 1, motion="rich", frames=9)), 16)
    for path in folder.iterdir():
        shutil.copy(tmp_path / "clip.mp4", path)
    for k in range(3):
        shutil.copy(tmp_path / "clip.mp4", folder / f"A beach-{k}.mp4")  # of another dimension: not averaged

    def measured(**more):
        given = {"out": tmp_path / "r.json", "flow": "farneback", "quick": True, "vbench_info": info} | more
        return evaluate((folder,), **given)["systems"]["model"]

    found = measured()
    assert found["metrics"]["dynamic_degree"]["n"] == 10
    assert {clip["prompt"] for clip in found["clips"]} == set(MOTION)
    assert found["how"]["vbench"]["dimensions"] == ["dynamic_degree", "motion_smoothness"]
    assert any("VBench's has 946" in warning for warning in found["how"]["warnings"])
    assert measured(vbench_info=None)["metrics"]["dynamic_degree"]["n"] == 13
    with pytest.raises(UserError, match="have different prompts"):
        measured(vbench_dimensions=("dynamic_degree", "scene"))
    (folder / "a dog-0.mp4").unlink()
    with pytest.raises(UserError, match=r"model lacks 1 of VBench's 10 clips.*'a dog-0.mp4'"):
        measured()
