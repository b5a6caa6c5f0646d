"""Where results go: refused before the work if nothing can be written there, and never half-written on a full disk."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mogan.cli import COMMANDS, main
from mogan.disk.files import (
    _sweep,
    make_folder,
    new_folder,
    none_left_empty,
    refusal,
    replacing,
    writable_file,
    writable_folder,
    write_atomically,
)
from mogan.disk.locks import alone_at, alone_in
from mogan.errors import UserError
from test_train import build
from tiny_recipes import flow_matching

NOWHERE = Path("/proc/nowhere")  # nobody can write there, root neither


def commands(family, cache, prompts, run):
    """Every command that writes to ``--out``, with arguments that are right but for that."""
    return {
        "train": ["tiny_recipes:flow_matching", "--data", cache, "--model", family / "teacher"],
        "sample": ["--prompts", prompts, "--model", family / "student"],
        "stream": ["--model", family / "student"],
        "attention": ["--prompts", prompts, "--model", family / "teacher"],
        "tiles": [family, "--threshold", "0.1"],
        "vace": [family / "teacher"],
        "trajectories": ["--prompts", prompts, "--model", family / "teacher"],
        "prepare": [prompts, "--model", family / "teacher"],
        "evaluate": [family],
        "report": [run],
        "export": [run],
        "import": [family, "--base", family / "teacher", "--sigmas", "1", "0.5"],
        "demo": [],
        "study": ["table1"],
        "lab render": [],
        "lab build": [],
    }


@pytest.fixture(scope="module")
def run(family, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", "tiny_recipes:flow_matching", "--data", cache, "--model", family / "teacher", "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
        assert main([str(a) for a in arguments]) == 0
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moving left\n")
    return path


@pytest.mark.parametrize("name", commands(*[Path("x")] * 4))
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    name, family, cache, prompts, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    suffix = {"evaluate": "results.json", "report": "page.html", "stream": "clip.mp4"}.get(name, "")
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (NOWHERE / suffix, file / "x" / suffix, *([] if suffix else [file])):
        arguments = [*name.split(), *commands(family, cache, prompts, run)[name], "--out", place]
        assert main([str(a) for a in arguments]) == 2, place
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"mogan {name}: "), said
        assert str(place) in said or str(place.parent) in said
        assert "another --out" in said
    assert file.read_text() == "mine"
    assert set(tmp_path.iterdir()) == {file, prompts}


def test_a_command_that_fails_leaves_no_empty_folder_and_none_of_others_is_taken(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for out in ("mine", "new/deep", "new/deep/s.mp4", "mine/x"):
        words = (
            ["stream", "--model"]
            if out.endswith("mp4")
            else ["sample", "--prompts", str(tmp_path / "p.txt"), "--model"]
        )
        (tmp_path / "p.txt").write_text("a red circle\n")
        assert main([*words, str(tmp_path / "nowhere"), "--out", str(tmp_path / out)]) == 2
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "p.txt"], out
    capsys.readouterr()

    @none_left_empty()
    def interrupted():
        make_folder(tmp_path / "new" / "deep")
        (tmp_path / "new" / "kept").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "mine", "new", "p.txt"]


def test_every_command_with_an_out_is_tried(family):
    import importlib
    import inspect

    def takes_out(target):
        module, function = target.split(":")
        return "out" in inspect.signature(getattr(importlib.import_module(module), function)).parameters

    tried = {*commands(*[Path("x")] * 4), "survey build", "survey analyze"}  # these two in test_survey_*.py
    assert {name for name, (target, _) in COMMANDS.items() if takes_out(target)} == tried


def test_a_name_that_a_library_gives_as_bytes_is_told_as_a_name():
    gone = FileNotFoundError(errno.ENOENT, "No such file", b"run/tensorboard/events")
    assert refusal(gone).startswith("run/tensorboard/events is not there")
    assert refusal(gone, Path("run/metrics.jsonl")) is None


def test_a_file_where_a_folder_should_be_and_the_other_way_round_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file, not a folder: give another --figures"):
        writable_folder(tmp_path / "file", "--figures")
    with pytest.raises(UserError, match="is a folder: give a file to write"):
        writable_file(tmp_path, rb"")
    for given, suffix in (("r.pdf", ".html"), ("r.html", ".json")):
        with pytest.raises(UserError, match=rf"{given} must end in {suffix}: give another --out"):
            writable_file(tmp_path / given, rb"", suffix=suffix)
    writable_file(tmp_path / "R.HTML", rb"", suffix=".html")
    writable_file(tmp_path / "results", rb"", suffix=".json")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=rf"^--out {tmp_path}/file/x: {tmp_path}/file is a file, not a folder"):
        writable_file(tmp_path / "file" / "x", rb"")
    writable_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


# ---------------------------------------------------------------------------------------------- full disks


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_half_written(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "before")
    with pytest.raises(UserError, match=r"a\.txt cannot be written, the disk is full"), replacing(path) as temporary:
        full(temporary.write_text("half"))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_do_not_fit_are_told_with_their_files_name(tmp_path, monkeypatch):
    from mogan.evaluation.kept import Kept
    from mogan.sampling.samples import append_samples

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"samples\.jsonl cannot be written, the disk is full"):
        append_samples(tmp_path, [{"file": "a.mp4"}])
    monkeypatch.setattr("mogan.evaluation.kept.locked", full)
    with pytest.raises(UserError, match=r"clips\.jsonl cannot be written, the disk is full"):
        Kept(tmp_path / "clips.jsonl").put("key", {})


def test_what_a_killed_process_left_is_taken_away_and_what_others_write_is_not(tmp_path):
    script = "import os,sys\nfrom pathlib import Path\nfrom mogan.disk.files import replacing\n"
    script += "with replacing(Path(sys.argv[1])) as t:\n t.write_text('half')\n os.kill(os.getpid(), 9)"
    for name in ("a.mp4", "b.safetensors"):
        subprocess.run([sys.executable, "-c", script, tmp_path / name])
        assert [p.suffix for p in tmp_path.iterdir()] == [Path(name).suffix], "the second has taken the first's away"
    theirs, ancient, mine = (tmp_path / name for name in (".tmp-0badf00d-7-a", ".tmp-0badf00d-8-a", ".tmp-2024-notes"))
    for path in (theirs, ancient, mine):
        path.write_text("of another machine, of one long ago, of the user")
    os.utime(ancient, (0, 0))
    os.utime(mine, (0, 0))
    with replacing(tmp_path / "c") as living:
        living.write_text("whole")
        _sweep.cache_clear()
        write_atomically(tmp_path / "d", "by another at the same time")
        assert living.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"c", "d", theirs.name, mine.name}


def test_a_checkpoint_takes_away_what_a_killed_one_left(family, cache, tmp_path, monkeypatch):
    from mogan.training.loop import run_training

    (tmp_path / "checkpoints" / ".000007.new").mkdir(parents=True)
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    run_training(build(flow_matching().with_budget(1), family, cache, tmp_path), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000001"]


def test_a_folder_is_made_by_one_at_a_time_and_the_last_takes_nothing_away(tmp_path):
    with new_folder(tmp_path / "export") as first:
        (first / "weights").write_text("whole")
        with pytest.raises(UserError, match=r"another command is at work in .*export"), new_folder(tmp_path / "export"):
            pass
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "export"):
        pass
    assert (tmp_path / "export" / "weights").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("theirs", ["family", "teacher", "notes.txt"])
def test_a_family_is_not_built_over_what_is_anothers(theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mogan.lab.build._stages", lambda *_: pytest.fail("begun"))
    (tmp_path / theirs).mkdir()
    assert main(["lab", "build", "--out", str(tmp_path)]) == 2
    assert (
        f"holds other things than this command's ({theirs}): give an empty or a new folder" in capsys.readouterr().err
    )
    assert [p.name for p in tmp_path.iterdir()] == [theirs]


@pytest.mark.parametrize("name", ["lab render", "export"])
def test_two_that_write_one_place_are_told_apart(name, family, cache, prompts, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    out = tmp_path / "out"
    out.mkdir()
    place = out / "export" if name == "export" else out
    with alone_in(out) if place == out else alone_at(place):
        arguments = [*name.split(), *commands(family, cache, prompts, run)[name], "--out", place]
        assert main([str(a) for a in arguments]) == 2
    assert f"another command is at work in {place}" in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "words", [["evaluate", "link", "--out", "x.json"], ["lab", "render", "--out", "v", "--controls", "link"]]
)
def test_a_link_to_itself_is_a_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("link")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "link" in said
    assert said.count("\n") == 1


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a device or a pipe"):
        writable_file(tmp_path / "pipe", rb"")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_does_not_fit_is_taken_away(tmp_path):
    with (
        pytest.raises(UserError, match="export cannot be written, the disk is full"),
        new_folder(tmp_path / "export") as temporary,
    ):
        full((temporary / "half").write_text("half"))
    with pytest.raises(KeyError), new_folder(tmp_path / "export") as temporary:
        raise KeyError("a mistake of ours is not the disk's")
    assert list(tmp_path.iterdir()) == []


def test_words_of_other_libraries_are_read_and_other_errors_are_not_the_disks(monkeypatch):
    assert "disk is full" in refusal(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert "disk is full" in refusal(OSError([("a", "b", "[Errno 28] No space left on device: 'b'")]))
    assert "cannot be used" in refusal(PermissionError(errno.EACCES, "Permission denied", "/somewhere"))
    assert "/x is not there" in refusal(FileNotFoundError(errno.ENOENT, "No such file", "/x"))
    assert "/x cannot be used (File exists)" in refusal(FileExistsError(errno.EEXIST, "File exists", "/x"))
    assert "ulimit -n" in refusal(OSError(errno.EMFILE, "Too many open files", "/x"))
    assert refusal(FileNotFoundError("no such thing")) is None
    assert refusal(ValueError("28")) is None
    assert refusal(UnicodeEncodeError("latin-7", "é", 0, 1, "not in range")) is None
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "set PYTHONUTF8=1" in refusal(UnicodeEncodeError("ascii", "é", 0, 1, "not in range"))
    assert refusal(PermissionError(errno.EACCES, "Permission denied", "/elsewhere/x"), Path("/here/y")) is None


def test_a_file_where_a_folder_of_a_run_should_be_is_named(family, cache, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("mine")
    words = [
        "train",
        "tiny_recipes:flow_matching",
        "--data",
        cache,
        "--model",
        family / "teacher",
        "--out",
        tmp_path / "run",
    ]
    assert main([str(word) for word in words]) == 2
    assert "run/tensorboard cannot be used (File exists)" in capsys.readouterr().err


def short_of_room(arguments, most, folder):
    """Run a command whose files may not grow beyond ``most`` bytes: to a program the same as a full disk."""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mogan", *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "sample", "prepare", "evaluate", "report", "export"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    name, family, cache, prompts, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    if name == "evaluate":
        clips = tmp_path / "clips"
        assert main(["sample", "--prompts", str(prompts), "--model", str(family / "student"), "--out", str(clips)]) == 0
    given = {**commands(family, cache, prompts, run), "evaluate": [tmp_path / "clips", "--flow", "farneback"]}[name]
    out = tmp_path / {"evaluate": "out/results.json", "report": "out/page.html"}.get(name, "out")
    done = short_of_room([name, *given, "--out", out], 100, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the disk is full" in done.stderr or "free some disk space" in done.stderr
    assert "a file cannot be written" not in done.stderr
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file()] if (tmp_path / "out").exists() else []
    whole = {
        "metrics.jsonl",
        "results.clips.jsonl",
        "samples.jsonl",
    }  # grow line by line; whoever reads them leaves a torn line out
    assert [p for p in left if p.name not in whole and "tfevents" not in p.name and p.stat().st_size >= 100] == []
    assert [p for p in left if p.name.startswith(".")] == []
    again = [name, *map(str, given), "--out", str(out)]
    assert main(again) == 0, "with room it goes on"


def test_a_checkpoint_that_does_not_fit_keeps_the_one_before(family, cache, tmp_path, monkeypatch):
    from mogan.runs.checkpoint import checkpoints
    from mogan.training.loop import run_training

    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    run_training(build(flow_matching().with_budget(1), family, cache, tmp_path), tmp_path)
    monkeypatch.setattr("mogan.runs.checkpoint.write_atomically", full)
    with pytest.raises((UserError, OSError), match=r"No space|disk"):
        run_training(build(flow_matching().with_budget(2), family, cache, tmp_path), tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["000001"]
