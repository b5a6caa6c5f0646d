"""What a caption of the lab's world says: read back from its words."""

import re
from dataclasses import dataclass

from mogan.world.scenes import COLOURS, DIRECTIONS, SHAPES


@dataclass(frozen=True)
class Caption:
    """What a caption of the lab promises of its first thing, and the colours of the others."""

    colour: str
    shape: str
    kind: str
    direction: str | None
    other_colours: tuple[str, ...]


def parse_caption(caption: str) -> Caption | None:
    """Read a caption of :func:`mogan.world.scenes.make_scene`; None for any other text."""
    pan = re.fullmatch(rf"the camera pans ({'|'.join(DIRECTIONS)}) over (.+)", caption)
    phrases = f"( at rest| moving (?:{'|'.join(DIRECTIONS)})| bouncing| falling| spinning|)"
    things = []
    for part in (pan[2] if pan else caption).split(" and "):
        match = re.fullmatch(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}){phrases}", part)
        if match is None:
            return None
        things.append(match.groups())
    colour, shape, phrase = things[0]
    words = phrase.split()
    kind = {"at": "still", "moving": "linear", "spinning": "rotating"}.get(words[0], words[0]) if words else "still"
    direction = pan[1] if pan else (words[1] if kind == "linear" else None)
    return Caption(colour, shape, "pan" if pan else kind, direction, tuple(str(c) for c, _, _ in things[1:]))
