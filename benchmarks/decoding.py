"""Memory of decoding a batch of sampled clips: all at once, clip by clip, frame by frame. Each in a process of its own.

python benchmarks/decoding.py [--clips 8] [--width 24] [--side 128]
"""

import argparse
import resource
import subprocess
import sys
from collections import deque

import torch
from diffusers import AutoencoderKLWan

from mogan.models.autoencoder import decode_video, stream_video


def peak(how: str, clips: int, width: int, side: int) -> int:
    """MB above what the process held before, for clips of 17 frames; random weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = AutoencoderKLWan(base_dim=width).eval().requires_grad_(False)
    z = torch.randn(clips, 16, 5, side // 8, side // 8)
    with torch.no_grad():
        deque(stream_video(vae, z[:1, :, :1, :4, :4]), maxlen=0)  # libraries are loaded
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if how == "all at once":
            decode_video(vae, z)
        for one in z.split(1):
            if how == "clip by clip":
                decode_video(vae, one)
            if how == "frame by frame":
                deque(stream_video(vae, one), maxlen=0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def main() -> None:
    """Print a row per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--width", type=int, default=24, help="of the autoencoder; Wan 2.1's is 96")
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(peak(options.only, options.clips, options.width, options.side))
        return
    print(
        f"{options.clips} clips of 17 x {options.side} x {options.side}, width {options.width}\n\n| decoded | MB |\n|---|---|"
    )
    for how in ("all at once", "clip by clip", "frame by frame"):
        given = [f"--{k}={getattr(options, k)}" for k in ("clips", "width", "side")]
        said = subprocess.run(
            [sys.executable, __file__, *given, "--only", how], check=True, capture_output=True, text=True
        )
        print(f"| {how} | {said.stdout.strip()} |", flush=True)


if __name__ == "__main__":
    main()
