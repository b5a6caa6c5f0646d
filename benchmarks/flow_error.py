"""End-point error of the lab's flow network on held-out clips, against exact flow, clean and decoded.

    python benchmarks/flow_error.py [--clips 100] [--refinements 4]

Decoded clips are measured against the flow of the clip before it was encoded, so the autoencoder's errors count too.
Every moving pixel (0.1 px a frame and more) weighs the same, hidden ones included.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from mogan.lab.clips import HELD_OUT_SEED, rendered_clips, to_video
from mogan.models import autoencoder, wan
from mogan.motion.flow import RaftFlow, load_raft
from mogan.world.scenes import exact_flow, make_scene


def main() -> None:
    """Print the error by kind of motion and over all, with a 95 % interval over clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100, help="held-out clips of each of the two worlds")
    parser.add_argument("--refinements", type=int, default=4)
    given = parser.parse_args()
    folder = wan.lab_folder()
    flow, vae = RaftFlow(load_raft(folder / "raft"), iterations=given.refinements), wan.load_vae(folder / "teacher")
    found: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {"clean": [], "decoded": []}
    for motion in ("all", "rich"):
        for number in tqdm(range(given.clips), desc=motion, unit="clip"):
            scene = make_scene(HELD_OUT_SEED, number, motion=motion)
            truth = exact_flow(scene)[0]
            moving = np.linalg.norm(truth, axis=1) > 0.1
            clean = to_video(rendered_clips(1, HELD_OUT_SEED, motion, offset=number))
            with torch.no_grad():
                decoded = autoencoder.decode_video(vae, autoencoder.encode_video(vae, clean))
                for name, video in (("clean", clean), ("decoded", decoded)):
                    error = np.linalg.norm(flow(video)[0].transpose(0, 1).numpy() - truth, axis=1)
                    found[name].append((scene.kind, error[moving], error[~moving]))
    for name, rows in found.items():
        kinds = defaultdict(list)
        for kind, moved, _ in rows:
            if moved.size:
                kinds[kind].append(moved)
        by_kind = ", ".join(f"{kind} {np.concatenate(parts).mean():.2f}" for kind, parts in sorted(kinds.items()))
        moved = [moved for _, moved, _ in rows if moved.size]
        still = np.concatenate([still for _, _, still in rows]).mean()
        low, high = interval(moved)
        print(
            f"{name:8} {np.concatenate(moved).mean():.3f} px [{low:.3f}, {high:.3f}] on moving pixels of {len(moved)} "
            f"clips ({np.mean([m.mean() for m in moved]):.3f} if every clip weighs the same), {still:.3f} on still ones; {by_kind}"
        )


def interval(moved: list[np.ndarray]) -> tuple[float, float]:
    """Of the mean over pixels, clips drawn again 2000 times."""
    sums, counts = np.array([m.sum() for m in moved]), np.array([m.size for m in moved])
    drawn = np.random.default_rng(0).integers(0, len(moved), (2000, len(moved)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    main()
