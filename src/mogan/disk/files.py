"""Files appear whole or not at all: written under a temporary name, flushed to disk, renamed."""

import errno
import json
import os
import re
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from mogan.disk.locks import alone_at
from mogan.errors import UserError

OWN = ".tmp-"  # how names of files begin that are not whole yet, then whose they are
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space, no quota, a file larger than allowed
REFUSED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ELOOP,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EBUSY,
}
MANY = {errno.EMFILE, errno.ENFILE}  # files that are open at a time


_MADE: list[Path] = []  # folders that this process made


def make_folder(path: Path) -> None:
    """Make a folder and those it lies in; see :func:`none_left_empty`."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    finally:
        _MADE.extend(reversed(new))


@contextmanager
def none_left_empty() -> Iterator[None]:
    """Where the block fails, of the folders that were made in it those that are still empty are taken away."""
    _MADE.clear()
    try:
        yield
    except BaseException:
        while _MADE:
            with suppress(OSError):
                _MADE.pop().rmdir()
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, with its suffix, that takes its place when the block ends well.

    Every process has names of its own: of several that write one file at once the last one's stays. What a killed process left
    in the folder is taken away.

    Raises:
        UserError: the disk is full, or does not let us write there; ``path`` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{OWN}{_here()}-{os.getpid()}-{zlib.crc32(os.fsencode(path.name)):08x}{path.suffix}")
    try:
        make_folder(path.parent)
        _sweep(path.parent)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if isinstance(error, UserError) or (sentence := refusal(error, path)) is None:
            raise
        raise UserError(sentence) from error
    finally:
        with suppress(OSError):  # a folder that cannot be there holds nothing to take away
            temporary.unlink(missing_ok=True)


@cache
def _here() -> str:
    """Where numbers of processes mean the same: a host, and on Linux a container's space of them."""
    with suppress(OSError):
        return f"{zlib.crc32((socket.gethostname() + os.readlink('/proc/self/ns/pid')).encode()):08x}"
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


@lru_cache(1024)
def _sweep(folder: Path) -> None:
    """Take away what killed processes left in a folder, once a process: of those here that are gone, and of others after a day."""
    with suppress(OSError):
        for path in folder.glob(f"{OWN}*"):
            if found := re.match(rf"{re.escape(OWN)}([0-9a-f]{{8}})-(\d+)-", path.name):
                gone = found[1] == _here() and not _lives(int(found[2]))
                if gone or time.time() - path.stat().st_mtime > 86400:
                    path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    if os.name != "posix":  # there a signal, even 0, would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a disk refuses of a file that grows line by line, told with its name, which the system's error lacks.

    Raises:
        UserError: it refuses.
    """
    try:
        yield
    except OSError as error:
        if (sentence := refusal(error, path)) is None:
            raise
        raise UserError(sentence) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it when the block ends well, and is taken away otherwise.

    Raises:
        UserError: as :func:`replacing`; another process makes the same folder, or has made it by now.
    """
    temporary = path.with_name(f".{path.name}.new")
    make_folder(path.parent)
    with alone_at(path):
        if path.exists():
            raise UserError(f"{path} exists already: give another --out or remove it")
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
            temporary.mkdir()
            yield temporary
            temporary.rename(path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, Exception) and (sentence := refusal(error, otherwise=path)) is not None:
                raise UserError(sentence) from error
            raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; bytes of a name that are not UTF-8 as escapes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def json_line(row: Any) -> bytes:
    """One line of JSON in UTF-8; bytes of a file's name that are not UTF-8 as JSON's escapes, read as the same name."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------- what a disk refuses


def refusal(error: Exception, path: Path | None = None, otherwise: Path | str = "a file") -> str | None:
    """A sentence if the disk is full or refuses what was asked of it, a name too; None for any other error.

    Args:
        error: what was raised. Safetensors and shutil have errors of their own kind, in which the system's number stands as text.
        path: what was being written, which the system's error does not say; errors about other folders are not ours.
        otherwise: what to name where neither says.
    """
    number = getattr(error, "errno", None)
    theirs = getattr(error, "filename", None)
    theirs = os.fsdecode(theirs) if isinstance(theirs, bytes) else theirs  # as TensorBoard opens files
    if theirs is not None and path is not None and Path(theirs).parent != path.parent:
        return None
    place = path or theirs or otherwise
    told = any(f"os error {n})" in str(error) or f"[Errno {n}]" in str(error) for n in FULL)
    if number in FULL or told:
        why = os.strerror(number) if number else "no space is left"
        return f"{place} cannot be written, the disk is full ({why}): free some space and give the same command again"
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        return f"the names of files are {error.encoding} here, which cannot write {error.object!r}: set PYTHONUTF8=1 or a UTF-8 locale"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's, before Python 3.13
        return f"{str(error).removeprefix('Symlink loop from ')} is a link that leads to itself: give another place"
    if isinstance(error, OSError) and number in MANY:
        return f"{place} cannot be opened ({os.strerror(number or 0)}): allow more of them (`ulimit -n 4096`) and try again"
    if isinstance(error, FileNotFoundError) and (path or theirs):
        return f"{place} is not there, or something took it away meanwhile: put it back and give the same command again"
    if isinstance(error, OSError) and number in REFUSED:
        return f"{place} cannot be used ({os.strerror(number)}): give another place, or the right to use it"
    return None


def openable(path: Path) -> None:
    """Refuse a place whose name is not UTF-8, which safetensors and tokenizers cannot open. Raises UserError."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        told = str(path).encode("utf-8", "backslashreplace").decode()
        raise UserError(
            f"{told} is a name that is not UTF-8, under which weights cannot be opened: rename it"
        ) from error


