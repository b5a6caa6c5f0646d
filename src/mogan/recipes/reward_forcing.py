"""Reward Forcing (arXiv 2512.04678): Re-DMD on a causal student whose sink is averaged with what leaves its window."""

from dataclasses import replace

from mogan.config import Config
from mogan.models.causal_cache import Causal, Policy
from mogan.recipes import redmd
from mogan.recipes.self_forcing import self_forcing_lab, self_forcing_wan_1_3b
from mogan.sampling.causal_rollout import Chunked


def reward_forcing_lab() -> Config:
    """A causal student of the lab, named with ``--student``, for 160 iterations more: a chunk sees sink, last chunk and itself."""
    policy = Policy(window=3, sink=1, decay=0.9, relative=True)  # the paper's in chunks; decay: chosen, clips are short
    return replace(
        self_forcing_lab(),
        recipe="reward_forcing_lab",
        post_trains=True,
        rollout=Chunked(Causal(first=1, rest=1, policy=policy)),
        iterations=160,
    ).changed("dmd", weights=redmd.LAB)


def reward_forcing_wan_1_3b() -> Config:
    """Reward Forcing on Wan2.1-T2V-1.3B; numbers are its released config's, which but for window and reward are Self-Forcing's.

    Three things are other. Teacher and reward: the base model, there the 14B one; net motion, there VideoAlign's motion quality
    (``redmd_wan_1_3b``). The sink learns while the student does; the released training evicts nothing and leaves it as it is.
    The start is what ``--student`` names, such as ``causal_cd_wan_1_3b``'s export; there, a regression to the teacher's paths.
    """
    policy = Policy(window=9, sink=3, decay=0.999, relative=True)  # decay: its code's; its text has 0.99 and 9e-3
    return replace(
        self_forcing_wan_1_3b(),
        recipe="reward_forcing_wan_1_3b",
        rollout=Chunked(Causal(first=3, rest=3, policy=policy)),
    ).changed("dmd", weights=redmd.WAN)
