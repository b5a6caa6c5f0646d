"""Video files in and out, contact sheets, flow pictures.

Frames are uint8 RGB arrays ``(H, W, 3)``; clips are ``(F, H, W, 3)``. Decoding streams: memory does not
grow with the file.
"""

import platform
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mogan.data.stream import declared_duration, decode, opened, picture, remarks_on, resample, timing
from mogan.disk.files import replacing
from mogan.errors import UserError

SUFFIXES = (
    *(".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v", ".gif", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".flv", ".wmv", ".ogv", ".3gp"),
)

# Left alone, x264 chooses by processor how it weighs macroblocks over time (mb-tree), and the assembly for that reads memory
# nobody wrote, as valgrind shows: other bytes on another machine, and on some from run to run. This is its portable
# algorithm, in the instructions every 64-bit x86 has; valgrind finds nothing there, and it costs no time worth measuring.
_X264 = "cpu-independent=1" + (":asm=SSE2" if platform.machine().lower() in ("x86_64", "amd64") else "")
_ENCODER = {"preset": "medium", "x264-params": _X264}
GIF_WIDTH = 800  # pixels, of a sheet of moving clips: what a page shows unscaled
_BT709 = 1  # the number of BT.709 in FFmpeg's lists of matrices, primaries and transfer curves


@dataclass(frozen=True)
class Probe:
    """What a file holds: frames per second by its time stamps, size as displayed, after rotation.

    ``frames`` is None if the file does not say. ``remarks`` are sentences without their subject, such as "are HDR: ...".
    """

    fps: float | None
    width: int
    height: int
    frames: int | None
    duration_s: float
    remarks: tuple[str, ...] = ()


class Frame(NamedTuple):
    """One frame: its number in the (resampled) video, the time it has in the source, its picture."""

    number: int
    time_s: float
    image_HWC: np.ndarray


# ---------------------------------------------------------------------------------------------- reading


def probe(path: str | Path) -> Probe:
    """Open a file, decode its first frame and say what it holds.

    Raises:
        UserError: the file is missing, empty, not a video, has no picture, or the first frame cannot be decoded.
    """
    path = Path(path)
    when = timing(path)
    first = next(decode(path))
    image = picture(VideoReformatter(), first, None)
    with opened(path) as (container, stream):
        declared = declared_duration(container, stream)
        frames = stream.frames or None
        remarks = (*remarks_on(first, stream), *when.remarks)
    if declared is None:
        declared = frames / when.fps if frames and when.fps else 0.0
    height, width = image.shape[:2]
    return Probe(when.fps, width, height, frames, declared, remarks)


def read_frames(
    path: str | Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    only: Container[int] | None = None,
) -> Iterator[Frame]:
    """Decode a file frame by frame, as :mod:`mogan.data.stream` sees it.

    Args:
        path: mp4, webm, mov, avi, mkv, gif: whatever FFmpeg decodes.
        fps: resample: frame ``k`` is the source frame nearest to ``k / fps`` seconds. A source slower than that repeats
            frames; the repeats are the *same array*, so ``a is b`` finds them. Numbers that fall into a gap between time
            stamps are left out.
        size: ``(height, width)``: scale by area averaging until the picture covers it, then cut the centre out.
        only: numbers of the frames wanted; others are neither scaled nor yielded (a ``range`` or a set).

    Raises:
        UserError: as :func:`probe`, or the file breaks or ends before the length it declares. Frames before the break
            have been yielded by then.
    """
    decoded = decode(Path(path))
    reformatter = VideoReformatter()  # keeps its scaler from frame to frame; files are read side by side, so one thread
    last, image = None, np.empty(0)
    for index, shown in enumerate(decoded) if fps is None else resample(decoded, fps):
        if only is None or index in only:
            if shown is not last:
                last, image = shown, picture(reformatter, shown, size)
            yield Frame(index, shown.time_s, image)


def read_video(path: str | Path) -> tuple[np.ndarray, float | None]:
    """A whole file: uint8 ``(F, H, W, 3)`` and its frame rate (None if the file does not say).

    Raises:
        UserError: it cannot be read, or changes its size.
    """
    frames = [frame.image_HWC for frame in read_frames(path)]
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} changes its size in the middle: write it again at one size")
    return np.stack(frames), timing(Path(path)).fps


