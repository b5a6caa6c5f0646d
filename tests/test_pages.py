"""The pages: what they link to is there, on GitHub as on disk."""

import re
import string
from pathlib import Path

import pytest

from mogan.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings: small letters, no punctuation, dashes for spaces; a number behind what comes again."""
    found: dict[str, int] = {}
    named = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        kept = "".join(c for c in heading.lower() if c not in string.punctuation.replace("-", "").replace("_", ""))
        anchor = kept.replace(" ", "-")
        named.add(f"{anchor}-{found[anchor]}" if anchor in found else anchor)
        found[anchor] = found.get(anchor, 0) + 1
    return named


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page}: {target}"
        assert there.is_relative_to(ROOT), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page}: {target}; there are {sorted(anchors(there))}"


def test_the_index_of_choices_names_every_methods_page():
    index = (ROOT / "docs" / "choices.md").read_text()
    pages = {p.name for p in (ROOT / "docs" / "methods").glob("*.md")} - {"comparison.md"}
    assert pages - set(re.findall(r"methods/(\w+\.md)", index)) == set()


@pytest.mark.parametrize("page", ["README.md", "papers.md"])
def test_every_recipe_stands_in_a_table_of_its_page(page):
    named = set()
    for row in (ROOT / page).read_text().splitlines():
        own = set(re.findall(r"`(\w+)`", row)) if row.startswith("|") else set()
        if "and each `_wan_1_3b`" in row:
            own |= {name.removesuffix("_lab") + "_wan_1_3b" for name in own if name.endswith("_lab")}
        if "ablations end in" in row:
            own |= {
                name + ablation
                for name in own
                for ablation in own
                if ablation.startswith("_no") or ablation == "_latent_gan"
            }
        named |= own
    assert not set(RECIPES) - named
