"""What a folder remembers of itself may be damaged: that is one sentence with the file's name, or work done again, never a
traceback, and never taken for something else."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny_recipes
from mogan.cli import main
from mogan.data.cache import open_cache, save_latent
from mogan.data.video import write_video
from mogan.disk.files import read_json, write_atomically
from mogan.errors import UserError
from mogan.evaluation.evaluate import evaluate
from mogan.models.frame_sparse import read_mask
from mogan.models.wan import Geometry, fit_latents
from mogan.motion.estimators import load_flow
from mogan.motion.flow import read_raft_config
from mogan.report.sources import distinct_names
from mogan.runs.checkpoint import SUMS, _kept, broken_checkpoints, checkpoints, student_checkpoint
from mogan.runs.identity import check_same_parts, read_config
from mogan.runs.watch import read_records
from mogan.sampling.samplers import clips_of
from mogan.sampling.samples import append_samples, listed_samples
from mogan.survey.folder import read_survey

GARBAGE = (b"", b"[]", b"null", b"5", b"{}", b'{"x": 1}', b"\xff\xfe{", b'{"id": "clip0"')


@pytest.fixture(scope="module")
def trained(family, cache, tmp_path_factory):
    """A run of two iterations."""
    run = tmp_path_factory.mktemp("trained") / "run"
    command = ["train", "tiny_recipes:flow_matching", "--model", family / "teacher", "--data", cache, "--out", run]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
        assert main([str(a) for a in [*command, "--device", "cpu", "--iterations", "2"]]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def command(family, cache, run, tmp_path, monkeypatch, capfd):
    """Commands on that run; what they said must be one sentence."""
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    (tmp_path / "p.txt").write_text("a red circle\n")
    train = ["train", "tiny_recipes:flow_matching", "--model", family / "teacher", "--data", cache, "--out", run]
    commands = {
        "train": [*train, "--iterations", "3", "--device", "cpu"],
        "sample": [
            "sample",
            "--model",
            run,
            "--prompts",
            tmp_path / "p.txt",
            "--out",
            tmp_path / "s",
            "--device",
            "cpu",
        ],
        "export": ["export", run, "--out", tmp_path / "export"],
    }

    def give(name):
        code = main([str(a) for a in commands[name]])
        return code, capfd.readouterr().err

    return give


# ---------------------------------------------------------------------------------------------- a cache


@pytest.mark.parametrize("garbage", GARBAGE[1:])
def test_a_damaged_line_of_the_index_is_named(garbage, cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    with (own / "index.jsonl").open("ab") as file:
        file.write(garbage)
    with pytest.raises(UserError, match=r"index\.jsonl line 9 is damaged: run the same `mogan prepare` again"):
        open_cache(own)


def test_a_clip_that_the_index_names_twice_is_refused(cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    first = (own / "index.jsonl").read_bytes().splitlines(keepends=True)[0]
    with (own / "index.jsonl").open("ab") as file:
        file.write(first)
    with pytest.raises(
        UserError, match=r"index\.jsonl line 9 names what line 1 names: run the same `mogan prepare` again"
    ):
        open_cache(own)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"version": 1},
        {"version": 1, "contents": ["clips"]},
        {"version": 1, "contents": "clips", "flow_name": 3},
        {"version": 1, "contents": "clips", "fps": ""},
        {"version": 1, "contents": "clips", "width": "x"},
        {"version": 1, "contents": "clips", "frames": []},
    ],
)
def test_a_cache_that_does_not_say_what_it_holds_is_named(facts, cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    (own / "cache.json").write_text(json.dumps({"format": "mogan-cache"} | facts))
    with pytest.raises(UserError, match="cache"):
        open_cache(own)


def test_a_clip_that_holds_something_else_is_named(cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    save_file({"other": torch.zeros(1)}, own / "clips/clip0.safetensors")
    save_file({"latent": torch.zeros(1, 2, 3, 4)}, own / "clips/clip2.safetensors")
    opened = open_cache(own)
    with pytest.raises(UserError, match=r"clip0\.safetensors cannot be read \(it holds no latent\)"):
        opened.latent("clip0")
    opened.latent("clip1")
    with pytest.raises(UserError, match=r"clip2\.safetensors holds a latent of \(1, 2, 3, 4\) where others have"):
        opened.latent("clip2")


def test_what_is_no_number_is_neither_kept_nor_trained_on(cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "cache")
    latent = torch.zeros(open_cache(cache).latent("clip0").shape)
    latent[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="is not written"):
        save_latent(own, "other", latent, {})
    assert not (own / "clips/other.safetensors").exists()
    save_file({"latent": latent}, own / "clips/clip0.safetensors")
    with pytest.raises(UserError, match=r"clip0\.safetensors holds numbers that are infinite or none"):
        open_cache(own).latent("clip0")


def test_what_a_cache_is_made_of_is_not_written_over_by_its_advice(cache, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    for path, said in (
        (tmp_path / "p.txt", f"prepare {tmp_path / 'p.txt'} .* --out CACHE"),
        (tmp_path, f"prepare {tmp_path} .* --out CACHE"),
        (cache / "index.jsonl", f"give its folder, {cache}$"),
        (tmp_path / "none", f"--out {tmp_path / 'none'}`"),
    ):
        with pytest.raises(UserError, match=said):
            open_cache(path)


# ---------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize(
    "garbage", [*GARBAGE, b'{"model": 5, "student": "x"}', b'{"model": "a", "student": "b", "fingerprints": [1]}']
)
def test_a_damaged_run_json_ends_every_command(garbage, run, command):
    (run / "run.json").write_bytes(garbage)
    for name in ("train", "sample", "export"):
        code, said = command(name)
        assert code == 2, (name, garbage)
        assert "run.json" in said
    assert (run / "run.json").read_bytes() == garbage


def test_a_run_that_lost_its_run_json_does_not_go_on_as_another(run):
    (run / "run.json").unlink()
    with pytest.raises(UserError, match="what it was begun with, is gone"):
        check_same_parts(run, {"model": "other", "fingerprints": {"model": "1"}})


@pytest.mark.parametrize("garbage", GARBAGE)
def test_damaged_checksums_blame_the_checkpoint(garbage, run, command):
    (checkpoints(run)[-1] / SUMS).write_bytes(garbage)
    for name in ("train", "export"):
        code, said = command(name)
        assert code == 2, (name, garbage)
        assert "000002 cannot be read" in said


def test_a_checkpoint_that_lost_a_file_is_named_by_every_command(run, command):
    lost = min(checkpoints(run)[-1].glob("*.safetensors"))
    lost.unlink()
    for name in ("train", "sample", "export"):
        code, said = command(name)
        assert code == 2, name
        assert f"{lost.name} is gone" in said
    assert checkpoints(run)


def test_a_checkpoint_without_tensors_is_named_by_every_command(run, command):
    newest = checkpoints(run)[-1]
    empty = newest.with_name("000009")
    empty.mkdir()
    shutil.copy(newest / "config.json", empty)
    for name in ("train", "sample", "export"):
        code, said = command(name)
        assert code == 2, name
        assert str(empty) in said, name
        assert "delete that folder" in said, name


CHANGES = {
    "sigmas": (5, ["x"], [1.0, None], [0.5, 1.0]),
    "plan": ([5], [{}], {"learns": 1}),
    "seed": ("x", 1e308),
    "lora": ("x", -1, True),
    "rollout": (5, [1], {"counts": 5}, {"causal": 5}, {"causal": {"first": 1}}, {"causal": {"policy": None}}),
    "states": (-1, "idle", ["a"]),
    "boundary": ("x", [0.5]),
    "solver": ("dpm", 3),
    "objectives": (5, [], {"flow_matching": 3}),
}


@pytest.mark.parametrize("entry", CHANGES)
def test_an_entry_of_the_config_that_cannot_be_meant_is_named(entry, run, command):
    path = run / "config.json"
    whole = json.loads(path.read_text())
    for value in CHANGES[entry]:
        path.write_text(json.dumps({**whole, entry: value}))
        for name in ("train", "sample", "export"):
            code, said = command(name)
            assert code == 2, (name, value)
            assert name == "train" or f"config.json is damaged ({entry} is" in said
            assert "made with another" in said or "is damaged" in said


@pytest.mark.parametrize("garbage", [*(g for g in GARBAGE if g != b"{}"), b'{"motions": {"1": NaN}}'])
def test_damaged_motion_on_held_out_prompts_is_named(garbage, run, command):
    (run / "held_out.json").write_bytes(garbage)
    code, said = command("export")
    assert code == 2
    assert "held_out.json is damaged" in said


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_line_of_the_metrics_does_not_end_a_run(garbage, run, command):
    before = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(before + garbage)
    assert command("train")[0] == 0
    assert (run / "metrics.jsonl").read_bytes().startswith(before)


def test_lines_that_are_no_records_are_left_out_whoever_reads_them(tmp_path):
    whole = {"iteration": 3, "update": "student<dmd", "repeat": 0, "loss": 0.5}
    lines = [
        whole,
        [1],
        7,
        {"iteration": 3, "update": 5},
        {"iteration": "3", "update": "a"},
        {**whole, "loss": "x"},
        whole,
    ]
    (tmp_path / "log").write_bytes("\n".join(map(json.dumps, lines)).encode() + b'\n\xff\n{"iteration": 3, "upd')
    assert read_records(tmp_path / "log") == [whole, whole]


def test_a_users_copy_of_a_checkpoint_is_neither_used_nor_removed(tmp_path):
    for name in ("000002", "000002 (copy)", "000002.bak", "999999", "1000000", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    (tmp_path / "checkpoints" / "1000001").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["000002", "999999", "1000000"]
    assert student_checkpoint(tmp_path).name == "1000000"
    assert [path.name for path in broken_checkpoints(tmp_path)] == ["1000001"]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 8])
def test_as_many_checkpoints_are_kept_as_the_recipe_says(keep, tmp_path):
    config = replace(tiny_recipes.dmd(), keep=keep, save_every=1)
    for iteration in range(1, 13):
        made = tmp_path / "checkpoints" / f"{iteration:06d}"
        made.mkdir(parents=True)
        (made / "config.json").write_text("{}")
        for old in set(checkpoints(tmp_path)) - _kept(tmp_path, config):
            shutil.rmtree(old)
        assert [int(path.name) for path in checkpoints(tmp_path)] == list(range(1, iteration + 1))[-keep:]


# ---------------------------------------------------------------------------------------------- what was measured


@pytest.mark.parametrize("garbage", [*GARBAGE, b'{"key": "a", "record": 5}', b'{"key": "a", "record": {}}'])
def test_a_damaged_value_is_measured_again(garbage, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    write_video(tmp_path / "v" / "a.mp4", frames, 8)
    out, kept = tmp_path / "r.json", tmp_path / "r.clips.jsonl"
    first = evaluate((tmp_path / "v",), out=out, flow="farneback", quick=True)
    row = json.loads(kept.read_text())
    kept.write_bytes(garbage.replace(b'"a"', json.dumps(row["key"]).encode()))
    assert evaluate((tmp_path / "v",), out=out, flow="farneback", quick=True)["systems"] == first["systems"]
    assert json.loads(kept.read_bytes().split(b"\n")[-1]) == row


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_record_of_a_video_is_measured_again(garbage, family, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (13, 32, 32, 3), np.uint8)
    write_video(tmp_path / "v" / "a.mp4", frames, 16)
    command = ["prepare", tmp_path / "v", "--model", family / "teacher", "--out", tmp_path / "c"]
    command += ["--caption", "x", "--flow", "farneback", "--device", "cpu"]
    assert main([str(a) for a in command]) == 0
    index, (record,) = (tmp_path / "c/index.jsonl").read_bytes(), (tmp_path / "c/sources").glob("*.json")
    whole = record.read_bytes()
    record.write_bytes(garbage)
    assert main([str(a) for a in command]) == 0
    assert record.read_bytes() == whole
    assert (tmp_path / "c/index.jsonl").read_bytes() == index


# ---------------------------------------------------------------------------------------------- what is sampled


def test_a_clip_that_is_no_numbers_is_not_written_as_a_black_one():
    latents = torch.zeros(2, 4, 1, 4, 4)
    latents[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="infinite or none"):
        clips_of(None, latents)


def test_half_a_character_in_an_option_is_refused(family, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n")
    common = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "s"), "--model", str(family / "teacher")]
    assert main(["sample", *common, "--negative-prompt", "still \udcff"]) == 2
    assert "--negative-prompt holds half a character" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_negative_prompt_that_is_cut_is_told(family, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n")
    common = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "s"), "--model", str(family / "teacher")]
    assert main(["sample", *common, "--steps", "1", "--device", "cpu", "--negative-prompt", "red " * 600]) == 0
    assert "(first --negative-prompt, " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- words that are no places


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "--prompts", "p.txt", "--out", ""], "an empty word stands after --out"),
        (["sample", "--prompts", "", "--out", "s"], "an empty word stands after --prompts"),
        (["prepare", "", "--out", "c"], "an empty word stands first"),
        (["evaluate", "v", ""], "an empty word stands after v"),
        (
            ["sample", "--prompts", "p.txt", "--out", "s", "--model", "a b/c d"],
            "a b/c d is neither a folder nor a name",
        ),
    ],
)
def test_what_names_no_place_is_not_taken_for_one(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["p.txt"]


def test_a_folder_for_weights_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("MOGAN_OFFLINE", raising=False)
    (tmp_path / "file").write_text("")
    assert main(["weights", "fetch", "dino_vitb16", "--folder", str(tmp_path / "file")]) == 2
    assert "is a file, not a folder: give another --folder" in capsys.readouterr().err


def test_a_preparation_that_could_not_begin_claims_no_folder(family, tmp_path, capsys):
    write_video(tmp_path / "v" / "a.mp4", np.random.default_rng(0).integers(0, 255, (13, 32, 32, 3), np.uint8), 16)
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    command = ["prepare", tmp_path / "v", "--model", family / "teacher", "--out", tmp_path / "c"]
    command = [str(a) for a in [*command, "--caption", "x", "--device", "cpu", "--flow"]]
    assert main([*command, str(tmp_path / "weights.pth")]) == 2
    assert "are damaged or missing" in capsys.readouterr().err
    assert main([*command, "farneback"]) == 0


# ---------------------------------------------------------------------------------------------- files of others


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.mp4", "notes.json", "notes.html"])
def test_a_file_of_another_kind_is_not_written_over(name, tmp_path, capsys):
    write_video(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8), 8)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "caption": "x"}\n')
    for other in ("notes.json", "notes.html"):
        (tmp_path / other).write_text("mine\n")
    results = tmp_path / "r.json"
    for _ in range(2):  # its own it does replace
        assert main(["evaluate", str(tmp_path), "--out", str(results), "--quick", "--flow", "farneback"]) == 0
    for command in (["evaluate", str(tmp_path), "--quick", "--flow", "farneback"], ["report", str(results)]):
        for place in (tmp_path / name, *([results] if command[0] == "report" else [])):
            before = place.read_bytes()
            capsys.readouterr()
            assert main([*command, "--out", str(place)]) == 2
            fits = place.suffix == (".json" if command[0] == "evaluate" else ".html")
            refused = "is there and not what this command writes" if fits else "must end in"
            assert refused in capsys.readouterr().err
            assert place.read_bytes() == before


def test_a_report_of_clips_without_a_number_is_a_page(tmp_path):
    write_video(tmp_path / "v" / "a.mp4", np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8), 8)
    evaluate((tmp_path / "v",), out=tmp_path / "r.json", flow="farneback", quick=True)
    results = json.loads((tmp_path / "r.json").read_text())
    for clip in results["systems"]["v"]["clips"]:
        clip["values"] = {}
    (tmp_path / "r.json").write_text(json.dumps(results))
    for _ in range(2):
        assert main(["report", str(tmp_path / "r.json"), "--out", str(tmp_path / "r.html")]) == 0


def test_a_clip_longer_than_the_model_counts_is_refused():
    with pytest.raises(UserError, match="counts 32 places a side"):
        fit_latents({}, {"rope_max_seq_len": 32}, Geometry(16, 480, 480, 133))
    assert fit_latents({}, {"rope_max_seq_len": 32}, Geometry(16, 480, 480, 125)) == (16, 32, 60, 60)


def test_half_a_character_in_a_list_of_vbench_is_told(tmp_path, capsys):
    (tmp_path / "info.json").write_text('[{"prompt_en": "a \\ud800", "dimension": ["scene"]}]')
    assert main(["vbench", str(tmp_path), "--info", str(tmp_path / "info.json")]) == 2
    assert "half a character" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '"x"', '{"a": 1%s}' % ("0" * 400)], ids=range(5))
def test_what_holds_no_names_and_values_is_named_by_every_reader(text, tmp_path):
    path = tmp_path / "survey.json"
    path.write_text(text)
    (tmp_path / "config.json").symlink_to("survey.json")
    for read in (
        lambda: read_survey(tmp_path),
        lambda: read_raft_config(path),
        lambda: read_json(path),
        lambda: read_config(tmp_path),
    ):
        with pytest.raises(UserError, match=r"survey\.json|config\.json"):
            read()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer/tokenizer_config.json", {"eos_token": []}),
        ("tokenizer/tokenizer.json", {"model": 5}),
        ("text_encoder/config.json", {"d_kv": "x"}),
        ("text_encoder/config.json", {"d_kv": 3}),
        ("model_index.json", {"transformer_2": 5}),
    ],
)
def test_a_setting_of_another_kind_in_a_model_is_a_sentence(file, change, family, tmp_path, capsys):
    own = shutil.copytree(family / "teacher", tmp_path / "model")
    (own / file).write_text(json.dumps(json.loads((own / file).read_text()) | change))
    (tmp_path / "p.txt").write_text("a red circle\n")
    assert main(["prepare", str(tmp_path / "p.txt"), "--model", str(own), "--out", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert file.split("/")[0] in said
    assert "get it again" in said


def test_a_number_of_references_is_a_whole_one(tmp_path):
    for facts in ({"frames": 5, "references": [1, True]}, {"frames": 5.0, "references": [1]}):
        (tmp_path / "frame_sparse.json").write_text(json.dumps(facts))
        with pytest.raises(UserError, match="does not say how many frames and references"):
            read_mask(tmp_path)


def test_names_of_folders_need_not_be_text(tmp_path):
    name = os.fsdecode(b"s\xff")
    append_samples(tmp_path, [{"file": "a-0.mp4", "system": name}])
    assert listed_samples(tmp_path)["a-0.mp4"]["system"] == name
    write_atomically(tmp_path / "page.html", name)
    assert (tmp_path / "page.html").read_text() == "s\\udcff"


def test_a_name_under_which_weights_cannot_be_opened_is_refused_first(family, cache, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"u\xff")
    odd.mkdir()
    (odd / "p.txt").write_text("a red circle\n")
    shutil.copytree(cache, odd / "cache")
    with pytest.raises(UserError, match=r"udcff/cache is a name that is not UTF-8"):
        open_cache(odd / "cache")
    for words in (["--model", family / "teacher", "--out", odd / "new"], ["--model", odd, "--out", tmp_path / "new"]):
        assert main(["prepare", str(odd / "p.txt"), *map(str, words)]) == 2
        assert "rename it" in capsys.readouterr().err
    assert not (odd / "new").exists()
    assert distinct_names([odd]) == ["u\\udcff"]  # what a figure can be labelled with


def test_a_model_of_another_family_has_no_price(family, tmp_path, capsys):
    shutil.copytree(family / "teacher", tmp_path / "m")
    config = tmp_path / "m" / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "CogVideoXTransformer3DModel", "num_layers": 2}))
    for said in ("only the Wan family", "config.json is no JSON"):
        assert main(["estimate", "dmd_lab", "--model", str(tmp_path / "m")]) == 2
        assert said in capsys.readouterr().err
        config.write_text("{")


def test_a_flow_network_of_other_settings_is_a_sentence(family, tmp_path):
    shutil.copytree(family / "raft", tmp_path / "raft")
    (tmp_path / "raft" / "config.json").write_text('{"layers": 3}')
    with pytest.raises(UserError, match=r"raft/config\.json describes no RAFT"):
        load_flow(str(tmp_path / "raft"))


def test_an_entry_that_a_file_lacks_is_named_with_the_file_also_deep_inside_and_stays_a_key_error(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text('{"chunks": {"first": 1}, "blocks": [{"a": 2}]}')
    facts = read_json(path, "make it again")
    assert facts == {"chunks": {"first": 1}, "blocks": [{"a": 2}]}
    for lacking in (lambda: facts["fps"], lambda: facts["chunks"]["rest"], lambda: facts["blocks"][0]["b"]):
        with pytest.raises(UserError, match=r"facts.json has no entry '\w+': .*make it again"):
            lacking()
        with pytest.raises(KeyError):
            lacking()
    assert facts.get("fps") is None


def test_a_cache_that_does_not_say_its_rate_is_named(tmp_path):
    (tmp_path / "cache.json").write_text(json.dumps({"format": "mogan-cache", "version": 1, "contents": "clips"}))
    (tmp_path / "index.jsonl").write_text('{"id": "a", "caption": "b"}\n')
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"cache.json has no entry 'fps'"):
        open_cache(tmp_path).facts["fps"]
