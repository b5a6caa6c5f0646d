"""The one exception that means: the user can fix this. And what was perhaps meant."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what the user gave. The message is one sentence that says the fix; the CLI prints it and exits with 2."""


def closest(word: str, names: Iterable[str]) -> str:
    """``: did you mean 'train'?`` to put after "no command 'trian'"; nothing where no name resembles the word."""
    found = get_close_matches(word, list(names), n=1, cutoff=0.7)
    return f": did you mean {found[0]!r}?" if found else ""
