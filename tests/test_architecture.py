"""docs/architecture.md says which way arrows point; here they are held to it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "mogan"
ORDER = ["schedule", "denoiser", "rollout", "objectives", "load", "assemble", "train", "cli"]


def imports(path: Path) -> set[str]:
    """First-level modules of ours that a file imports when it is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mogan":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_one_way(path):
    here, found = room(path), imports(path)
    if here in ORDER:
        later = set(ORDER[ORDER.index(here) + 1 :])
        assert not found & later, f"{path} imports {found & later}"
    if here in ("schedule", "stream", "video", "errors", "files"):
        assert found <= {"errors", "files", "schedule", "stream"}, found
    if here in ("attention", "autoencoder"):
        assert not found, found
    if here in ("wan", "flow"):
        assert found <= {"errors", "schedule", "attention", "defaults", "flow", "weights"}, found
    if here in ("evaluation", "report", "survey"):
        assert not found & {"train", "assemble", "objectives", "recipes"}, found


def test_the_architecture_page_names_every_room():
    page = (SOURCE.parent.parent / "docs" / "architecture.md").read_text()
    missing = (
        {room(p) for p in FILES} - {w.strip("`/").removesuffix(".py") for w in page.split()} - {"__init__", "__main__"}
    )
    assert missing == set()
