"""One reader of lists: what people write comes back whole, or is refused with its file and line."""

import csv
import json
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mogan.data.lists import CAPTION_COLUMNS, SUFFIXES, read_prompts, read_rows, read_text
from mogan.errors import UserError

ODD = "a dog\u2028runs\u0085then\x0bsleeps\x0cand\x1cdreams"  # str.splitlines would cut it in six
CAPTIONS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5)


def refused(path, match, read=read_rows):
    with pytest.raises(UserError, match=match) as error:
        read(path)
    assert "\n" not in str(error.value)


def captions(path):
    return [row.caption for row in read_rows(path)]


def stripped(texts):
    return [text.strip() or None for text in texts]


@given(CAPTIONS, st.sampled_from([",", ";", "\t"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_what_a_csv_writer_writes_is_what_is_read(tmp_path_factory, texts, delimiter, encoding):
    path = tmp_path_factory.mktemp("lists") / "metadata.csv"
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["file_name", "caption"])
        writer.writerows([f"{number}.mp4", text] for number, text in enumerate(texts))
    assert captions(path) == stripped(texts)
    assert [row.file for row in read_rows(path)] == [f"{number}.mp4" for number in range(len(texts))]


@given(CAPTIONS, st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_what_json_writes_is_what_is_read(tmp_path_factory, texts, ascii_only, end):
    folder = tmp_path_factory.mktemp("lists")
    rows = [{"file_name": f"{number}.mp4", "caption": text} for number, text in enumerate(texts)]
    lines = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (folder / "metadata.jsonl").write_bytes(lines.encode())
    (folder / "metadata.json").write_bytes(json.dumps(rows, ensure_ascii=ascii_only, indent=1).encode())
    assert captions(folder / "metadata.jsonl") == captions(folder / "metadata.json") == stripped(texts)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n")), min_size=1))
def test_lines_of_prompts_end_at_line_feeds_alone(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("lists") / "p.txt"
    path.write_bytes("\n".join(["one", *texts]).encode())
    assert read_prompts(path, lambda _: None) == list(dict.fromkeys(["one", *filter(None, stripped(texts))]))


def test_captions_with_other_ends_of_lines_stay_whole(tmp_path):
    (tmp_path / "a.csv").write_bytes(f"file_name,caption\r\na.mp4,{ODD}\r\nb.mp4,a cat\r\n".encode())
    assert captions(tmp_path / "a.csv") == [ODD, "a cat"]
    (tmp_path / "p.txt").write_bytes(f"{ODD}\r\na cat".encode())
    assert read_prompts(tmp_path / "p.txt") == [ODD, "a cat"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,caption\na.mp4,a dog\nb.mp4,a red fox, running\n", 'line 3 has 3 fields .* commas into "double'),
        ("file_name;caption\na.mp4;a dog; a cat\n", "line 2 has 3 fields .* semicolons into"),
        ("file_name,caption,,\na.mp4,a red fox, running, fast\n", "line 2 has 4 fields"),  # as a spreadsheet pads it
        ("file_name,caption\na.mp4\n", "line 2 has 1 fields"),
        ('file_name,caption\n"a\nb.mp4",x\nc.mp4,"never ends\n', 'line 4 is no row of a table .*"double quotes"'),
        ('file_name,caption\na.mp4,"a 5" nail"\n', "line 2 is no row of a table"),
        ("a.mp4,a dog\n", r"line 1 needs the columns file_name \|"),
        ("", "line 1 needs the columns .* which is now empty"),
        ("sep=;\nfile_name;caption\na.mp4;a dog\n", "which is now sep="),
        ("Datei;Beschreibung\na.mp4;a dog\n", r"which is now datei \| beschreibung"),
        ("file_name,caption,Caption\na.mp4,x,y\n", "two columns of one name"),
    ],
)
def test_a_table_that_would_lose_words_is_refused(tmp_path, text, words):
    (tmp_path / "metadata.csv").write_text(text)
    refused(tmp_path / "metadata.csv", words)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\n\n<!DOCTYPE html>\n<html lang='en'>", "p.txt is a web page: save it as plain text, or get the raw file"),
        (b"{\\rtf1\\ansi a red circle}", "p.txt is an RTF document: save it as plain text"),
        (b"PK\3\4a red circle", "p.txt is a document of Word or Excel, or a zip file"),
        (b"%PDF-1.7\n", "p.txt is a PDF"),
    ],
)
def test_another_programs_document_is_no_list_of_prompts(tmp_path, raw, words):
    (tmp_path / "p.txt").write_bytes(raw)
    refused(tmp_path / "p.txt", words, read_prompts)


def test_blank_lines_and_columns_without_a_name_lose_nothing(tmp_path):
    (tmp_path / "m.csv").write_text("File_Name , Caption,\n\na.mp4,a dog,\n , ,\n")
    (row,) = read_rows(tmp_path / "m.csv")
    assert (row.file, row.caption) == ("a.mp4", "a dog")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000, "line 2 is nested too deeply|line 2 is not JSON"),
        ('{"a":' * 100_000, "line 2 is nested too deeply|line 2 is not JSON"),
        ('{"file_name": "b.mp4", "caption": 7}', "line 2: caption is no text .int.: write it in quotes"),
        ('{"file_name": "b.mp4", "caption": ["x", "y"]}', "line 2: caption is no text .list."),
        ('{"file_name": 3, "caption": "x"}', "line 2: file_name is no text"),
        ('{"file_name": "b.mp4", "caption": "x", "caption": "y"}', "line 2 is not JSON .it has two values of one name"),
        ('{"file_name": "b.mp4", "caption": "\\ud800"}', "line 2 holds half a character"),
        ('{"caption": "x"}', "line 2 needs the columns file_name .*: it names no file"),
        ('"b.mp4"', "line 2 is not a JSON object"),
        ('{"file_name": ' + "1" * 5000 + "}", "line 2 is not JSON"),
    ],
)
def test_a_line_that_cannot_be_meant_is_named(tmp_path, line, words):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.mp4", "caption": "x"}\n' + line + "\n")
    refused(path, words, lambda p: [(row.file, row.caption) for row in read_rows(p)])


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\ntwo caf\u00e9".encode("cp1252"))
    refused(path, "line 2 is not UTF-8 text .byte 0xe9.: save it as UTF-8", read_text)
    path.write_bytes("one\ntwo".encode("utf-16-le"))  # without its mark
    refused(path, "line 1 is not UTF-8 text .it holds a zero byte", read_text)
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        path.write_bytes("caf\u00e9".encode(encoding))
        assert read_text(path) == "caf\u00e9"


