"""Which videos a folder holds and which words belong to each: one identity per file, every file that is left out said."""

import json
import os
import socket
import unicodedata
from pathlib import Path

import pytest

from mogan.data.cache import open_cache
from mogan.data.listing import scan
from mogan.data.lists import read_prompts
from mogan.data.video import read_frames, write_video
from mogan.errors import UserError
from mogan.evaluation.clips import read_folder
from mogan.evaluation.evaluate import evaluate
from mogan.sampling.first_frames import clip_of_prompts
from test_prepare import lines, run, textured
from test_video import numbered

NOT_UTF8 = os.fsdecode(b"caf\xe9-1.mp4")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def jsonl(folder, *rows):
    lines = (
        json.dumps({"file_name": name} | ({} if caption is None else {"caption": caption})) for name, caption in rows
    )
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def captions(folder, default=None):
    return {s.name: s.caption for s in scan(folder, default) if s.problem is None}


def problems(folder, default="d"):
    return {s.name: s.problem for s in scan(folder, default) if s.problem}


# ---------------------------------------------------------------------------------------------- which files


def special(folder):
    """One of everything that is called like a video and is none, and a good one."""
    touch(folder, "good.mp4", "folder.mp4/inside.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "gone.mp4").symlink_to("nowhere")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    listening = socket.socket(socket.AF_UNIX)
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)  # the names of sockets are short
    try:
        listening.bind("socket.mp4")
    finally:
        os.fchdir(here)
        os.close(here)
        listening.close()
    return {
        "folder.mp4": "is a folder",
        "pipe.mp4": "is a pipe",
        "gone.mp4": "is a broken link",
        "loop.mp4": "cannot be looked at",
        "device.mp4": "is a device",
        "socket.mp4": "is a socket",
    }


def test_what_is_no_file_is_left_out_with_its_reason_and_never_opened(tmp_path):
    expected = special(tmp_path)
    assert captions(tmp_path, "d") == {"good.mp4": "d", "folder.mp4/inside.mp4": "d"}
    found = problems(tmp_path)
    assert set(found) == set(expected)
    for name, words in expected.items():
        assert words in found[name]
    seen = {entry.path.name: entry.problem for entry in read_folder(tmp_path, "x").clips}
    assert {name: problem for name, problem in seen.items() if problem} == found
    with pytest.raises(UserError, match="is a pipe, not a file"):
        scan(tmp_path / "pipe.mp4", "d")


def test_captions_for_what_is_no_file_change_nothing(tmp_path):
    special(tmp_path)
    jsonl(
        tmp_path,
        ("pipe.mp4", "x"),
        ("folder.mp4", "y"),
        (".", "z"),
        ("n" * 300 + ".mp4", "w"),
        ("a\0.mp4", "v"),
        ("\ud800.mp4", "u"),
    )
    found = problems(tmp_path)
    assert "pipe" in found["pipe.mp4"]
    assert found["."] == "is a folder, not a file"
    assert "File name too long" in found["n" * 300 + ".mp4"]
    assert found["a\0.mp4"].startswith("is not there")
    assert found["\ud800.mp4"].startswith("is not there")
    assert {"a\0.mp4", "\ud800.mp4"} == set(read_folder(tmp_path, "x").missing)


def test_linked_folders_are_followed_once_and_never_in_circles(tmp_path):
    touch(tmp_path / "pool", "far.mp4")
    touch(tmp_path / "v", "real/a.mp4", "b.mp4")
    (tmp_path / "v/0 linked").symlink_to(tmp_path / "pool")
    (tmp_path / "v/again").symlink_to(tmp_path / "pool")
    (tmp_path / "v/0 real too").symlink_to("real")
    (tmp_path / "v/real/up").symlink_to("..")
    (tmp_path / "v/real/further up").symlink_to(tmp_path)
    (tmp_path / "v/everything").symlink_to("/")
    assert captions(tmp_path / "v", "d") == {"0 linked/far.mp4": "d", "real/a.mp4": "d", "b.mp4": "d"}
    assert not any(s.outside for s in scan(tmp_path / "v", "d"))
    above = "cannot be searched (it leads to a folder that holds this one)"
    assert problems(tmp_path / "v") == {"everything/": above, "real/further up/": above}


