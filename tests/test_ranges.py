"""No command takes a number that means nothing: one sentence that names the option, before anything is made."""

import importlib
import inspect
import typing

import pytest

from mogan.cli import COMMANDS, main
from mogan.errors import UserError
from mogan.ranges import above, at_least, between

NEEDED = {
    "prepare": ["x"],
    "train": ["mogan_lab", "--data", "x"],
    "sample": ["--prompts", "x"],
    "stream": ["--model", "x"],
    "trajectories": ["--prompts", "x"],
    "attention": ["--prompts", "x"],
    "tiles": ["x"],
    "vace": ["x"],
    "report": ["x"],
    "export": ["x"],
    "import": ["x", "--base", "x", "--sigmas", "1"],
    "estimate": ["mogan_lab"],
    "study": ["table1"],
    "survey serve": ["x"],
    "survey analyze": ["x"],
}
WRITES = {name for name in COMMANDS if name not in ("estimate", "survey serve", "weights list", "vbench")}


def kinds(annotation) -> set[type]:
    """Of one number; lists such as an import's levels have a rule of their own."""
    if typing.get_origin(annotation) is tuple:
        return set()
    return {annotation, *typing.get_args(annotation)} & {int, float}


def numeric_options():
    for name, (target, _) in COMMANDS.items():
        module, function = target.split(":")
        signature = inspect.signature(getattr(importlib.import_module(module), function))
        for option, parameter in signature.parameters.items():
            for kind in kinds(parameter.annotation):
                for value in ("-7", "nan", "inf") if kind is float else ("-7", str(-(10**30))):
                    yield name, option, value


@pytest.mark.parametrize(("name", "option", "value"), list(numeric_options()))
def test_every_numeric_option_of_every_command_has_a_range(name, option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = ["--out", "made"] if name in WRITES else []
    flag = f"--{option.replace('_', '-')}"
    assert main([*name.split(), *NEEDED.get(name, []), *out, f"{flag}={value}"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"mogan {name}: {flag} takes a number "), said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *[
            ("train", o, "0")
            for o in ("--batch", "--save-every", "--sample-every", "--iterations", "--lora", "--lr", "--fit")
        ],
        *[("sample", o, "0") for o in ("--batch", "--steps", "--seeds", "--limit", "--shift")],
        *[("prepare", o, "0") for o in ("--fps", "--height", "--width", "--frames", "--workers")],
        *[("demo", o, "0") for o in ("--clips", "--prompts", "--seeds", "--iterations")],
        *[("study", o, "0") for o in ("--clips", "--prompts", "--seeds", "--iterations", "--workers")],
        *[("lab build", o, "0") for o in ("--vae-steps", "--raft-steps", "--teacher-steps", "--student-iterations")],
        *[("survey build", o, "0") for o in ("--raters", "--per-rater")],
        *[("estimate", o, "0") for o in ("--gpus", "--frames", "--height", "--width", "--lora")],
        ("report", "--clips", "0"),
        ("export", "--rank", "0"),
        ("lab render", "--clips", "0"),
        ("prepare", "--motion-quantile", "1.5"),
        ("sample", "--motion-ratio", "1.5"),
        ("sample", "--shift", "1e12"),
        ("trajectories", "--shift", "1e-9"),
        ("survey serve", "--port", "70000"),
        ("stream", "--port", "70000"),
        ("stream", "--seconds", "0"),
        *[(name, "--seed", str(2**32)) for name in ("train", "demo", "lab render", "survey analyze")],
        ("study", "--first-seed", str(2**32 - 3)),
        ("study", "--seeds", "1000000000000"),
        ("prepare", "--fps", "1000000000000000000000"),
        ("sample", "--first-seed", str(2**63)),
        ("sample", "--seeds", "10000000000"),
        ("sample", "--steps", "1001"),
        ("estimate", "--gpus", "1000000000"),
        ("estimate", "--clips", "1000000000000"),
        ("train", "--lora", "100000000"),
    ],
)
def test_nothing_at_all_and_too_much_are_refused_too(name, option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = ["--out", "made"] if name in WRITES else []
    assert main([*name.split(), *NEEDED.get(name, []), *out, option, value]) == 2
    assert f"{option} takes a number " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_ends_of_ranges_belong_to_them_and_what_was_not_given_is_in_none():
    at_least(1, clips=1, other=None)
    between(0, 1, ratio=0.0, other=1.0)
    above(0, lr=1e-30)
    with pytest.raises(UserError, match="--per-rater takes a number of at least 1, not 0"):
        at_least(1, per_rater=0)
    with pytest.raises(UserError, match=r"--lr takes a number above 0, not 0\.0"):
        above(0, lr=0.0)
