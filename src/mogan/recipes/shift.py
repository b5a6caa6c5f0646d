"""SHIFT (arXiv 2603.17426): motion rewards on an image-conditioned student."""

from mogan.config import Config, Optimizer, Update
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.shift import ShiftConfig
from mogan.schedule import shifted_levels


def shift_lab() -> Config:
    """SHIFT on the lab's image-conditioned model (``--student``: the export of a sft_i2v_lab run).

    The paper's constants are not public; these were chosen here. Order as its Algorithm 1: warm up the rewards, then
    sample, reward, denoise several times, refresh the rewards. Sampling and observing clips costs as much as 30 updates
    of the rewards, which tell held-out real clips from generated ones after a hundred: each set of clips is used often.
    """
    return Config(
        recipe="shift_lab",
        post_trains=True,
        sigmas=shifted_levels(10, 3.0),
        given=1,
        plan=(
            Update(learns="reward", by="shift", times=16, batch=8, stop=8),
            Update(learns="student", by="shift", times=12, batch=8, start=8),
            Update(learns="reward", by="shift", times=8, batch=8, start=8),
        ),
        optimizers={"student": Optimizer(lr=1e-4), "reward": Optimizer(lr=3e-4, weight_decay=0.01)},
        objectives={
            "shift": ShiftConfig(
                guidance=1.0,
                level_shift=3.0,
                weight="linear",
                beta=1.0,
                clip=(-4.0, 4.0),
                points=64,
                patch=(4, 8, 8),
                width=96,
                depth=3,
                heads=4,
                flow="lab",
                flow_iterations=4,
            ),
        },
        iterations=21,
        ema=0.98,
        save_every=2,
        sample_every=10,
    )


def shift_wan_1_3b() -> Config:
    """SHIFT at full size, on a Wan made image-conditioned by the same first-frame conditioning (Wan 2.2's TI2V has it).

    The paper trains LoRA of rank 32 on SVD-1.2B and Wan2.2-TI2V-5B; its learning rates, batch, clip range, beta, M and
    transformer sizes are not public, and numbers without a source were chosen here.
    """
    return Config(
        recipe="shift_wan_1_3b",
        post_trains=True,
        sigmas=shifted_levels(30, 3.0),  # shift: Wan's for 480p
        given=1,
        plan=(  # order: the paper's Algorithm 1
            Update(learns="reward", by="shift", times=4, batch=8, accumulate=8, stop=50),
            Update(learns="student", by="shift", times=16, batch=8, accumulate=8, start=50),
            Update(learns="reward", by="shift", times=4, batch=8, accumulate=8, start=50, every=2),
        ),
        optimizers={
            "student": Optimizer(lr=1e-5, weight_decay=0.01),
            "reward": Optimizer(lr=1e-4, weight_decay=0.01),
        },
        objectives={
            "shift": ShiftConfig(
                guidance=5.0,  # Wan's own
                level_shift=3.0,
                weight="exp",
                beta=2.0,
                clip=(-4.0, 4.0),
                points=256,
                patch=(8, 32, 32),
                width=384,
                depth=6,
                heads=6,
                flow="raft_large_C_T_SKHT_V2.pth",  # torchvision's in place of SEA-RAFT
                flow_iterations=12,
            ),
        },
        negative_prompt=WAN_NEGATIVE_PROMPT,
        iterations=200,
        ema=0.99,
        checkpointing=True,
        save_every=10,
        sample_every=50,
    )