def test_hidden_files_and_folders_are_not_looked_at_unless_a_list_names_them(tmp_path):
    touch(tmp_path, "a.mp4", "._a.mp4", ".trash/b.mp4")
    assert list(captions(tmp_path, "d")) == ["a.mp4"]
    jsonl(tmp_path, (".trash/b.mp4", "x"))
    assert captions(tmp_path, "d") == {"a.mp4": "d", ".trash/b.mp4": "x"}


def test_suffixes_in_capitals_are_found_with_their_captions(tmp_path):
    touch(tmp_path, "a.MP4", "b.WebM")
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert captions(tmp_path) == {"a.MP4": "one", "b.WebM": "two"}


def test_what_may_not_be_read_is_said(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4", "b.mp4", "closed/c.mp4")
    may, search = os.access, os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return search(path)

    monkeypatch.setattr("os.access", lambda path, mode: may(path, mode) and not str(path).endswith("a.mp4"))
    monkeypatch.setattr("os.scandir", refuse)  # root, who runs many tests, may read everything
    assert captions(tmp_path, "d") == {"b.mp4": "d"}
    assert problems(tmp_path) == {
        "a.mp4": "may not be read (permission denied)",
        "closed/": "cannot be searched (Permission denied)",
    }


def test_a_name_like_an_address_in_the_current_folder_is_a_file(tmp_path, monkeypatch):
    write_video(tmp_path / "a: b-0.mp4", numbered(3), 16)
    write_video(tmp_path / "http:x-0.mp4", numbered(3), 16)
    monkeypatch.chdir(tmp_path)
    for path in [s.path for s in scan(".", "d")] + [entry.path for entry in read_folder(tmp_path, "x").clips]:
        assert len(list(read_frames(path))) == 3
    assert len(list(read_frames(scan("a: b-0.mp4", "d")[0].path))) == 3


def test_names_that_are_not_utf8_are_files_like_others(tmp_path):
    touch(tmp_path, NOT_UTF8)
    assert captions(tmp_path, "d") == {NOT_UTF8: "d"}
    (entry,) = read_folder(tmp_path, "x").clips
    assert (entry.prompt, entry.index) == ("caf\\udce9", 1)
    jsonl(tmp_path, (NOT_UTF8, "a place"))  # as JSON's escapes
    assert captions(tmp_path) == {NOT_UTF8: "a place"}


# ---------------------------------------------------------------------------------------------- which file a row means


def test_one_file_has_one_identity(tmp_path):
    touch(tmp_path, "a.mp4", "s/b.mp4", "c.mp4")
    (tmp_path / "link.mp4").symlink_to("c.mp4")
    (tmp_path / "hard.mp4").hardlink_to(tmp_path / "s/b.mp4")
    jsonl(tmp_path, (str(tmp_path / "a.mp4"), "A"), ("./s/../s//b.mp4", "B"), ("link.mp4", "C"))
    assert captions(tmp_path) == {"a.mp4": "A", "hard.mp4": "B", "c.mp4": "C"}
    assert problems(tmp_path) == {
        "s/b.mp4": "is the same file as hard.mp4, which is used",
        "link.mp4": "is the same file as c.mp4, which is used",
    }
    assert [(e.path.name, e.prompt) for e in read_folder(tmp_path, "x").clips] == [
        ("a.mp4", "A"),
        ("hard.mp4", "B"),
        ("c.mp4", "C"),
    ]


@pytest.mark.parametrize("second", ["a.mp4", "./a.mp4", "s/../a.mp4", "{}/a.mp4", "link.mp4", "s\\..\\a.mp4", " a.mp4"])
@pytest.mark.parametrize("caption", ["one", "two"])
def test_two_rows_for_one_file_are_refused_with_both_lines(tmp_path, second, caption):
    touch(tmp_path, "a.mp4", "s/b.mp4")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    jsonl(tmp_path, ("a.mp4", "one"), ("s/b.mp4", "x"), (second.format(tmp_path), caption))
    for read in (scan, lambda folder: read_folder(folder, "x")):
        with pytest.raises(
            UserError, match=r"line 3 names a\.mp4 a second time, after .*line 1: keep one row per file"
        ):
            read(tmp_path)


def test_files_outside_the_folder_are_read_and_told(tmp_path):
    touch(tmp_path, "out.mp4", "v/a.mp4")
    (tmp_path / "out.txt").write_text("beside")
    jsonl(tmp_path / "v", ("../out.mp4", None), ("a.mp4", "x"))
    (inside, outside) = sorted(scan(tmp_path / "v"), key=lambda s: s.outside)
    assert (outside.name, outside.caption, outside.problem) == (str(tmp_path / "out.mp4"), "beside", None)
    assert not inside.outside
    assert read_folder(tmp_path / "v", "x").outside == (str(tmp_path / "out.mp4"),)


def test_backslashes_and_unicode_forms_of_names_are_understood(tmp_path):
    composed = unicodedata.normalize("NFC", "café.mp4")
    decomposed = unicodedata.normalize("NFD", "café.mp4")
    touch(tmp_path, f"clips/{decomposed}", composed)
    jsonl(tmp_path, (f".\\clips\\{composed}", "one"), (decomposed, "two"))
    assert captions(tmp_path) == {f"clips/{decomposed}": "one", composed: "two"}
    assert {e.prompt for e in read_folder(tmp_path, "x").clips} == {"one", "two"}
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / f"{decomposed[:-4]}.txt").write_text("beside")
    assert captions(tmp_path) == {composed: "beside"}


