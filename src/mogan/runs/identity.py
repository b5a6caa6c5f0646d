"""What a run is made of - base model, student, data - told by contents and not by place, so that it never goes on as another.

A fingerprint reads every file of up to 64 MiB whole, and of a larger one 4 KiB of every 4 MiB and its end: every matrix of
a full-size transformer is touched, in seconds where reading all of it takes minutes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mogan.config import EULER, LCM
from mogan.data.cache import Cache, open_cache
from mogan.disk.files import openable, read_json, write_atomically
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.causal_cache import Causal, Policy
from mogan.models.defaults import is_levels
from mogan.models.experts import LOW
from mogan.models.states import FILE as STATES
from mogan.runs.checkpoint import SAVE_WITHIN, checkpoints, settings
from mogan.runs.watch import read_records

COPY = "put back a copy of it"  # what helps where a file of a run is damaged
WHOLE = 64 << 20  # a file up to this size is read whole
STRIDE, BLOCK = 4 << 20, 4 << 10  # of a larger one every so many bytes so many are read
WEIGHTS = (".json", ".safetensors", ".bin", ".model")
TEACHER = ("transformer", "transformer_2")  # what makes the paths of a teacher
BATCHES = (
    "contents",
    "controls",
    "references",
    "vae",
    "text_encoder",
    "tokenizer",
    "fps",
    "height",
    "width",
    "frames",
    *("teacher", "solver", "steps", "guidance", "shift", "negative_prompt", "levels"),
)  # facts batches depend on
WHAT = {
    "model": "base model",
    "student": "student to start from",
    "adapters": "run whose adapters it starts with",
    "data": "data",
    "prompts": "prompts",
}
OWN = {
    "config.json", "run.json", "metrics.jsonl", "tensorboard", "samples", "checkpoints", "warnings.log", "held_out.json",
}  # fmt: skip
LOGS = (".log", ".out", ".err", ".txt")  # what a user's shell may write beside them


def of_file(path: Path) -> str:
    """Sixteen hex digits of a file's contents, by sampling if it is large."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        if size <= WHOLE:
            digest.update(file.read(size))
        else:
            for place in (*range(0, size, STRIDE), size - BLOCK):
                file.seek(place)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def of_model(folder: Path, parts: Iterable[str] = ("transformer", "vae", "text_encoder", "tokenizer")) -> str:
    """Of the parts of a diffusers folder that are there, and of the clips it was made for; always of its second expert."""
    found: dict[str, Any] = {"geometry": vars(wan.geometry(folder))}
    for part in [*parts, *([LOW] if (folder / LOW).is_dir() else [])]:
        files = sorted((folder / part).iterdir()) if (folder / part).is_dir() else []
        found[part] = {path.name: of_file(path) for path in files if path.suffix in WEIGHTS}
    return _short(found)


def of_student(folder: Path) -> str:
    """Of what a student starts with: its transformer, its fake score and the rows of its states, if it has them."""
    found, states = of_model(folder, ("transformer", "fake_score")), folder / STATES
    return f"{found}-{of_file(states)}" if states.is_file() else found


def of_cache(cache: Cache) -> str:
    """Of what batches depend on: how the cache was made, and its clips with their captions, in order."""
    facts = {key: cache.facts[key] for key in BATCHES if key in cache.facts}
    rows = [[entry["id"], entry["caption"], *filter(None, [entry.get("control")])] for entry in cache.entries]
    states = [[entry.get("state"), entry.get("state_from", 0)] for entry in cache.entries]
    return _short([facts, rows]) + (f"-{_short(states)}" if any(state for state, _ in states) else "")


def _agree(known: str, found: str) -> bool:
    """Whether two fingerprints are of the same; those of older runs do not know of states."""
    return known in (found, found.partition("-")[0])


def of_run(run: Path) -> str:
    """Of a run whose adapters another starts with: by its settings, since it may train on meanwhile."""
    return _short(settings(read_config(run)))


