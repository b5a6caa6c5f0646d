"""The pictures of one video file: when each is shown, the right way up, in 8-bit BT.709, whole frames, without transparency.

Everything that opens a video reads it here (through :mod:`mogan.data.video`), so that all see the same pictures at the same times.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter

from mogan.errors import UserError

# a picture is shown so long at most; a longer pause between time stamps is a gap, and the video is cut there
HELD_S = 2.0
MOST_OBLONG = 10  # sides of a pixel; beyond it the number is a mistake
MOST_PIXELS = 2**26  # of one picture, 8192 x 8192: three bytes each, a few of them at a time
STAMPS = 4096  # time stamps read to find the frame rate

HDR = "are HDR (PQ or HLG): tone-mapped by swscale, white at 203 nits"
ALPHA = "are transparent: laid over black"
LOST_ALPHA = "have a layer of transparency that is not decoded: seen opaque"
INTERLACED = "are interlaced: deinterlaced by yadif"
TAG = "have a frame rate tag that their time stamps contradict: the time stamps count"
UNEVEN = "have a variable frame rate: motion per frame is not motion per time"
GAP = f"have pauses of more than {HELD_S:g} s between time stamps: a picture is held so long, then the video is cut"

VIDEOS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,nut,mxf,rm,ivf,h264,hevc"
# a title in another encoding than UTF-8 is no reason to refuse a video; from 19 on PyAV takes it as it is
_TITLES: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "replace"}
_AREA = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HDR_CURVES = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)


class Shown(NamedTuple):
    """A decoded frame, when it appears and disappears (seconds), how its pixels are shaped and turned.

    ``aspect`` is how much wider than tall a pixel is, ``turns`` quarter turns counter-clockwise, as np.rot90 counts.
    """

    time_s: float
    end_s: float
    frame: av.VideoFrame
    aspect: float
    turns: int
    interlaced: bool


@dataclass(frozen=True)
class Timing:
    """Frames per second (None if nothing says), and what is odd about them."""

    fps: float | None
    remarks: tuple[str, ...]


def open_file(path: Path, formats: str = VIDEOS) -> Any:
    """The container that a file is, one of FFmpeg's formats. FFmpeg would also open a script or a playlist, and then whatever files and addresses that
    names, and take ``concat:a|b`` for two files.

    Raises:
        ValueError: it is no container of video.
    """
    alone = {"format_whitelist": formats, "protocol_whitelist": "file"}
    try:
        return av.open(f"file:{path}", options=alone, **_TITLES)
    except av.ArgumentError as error:
        raise ValueError("a picture, a list of files or a script, and no container of video or sound") from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of a file.

    Raises:
        UserError: nothing there that FFmpeg can open, no pictures in it, pictures too large, or no decoder for them.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is {'not a file' if path.exists() else 'not there'}")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)")
        container = open_file(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a video that FFmpeg can open ({_reason(error)})") from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            kind = "only sound" if container.streams.audio else "no video stream"
            raise UserError(f"{path} holds {kind}, no pictures")
        if streams[0].codec_context is None:
            raise UserError(f"{path} is in a codec that FFmpeg here cannot decode: write it again in another")
        width, height = streams[0].codec_context.width, streams[0].codec_context.height
        if width * height > MOST_PIXELS:
            raise UserError(f"{path} has pictures of {width} x {height}: scale it down")
        yield container, streams[0]


def plays_everywhere(codec: Any) -> bool:
    """Whether browsers and phones play it: H.264 with 8-bit 4:2:0, and little else."""
    return codec is not None and codec.name == "h264" and codec.pix_fmt in ("yuv420p", "yuvj420p")


def declared_duration(container, stream) -> float | None:
    """Seconds of picture the file says it has. Matroska times streams in a tag, or not at all when cut off.

    Matroska's are counted from 0, where the first picture need not lie: it comes later than the sound, or hours later where a
    recording kept its clock.
    """
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), None)
    if tag:
        try:
            hours, minutes, seconds = (float(part) for part in tag.split(":"))
        except ValueError:  # some write what they like
            return None
        end = 3600 * hours + 60 * minutes + seconds
    elif container.duration and len(container.streams) == 1:
        end = container.duration / av.time_base
    else:
        return None
    start = float((stream.start_time or 0) * stream.time_base)
    return end - start if start < end else end


def timing(path: Path) -> Timing:
    """The frame rate by the time stamps of a file; its tag where they agree or where there are none.

    The rate is of the pictures without the gaps between them. Nothing is decoded.
    """
    with opened(path) as (container, stream):
        tag = tagged_rate(stream)
        try:
            packets = islice(container.demux(stream), STAMPS)  # as numbers: of raw video each holds a picture
            times = [float(p.pts * p.time_base) for p in packets if p.pts is not None and not p.is_discard]
        except (av.FFmpegError, OSError, ValueError):  # decoding will say what is wrong
            times = []
        stamps = sorted(set(times))
    if len(times) > STAMPS // 2:
        stamps = stamps[:-32]  # pictures shown before these may come later
    steps = np.array([after - before for before, after in pairwise(stamps)])
    near = steps[steps <= HELD_S]
    remarks = [GAP] if len(near) < len(steps) else []
    if not len(near):
        return Timing(tag, tuple(remarks))
    off = np.abs(near - np.median(near)) > 0.25 * np.median(near) + 2e-3  # containers round times to a millisecond
    if off.mean() > 0.02:
        remarks.append(UNEVEN)
    mean = float(near.mean())
    if tag and abs(mean - 1 / tag) <= 0.02 / tag + 1e-3 / len(near):
        return Timing(tag, tuple(remarks))
    return Timing(float(f"{1 / mean:.5g}"), (*remarks, TAG) if tag else tuple(remarks))


def tagged_rate(stream) -> float | None:
    """Frames per second as the file is tagged."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def decode(path: Path) -> Iterator[Shown]:
    """Frames with their times in seconds from the first; times always increase.

    Raises:
        UserError: the file breaks, or ends before the length it declares; frames before that have been yielded.
    """
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        step = 1 / (tagged_rate(stream) or 25)
        aspect = float(stream.sample_aspect_ratio or 1)
        if not 1 / MOST_OBLONG <= aspect <= MOST_OBLONG:
            raise UserError(
                f"{path} says that its pixels are {aspect:.3g} times as wide as high: correct its aspect ratio"
            )
        origin, time_s, end = None, -step, 0.0
        try:
            for frame, turns, interlaced in _whole_frames(container.decode(stream), stream):
                if frame.width * frame.height * max(aspect, 1) > MOST_PIXELS:
                    raise UserError(f"{path} has pictures of {frame.width} x {frame.height}: scale it down")
                stamp = frame.time
                if origin is None:
                    origin = stamp or 0.0
                # files without time stamps, or with disordered ones, advance by the nominal step
                in_order = stamp is not None and stamp - origin > time_s
                time_s = stamp - origin if in_order else time_s + step
                end = time_s + (float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step)
                yield Shown(time_s, end, frame, aspect, turns, interlaced)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{path} breaks after {max(end, 0):.2f} s ({_reason(error)}): get it again") from error
        if origin is None:
            raise UserError(f"{path} holds no frame that can be decoded")
        declared = declared_duration(container, stream)
        if declared is not None and end < declared - max(0.5, 0.05 * declared):
            raise UserError(f"{path} ends after {end:.2f} s of the {declared:.2f} s it declares: it is truncated")


