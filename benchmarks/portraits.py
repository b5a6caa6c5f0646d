"""A student that is told states, given a sprite as its first frame: does it do what it is told, how soon, and does it stay itself?

    python benchmarks/portraits.py STUDENT [STUDENT ...] [--chunk 1] [--portraits 48] [--sheet FOLDER]

Portraits are sprites of the lab's world `states` that no training saw. Students are those of several training seeds; intervals
(95 %) are over seeds and portraits.

States: another state is told with latent 5, all six changes in turn. Printed, by latent: share of clips that do what they are told.
Over a latent's four frames a sprite that is `idle` moves and turns by less than 0.35 px a frame (of its rim), one that is
`speaking` moves by more, one that is `listening` turns by more and does not move. The world's own clips say what can be reached.
Then identity (share of frames with an area within a factor 1.5 of the portrait's) and shape before and after the change.

Pictures: another picture takes the first one's place, the same sprite turned by a quarter or of another shape (the prompt then names
that): before the stream begins, or with latent 5. Printed: share of clips that show it. Turned: nearer than an eighth of a turn to
the other picture's angle, by shading. Shape: the outline that fits best.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice, permutations, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mogan.data.clips import to_video
from mogan.models.autoencoder import encode_video
from mogan.stream.engine import Studio, open_studio, pieces
from mogan.world.captions import parse_caption
from mogan.world.instruments import read_instruments
from mogan.world.scenes import SHAPES, Scene, render
from mogan.world.states import STATES, make_state_scene, poses
from mogan.world.tracking import Track, track

SEED, LATENTS, CHANGE, MOVES = 77, 12, 5, 0.35
CHANGES = list(permutations(sorted(STATES), 2))
Clip = list[np.ndarray]  # frames by latent


def portrait(index: int) -> Scene:
    """A scene of one frame."""
    return replace(make_state_scene(SEED, index)[0], frames=1)


def changed(scene: Scene, kind: str) -> Scene:
    """The same, turned by a quarter or of another shape."""
    (sprite,) = scene.sprites
    turn, shape = (np.pi / 2, sprite.shape) if kind == "turn" else (0.0, SHAPES[SHAPES.index(sprite.shape) - 1])
    other = replace(sprite, shape=shape, angles_F=sprite.angles_F + turn)
    return replace(scene, sprites=(other,), caption=f"a {sprite.colour} {shape}")


def acted(index: int, states: list[str]) -> Clip:
    """The world's own clip of a portrait under states, one a latent."""
    scene, rng = portrait(index), np.random.default_rng([SEED, index, 1])
    (sprite,) = scene.sprites
    by_frame = [states[0], *(state for state in states[1:] for _ in range(4))]
    centres, angles = poses(rng, by_frame, rng.uniform(0.7, 2.2), sprite.radius, scene.size)
    moved = replace(sprite, centres_F2=centres, angles_F=angles)
    still = np.zeros((len(by_frame), 2))
    frames = render(replace(scene, frames=len(by_frame), sprites=(moved,), camera_F2=still))
    return [frames[:1], *(frames[1 + 4 * n : 5 + 4 * n] for n in range(len(states) - 1))]


def followed(clip: Clip, colour: str) -> Track:
    """Its sprite."""
    said = parse_caption(f"a {colour} {SHAPES[0]} spinning")
    assert said is not None
    return track(np.concatenate(clip), said)


def obeys(clip: Clip, states: list[str], scene: Scene) -> np.ndarray:
    """By latent after the first: 1 if the sprite does what its state says."""
    (sprite,) = scene.sprites
    found, done = followed(clip, sprite.colour), []
    for n, state in enumerate(states[1:], 1):
        run = slice(4 * n - 4, 4 * n + 1)  # from the last frame of the latent before
        centres, angles = found.centres_F2[run], np.unwrap(found.angles_F[run])
        moves = np.linalg.norm(centres[-1] - centres[0]) / 4 > MOVES
        turns = sprite.radius * abs(angles[-1] - angles[0]) / 4 > MOVES
        does = "speaking" if moves else "listening" if turns else "idle"
        done.append(float(bool(found.found_F[run].all()) and does == state))
    return np.array(done)


def itself(clip: Clip, scene: Scene) -> tuple[float, float]:
    """Share of frames with an area near the first one's, and whether the outline is the portrait's."""
    (sprite,) = scene.sprites
    found = followed([clip[0], *clip[1:]], sprite.colour)
    ratio = found.areas_F[1:] / max(found.areas_F[0], 1.0)
    caption = f"a {sprite.colour} {sprite.shape} spinning"
    shape = read_instruments(np.concatenate(clip[1:]), caption)["shape"]
    return float(((ratio > 1 / 1.5) & (ratio < 1.5)).mean()), float(np.nan_to_num(shape))