def made_of(folder: Path, start: Path, adapters_of: Path | None, cache: Cache, prompts: Cache | None = None) -> dict:
    """What ``run.json`` says of a run: where its base model, its student's start, its data and its prompts lie, and
    their ``fingerprints``.
    """
    found = {
        "model": (folder, of_model(folder)),
        "student": (start, of_student(start)),
        "data": (cache.path, of_cache(cache)),
    }
    if adapters_of is not None:
        found["adapters"] = (adapters_of, of_run(adapters_of))
    if prompts is not None:
        found["prompts"] = (prompts.path, of_cache(prompts))
    places = {name: str(place) for name, (place, _) in found.items()}
    return places | {"fingerprints": {name: fingerprint for name, (_, fingerprint) in found.items()}}


def refuse_other_folders(run: Path) -> None:
    """Refuse to train into a folder that holds something else than a run."""
    openable(run)
    if not run.is_dir() or any((run / name).is_file() for name in ("config.json", "run.json")):
        return
    others = sorted(p.name for p in run.iterdir() if p.name not in OWN and p.name[0] != "." and p.suffix not in LOGS)
    if others:
        raise UserError(
            f"{run} holds other things than a run ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): give "
            "an empty or a new folder as --out"
        )


def _short(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def read_facts(run: Path) -> dict[str, Any]:
    """``run.json``: where base model, student and data lie, and their ``fingerprints``; empty if there is none.

    Raises:
        UserError: it is no JSON, or does not say that.
    """
    path = run / "run.json"
    if not path.is_file():
        return {}
    facts = read_json(path, COPY)
    known = facts.get("fingerprints", {})
    said = isinstance(known, dict) and all(isinstance(facts.get(name), str) for name in {"model", "student", *known})
    if not said:
        raise UserError(f"{path} does not say what the run was begun with: {COPY}")
    return facts


def read_config(run: Path) -> dict[str, Any]:
    """``config.json``: the recipe of a run as it was trained.

    Raises:
        UserError: it is not there, or says no recipe.
    """
    config = read_json(run / "config.json", COPY)
    for name, good in _ENTRIES.items():
        if not good(config.get(name)):
            why = f"{name} is {config[name]!r}"[:80] if name in config else f"no {name}"
            raise UserError(f"{run / 'config.json'} is damaged ({why}): put back a copy, every checkpoint has one")
    return config


def begins_again(run: Path) -> int:
    """How many iterations a run without checkpoints has noted: it was ended before the first one was written.

    Raises:
        UserError: it must have written one, so something took them away.
    """
    if not (run / "metrics.jsonl").is_file():
        return 0
    records = read_records(run / "metrics.jsonl")
    noted = 1 + max((record["iteration"] for record in records), default=-1)
    every = read_config(run).get("save_every") if (run / "config.json").is_file() else None
    before = sum(record.get("seconds", 0.0) for record in records if record["iteration"] < noted - 1)
    if (isinstance(every, int) and noted > every) or before > SAVE_WITHIN:
        raise UserError(
            f"{run} notes {noted} iterations and its checkpoints are gone: copy them there, remove metrics.jsonl to begin again, or "
            "give another --out"
        )
    return noted


def _is_plan(value: Any) -> bool:
    told = ("learns", "by", "batch")
    return isinstance(value, list) and all(isinstance(u, dict) and all(name in u for name in told) for u in value)


def _is_rollout(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("counts"), list | None):
        return False
    try:
        return value.get("causal") is None or bool(causal_of_config(value["causal"]))
    except (TypeError, ValueError, KeyError, AttributeError):
        return False


_ENTRIES: dict[str, Callable[[Any], bool]] = {  # what is read of it outside of training
    "recipe": lambda value: isinstance(value, str),
    "sigmas": lambda value: value is not None and is_levels(value),
    "plan": _is_plan,
    "seed": lambda value: type(value) is int,
    "lora": lambda value: value is None or (type(value) is int and value > 0),
    "rollout": _is_rollout,
    "states": lambda value: isinstance(value, dict | None),
    "boundary": lambda value: value is None or type(value) is float,
    "solver": lambda value: value in (None, LCM, EULER),
    "objectives": lambda value: (
        value is None or (isinstance(value, dict) and all(isinstance(o, dict) for o in value.values()))
    ),
}


def causal_of_config(kept: dict[str, Any] | None) -> Causal | None:
    """What a run's config keeps of a causal rollout."""
    if kept is None:
        return None
    lists = {k: None if kept.get(k) is None else tuple(kept[k]) for k in ("first_sigmas", "sizes")}
    return Causal(**kept | {"policy": Policy(**kept["policy"])} | lists)


def check_same_parts(run: Path, now: dict[str, Any]) -> None:
    """Refuse to go on with a run on another model, student or data than it began with.

    A folder that has moved is the same if its contents are; a run that is older than fingerprints is held to what lies
    where its own parts lay, if that is still there.

    Args:
        run: its folder.
        now: places and ``fingerprints`` of what it should go on with, as ``run.json`` has them.

    Raises:
        UserError: something differs; the message says what, from where to where.
    """
    then = read_facts(run)
    if not then and checkpoints(run):
        raise UserError(
            f"{run} has checkpoints, but its run.json, which says what it was begun with, is gone: put back a copy, or give "
            "another --out"
        )
    for name, fingerprint in now["fingerprints"].items() if then else ():
        old = then.get("fingerprints", {}).get(name) or _of_place(name, then)
        if old is not None and not _agree(old, fingerprint):
            places = f"{then.get(name)} then, {now.get(name)} now"
            same = " whose contents have changed since" if then.get(name) == now.get(name) else ""
            raise UserError(
                f"{run} was begun with another {WHAT[name]} ({places}{same}; fingerprint {old} then, {fingerprint} now): "
                f"give it what it was begun with, or another --out"
            )
    lost = [name for name in then.get("fingerprints", {}) if name not in now["fingerprints"]]
    if lost:
        raise UserError(f"{run} was begun with {WHAT[lost[0]]} {then.get(lost[0])}: give the same, or another --out")
    new = [name for name in now["fingerprints"] if then.get("fingerprints") and name not in then["fingerprints"]]
    if new:
        raise UserError(f"{run} was begun without {WHAT[new[0]]} of its own: leave that out, or give another --out")


def note_parts(run: Path, now: dict[str, Any]) -> None:
    """Write ``run.json`` at a run's start; later only what changes nothing: where parts with the same contents lie now.

    Call it after :func:`check_same_parts`.
    """
    then = read_facts(run)
    if then == now:
        return
    if then and "fingerprints" not in then:
        print(f"{run} is older than fingerprints of model and data: from now on it is held to what it goes on with")
    for name in now["fingerprints"] if then else ():
        if then.get(name) != now[name]:
            print(f"the {WHAT[name]} of {run} has moved: {then.get(name)} -> {now[name]}")
    write_atomically(run / "run.json", json.dumps(then | now, indent=2) + "\n")


def part_of_run(run: Path, name: str) -> Path:
    """Folder of a run's base ``model`` or of its ``student``'s start, as it was when the run began.

    Raises:
        UserError: it is not there, or holds something else now.
    """
    facts = read_facts(run)
    if not isinstance(facts.get(name), str):
        raise UserError(f"{run / 'run.json'} does not say where the {WHAT[name]} lay: {COPY}")
    try:
        folder = wan.resolve_model(facts[name])
    except UserError as error:
        raise UserError(
            f"the {WHAT[name]} of {run} is needed and cannot be used where it lay: {error}; put it back, or give its new "
            "place to `mogan train` once more, which notes it"
        ) from error
    known = facts.get("fingerprints", {}).get(name)
    if known is not None and not _agree(known, _of_folder(name, folder)):
        raise UserError(f"{folder} is no longer the {WHAT[name]} that {run} was begun with: put that one back")
    return folder


def _of_folder(name: str, folder: Path) -> str:
    return of_student(folder) if name == "student" else of_model(folder)


def _of_place(name: str, facts: dict[str, Any]) -> str | None:
    """What lies where an older run's part lay; None if nothing does, or nothing was said."""
    place = facts.get(name)
    if place is None or not Path(place).is_dir():
        return None
    try:
        return of_cache(open_cache(place)) if name in ("data", "prompts") else _of_folder(name, Path(place))
    except (UserError, OSError):
        return None
