"""Which videos a folder holds, and which words belong to each. Nothing is opened to find out but the lists.

A file has one identity however many names lead to it: ``a.mp4``, ``s/../a.mp4``, its absolute path and links to it are one
video. Names are compared in one Unicode form, since disks and editors change it.
"""

import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from mogan.data.lists import METADATA, NOT_THERE, Row, printable, read_rows, read_text, unreadable, whole
from mogan.data.video import SUFFIXES
from mogan.errors import UserError

Identity = tuple[int, int]


@dataclass(frozen=True)
class File:
    """A file where a list or a folder says so.

    Attributes:
        path: absolute, so that nothing takes ``a: b.mp4`` for an address.
        name: in the folder, with ``/``; of a file outside, its absolute path.
        problem: why it cannot be used, in words that follow its name.
        outside: whether it lies outside the folder.
        there: whether there is anything of that name.
    """

    path: Path
    name: str
    problem: str | None = None
    outside: bool = False
    there: bool = True


@dataclass(frozen=True)
class Source:
    """A video file, its name in the folder, its caption; ``problem`` says why it cannot be used. ``state`` is what it is in
    (:mod:`mogan.models.states`) from the second ``state_from`` on.
    """

    path: Path
    name: str
    caption: str | None
    problem: str | None = None
    outside: bool = False
    state: str | None = None
    state_from: float = 0.0


def scan(folder: str | Path, default_caption: str | None = None, uncaptioned: bool = False) -> list[Source]:
    """Videos of a folder and of the folders in it, with captions, sorted by name.

    A caption is the row of a list (``metadata.jsonl``, ``.json``, ``.csv`` or ``.tsv``, of the folder or of one in it),
    else the text file beside the video (``name.txt`` beside ``name.mp4``), else ``default_caption``. Blank ones are none, which
    is a problem unless ``uncaptioned`` videos are wanted too.

    Raises:
        UserError: the folder is missing, holds no video, or a list of it cannot be read.
    """
    folder = Path(folder)
    if default_caption is not None and not whole(default_caption, "--caption").strip():
        raise UserError("--caption is blank: give a caption, or leave it out")
    if os.path.isdir(folder):
        here = Folder(folder)
        listed = here.rows()
    elif folder.suffix.lower() in SUFFIXES and os.path.exists(folder):
        if problem := unreadable(folder):
            raise UserError(f"{folder} {problem}: give a folder of videos, a video, or a file of prompts")
        here, listed = Folder(folder.parent, only=folder.name), []
    else:
        what = (
            "is not a folder of videos, a video"
            if os.path.exists(folder)
            else "is not there: give a folder of videos, a video"
        )
        raise UserError(f"{folder} {what}, or a file of prompts (.txt, .jsonl, .json, .csv, .tsv)")
    files = here.videos | {file.name: file for file, _ in listed}
    if not files:
        raise UserError(f"{folder} holds no video ({', '.join(SUFFIXES)})")
    captions = {file.name: row.caption for file, row in listed}
    states = {file.name: row.state for file, row in listed}
    found = [_source(here, files[name], captions.get(name), default_caption, uncaptioned) for name in sorted(files)]
    return [replace(s, state=states[s.name][0], state_from=states[s.name][1]) if s.name in states else s for s in found]


def _source(here: "Folder", file: File, caption: str | None, default: str | None, uncaptioned: bool) -> Source:
    caption, problem = here.words(file, caption)
    caption = caption or (default and default.strip())
    if caption is None and problem is None and not uncaptioned:
        problem = (
            "no caption: add "
            + ("" if here.only else "a row to metadata.jsonl, ")
            + "a .txt file, or give --caption, or --uncaptioned for motion alone"
        )
    return Source(file.path, file.name, caption, problem, file.outside)


