"""What measures: the flow estimator, the interpolator, the networks of look, and what ``results.json`` says of them."""

import hashlib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mogan.devices import choose_device
from mogan.errors import UserError
from mogan.evaluation import cd_fvd
from mogan.evaluation.backbones import Backbone, find_backbones
from mogan.evaluation.clips import System
from mogan.evaluation.frames import DECODER, Clip
from mogan.evaluation.interpolators import AMT_LICENCE, amt_s, amt_weights, blend, flow_warp
from mogan.evaluation.measure import VERSION
from mogan.evaluation.motion import Interpolator
from mogan.evaluation.pairs import EachPairOnce
from mogan.models.defaults import WITHOUT_WEIGHTS, usual_flow
from mogan.motion import estimators
from mogan.motion.flow import FlowEstimator, RaftFlow
from mogan.world.captions import parse_caption
from mogan.world.scenes import SIZE

ITERATIONS = 20  # of RAFT, as VBench
VBENCH = "raft_large_C_T_V1"


@dataclass(frozen=True)
class Tools:
    """Everything that measures a clip. ``looks`` is by metric; ``video`` makes CD-FVD's features."""

    flow: FlowEstimator
    interpolate: Interpolator
    how: dict[str, Any]
    quick: bool = False
    lab: bool = True
    looks: Mapping[str, Backbone] = field(default_factory=dict)
    video: cd_fvd.VideoFeatures | None = None


def gather_tools(
    flow: str, interpolator: str, networks: Path | None, device: str, *, quick: bool, lab: bool, video: bool
) -> Tools:
    """Load what the names and paths of :func:`mogan.evaluation.evaluate.evaluate` mean; ``video``: CD-FVD is wanted."""
    where = choose_device(device)
    found, about = estimator(flow, where)
    estimate = EachPairOnce(found)
    interpolate, called = _interpolator(interpolator, estimate, where)
    how = {"version": VERSION, "flow": about, "interpolator": called, "decoder": DECODER, "quick": quick}
    if networks is None:
        return Tools(estimate, interpolate, how, quick, lab)
    file = next((networks / name for name in cd_fvd.FILES if (networks / name).exists()), None)
    looks, lacking = find_backbones(networks, others=file is not None)
    for sentence in lacking:
        print(sentence, file=sys.stderr)
    modules: dict[str, torch.nn.Module] = {**looks}
    if file is not None and video:
        modules["cd_fvd"] = cd_fvd.videomae(file)
    how["networks"] = {name: hash_weights(module.to(where)) for name, module in modules.items()}
    return Tools(estimate, interpolate, how, quick, lab, looks, modules.get("cd_fvd"))


def choose_flow(given: str | None, systems: Sequence[System]) -> tuple[str, str]:
    """What estimates flow, and in a sentence what that choice means for the numbers; "" where there is nothing to say.

    The lab's network was trained on nothing but the lab's world: it measures clips of that size with its captions. For
    others it is VBench's network, if its weights are here.
    """
    strangers = [system.name for system in systems if not _of_the_lab(system)]
    name = given or (usual_flow(VBENCH) if strangers else "lab")
    if name == "lab" and strangers:
        return name, (
            f"{', '.join(strangers)}: not the lab's {SIZE} x {SIZE} clips of its world, all that the lab's flow network "
            "knows, so the numbers mean little and take long: leave --flow out, or name another"
        )
    if given is None and name == WITHOUT_WEIGHTS:
        return name, (
            f"optical flow is classical ({name}) as {VBENCH} is not here, so dynamic degree is not VBench's number: run "
            f"`mogan weights fetch {VBENCH}` and then this command again"
        )
    return name, ""


def _of_the_lab(system: System) -> bool:
    """Whether a folder's first clip that opens has the lab's size, and some caption is the lab's."""
    return _first_size(system) in (None, (SIZE, SIZE)) and any(parse_caption(clip.prompt) for clip in system.clips)


def _first_size(system: System) -> tuple[int, int] | None:
    for entry in system.clips:
        try:
            if entry.problem is None:
                height, width = next(iter(Clip(entry.path))).shape[:2]
                return height, width
        except UserError:
            continue
    return None


def estimator(name: str, device: torch.device) -> tuple[FlowEstimator, dict[str, Any]]:
    """A flow estimator by name, and what to write down about it."""
    found = estimators.load_flow(name, None if name == "lab" else ITERATIONS, device)
    how: dict[str, Any] = {"name": name}
    if name in estimators.CLASSICAL:
        how["version"] = f"OpenCV {importlib.metadata.version('opencv-python-headless')}"
    if isinstance(found, RaftFlow):
        how["iterations"] = found.iterations
        how["weights_sha256"] = hash_weights(found)
    return found, how


def hash_weights(module: torch.nn.Module) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _interpolator(name: str, flow: FlowEstimator, device: torch.device) -> tuple[Interpolator, str]:
    makers: dict[str, Callable[[], Interpolator]] = {"flow-warp": lambda: flow_warp(flow), "blend": lambda: blend}
    if name in makers:
        return makers[name](), name
    if not Path(name).is_dir():
        raise UserError(f"interpolator must be {' or '.join(makers)} or a checkout of AMT, not {name!r}")
    interpolate = amt_s(Path(name), device)
    print(AMT_LICENCE, file=sys.stderr)
    digest = hashlib.sha256(amt_weights(Path(name)).read_bytes()).hexdigest()
    return interpolate, f"AMT-S, weights sha256 {digest} ({AMT_LICENCE})"
