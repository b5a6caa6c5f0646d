"""A student that is told states, given a sprite as its first frame: does it do what it is told, how soon, and does it stay itself?

    python benchmarks/portraits.py STUDENT [STUDENT ...] [--chunk 1] [--portraits 36] [--sheet FOLDER]

Portraits are sprites of the lab's world `states` that no training saw. Students are those of several training seeds; intervals
(95 %) are over seeds and portraits.

States: another state is told with latent 5, all six changes in turn. Printed, by latent: share of clips that do what they are
told; of the last four latents, what is done instead.
Over a latent's four frames a sprite that is `idle` moves and turns by less than 0.35 px a frame (of its rim), one that is
`speaking` moves by more, one that is `listening` turns by more and does not move. The world's own clips say what can be reached.
Then identity (share of frames with an area within a factor 1.5 of the portrait's) and shape before and after the change.

Pictures: another picture takes the first one's place, the same sprite turned by a quarter or of another shape (the prompt then names
that): before the stream begins, or with latent 5. Printed: share of clips that show it. Turned: nearer than an eighth of a turn to
the other picture's angle, by shading. Shape: the outline that fits best.
"""

import argparse
from collections import Counter
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
SETTLED, DONE = 4, ("idle", "listening", "speaking", "lost")
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


def does(clip: Clip, scene: Scene) -> list[str]:
    """By latent after the first, the state whose motion the sprite has; "lost" where it is not found."""
    (sprite,) = scene.sprites
    found, done = followed(clip, sprite.colour), []
    for n in range(1, len(clip)):
        run = slice(4 * n - 4, 4 * n + 1)  # from the last frame of the latent before
        centres, angles = found.centres_F2[run], np.unwrap(found.angles_F[run])
        moves = np.linalg.norm(centres[-1] - centres[0]) / 4 > MOVES
        turns = sprite.radius * abs(angles[-1] - angles[0]) / 4 > MOVES
        state = "speaking" if moves else "listening" if turns else "idle"
        done.append(state if found.found_F[run].all() else "lost")
    return done


def itself(clip: Clip, scene: Scene) -> tuple[float, float]:
    """Share of frames with an area near the first one's, and whether the outline is the portrait's."""
    (sprite,) = scene.sprites
    found = followed(clip, sprite.colour)
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


def states(studios: list[Studio], indices: range, sheet: Path | None) -> None:
    """Print who does what it is told, what is done instead, and what stays."""
    told = [under(studios[0], i)[1] for i in indices]
    head = " | ".join(map(str, range(1, LATENTS)))
    print(f"| does what it is told; latent | {head} |\n" + "|---" * LATENTS + "|")

    def agreed(done: list[list[str]]) -> list[list[bool]]:
        return [[a == b for a, b in zip(one, said[1:], strict=True)] for one, said in zip(done, told, strict=True)]

    done = [does(acted(i, said), portrait(i)) for i, said in zip(indices, told, strict=True)]
    print(row("the world's own", np.array([agreed(done)], float)), flush=True)
    stay, last = [], Counter()
    for again in (True, False):
        found = []
        for studio, folder in zip(studios, [sheet, *repeat(None, len(studios) - 1)], strict=True):
            done = []
            for i, said in zip(indices, told, strict=True):
                scene, _, text_at = under(studio, i)
                clip = streamed(replace(studio, again=again), scene, text_at)
                done.append(does(clip, scene))
                save(clip, folder, f"states-{again}-{i}-{said[0]}-{said[-1]}")
                if again:
                    stay.append([*itself(clip[:CHANGE], scene), *itself([clip[0], *clip[CHANGE:]], scene)])
                    last.update((said[-1], state) for state in done[-1][-SETTLED:])
            found.append(agreed(done))
        print(row("the past run again" if again else "the past as it was", np.array(found, float)), flush=True)
    print(f"\n| told, in the last {SETTLED} latents | {' | '.join(DONE)} |\n" + "|---" * (len(DONE) + 1) + "|")
    for state in sorted(STATES):
        every = sum(last[state, one] for one in DONE)
        print(f"| {state} | " + " | ".join(f"{last[state, one] / every:.2f}" for one in DONE) + " |")
    before, after = np.array(stay).mean(0).reshape(2, 2)
    print(
        f"\nidentity {before[0]:.3f} before the change, {after[0]:.3f} after; shape {before[1]:.2f}, {after[1]:.2f}\n"
    )


def pictures(studios: list[Studio], indices: range, sheet: Path | None) -> None:
    """Print who shows another picture."""
    head = " | ".join(map(str, range(1, LATENTS)))
    print(f"| shows the other picture; latent | {head} |\n" + "|---" * LATENTS + "|")
    for kind in ("turn", "shape"):
        for name, since in (("never given", LATENTS), ("given first", 0), (f"given with latent {CHANGE}", CHANGE)):
            folders = [sheet, *repeat(None, len(studios) - 1)]
            found = [
                list(of_pictures(studio, indices, kind, since, folder))
                for studio, folder in zip(studios, folders, strict=True)
            ]
            print(row(f"{kind}, {name}", np.array(found)), flush=True)
    if sheet is not None:
        together([sheet / f"shape-{since}-{i}.png" for i in indices[:3] for since in (LATENTS, 0, CHANGE)], sheet)


def together(rows: list[Path], folder: Path) -> None:
    """Rows of frames one below the other, as ``pictures.png``."""
    Image.fromarray(np.concatenate([np.asarray(Image.open(path)) for path in rows])).save(folder / "pictures.png")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+")
    parser.add_argument("--portraits", type=int, default=36)
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="a folder for pictures of the first student's clips")
    parser.add_argument("--only", choices=("states", "pictures"))
    given = parser.parse_args()
    studios = [open_studio(name, torch.device("cpu"), "fp32", None, given.chunk) for name in given.students]
    for one in (states, pictures):
        if given.only in (None, one.__name__):
            one(studios, range(given.portraits), given.sheet)


if __name__ == "__main__":
    main()
