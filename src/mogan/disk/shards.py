"""Many processes at one folder's work: each takes every n-th item."""

from collections.abc import Sequence
from typing import TypeVar

from mogan.errors import UserError

Item = TypeVar("Item")


def share_of(items: Sequence[Item], shard: str | None) -> list[Item]:
    """Items of the shard ``i/n``: every ``n``-th from the ``i``-th on, from 0; all of them without one.

    Raises:
        UserError: the shard is not one of ``0/n`` to ``n-1/n``.
    """
    if shard is None:
        return list(items)
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard takes i/n with 0 <= i < n, such as 0/8 to 7/8, not {shard}")
    return list(items)[int(number) :: int(count)]
