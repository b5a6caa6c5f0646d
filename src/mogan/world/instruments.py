"""What truly moves in a clip of the lab's world, measured without any flow network.

The caption says which colour and shape to look for, so the subject is found by its colour, followed by its centroid,
and held to the law of motion that the caption names. Positions are pixels (x right, y down), speeds pixels per frame,
angles radians.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import cv2
import numpy as np

from mogan.world.scenes import COLOURS, DIRECTIONS, SHAPES, SIZE, Sprite, _distance

STILL = 0.1  # pixels per frame at 64 pixels: slower clips count as still
CHORD = 4  # frames over which speed is measured: shimmer from frame to frame is not speed
FOUND_CHROMA = 0.35  # of the named colour's own chroma: paler things are not of that colour
FOUND_AREA = (0.008, 0.30)  # of the picture


# ---------------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class Caption:
    """What a caption of the lab promises of its first thing, and the colours of the others."""

    colour: str
    shape: str
    kind: str
    direction: str | None
    other_colours: tuple[str, ...]


def parse_caption(caption: str) -> Caption | None:
    """Read a caption of :func:`mogan.world.scenes.make_scene`; None for any other text."""
    pan = re.fullmatch(rf"the camera pans ({'|'.join(DIRECTIONS)}) over (.+)", caption)
    phrases = f"( at rest| moving (?:{'|'.join(DIRECTIONS)})| bouncing| falling| spinning|)"
    things = []
    for part in (pan[2] if pan else caption).split(" and "):
        match = re.fullmatch(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}){phrases}", part)
        if match is None:
            return None
        things.append(match.groups())
    colour, shape, phrase = things[0]
    words = phrase.split()
    kind = {"at": "still", "moving": "linear", "spinning": "rotating"}.get(words[0], words[0]) if words else "still"
    direction = pan[1] if pan else (words[1] if kind == "linear" else None)
    return Caption(colour, shape, "pan" if pan else kind, direction, tuple(str(c) for c, _, _ in things[1:]))


# ---------------------------------------------------------------------------------------------- finding the subject


def cover(frames_FHW3: np.ndarray, colour: str) -> np.ndarray:
    """How much of every pixel the named colour covers: ``(F, H, W)`` in [0, 1], soft at outlines; zero if it is not
    there.

    Chroma (a pixel minus its own grey) is measured from the background's, along the direction of the named colour;
    what points aside, such as another sprite, is taken off. The scale is the clip's own, so pale or blurred sprites
    are found as long as they keep a third of the chroma.
    """
    pixels = frames_FHW3.astype(np.float32)
    chroma = pixels - pixels.mean(-1, keepdims=True)
    ground = np.median(chroma.reshape(-1, 3), axis=0)
    named = np.array(COLOURS[colour], np.float32)
    axis = named - named.mean() - ground
    size = float(np.linalg.norm(axis))
    chroma -= ground
    along = chroma @ (axis / size)
    aside = np.sqrt(np.maximum(np.square(chroma).sum(-1) - np.square(along), 0))
    strength = (along - aside) / size
    peak = float(np.quantile(strength, 0.985))
    if peak < FOUND_CHROMA:
        return np.zeros(strength.shape, np.float32)
    return np.clip((strength - 0.3 * peak) / (0.3 * peak), 0, 1)


@dataclass(frozen=True)
class Track:
    """Pose of the subject in every frame. Where it is not ``found`` the pose is NaN; ``free`` means wholly in view.

    ``angles_F`` point from the dark to the bright half of the sprite's shading, unwrapped.
    """

    centres_F2: np.ndarray
    areas_F: np.ndarray
    angles_F: np.ndarray
    found_F: np.ndarray
    free_F: np.ndarray


def track(frames_FHW3: np.ndarray, caption: Caption) -> Track:
    """Follow the thing of the caption's colour through a clip."""
    frames, h, w, _ = frames_FHW3.shape
    mask = np.stack([_largest(one) for one in cover(frames_FHW3, caption.colour)])
    others = [cover(frames_FHW3, colour) > 0.5 for colour in caption.other_colours]
    y, x = np.mgrid[:h, :w].astype(np.float64)
    grey = frames_FHW3.astype(np.float64).mean(-1)
    centres, areas, angles = np.full((frames, 2), np.nan), mask.sum((1, 2)).astype(np.float64), np.full(frames, np.nan)
    found = (areas > FOUND_AREA[0] * h * w) & (areas < FOUND_AREA[1] * h * w)
    free = found.copy()
    for t in np.flatnonzero(found):
        weight = mask[t].astype(np.float64)
        centre = np.array([(weight * x).sum(), (weight * y).sum()]) / areas[t]
        centres[t] = centre
        solid = np.where(weight > 0.9, grey[t], 0)
        inner = weight > 0.9
        if inner.any():
            shade = solid - solid[inner].mean() * inner
            angles[t] = np.arctan2((shade * (y - centre[1])).sum(), (shade * (x - centre[0])).sum())
        edge = np.concatenate([mask[t, 0], mask[t, -1], mask[t, :, 0], mask[t, :, -1]])
        near = cv2.dilate((mask[t] > 0.3).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
        free[t] = edge.max() < 0.5 and not any((near & other[t]).any() for other in others)
    angles[found] = np.unwrap(angles[found])
    return Track(centres, areas, angles, found, free)


def _largest(cover_HW: np.ndarray) -> np.ndarray:
    """The cover of the largest connected piece alone, with its soft rim."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((cover_HW > 0.3).astype(np.uint8))
    if count < 2:
        return np.zeros_like(cover_HW)
    piece = (labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).astype(np.uint8)
    return cover_HW * cv2.dilate(piece, np.ones((3, 3), np.uint8))


def camera_path(frames_FHW3: np.ndarray, caption: Caption, subject: Track) -> np.ndarray:
    """Where the background lies in every frame, ``(F, 2)``, from zero: translation only, sprites masked.

    Each frame is registered to the one before by least squares on brightness (Lucas and Kanade 1981, iterated, with an
    offset of brightness), because the lab's background is smooth: it has gradients everywhere and no corners to
    correlate. A background of parallel waves does not show motion along them; there, and only there, the subject's own
    motion decides, for what a camera pans over moves together.
    """
    smooth = np.stack([cv2.GaussianBlur(f.astype(np.float32).mean(-1), (0, 0), 1.0) for f in frames_FHW3])
    hidden = np.zeros(smooth.shape, bool)
    for colour in (caption.colour, *caption.other_colours):
        for t, one in enumerate(cover(frames_FHW3, colour)):
            hidden[t] |= cv2.dilate((one > 0.05).astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    path = [np.zeros(2)]
    for t in range(len(smooth) - 1):
        both = subject.free_F[t] and subject.free_F[t + 1]
        hint = subject.centres_F2[t + 1] - subject.centres_F2[t] if both else None
        path.append(path[-1] + _shift(smooth[t], smooth[t + 1], ~(hidden[t] | hidden[t + 1]), hint))
    return np.stack(path)


def _shift(one: np.ndarray, two: np.ndarray, seen: np.ndarray, hint: np.ndarray | None) -> np.ndarray:
    """The translation d with ``two(p + d) = one(p) + constant`` where ``seen``, by least squares, drawn to the hint."""
    h, w = one.shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    inner = seen & (x >= 4) & (x < w - 4) & (y >= 4) & (y < h - 4)
    if inner.sum() < 50:
        return np.zeros(2) if hint is None else hint
    shift = np.zeros(2) if hint is None else np.clip(hint, -8, 8)
    pull = 0.0 if hint is None else 0.02 * inner.sum()  # against gradients of about 1 to 2 grey levels per pixel
    for _ in range(8):
        to_x, to_y = x + np.float32(shift[0]), y + np.float32(shift[1])
        moved = cv2.remap(two, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        slope_y, slope_x = np.gradient((moved + one) / 2)
        slopes = np.stack([slope_x[inner], slope_y[inner]], 1).astype(np.float64)
        gap = (one - moved)[inner].astype(np.float64)
        slopes, gap = slopes - slopes.mean(0), gap - gap.mean()
        matrix, target = slopes.T @ slopes, slopes.T @ gap
        if hint is not None:
            matrix, target = matrix + pull * np.eye(2), target + pull * (hint - shift)
        step = np.linalg.lstsq(matrix, target, rcond=1e-6)[0]
        shift = np.clip(shift + step, -8, 8)
        if np.abs(step).max() < 1e-3:
            break
    return shift


# ---------------------------------------------------------------------------------------------- numbers


def read_instruments(frames: Sequence[np.ndarray] | np.ndarray, caption: str) -> dict[str, float]:
    """Every number of one clip; NaN where the subject was not found or the number does not apply to its kind.

    ``speed`` (over chords of a quarter second, so that shimmer does not count: of the camera in a pan, of the rim in a
    spin, of the centroid otherwise), ``net``, ``path``, ``wobble``, ``straightness``, ``pulsing``, ``spin``, ``pan``,
    ``still``, ``physics``, ``direction``, ``colour``, ``shape``, ``identity``.
    """
    said = parse_caption(caption)
    if said is None:
        raise ValueError(f"not a caption of the lab: {caption!r}")
    clip = np.stack(list(frames))
    subject = track(clip, said)
    scale = min(clip.shape[1:3]) / SIZE
    values = dict.fromkeys(
        (
            "speed",
            "net",
            "path",
            "wobble",
            "straightness",
            "pulsing",
            "spin",
            "pan",
            "still",
            "physics",
            "direction",
            "shape",
        ),
        np.nan,
    )
    values["colour"] = float(subject.found_F.mean())
    values["identity"] = _identity(subject)
    camera = camera_path(clip, said, subject) if said.kind == "pan" else np.zeros((len(clip), 2))
    if said.kind == "pan":
        values["pan"] = float(np.linalg.norm(camera[-1] - camera[0]) / max(len(clip) - 1, 1))
        values["speed"] = chord_speed(camera)
        values["physics"] = physics_residual(camera, "pan")
        values["direction"] = _agrees(-(camera[-1] - camera[0]), said, scale)
    run = _longest_run(subject.free_F)
    run = run if run.stop - run.start > CHORD else _longest_run(subject.found_F)
    if run.stop - run.start >= 3:
        values |= _follow(subject, run, said, scale)
    if subject.free_F.any():
        values["shape"] = float(_best_shape(clip, subject, said) == said.shape)
    values["still"] = float(values["speed"] < STILL * scale) if np.isfinite(values["speed"]) else np.nan
    return {name: float(value) for name, value in values.items()}


def _follow(subject: Track, run: slice, said: Caption, scale: float) -> dict[str, float]:
    """Numbers of the subject's own way, over an unbroken run of frames."""
    centres, areas, angles = subject.centres_F2[run], subject.areas_F[run], np.unwrap(subject.angles_F[run])
    steps = len(areas) - 1
    values = {"pulsing": float(np.diff(np.log(areas)).std())}
    if said.kind == "pan":
        return values
    values["net"] = float(np.linalg.norm(centres[-1] - centres[0]) / steps)
    values["path"] = _length(centres) / steps
    law = "linear" if said.kind in ("still", "rotating") else said.kind  # a drift is no wobble
    values["wobble"] = values["path"] - _length(lawful_path(centres, law)) / steps
    values["speed"] = chord_speed(centres)
    values["physics"] = physics_residual(centres, said.kind)
    if said.kind in ("linear", "falling") and values["path"] > STILL * scale:
        values["straightness"] = values["net"] / values["path"]
    if said.kind == "linear":
        values["direction"] = _agrees(centres[-1] - centres[0], said, scale)
    if said.kind == "falling":
        values["direction"] = _agrees(
            centres[-1] - centres[0], Caption(said.colour, said.shape, "falling", "down", ()), scale
        )
    if said.kind == "rotating":
        values["spin"] = chord_speed(angles[:, None])
        values["speed"] = values["spin"] * float(np.sqrt(np.median(areas) / np.pi))
    return values


def chord_speed(path_FD: np.ndarray) -> float:
    """Mean distance covered in four frames (fewer in short clips), per frame."""
    span = min(CHORD, len(path_FD) - 1)
    return float(np.linalg.norm(path_FD[span:] - path_FD[:-span], axis=1).mean() / span) if span > 0 else float("nan")


def _longest_run(use: np.ndarray) -> slice:
    best = start = length = 0
    for t, yes in enumerate([*use, False]):
        if yes:
            continue
        if t - start > length:
            best, length = start, t - start
        start = t + 1
    return slice(best, best + length)


def _identity(subject: Track) -> float:
    """Share of frames where the subject is found with an area within a factor 1.5 of its own median."""
    if not subject.found_F.any():
        return 0.0
    ratio = subject.areas_F / np.median(subject.areas_F[subject.found_F])
    return float((subject.found_F & (ratio > 1 / 1.5) & (ratio < 1.5)).mean())


def _agrees(moved_2: np.ndarray, said: Caption, scale: float) -> float:
    """1 if the way covered points within 45 degrees of the caption's, 0 if not; NaN if there is hardly any."""
    length = float(np.linalg.norm(moved_2))
    if said.direction is None or length < scale:
        return float("nan")
    return float(moved_2 @ np.array(DIRECTIONS[said.direction]) / length > np.sqrt(0.5))


def _length(path_FD: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(path_FD, axis=0), axis=1).sum())


