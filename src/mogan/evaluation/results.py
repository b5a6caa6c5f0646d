"""Reading a ``results.json``: all that other commands take from one is checked before they begin."""

import math
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any

from mogan.disk.files import from_json
from mogan.errors import UserError
from mogan.evaluation.measure import VERSION


def read_results(path: Path, clips_have: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Systems by name, each with ``metrics``, ``how`` and ``clips``.

    Args:
        path: a file of ``mogan evaluate`` or ``mogan study``.
        clips_have: entries that every measured clip must have, beside its prompt, number and values.

    Raises:
        UserError: it is none, or of another version, or damaged; and where.
    """
    try:
        systems = from_json(path.read_text(encoding="utf-8"))["systems"]
        wrong = next(_wrong(systems, clips_have), None)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the results.json of mogan evaluate") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise UserError(f"{path} is no results.json of this version ({wrong[:200]}): make it again with mogan evaluate")
    for name, system in systems.items():
        if (made := system.get("how", {}).get("version", VERSION)) != VERSION:
            raise UserError(
                f"{path} holds numbers of version {made}, where this is {VERSION}: make it again with mogan evaluate"
            )
        metrics = {k: v for k, v in system.get("metrics", {}).items() if v["mean"] is not None}
        systems[name] = {"how": {}, "clips": []} | system | {"metrics": metrics}
    return systems


def _wrong(systems: Any, clips_have: tuple[str, ...]) -> Iterator[str]:
    """What is not as ``mogan evaluate`` writes it. An error of Python's says the same of what is not even alike."""
    if not systems:
        yield "it holds no system"
    for name, system in systems.items():
        for metric, found in system.get("metrics", {}).items():
            interval = found.get("ci95") or (0.0, 0.0)
            if not (
                _is_number(found["mean"])
                and len(interval) == 2
                and all(map(_is_number, interval))
                and type(found.get("n")) is int
            ):
                yield f"{metric} of {name}"
        yield from (f"{entry} of {name}" for entry in _wrong_about(system.get("how", {})))
        for clip in system.get("clips", []):
            if "error" in clip:
                continue
            values = clip["values"].values()
            texts, numbers = (
                (clip["prompt"], clip.get("file", "")),
                (clip["index"], clip.get("width", 1), clip.get("fps")),
            )
            if not (all(map(_is_number, [*values, *numbers])) and all(isinstance(text, str) for text in texts)):
                yield f"a clip of {name}"
            yield from (f"a clip of {name} has no {entry}" for entry in clips_have if entry not in clip)


def _wrong_about(how: dict[str, Any]) -> Iterator[str]:
    """Entries of ``how`` that are used by name."""
    wanted = (("flow", "name"), ("prompts", "sha256"))
    yield from (k for k, inside in wanted if k in how and not (inside in how[k] and isinstance(how[k][inside], str)))
    if any(not isinstance(text, str) for text in how.get("warnings", [])):
        yield "warnings"
    if any(not isinstance(f, dict) or not {"file", "reason"} <= f.keys() for f in how.get("failed", [])):
        yield "failed"


def _is_number(value: Any) -> bool:
    """A finite number, or None where nothing could be measured."""
    return value is None or (isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value))
