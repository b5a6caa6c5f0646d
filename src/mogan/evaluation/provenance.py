"""What a result must say about itself so that it can be repeated."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from mogan.data.lists import printable
from mogan.data.prompts import KNOWN, about
from mogan.evaluation.clips import System
from mogan.evaluation.statistics import RESAMPLES, SEED
from mogan.evaluation.warnings import warnings_about


def how_measured(
    system: System,
    clips: list[dict[str, Any]],
    settings: dict[str, Any],
    out: Path,
    reference: System | None,
) -> dict[str, Any]:
    """Settings, material, versions, failures and warnings of one system, for ``results.json``."""
    good = [clip for clip in clips if "error" not in clip]
    how = {
        **settings,
        "folder": relative(system.folder, out),
        "naming": system.naming,
        "fps": sorted({clip["fps"] for clip in good}, key=lambda fps: fps or 0),
        "resolution": sorted({(clip["height"], clip["width"]) for clip in good}),
        "frames": sorted({clip["frames"] for clip in good}),
        "prompts": about(clip["prompt"] for clip in clips)
        | {"sampled_from": [{"sha256": sha, "set": KNOWN.get(sha)} for sha in system.prompt_lists]},
        "sampling": system.sampling[0] if len(system.sampling) == 1 else list(system.sampling),
        "seeds": sorted({clip["seed"] for clip in clips if clip["seed"] is not None}),
        "reference": {"folder": relative(reference.folder, out), "clips": len(reference.clips)} if reference else None,
        "interval": f"95 % percentile cluster bootstrap over prompts, {RESAMPLES} resamples, seed {SEED}; of distances to the reference "
        f"{RESAMPLES // 4} (speeds) and {RESAMPLES // 20} (appearance), moved to where their median is the distance",
        "device": _all_of(good, "device"),
        "packages": {
            name: importlib.metadata.version(name)
            for name in ("mogan", "torchvision", "transformers", "numpy", "opencv-python-headless", "av")
        }
        | {"torch": _all_of(good, "torch"), "python": platform.python_version()},
        "failed": [
            {"file": printable(entry.path.name), "reason": clip["error"]}
            for entry, clip in zip(system.clips, clips, strict=True)
            if "error" in clip
        ],
        "missing": [printable(name) for name in system.missing],
    }
    return how | {"warnings": warnings_about(system, clips, how)}


def device_name(device: torch.device) -> str:
    """As results have it: the GPU's name, or the kind of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _all_of(clips: list[dict[str, Any]], fact: str) -> str:
    """What measured the clips: values that an earlier call or another machine kept are that one's."""
    return ", ".join(sorted({str(clip[fact]) for clip in clips}))


def relative(path: Path, out: Path) -> str:
    """A path as seen from the folder of ``out``, so that results and clips can move together."""
    return Path(os.path.relpath(os.path.realpath(path), out.resolve().parent)).as_posix()
