"""Clips of tasks beside their controls: a row for each control, and below it one for what each system made under it.

    python benchmarks/following.py docs/images/vdot_vace.png teacher=DIR student=DIR ... [--each 1]

Folders are those of `mogan sample --prompts tasks.jsonl`. Of each kind the first clips are drawn.
"""

import argparse
import json
from pathlib import Path

from mogan.data.video import contact_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture", type=Path)
parser.add_argument("folders", nargs="+", help="NAME=DIR")
parser.add_argument("--each", type=int, default=1)
given = parser.parse_args()
folders = {name: Path(folder) for name, _, folder in (word.partition("=") for word in given.folders)}
first = next(iter(folders.values()))
tasks: dict[str, list[dict]] = {}
for line in (first / "samples.jsonl").read_text().splitlines():
    row = json.loads(line)
    tasks.setdefault(row["task"], []).append(row)
clips, titles = [], []
for task, rows in tasks.items():
    for row in rows[: given.each]:
        clips += [first / (row.get("control") or row["mask"]), *(folder / row["file"] for folder in folders.values())]
        titles += [f"{task}: {row['prompt']}", *folders]
contact_sheet(clips, given.picture, columns=9, titles=titles, height=64)