def test_a_list_that_is_no_file_is_refused_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to("nowhere")
    refused(tmp_path / "pipe.txt", "is a pipe, not a file", read_prompts)
    refused(tmp_path / "folder.txt", "is a folder, not a file", read_prompts)
    refused(tmp_path / "link.txt", "is a broken link", read_prompts)
    refused(tmp_path / "a\0b.txt", "is not there", read_prompts)
    refused(tmp_path / ("x" * 300), "cannot be looked at .File name too long", read_prompts)


def test_a_list_without_permission_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("os.access", lambda *_: False)  # root, who runs many tests, may read everything
    refused(tmp_path / "a.txt", "may not be read", read_prompts)


def test_prompts_of_a_table_are_its_captions_and_what_is_left_out_is_told(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text('file_name,caption\na.mp4,a dog\nb.mp4,\nc.mp4,"a dog"\nd.mp4,"a cat, asleep"\n')
    told = []
    assert read_prompts(path, told.append) == ["a dog", "a cat, asleep"]
    assert told == [
        f"{path}: 1 of 4 rows have no caption and are left out",
        f"{path}: 1 of 3 prompts repeat another; each is used once",
    ]
    (tmp_path / "info").write_text('[{"prompt_en": "a dog"}]')  # a list of JSON, whatever it is called
    assert [row.caption for row in read_rows(tmp_path / "info")] == ["a dog"]
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "p.parquet", r"is no list that is read here: save it as \.jsonl", read_prompts)
    (tmp_path / "p.csv").write_text("a red circle falling\na blue square\n")
    refused(tmp_path / "p.csv", r"line 1 needs the columns caption \|", read_prompts)


@pytest.mark.parametrize("column", CAPTION_COLUMNS)
def test_captions_go_by_many_names(tmp_path, column):
    (tmp_path / "p.tsv").write_text(f"path\t{column.upper()}\na.mp4\ta, b\n")
    assert read_prompts(tmp_path / "p.tsv") == ["a, b"]


PIECES = st.lists(
    st.sampled_from(
        ['"', ",", ";", "\t", "\n", "\r", "{", "}", "[", "]", ":", "file_name", "caption", "null", "1e999", "\\ud800"]
    )
    | st.text(max_size=3)
)


@given(
    PIECES.map("".join).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(), st.sampled_from(SUFFIXES)
)
@example(b"\xef\xbb\xbf", ".json")
@example(b'"\n', ".csv")
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_sentence(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("lists") / f"metadata{suffix}"
    path.write_bytes(content)
    for read in (
        lambda p: read_prompts(p, lambda _: None),
        lambda p: [(row.file, row.caption) for row in read_rows(p)],
    ):
        said = str(path)
        try:
            read(path)
        except UserError as error:
            said = str(error)
        assert str(path) in said
        assert "\n" not in said
