"""Time of one motion update of the lab, exact and through the surrogate, in turn in one process.

A motion update is the student's step and the discriminator's, each from its prompts to the optimiser: rollout, observation,
discriminator, backward pass. A surrogate saves nothing of rollouts and discriminator.

    python benchmarks/surrogate.py --data runs/demo/cache
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from mogan.data.cache import open_cache
from mogan.recipes import find_recipe
from mogan.training.assemble import assemble
from mogan.training.steps import Position, step

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Print what each part takes, the ratio, and the cost of an iteration of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/demo/cache"), help="a cache of the lab")
    parser.add_argument("--flow", default="lab", help="flow network: lab, or a path; its weights make no difference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where other programs share the cores")
    arguments = parser.parse_args()
    config = find_recipe("mogan_surrogate_lab")
    # never falls back
    config = config.changed("gan", flow=arguments.flow).changed("surrogate", limit=None)
    parts = assemble(config, open_cache(arguments.data), model="lab", run=None, device="cpu")
    clock = CLOCKS[arguments.clock]
    plan = {u.label: u for u in config.plan}
    names = ("student<gan", "discriminator<gan", "student<surrogate", "discriminator<surrogate", "surrogate<surrogate")
    rows: dict[str, list[float]] = {}
    for round_ in range(arguments.rounds + 1):  # the first warms up
        for name in names:
            parts.config = replace(config, plan=(replace(plan[name], again=None),))
            began = clock()
            step(parts, Position(0, round_, 0, 0))  # the same clips, window and exit step for all
            rows.setdefault(name, []).append(clock() - began)
    cost = {name: statistics.median(times[1:]) for name, times in rows.items()}
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {arguments.clock} clock, seconds")
    for name in sorted(cost):
        print(f"{name:<38}{cost[name]:>8.3f}")
    exact, predicted = (cost[f"student<{o}"] + cost[f"discriminator<{o}"] for o in ("gan", "surrogate"))
    every, times = plan["student<gan"].every, plan["surrogate<surrogate"].times
    learning = times * cost["surrogate<surrogate"]
    whole = exact / every + predicted * (1 - 1 / every) + learning
    print(f"motion update: exact {exact:.3f}, predicted {predicted:.3f}: {exact / predicted:.1f} times cheaper")
    print(f"learning, {times} steps: {learning:.3f}")
    print(f"with every {every}th exact and learning: {whole:.3f} an iteration, {exact / whole:.1f} times cheaper")


if __name__ == "__main__":
    main()
