"""Which pairs a rater sees, in which order, on which side: pure functions of survey, votes so far and generator."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from mogan.survey.folder import Item, Survey

REPEAT = "repeat"


@dataclass(frozen=True)
class Slot:
    """One screen of a rater's visit. ``swapped`` puts the item's second clip on the left (top, on a phone)."""

    kind: str  # practice | check | pair | repeat
    item: str
    swapped: bool


def plan(survey: Survey, shown: Mapping[tuple[str, bool], int], generator: Random) -> list[Slot]:
    """Practice, then pairs in random order with attention checks spread between them and repeats near the end.

    ``shown[item, swapped]`` counts how often an item was given out on each side. Pairs seen least come first, so that
    all pairs get the same number of raters; each goes to the side it was shown on less, so that sides are
    counterbalanced over the raters of an item; where an item is even, the rater's own left and right are balanced.
    """
    practice = [Slot("practice", item.id, generator.random() < 0.5) for item in survey.of_kind("practice")]
    pool = survey.of_kind("check")
    checks = [
        Slot("check", item.id, generator.random() < 0.5)
        for item in generator.sample(pool, min(survey.checks_per_rater, len(pool)))
    ]
    chosen = sorted(survey.of_kind("pair"), key=lambda item: (_total(shown, item), generator.random()))
    pairs = _apart(_sides(chosen[: survey.per_rater], shown, generator), survey, generator)
    early = pairs[: max(1, len(pairs) // 2)]
    repeated = generator.sample(early, min(survey.repeats_per_rater, len(early)))
    repeats = [Slot(REPEAT, slot.item, not slot.swapped) for slot in repeated]
    for slot in repeats:
        pairs.insert(generator.randint(max(1, 3 * len(pairs) // 4), len(pairs)), slot)
    return practice + _spread(pairs, checks, generator)


def _total(shown: Mapping[tuple[str, bool], int], item: Item) -> int:
    return shown.get((item.id, False), 0) + shown.get((item.id, True), 0)


def _sides(items: list[Item], shown: Mapping[tuple[str, bool], int], generator: Random) -> list[Slot]:
    slots, even = [], []
    for item in items:
        straight, swapped = shown.get((item.id, False), 0), shown.get((item.id, True), 0)
        if straight == swapped:
            even.append(item)
        else:
            slots.append(Slot("pair", item.id, straight > swapped))
    generator.shuffle(even)
    for item in even:
        balance = sum(1 if slot.swapped else -1 for slot in slots)
        slots.append(Slot("pair", item.id, balance < 0 if balance else generator.random() < 0.5))
    return slots


def _apart(slots: list[Slot], survey: Survey, generator: Random) -> list[Slot]:
    """A random order; of twenty, the one that shows the same prompt twice in a row least often."""
    prompt = {item.id: item.prompt for item in survey.items}
    orders = [generator.sample(slots, len(slots)) for _ in range(20)]
    return min(
        orders,
        key=lambda order: sum(prompt[a.item] == prompt[b.item] for a, b in pairwise(order)),
    )


def _spread(pairs: list[Slot], checks: list[Slot], generator: Random) -> list[Slot]:
    """One check at a random place in each equal stretch of the pairs, never first."""
    slots = list(pairs)
    for k, check in reversed(list(enumerate(checks))):
        low, high = k * len(pairs) // len(checks), (k + 1) * len(pairs) // len(checks)
        slots.insert(generator.randint(max(1, low), max(1, high)), check)
    return slots
