"""A run goes on as what it was begun with, or not at all; and what it was is never rewritten."""

import json
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_recipes
from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.disk.locks import alone_in
from mogan.errors import UserError
from mogan.runs.checkpoint import SUMS, checkpoints, latest_checkpoint, load_part
from mogan.runs.identity import (
    STRIDE,
    WHOLE,
    _agree,
    begins_again,
    of_cache,
    of_file,
    of_model,
    of_student,
    refuse_other_folders,
)


@pytest.fixture
def model(family, tmp_path):
    """A copy to move and to change."""
    return shutil.copytree(family / "teacher", tmp_path / "model")


@pytest.fixture
def own_cache(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


@pytest.fixture
def train(tmp_path, capsys):
    """``mogan train`` into one folder; returns what it said, and the exit code."""

    def run(model, cache, iterations, *more, recipe="flow_matching"):
        command = ["train", f"tiny_recipes:{recipe}", "--model", model, "--data", cache, "--out", tmp_path / "run"]
        code = main([str(a) for a in [*command, "--device", "cpu", "--iterations", iterations, *more]])
        out, err = capsys.readouterr()
        return code, out + err.replace("\r", "\n")

    return run


def change_weights(folder):
    """As another training would have left them."""
    (path,) = folder.glob("*.safetensors")
    save_file({k: v + 0.01 for k, v in load_file(path).items()}, path, {"format": "pt"})


def files_of(run):
    return {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts}


def test_another_model_or_other_data_do_not_go_on_with_a_run(model, own_cache, family, train, tmp_path):
    run = tmp_path / "run"
    assert train(model, own_cache, 1)[0] == 0
    before = files_of(run)
    other = shutil.copytree(model, tmp_path / "other")
    change_weights(other / "transformer")
    code, said = train(other, own_cache, 2)
    assert code == 2
    assert f"begun with another base model ({model} then, {other} now; fingerprint " in said
    fewer = shutil.copytree(own_cache, tmp_path / "fewer")
    lines = (fewer / "index.jsonl").read_text().splitlines()
    (fewer / "index.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    code, said = train(model, fewer, 2)
    assert code == 2
    assert f"begun with another data ({own_cache} then, {fewer} now; fingerprint " in said
    change_weights(model / "transformer")
    code, said = train(model, own_cache, 2)
    assert code == 2
    assert f"{model} then, {model} now whose contents have changed since" in said
    assert files_of(run) == before
    assert train(family / "teacher", own_cache, 2)[0] == 0, "a copy with the same contents is the same"


def test_prompts_of_their_own_are_part_of_what_a_run_is(model, own_cache, train, tmp_path):
    words = shutil.copytree(own_cache, tmp_path / "words")
    assert train(model, own_cache, 1, "--prompts", words, recipe="dmd")[0] == 0
    assert "begun with prompts" in train(model, own_cache, 2, recipe="dmd")[1]
    lines = (words / "index.jsonl").read_text().splitlines()
    (words / "index.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert "begun with another prompts" in train(model, own_cache, 2, "--prompts", words, recipe="dmd")[1]


def test_data_that_is_none_makes_no_folder(model, train, tmp_path):
    assert train(model, tmp_path / "none", 1)[0] == 2
    assert not (tmp_path / "run").exists()


def test_folders_that_moved_are_the_same_and_their_new_place_is_noted(model, own_cache, train, tmp_path):
    assert train(model, own_cache, 1)[0] == 0
    known = json.loads((tmp_path / "run" / "run.json").read_text())
    moved, cache = tmp_path / "moved", tmp_path / "moved cache"
    model.rename(moved)
    own_cache.rename(cache)
    code, said = train(moved, cache, 2)
    assert code == 0, said
    assert f"the base model of {tmp_path / 'run'} has moved: {model} -> {moved}" in said
    now = json.loads((tmp_path / "run" / "run.json").read_text())
    assert now == known | {"model": str(moved), "student": str(moved), "data": str(cache)}


def test_a_run_older_than_fingerprints_goes_on_and_is_held_to_it_from_then_on(model, own_cache, train, tmp_path):
    run = tmp_path / "run"
    assert train(model, own_cache, 1)[0] == 0
    facts = json.loads((run / "run.json").read_text())
    del facts["fingerprints"]
    (run / "run.json").write_text(json.dumps(facts))
    other = shutil.copytree(model, tmp_path / "other")
    change_weights(other / "transformer")
    assert "begun with another base model" in train(other, own_cache, 2)[1]  # the old one is still where it lay
    code, said = train(model, own_cache, 2)
    assert code == 0
    assert "older than fingerprints" in said
    assert "older than fingerprints" not in train(model, own_cache, 3)[1]
    assert train(other, own_cache, 4)[0] == 2


def test_the_exported_card_names_the_base_that_trained(model, own_cache, train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(model, own_cache, 1, "--lora", 2)[0] == 0
    other = shutil.copytree(model, tmp_path / "other")
    change_weights(other / "transformer")
    assert train(other, own_cache, 2, "--lora", 2)[0] == 2
    export = ["export", str(run), "--to", "lora", "--out"]
    assert main([*export, str(tmp_path / "a.safetensors")]) == 0
    assert "base: `model`" in (tmp_path / "a.md").read_text()
    change_weights(model / "transformer")
    assert main([*export, str(tmp_path / "b.safetensors")]) == 2
    assert "no longer the student to start from" in capsys.readouterr().err
    shutil.rmtree(model)
    assert main([*export, str(tmp_path / "b.safetensors")]) == 2
    assert "put it back" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


def test_a_run_that_lost_its_config_is_known_by_its_checkpoints(model, own_cache, train, tmp_path):
    assert train(model, own_cache, 1)[0] == 0
    (tmp_path / "run" / "config.json").unlink()
    assert "made with another seed" in train(model, own_cache, 2, "--seed", 5)[1]
    assert train(model, own_cache, 2)[0] == 0


# ---------------------------------------------------------------------------------------------- fingerprints


def test_a_large_file_is_sampled_and_every_matrix_of_it_counts(tmp_path):
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(256, (WHOLE + 12_345,), generator=generator, dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    known = of_file(path)
    shutil.copy(path, tmp_path / "copy")
    assert of_file(tmp_path / "copy") == known
    for place in (0, 9 * STRIDE + 17, WHOLE - STRIDE, len(data) - STRIDE):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes(STRIDE + 8192))
        assert of_file(path) != known, place
        path.write_bytes(data)
    assert of_file(path) == known


def test_every_byte_of_a_small_file_counts_and_no_name_of_a_place(model, tmp_path):
    known = of_model(model)
    moved = model.rename(tmp_path / "elsewhere")
    assert of_model(moved) == known
    (path,) = (moved / "vae").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert of_model(moved) != known


# ---------------------------------------------------------------------------------------------- a folder of one run


def test_a_start_that_fails_claims_nothing(model, own_cache, train, tmp_path, monkeypatch):
    def broken(*_):
        raise UserError("the first step fails")

    with monkeypatch.context() as patch:
        patch.setattr("mogan.training.loop.learn", broken)
        assert train(model, own_cache, 1, "--seed", 1)[0] == 2
    assert not (tmp_path / "run").exists()
    assert train(model, own_cache, 1, "--seed", 2)[0] == 0


def test_a_folder_of_other_things_is_not_trained_into(model, own_cache, train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.mp4").write_bytes(b"")
    (tmp_path / "run" / "a.txt").write_text("a caption")
    code, said = train(model, own_cache, 1)
    assert code == 2
    assert "holds other things than a run (a.mp4)" in said
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["a.mp4", "a.txt"]
    with pytest.raises(UserError, match="other things"):
        refuse_other_folders(own_cache)
    (tmp_path / "run" / "a.mp4").unlink()
    refuse_other_folders(tmp_path / "run")  # a log of the shell's is no other thing


def test_a_second_command_in_the_folder_is_refused(model, own_cache, train, tmp_path):
    (tmp_path / "run").mkdir()
    with alone_in(tmp_path / "run"):
        code, said = train(model, own_cache, 1)
    assert code == 2
    assert f"another command is at work in {tmp_path / 'run'} (process {os.getpid()} on " in said
    assert list((tmp_path / "run").iterdir()) == []


# ---------------------------------------------------------------------------------------------- checkpoints


def overwrite(path, count=100):
    """The end of a file's tensors, where its header says nothing of it."""
    with path.open("r+b") as file:
        file.seek(-count, 2)
        file.write(b"\xff" * count)


def test_bytes_overwritten_in_a_checkpoint_are_found_and_the_file_named(model, own_cache, train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(model, own_cache, 2)[0] == 0
    newest = latest_checkpoint(run)
    files = sorted(newest.glob("*.safetensors"))
    assert set(json.loads((newest / SUMS).read_text())) == {p.name for p in files}
    for path in files:
        kept = path.read_bytes()
        overwrite(path)
        code, said = train(model, own_cache, 3)
        assert code == 2
        assert f"{path.name} is not what was written" in said
        assert "delete that folder to resume from the one before" in said
        path.write_bytes(kept)
    for path in files:
        overwrite(path)
    with pytest.raises(UserError, match="is not what was written"):
        load_part(newest, "ema")
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 2
    assert "is not what was written" in capsys.readouterr().err
    shutil.rmtree(newest)
    assert train(model, own_cache, 3)[0] == 0


def test_a_checkpoint_older_than_checksums_is_read(model, own_cache, train, tmp_path):
    assert train(model, own_cache, 1)[0] == 0
    (latest_checkpoint(tmp_path / "run") / SUMS).unlink()
    assert train(model, own_cache, 2)[0] == 0


def test_a_checkpoint_that_lost_its_config_is_told_and_alone_it_ends_the_run(model, own_cache, train, tmp_path):
    run = tmp_path / "run"
    assert train(model, own_cache, 2)[0] == 0
    older, newest = checkpoints(run)
    (newest / "config.json").unlink()
    code, said = train(model, own_cache, 3)
    assert code == 0
    assert f"{newest} lacks its config.json and is not used: going on from {older}" in said
    for path in checkpoints(run):
        (path / "config.json").unlink()
    before = files_of(run)
    code, said = train(model, own_cache, 4)
    assert code == 2
    assert "lacks its config.json and there is no other checkpoint" in said
    assert files_of(run) == before


def test_a_run_whose_checkpoints_were_taken_away_keeps_its_records(model, own_cache, train, tmp_path):
    run = tmp_path / "run"
    assert train(model, own_cache, 2)[0] == 0
    shutil.rmtree(run / "checkpoints")
    before = files_of(run)
    code, said = train(model, own_cache, 3)
    assert code == 2
    assert f"{run} notes 2 iterations and its checkpoints are gone: copy them there" in said
    assert files_of(run) == before
    first = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (run / "metrics.jsonl").write_text(first)  # as a kill before the first checkpoint leaves it
    code, said = train(model, own_cache, 3)
    assert code == 0
    assert f"{run} notes 1 iterations and has no checkpoint of them: it begins again" in said


def test_a_run_that_is_done_says_so(model, own_cache, train):
    assert train(model, own_cache, 1)[0] == 0
    code, said = train(model, own_cache, 1)
    assert code == 0
    assert "has its 1 iterations already" in said


def test_a_recipe_for_other_levels_names_the_student(family, own_cache, tmp_path, capsys):
    arguments = ["train", "mogan_wan_1_3b", "--data", own_cache, "--out", tmp_path / "run"]
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert "None" not in said
    assert "the student of the lab samples at levels" in said


def test_states_of_clips_and_rows_of_states_count(own_cache, model):
    before, rows = of_cache(open_cache(own_cache)), of_student(model)
    entries = [json.loads(line) for line in (own_cache / "index.jsonl").read_text().splitlines()]
    found = [before]
    for since in (0, 0.5):
        states = [entry | {"state": "idle", "state_from": since} for entry in entries]
        (own_cache / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in states))
        found.append(of_cache(open_cache(own_cache)))
    assert len(set(found)) == 3
    save_file({"idle": torch.zeros(4)}, model / "states.safetensors")
    assert of_student(model) != rows


def test_hours_without_a_checkpoint_are_missed_though_iterations_are_few(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_recipes.dmd().as_json() | {"save_every": 50}))
    rows = [{"iteration": i, "update": "student<dmd", "repeat": 0, "seconds": 2000.0} for i in range(3)]
    for count, missed in ((2, False), (3, True)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        with pytest.raises(UserError, match="are gone") if missed else nullcontext():
            assert begins_again(tmp_path) == count


def test_a_run_older_than_states_goes_on_and_another_state_does_not(model):
    save_file({"idle": torch.zeros(4)}, model / "states.safetensors")
    now = of_student(model)
    assert _agree(of_model(model, ("transformer", "fake_score")), now)
    save_file({"idle": torch.ones(4)}, model / "states.safetensors")
    assert not _agree(now, of_student(model))
