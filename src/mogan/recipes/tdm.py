"""TDM (arXiv 2503.06674): one student for several numbers of steps, matched to the teacher within each of its steps."""

from mogan.config import Config, Optimizer, Update
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.dmd import DMDConfig
from mogan.sampling.rollout import Intervals
from mogan.schedule import shifted_levels

HUBER = 0.00054  # the paper's c, per root of the dimension
FAKE_BETAS = (0.0, 0.95)  # the authors' script
COUNTS = (1, 2, 4)  # chosen; the paper averages over numbers of steps and its script trains 4


def tdm_lab() -> Config:
    """The lab's student for 1, 2 and 4 steps from its teacher; learning rates, guidance and levels are ``dmd_lab``'s."""
    return Config(
        recipe="tdm_lab",
        sigmas=shifted_levels(4, 3.0),
        rollout=Intervals(counts=COUNTS),
        plan=(
            Update(learns="student", by="dmd", batch=16),
            Update(learns="fake_score", by="dmd", batch=16),  # 1 to 1: the authors' script
        ),
        optimizers={
            "student": Optimizer(lr=1e-4, betas=(0.0, 0.999)),
            "fake_score": Optimizer(lr=2e-4, betas=FAKE_BETAS),
        },
        objectives={"dmd": DMDConfig(guidance=3.0, shift=3.0, huber=HUBER)},
        iterations=500,
        ema=0.98,
        save_every=25,
        sample_every=100,
    )


def tdm_wan_1_3b() -> Config:
    """TDM on Wan2.1-T2V-1.3B, which the paper has not tried: its videos are CogVideoX-2B's.

    The authors train adapters at 2e-5 for 500 iterations: ``--lora 64 --lr 2e-5`` here, whose rank is not given. All weights
    learn at what other distillations of Wan take.
    """
    lr = Optimizer(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)  # CausVid's, but for DMD2's betas
    fake = Optimizer(lr=2e-6, betas=FAKE_BETAS, weight_decay=0.01, clip=10.0)
    return Config(
        recipe="tdm_wan_1_3b",
        sigmas=shifted_levels(4, 5.0),  # Wan's shift; 1000/938/833/625 as Self-Forcing's student
        rollout=Intervals(counts=COUNTS),
        plan=(
            Update(learns="student", by="dmd", batch=64, accumulate=64),
            Update(learns="fake_score", by="dmd", batch=64, accumulate=64),
        ),
        optimizers={"student": lr, "fake_score": fake},
        objectives={"dmd": DMDConfig(guidance=4.5, shift=5.0, huber=HUBER)},  # guidance: the authors' script
        iterations=500,  # the paper, 4 steps of PixArt-alpha
        ema=0.98,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=50,
        sample_every=50,
    )