def shows(frames: np.ndarray, other: Scene, kind: str) -> float:
    """1 if frames ``(F, H, W, 3)`` show the changed sprite."""
    if kind == "shape":
        return float(np.nan_to_num(read_instruments(frames, f"{other.caption} spinning")["shape"]))
    angles = followed([render(other), frames], other.sprites[0].colour).angles_F
    apart = np.abs((angles[1:] - angles[0] + np.pi) % (2 * np.pi) - np.pi)
    return float(np.nanmedian(apart) < np.pi / 4) if np.isfinite(apart).any() else 0.0


def streamed(
    studio: Studio, scene: Scene, text_at: Callable[[int], Tensor], given_at: Callable[[int], Tensor] | None = None
) -> Clip:
    """What is made, by latent; given the portrait, or what ``given_at`` says."""
    first = latent_of(studio, scene)
    with closing(pieces(studio, text_at, 0, given_at=given_at or (lambda n: first))) as made:
        return list(islice(made, LATENTS))


@torch.no_grad()
def latent_of(studio: Studio, scene: Scene) -> Tensor:
    """A portrait as a latent."""
    return encode_video(studio.vae, to_video(render(scene)[:1]), False)


def under(studio: Studio, index: int) -> tuple[Scene, list[str], Callable[[int], Tensor]]:
    """A portrait and one of the changes of state."""
    scene, (before, after) = portrait(index), CHANGES[index % len(CHANGES)]
    texts = [studio.text(scene.caption, state) for state in (before, after)]
    return scene, [before] * CHANGE + [after] * (LATENTS - CHANGE), lambda n: texts[n >= CHANGE]


def of_pictures(studio: Studio, indices: range, kind: str, since: int, sheet: Path | None) -> Iterator[list[float]]:
    """Of each portrait, by latent: is the other picture shown? At rest throughout."""
    for index in indices:
        one = portrait(index)
        other = changed(one, kind)
        both = [(studio.text(scene.caption, "idle"), latent_of(studio, scene)) for scene in (one, other)]
        clip = streamed(studio, one, lambda n, b=both: b[n >= since][0], lambda n, b=both: b[n >= since][1])
        save(clip, sheet, f"{kind}-{since}-{index}")
        yield [shows(piece, other, kind) for piece in clip[1:]]


def save(clip: Clip, folder: Path | None, name: str) -> None:
    """The last frame of each latent, side by side."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([piece[-1] for piece in clip], 1)).save(folder / f"{name}.png")


def row(name: str, found: np.ndarray) -> str:
    """Means over students and portraits of ``(S, N, numbers)``, with an interval of the last number."""
    rng, (students, count, _) = np.random.default_rng(0), found.shape
    last = [
        found[rng.integers(students, size=students)][:, rng.integers(count, size=count), -1].mean() for _ in range(2000)
    ]
    low, high = np.quantile(last, [0.025, 0.975])
    return f"| {name} | " + " | ".join(f"{mean:.2f}" for mean in found.mean((0, 1))) + f" [{low:.2f}, {high:.2f}] |"


def main() -> None:
    """Print two tables and a line of identity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+")
    parser.add_argument("--portraits", type=int, default=48)
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="a folder for pictures of the first student's clips")
    given = parser.parse_args()
    studios = [open_studio(name, torch.device("cpu"), "fp32", None, given.chunk) for name in given.students]
    sheets, indices = [given.sheet, *repeat(None, len(studios) - 1)], range(given.portraits)
    head = " | ".join(map(str, range(1, LATENTS))) + " |\n" + "|---" * LATENTS + "|"
    print(f"| does what it is told; latent | {head}")
    real = np.array([[obeys(acted(i, under(studios[0], i)[1]), under(studios[0], i)[1], portrait(i)) for i in indices]])
    print(row("the world's own", real), flush=True)
    stay = []
    for again in (True, False):
        found = np.zeros((len(studios), given.portraits, LATENTS - 1))
        for s, (studio, sheet) in enumerate(zip(studios, sheets, strict=True)):
            for i in indices:
                scene, states, text_at = under(studio, i)
                clip = streamed(replace(studio, again=again), scene, text_at)
                found[s, i] = obeys(clip, states, scene)
                save(clip, sheet, f"states-{again}-{i}-{states[0]}-{states[-1]}")
                if again:
                    stay.append([*itself(clip[:CHANGE], scene), *itself([clip[0], *clip[CHANGE:]], scene)])
        print(row("the past run again" if again else "the past as it was", found), flush=True)
    before, after = np.array(stay).mean(0).reshape(2, 2)
    print(
        f"\nidentity {before[0]:.3f} before the change, {after[0]:.3f} after; shape {before[1]:.2f}, {after[1]:.2f}\n"
    )
    print(f"| shows the other picture; latent | {head}")
    for kind in ("turn", "shape"):
        for name, since in (("never given", LATENTS), ("given first", 0), (f"given with latent {CHANGE}", CHANGE)):
            found = np.array(
                [
                    list(of_pictures(studio, indices, kind, since, sheet))
                    for studio, sheet in zip(studios, sheets, strict=True)
                ]
            )
            print(row(f"{kind}, {name}", found), flush=True)


if __name__ == "__main__":
    main()
