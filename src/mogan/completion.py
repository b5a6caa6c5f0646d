"""Completion of commands, options and their values: a script that bash, zsh or fish reads. Printed once, it needs no Python."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any, Literal, get_args, get_origin

from mogan.errors import UserError, closest

SHELLS = ("bash", "zsh", "fish")

BASH = """# Completion of mogan. Print it again after an update of mogan.
_mogan() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} place=$COMP_CWORD
    local words= options= first=
    case "$command" in
        %groups%) if [ "$COMP_CWORD" -gt 2 ]; then command="$command ${COMP_WORDS[2]}"; place=$((COMP_CWORD - 1)); fi ;;
    esac
    case "$COMP_CWORD $command $before" in
%words%
    esac
    if [ -z "$words" ]; then
        case "$command" in
%options%
        esac
        case "$word" in
            -*) words=$options ;;
            *) if [ "$place" -eq 2 ]; then words=$first; fi ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
"""
ZSH = "autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\nbashcompinit\n"
LAST = "complete -o default -F _mogan mogan\n"  # files where no word fits
FISH = """# Completion of mogan. Print it again after an update of mogan.
function __mogan_words
    set -l words (commandline -opc)
    set -e words[1]
    echo "$words"
end
function __mogan_at --description 'the line begins with these words'
    string match -q -- "$argv *" (__mogan_words)" "
end
function __mogan_next --description 'the line is these words and the one being written'
    test "$argv" = (__mogan_words)
end
"""


def options_of(command: Callable[..., None]) -> dict[str, tuple[str, ...]]:
    """``--option`` to the values it may take, none where these are free; a switch that is on is turned off by ``--no-``."""
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in signature(command).parameters.items():
        about = getattr(parameter.annotation, "__metadata__", ())
        if _is_first(parameter.annotation):
            continue
        renamed = [m.name for m in about if getattr(m, "name", None)]
        option = (renamed or [name.replace("_", "-")])[0]
        found[f"--{'no-' * (parameter.default is True)}{option}"] = values_of(parameter.annotation)
    return found


def values_of(annotation: Any) -> tuple[str, ...]:
    """The words that an argument may be; empty where it may be anything."""
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return tuple(value for part in get_args(annotation) for value in values_of(part))


def _is_first(annotation: Any) -> bool:
    """Whether an argument is given by its place."""
    return any(str(mark) == "Positional" for mark in getattr(annotation, "__metadata__", ()))


def _first_words(command: Callable[..., None]) -> tuple[str, ...]:
    """The words that may stand right after a command."""
    from mogan.recipes import RECIPES  # seconds, which no other command should pay

    for name, parameter in signature(command).parameters.items():
        if _is_first(parameter.annotation):
            return tuple(RECIPES) if name == "recipe" else values_of(parameter.annotation)
    return ()


def completion(shell: str, commands: Mapping[str, tuple[str, str]]) -> str:
    """The script of a shell.

    Args:
        shell: one of :data:`SHELLS`.
        commands: names of commands (of one or two words) to ``module:function`` and what they are for. All modules are imported.

    Raises:
        UserError: there is no script for that shell.
    """
    if shell not in SHELLS:
        raise UserError(
            f"no completion for {shell or 'no shell'}{closest(shell, SHELLS) or ': give bash, zsh or fish'}"
        )
    functions = {}
    for name, (place, _) in commands.items():
        module, function = place.split(":")
        functions[name] = getattr(importlib.import_module(module), function)
    if shell == "fish":
        return _fish(functions, {name: text for name, (_, text) in commands.items()})
    return (ZSH if shell == "zsh" else "") + _bash(functions) + LAST


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """First words of commands of two, with the second ones."""
    groups: dict[str, list[str]] = {}
    for group, *rest in (name.split() for name in names):
        if rest:
            groups.setdefault(group, []).extend(rest)
    return groups


def _bash(functions: Mapping[str, Callable[..., None]]) -> str:
    groups = _groups(functions)
    top = dict.fromkeys([*(name.split()[0] for name in functions), "--help", "--version", "--print-completion"])
    words = [
        f"        \"1 \"*) words='{' '.join(top)}' ;;",
        f"        \"2 --print-completion \"*) words='{' '.join(SHELLS)}' ;;",
    ]
    words += [f"        \"2 {group} \"*) words='{' '.join(rest)}' ;;" for group, rest in groups.items()]
    options = []
    for name, function in functions.items():
        known = options_of(function)
        words += [f"        *\" {name} {option}\") words='{' '.join(v)}' ;;" for option, v in known.items() if v]
        first = " ".join(_first_words(function))
        options.append(f"            '{name}') options='{' '.join([*known, '--help'])}' first='{first}' ;;")
    script = BASH.replace("%groups%", "|".join(groups)).replace("%words%", "\n".join(words))
    return script.replace("%options%", "\n".join(options))


def _fish(functions: Mapping[str, Callable[..., None]], texts: Mapping[str, str]) -> str:
    def said(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    groups = _groups(functions)
    lines = [f"complete -c mogan -n __mogan_next -f -a {group}" for group in groups]
    lines += [f"complete -c mogan -n __mogan_next -l {word}" for word in ("help", "version", "print-completion")]
    lines.append(f"complete -c mogan -n '__mogan_next --print-completion' -f -a '{' '.join(SHELLS)}'")
    for name, function in functions.items():
        *group, last = name.split()
        lines.append(f"complete -c mogan -n '{' '.join(['__mogan_next', *group])}' -f -a {last} -d {said(texts[name])}")
        if first := " ".join(_first_words(function)):
            lines.append(f"complete -c mogan -n '__mogan_next {name}' -a '{first}'")
        for option, values in (options_of(function) | {"--help": ()}).items():
            allowed = f" -x -a '{' '.join(values)}'" if values else ""
            lines.append(f"complete -c mogan -n '__mogan_at {name}' -l {option.removeprefix('--')}{allowed}")
    return FISH + "\n".join(lines) + "\n"
