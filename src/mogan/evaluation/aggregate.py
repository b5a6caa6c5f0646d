"""VBench's aggregate scores (``scripts/cal_final_score.py``, ``scripts/constant.py``, Vchitect/VBench 45e79ec)."""

from collections.abc import Mapping
from dataclasses import dataclass

from mogan.errors import UserError

# dimension: (lowest, highest, weight)
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}


@dataclass(frozen=True)
class Totals:
    """VBench's three scores. ``total`` weighs quality to semantic 4 : 1; a plain mean is another number."""

    quality: float
    semantic: float
    total: float


def vbench_totals(raw: Mapping[str, float], *, fill_missing: bool = False) -> Totals:
    """Quality, semantic and total from raw scores, each normalised by its range and not clipped.

    Args:
        raw: score per dimension; imaging quality in 0..1.
        fill_missing: count a missing dimension as raw 0, as the reference does. That is not a score of the model: two
            motion dimensions alone give -0.10. Only for comparison with the reference's own output.

    Raises:
        UserError: a dimension is missing.
    """
    missing = [name for name in (*QUALITY, *SEMANTIC) if name not in raw]
    if missing and not fill_missing:
        raise UserError(
            f"VBench's totals need all 16 dimensions: measure {', '.join(missing)} too, or quote the others one by one"
        )

    def weighted(table: Mapping[str, tuple[float, float, float]]) -> float:
        parts = ((raw.get(name, 0.0) - low) / (high - low) * weight for name, (low, high, weight) in table.items())
        return sum(parts) / sum(weight for _, _, weight in table.values())

    quality, semantic = weighted(QUALITY), weighted(SEMANTIC)
    return Totals(quality, semantic, (4 * quality + semantic) / 5)
