"""What makes a recipe fit a GPU: of the settings that do, those that cost least in quality and in time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mogan.config import Config
from mogan.costs.machines import MACHINES, Machine
from mogan.data.cache import Cache
from mogan.disk.files import from_json
from mogan.errors import UserError
from mogan.estimate.predict import Estimate
from mogan.estimate.pricing import pricing

GB = 1e9
RANK = 64
RECOMPUTED = "recompute activations in the backward pass: checkpointing"
ONE_BY_ONE = "compute one clip at a time: accumulate = batch"
OFFLOADED = "keep what the backward pass needs, and the optimisers' moments, in the host's memory: offload"
ADAPTERS = f"learn adapters over one frozen base instead of all weights: lora {RANK}"

PriceOf = Callable[[Config, int, int | None], Estimate]


def ways(config: Config, lora: int | None) -> Iterator[tuple[tuple[str, ...], Config, int | None]]:
    """Settings in the order in which they are tried: what is changed, in words, and the config and rank with it."""
    said: tuple[str, ...] = ()
    if not config.checkpointing:
        config, said = replace(config, checkpointing=True), (*said, RECOMPUTED)
        yield said, config, lora
    if any(u.batch > u.accumulate for u in config.plan):
        config, said = (
            replace(config, plan=tuple(replace(u, accumulate=u.batch) for u in config.plan)),
            (*said, ONE_BY_ONE),
        )
        yield said, config, lora
    offloads = not config.offload and not config.compile  # nobody has tried both
    if offloads:
        yield (*said, OFFLOADED), replace(config, offload=True), lora
    if lora is None:
        yield (*said, ADAPTERS), config, RANK
    if lora is None and offloads:
        yield (*said, ADAPTERS, OFFLOADED), replace(config, offload=True), RANK


def fit(config: Config, gpus: int, price: PriceOf) -> tuple[Config, tuple[str, ...]]:
    """The config with the first of :func:`ways` that fits, and what was done, in a sentence each.

    Raises:
        UserError: none does.
    """
    said: tuple[str, ...] = ("nothing to change",)
    found, chosen = price(config, gpus, config.lora), config
    tried = ways(config, config.lora)
    while not found.fits:
        try:
            said, chosen, lora = next(tried)
        except StopIteration:
            raise UserError(
                f"nothing makes {config.recipe} fit {found.machine.name}: with all that can be done on {gpus} GPU"
                f"{'s' * (gpus > 1)} it takes {found.peak / GB:.1f} GB of the {found.available / GB:.1f} that are left for "
                "tensors; take smaller clips, more GPUs, or larger ones"
            ) from None
        chosen = replace(chosen, lora=lora)
        found = price(chosen, gpus, lora)
    host = f", {found.host / GB:.0f} GB of the host's memory" if found.host else ""
    last = f"predicted peak {found.peak / GB:.1f} GB of the {found.available / GB:.1f} that are left for tensors{host}"
    return chosen, (*said, last)


def fit_run(
    config: Config, memory: float, model: Path, cache: Cache, run: Path, gpus: int, copies: int = 1
) -> tuple[Config, tuple[str, ...]]:
    """:func:`fit` for a run on GPUs of ``memory`` GB, with ``copies`` of its sharded networks; a run that has begun keeps what was chosen then.

    Raises:
        UserError: nothing fits.
    """
    try:
        known = from_json((run / "config.json").read_text())
        parts = [u["accumulate"] for u in known["plan"]]
        plan = tuple(replace(u, accumulate=n) for u, n in zip(config.plan, parts, strict=True))
        lora = known["lora"] if config.lora is None else config.lora
        kept = {"checkpointing": known["checkpointing"], "offload": known.get("offload"), "lora": lora}
        return replace(config, plan=plan, **kept), (f"{run} goes on with what was chosen when it began",)
    except (OSError, ValueError, KeyError, TypeError):  # there is none yet, or it is refused in its place
        return fit(config, gpus, price_on(config, memory, model, cache, copies))


def price_on(config: Config, memory: float, model: Path, cache: Cache, copies: int = 1) -> PriceOf:
    """Prices of a run's variants on GPUs of ``memory`` GB."""
    machine: Machine = replace(MACHINES["h200"], name=f"{memory:g} GB", memory=memory * GB)
    size: dict[str, Any] = {k: cache.facts[k] for k in ("frames", "height", "width") if k in cache.facts}
    price = pricing(config, str(model), machine, clips=len(cache), copies=copies, **size)
    return lambda changed, gpus, lora: price(changed, gpus, lora)


def would_fit(config: Config, memory: float, model: Path, cache: Cache, gpus: int, copies: int = 1) -> str:
    """After a GPU of ``memory`` GB ran out of it: what to give."""
    try:
        chosen, said = fit(config, gpus, price_on(config, memory, model, cache, copies))
    except UserError as error:
        return str(error)
    if chosen == config:
        return f"it should have fitted {memory:.0f} GB: if nothing else uses the GPU, give --fit {0.8 * memory:.0f}"
    return f"give --fit {memory:.0f} ({'; '.join(said)})"