def physics_residual(path_FD: np.ndarray, kind: str) -> float:
    """Root mean square distance in pixels from :func:`lawful_path`."""
    return float(np.sqrt(np.square(path_FD - lawful_path(path_FD, kind)).sum(1).mean()))


def lawful_path(path_FD: np.ndarray, kind: str) -> np.ndarray:
    """The nearest path (least squares) that the law of the kind allows.

    Still and rotating: one place. Linear and pan: constant velocity. Falling: constant acceleration. Bouncing: constant
    velocity between at most two turns per axis, at whole or half frames.
    """
    if kind == "bouncing":
        bases = _broken_bases(len(path_FD))
        columns = []
        for values in path_FD.T:
            inside = np.einsum("kfd,f->kd", bases, values)
            best = int(np.square(inside).sum(1).argmax())
            columns.append(bases[best] @ inside[best])
        return np.stack(columns, 1)
    degree = {"still": 0, "rotating": 0, "linear": 1, "pan": 1, "falling": 2}[kind]
    time = np.linspace(-1, 1, len(path_FD))
    basis = np.stack([time**power for power in range(degree + 1)], 1)
    return basis @ np.linalg.lstsq(basis, path_FD, rcond=None)[0]


@cache
def _broken_bases(frames: int) -> np.ndarray:
    """Orthonormal bases ``(K, F, D)`` of continuous lines with up to two turns."""
    time = np.arange(frames, dtype=float)
    turns = np.arange(0.5, frames - 1, 0.5)
    line = [np.ones(frames), time]
    if frames < 5:
        return np.linalg.qr(np.stack(line, 1)[None])[0]
    bent = [np.stack([*line, (time - a).clip(0), (time - b).clip(0)], 1) for a, b in combinations(turns, 2)]
    return np.linalg.qr(np.stack(bent))[0]