def test_a_name_that_could_mean_two_files_means_neither(tmp_path):
    names = ["a\u0323\u0307.mp4", "\u1ea1\u0307.mp4", "a\u0307\u0323.mp4"]  # one text in three spellings
    touch(tmp_path, *names[:2])
    jsonl(tmp_path, (names[2], "x"))
    assert "is not there" in problems(tmp_path)[names[2]]


def test_files_that_are_not_there_are_told(tmp_path):
    touch(tmp_path, "a.mp4")
    jsonl(tmp_path, ("a.mp4", "x"), ("C:\\videos\\b.mp4", "y"))
    assert problems(tmp_path) == {"C:/videos/b.mp4": f"is not there; {tmp_path / 'metadata.jsonl'} line 2 names it"}
    assert read_folder(tmp_path, "x").missing == ("C:/videos/b.mp4",)


# ---------------------------------------------------------------------------------------------- which words


def test_blank_captions_are_none(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "d.txt").write_text("beside")
    jsonl(tmp_path, ("b.mp4", ""), ("c.mp4", None), ("d.mp4", " \u2003 "))
    assert captions(tmp_path) == {"d.mp4": "beside"}
    assert set(problems(tmp_path, None)) == {"a.mp4", "b.mp4", "c.mp4"}
    assert all("no caption" in problem for problem in problems(tmp_path, None).values())
    assert captions(tmp_path, " d ") == {"a.mp4": "d", "b.mp4": "d", "c.mp4": "d", "d.mp4": "beside"}
    with pytest.raises(UserError, match="--caption is blank"):
        scan(tmp_path, " ")
    with pytest.raises(UserError, match="--caption holds half a character"):
        scan(tmp_path, "\udc80")


