"""Lists that people write: metadata of videos, captions, prompts. Text to rows, each with the place it came from.

What a list says is taken whole or refused with file and line. Lines end at a line feed, with or without a carriage
return before it, and nowhere else: captions hold U+2028 and form feeds.
"""

import codecs
import csv
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogan.disk.files import from_json
from mogan.errors import UserError

TABLES = (".csv", ".tsv")
SUFFIXES = (".txt", ".jsonl", ".json", *TABLES)
FILE_COLUMNS = ("file_name", "file", "video", "video_path", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt", "prompt_en")
UNREAD = (".parquet", ".xlsx")  # lists of other programs: told of, not passed over
METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".json", *TABLES, *UNREAD))
NOT_THERE = "is not there"

_MARKS = (  # the longest first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DOCUMENTS = (  # how files begin that hold text for other programs; the first kind is text itself
    (b"{\\rtf", "an RTF document"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"%pdf-", "a PDF"),
    (b"pk\3\4", "a document of Word or Excel, or a zip file"),
    (b"\xd0\xcf\x11\xe0", "a document of Word or Excel"),
)


@dataclass(frozen=True)
class Row:
    """One row: ``where`` is its file and line in words; names of columns are in lower case."""

    where: str
    values: dict[str, Any]

    def text(self, columns: Sequence[str]) -> str | None:
        """The first of these columns that holds more than white space; None where none does.

        Raises:
            UserError: a column holds something else than text.
        """
        for column in columns:
            value = self.values.get(column)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{self.where}: {column} is no text ({type(value).__name__}): write it in quotes")
            if value is not None and value.strip():
                return value
        return None

    @property
    def file(self) -> str:
        """The file that the row is about. Raises UserError if it names none."""
        name = self.text(FILE_COLUMNS)
        if name is None:
            raise UserError(f"{self.where} needs the columns {' | '.join(FILE_COLUMNS)}: it names no file")
        return name

    @property
    def caption(self) -> str | None:
        """Its caption or prompt, white space at its ends taken away."""
        caption = self.text(CAPTION_COLUMNS)
        return whole(caption.strip(), self.where) if caption else None

    @property
    def state(self) -> tuple[str | None, float]:
        """What it is in and from which second on, of the columns ``state`` and ``state_from``.

        Raises:
            UserError: ``state_from`` is no time.
        """
        state, since = self.values.get("state"), self.values.get("state_from")
        if not isinstance(state, str) or not state.strip():
            return None, 0.0
        try:
            seconds = float(since or 0.0)
        except (TypeError, ValueError):
            seconds = -1.0
        if not 0 <= seconds < 1e6:
            raise UserError(f"{self.where}: state_from is a number of seconds of at least 0, not {since!r}")
        return state.strip(), seconds


def read_text(path: Path) -> str:
    """A file's text: UTF-8, or UTF-16 and UTF-32 where a byte order mark says so.

    Raises:
        UserError: it cannot be read, is no regular file (a pipe is never opened), is another program's document, or is in
            another encoding.
    """
    if problem := unreadable(path):
        raise UserError(f"{path} {problem}: give a text file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file") from error
    begins = raw[:256].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for mark, kind in _DOCUMENTS:
        if begins.startswith(mark):
            raise UserError(
                f"{path} is {kind}: save it as plain text" + (", or get the raw file" if "web" in kind else "")
            )
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not {encoding.upper()} text (byte 0x{raw[error.start]:02x}): save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text (it holds a zero byte): save it as UTF-8")
    return text


def unreadable(path: Path) -> str | None:
    """Why a path is no file to read, in words that follow its name; None where it is one. Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is a broken link" if path.is_symlink() else NOT_THERE
    except ValueError:  # a zero byte in the name, or half a character
        return NOT_THERE
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    for test, kind in (
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "pipe"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
    ):
        if test(mode):
            return f"is a {kind}, not a file"
    return None if os.access(path, os.R_OK) else "may not be read (permission denied)"


def whole(text: str, where: str) -> str:
    """The text itself, if it can be written down at all.

    Raises:
        UserError: it holds half a character, which no encoding has.
    """
    if not _printable(text):
        raise UserError(f"{where} holds half a character ({ascii(text)[:60]}): write it again")
    return text


def printable(text: str) -> str:
    """A file's name as text that can be printed and hashed: bytes that are not UTF-8 as Python and JSON write them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _printable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


# ---------------------------------------------------------------------------------------------- rows