# ---------------------------------------------------------------------------------------------- writing


def write_video(path: str | Path, frames_FHWC: Iterable[np.ndarray], fps: float, crf: int = 16) -> None:
    """Write H.264 (yuv420p, BT.709) tagged with exactly ``fps``; the same frames give the same bytes, on any x86 processor.

    Args:
        path: ends in .mp4, .mov or .mkv.
        frames_FHWC: uint8 ``(F, H, W, 3)``, or any iterable of frames; even height and width.
        fps: frames per second.
        crf: x264's constant rate factor, 0 lossless to 51; 16 is visually transparent.

    Raises ValueError if a frame is no uint8 ``(H, W, 3)`` of even sides.
    """
    rate = Fraction(fps).limit_denominator(1001)
    with (
        replacing(Path(path)) as temporary,
        av.open(f"file:{temporary}", "w", options={"movflags": "+faststart"}) as out,
    ):
        stream: Any = out.add_stream("libx264", rate=rate, options=_ENCODER | {"crf": str(crf)})
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # x264 gives other bytes for other numbers of threads
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = int(ColorRange.MPEG)
        count = 0
        for count, image in enumerate(frames_FHWC, 1):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] % 2 or image.shape[1] % 2:
                raise ValueError(f"frames must be uint8, H W 3, with even sides, not {image.dtype} {image.shape}")
            if count == 1:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts, frame.time_base = count - 1, 1 / rate
            out.mux(stream.encode(frame))
        if not count:
            raise ValueError("a video needs at least one frame")
        out.mux(stream.encode(None))


# ---------------------------------------------------------------------------------------------- pictures


