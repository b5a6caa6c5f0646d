"""Supervised fine-tuning (SFT) on real clips, from text alone or with the first frame given."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.flow_matching import FlowMatchingConfig
from mogan.schedule import shifted_levels


def flow_matching_lab() -> Config:
    """Supervised fine-tuning of the lab's teacher on real clips."""
    return Config(
        recipe="flow_matching_lab",
        sigmas=shifted_levels(50, 3.0),
        plan=(Update(learns="student", by="flow_matching", batch=16),),
        optimizers={"student": Optimizer(lr=1e-4)},
        objectives={
            "flow_matching": FlowMatchingConfig(shift=3.0),
        },
        iterations=200,
        ema=0.99,
        save_every=50,
        sample_every=100,
    )


def sft_i2v_lab() -> Config:
    """The lab's teacher becomes image-conditioned: supervised fine-tuning on real clips, first latent frame given."""
    return replace(flow_matching_lab(), recipe="sft_i2v_lab", sigmas=shifted_levels(10, 3.0), given=1, iterations=400)


def vace_lab() -> Config:
    """The lab's teacher learns to read controls: fine-tuning of what `mogan vace lab-teacher` makes, on clips with controls.

    All weights learn, at ten times the rate of ``flow_matching_lab``, since the control blocks begin with nothing to say.
    """
    base = flow_matching_lab()
    return replace(
        base,
        recipe="vace_lab",
        optimizers={"student": Optimizer(lr=1e-3)},
        iterations=3000,
        ema=0.995,
        save_every=500,
        sample_every=1000,
    )


def flow_matching_wan_1_3b() -> Config:
    """Supervised fine-tuning of Wan2.1-T2V-1.3B; every number chosen here, none tried at this size."""
    return Config(
        recipe="flow_matching_wan_1_3b",
        sigmas=shifted_levels(50, 3.0),  # shift: Wan's for 480p
        plan=(Update(learns="student", by="flow_matching", batch=64, accumulate=64),),
        optimizers={"student": Optimizer(lr=1e-5, weight_decay=0.01)},
        objectives={
            "flow_matching": FlowMatchingConfig(shift=3.0),
        },
        negative_prompt=WAN_NEGATIVE_PROMPT,
        iterations=2000,
        ema=0.999,
        checkpointing=True,
        save_every=100,
        sample_every=500,
    )


def sft_i2v_wan_1_3b() -> Config:
    """Wan2.1-T2V-1.3B becomes image-conditioned, first latent frame given: where ``shift_wan_1_3b`` starts."""
    return replace(flow_matching_wan_1_3b(), recipe="sft_i2v_wan_1_3b", sigmas=shifted_levels(30, 3.0), given=1)