def test_a_caption_that_cannot_be_read_leaves_out_its_video_alone(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "a.txt").write_bytes("café".encode("cp1252"))
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes("café\r\n".encode("utf-16"))
    assert captions(tmp_path, "d") == {"c.mp4": "café"}
    found = problems(tmp_path)
    assert "not UTF-8 text" in found["a.mp4"]
    assert "is a pipe" in found["b.mp4"]
    assert [entry.problem is None for entry in read_folder(tmp_path, "x").clips] == [False, False, True]


def test_lists_in_folders_below_speak_of_their_own_files(tmp_path):
    touch(tmp_path, "one/a.mp4", "two/a.mp4")
    jsonl(tmp_path / "one", ("a.mp4", "first"))
    (tmp_path / "two/Metadata.CSV").write_text("video;text\na.mp4;second, with a comma\n")
    assert captions(tmp_path) == {"one/a.mp4": "first", "two/a.mp4": "second, with a comma"}
    jsonl(tmp_path, ("one/a.mp4", "again"))
    with pytest.raises(UserError, match=r"names one/a\.mp4 a second time"):
        scan(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,caption\n")
    with pytest.raises(UserError, match=r"holds both metadata\.csv and metadata\.jsonl: keep one"):
        scan(tmp_path)


def test_lists_that_are_not_read_are_told_of_and_empty_ones_too(tmp_path):
    touch(tmp_path, "a.mp4", "metadata.parquet")
    for read in (lambda folder: scan(folder, "d"), lambda folder: read_folder(folder, "x")):
        with pytest.raises(UserError, match=r"metadata\.parquet is no list that is read here"):
            read(tmp_path)
    (tmp_path / "metadata.parquet").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,caption\n")
    assert captions(tmp_path, "d") == {"a.mp4": "d"}
    with pytest.raises(UserError, match="lists no clip"):
        read_folder(tmp_path, "x")


def test_the_evaluation_reads_what_prepare_reads(tmp_path):
    touch(tmp_path, "clips/a.mp4", "b.mp4", "left/c.mp4")
    (tmp_path / "metadata.csv").write_bytes(
        '\ufefffile_name,caption,seed\r\nclips\\a.mp4,"a dog, running",7\r\nb.mp4,,\r\n'.encode()
    )
    found = read_folder(tmp_path, "x")
    assert [(e.prompt, e.seed) for e in found.clips] == [("a dog, running", 7), ("b", None)]
    assert (found.unlisted, found.uncaptioned) == (("left/c.mp4",), ("b.mp4",))
    assert captions(tmp_path) == {"clips/a.mp4": "a dog, running"}
    (tmp_path / "b.txt").write_text("a cat")  # beside a row without a caption
    assert captions(tmp_path) == {"clips/a.mp4": "a dog, running", "b.mp4": "a cat"}
    found = read_folder(tmp_path, "x")
    assert ([e.prompt for e in found.clips], found.uncaptioned) == (["a dog, running", "a cat"], ())
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "b.txt").write_text("a cat")
    touch(tmp_path, "b two.mp4", "x-3.mp4")
    (tmp_path / "b two.txt").write_text("a cat")
    found = read_folder(tmp_path, "x")
    assert [(e.prompt, e.index) for e in found.clips] == [("a cat", 0), ("a cat", 1), ("x", 3)]
    assert found.unlisted == ("clips/a.mp4", "left/c.mp4")


def test_names_with_line_feeds_are_prompts_too(tmp_path):
    touch(tmp_path, "a\ndog-2.mp4")
    (entry,) = read_folder(tmp_path, "x").clips
    assert (entry.prompt, entry.index) == ("a\ndog", 2)


