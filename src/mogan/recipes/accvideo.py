"""AccVideo (arXiv 2503.19462): a student that follows its teacher's kept paths from key level to key level."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.objectives.accvideo import KeyLevelGANConfig, TrajectoryConfig
from mogan.sampling.rollout import Euler
from mogan.schedule import shifted_levels


def accvideo_lab() -> Config:
    """The lab's student from its teacher's paths: ``mogan trajectories --steps 48 --keep 0,16,32,48``, guidance and shift 3.

    Levels, batch and learning rate are ``dmd_lab``'s, the heads' places in proportion to the paper's.
    """
    return Config(
        recipe="accvideo_lab",
        sigmas=shifted_levels(3, 3.0),
        rollout=Euler(stop=3),
        plan=(
            Update(learns="student", by="trajectory", batch=16),
            Update(learns="student", by="key_levels", batch=16),
            Update(learns="discriminator", by="key_levels", batch=16),
        ),
        optimizers={"student": Optimizer(lr=1e-4), "discriminator": Optimizer(lr=1e-4)},
        objectives={
            "trajectory": TrajectoryConfig(),
            "key_levels": KeyLevelGANConfig(weight=0.1, block=5, clean_block=3),
        },
        iterations=600,
        ema=0.98,
        save_every=25,
        sample_every=100,
    )


def accvideo_lab_no_gan() -> Config:
    """The lab's student that follows paths and is judged by nobody."""
    whole = accvideo_lab()
    return replace(
        whole,
        recipe="accvideo_lab_no_gan",
        plan=whole.plan[:1],
        optimizers={"student": whole.optimizers["student"]},
        objectives={"trajectory": whole.objectives["trajectory"]},
    )


def accvideo_wan_1_3b() -> Config:
    """AccVideo on Wan2.1-T2V-1.3B, on ``mogan trajectories --steps 50 --shift 7 --keep 0,10,20,30,40,50``.

    The paper distils HunyuanVideo (13B, 60 blocks); numbers without a word are its own. Its authors' later students of
    Wan 14B take 10 steps of UniPC at shift 5; how they were trained is not public.
    """
    return Config(
        recipe="accvideo_wan_1_3b",
        sigmas=shifted_levels(5, 7.0),
        rollout=Euler(stop=5),
        plan=(
            Update(learns="student", by="trajectory", batch=32, accumulate=32),
            Update(learns="student", by="key_levels", batch=32, accumulate=32),
            Update(learns="discriminator", by="key_levels", batch=32, accumulate=32),
        ),
        optimizers={"student": Optimizer(lr=5e-6), "discriminator": Optimizer(lr=5e-6)},
        objectives={
            "trajectory": TrajectoryConfig(),
            "key_levels": KeyLevelGANConfig(weight=0.1, block=29, clean_block=19),  # last of 60, and 40 at level 0
        },
        iterations=1200,
        ema=0.99,  # chosen
        checkpointing=True,
        save_every=50,
        sample_every=100,
    )
