"""LLIA (arXiv 2506.05806), as far as it is public: a causal student for chunks of several sizes, given its first frame.

The paper gives neither loss, levels, lengths nor rates: all numbers here were chosen.
"""

from dataclasses import replace

from mogan.config import Config
from mogan.models.causal_cache import Causal
from mogan.recipes.causal import causal_cd_lab, causal_cd_wan_1_3b
from mogan.sampling.causal_rollout import Chunked


def llia_lab() -> Config:
    """Consistency training in chunks of 1, 2 and 4 latents of the student named with ``--student``: a ``causal_cd_lab`` or
    ``self_forcing_lab`` export. Clips are those of ``mogan lab render --motion states``.
    """
    states = {"idle": "at rest", "listening": "spinning", "speaking": "bouncing"}
    return _llia(causal_cd_lab(), "llia_lab", states, warm_up=60)


def llia_wan_1_3b() -> Config:
    """The same of Wan2.1-T2V-1.3B: rates and batch as ``causal_cd_wan_1_3b`` has them, 20 latents after the first in chunks of 1,
    2 and 4. Name a ``causal_cd_wan_1_3b`` or ``self_forcing_wan_1_3b`` trained with chunks that begin with one latent.
    """
    states = {name: name for name in ("idle", "listening", "speaking")}
    return _llia(causal_cd_wan_1_3b(), "llia_wan_1_3b", states, warm_up=600)


def _llia(base: Config, name: str, states: dict[str, str], warm_up: int) -> Config:
    """A recipe of consistency that goes from level to level with the noise of real clips, without a teacher to guide."""
    config = replace(
        base,
        recipe=name,
        sigmas=(1.0, 0.6),
        rollout=Chunked(Causal(first=1, rest=1, sizes=(1, 2, 4))),
        given=1,
        states=states,
    )
    return config.changed("consistency", guidance=None, warm_up=warm_up)
