"""Motion score matching: DMD with motion scores, and MoGAN with them."""

from dataclasses import replace

from mogan.config import Config, DMDConfig
from mogan.recipes.dmd import dmd2_long_wan_1_3b, dmd_lab
from mogan.recipes.mogan import mogan_lab


def msm_lab() -> Config:
    """The lab's student by DMD with motion score matching; everything but ``motion_weight`` as in ``dmd_lab``."""
    base = dmd_lab()
    return replace(base, recipe="msm_lab", dmd=_with_motion(base.dmd))


def msm_wan_1_3b() -> Config:
    """Motion score matching, stage 1 of its section 5: a 3-step Wan2.1-T2V-1.3B.

    The paper follows CausVid's released code, so does ``dmd2_wan_1_3b``: steps, guidance, shift, lr 2e-6 and betas
    (0.9, 0.999) are those of its section 5.1. Clipping, weight decay, batch and average are not given there.
    """
    base = dmd2_long_wan_1_3b()
    return replace(base, recipe="msm_wan_1_3b", dmd=_with_motion(base.dmd))


def mogan_msm_lab() -> Config:
    """MoGAN on the lab's student, its distribution matching with motion scores; a combination no paper has tried."""
    base = mogan_lab()
    return replace(base, recipe="mogan_msm_lab", dmd=_with_motion(base.dmd))


def _with_motion(dmd: DMDConfig | None) -> DMDConfig:
    assert dmd is not None
    return replace(dmd, motion_weight=1.0)  # lambda is given nowhere: chosen, the fastest motion weighs up to 5 times
