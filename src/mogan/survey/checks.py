"""Practice pairs and attention checks made of the user's own clips: pairs whose answer is known beforehand.

| manner | the second clip is | known answer |
|---|---|---|
| frozen | the first, stopped at its first frame | motion: first |
| shuffled | the first, in pieces of 0.4 s (too slow to flash), the last piece first | motion: first |
| pixelated | the first, in coarse blocks | quality: first |
| swapped | a clip of another prompt | text: first |
| identical | the first | a tie in at least two of the three |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from random import Random

import numpy as np
from jaxtyping import UInt8

from mogan.survey.folder import Answer, Item, Kind

Frames = UInt8[np.ndarray, "F H W 3"]

PRACTICE = ("frozen", "pixelated", "swapped")
CHECKS = ("frozen", "swapped", "shuffled", "pixelated", "identical")
EXPECT: dict[str, dict[str, Answer]] = {
    "frozen": {"motion": "first"},
    "shuffled": {"motion": "first"},
    "pixelated": {"quality": "first"},
    "swapped": {"text": "first"},
    "identical": {"motion": "tie", "quality": "tie", "text": "tie"},
}
LESSON = {
    "frozen": "One of the clips stood still. Where something should move, standing still is bad motion.",
    "shuffled": "One of the clips jumped about in time. Jumps are bad motion, however much they move.",
    "pixelated": "One of the clips was made of coarse blocks. That is bad visual quality; it moves as well.",
    "swapped": "One of the clips was made for another text. Only the text question asks about that.",
    "identical": "These were twice the same clip. Where you see no difference, say so.",
}
STILL = 1.0  # mean change between frames, in grey levels, under which stopping a clip is not seen


@dataclass(frozen=True)
class Source:
    """A clip that checks may be made of: its opaque name, its prompt and how much it moves (grey levels per frame)."""

    file: str
    prompt: str
    motion: float


def motion_of(frames: Frames) -> float:
    """Mean absolute change between consecutive frames, in grey levels; 0 for a single frame."""
    small = frames[:, ::4, ::4].astype(np.int16)
    return float(np.abs(np.diff(small, axis=0)).mean()) if len(small) > 1 else 0.0


def spoil(frames: Frames, manner: str, fps: float) -> Frames:
    """The frames after ``frozen``, ``shuffled`` or ``pixelated``; same shape."""
    if manner == "frozen":
        return np.repeat(frames[:1], len(frames), axis=0)
    if manner == "shuffled":
        piece = max(1, min(round(0.4 * fps), len(frames) // 3))
        return np.concatenate([frames[k : k + piece] for k in range(0, len(frames), piece)][::-1])
    assert manner == "pixelated", manner
    block = max(2, min(frames.shape[1:3]) // 24)
    rows, columns = (np.arange(size) // block * block for size in frames.shape[1:3])
    return frames[:, rows][:, :, columns]


def choose(sources: list[Source], generator: Random) -> list[tuple[Kind, str, Source, Source]]:
    """(kind, manner, first, second) of every practice pair and check, using different clips as far as there are any.

    Clips that hardly move are not used to show frozen or shuffled motion; without two prompts that share few words
    nothing is swapped.
    """
    moving = sorted((source for source in sources if source.motion >= STILL), key=lambda source: -source.motion)
    anything = generator.sample(sources, len(sources))
    strangers = [pair for pair in combinations(anything, 2) if _overlap(pair[0].prompt, pair[1].prompt) < 0.34]
    generator.shuffle(strangers)
    wanted: list[tuple[Kind, str]] = [("practice", m) for m in PRACTICE]
    wanted += [("check", m) for m in CHECKS]
    used: dict[str, int] = {}
    chosen = []
    for kind, manner in wanted:
        if manner == "swapped":
            options = strangers
        elif manner in ("frozen", "shuffled"):
            options = [(source, source) for source in moving[: max(4, len(moving) // 2)]]
        else:
            options = [(source, source) for source in anything]
        if not options:
            continue
        first, second = min(options, key=lambda pair: used.get(pair[0].file, 0) + used.get(pair[1].file, 0))
        for source in {first, second}:
            used[source.file] = used.get(source.file, 0) + 1
        chosen.append((kind, manner, first, second))
    return chosen


def passed(item: Item, answers: Mapping[str, Answer]) -> bool:
    """Whether answers (first / tie / second) are the known ones; twice the same clip allows one imagined difference."""
    wrong = sum(answers[question] != expected for question, expected in item.expect.items())
    return wrong <= (1 if item.manner == "identical" else 0)


def _overlap(a: str, b: str) -> float:
    """Share of words two prompts have in common (Jaccard)."""
    first, second = ({word.strip(".,;:!?") for word in text.lower().split()} for text in (a, b))
    return len(first & second) / max(1, len(first | second))