def writable_folder(path: Path, option: str = "--out", of: Path | None = None) -> None:
    """Make a folder, and make sure before the work that files can be written into it.

    Args:
        path: the folder.
        option: what the user gave it by.
        of: the file in it that the user named instead.

    Raises:
        UserError: something else lies there, or it cannot be written to.
    """
    path = Path(path)
    given = f"{option} {path}" if of is None else f"{option} {of}: {path}"
    if path.exists() and not path.is_dir():
        raise UserError(f"{given} is a file, not a folder: give another {option}")
    try:
        make_folder(path)
        _sweep(path)
        probe = path / f"{OWN}{_here()}-{os.getpid()}-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{given} is a link that leads nowhere: give another {option}, or make what it names"
            ) from error
        raise UserError(f"{given} cannot be written to ({error.strerror}): give another {option}") from error


def writable_file(path: Path, ours: bytes, suffix: str | None = None) -> None:
    """Make sure before the work that ``--out``, a file, can be written; its folder is made.

    Args:
        path: the file.
        ours: how a file begins that may be replaced, a regular expression.
        suffix: that its name has, if it has one.

    Raises:
        UserError: a folder lies there, or a file of another kind, or its own folder cannot be written to; or its name says that it
            is of another kind.
    """
    path = Path(path)
    if suffix and path.suffix.lower() not in ("", suffix):
        raise UserError(f"--out {path} must end in {suffix}: give another --out")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: give a file to write, such as {path / 'NAME'}")
    writable_folder(path.parent, of=path)
    if not path.exists():
        return
    if not path.is_file():  # a pipe would be waited for, a device replaced
        raise UserError(f"--out {path} is a device or a pipe: give a file to write")
    try:
        with path.open("rb") as file:
            begins = file.read(256)
    except OSError as error:
        raise UserError(f"--out {path} cannot be read ({error.strerror}): give another --out") from error
    if begins and not re.match(ours, begins):
        raise UserError(f"--out {path} is there and not what this command writes: remove it, or give another --out")


def from_json(text: str | bytes, **how: Any) -> Any:
    """``json.loads`` of what strangers wrote: a whole number that no float holds is a ValueError too."""
    return json.loads(text, parse_int=_whole_number, **how)


def _whole_number(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


class NoEntry(UserError, KeyError):
    """An entry that a file ought to have."""

    __str__ = Exception.__str__


class Entries(dict):
    """Entries of a JSON file. One that is asked for and not there is the user's to mend: what we write has it."""

    def __init__(self, found: dict, path: Path, remedy: str):
        super().__init__(found)
        self._path, self._remedy = path, remedy

    def __missing__(self, name: str) -> NoReturn:
        raise NoEntry(f"{self._path} has no entry {name!r}: it was damaged or edited, {self._remedy}")


def read_json(path: Path, remedy: str = "get it again") -> dict:
    """The object that a JSON file holds. Raises UserError where it is none, with what to do then; so do entries it lacks."""
    try:
        found = from_json(path.read_text(encoding="utf-8"), object_hook=lambda part: Entries(part, path, remedy))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the right to read it, or {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): it was damaged or cut short, {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} where names and values should be: {remedy}")
    return found


def link_or_copy(source: str, target: str) -> None:
    """The same file at another place, or its copy where the disk has no links."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
