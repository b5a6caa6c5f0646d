"""What a table is expected to show, held against what it does."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """What a table is expected to show, and whether it does."""

    says: str
    found: str
    holds: bool


def bars(systems: dict[str, Any]) -> list[Bar]:
    """The expectations about teacher, DMD, MoGAN and its parts, held against the means (and intervals where that is said)."""
    if not {"teacher", "dmd", "mogan"} <= set(systems):
        return []
    return _motion_bars(systems) + _price_bars(systems) + _part_bars(systems)


def _motion_bars(systems: dict[str, Any]) -> list[Bar]:
    """Distillation takes motion away, MoGAN brings it back."""
    degree, net = (
        {name: _mean(systems[name], metric) for name in ("teacher", "dmd", "mogan")}
        for metric in ("dynamic_degree", "lab_net")
    )
    ends = {name: _ends(systems[name], "dynamic_degree") for name in ("teacher", "dmd", "mogan")}
    lost, gained = degree["teacher"] - degree["dmd"], degree["mogan"] - degree["dmd"]
    net_lost, net_gained = net["teacher"] - net["dmd"], net["mogan"] - net["dmd"]
    return [
        Bar("DMD's dynamic degree is at least 0.10 below the teacher's", f"{lost:+.3f}", lost >= 0.10),
        Bar(
            "the intervals of dynamic degree of teacher and DMD do not overlap",
            f"{ends['dmd'][1]:.3f} < {ends['teacher'][0]:.3f}",
            ends["dmd"][1] < ends["teacher"][0],
        ),
        Bar("MoGAN's dynamic degree is at least 0.15 above DMD's", f"{gained:+.3f}", gained >= 0.15),
        Bar(
            "the intervals of dynamic degree of DMD and MoGAN do not overlap",
            f"{ends['dmd'][1]:.3f} < {ends['mogan'][0]:.3f}",
            ends["dmd"][1] < ends["mogan"][0],
        ),
        Bar(
            "MoGAN's dynamic degree is not below the teacher's",
            f"{degree['mogan'] - degree['teacher']:+.3f}",
            degree["mogan"] >= degree["teacher"],
        ),
        Bar("true net displacement: DMD at least 0.05 below the teacher", f"{net_lost:+.3f}", net_lost >= 0.05),
        Bar("true net displacement: MoGAN at least 0.075 above DMD", f"{net_gained:+.3f}", net_gained >= 0.075),
    ]


def _price_bars(systems: dict[str, Any]) -> list[Bar]:
    """What the motion must not cost."""
    teacher, dmd, mogan = systems["teacher"], systems["dmd"], systems["mogan"]
    found = []
    for metric, label in (("lab_wobble", "wobble"), ("lab_pulsing", "pulsing of area")):
        gap = _mean(mogan, metric) - _mean(teacher, metric)
        found.append(Bar(f"MoGAN's {label} is not above the teacher's", f"{gap:+.3f}", gap <= 0))
    smooth = _mean(mogan, "motion_smoothness") - _mean(teacher, "motion_smoothness")
    look = _mean(mogan, "appearance_distance") / _mean(dmd, "appearance_distance")
    speed = _mean(mogan, "speed_to_rich") / _mean(dmd, "speed_to_rich")
    return [
        *found,
        Bar("MoGAN's smoothness is within 0.005 of the teacher's or better", f"{smooth:+.4f}", smooth >= -5e-3),
        Bar("MoGAN's appearance distance is at most 1.15 times DMD's", f"{look:.2f}", look <= 1.15),
        Bar(
            "MoGAN at least halves the speed histogram's distance to the motion-rich set", f"{speed:.2f}", speed <= 0.5
        ),
    ]


def _part_bars(systems: dict[str, Any]) -> list[Bar]:
    """What each part is there for: its own column, where there is one, against MoGAN's."""
    dmd, mogan, found = systems["dmd"], systems["mogan"], []
    if "no_dmd" in systems:
        look = _mean(systems["no_dmd"], "appearance_distance") / _mean(mogan, "appearance_distance")
        found.append(Bar("without DMD the appearance distance at least doubles", f"{look:.2f}", look >= 2))
    if "latent_gan" in systems:
        share = _share_of_gain(systems["latent_gan"], dmd, mogan, "lab_net")
        found.append(Bar("the latent GAN brings back less than half of the motion", f"{share:.2f}", share < 0.5))
    if "no_r1r2" in systems:
        for name, label in (("final_gap", "gap of logits"), ("largest_motion_gradient", "largest motion gradient")):
            times = _over_seeds(systems["no_r1r2"], name) / _over_seeds(mogan, name)
            found.append(
                Bar(f"without R1 and R2 the {label} is at least 1.5 times as large", f"{times:.2f}", times >= 1.5)
            )
    if "surrogate" in systems:
        share = _share_of_gain(systems["surrogate"], dmd, mogan, "dynamic_degree")
        look = _mean(systems["surrogate"], "appearance_distance") / _mean(mogan, "appearance_distance")
        says = "the surrogate brings at least 90 % of MoGAN's gain in dynamic degree"
        found.append(Bar(says, f"{share:.2f}", share >= 0.9))
        found.append(Bar("its appearance distance is at most 1.05 times MoGAN's", f"{look:.2f}", look <= 1.05))
    return found


def _share_of_gain(system: dict[str, Any], dmd: dict[str, Any], mogan: dict[str, Any], metric: str) -> float:
    gain = _mean(mogan, metric) - _mean(dmd, metric)
    return (_mean(system, metric) - _mean(dmd, metric)) / gain if gain else math.nan


def _mean(system: dict[str, Any], metric: str) -> float:
    found = system["metrics"].get(metric)
    return math.nan if found is None else found["mean"]


def _ends(system: dict[str, Any], metric: str) -> tuple[float, float]:
    low, high = (system["metrics"].get(metric) or {}).get("ci95") or (math.nan, math.nan)
    return low, high


def _over_seeds(system: dict[str, Any], name: str) -> float:
    found = system.get(name) or {}
    return sum(found.values()) / len(found) if found else math.nan
