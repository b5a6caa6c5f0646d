"""Write the tables of docs/scaling.md: what fits where, by `mogan estimate`. A few minutes of tracing, no GPU.

python benchmarks/scaling.py
"""

import argparse
from dataclasses import replace
from pathlib import Path

from mogan.config import Config
from mogan.costs.machines import MACHINES
from mogan.disk.files import write_atomically
from mogan.errors import UserError
from mogan.estimate.fit import GB, fit
from mogan.estimate.pricing import pricing
from mogan.recipes import find_recipe
from mogan.training.steps import with_batch

GPUS = ("4090", "l40s", "h100", "h200")  # 24, 48, 80, 141 GB
NUMBERS = (1, 8, 64)
BEGIN, END = "<!-- benchmarks/scaling.py writes below -->", "<!-- benchmarks/scaling.py wrote above -->"


def split_over(config: Config, gpus: int) -> Config:
    """The recipe with every batch at least one clip per GPU."""
    return replace(config, plan=tuple(u if u.batch % gpus == 0 else with_batch(u, gpus) for u in config.plan))


def table(recipe: str, clip: tuple[int, int, int]) -> list[str]:
    """One recipe at one clip size on every machine."""
    config = find_recipe(recipe)
    price = pricing(config, None, MACHINES["h200"], frames=clip[0], height=clip[1], width=clip[2])
    lines = [f"`{recipe}`, {clip[0]} x {clip[1]} x {clip[2]}:", ""]
    lines += [
        "| GPU | number | peak GB of usable | run, hours | what `--fit` makes of it | peak GB | host's GB per GPU | run, hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for number in NUMBERS:
            whole = split_over(config, number)
            found = price(whole, number, None, MACHINES[gpu])
            peak = f"{found.peak / GB:.0f} of {found.available / GB:.0f}"
            cells = [peak, f"{found.hours:.0f}"] if found.fits else [f"{peak}, does not fit", "-"]
            try:
                chosen, _ = fit(whole, number, lambda c, n, lora, on=MACHINES[gpu]: price(c, n, lora, on))
                made = price(chosen, number, chosen.lora, MACHINES[gpu])
                how = [f"lora {chosen.lora}"] * bool(chosen.lora) + ["offload"] * bool(chosen.offload)
                cells += [
                    ", ".join(how) or "as it is",
                    f"{made.peak / GB:.1f}",
                    f"{made.host / GB:.0f}",
                    f"{made.hours:.0f}",
                ]
            except UserError:
                cells += ["does not fit", "-", "-", "-"]
            lines.append(f"| {found.machine.name} | {number} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Trace, price, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/scaling.md"))
    page = parser.parse_args().page
    lines = table("dmd2_wan_1_3b", (81, 480, 832)) + table("mogan_wan_1_3b", (81, 480, 832))
    lines += table("mogan_wan_1_3b", (81, 320, 576))
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    write_atomically(page, f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"{END}{after}")


if __name__ == "__main__":
    main()