def read_rows(path: Path, needed: Sequence[str] = FILE_COLUMNS) -> list[Row]:
    """Rows of a ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file.

    A table's first line names its columns, one of which must be ``needed``. It is separated by what makes that so:
    commas, semicolons or tabs.

    Raises:
        UserError: a row cannot be meant; the sentence names file and line.
    """
    return [Row(where, _columns(where, value)) for where, value in _values(path, needed)]


def _columns(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{where} is not a JSON object: write {{"file_name": ..., "caption": ...}}')
    return value


def _values(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in UNREAD:
        raise UserError(f"{path} is no list that is read here: save it as {', '.join(SUFFIXES[1:])}")
    text = read_text(path)
    if suffix in TABLES:
        yield from _table(path, text, needed)
    elif suffix == ".json" or (suffix != ".jsonl" and text.lstrip().startswith("[")):
        value = _json(str(path), text)
        if not isinstance(value, list):
            raise UserError(f"{path} is not a list: write [...] around its rows")
        yield from ((f"{path} entry {number}", row) for number, row in enumerate(value, 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path} line {number}", _json(f"{path} line {number}", line)


def _json(where: str, text: str) -> Any:
    try:
        return from_json(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply: write one flat object per row") from error
    except ValueError as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where} is not JSON ({why}): correct or remove it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {_plain(key): value for key, value in pairs}
    if len(found) < len(pairs):
        raise ValueError("it has two values of one name")
    return found


def _plain(column: str) -> str:
    return column.strip().lower()


def _table(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    first = ""
    for delimiter in ",;\t":
        rows = _cells(path, text, delimiter)
        header = [_plain(cell) for cell in next(rows, (0, []))[1]]
        if set(header) & set(needed):
            break
        first = max(first, " | ".join(filter(None, header)), key=len)
    else:
        raise UserError(
            f"{path} line 1 needs the columns {' | '.join(needed)}: write their names into the first line, which is now "
            f"{first[:200] or 'empty'}"
        )
    named = [column for column in header if column]
    if len(set(named)) < len(named):
        raise UserError(f"{path} line 1 has two columns of one name: rename one")
    for line, cells in rows:
        where = f"{path} line {line}"
        if len(cells) != len(header) or any(
            cell.strip() for cell, column in zip(cells, header, strict=True) if not column
        ):
            raise UserError(
                f"{where} has {len(cells)} fields where the first line names {len(named)} columns: put captions that hold "
                f'{ {",": "commas", ";": "semicolons"}.get(delimiter, "tabs") } into "double quotes"'
            )
        yield where, {column: cell for column, cell in zip(header, cells, strict=True) if column}


def _cells(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Lines of a table with the number of the line where each begins; empty ones are left out."""
    if "\n" not in text:  # as old Macs wrote
        text = text.replace("\r", "\n")
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "new-line" in str(error):
                raise UserError(
                    f"{path} line {line} holds a carriage return: end lines with line feeds, and put it into quotes"
                ) from error
            raise UserError(
                f'{path} line {line} is no row of a table ({error}): put "double quotes" around whole fields, and two for '
                "one inside them"
            ) from error
        if any(cell.strip() for cell in cells):
            yield line, cells


# ---------------------------------------------------------------------------------------------- prompts


def read_prompts(path: Path, tell: Callable[[str], None] = print) -> list[str]:
    """Prompts of a file, each once, in its order; ``tell`` is given a sentence on rows that are left out.

    Args:
        path: text with one prompt per line; or rows with a caption (see :func:`read_rows`), as in ``metadata.csv`` and
            VBench_full_info.json; or JSON that holds texts in place of rows.
        tell: what to do with such a sentence.

    Raises:
        UserError: no such file, a row that cannot be meant, or no prompts in it.
    """
    suffix = path.suffix.lower()
    if problem := unreadable(path):
        raise UserError(f"{path} {problem}: give a .txt file with one prompt per line")
    if suffix in (*SUFFIXES[1:], *UNREAD):
        found = [_prompt(where, value) for where, value in _values(path, CAPTION_COLUMNS)]
    else:
        lines = enumerate(read_text(path).split("\n"), 1)
        found = [whole(line.strip(), f"{path} line {n}") for n, line in lines if line.strip()]
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise UserError(f"{path} holds no prompts: write one per line, or rows with {', '.join(CAPTION_COLUMNS)}")
    if blank := len(found) - len(prompts):
        tell(f"{path}: {blank} of {len(found)} rows have no caption and are left out")
    unique = list(dict.fromkeys(prompts))
    if repeated := len(prompts) - len(unique):
        tell(f"{path}: {repeated} of {len(prompts)} prompts repeat another; each is used once")
    return unique


def _prompt(where: str, value: Any) -> str | None:
    return whole(value.strip(), where) if isinstance(value, str) else Row(where, _columns(where, value)).caption
