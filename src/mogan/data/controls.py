"""What clips are made under beside their captions: control videos, masks and reference pictures, into the cache (for a VACE).

Controls come from files of the user's own, named as the videos are, from a function of theirs, or from the clip by a classical
way. However they come, a control is frames and a mask of what is to be made; see :mod:`mogan.models.conditions`.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mogan.data import cache as data
from mogan.data.clips import clips_at, to_video
from mogan.data.listing import Source
from mogan.data.lists import printable, unreadable
from mogan.data.measure import Done, in_threads
from mogan.data.video import SUFFIXES, flow_picture
from mogan.errors import UserError
from mogan.models.conditions import pictures_of_references
from mogan.models.defaults import Geometry
from mogan.motion.flow import FlowEstimator
from mogan.own import own_code, own_function, theirs

GREY = 128
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
FASTEST = 20  # a flow picture is of full colour where a clip moves by its height in so many frames


class Control(NamedTuple):
    """Frames, uint8 ``(F, H, W, 3)``, and where something is to be made, bool ``(F, H, W)``."""

    frames_FHWC: np.ndarray
    mask_FHW: np.ndarray


Made = Callable[[np.ndarray, str], Control]  # of a clip's frames and id


def everywhere(frames_FHWC: np.ndarray) -> Control:
    """uint8 frames ``(F, H, W, 3)`` that show what is to be generated."""
    return Control(frames_FHWC, np.ones(frames_FHWC.shape[:3], bool))


def masked(frames_FHWC: np.ndarray, mask_FHW: np.ndarray) -> Control:
    """uint8 frames ``(F, H, W, 3)``, kept but under the mask, bool ``(F, H, W)``: there they are grey."""
    return Control(np.where(mask_FHW[..., None], np.uint8(GREY), frames_FHWC), mask_FHW)


def nothing(frames_FHWC: np.ndarray, clip: str) -> Control:
    """Text to video: all grey."""
    return everywhere(np.full_like(frames_FHWC, GREY))


def inpaint(frames_FHWC: np.ndarray, clip: str) -> Control:
    """A box of half the height and width is to be made, at a place that follows from the clip's id."""
    _, height, width, _ = frames_FHWC.shape
    draw = np.random.default_rng(zlib.crc32(clip.encode()))
    top, left = int(draw.integers(height - height // 2 + 1)), int(draw.integers(width - width // 2 + 1))
    mask = np.zeros(frames_FHWC.shape[:3], bool)
    mask[:, top : top + height // 2, left : left + width // 2] = True
    return masked(frames_FHWC, mask)


def extend(frames_FHWC: np.ndarray, clip: str) -> Control:
    """The first quarter of the latent frames is kept, at least the first picture; the rest is to be made."""
    mask = np.ones(frames_FHWC.shape[:3], bool)
    mask[: 1 + 4 * ((len(mask) - 1) // 4 // 4)] = False
    return masked(frames_FHWC, mask)


def edges(frames_FHWC: np.ndarray, clip: str) -> Control:
    """White edges on black (Canny)."""
    found = [cv2.Canny(cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY), 100, 200) for f in frames_FHWC]
    return everywhere(np.repeat(np.stack(found)[..., None], 3, -1))


def flow_shown(estimate: FlowEstimator) -> Made:
    """Flow as colours, that of the first pair also for the first frame, on one scale for all clips of a size."""

    def made(frames_FHWC: np.ndarray, clip: str) -> Control:
        with torch.no_grad():
            field = estimate(to_video(frames_FHWC))[0].float().cpu().transpose(0, 1)
        pictures = flow_picture(field, frames_FHWC.shape[1] / FASTEST)
        return everywhere(np.concatenate([pictures[:1], pictures]))

    return made


def first_frame(frames_FHWC: np.ndarray, clip: str) -> Control:
    """The first picture is kept; what image-to-video models are given."""
    mask = np.ones(frames_FHWC.shape[:3], bool)
    mask[0] = False
    return masked(frames_FHWC, mask)


CLASSICAL: dict[str, Made] = {"nothing": nothing, "inpaint": inpaint, "extend": extend, "edges": edges}
KINDS = (*CLASSICAL, "flow")  # of a VACE
FIRST_FRAME = "first_frame"  # of an image-to-video model, which has no other


def own(name: str) -> Made:
    """A function of the user's: frames to frames, or to frames and a mask.

    Raises:
        UserError: it cannot be imported, or returns something else.
    """
    function = own_function(name, "control", "returns the frames of a control")

    def made(frames_FHWC: np.ndarray, clip: str) -> Control:
        with theirs(name):
            found = function(frames_FHWC)
        frames, mask = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        frames, mask = np.asarray(frames), None if mask is None else np.asarray(mask)
        fits = frames.shape == frames_FHWC.shape and frames.dtype == np.uint8
        if not fits or (mask is not None and (mask.shape != frames.shape[:3] or mask.dtype != bool)):
            raise UserError(
                f"{name} returns {frames.dtype} {frames.shape}{'' if mask is None else f' and {mask.dtype} {mask.shape}'} for "
                f"frames uint8 {frames_FHWC.shape}: return frames like those, or such frames and a mask, bool (F, H, W)"
            )
        return everywhere(frames) if mask is None else Control(frames, mask)

    return made


@dataclass(frozen=True)
class Show:
    """How the clips of a cache get their controls.

    Attributes:
        kind: one of ``KINDS``, ``files``, ``module:function``, or ``FIRST_FRAME``.
        encode: video, mask and pictures of one clip to its control; see :func:`mogan.models.conditions.encode_control`.
        pixels: channels of a control that are its mask's.
        estimate_flow: of ``flow``.
        folder: of ``files``; ``references``: of reference pictures, named as the videos are.
        look: features of a first frame, uint8 ``(H, W, 3)``, for a network that reads them.
    """

    kind: str
    encode: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    estimate_flow: FlowEstimator
    pixels: int = 64
    folder: Path | None = None
    references: Path | None = None
    look: Callable[[np.ndarray], Tensor] | None = None

    @cached_property
    def made(self) -> Made | None:
        """Makes a control of a clip's frames; ``None``: it is read."""
        if self.kind == "files":
            return None
        if self.kind == "flow":
            return flow_shown(self.estimate_flow)
        if self.kind == FIRST_FRAME:
            return first_frame
        return CLASSICAL[self.kind] if self.kind in CLASSICAL else own(self.kind)

    @cached_property
    def _code(self) -> tuple[str, ...]:
        """What stands for a function of the user's: where it has changed, controls are made anew."""
        if ":" not in self.kind:
            return ()
        own(self.kind)  # its module must be there to be read
        return (own_code(self.kind),)

    def facts(self, sources: list[Source]) -> dict[str, Any]:
        """What a cache says of its controls, all of which have as many references.

        Raises:
            UserError: a video lacks a control or references, or has another number of them, or a number is left out.
        """
        numbers = {len(self.pictures_of(source)): source for source in sources}
        if len(numbers) > 1:
            told = " and ".join(f"{printable(source.name)} has {n}" for n, source in sorted(numbers.items()))
            raise UserError(f"{self.references}: every video takes the same number of reference pictures; {told}")
        stems = Counter(_beside(Path(), source) for source in sources if self.folder is not None)
        if twice := next((stem for stem, number in stems.items() if number > 1), None):
            raise UserError(f"two videos are called {printable(str(twice))}, and would have one control: rename one")
        for source in sources:
            if self.folder is not None and not any(self.files_of(source)):
                raise UserError(
                    f"{self.folder} has no control of {printable(source.name)}: a video of that name, or its mask as "
                    f"{Path(source.name).stem}.mask{Path(source.name).suffix}"
                )
            if self.references is not None and not self.pictures_of(source):
                raise UserError(
                    f"{self.references} has no reference picture of {printable(source.name)}: name it "
                    f"{Path(source.name).stem}.png, or .1.png, .2.png and so on"
                )
        self._refuse_gaps(sources)
        pictures = {} if self.look is None else {"pictures": True}
        return {"controls": self.kind, "references": next(iter(numbers), 0)} | pictures

    def files_of(self, source: Source) -> tuple[Path | None, Path | None]:
        """The control video of a source, and its mask."""
        assert self.folder is not None
        stem = _beside(self.folder, source)
        return _called(stem, "", SUFFIXES), _called(stem, ".mask", SUFFIXES)

    def pictures_of(self, source: Source) -> list[Path]:
        """The reference pictures of a source, in order."""
        if self.references is None:
            return []
        stem = _beside(self.references, source)
        found = [_called(stem, "", PICTURES)]
        for number in count(1):
            found.append(_called(stem, f".{number}", PICTURES))
            if found[-1] is None:
                return [path for path in found if path is not None]
        raise AssertionError

    def _refuse_gaps(self, sources: list[Source]) -> None:
        """Refuse pictures that are called as a video and whose number does not follow on: nobody would see them."""
        if self.references is None:
            return
        stems = {_beside(self.references, source) for source in sources}
        known = {path for source in sources for path in self.pictures_of(source)}
        for path in sorted(path for folder in {stem.parent for stem in stems} for path in folder.iterdir()):
            stem, _, number = path.stem.rpartition(".")
            named = number.isdecimal() and path.suffix.lower() in PICTURES and path.parent / stem in stems
            if named and path not in known:
                raise UserError(f"{path} would be left out: pictures of a video are numbered .1, .2, .3 without a gap")

    def mark(self, source: Source, entry: dict) -> str:
        """Changes with what a clip's control is made of."""
        files = [*(self.files_of(source) if self.folder is not None else ()), *self.pictures_of(source)]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path is not None]
        return json.dumps([self.kind, entry["sha"], stats, *self._code])


def _beside(folder: Path, source: Source) -> Path:
    """Where a file of the same name lies, without its suffix."""
    return (folder / (source.path.name if source.outside else source.name)).with_suffix("")


def _called(stem: Path, part: str, suffixes: Sequence[str]) -> Path | None:
    """The file of that stem and part whose suffix is one of these, in small letters or capitals."""
    names = (f"{stem}{part}{case}" for suffix in suffixes for case in (suffix, suffix.upper()))
    return next((path for name in names if (path := Path(name)).is_file()), None)


def encode_controls(
    sources: list[Source], kept: list[dict], out: Path, geometry: Geometry, show: Show, workers: int
) -> int:
    """Store the controls of kept clips that are not there yet, or are of other files; returns how many.

    Each entry gets a ``control``, which changes with what its control is made of.

    Raises:
        UserError: a control does not fit its clip.
    """
    by_name = {source.name: source for source in sources}
    missing: dict[str, list[dict]] = {}
    marks = {entry["id"]: show.mark(by_name[entry["source"]], entry) for entry in kept}
    for entry in kept:
        mark = marks[entry["id"]]
        entry["control"] = hashlib.sha256(mark.encode()).hexdigest()[:16]
        if _mark_of(data.control_path(out, entry["id"])) != mark:
            missing.setdefault(entry["source"], []).append(entry)
    jobs, total = [s for s in sources if s.name in missing], sum(map(len, missing.values()))

    def read(source: Source) -> Iterator[tuple[dict, np.ndarray, Control | None]]:
        entries = {e["start"]: e for e in missing[source.name]}
        files = show.files_of(source) if show.folder is not None else (None, None)
        shown = [None if path is None else clips_at(path, entries, geometry) for path in files]
        for start, frames in clips_at(source.path, entries, geometry):
            beside = [
                None if clips is None else _same(clips, start, path, source, geometry)
                for clips, path in zip(shown, files, strict=True)
            ]
            yield entries[start], frames, put_together(frames, *beside)

    with tqdm(total=total, desc="controls", unit="clip", disable=not total) as bar:
        for source, item in in_threads(jobs, read, workers):
            if isinstance(item, Done):
                if item.error:
                    raise UserError(item.error)
                continue
            entry, frames, control = item
            control = control or show.made(frames, entry["id"])  # type: ignore[misc]
            mask = torch.from_numpy(control.mask_FHW)[None, None].float()
            pictures = [read_picture(path) for path in show.pictures_of(source)]
            references = pictures_of_references(pictures, geometry.height, geometry.width)[None] if pictures else None
            made = show.encode(to_video(control.frames_FHWC), mask, references)[0]
            seen = None if show.look is None else show.look(frames[0])
            data.save_control(out, entry["id"], made, show.pixels, marks[entry["id"]], seen)
            bar.update()
    return total


def put_together(frames: np.ndarray, shown: np.ndarray | None, mask: np.ndarray | None) -> Control | None:
    """A control from uint8 frames ``(F, H, W, 3)``: the clip's, and those of its files; a mask alone is of the clip itself."""
    where = None if mask is None else mask.mean(-1) > 127.5
    if shown is None:
        return None if where is None else masked(frames, where)
    return everywhere(shown) if where is None else Control(shown, where)


def _same(
    clips: Iterator[tuple[int, np.ndarray]], start: int, path: Path | None, source: Source, geometry: Geometry
) -> np.ndarray:
    """The next clip of a control's file, which must be that of the video's."""
    number, frames = next(clips, (None, None))
    if number != start or frames is None:
        raise UserError(
            f"{path} has no frames for the clip of {printable(source.name)} from {start / geometry.fps:.2f} s on: it must be as "
            "long as its video"
        )
    return frames


def read_picture(path: Path, under: str = "white") -> np.ndarray:
    """uint8 ``(H, W, 3)``, upright, what is transparent over a colour. Raises UserError."""
    if problem := unreadable(path):
        raise UserError(f"{path} {problem}: give a picture")
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise UserError(f"{path} is a picture of floating-point numbers: save it with 8 or 16 bits")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # Pillow would clip 16 bits to 8
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, under), upright.convert("RGBA"))
            return np.array(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from error


def _mark_of(path: Path) -> str | None:
    """What a control that is there was made of."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["about"])["mark"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
