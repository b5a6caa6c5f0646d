"""What truly moves in a clip of the lab's world, measured without any flow network.

The caption says which colour and shape to look for, so the subject is found by its colour, followed by its centroid,
and held to the law of motion that the caption names. Positions are pixels (x right, y down), speeds pixels per frame,
angles radians.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from mogan.world.captions import Caption, parse_caption
from mogan.world.laws import CHORD, chord_speed, lawful_path, path_length, physics_residual
from mogan.world.presence import counted, there_all_the_way, things
from mogan.world.scenes import DIRECTIONS, SHAPES, SIZE, Sprite, _distance
from mogan.world.tracking import Track, camera_path, cover, largest, track

STILL = 0.1  # pixels per frame at 64 pixels: slower clips count as still


def read_instruments(frames: Sequence[np.ndarray] | np.ndarray, caption: str) -> dict[str, float]:
    """Every number of one clip, uint8 frames ``(H, W, 3)``; lengths in pixels, speeds in pixels per frame.

    NaN where the subject was not found or the number does not apply to its kind. Raises ValueError if the caption is not the lab's.

    ``speed`` (over chords of a quarter second, so that shimmer does not count: of the camera in a pan, of the rim in a
    spin, of the centroid otherwise), ``net``, ``path``, ``wobble``, ``straightness``, ``pulsing``, ``spin``, ``pan``,
    ``still``, ``physics``, ``direction``, ``colour``, ``shape``, ``identity``, ``travels``, ``count``.
    """
    said = parse_caption(caption)
    if said is None:
        raise ValueError(f"not a caption of the lab: {caption!r}")
    clip = np.stack(list(frames))
    subject = track(clip, said)
    scale = min(clip.shape[1:3]) / SIZE
    names = "speed net path wobble straightness pulsing spin pan still physics direction shape travels"
    values = dict.fromkeys(names.split(), np.nan)
    values["colour"] = float(subject.found_F.mean())
    values["identity"] = _identity(subject)
    shown = things(clip)
    values["count"] = float(counted(shown) == 1 + len(said.other_colours))
    if said.kind not in ("still", "rotating"):
        values["travels"] = there_all_the_way(shown, subject, said)
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
    values["path"] = path_length(centres) / steps
    law = "linear" if said.kind in ("still", "rotating") else said.kind  # a drift is no wobble
    # the lawful path nearest to one that jumps or stops is longer than it, which is no credit
    values["wobble"] = max(values["path"] - path_length(lawful_path(centres, law)) / steps, 0.0)
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
            mask, centre, area = largest(masks[t]), subject.centres_F2[t], subject.areas_F[t]
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
