"""Clips of one sprite that is in one of three states, and takes up another: what a student that is told states learns from.

At rest is ``idle``, spinning ``listening``, bouncing ``speaking``. The caption names shape and colour alone: what the sprite
does is said by its state.
"""

from itertools import pairwise

import numpy as np

from mogan.world.scenes import COLOURS, FRAMES, SHAPES, SIZE, SPEEDS, Scene, Sprite, surroundings

STATES = {"idle": "still", "listening": "rotating", "speaking": "bouncing"}  # and the kind of motion of each
CHANGES = (1, 5, 9, 13)  # frames with which a latent begins


def make_state_scene(seed: int, index: int) -> tuple[Scene, str, int]:
    """A scene, the state it ends in, and the frame from which it is in that: half of the clips take it up on their way."""
    rng = np.random.default_rng([seed, index, FRAMES, SIZE, 7])
    names = sorted(STATES)
    state = str(rng.choice(names))
    since = int(rng.choice(CHANGES)) if rng.random() < 0.5 else 0
    before = str(rng.choice([name for name in names if name != state])) if since else state
    (_, low, high) = SPEEDS["rich"][0]
    speed, radius = rng.uniform(low, high), rng.uniform(9, 13)
    states = [before if frame < since else state for frame in range(FRAMES)]
    centres, angles = poses(rng, states, speed, radius, SIZE)
    colour, shape, kind = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), STATES[state]
    sprite = Sprite(shape, colour, float(radius), kind, "", centres, angles)
    still = np.zeros((FRAMES, 2))
    scene = Scene(
        seed,
        index,
        kind,
        speed,
        f"a {colour} {shape}",
        SIZE,
        FRAMES,
        (sprite,),
        still,
        *surroundings(rng, 1.0),
    )
    return scene, state, since


def poses(
    rng: np.random.Generator, states: list[str], speed: float, radius: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centres ``(F, 2)`` and angles ``(F)``: who bounces moves between elastic walls, who spins turns where it is."""
    low, span = radius + 1, size - 2 * radius - 3
    heading, turn = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1]) * 1.5 * speed / radius
    path, angle = rng.uniform(0, span, 2), rng.uniform(0, 2 * np.pi)
    step = 1.3 * speed * np.array([np.cos(heading), np.sin(heading)])
    found = [(path, angle)]
    for _, state in pairwise(states):
        path = path + step * (state == "speaking")
        angle = angle + turn * (state == "listening")
        found.append((path, angle))
    paths = np.stack([path for path, _ in found])
    return low + span - np.abs(np.mod(paths, 2 * span) - span), np.array([angle for _, angle in found])
