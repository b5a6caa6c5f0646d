"""Seconds and peak memory of Wan 2.1's text encoder and autoencoder at full size on a CPU, through the package's own calls.

    python benchmarks/random_wan.py runs/random-umt5 --text-encoder-only   # 11.4 GB of disk
    python benchmarks/parts.py text runs/random-umt5                       # needs 13 GB of free memory
    python benchmarks/parts.py vae --clip 17 64 64                         # random weights, made in memory

Peak memory is the process's own; pages of files that are only mapped are told apart, since the system takes them back.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("a red panda runs along a mossy branch while the camera follows", "a dog chases a ball. " * 40)


def timed(what: str, work: Callable[[], Any]) -> Any:
    """Do it and say what it took."""
    wall, busy = time.perf_counter(), time.process_time()
    result = work()
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    lines = Path("/proc/self/status").read_text().splitlines()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    gb = {key: kb[key] / 1e6 for key in ("VmHWM", "RssAnon", "RssFile")}
    print(
        f"{what:<40}{wall:>8.1f} s, {busy:.1f} s of a processor; peak {gb['VmHWM']:.2f} GB, "
        f"now {gb['RssAnon']:.2f} GB and {gb['RssFile']:.2f} GB of mapped files",
        flush=True,
    )
    return result


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("text", "vae"))
    parser.add_argument("folder", type=Path, nargs="?", help="of the text encoder")
    parser.add_argument("--clip", type=int, nargs=3, default=(17, 64, 64), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    from diffusers import AutoencoderKLWan

    from mogan.models import autoencoder, wan

    if arguments.part == "text":
        encode = timed("load", lambda: wan.load_text(arguments.folder))
        for prompt in PROMPTS:
            (embedding,) = timed("encode a prompt", lambda p=prompt: encode([p]))
            print(
                f"{'':<40}{len(embedding)} tokens of width {embedding.shape[1]}, finite: {embedding.isfinite().all()}"
            )
        return
    torch.manual_seed(0)
    vae = timed("make", lambda: AutoencoderKLWan().to(wan.fast_dtype()).eval().requires_grad_(False))
    video = torch.rand(1, 3, *arguments.clip) * 2 - 1
    with torch.no_grad():
        latent = timed("encode", lambda: autoencoder.encode_video(vae, video))
        decoded = timed("decode", lambda: autoencoder.decode_video(vae, latent))
    assert decoded.shape == video.shape


if __name__ == "__main__":
    main()
