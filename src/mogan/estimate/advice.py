"""What to change in a recipe that does not fit, and what comes of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mogan.config import Config
from mogan.estimate.fit import ways
from mogan.estimate.predict import Estimate


@dataclass(frozen=True)
class Change:
    """One thing to change, and what comes of it together with those before it."""

    what: str
    peak: float
    fits: bool


def advise(
    config: Config, gpus: int, lora: int | None, price: Callable[[Config, int, int | None], Estimate]
) -> tuple[Change, ...]:
    """What to change, one after the other, until the run fits: cheapest in quality and in money first.

    The text encoder is never on the GPU and the autoencoder is small, so nothing is gained by moving them.
    """
    changes: list[Change] = []

    def attempt(what: str, changed: Config, number: int, rank: int | None) -> bool:
        found = price(changed, number, rank)
        changes.append(Change(what, found.peak, found.fits))
        return found.fits

    for said, changed, rank in ways(config, lora):
        if attempt("; ".join(said), changed, gpus, rank):
            return tuple(changes)
    config = replace(config, checkpointing=True, offload=config.offload or not config.compile or None)
    config = replace(config, plan=tuple(replace(u, accumulate=u.batch) for u in config.plan))
    for number in (2, 4, 8, 16, 32, 64):  # which makes adapters faster, and no smaller
        if number > gpus and price(config, number, None).fits:
            attempt(f"shard all weights over {number} GPUs", config, number, None)
            return tuple(changes)
    if gpus < 64:
        attempt("shard all weights over 64 GPUs", config, 64, None)
    for name in config.objectives:
        for what, block in config.terms(name).smaller:
            smaller = replace(config, objectives=config.objectives | {name: block})
            if attempt(f"{what} in the recipe", smaller, max(gpus, 64), None):
                return tuple(changes)
    return tuple(changes)
