"""The package ``vbench`` itself, in a Python of its own, beside our numbers: whether the two agree, clip by clip.

VBench wants other versions of nearly everything than this package, so it lives in an environment the user makes. It
downloads its own weights on first use.
"""

import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from mogan.errors import UserError
from mogan.evaluation.aggregate import QUALITY
from mogan.evaluation.clips import System
from mogan.evaluation.names import METRICS

NAME = "mogan"
CHECK = "import vbench, importlib.metadata as m; print(m.version('vbench'))"
RUN = """
import os, sys, torch, vbench
videos, out, *dimensions = sys.argv[1:]
info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
judge = vbench.VBench(device, info, out)
judge.evaluate(videos_path=videos, name="mogan", dimension_list=dimensions, mode="custom_input")
"""
TOLERANCE = {"dynamic_degree": 0.0, "temporal_flickering": 1e-6}  # same frames, same rules; elsewhere kernels differ
OTHERWISE = 1e-4


def check(python: str) -> str:
    """The version of vbench that a Python has.

    Raises:
        UserError: there is no such Python, or it cannot import vbench.
    """
    try:
        found = subprocess.run([python, "-c", CHECK], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{python} does not run ({error}): give the python of an environment with vbench") from error
    if found.returncode:
        raise UserError(
            f"{python} cannot import vbench ({_last_line(found.stderr)}): make it an environment with Python 3.10 and "
            "`pip install vbench 'setuptools<70'`, or leave --compare-vbench out"
        )
    return found.stdout.strip().splitlines()[-1]


def compare(python: str, system: System, result: dict[str, Any], out: Path) -> str:
    """Run VBench on the clips of a system and add its numbers to the system's result.

    Every clip gets ``vbench``: by dimension, VBench's value and ours minus it. The system gets ``vbench``: by dimension,
    both means, the number of clips, the largest difference and how many clips differ by more than the tolerance.

    Args:
        python: of the environment that has vbench.
        system: the clips.
        result: its part of ``results.json``, changed in place.
        out: the file of results; VBench's output is kept beside it.

    Returns:
        A table to print.

    Raises:
        UserError: VBench failed, or did not measure what it was asked to.
    """
    version = check(python)
    pairs = [
        (entry.path, clip)
        for entry, clip in zip(system.clips, result["clips"], strict=True)
        if "error" not in clip and entry.path.suffix.lower() == ".mp4"
    ]
    dimensions = [name for name in QUALITY if any(name in clip["values"] for _, clip in pairs)]
    if not pairs or not dimensions:
        raise UserError(f"VBench reads .mp4 only and {system.name} has none: leave --compare-vbench out")
    theirs = _run(
        python, [path for path, _ in pairs], dimensions, out.with_suffix(f".{system.name.replace('/', '-')}.vbench.log")
    )
    about: dict[str, Any] = {}
    for name in dimensions:
        rows = []
        for (_, clip), value in zip(pairs, theirs[name], strict=True):
            ours = clip["values"].get(name)
            if ours is None or not math.isfinite(value):
                continue
            clip.setdefault("vbench", {})[name] = {"value": value, "difference": ours - value}
            rows.append((ours, value))
        if not rows:
            continue
        gaps = [abs(ours - value) for ours, value in rows]
        allowed = TOLERANCE.get(name, OTHERWISE)
        about[name] = {
            "n": len(rows),
            "ours": sum(ours for ours, _ in rows) / len(rows),
            "vbench": sum(value for _, value in rows) / len(rows),
            "largest_difference": max(gaps),
            "tolerance": allowed,
            "differ": sum(gap > allowed for gap in gaps),
        }
    result["vbench"] = {"version": version, "python": python, "dimensions": about}
    return _table(system.name, version, about)


def _run(python: str, paths: list[Path], dimensions: list[str], log: Path) -> dict[str, list[float]]:
    """VBench's value per clip and dimension, in the order of ``paths``, each in 0..1."""
    with tempfile.TemporaryDirectory() as folder:
        videos, written = Path(folder, "videos"), Path(folder, "out")
        videos.mkdir()
        for number, path in enumerate(paths):  # names of our own: prompts may be too long, or equal but for case
            (videos / f"{number:06d}.mp4").symlink_to(path.resolve())
        done = subprocess.run(
            [python, "-c", RUN, str(videos), str(written), *dimensions], capture_output=True, text=True
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        file = written / f"{NAME}_eval_results.json"
        if done.returncode or not file.is_file():
            raise UserError(f"vbench failed ({_last_line(done.stderr)}): see {log}")
        raw = json.loads(file.read_text())
    values: dict[str, list[float]] = {}
    for name in dimensions:
        if name not in raw:
            raise UserError(f"vbench wrote nothing about {name}: see {log}")
        found = {int(Path(row["video_path"]).stem): float(row["video_results"]) for row in raw[name][1]}
        scale = 100.0 if name == "imaging_quality" else 1.0  # per clip VBench writes 0..100, in the mean 0..1
        values[name] = [found.get(number, math.nan) / scale for number in range(len(paths))]
    return values


def _table(system: str, version: str, about: dict[str, Any]) -> str:
    lines = [f"{system} against vbench {version}, clip by clip:"]
    for name, row in about.items():
        lines.append(
            f"  {METRICS[name].label}: ours {row['ours']:.6g}, vbench {row['vbench']:.6g}, n {row['n']}, largest "
            f"difference {row['largest_difference']:.3g}, {row['differ']} clips beyond {row['tolerance']:g}"
        )
    return "\n".join(lines)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it says nothing"
