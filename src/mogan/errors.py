"""The one exception that means: the user can fix this. What was perhaps meant, and what a machine is too small for."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what the user gave. The message is one sentence that says the fix; the CLI prints it and exits with 2."""


def goes_with(other: str, there: bool, **options: bool) -> None:
    """Refuse options that were given and say nothing where another one was not: whoever gives them expects something."""
    for name, given in options.items():
        if given and not there:
            raise UserError(f"--{name.replace('_', '-')} says nothing without {other}: give that, too, or leave it out")


ONEDNN = ("could not create a primitive\n", "could not create a memory")  # all it says where a buffer cannot be had


def too_little_memory(error: Exception) -> str | None:
    """A sentence if the machine or its GPU had no memory left for what was asked of it; None for any other error."""
    text = f"{error}\n"
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)  # torch's and Python's own
    if not named and not any(
        word in text for word in ("can't allocate memory", "out of memory", "ALLOC_FAILED", *ONEDNN)
    ):
        return None
    first = re.split(r"[.\n](?!\d)", text.partition("alloc_cpu")[2].partition(": ")[2] or text)[0][:120]
    return (
        f"there is not enough memory{f' ({first})' if first else ''}: take fewer or smaller clips at a time, or a machine with "
        "more; `mogan estimate` says what a recipe takes"
    )


def closest(word: str, names: Iterable[str]) -> str:
    """``: did you mean 'train'?`` to put after "no command 'trian'"; nothing where no name resembles the word, begins with it or begins it."""
    names = list(names)
    found = get_close_matches(word, names, n=1, cutoff=0.85)  # but for a letter or two
    if not found and len(word) >= 3:
        begun = [name for name in names if len(name) >= 3 and word.lower().startswith(name.lower())]
        found = sorted((name for name in names if name.startswith(word)), key=len) or sorted(
            begun, key=len, reverse=True
        )
    found = found or get_close_matches(word, names, n=1, cutoff=0.7)
    return f": did you mean {found[0]!r}?" if found else ""
