"""Many processes at one folder's work: each takes every n-th item."""

import re
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
    number, count = numbers_of(shard)
    return list(items)[number::count]


def numbers_of(shard: str) -> tuple[int, int]:
    """``i`` and ``n`` of the shard ``i/n``.

    Raises:
        UserError: as :func:`share_of`.
    """
    if not (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)) or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard takes i/n with 0 <= i < n, such as 0/8 to 7/8, not {shard[:40]}")
    return int(found[1]), int(found[2])
