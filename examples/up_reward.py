"""A reward of your own: clips in which things rise weigh more in distribution matching.

mogan train up_reward:up_lab --data CACHE --out runs/up
"""

from dataclasses import replace

from mogan.motion.estimators import load_flow
from mogan.recipes import redmd_lab


def rising(device):
    """Called once with the device; returns the reward, which is given clips (B, 3, F, H, W) in [-1, 1] and their prompts."""
    flow = load_flow("lab", device=device)  # RAFT weights by their name in `mogan weights list` for other models

    def reward(video, prompts):
        up = -flow(video)[:, 1]  # channels are (u right, v down), pixels per frame
        return up.clamp(min=0).flatten(1).topk(up[0].numel() // 20).values.mean(1)  # the 5 % that rise fastest

    return reward


def up_lab():
    """Re-DMD with that reward, measured in deviations over clips of the teacher."""
    weights = replace(redmd_lab().objectives["dmd"].weights, reward="up_reward:rising")
    return replace(redmd_lab(), recipe="up_lab", iterations=40).changed("dmd", weights=weights)
