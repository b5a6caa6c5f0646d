"""Recipes: functions that return one complete :class:`mogan.config.Config`, a file per method.

The value of a paper stands beside each number with its place; a number without one was chosen here. Any importable
``module:function`` works as a recipe, so yours can live outside this package.
"""

import importlib

from mogan.config import Config
from mogan.errors import UserError
from mogan.recipes.dmd import dmd2_wan_1_3b, dmd_lab
from mogan.recipes.fine_tuning import flow_matching_lab, flow_matching_wan_1_3b, sft_i2v_lab, sft_i2v_wan_1_3b
from mogan.recipes.mogan import ABLATIONS, ablate, mogan_lab, mogan_surrogate_lab, mogan_wan_1_3b
from mogan.recipes.motion_score import motion_score_lab, motion_score_wan_1_3b
from mogan.recipes.msm import mogan_msm_lab, msm_lab, msm_wan_1_3b
from mogan.recipes.shift import shift_lab, shift_wan_1_3b

RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        dmd_lab, dmd2_wan_1_3b, flow_matching_lab, flow_matching_wan_1_3b, mogan_lab, mogan_msm_lab, mogan_surrogate_lab,
        mogan_wan_1_3b, motion_score_lab, motion_score_wan_1_3b, msm_lab, msm_wan_1_3b, sft_i2v_lab, sft_i2v_wan_1_3b,
        shift_lab, shift_wan_1_3b,
    )
}  # fmt: skip
__all__ = ["ABLATIONS", "RECIPES", "ablate", "find_recipe", *RECIPES]


def find_recipe(name: str) -> Config:
    """The config of a recipe by name, or of any importable ``module:function``."""
    module, _, function = name.rpartition(":")
    try:
        config = getattr(importlib.import_module(module), function)() if module else RECIPES[name]()
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"no recipe {name!r}: use one of {', '.join(RECIPES)}, or module:function of your own"
        ) from error
    if not isinstance(config, Config):
        raise UserError(f"{name} does not return a mogan Config; use one of {', '.join(RECIPES)}")
    return config
