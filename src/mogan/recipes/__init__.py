"""Recipes: functions that return one complete :class:`mogan.config.Config`, a file per method.

The value of a paper stands beside each number with its place; a number without one was chosen here. Any importable
``module:function`` works as a recipe, so yours can live outside this package.
"""

from collections.abc import Callable
from functools import partial

from mogan.config import Config
from mogan.errors import UserError, closest
from mogan.own import in_their_words, own_function
from mogan.recipes.accvideo import accvideo_lab, accvideo_lab_no_gan, accvideo_wan_1_3b
from mogan.recipes.asd import asd_lab, asd_wan_1_3b
from mogan.recipes.causal import (
    causal_cd_lab,
    causal_cd_wan_1_3b,
    causal_ode_lab,
    causal_ode_wan_1_3b,
    causal_teacher_lab,
    causal_teacher_wan_1_3b,
)
from mogan.recipes.dmd import dmd2_long_wan_1_3b, dmd2_wan_1_3b, dmd_i2v_lab, dmd_i2v_wan_1_3b, dmd_lab
from mogan.recipes.efficient_vdit import (
    efficient_vdit_kd_lab,
    efficient_vdit_kd_teacher_lab,
    efficient_vdit_kd_teacher_wan_1_3b,
    efficient_vdit_kd_wan_1_3b,
    efficient_vdit_mcd_lab,
    efficient_vdit_mcd_wan_1_3b,
)
from mogan.recipes.fine_tuning import flow_matching_lab, flow_matching_wan_1_3b, sft_i2v_lab, sft_i2v_wan_1_3b, vace_lab
from mogan.recipes.llia import llia_lab, llia_wan_1_3b
from mogan.recipes.mogan import (
    ABLATIONS,
    ablate,
    mogan_causal_lab,
    mogan_causal_wan_1_3b,
    mogan_i2v_lab,
    mogan_i2v_wan_1_3b,
    mogan_lab,
    mogan_surrogate_lab,
    mogan_wan_1_3b,
)
from mogan.recipes.motion_score import motion_score_lab, motion_score_wan_1_3b
from mogan.recipes.msm import mogan_msm_lab, msm_causal_lab, msm_causal_wan_1_3b, msm_lab, msm_wan_1_3b
from mogan.recipes.phased import phased_alternating_lab, phased_lab, phased_wan_1_3b, phased_wan_a14b
from mogan.recipes.redmd import redmd_lab, redmd_wan_1_3b
from mogan.recipes.reward_forcing import reward_forcing_lab, reward_forcing_wan_1_3b
from mogan.recipes.self_forcing import self_forcing_lab, self_forcing_wan_1_3b
from mogan.recipes.shift import shift_lab, shift_wan_1_3b
from mogan.recipes.tdm import tdm_lab, tdm_wan_1_3b
from mogan.recipes.vdot import vdot_lab, vdot_wan_1_3b

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        accvideo_lab, accvideo_lab_no_gan, accvideo_wan_1_3b, asd_lab, asd_wan_1_3b, causal_cd_lab, causal_cd_wan_1_3b,
        causal_ode_lab, causal_ode_wan_1_3b, causal_teacher_lab, causal_teacher_wan_1_3b, dmd_i2v_lab, dmd_i2v_wan_1_3b, dmd_lab, dmd2_wan_1_3b,
        dmd2_long_wan_1_3b, flow_matching_lab, flow_matching_wan_1_3b, llia_lab, llia_wan_1_3b, mogan_causal_lab,
        mogan_causal_wan_1_3b, mogan_i2v_lab, mogan_i2v_wan_1_3b, mogan_lab, mogan_msm_lab, mogan_surrogate_lab,
        mogan_wan_1_3b, motion_score_lab, motion_score_wan_1_3b, msm_causal_lab, msm_causal_wan_1_3b, msm_lab,
        msm_wan_1_3b, phased_alternating_lab, phased_lab, phased_wan_1_3b, phased_wan_a14b, redmd_lab, redmd_wan_1_3b,
        reward_forcing_lab, reward_forcing_wan_1_3b, self_forcing_lab, self_forcing_wan_1_3b, sft_i2v_lab,
        sft_i2v_wan_1_3b, shift_lab, shift_wan_1_3b, tdm_lab, tdm_wan_1_3b, vace_lab, vdot_lab, vdot_wan_1_3b,
        efficient_vdit_kd_lab, efficient_vdit_kd_teacher_lab, efficient_vdit_kd_teacher_wan_1_3b,
        efficient_vdit_kd_wan_1_3b, efficient_vdit_mcd_lab, efficient_vdit_mcd_wan_1_3b,
    )
}  # fmt: skip
# so far all are functions; what follows has a name alone
__all__ = ["ABLATIONS", "NAMES", "RECIPES", "ablate", "find_recipe", *RECIPES]
RECIPES |= {
    f"{recipe.__name__}_{ablation.replace('-', '_')}": partial(ablate, recipe, ablation)
    for recipe in (mogan_lab, mogan_wan_1_3b)
    for ablation in ABLATIONS
}
NAMES = "one of {}; at full size: {}; or your own module:function.".format(  # what help says of a recipe
    *(", ".join(sorted(name for name in RECIPES if ("_wan_" in name) is full)) for full in (False, True))
)


def find_recipe(name: str) -> Config:
    """The config of a recipe by name, or of any ``module:function``; modules are found here and on ``PYTHONPATH``.

    Raises:
        UserError: there is no such recipe, or it returns no config.
    """
    module, _, function = name.rpartition(":")
    if name not in RECIPES and not (module and function):
        hint = closest(name, RECIPES) or f": use one of {', '.join(RECIPES)}, or module:function of your own"
        raise UserError(f"no recipe {name!r}{hint}")
    recipe = own_function(name, "recipe", "returns a Config") if module else RECIPES[name]
    try:
        config = recipe()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{name} failed\n{in_their_words(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{name} returns a {type(config).__name__}, not a mogan Config: return one, as mogan_lab does")
    return config
