"""Ranges of the numbers that users give: every command's numeric options go through one of these, first thing.

Options are given by name, as they are in the command's signature; ``None`` is an option that was not given.
"""

import math

from mogan.errors import UserError

SEEDS = 2**32 - 1  # the largest seed: larger ones would be cut, and two seeds be the same run


def at_least(least: float, **options: float | None) -> None:
    """Refuse what is below ``least``, or not finite."""
    _check(options, lambda value: value >= least, f"of at least {least:g}")


def above(limit: float, **options: float | None) -> None:
    """Refuse what is not above ``limit``, or not finite."""
    _check(options, lambda value: value > limit, f"above {limit:g}")


def between(least: float, most: float, **options: float | None) -> None:
    """Refuse what is below ``least`` or above ``most``."""
    _check(options, lambda value: least <= value <= most, f"from {least:g} to {most}")  # every digit: seeds have many


def is_seed(**options: int | None) -> None:
    """Refuse what is no seed."""
    between(0, SEEDS, **options)


def _check(options, holds, words: str) -> None:
    for name, value in options.items():
        if value is None:
            continue
        finite = isinstance(value, int) or math.isfinite(value)  # an int may be larger than any float
        if not finite or not holds(value):
            raise UserError(
                f"--{name.replace('_', '-')} takes a number {words}{'' if finite else ', and finite'}, not {value}"
            )
