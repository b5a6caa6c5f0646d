"""The clips of a report: which are shown, and their flow pictures under one scale."""

import base64
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from mogan.data.stream import opened, plays_everywhere
from mogan.data.video import flow_picture, write_video
from mogan.devices import choose_device
from mogan.errors import UserError
from mogan.evaluation.frames import Clip
from mogan.evaluation.names import METRICS
from mogan.evaluation.pairs import flow_of_pairs, neighbours
from mogan.evaluation.tools import estimator
from mogan.motion.flow import FlowEstimator
from mogan.report.sources import Result

FLOW_SIDE = 256  # flow pictures of larger clips are made at this shorter side
BUDGET = 48 * 2**20  # bytes of video in one page
AT_ONCE = 4  # systems that a page shows before its reader chooses

Record = dict[str, Any]
Cells = tuple[str, int, list[tuple[Result, Record]]]  # of a row: its title, its number, and clips


@dataclass(frozen=True)
class Shot:
    """One clip as the page shows it; ``video``, ``flow`` and ``poster`` (its middle) are data URIs, empty where the file is gone.

    ``size`` is the poster's width and height; ``speed`` is what rows are sorted by, None where it was not measured.
    """

    system: str
    video: str
    flow: str
    poster: str
    size: tuple[int, int]
    fps: float
    small: bool
    words: str
    speed: float | None = None


@dataclass(frozen=True)
class Row:
    """The clips of all systems for one prompt and number."""

    title: str
    index: int
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Footage:
    """Everything that moves in the page.

    ``scale`` is the speed of full colour in the flow pictures; ``order`` the metric in which systems differ most in the first
    rows, empty where none was measured of all; ``systems`` those whose clips are in the page, the first ``AT_ONCE`` of them
    shown until others are chosen; ``left_out`` and ``rows_left_out`` what would have made the page too large.
    """

    rows: tuple[Row, ...]
    extremes: tuple[Row, ...]
    scale: float
    unit: str
    flow_name: str
    order: str
    systems: tuple[str, ...]
    left_out: tuple[str, ...]
    rows_left_out: int


def choose(results: list[Result], count: int) -> list[tuple[str, int]]:
    """Prompts and numbers that every system has, evenly spaced in their order: picked by no eye and no score."""
    keys = [list(dict.fromkeys((c["prompt"], c["index"]) for c in r.good)) for r in results]
    common = sorted(set.intersection(*map(set, keys))) if keys else []
    firsts: dict[str, int] = {}
    for prompt, index in common:
        firsts.setdefault(prompt, index)
    pool = list(firsts.items()) if len(firsts) >= min(count, len(common)) else common
    if len(pool) <= count:
        return pool
    return [pool[int(i)] for i in np.linspace(0, len(pool) - 1, count).round()]


SPEEDS = ("lab_speed", "flow_top5", "dynamic_degree")  # by which rows and prompts are sorted


def by_difference(rows: list[Cells]) -> tuple[list[Cells], str]:
    """Rows in which the speeds of the systems shown first differ most come first, and the metric by which (``SPEEDS``).

    As they were, and an empty name, if no speed was measured of all.
    """
    for metric in SPEEDS:
        values = [[clip["values"].get(metric) for _, clip in cells] for *_, cells in rows]
        if rows and all(value is not None for row in values for value in row):
            spread = [max(row[:AT_ONCE]) - min(row[:AT_ONCE]) for row in values]
            order = sorted(range(len(rows)), key=lambda i: -spread[i])
            return [rows[i] for i in order], metric
    return rows, ""


EXTREMES = (
    ("flow_top5", min, "the stillest"),
    ("flow_top5", max, "the liveliest"),
    ("motion_smoothness", min, "the least smooth"),
    ("subject_consistency", min, "the least constant subject"),
    ("lab_wobble", max, "the most wobbling"),
    ("warping_error", max, "the largest warping error"),
)


def gather(results: list[Result], count: int) -> Footage:
    """Videos and flow pictures of the chosen rows and of each system's extremes, as data URIs, within a size limit."""
    clips = {(r.name, c["prompt"], c["index"]): (r, c) for r in results for c in r.good}
    keys = choose(results, count)
    wanted: list[Cells] = [
        (f"{prompt}", index, [clips[r.name, prompt, index] for r in results]) for prompt, index in keys
    ]
    wanted, order = by_difference(wanted)
    edges = _edges(results)
    systems = _that_fit(results, wanted + edges)
    wanted, edges = (_of_these(systems, some) for some in (wanted, edges))
    flow, name = _flow_of(results)
    camera = _Camera(flow, [cell for _, _, cells in [*wanted, *edges] for cell in cells], order)
    rows = [row for title, index, cells in wanted if (row := camera.row(title, index, cells))]
    extremes = [row for title, index, cells in edges if (row := camera.row(title, index, cells))]
    left = len(wanted) + len(edges) - len(rows) - len(extremes)
    unit = "px/frame" if camera.native else f"px/frame at {FLOW_SIDE} px"
    label = METRICS[order].label.lower() if order else ""
    others = tuple(r.name for r in results if r.name not in systems)
    return Footage(tuple(rows), tuple(extremes), camera.scale, unit, name, label, systems, others, left)


def _edges(results: list[Result]) -> list[Cells]:
    """Of each system the clip at the end of each scale."""
    edges: list[Cells] = []
    for metric, pick, words in EXTREMES:
        cells = []
        for result in results:
            pool = [c for c in result.good if c["values"].get(metric) is not None]
            if pool:
                cells.append((result, pick(pool, key=lambda c: c["values"][metric])))
        if cells and len(results[0].good) > 2:
            edges.append((words, -1, cells))
    return edges


