"""Two transformers in one model (Wan2.2 A14B): an expert for high noise, and one that takes over below a level."""

from pathlib import Path

from mogan.disk.files import read_json
from mogan.errors import UserError

LOW = "transformer_2"  # the expert for low noise, by its stock name


def check_experts(model: Path, index: dict, high: dict | None, low: dict | None) -> None:
    """Two transformers are two of one kind, and the folder says where the one takes over from the other.

    Raises:
        UserError: a transformer or the boundary is missing, or they differ in kind.
    """
    named = index.get(LOW)
    if not isinstance(named, list | None):
        raise UserError(
            f"{model}/model_index.json names {named!r} as {LOW}, where a library and a class should be: get it again"
        )
    if not any(named or ()):  # a stock folder of one transformer says [null, null]
        return
    if high is None or low is None:
        raise UserError(f"{model} says that it holds two transformers, and one of them is not there: get it again")
    ratio = index.get("boundary_ratio")
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(
            f"{model}/model_index.json needs boundary_ratio, the noise level between 0 and 1 from which {LOW} takes over, not "
            f"{ratio!r}: get it again"
        )
    if different := [k for k in high.keys() | low.keys() if not k.startswith("_") and high.get(k) != low.get(k)]:
        raise UserError(f"{model}: its two transformers differ in {min(different)}: they belong to different models")


def boundary_of(model: Path) -> float | None:
    """Of a folder of two transformers the level from which on the first computes; ``None``: it has one for all levels."""
    index = read_json(model / "model_index.json") if (model / "model_index.json").is_file() else {}
    return float(index["boundary_ratio"]) if any(index.get(LOW) or ()) else None


def experts(boundary: float | None, low: float, high: float) -> tuple[str, ...]:
    """The parts of a model that compute at levels from ``low`` to ``high``."""
    if boundary is None or low >= boundary:
        return ("transformer",)
    return (LOW,) if high < boundary else ("transformer", LOW)


def low_noise(model: Path) -> str:
    """The part that computes at low levels."""
    return "transformer" if boundary_of(model) is None else LOW


def stock_boundary(boundary: float, sigmas: tuple[float, ...] | None) -> float:
    """The ``boundary_ratio`` with which a stock pipeline gives every level to the expert that has it here.

    Its timesteps are levels times 1000 in single precision, so one that lies on the boundary may be rounded to below it.
    """
    margin = 1e-3  # far above what is rounded, far below the distance of two levels
    return boundary - margin if any(-1e-6 <= sigma - boundary < margin for sigma in sigmas or ()) else boundary
