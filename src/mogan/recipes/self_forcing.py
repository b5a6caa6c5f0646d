"""Self-Forcing (arXiv 2506.08009): a student that sees the past alone, judged on what it makes of its own clips, chunk by chunk."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.models.causal_cache import Causal
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.dmd import DMDConfig
from mogan.recipes.dmd import dmd_lab
from mogan.sampling.causal_rollout import Chunked
from mogan.schedule import shifted_levels


def self_forcing_lab() -> Config:
    """A latent frame at a time; everything but rollout and length is ``dmd_lab``'s.

    Name a start that sees the past alone with ``--student``; else it is the teacher, which has to learn that, too.
    """
    causal = Chunked(Causal(first=1, rest=1))
    return replace(dmd_lab(), recipe="self_forcing_lab", rollout=causal, iterations=200)


def self_forcing_wan_1_3b() -> Config:
    """Self-Forcing's DMD on Wan2.1-T2V-1.3B in chunks of three latents; numbers are its released config's.

    Two things are other: its teacher is the 14B model, here the base model; and it starts from a causal student that a
    regression to the teacher's paths made: name one with ``--student``, else the start is the base model.
    """
    betas = (0.0, 0.999)
    return Config(
        recipe="self_forcing_wan_1_3b",
        sigmas=shifted_levels(4, 5.0),  # 1000/750/500/250 at shift 5
        rollout=Chunked(Causal(first=3, rest=3)),
        plan=(
            Update(learns="student", by="dmd", batch=64, accumulate=64),
            Update(learns="fake_score", by="dmd", times=5, batch=64, accumulate=64),
        ),
        optimizers={
            "student": Optimizer(lr=2e-6, betas=betas, weight_decay=0.01, clip=10.0),
            "fake_score": Optimizer(lr=4e-7, betas=betas, weight_decay=0.01, clip=10.0),
        },
        objectives={"dmd": DMDConfig(guidance=4.0, shift=5.0)},  # guidance 3 as cond + 3 (cond - uncond)
        iterations=600,
        ema=0.99,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=50,
        sample_every=50,
    )
