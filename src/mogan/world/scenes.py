"""A rendered world of short captioned clips whose motion is known exactly.

One or two textured sprites move over a smooth background seen by a camera that may pan. The caption names shape, colour
and *kind* of motion but never its speed, as captions on the web do: how fast things move is what a generator has to learn
from the pictures. Coordinates are pixels, x to the right, y down; pixel (0, 0) is centred on (0, 0).

Everything is a pure function of ``(seed, index)``.
"""

from dataclasses import dataclass, field

import numpy as np

from mogan.errors import UserError

FPS = 16
SIZE = 64
FRAMES = 17

COLOURS = {
    "red": (225, 55, 50),
    "green": (60, 190, 75),
    "blue": (60, 95, 230),
    "yellow": (240, 205, 60),
    "magenta": (215, 70, 205),
    "cyan": (70, 205, 220),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("still", "linear", "bouncing", "falling", "rotating", "pan")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

# Share of clips and range of speeds (pixels per frame), as on the web: most clips hardly move.
SPEEDS = {
    "all": ((0.45, 0.0, 0.15), (0.30, 0.15, 0.7), (0.25, 0.7, 2.2)),
    "rich": ((1.0, 0.7, 2.2),),
}


@dataclass(frozen=True)
class Sprite:
    """One moving thing. ``centres_F2`` and ``angles_F`` are its pose on screen in every frame (pixels, radians)."""

    shape: str
    colour: str
    radius: float
    kind: str
    phrase: str
    centres_F2: np.ndarray
    angles_F: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Everything needed to draw a clip and to know its truth. Sprites later in the tuple are nearer to the camera."""

    seed: int
    index: int
    kind: str
    speed: float
    caption: str
    size: int
    frames: int
    sprites: tuple[Sprite, ...]
    camera_F2: np.ndarray  # where the background's origin lies on screen, pixels
    waves: np.ndarray = field(repr=False)  # background: amplitude, frequency x, frequency y, phase per row
    tint: np.ndarray = field(repr=False)


def make_scene(seed: int, index: int, *, motion: str = "all", frames: int = FRAMES, size: int = SIZE) -> Scene:
    """Draw the scene number ``index`` of the world ``seed``.

    Args:
        seed: the world's seed.
        index: number of the clip; any two clips are independent.
        motion: ``all`` (many still and slow clips, as on the web) or ``rich`` (every clip moves).
        frames: frames in the clip.
        size: height and width in pixels.
    """
    if motion not in SPEEDS:
        raise ValueError(f"motion must be one of {', '.join(SPEEDS)}, not {motion!r}")
    rng = np.random.default_rng([seed, index, frames, size, len(SPEEDS[motion])])
    kind = str(rng.choice(KINDS[1:] if motion == "rich" else KINDS))
    speed = 0.0 if kind == "still" else _draw_speed(rng, motion)
    scale = size / SIZE
    direction = str(rng.choice(list(DIRECTIONS)))
    drift = np.arange(frames)[:, None] * speed * scale * np.array(DIRECTIONS[direction])
    camera = -drift if kind == "pan" else np.zeros((frames, 2))
    camera = camera - camera.mean(0)

    count = 2 if rng.random() < 0.3 else 1
    colours = rng.permutation(list(COLOURS))
    shapes = rng.permutation(SHAPES)
    sprites = []
    for number in range(count):
        own = kind if number == 0 else ("still" if kind in ("pan", "still") else str(rng.choice(("still", kind))))
        sprites.append(
            _make_sprite(
                rng, str(shapes[number]), str(colours[number]), own, direction, speed * scale, frames, size, camera
            )
        )
    subject = " and ".join(f"a {s.colour} {s.shape}{s.phrase}" for s in sprites)
    caption = f"the camera pans {direction} over {subject}" if kind == "pan" else subject
    return Scene(seed, index, kind, speed, caption, size, frames, tuple(sprites), camera, *surroundings(rng, scale))


def surroundings(rng: np.random.Generator, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Waves ``(4, 3)`` and tint ``(3,)`` of a background."""
    waves = np.stack(
        [
            rng.uniform(7, 16, 3),
            *(2 * np.pi / (rng.uniform(26, 64, (2, 3)) * scale) * rng.choice([-1, 1], (2, 3))),
            rng.uniform(0, 2 * np.pi, 3),
        ]
    )
    return waves, rng.uniform(55, 110) * rng.uniform(0.8, 1.2, 3)


def captions(seed: int, count: int, *, motion: str = "all") -> tuple[list[str], int]:
    """So many different captions of a world, in the order of its scenes; and how many of its scenes hold them.

    Raises:
        UserError: the world says fewer different things than that.
    """
    found: dict[str, None] = {}
    for scenes in range(1, 200 * count + 1):
        found[make_scene(seed, scenes - 1, motion=motion).caption] = None
        if len(found) == count:
            return list(found), scenes
    raise UserError(f"the world has fewer than {count} captions: ask for fewer prompts")


def _draw_speed(rng: np.random.Generator, motion: str) -> float:
    shares, low, high = np.array(SPEEDS[motion]).T
    band = rng.choice(len(shares), p=shares)
    return float(rng.uniform(low[band], high[band]))


def _make_sprite(rng, shape, colour, kind, direction, speed, frames, size, camera_F2) -> Sprite:
    radius = rng.uniform(9, 13) * size / SIZE
    low, high = radius + 1, size - radius - 2
    times = np.arange(frames) - (frames - 1) / 2
    angles = np.full(frames, rng.uniform(0, 2 * np.pi) if kind == "rotating" else 0.0)
    phrase = {
        "still": " at rest",
        "linear": f" moving {direction}",
        "bouncing": " bouncing",
        "falling": " falling",
        "rotating": " spinning",
        "pan": "",
    }[kind]
    if kind == "linear":
        step = np.array(DIRECTIONS[direction]) * speed
        reach = np.minimum(np.abs(step) * (frames - 1) / 2, (high - low) / 2)
        middle = rng.uniform(low + reach, high - reach)
        centres = middle + times[:, None] * np.sign(step) * reach / max((frames - 1) / 2, 1)
    elif kind == "bouncing":
        heading = rng.uniform(0, 2 * np.pi)
        step = 1.3 * speed * np.array([np.cos(heading), np.sin(heading)])
        path = rng.uniform(low, high, 2) + np.arange(frames)[:, None] * step - low
        span = high - low
        centres = low + span - np.abs(np.mod(path, 2 * span) - span)  # a triangle wave: elastic walls
    elif kind == "falling":
        fall = min(speed * (frames - 1), high - low)
        start = np.array([rng.uniform(low, high), rng.uniform(low, high - fall)])
        drop = fall * (np.arange(frames) / max(frames - 1, 1)) ** 2  # from rest under constant gravity
        centres = start + np.stack([np.zeros(frames), drop], 1)
    else:
        centres = np.repeat(rng.uniform(low, high, (1, 2)), frames, 0)
        if kind == "rotating":
            angles = angles + rng.choice([-1, 1]) * 1.5 * speed / radius * np.arange(frames)
    return Sprite(shape, colour, float(radius), kind, phrase, centres + camera_F2, angles)


def render(scene: Scene) -> np.ndarray:
    """Draw a clip: uint8, shape ``(F, H, W, 3)``, RGB."""
    y_HW, x_HW = np.mgrid[: scene.size, : scene.size].astype(np.float64)
    clip = np.empty((scene.frames, scene.size, scene.size, 3), np.uint8)
    for frame in range(scene.frames):
        image = _background(scene, x_HW - scene.camera_F2[frame, 0], y_HW - scene.camera_F2[frame, 1])
        for sprite in scene.sprites:
            local_x, local_y = _to_local(sprite, frame, x_HW, y_HW)
            cover = np.clip(0.5 - _distance(sprite, local_x, local_y), 0, 1)[..., None]
            image += cover * (_texture(sprite, local_x, local_y) - image)
        clip[frame] = np.clip(np.rint(image), 0, 255)
    return clip


def render_numbers(seed: int, numbers: range, motion: str = "all") -> np.ndarray:
    """Clips of a world by number: uint8, shape ``(N, F, H, W, 3)``, RGB."""
    return np.stack([render(make_scene(seed, number, motion=motion)) for number in numbers])


def exact_flow(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """True optical flow and where it can be seen.

    Returns:
        ``flow`` ``(F - 1, 2, H, W)`` float32 in pixels per frame, channels (u right, v down), and ``visible``
        ``(F - 1, H, W)`` bool: the same surface is still in front at the other end of the arrow, inside the picture.
    """
    y_HW, x_HW = np.mgrid[: scene.size, : scene.size].astype(np.float64)
    flow = np.empty((scene.frames - 1, 2, scene.size, scene.size), np.float32)
    visible = np.empty((scene.frames - 1, scene.size, scene.size), bool)
    owners = [owner(scene, frame) for frame in range(scene.frames)]
    for frame in range(scene.frames - 1):
        camera = scene.camera_F2[frame + 1] - scene.camera_F2[frame]
        u_HW, v_HW = np.full_like(x_HW, camera[0]), np.full_like(x_HW, camera[1])
        for number, sprite in enumerate(scene.sprites):
            mine = owners[frame] == number
            x, y = _to_local(sprite, frame, x_HW[mine], y_HW[mine])
            cos, sin = np.cos(sprite.angles_F[frame + 1]), np.sin(sprite.angles_F[frame + 1])
            u_HW[mine] = cos * x - sin * y + sprite.centres_F2[frame + 1, 0] - x_HW[mine]
            v_HW[mine] = sin * x + cos * y + sprite.centres_F2[frame + 1, 1] - y_HW[mine]
        flow[frame] = u_HW, v_HW
        x_to, y_to = np.rint(x_HW + u_HW).astype(int), np.rint(y_HW + v_HW).astype(int)
        inside = (x_to >= 0) & (x_to < scene.size) & (y_to >= 0) & (y_to < scene.size)
        landed = owners[frame + 1][y_to.clip(0, scene.size - 1), x_to.clip(0, scene.size - 1)]
        visible[frame] = inside & (landed == owners[frame])
    return flow, visible


def track(scene: Scene, number: int, x: float, y: float) -> np.ndarray:
    """Where the surface point under ``(x, y)`` of the first frame is in every frame, ``(F, 2)`` pixels.

    ``number`` is the sprite that it belongs to, -1 the background (see :func:`owner`).
    """
    if number < 0:
        return np.array([x, y]) + scene.camera_F2 - scene.camera_F2[0]
    sprite = scene.sprites[number]
    across, down = _to_local(sprite, 0, x, y)
    cos, sin = np.cos(sprite.angles_F), np.sin(sprite.angles_F)
    return sprite.centres_F2 + np.stack([cos * across - sin * down, sin * across + cos * down], 1)


def owner(scene: Scene, frame: int) -> np.ndarray:
    """Number of the sprite in front at every pixel, shape ``(H, W)``; -1 where the background shows."""
    y_HW, x_HW = np.mgrid[: scene.size, : scene.size].astype(np.float64)
    front = np.full((scene.size, scene.size), -1)
    for number, sprite in enumerate(scene.sprites):
        front[_distance(sprite, *_to_local(sprite, frame, x_HW, y_HW)) < 0] = number
    return front


def _to_local(sprite: Sprite, frame: int, x, y):
    """Screen to the sprite's own coordinates: undo the translation, then the rotation."""
    dx, dy = x - sprite.centres_F2[frame, 0], y - sprite.centres_F2[frame, 1]
    cos, sin = np.cos(sprite.angles_F[frame]), np.sin(sprite.angles_F[frame])
    return cos * dx + sin * dy, -sin * dx + cos * dy


def _distance(sprite: Sprite, x, y):
    """Signed distance to the outline in pixels, negative inside."""
    r = sprite.radius
    if sprite.shape == "circle":
        return np.hypot(x, y) - r
    if sprite.shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if sprite.shape == "triangle":
        return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.6 * r
    return np.minimum(np.maximum(np.abs(x) - r, np.abs(y) - 0.4 * r), np.maximum(np.abs(y) - r, np.abs(x) - 0.4 * r))


def _texture(sprite: Sprite, x, y):
    """Colour with a soft stripe, so that a turning disc can be seen to turn."""
    shade = 1 - 0.35 * (0.5 + 0.5 * np.cos(2 * np.pi * x / sprite.radius)) * (y > 0)
    return shade[..., None] * np.array(COLOURS[sprite.colour], float)


def _background(scene: Scene, x, y):
    amplitude, fx, fy, phase = scene.waves
    wave = (amplitude * np.cos(x[..., None] * fx + y[..., None] * fy + phase)).sum(-1)
    return scene.tint + wave[..., None]
