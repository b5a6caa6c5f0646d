"""What `mogan estimate` says of everything that `make gpu` measures, made on the CPU beside the measuring.

python benchmarks/gpu_predicted.py --work runs/gpu --gpu h200
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_inputs import FULL, NEIGHBOURS, OFFLOAD, SMALLER, Clip, Inputs, config_of, recipe_key
from gpu_networks import predicted as of_networks

from mogan.costs.calls import Tracer
from mogan.costs.machines import MACHINES, usable
from mogan.costs.shapes import read_shapes, resized
from mogan.disk.files import write_atomically
from mogan.estimate.predict import PREPARE, Estimate, predict


def of_recipe(found: Estimate) -> dict[str, Any]:
    """Seconds, peak and operations of every update; what an objective makes once per iteration counts to the first."""
    steps = [
        {
            "label": s.label,
            "seconds": s.seconds,
            "peak": s.peak,
            "flops": s.flops,
            "model_flops": s.model_flops,
        }
        for s in found.steps
    ]
    while len(steps) > 1 and str(steps[0]["label"]).startswith(PREPARE):
        first = steps.pop(0)
        for key in ("seconds", "flops", "model_flops"):
            steps[0][key] += first[key]  # type: ignore[operator]
        steps[0]["peak"] = max(steps[0]["peak"], first["peak"])  # type: ignore[type-var]
    stays = sum(n.weights + n.moments + n.average for n in found.networks)
    return {"steps": steps, "peak": max(s.peak for s in found.steps), "stays": stays}


def main() -> None:
    """Write what is known after every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gpu", default="h200", choices=sorted(MACHINES))
    parser.add_argument("--narrow", action="store_true", help="of the dry run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    inputs, machine = Inputs(arguments.work, arguments.narrow), MACHINES[arguments.gpu]
    file = arguments.work / "results" / "predicted.json"
    known: dict[str, Any] = {"machine": machine.name, "bf16": machine.bf16, "bandwidth": machine.bandwidth}
    tracers: dict[tuple[Clip, bool], Tracer] = {}

    def tracer(clip: Clip, offload: bool = False) -> Tracer:
        if (clip, offload) not in tracers:
            frames, height, width = clip
            published = str(inputs.model) if inputs.narrow else "wan2.1-t2v-1.3b"
            shapes = resized(read_shapes(published), frames=frames, height=height, width=width)
            tracers[clip, offload] = Tracer(shapes, True, torch.bfloat16, offload=offload)
        return tracers[clip, offload]

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(known, indent=1) + "\n")

    planned = [("dmd2_wan_1_3b", None), ("mogan_wan_1_3b", 64), ("mogan_wan_1_3b", None)]
    planned += [(f"mogan_wan_1_3b{OFFLOAD}", 64)]
    planned += [(f"{name}_wan_1_3b", None) for name in NEIGHBOURS]
    for name, lora in planned:
        for clip in (inputs.clip,) if inputs.narrow else (FULL, *SMALLER):
            try:
                config = config_of(name, inputs, clip, lora)
                found = of_recipe(predict(config, tracer(clip, bool(config.offload)), machine, 1, clips=0, lora=lora))
            except Exception as error:  # the others are still worth having
                print(f"{name} at {clip}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            known[recipe_key(name, clip, lora)] = found
            write()
            if found["peak"] <= usable(machine.memory):
                break  # what is smaller is not measured either
        if name == "mogan_wan_1_3b" and "networks" not in known:
            known["networks"] = of_networks(tracer(inputs.clip), machine, inputs)
            write()


if __name__ == "__main__":
    main()