def _whole_frames(frames: Iterable[av.VideoFrame], stream) -> Iterator[tuple[av.VideoFrame, int, bool]]:
    """Frames, how they are turned, whether they came as fields: a file whose first frame did goes through yadif."""
    graph, turns = None, 0
    for number, frame in enumerate(frames):
        if number == 0:
            turns = round(frame.rotation / 90) % 4
            graph = _deinterlacer(stream) if frame.interlaced_frame else None
        if graph is None:
            yield frame, turns, False
            continue
        graph.vpush(frame)
        yield from ((whole, turns, True) for whole in _ready(graph))
    if graph is not None:
        graph.vpush(None)
        yield from ((whole, turns, True) for whole in _ready(graph))


def _deinterlacer(stream) -> Graph:
    graph = Graph()
    graph.link_nodes(
        graph.add_buffer(template=stream, time_base=stream.time_base),
        graph.add("yadif", "deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _ready(graph: Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def resample(decoded: Iterable[Shown], fps: float) -> Iterator[tuple[int, Shown]]:
    """``(k, frame nearest to k / fps)`` for every ``k`` until the last frame disappears.

    No frame is shown for more than ``HELD_S``: in a gap, numbers are left out, so that work never grows with the gap.
    """
    index, held = 0, None
    for shown in decoded:
        if held is not None and shown.time_s - held.time_s > HELD_S:
            while index / fps < held.time_s + HELD_S:
                yield index, held
                index += 1
            index = max(index + 1, ceil(shown.time_s * fps - 1e-6))
        while held is not None and index / fps <= (held.time_s + shown.time_s) / 2:
            yield index, held
            index += 1
        held = shown
    # containers round times to a millisecond
    while held is not None and index / fps < min(held.end_s, held.time_s + HELD_S) - 1e-3:
        yield index, held
        index += 1


def picture(reformatter: VideoReformatter, shown: Shown, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 ``(H, W, 3)``, upright, with square pixels; with ``size`` scaled by area to cover it, its centre cut out.

    Without ``size`` a picture of square pixels is only converted, with FFmpeg's default rounding, which is OpenCV's.

    Raises:
        UserError: FFmpeg refuses: what is scaled to cover the size would be too large.
    """
    try:
        return _picture(reformatter, shown, size)
    except (av.FFmpegError, ValueError) as error:
        wide, tall = shown.frame.width, shown.frame.height
        raise UserError(
            f"a picture of {wide} x {tall} cannot be scaled ({_reason(error)}): leave the video out"
        ) from error


def _picture(reformatter: VideoReformatter, shown: Shown, size: tuple[int, int] | None) -> np.ndarray:
    frame, aspect = _opaque(shown.frame), shown.aspect
    colours: dict[str, Any] = {"format": "rgb24", "threads": 1}
    if frame.color_trc in _HDR_CURVES:
        colours |= {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
    if size is None and aspect == 1:
        return np.ascontiguousarray(np.rot90(reformatter.reformat(frame, **colours).to_ndarray(), shown.turns))
    if size is None:
        height, width = frame.height, max(1, round(frame.width * aspect))
        tall, wide = height, width
    else:
        height, width = size if shown.turns % 2 == 0 else size[::-1]
        scale = max(height / frame.height, width / (frame.width * aspect))
        tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * aspect * scale))
    image = reformatter.reformat(frame, wide, tall, interpolation=_AREA, **colours).to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(np.rot90(image[top : top + height, left : left + width], shown.turns))


def remarks_on(shown: Shown, stream) -> tuple[str, ...]:
    """What had to be done to the first frame to see it as others are seen."""
    found = [HDR] * (shown.frame.color_trc in _HDR_CURVES) + [INTERLACED] * shown.interlaced
    if _alpha(shown.frame) is not None:
        found.append(ALPHA)
    elif stream.metadata.get("alpha_mode") == "1":
        found.append(LOST_ALPHA)
    return tuple(found)


def _alpha(frame: av.VideoFrame) -> np.ndarray | None:
    """RGBA ``(H, W, 4)`` of a frame that is transparent somewhere."""
    if not any(part.is_alpha for part in frame.format.components):
        return None
    image = frame.to_ndarray(format="rgba")
    return None if (image[..., 3] == 255).all() else image


def _opaque(frame: av.VideoFrame) -> av.VideoFrame:
    image = _alpha(frame)
    if image is None:
        return frame
    flat = (image[..., :3].astype(np.uint16) * image[..., 3:] + 127) // 255
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(flat.astype(np.uint8)), format="rgb24")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
