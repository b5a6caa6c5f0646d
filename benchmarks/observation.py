"""Memory and time of one generator motion update, at the full width of the Wan 2.1 autoencoder (random weights).

Compares the product's chain (a window decoded under checkpoints, flow in checkpointed chunks, checkpointed encode) with
plain autograd through the decode of the whole clip; then shows that memory does not grow with the clip at a fixed window.
Each measurement runs in its own process; peak memory is that process's.

    python benchmarks/observation.py            # full width, a few minutes
    python benchmarks/observation.py --width 24 # a quarter of the width, seconds
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch


def measure(width: int, latents: int, window: int, checkpointed: bool, side: int) -> dict[str, float]:
    """One forward and backward of the chain in this process: seconds and peak memory above what the models take."""
    from diffusers import AutoencoderKLWan

    from mogan.motion.flow import RaftConfig, RaftFlow, motion_picture, refinements
    from mogan.motion.observation import MotionObservation

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=width).eval().requires_grad_(False)
    flow = RaftFlow(RaftConfig().build(), iterations=6, pairs_per_chunk=4)
    latent = torch.randn(1, 16, latents, side // 8, side // 8, requires_grad=True)
    with torch.no_grad():  # warm allocators and kernels on the smallest clip
        MotionObservation(vae, flow, 2, 4.0)(latent[:, :, :2], 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if checkpointed:
        out = MotionObservation(vae, flow, window, 4.0)(latent, latents - window).latent_BCFHW
    else:
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        deviation = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        video = vae.decode(latent * deviation + mean).sample
        (fields,) = refinements(flow.raft, video.transpose(1, 2), 6)
        picture = motion_picture(fields.transpose(1, 2), 4.0)
        out = vae.encode(picture).latent_dist.mean
    out.square().mean().backward()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_MB": peak / 1024, "above_MB": (peak - before) / 1024}


def in_own_process(**settings) -> dict[str, float]:
    """Run :func:`measure` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(settings)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the two comparisons as tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=96, help="base width of the autoencoder; Wan 2.1's is 96")
    parser.add_argument("--side", type=int, default=64, help="height and width of the frames, pixels")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    width, side = arguments.width, arguments.side
    plain = in_own_process(width=width, latents=9, window=9, checkpointed=False, side=side)
    ours = in_own_process(width=width, latents=9, window=4, checkpointed=True, side=side)
    print(f"one motion update, autoencoder width {width}, 33 frames of {side} x {side}, batch 1")
    print(f"{'':<44}{'memory above models':>22}{'seconds':>10}")
    print(f"{'decode everything, plain autograd':<44}{plain['above_MB']:>19.0f} MB{plain['seconds']:>10.1f}")
    print(f"{'window of 4 of 9 latents, checkpointed':<44}{ours['above_MB']:>19.0f} MB{ours['seconds']:>10.1f}")
    print(
        f"ratio plain / ours: memory {plain['above_MB'] / ours['above_MB']:.1f}, time {plain['seconds'] / ours['seconds']:.2f}"
    )
    print("\nmemory at a fixed window of 3 latents, as the clip grows")
    for latents in (4, 8, 16, 21):
        row = in_own_process(width=width, latents=latents, window=3, checkpointed=True, side=side)
        print(f"{1 + 4 * (latents - 1):>4} frames {row['above_MB']:>8.0f} MB {row['seconds']:>7.1f} s")


if __name__ == "__main__":
    main()