# ---------------------------------------------------------------------------------------------- shape


def _best_shape(clip: np.ndarray, subject: Track, said: Caption) -> str:
    """The shape whose outline, at the subject's place and area, fits it best over a few frames (soft Jaccard)."""
    masks = cover(clip, said.colour)
    chosen = np.flatnonzero(subject.free_F)[:: max(1, int(subject.free_F.sum()) // 4)][:4]
    turns = np.linspace(0, np.pi, 12, endpoint=False) * 2 if said.kind == "rotating" else np.zeros(1)
    scores = {}
    for shape in SHAPES:
        found = []
        for t in chosen:
            mask, centre, area = _largest(masks[t]), subject.centres_F2[t], subject.areas_F[t]
            radius = np.sqrt(area / _unit_area(shape))
            found.append(max(_jaccard(mask, _template(shape, radius, turn, centre, mask.shape)) for turn in turns))
        scores[shape] = float(np.mean(found))
    return max(scores, key=lambda shape: scores[shape])


@cache
def _unit_area(shape: str) -> float:
    """Area of the shape over radius squared."""
    return float(_template(shape, 40.0, 0.0, np.array([64.0, 64.0]), (128, 128)).sum()) / 40.0**2


def _template(shape: str, radius: float, turn: float, centre: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    dx, dy = x - centre[0], y - centre[1]
    sprite = Sprite(shape, "red", radius, "still", "", np.zeros((1, 2)), np.zeros(1))
    distance = _distance(sprite, np.cos(turn) * dx + np.sin(turn) * dy, -np.sin(turn) * dx + np.cos(turn) * dy)
    return np.clip(0.5 - distance, 0, 1)


def _jaccard(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.minimum(one, two).sum() / max(np.maximum(one, two).sum(), 1e-9))
