"""Stock schedulers that visit a few-step student's levels."""

from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from mogan.config import EULER, LCM
from mogan.errors import UserError
from mogan.schedule import shifted_levels

TOLERANCE = 1e-4  # largest error of a level, in sigma
SCHEDULERS = {LCM: FlowMatchLCMScheduler, EULER: FlowMatchEulerDiscreteScheduler}  # of a student's steps


def scheduler_for(sigmas: tuple[float, ...], solver: str = LCM) -> FlowMatchEulerDiscreteScheduler:
    """A stock scheduler of the solver whose ``set_timesteps(len(sigmas))`` visits exactly these levels.

    ``WanPipeline`` takes no levels of its own, and the scheduler's default grid ends at sigma 0.024. Its two parameters,
    ``shift`` and ``shift_terminal``, reach every level list that is a Moebius function of the step: one or two levels,
    three (1, a, b) with ``1 - a`` at least 0.058 of ``1 - b``, and every shifted uniform grid. ``shift`` is found by
    bisection on the second level.

    Raises:
        UserError: the list cannot be reached; a stock pipeline would sample at other levels.
    """

    def build(shift: float) -> FlowMatchEulerDiscreteScheduler:
        terminal = sigmas[-1] if len(sigmas) > 1 else None
        return SCHEDULERS[solver](shift=shift, shift_terminal=terminal)

    def levels(shift: float) -> list[float]:
        scheduler = build(shift)
        scheduler.set_timesteps(len(sigmas))
        return scheduler.sigmas[:-1].tolist()

    low, high = 1e-4, 1 + 1000**0.5  # from there on the second level falls again: the scheduler shifts its end too
    if len(sigmas) > 2:
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if levels(middle)[1] < sigmas[1] else (low, middle)
    shift = (low * high) ** 0.5 if len(sigmas) > 2 else 1.0
    error = max(abs(a - b) for a, b in zip(levels(shift), sigmas, strict=True))
    if error > TOLERANCE:
        raise UserError(
            f"no stock scheduler visits the levels {list(sigmas)} (closest: {[round(x, 4) for x in levels(shift)]}); "
            "distil at a shifted uniform grid, or at three levels with no tiny first step, to export to diffusers"
        )
    return build(shift)


def flow_map_scheduler(sigmas: tuple[float, ...]) -> FlowMapEulerDiscreteScheduler:
    """The scheduler of ``AnyFlowPipeline`` that visits these levels, and with fewer steps every so-maniest of them.

    Raises:
        UserError: they are no shifted uniform grid, which is all that it has.
    """
    k = grid_shift(sigmas)
    if k is None:
        raise UserError(f"AnyFlowPipeline samples at shifted uniform grids, and {list(sigmas)} is none: distil at one")
    return FlowMapEulerDiscreteScheduler(shift=k)


def grid_shift(sigmas: tuple[float, ...]) -> float | None:
    """The shift of the uniform grid that these levels are; ``None``: they are none."""
    even = 1 - 1 / len(sigmas)  # the second level before the shift
    k = round(sigmas[1] * (1 - even) / (even * (1 - sigmas[1])), 6) if len(sigmas) > 1 else 1.0
    close = max(abs(a - b) for a, b in zip(shifted_levels(len(sigmas), k), sigmas, strict=True)) <= TOLERANCE
    return k if close else None
