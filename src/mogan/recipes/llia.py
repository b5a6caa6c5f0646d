"""LLIA (arXiv 2506.05806), as far as it is public: a causal student for chunks of several sizes, given its first frame.

The paper gives neither loss, levels, lengths nor rates: all numbers here were chosen.
"""

from mogan.config import Config, Optimizer, Update
from mogan.models.causal_cache import Causal
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.consistency import ConsistencyConfig
from mogan.sampling.causal_rollout import Chunked

LEVELS = (1.0, 0.6)


def llia_lab() -> Config:
    """Consistency training in chunks of 1, 2 and 4 latents of the student named with ``--student``: a ``causal_cd_lab`` or
    ``self_forcing_lab`` export. Clips are those of ``mogan lab render --motion states``.
    """
    return Config(
        recipe="llia_lab",
        sigmas=LEVELS,
        rollout=Chunked(Causal(first=1, rest=1, sizes=(1, 2, 4))),
        given=1,
        states={"idle": "at rest", "listening": "spinning", "speaking": "bouncing"},
        plan=(Update(learns="student", by="consistency", batch=16),),
        optimizers={"student": Optimizer(lr=1e-4)},
        objectives={"consistency": ConsistencyConfig(steps=24, shift=3.0, guidance=None, decay=0.98, warm_up=60)},
        iterations=300,
        ema=0.98,
        save_every=50,
        sample_every=100,
    )


def llia_wan_1_3b() -> Config:
    """The same of Wan2.1-T2V-1.3B: rates and batch as ``causal_cd_wan_1_3b`` has them, 20 latents after the first in chunks of 1,
    2 and 4. Name a ``causal_cd_wan_1_3b`` or ``self_forcing_wan_1_3b`` trained with chunks that begin with one latent.
    """
    return Config(
        recipe="llia_wan_1_3b",
        sigmas=LEVELS,
        rollout=Chunked(Causal(first=1, rest=1, sizes=(1, 2, 4))),
        given=1,
        states={name: name for name in ("idle", "listening", "speaking")},
        plan=(Update(learns="student", by="consistency", batch=64, accumulate=64),),
        optimizers={"student": Optimizer(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)},
        objectives={
            "consistency": ConsistencyConfig(steps=48, shift=5.0, guidance=None, decay=0.99, since=200, warm_up=600)
        },
        iterations=3000,
        ema=0.99,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=100,
        sample_every=500,
    )