def contact_sheet(
    clips: Sequence[np.ndarray | str | Path],
    path: str | Path,
    columns: int = 8,
    titles: Sequence[str] | None = None,
    height: int = 128,
) -> None:
    """Write a PNG with one row per clip: ``columns`` frames spread evenly from the first to the last.

    Args:
        clips: uint8 ``(F, H, W, 3)`` arrays or paths of videos.
        path: where to write.
        columns: frames per row; a shorter clip shows each of its frames once.
        titles: a line of text above each row.
        height: of a frame in the sheet, pixels.
    """
    if not clips:
        raise ValueError("a contact sheet needs at least one clip")
    rows = []
    for number, clip in enumerate(clips):
        frames = clip if isinstance(clip, np.ndarray) else read_video(clip)[0]
        picked = frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)]
        strip = np.concatenate([np.asarray(_scaled(frame, height)) for frame in picked], 1)
        rows.append((titles[number] if titles else "", strip))
    margin = 18 if titles else 2
    sheet = Image.new("RGB", (max(s.shape[1] for _, s in rows), len(rows) * (height + margin)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, (title, strip) in enumerate(rows):
        top = number * (height + margin)
        draw.text((3, top + 1), title, fill="black", font=font)
        sheet.paste(Image.fromarray(strip), (0, top + margin))
    with replacing(Path(path).with_suffix(".png")) as temporary:
        sheet.save(temporary)


def moving_sheet(
    rows: Sequence[tuple[str, Sequence[str | Path]]],
    path: str | Path,
    heads: Sequence[str],
    fps: float,
    height: int = 112,
) -> None:
    """Write a GIF that loops: a row per title, in it one clip under each head, all playing in step.

    Narrow rows stand side by side, as many as :data:`GIF_WIDTH` holds: a picture that fits one screen.

    Args:
        rows: a title and the videos of each row, one per head; a shorter clip rests on its last frame.
        path: where to write.
        heads: a word above each column.
        fps: frames per second; GIF rounds the time of a frame to hundredths of a second.
        height: of a clip, pixels.
    """
    clips = [[read_video(video)[0] for video in videos] for _, videos in rows]
    widths = [max(_scaled(row[i][0], height).width for row in clips) for i in range(len(heads))]
    lefts = np.cumsum([0, *(width + 4 for width in widths)]).tolist()
    font, line, apart = ImageFont.load_default(size=13), 18, lefts[-1] + 12
    across = min(len(rows), max(1, GIF_WIDTH // apart))
    places = [(n % across * apart, line + n // across * (height + line)) for n in range(len(rows))]
    blank = Image.new("RGB", (across * apart - 16, places[-1][1] + height + line), "white")
    draw = ImageDraw.Draw(blank)
    for block in range(across):
        for head, left in zip(heads, lefts, strict=False):
            draw.text((block * apart + left + 2, 1), head, fill="black", font=font)
    for (x, y), (title, _) in zip(places, rows, strict=True):
        draw.text((x + 2, y + 1), title, fill="#5b6b78", font=font)
    pages = []
    for time in range(max(len(clip) for row in clips for clip in row)):
        page = blank.copy()
        for (x, y), row in zip(places, clips, strict=True):
            for clip, left in zip(row, lefts, strict=False):
                page.paste(_scaled(clip[min(time, len(clip) - 1)], height), (x + left, y + line))
        pages.append(page)
    with replacing(Path(path).with_suffix(".gif")) as temporary:
        pages[0].save(temporary, save_all=True, append_images=pages[1:], duration=round(1000 / fps, -1), loop=0)


def _scaled(frame_HW3: np.ndarray, height: int) -> Image.Image:
    """A frame at this height; pixels of a smaller one stay squares."""
    width = max(1, round(height * frame_HW3.shape[1] / frame_HW3.shape[0]))
    way = Image.Resampling.NEAREST if frame_HW3.shape[0] < height else Image.Resampling.BOX
    return Image.fromarray(frame_HW3).resize((width, height), way)


def flow_picture(flow: np.ndarray | Tensor, max_flow: float) -> np.ndarray:
    """Flow as colours on a fixed scale: hue is direction, saturation is speed, white is still.

    The wheel is that of Baker et al., "A Database and Evaluation Methodology for Optical Flow" (2011). A speed of
    ``max_flow`` has full saturation whatever else is in the picture, and faster motion looks the same, so pictures made
    with one ``max_flow`` can be compared.

    Args:
        flow: ``(2, H, W)`` or ``(F, 2, H, W)``, pixels per frame.
        max_flow: speed of full saturation, pixels per frame.

    Returns:
        uint8 ``(H, W, 3)`` or ``(F, H, W, 3)``.
    """
    field = np.asarray(flow.detach().cpu().float() if isinstance(flow, Tensor) else flow, np.float64)
    if field.ndim not in (3, 4) or field.shape[-3] != 2:
        raise ValueError(f"flow must be (2, H, W) or (F, 2, H, W), not {field.shape}")
    u, v = field[..., 0, :, :] / max_flow, field[..., 1, :, :] / max_flow
    speed = np.minimum(np.hypot(u, v), 1.0)[..., None]
    wheel = _colour_wheel()
    place = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(place).astype(int)
    part = (place - low)[..., None]
    hue = (1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]
    return np.floor(255 * (1 - speed * (1 - hue))).astype(np.uint8)


def flow_of_picture(pictures_FHW3: np.ndarray, max_flow: float) -> np.ndarray:
    """The flow that :func:`flow_picture` shows, float32 ``(F, 2, H, W)``: directions to 2 degrees, speeds up to ``max_flow``."""
    turns = np.linspace(-np.pi, np.pi, 180, endpoint=False)
    ways = np.stack([np.cos(turns), np.sin(turns)])
    away = 255.0 - flow_picture(max_flow * ways[:, None], max_flow)[0]  # what full speed takes off white
    length = np.linalg.norm(away, axis=1)
    fields = []
    for shown in pictures_FHW3:
        likeness = (255.0 - shown) @ (away / length[:, None]).T
        best = likeness.argmax(-1)
        speed = np.minimum(likeness.max(-1) / length[best], 1.0) * max_flow
        fields.append(speed * ways[:, best])
    return np.stack(fields).astype(np.float32)


def _colour_wheel() -> np.ndarray:
    """Baker's 55 hues in [0, 1]: red, yellow, green, cyan, blue, magenta and back, finer where the eye is."""
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], float)
    steps = (15, 6, 4, 11, 13, 6)
    arcs = [
        corners[i] + np.floor(255 * np.arange(n) / n)[:, None] / 255 * (corners[i + 1] - corners[i])
        for i, n in enumerate(steps)
    ]
    return np.concatenate(arcs)
