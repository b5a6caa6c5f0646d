"""A command's function as its ``--help`` shows it: options by what they take, and nothing about values nobody gave."""

import re
from collections.abc import Callable
from inspect import cleandoc, signature
from pathlib import Path
from types import FunctionType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

TAKES = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
SWITCHES = (tyro.conf.FlagCreatePairsOff,)  # one that is off is only turned on, one that is on only off


def shown(command: Callable[..., None]) -> Callable[..., None]:
    """The same function for ``tyro.cli``. Its help says ``--lr FLOAT`` where tyro's own says ``--lr {None}|FLOAT ... (default:
    None)``, and fills lines that the source breaks.
    """
    if not isinstance(command, FunctionType):
        return command
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in signature(command).parameters.items():
        none_given = parameter.default is parameter.empty and "tuple" in str(hints[name])  # may be none at all
        if none_given or any(parameter.default is unsaid for unsaid in (None, False, True, ())):
            hints[name] = Annotated[hints[name], tyro.conf.arg(metavar=_takes(hints[name]), help_behavior_hint="")]
    same = FunctionType(
        command.__code__, command.__globals__, command.__name__, command.__defaults__, command.__closure__
    )
    same.__kwdefaults__, same.__annotations__, same.__module__ = command.__kwdefaults__, hints, command.__module__
    same.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", cleandoc(command.__doc__ or ""))
    return same


def _takes(kind: Any) -> str | None:
    """What an option takes that may be left out, as help writes it; None where tyro knows better."""
    kinds = [k for k in get_args(kind) if k is not NoneType]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return "{" + ",".join(map(str, get_args(kinds[0]))) + "}"
    if len(kinds) == 1 and get_origin(kinds[0]) is tuple and Ellipsis not in get_args(kinds[0]):
        return " ".join(TAKES[each] for each in get_args(kinds[0]))
    return TAKES.get(kinds[0]) if len(kinds) == 1 else None