def test_first_frames_are_looked_for_by_the_same_reader_and_broken_clips_passed_over(tmp_path):
    touch(tmp_path, "a.mp4", "broken.mp4")
    write_video(tmp_path / "b.mp4", numbered(3), 16)
    (tmp_path / "folder.mp4").mkdir()
    rows = [
        ("a.mp4", "a dog\u2028runs"),
        ("b.mp4", "a dog\u2028runs"),
        ("folder.mp4", "a cat"),
        ("broken.mp4", "a bird"),
    ]
    jsonl(tmp_path, *rows)
    assert clip_of_prompts(tmp_path, ["a dog\u2028runs"]) == {"a dog\u2028runs": tmp_path / "b.mp4"}
    with pytest.raises(
        UserError, match=r"has no clip with the caption 'a cat' \(folder\.mp4 is a folder, not a file\)"
    ):
        clip_of_prompts(tmp_path, ["a cat"])
    with pytest.raises(UserError, match=r"has no clip with the caption 'a bird' \(.*broken\.mp4 is not a video"):
        clip_of_prompts(tmp_path, ["a bird"])


def test_a_place_that_cannot_be_is_one_sentence(tmp_path):
    long = tmp_path / ("x" * 300)
    for read in (scan, lambda path: read_folder(path, "x"), read_prompts):
        for path in (long, Path(f"{long}.mp4"), tmp_path / "a\0b"):
            with pytest.raises(UserError, match=r"is not|is no |cannot be looked at"):
                read(path)


# ---------------------------------------------------------------------------------------------- one bad file


@pytest.fixture
def mixed(tmp_path):
    """Two good clips, one of a name that is not UTF-8, among everything that is none."""
    folder = tmp_path / "v"
    folder.mkdir()
    expected = special(folder)
    (folder / "folder.mp4/inside.mp4").unlink()
    (folder / "empty.mp4").touch()
    for name in ("good.mp4", NOT_UTF8):
        write_video(folder / name, textured(len(name), 9), 16)
    return folder, expected | {"empty.mp4": "0 bytes"}


def test_one_bad_file_never_ends_a_preparation(mixed, tmp_path):
    folder, expected = mixed
    summary = run(folder, tmp_path / "c")
    assert (summary.kept, summary.encoded, summary.skipped) == (2, 2, len(expected))
    skipped = {row["source"]: row["reason"] for row in lines(tmp_path / "c/skipped.jsonl")}
    assert set(skipped) == set(expected)
    assert all(words in skipped[name] for name, words in expected.items())
    assert {entry["source"] for entry in open_cache(tmp_path / "c").entries} == {"good.mp4", NOT_UTF8}
    again = run(folder, tmp_path / "c")
    assert (again.kept, again.encoded) == (2, 0)
    for name in ("good.mp4", NOT_UTF8):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"no clip is left .*; first of the skipped: device\.mp4: is a device"):
        run(folder, tmp_path / "c")


def test_one_bad_file_never_ends_an_evaluation(mixed, tmp_path):
    folder, expected = mixed
    found = evaluate((folder,), out=tmp_path / "r.json", flow="farneback", quick=True)["systems"]["v"]
    assert found["metrics"]["dynamic_degree"]["n"] == 2
    assert {row["file"] for row in found["how"]["failed"]} == set(expected)
    assert any(f"{len(expected)} of {len(expected) + 2} clips could not be read" in w for w in found["how"]["warnings"])
    jsonl(folder, *((name, f"about {name}") for name in ("good.mp4", *expected, "absent.mp4")))
    found = evaluate((folder,), out=tmp_path / "r.json", flow="farneback", quick=True)["systems"]["v"]
    assert found["metrics"]["dynamic_degree"]["n"] == 1
    assert found["how"]["missing"] == ["absent.mp4"]
    assert any("such as caf\\udce9-1.mp4" in warning for warning in found["how"]["warnings"])


def test_captions_with_other_ends_of_lines_survive_a_cache(tmp_path):
    odd = "a dog\u2028runs\u0085then\x0csleeps"
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", textured(0, 9), 16)
    jsonl(tmp_path / "v", ("a.mp4", odd))
    run(tmp_path / "v", tmp_path / "c")
    assert [entry["caption"] for entry in open_cache(tmp_path / "c").entries] == [odd]