def _that_fit(results: list[Result], rows: list[Cells]) -> tuple[str, ...]:
    """As many systems, in their order, as the page has room for by the sizes of their files, twice for their flow; ``AT_ONCE`` in
    any case.
    """
    files = {r.name: {r.base / c["file"] for *_, cells in rows for of, c in cells if of is r} for r in results}
    spent, names = 0.0, list[str]()
    for name, paths in files.items():
        spent += 2 * 4 / 3 * sum(path.stat().st_size for path in paths if path.is_file())
        if len(names) >= AT_ONCE and spent > BUDGET:
            break
        names.append(name)
    return tuple(names)


def _of_these(systems: tuple[str, ...], rows: list[Cells]) -> list[Cells]:
    kept = [(title, index, [cell for cell in cells if cell[0].name in systems]) for title, index, cells in rows]
    return [row for row in kept if row[2]]


def _flow_of(results: list[Result]) -> tuple[FlowEstimator, str]:
    """The estimator the numbers were made with; Farneback's where it is not on this machine."""
    name = next((r.how["flow"]["name"] for r in results if "flow" in r.how), "farneback")
    try:
        return estimator(name, choose_device())[0], name
    except UserError:
        return estimator("farneback", choose_device())[0], "farneback"


class _Camera:
    """Reads clips, estimates their flow once, and fixes one scale for all of them before any picture is made."""

    def __init__(self, flow: FlowEstimator, cells: list[tuple[Result, Record]], order: str = ""):
        self.native = True
        self._order = order
        self._fields: dict[str, np.ndarray] = {}
        self._middles: dict[str, np.ndarray] = {}
        self._cache: dict[str, tuple[str, str, str]] = {}
        self._spent = 0
        speeds = []
        for result, clip in tqdm(cells, desc="flow of the clips shown", unit="clip"):
            path = result.base / clip["file"]
            if str(path) in self._fields or not path.is_file():
                continue
            frames = [self._reduce(frame) for frame in Clip(path)]
            found = list(flow_of_pairs(neighbours(frames), flow))
            fields = np.stack(found) if found else np.zeros((0, 2, 8, 8))
            self._fields[str(path)] = fields.astype(np.float16)
            self._middles[str(path)] = frames[len(frames) // 2]
            if fields.size:
                speeds.append(float(np.quantile(np.hypot(fields[:, 0], fields[:, 1]), 0.95)))
        self.scale = _round_up(max(float(np.quantile(speeds, 0.75)), 0.5)) if speeds else 1.0

    def _reduce(self, frame: np.ndarray) -> np.ndarray:
        side = min(frame.shape[:2])
        if side <= FLOW_SIDE:
            return frame
        self.native = False
        height, width = (8 * round(n * FLOW_SIDE / side / 8) for n in frame.shape[:2])
        return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)

    def row(self, title: str, index: int, cells: list[tuple[Result, Record]]) -> Row | None:
        """None where the page would grow beyond its budget."""
        if self._spent > BUDGET:
            return None
        return Row(title, index, tuple(self._shot(result, clip, with_prompt=index < 0) for result, clip in cells))

    def _shot(self, result: Result, clip: Record, *, with_prompt: bool) -> Shot:
        path = result.base / clip["file"]
        if str(path) not in self._fields:
            return Shot(result.name, "", "", "", (0, 0), 0.0, False, f"{clip['file']} is not there any more")
        if str(path) not in self._cache:
            self._cache[str(path)] = self._pictures(path, clip["fps"] or 8.0)
            self._spent += sum(map(len, self._cache[str(path)]))
        video, flow, poster = self._cache[str(path)]
        height, width = self._middles[str(path)].shape[:2]
        small, words = int(clip["width"]) < 192, _words(clip, with_prompt=with_prompt)
        speed = clip["values"].get(self._order)
        return Shot(result.name, video, flow, poster, (width, height), clip["fps"] or 8.0, small, words, speed)

    def _pictures(self, path: Path, fps: float) -> tuple[str, str, str]:
        """The clip, its flow, and the picture in its middle."""
        fields = self._fields[str(path)]
        shown = [*fields, *fields[-1:]]  # as many pictures as frames
        flow = _encode((flow_picture(field, self.scale) for field in shown), fps, 20) if shown else ""
        with opened(path) as (_, stream):
            as_it_is = path.suffix.lower() == ".mp4" and plays_everywhere(stream.codec_context)
        video = _uri(path.read_bytes()) if as_it_is else _encode(Clip(path), fps, 16)
        return video, flow, _picture(self._middles[str(path)])


def _words(clip: Record, *, with_prompt: bool) -> str:
    values = clip["values"]
    parts = [f"{clip['prompt']} ({clip['index']})"] if with_prompt else []
    parts.append("dynamic" if values.get("dynamic_degree") else "not dynamic")
    told = {"flow_top5": "top 5 % {:.2g}", "lab_speed": "speed {:.2g}", "motion_smoothness": "smooth {:.3f}"}
    for name, words in told.items():
        if values.get(name) is not None:
            parts.append(words.format(values[name]))
    return " · ".join(parts)


def _encode(frames: Iterable[np.ndarray], fps: float, crf: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        even = (frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames)
        write_video(path, even, fps, crf)
        return _uri(path.read_bytes())


def _picture(frame: np.ndarray) -> str:
    encoded = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return _uri(encoded.tobytes(), "image/jpeg")


def _uri(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def _round_up(value: float) -> float:
    """To the next of 1, 1.5, 2, 3, 5, 7 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 1.5, 2, 3, 5, 7, 10) if power * step >= value * 0.999)
