"""Prices of a recipe's variants, each network traced once."""

import sys
from functools import lru_cache

import torch

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.machines import Machine
from mogan.costs.shapes import PUBLISHED, read_shapes, resized, sparse
from mogan.errors import UserError
from mogan.estimate.predict import Estimate, predict
from mogan.models.lora import check_rank


def pricing(
    config: Config,
    model: str | None,
    machine: Machine,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    clips: int = 15000,
    references: tuple[int, ...] = (),
    lora: int | None = None,
    copies: int = 1,
):
    """A function ``(config, gpus, lora) -> Estimate`` that traces each variant of the networks once.

    Raises:
        UserError: the model cannot be had so: of ``lora``, the rank that is asked for, too.

    ``copies`` are those of :func:`mogan.estimate.predict.predict`.
    """
    shapes = read_shapes(model or ("lab" if "_lab" in config.recipe else _own_model(config.recipe)))
    shapes = resized(shapes, frames=frames, height=height, width=width)
    if lora is not None:
        check_rank(lora, shapes.transformer)
    if references:
        shapes = sparse(shapes, references)
    if shapes.references is not None and config.causal is not None:
        raise UserError("a causal student's chunks cannot keep frame-sparse attention: take another recipe or model")

    def say(what: str) -> None:
        print(f"tracing the {what} ...", file=sys.stderr, flush=True)

    @lru_cache
    def tracer_of(checkpointing: bool, precision: str, offload: bool) -> Tracer:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return Tracer(shapes, checkpointing, dtype, say, offload, config.given)

    def price(changed: Config, gpus: int, lora: int | None, on: Machine = machine) -> Estimate:
        tracer = tracer_of(changed.checkpointing, changed.precision, bool(changed.offload))
        return predict(changed, tracer, on, gpus, clips=clips, lora=lora, copies=copies)

    return price


def _own_model(recipe: str) -> str:
    """The published model that a recipe is named for: ``..._wan_1_3b``."""
    size = recipe.rpartition("_wan_")[2].replace("_", ".")
    return next((name for name in PUBLISHED if name.endswith(f"-{size}")), "wan2.1-t2v-1.3b")
