"""What TAP-Vid's scores give to an answer that knows no motion, on the lab's exact tracks.

Every eighth pixel of the first frame is followed through the world's own poses; the answer says that all points stay where
they began and are always seen. It needs no network, so what it scores is what the measure gives to stillness.

    python benchmarks/still_tracks.py   # seconds
"""

import argparse

import numpy as np

from mogan.evaluation.distribution import TapVid, tap_vid
from mogan.world.scenes import Scene, make_scene, owner, track

SPEEDS = ((0.0, 1e-6), (1e-6, 0.15), (0.15, 0.7), (0.7, np.inf))  # px/frame


def exact_tracks(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Where the surface points under a grid of the first frame are, ``(N, F, 2)`` pixels, and where they are hidden ``(N, F)``."""
    owners = np.stack([owner(scene, t) for t in range(scene.frames)])
    starts = np.stack(np.meshgrid(*2 * [np.arange(4, scene.size, 8)]), -1).reshape(-1, 2)
    tracks, hidden = [], []
    for x, y in starts:
        mine = owners[0, y, x]
        path = track(scene, mine, x, y)
        column, row = np.clip(np.round(path), 0, scene.size - 1).astype(int).T
        inside = ((path >= 0) & (path <= scene.size - 1)).all(1)
        tracks.append(path)
        hidden.append(~(inside & (owners[np.arange(scene.frames), row, column] == mine)))
    return np.stack(tracks), np.stack(hidden)


def of_stillness(scene: Scene) -> TapVid:
    """The scores of "nothing moves", at TAP-Vid's 256 x 256 pixels."""
    tracks, hidden = exact_tracks(scene)
    tracks = tracks * 256 / scene.size
    return tap_vid(tracks, hidden, np.repeat(tracks[:, :1], scene.frames, 1), np.zeros_like(hidden))


def main() -> None:
    """Print a line for every class of speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    count = parser.parse_args().scenes
    scenes = [make_scene(31, i) for i in range(count)]
    print("| the scene moves, px/frame | scenes | average Jaccard | occlusion accuracy |\n|---|---|---|---|")
    for low, high in SPEEDS:
        found = [of_stillness(s) for s in scenes if low <= s.speed < high]
        jaccard, occlusion = (
            np.mean([getattr(f, n) for f in found]) for n in ("average_jaccard", "occlusion_accuracy")
        )
        says = "0" if low == 0 else f"{round(low, 2):g} to {high:g}" if np.isfinite(high) else f"above {low:g}"
        print(f"| {says} | {len(found)} | {jaccard:.3f} | {occlusion:.3f} |")


if __name__ == "__main__":
    main()
