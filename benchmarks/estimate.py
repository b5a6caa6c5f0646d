"""What `mogan estimate` predicts beside what PyTorch allocates, on networks narrow enough for a CPU.

python benchmarks/estimate.py           # reduced width and size, a minute
"""

import argparse
import os
from dataclasses import replace

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from mogan.costs.shapes import read_shapes
from mogan.estimate.check import compare, small
from mogan.models.wan import Geometry


def main() -> None:
    """Print a row per call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="wan2.1-t2v-1.3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--narrower", type=int, default=12, help="divide the widths by this")
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--side", type=int, default=128)
    arguments = parser.parse_args()
    shapes = small(read_shapes(arguments.model), arguments.layers, arguments.narrower)
    shapes = replace(shapes, size=Geometry(16, arguments.side, arguments.side, arguments.frames))
    print(
        f"{shapes.name}, {arguments.layers} layers, widths / {arguments.narrower}, fp32, "
        f"{arguments.frames} x {arguments.side} x {arguments.side}"
    )
    print(f"{'':<36}{'predicted MB':>14}{'allocated MB':>14}{'error':>8}")
    for case in compare(shapes, window=4):
        print(
            f"{case.name:<36}{case.predicted / 1e6:>14.1f}{case.measured / 1e6:>14.1f}{case.error:>+8.1%}", flush=True
        )


if __name__ == "__main__":
    main()
