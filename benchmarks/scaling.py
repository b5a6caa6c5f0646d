"""Write the tables of docs/scaling.md: what fits where, by `mogan estimate`. A few minutes of tracing, no GPU.

python benchmarks/scaling.py
"""

import argparse
from dataclasses import replace
from pathlib import Path

from mogan.config import Config
from mogan.disk.files import write_atomically
from mogan.estimate.command import pricing
from mogan.recipes import find_recipe
from mogan.training.steps import with_batch

GPUS = ("4090", "l40s", "h100", "h200")  # 24, 48, 80, 141 GB
NUMBERS = (1, 8, 16, 64)
BEGIN, END = "<!-- benchmarks/scaling.py writes below -->", "<!-- benchmarks/scaling.py wrote above -->"


def split_over(config: Config, gpus: int) -> Config:
    """The recipe with every batch at least one clip per GPU."""
    return replace(config, plan=tuple(u if u.batch % gpus == 0 else with_batch(u, gpus) for u in config.plan))


def table(recipe: str, clip: tuple[int, int, int]) -> list[str]:
    """One recipe at one clip size on every machine."""
    config = find_recipe(recipe)
    price = pricing(config, None, "h200", frames=clip[0], height=clip[1], width=clip[2])
    lines = [f"`{recipe}`, {clip[0]} x {clip[1]} x {clip[2]}:", ""]
    lines += [
        "| GPU | number | peak GB of usable | run, hours | with `--lora 64`: peak GB | run, hours |",
        "|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for number in NUMBERS:
            cells = []
            for lora in (None, 64):
                if lora and number > 1:  # as large on each, and as many times faster
                    cells.append("- | -")
                    continue
                found = price(split_over(config, number), number, lora, gpu)
                least = f" of {found.available / 1e9:.0f}" if lora is None else ""
                fits = found.fits
                cells.append(
                    f"{found.peak / 1e9:.0f}{least}{'' if fits else ', does not fit'} | {f'{found.hours:.0f}' if fits else '-'}"
                )
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
