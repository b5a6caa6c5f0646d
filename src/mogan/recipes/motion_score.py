"""Models of motion alone, trained on differences of latent frames (section 6.3 of motion score matching)."""

from mogan.config import Config, Optimizer, Update
from mogan.objectives.motion_score import MotionScoreConfig
from mogan.schedule import shifted_levels


def motion_score_lab() -> Config:
    """A motion score model of the lab's world, from the lab's teacher; the paper's section 6.3 gives no number at all."""
    return Config(
        recipe="motion_score_lab",
        sigmas=shifted_levels(50, 3.0),
        plan=(Update(learns="student", by="motion_score", batch=16),),
        optimizers={"student": Optimizer(lr=1e-4)},
        objectives={
            "motion_score": MotionScoreConfig(
                windows=((0, 4), (1, 4), (2, 2)), shift=3.0
            ),  # eq. 15, 16, 17; 5 latent frames
        },
        iterations=400,
        ema=0.99,
        save_every=50,
        sample_prompts=0,  # differences are no clip to look at
    )


def motion_score_wan_1_3b() -> Config:
    """A motion score model from Wan2.1-T2V-1.3B; every number chosen here, none tried at this size."""
    return Config(
        recipe="motion_score_wan_1_3b",
        sigmas=shifted_levels(50, 5.0),
        plan=(Update(learns="student", by="motion_score", batch=64, accumulate=64),),
        optimizers={"student": Optimizer(lr=1e-5, weight_decay=0.01)},
        objectives={
            "motion_score": MotionScoreConfig(windows=((0, 20), (1, 20), (3, 3)), shift=5.0),  # 21 latent frames
        },
        iterations=10000,
        ema=0.999,
        checkpointing=True,
        sample_prompts=0,
    )