class Folder:
    """A folder, searched with all below it and behind its links, each folder once; hidden ones are left out.

    Attributes:
        path: of the folder, absolute.
        videos: by name; of several names of one file the others carry a problem that says so.
        lists: metadata files by folder, those further up first.
    """

    def __init__(self, path: Path, only: str | None = None):
        self.path, self.only = Path(os.path.abspath(path)), only
        self.lists: dict[Path, list[Path]] = defaultdict(list)
        self.videos: dict[str, File] = {}
        self._texts: dict[str, Path] = {}  # by name without suffix, in one Unicode form
        self._files: dict[Identity, File] = {}
        self._forms: dict[str, list[str]] = defaultdict(list)
        found = [self.path / only] if only else []
        if only:
            found += [p for p in self.path.iterdir() if p.suffix.lower() == ".txt"]
        else:
            self._walk(found)
        for file in sorted(found, key=Path.is_symlink):  # of several names the real one comes first
            self._take(file)

    def _walk(self, found: list[Path]) -> None:
        """Files below, real folders before links, which may lead to what was seen already, or in circles."""
        real, linked, seen = [self.path], list[Path](), set[Identity]()
        above = {_identity(folder) for folder in Path(os.path.realpath(self.path)).parents}
        while real or linked:
            folder = (real or linked).pop(0)
            try:
                if _identity(folder) in above:
                    raise OSError(0, "it leads to a folder that holds this one")
                if (identity := _identity(folder)) in seen:
                    continue
                seen.add(identity)
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                name = self._name(folder)
                self.videos[f"{name}/"] = File(folder, f"{name}/", f"cannot be searched ({error.strerror})")
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                if os.path.isdir(path):
                    (linked if path.is_symlink() else real).append(path)
                    if path.suffix.lower() not in SUFFIXES:  # one that is called like a video is told of
                        continue
                found.append(path)

    def _take(self, path: Path) -> None:
        name, suffix = self._name(path), path.suffix.lower()
        if suffix == ".txt":
            self._texts.setdefault(_form(name[: -len(suffix)]), path)
        elif path.name.lower() in METADATA:
            self.lists[path.parent].append(path)
        elif suffix in SUFFIXES:
            problem, identity = _look(path)
            file = File(path, name, problem)
            if identity and (first := self._files.setdefault(identity, file)) is not file:
                file = replace(file, problem=f"is the same file as {printable(first.name)}, which is used")
            self.videos[name] = file
            self._forms[_form(name)].append(name)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def find(self, row: Row, base: Path) -> File:
        """The file that a row of a list in ``base`` means, whatever name the row has for it."""
        given = row.file
        for text in dict.fromkeys((given, given.strip(), given.strip().replace("\\", "/"))):
            path = base / text
            problem, identity = _look(path)
            if problem == NOT_THERE:
                continue
            if identity in self._files:
                return self._files[identity]
            name, outside = self._place(path)
            file = self.videos.get(name) or File(path, name, problem, outside)
            return self._files.setdefault(identity, file) if identity else file
        name, _ = self._place(base / given.strip().replace("\\", "/"))
        alike = [self.videos[other] for other in self._forms.get(_form(name), ())]
        if len(alike) == 1:
            return alike[0]
        return File(self.path / name, name, f"{NOT_THERE}; {row.where} names it", there=False)

    def _place(self, path: Path) -> tuple[str, bool]:
        """Name of a path in the folder; of one outside its absolute path, and True."""
        try:
            real = Path(os.path.realpath(path))
        except ValueError:  # no file can be called so
            real = path
        places = [(Path(os.path.abspath(path)), self.path), (real, Path(os.path.realpath(self.path)))]
        for place, root in reversed(places) if ".." in path.parts else places:  # a link's parent is not where it lies
            if place.is_relative_to(root):
                return place.relative_to(root).as_posix(), False
        return real.as_posix(), True

    def list_in(self, folder: Path) -> Path | None:
        """The metadata file in a folder of this one; None without one.

        Raises:
            UserError: there are two.
        """
        lists = self.lists.get(folder, [])
        if len(lists) > 1:
            raise UserError(f"{folder} holds both {lists[0].name} and {lists[1].name}: keep one")
        return lists[0] if lists else None

    def rows(self) -> list[tuple[File, Row]]:
        """What all lists say, each of the files in its own folder and below.

        Raises:
            UserError: two lists lie side by side, or two rows are about one file.
        """
        lists = [path for folder in self.lists if (path := self.list_in(folder))]
        found = [(self.find(row, path.parent), row) for path in lists for row in read_rows(path)]
        refuse_twice(found)
        return found

    def words(self, file: File, caption: str | None) -> tuple[str | None, str | None]:
        """What belongs to a video: the caption of its row, else the text file beside it; and why it cannot be used."""
        if caption is not None or file.problem is not None:
            return caption, file.problem
        beside = self._texts.get(_form(file.name[: -len(file.path.suffix)] if file.path.suffix else file.name))
        if file.outside and file.path.with_suffix(".txt").exists():
            beside = file.path.with_suffix(".txt")
        try:
            return (read_text(beside).strip() or None) if beside else None, None
        except UserError as error:
            return None, f"its caption cannot be read: {error}"


def refuse_twice(found: list[tuple[File, Row]]) -> None:
    """Raise if two rows are about one file."""
    places: dict[str, str] = {}
    for file, row in found:
        if file.name in places:
            raise UserError(
                f"{row.where} names {file.name} a second time, after {places[file.name]}: keep one row per file"
            )
        places[file.name] = row.where


def _identity(path: Path) -> Identity:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _look(path: Path) -> tuple[str | None, Identity | None]:
    """Why a path is no file to read, or what the file is whatever it is called."""
    try:
        problem = unreadable(path)
        return problem, None if problem else _identity(path)
    except OSError:  # gone since
        return NOT_THERE, None


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)
