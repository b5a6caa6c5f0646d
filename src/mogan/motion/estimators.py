"""Flow estimators by name: RAFT's weights, the lab's network, and those that need no weights."""

import hashlib

import torch

from mogan.errors import UserError
from mogan.models.wan import fingerprint, lab_folder
from mogan.models.weights import find_weights
from mogan.motion import classical_flow
from mogan.motion.flow import FlowEstimator, RaftFlow, load_raft

CLASSICAL = ("farneback", "dis")


def load_flow(name: str, iterations: int | None = None, device: str | torch.device = "cpu") -> FlowEstimator:
    """A flow estimator by name: ``lab``, ``farneback`` or ``dis`` (classical, no weights), a name that ``mogan weights list``
    shows, or the path of RAFT weights.

    ``iterations`` are its refinements: 12, and 4 of the lab's, which is no more accurate with 12. The estimator maps a video
    ``(B, 3, F, H, W)`` in [-1, 1] to flow ``(B, 2, F - 1, H, W)`` in pixels per frame.

    Raises:
        UserError: there are no such weights.
    """
    if name in CLASSICAL:
        return getattr(classical_flow, name)
    raft = load_raft(lab_folder() / "raft" if name == "lab" else find_weights(name))
    return RaftFlow(raft, iterations or (4 if name == "lab" else 12)).to(device)


def flow_fingerprint(name: str) -> str:
    """What stands for a flow estimator in a cache: its name if it has no weights, else a hash of them.

    Raises:
        UserError: there are no such weights.
    """
    if name in CLASSICAL:
        return name
    path = (lab_folder() / "raft" if name == "lab" else find_weights(name)).resolve()
    if not path.exists():
        raise UserError(f"no flow network at {path}: --flow takes lab, farneback, dis, or the path of RAFT weights")
    if path.is_dir():
        return fingerprint(path.parent, path.name)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
