"""Functions that users wrote, by name; and their errors, told as theirs."""

import hashlib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mogan.errors import UserError, closest, too_little_memory


def own_function(name: str, kind: str, promise: str) -> Callable[..., Any]:
    """The function ``module:function`` that a user wrote; modules are found here and on ``PYTHONPATH``.

    Args:
        name: of it.
        kind: what it is to the user, a word for messages.
        promise: what it does, in words that go on after "that".

    Raises:
        UserError: it is not there, or its module fails.
    """
    module, _, function = name.rpartition(":")
    if module.endswith(".py") or "/" in module:
        dotted = module.removesuffix(".py").strip("./").replace("/", ".")
        raise UserError(f"a {kind} is named by its module, not by its file: did you mean {dotted}:{function}?")
    if os.getcwd() not in sys.path:  # the `mogan` script has its own folder there
        sys.path.append(os.getcwd())  # at the end nothing is hidden
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # one that theirs imports
            raise UserError(f"{module} cannot be imported\n{in_their_words(error)}") from error
        raise UserError(f"no module {module!r} in this folder or on PYTHONPATH, for {module}:{function}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{module} cannot be imported\n{in_their_words(error)}") from error
    own = getattr(found, function, None)
    if not callable(own):
        others = [
            n for n, value in vars(found).items() if callable(value) and getattr(value, "__module__", "") == module
        ]
        where = getattr(found, "__file__", None) or module
        raise UserError(f"{where} has no function {function!r}{closest(function, others) or ' that ' + promise}")
    return own


def own_code(name: str) -> str:
    """Fingerprint of the file that an imported ``module:function`` stands in; empty for a module without one."""
    path = Path(getattr(sys.modules.get(name.rpartition(":")[0]), "__file__", None) or "")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


@contextmanager
def theirs(name: str) -> Iterator[None]:
    """While a user's function runs: its errors are told as its own, but for memory that does not suffice.

    Raises:
        UserError: it failed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or too_little_memory(error):
            raise
        raise UserError(f"{name} failed\n{in_their_words(error)}") from error


def in_their_words(error: BaseException) -> str:
    """The traceback of an error as far as it passed through the user's own files."""
    told = traceback.TracebackException.from_exception(error)
    installed = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    others = (*installed, str(Path(__file__).parent), "<")
    theirs = [frame for frame in told.stack if not frame.filename.startswith(others)]
    told.stack = traceback.StackSummary.from_list(theirs)
    return "".join(told.format(chain=False)).removeprefix("Traceback (most recent call last):\n").rstrip()
