"""Re-DMD, the distillation half of Reward Forcing (arXiv 2512.04678), on the bidirectional student."""

from dataclasses import replace

from mogan.config import Config
from mogan.objectives.redmd import WeightsConfig
from mogan.recipes.dmd import dmd2_wan_1_3b, dmd_lab

BETA = 0.5  # the paper's; its ablation has 1 and 1/5 beside it
LAB = WeightsConfig(beta=BETA, flow="lab", flow_iterations=4)
WAN = WeightsConfig(
    beta=BETA,
    flow="raft_large_C_T_SKHT_V2.pth",  # as mogan_wan_1_3b; the paper's reward is a vision-language model's
    flow_iterations=12,
)


def redmd_lab() -> Config:
    """The lab's student by DMD as in ``dmd_lab``, for 160 iterations more, its clips weighted by how far things move in them."""
    return replace(dmd_lab(), recipe="redmd_lab", post_trains=True, iterations=160).changed("dmd", weights=LAB)


def redmd_wan_1_3b() -> Config:
    """A 3-step Wan2.1-T2V-1.3B, gone on with by weighted DMD; all but the weights is ``dmd2_wan_1_3b``'s.

    The paper trains a causal student of four steps from a teacher of 14 B for 600 iterations of one update (lr 2e-6) and five of
    the fake score (4e-7), batch 64, beta 1/2, weights of VideoAlign's motion quality, not normalised. Here the student is
    bidirectional and has been distilled, so 600 updates of its clips are more than it was made with: chosen, 200.
    """
    return replace(dmd2_wan_1_3b(), recipe="redmd_wan_1_3b", post_trains=True).changed("dmd", weights=WAN)
