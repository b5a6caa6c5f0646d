"""Motion rewards (SHIFT, arXiv 2603.17426): two small vision transformers tell real pixel flux from generated.

The clipped raw logit is the reward.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogan.motion.pixel_flux import state_size


class ViT(nn.Module):
    """Tokens ``(B, L, inputs)`` to one logit ``(B,)``; without ``places`` the tokens are a set."""

    def __init__(self, inputs: int, places: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, places, width)) if places else None
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.logit = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, tokens_BLD: Float[Tensor, "b l d"]) -> Float[Tensor, " b"]:
        """Logits, positive = real."""
        hidden = self.embed(tokens_BLD)
        hidden = hidden if self.place is None else hidden + self.place
        return self.logit(self.blocks(torch.cat([self.token.expand(len(hidden), -1, -1), hidden], 1))[:, 0])[:, 0]


class MotionRewards(nn.Module):
    """SHIFT's two rewards: instantaneous (maps, cut into patches) and long-term (tracked points, as a set).

    Args:
        size: frames, height and width of the clips.
        patch: frames, height and width of a patch of the maps; must divide ``(frames - 1, height, width)``.
        width, depth, heads: of each transformer.
        clip: the range ``[r_min, r_max]`` of a reward.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        *,
        patch: tuple[int, int, int],
        width: int,
        depth: int,
        heads: int,
        clip: tuple[float, float],
    ):
        super().__init__()
        places = (size[0] - 1) // patch[0] * (size[1] // patch[1]) * (size[2] // patch[2])
        self.patch, self.clip = patch, clip
        self.instantaneous = ViT(4 * patch[0] * patch[1] * patch[2], places, width, depth, heads)
        self.long_term = ViT(state_size(size[0]), 0, width, depth, heads)

    def forward(self, maps_BCFHW: Tensor, states_BND: Tensor) -> Float[Tensor, "b 2"]:
        """Raw logits of both, positive = real, on what :class:`~mogan.motion.pixel_flux.Flux` holds."""
        cut = maps_BCFHW
        for axis, length in zip((2, 3, 4), self.patch, strict=True):
            cut = cut.unfold(axis, length, length)  # patches come first, what is in them last
        tokens = cut.movedim(1, 4).flatten(1, 3).flatten(2)
        return torch.stack([self.instantaneous(tokens), self.long_term(states_BND)], 1)

    def reward(self, maps_BCFHW: Tensor, states_BND: Tensor) -> Float[Tensor, " b"]:
        """Mean of the two raw logits, each clipped: about the log density ratio of real to generated motion."""
        return self(maps_BCFHW, states_BND).clamp(*self.clip).mean(1)
