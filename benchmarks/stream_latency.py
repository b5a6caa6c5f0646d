"""How soon and how fast a causal student streams: time to the first frame and to the first frame after the given one, frames a second,
by chunk, precision and whether the two stages overlap; medians.

    python benchmarks/stream_latency.py STUDENT --first-frame portrait.png --chunks 1 2 4 --precisions fp32 bf16 int8

A measurement begins with the first call for a piece. Two stages overlap on as many cores (or a GPU) as they have: on one core
they take turns. On a machine that does other things, too, a core-second says more than a second.
"""

import argparse
import json
import os
import statistics
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from mogan.stream.engine import open_studio, pieces


def measured(studio, text, overlap: bool, frames: int) -> tuple[float, float, float, float]:
    """Seconds to the first frame and to the next piece; frames a second and a core-second after the first chunk that was made."""
    since = studio.chunk_of(1)[1]
    begun, times, cores, shown = time.perf_counter(), [], [], []
    with closing(pieces(studio, lambda latent: text, 0, overlap=overlap)) as made:
        for piece in islice(made, since + -(-frames // studio.frames_per_latent)):
            times.append(time.perf_counter() - begun)
            cores.append(time.process_time())
            shown.append(len(piece))
    rates = [sum(shown[since:]) / (spent[-1] - spent[since - 1]) for spent in (times, cores)]
    return times[0], times[1], *rates


def main() -> None:
    """Print a table and, with --out, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("--first-frame", type=Path)
    parser.add_argument("--prompt", default="a red circle")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1])
    parser.add_argument("--precisions", nargs="+", default=["fp32"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    print(
        "| chunk | precision | stages | first frame, s | second piece, s | frames a second | frames a core-second | load |\n"
        + 8 * "|---"
        + "|"
    )
    for precision in args.precisions:
        for chunk in args.chunks:
            studio = open_studio(args.student, torch.device(args.device), precision, None, chunk, args.first_frame)
            text = studio.text(args.prompt, studio.source.states[0] if studio.source.states else None)
            for overlap in (False, True):
                measured(studio, text, overlap, 4 * chunk)  # what is computed once
                found = [measured(studio, text, overlap, args.frames) for _ in range(args.runs)]
                first, second, rate, per_core = (statistics.median(one) for one in zip(*found, strict=True))
                load = os.getloadavg()[0]
                rows.append(
                    {
                        "chunk": chunk,
                        "precision": precision,
                        "overlap": overlap,
                        "first": first,
                        "second": second,
                        "rate": rate,
                        "per_core": per_core,
                        "load": load,
                        "all": found,
                    }
                )
                stages = "overlapped" if overlap else "in turn"
                print(
                    f"| {chunk} | {precision} | {stages} | {first:.3f} | {second:.3f} | {rate:.1f} | {per_core:.1f} | {load:.1f} |",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
