"""Motion score matching: DMD with motion scores, and MoGAN with them."""

from dataclasses import replace

from mogan.config import Config
from mogan.recipes.dmd import dmd2_long_wan_1_3b, dmd_lab
from mogan.recipes.mogan import mogan_lab
from mogan.recipes.self_forcing import self_forcing_lab, self_forcing_wan_1_3b


def msm_lab() -> Config:
    """The lab's student by DMD with motion score matching; everything but ``motion_weight`` as in ``dmd_lab``."""
    return _with_motion(replace(dmd_lab(), recipe="msm_lab"))


def msm_wan_1_3b() -> Config:
    """Motion score matching, stage 1 of its section 5: a 3-step Wan2.1-T2V-1.3B.

    The paper follows CausVid's released code, so does ``dmd2_wan_1_3b``: steps, guidance, shift, lr 2e-6 and betas
    (0.9, 0.999) are those of its section 5.1. Clipping, weight decay, batch and average are not given there.
    """
    return _with_motion(replace(dmd2_long_wan_1_3b(), recipe="msm_wan_1_3b"))


def mogan_msm_lab() -> Config:
    """MoGAN on the lab's student, its distribution matching with motion scores; a combination no paper has tried."""
    return _with_motion(replace(mogan_lab(), recipe="mogan_msm_lab"))


def msm_causal_lab() -> Config:
    """Motion score matching while a causal student of the lab learns its few steps; all but ``motion_weight`` as ``self_forcing_lab``."""
    return _with_motion(replace(self_forcing_lab(), recipe="msm_causal_lab"))


def msm_causal_wan_1_3b() -> Config:
    """Stage 3 of the paper: a causal model, named with ``--student``, becomes a few-step one by DMD with motion scores.

    It follows CausVid, whose student learns from noised real clips; this one from its own, as ``self_forcing_wan_1_3b``'s does.
    """
    return _with_motion(replace(self_forcing_wan_1_3b(), recipe="msm_causal_wan_1_3b"))


def _with_motion(config: Config) -> Config:
    # lambda is given nowhere: chosen, the fastest motion weighs up to 5 times
    return config.changed("dmd", motion_weight=1.0)
