"""docs/architecture.md says which package may import which; here that is tested."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "mogan"
ORDER = [  # a room may use those before it
    *(
        "errors",
        "own",
        "schedule",
        "ranges",
        "terms",
        "config",
        "disk",
        "devices",
        "distributed",
        "sharding",
        "models",
        "motion",
        "costs",
        "data",
        "runs",
    ),
    *("sampling", "objectives", "recipes", "estimate", "training", "world", "evaluation", "exchange", "report", "lab"),
    *("survey", "stream", "study", "arguments", "completion", "cli"),
]


def imports(path: Path) -> set[str]:
    """Rooms that a file uses, imports inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mogan":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mogan.")}
    return found - {"__version__"}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(p for p in SOURCE.rglob("*.py") if room(p) not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_one_way(path):
    before = set(ORDER[: ORDER.index(room(path)) + 1])
    assert imports(path) <= before, f"{path} climbs to {imports(path) - before}"


def test_training_and_data_know_no_method_by_name():
    names = {page.stem for page in (SOURCE.parent.parent / "docs" / "methods").glob("*.md")}
    names -= {"causal", "comparison", "mogan", "shift", "surrogate"}  # words of the field, and the package
    assert len(names) > 8
    word = re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])", re.IGNORECASE)
    assert word.search("the export of a reward_forcing run")
    for path in FILES:
        if room(path) in ("training", "data"):
            assert not word.search(path.read_text()), path


def test_people_who_judge_load_nothing_that_trains():
    for path in FILES:
        if room(path) in ("evaluation", "report", "survey"):
            assert not imports(path) & {"training", "objectives", "recipes"}, path


def test_the_architecture_page_names_every_room_and_file():
    page = (SOURCE.parent.parent / "docs" / "architecture.md").read_text()
    names = {word.strip("`/,.()").removesuffix(".py") for word in page.split()}
    assert {room(p) for p in FILES} - names == set()
    shown = ("models", "motion", "data", "disk", "runs", "sampling", "objectives", "training", "exchange", "world")
    assert {p.stem for p in FILES if room(p) in shown} - {"__init__"} - names == set()
