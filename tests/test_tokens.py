"""Captions that the text encoder cuts or cannot tell apart are said, once, with how many and which first."""

import json

import pytest

from mogan.data.cache import open_cache
from mogan.data.prepare import prepare
from mogan.data.prepare_clips import prepare_clips
from mogan.data.prepare_prompts import prepare_prompts
from mogan.data.tokens import about_tokens, load_tokens
from mogan.data.video import write_video
from mogan.models import wan
from mogan.models.attention import TEXT_LENGTH
from mogan.sampling.sample import sample
from test_prepare import FACTS, GEOMETRY, difference_flow, encode_text, encode_video, textured

LONG = " ".join(["circle"] * 600)


@pytest.fixture(scope="module")
def tokens():
    return load_tokens(wan.lab_folder() / "student")


def test_tokens_are_counted_as_the_text_encoder_counts_them(tokens):
    encode = wan.load_text(wan.lab_folder() / "student")
    for prompt in ("a red circle falling", "", "  a   red\ncircle ", "a &amp; b", LONG):
        (embedding,) = encode([prompt])
        (numbers,) = tokens([prompt])
        assert len(embedding) == min(len(numbers), TEXT_LENGTH)
    assert tokens([]) == []


def test_captions_that_are_cut_are_counted_and_those_that_become_one_too(tokens):
    fits = " ".join(["circle"] * 511)
    assert about_tokens({"a": fits, "b": "a red circle", "c": "a red circle"}, tokens) == []
    cut, alike = about_tokens(
        {"a": "a red circle", "b": f"{fits} red", "c": f"{fits} blue", "d": "a zebra", "e": "a lion"}, tokens
    )
    assert "2 captions have more than 512 tokens (first b, 513): what comes after is cut" in cut
    assert "2 captions are the same to the text encoder as a different one (first c as b)" in alike
    encode = wan.load_text(wan.lab_folder() / "student")
    (b,), (c,), (d,) = (encode([text]) for text in (f"{fits} red", f"{fits} blue", f"{fits}"))
    assert b.equal(c)
    assert b.equal(d)  # 511 tokens and the end: not cut, and the same all the same


def test_a_cache_keeps_what_was_said(tmp_path, capsys):
    (tmp_path / "v").mkdir()
    for name in "ab":
        write_video(tmp_path / f"v/{name}.mp4", textured(ord(name), 9), 16)
        (tmp_path / f"v/{name}.txt").write_text(f"{LONG} {name}")
    how = {"geometry": GEOMETRY, "fingerprints": FACTS, "encode_video": encode_video, "encode_text": encode_text}
    count = lambda prompts: [[1] * len(prompt.split()) for prompt in prompts]  # noqa: E731
    found = prepare_clips(tmp_path / "v", tmp_path / "c", estimate_flow=difference_flow, tokens=count, **how)
    said = capsys.readouterr().out
    assert "2 captions have more than 512 tokens (first a.mp4, 601)" in said
    assert (tmp_path / "c/warnings.log").read_text() == "".join(f"{note}\n" for note in found.notes)
    assert said.startswith((tmp_path / "c/warnings.log").read_text())
    (tmp_path / "p.csv").write_text(f"file_name,caption\na.mp4,{LONG}\nb.mp4,{LONG} red\nc.mp4,\n")
    assert prepare_prompts(tmp_path / "p.csv", tmp_path / "d", {}, encode_text, tokens=count) == 2
    notes = (tmp_path / "d/warnings.log").read_text().splitlines()
    assert [note.split(" (first")[0] for note in notes] == [
        f"{tmp_path / 'p.csv'}: 1 of 3 rows have no caption and are left out",
        "2 captions have more than 512 tokens",
        "1 captions are the same to the text encoder as a different one",
    ]


def test_commands_tell_of_captions_that_are_cut(family, tmp_path, capsys):
    rows = [{"caption": f"{LONG} {colour}"} for colour in ("red", "blue")]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    model = str(family / "student")
    prepare(tmp_path / "p.json", out=tmp_path / "c", model=model)
    assert "2 captions have more than 512 tokens" in capsys.readouterr().out
    assert len(open_cache(tmp_path / "c")) == 2
    (tmp_path / "one.txt").write_text(LONG)
    sample(prompts=tmp_path / "one.txt", out=tmp_path / "s", model=model)
    assert "prompts: 1 captions have more than 512 tokens (first circle" in capsys.readouterr().out
