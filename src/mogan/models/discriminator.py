"""The discriminator: the first blocks of the video transformer, learned tokens that read its features, one logit.

MoGAN, section 4 and appendix A, with heads after Seaweed-APT (arXiv 2501.08316): at three depths one learned token
attends to the features, a small MLP follows, and the three answers meet in a final MLP. The noise level and the prompt
that the transformer is told are fixed. Or, with :class:`LevelHeads`, what a whole transformer that does not learn sees of
noisy latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mogan.models.conditions import channels_beside
from mogan.models.denoiser import Denoiser, taps
from mogan.sharding import all_tokens

PROMPT = "a video with good motion"  # MoGAN, section 3.3: what the discriminator is always told


class TokenHead(nn.Module):
    """One learned token that attends to a feature map, then a small MLP; both residual. Returns ``(B, D)``."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm_features = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, features_BLD: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        """Read one feature map."""
        token = self.token.expand(len(features_BLD), -1, -1)
        keys = self.norm_features(features_BLD)
        token = token + self.attention(token, keys, keys, need_weights=False)[0]
        return (token + self.mlp(token))[:, 0]


class Heads(nn.Module):
    """Token heads and their final MLP on somebody else's features: one logit per clip, in fp32.

    Args:
        width: of the features; ``heads``: of attention; ``count``: how many feature maps are read.
        outputs: logits among which a call chooses.
    """

    def __init__(self, width: int, heads: int, count: int, outputs: int = 1):
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(width, heads, 4 * width) for _ in range(count))
        self.final = final_layers(width, count, outputs)

    def forward(self, features: Sequence[Float[Tensor, "b l d"]], number: int = 0) -> Float[Tensor, " b"]:
        """Logits; ``number`` of those that there are."""
        read = [head(f) for head, f in zip(self.heads, features, strict=True)]
        return self.final(torch.cat(read, dim=-1))[:, number]


def final_layers(width: int, count: int, outputs: int = 1) -> nn.Sequential:
    """The MLP in which the answers of ``count`` heads meet."""
    return nn.Sequential(
        nn.LayerNorm(width * count), nn.Linear(width * count, width), nn.SiLU(), nn.Linear(width, outputs)
    )


class Discriminator(nn.Module):
    """Real or generated, as one logit per clip (positive = real).

    Args:
        transformer: a ``WanTransformer3DModel``; its first ``blocks`` blocks become the trunk (the rest is dropped).
        text_1LD: embedding of the fixed prompt, from :func:`mogan.models.attention.stack_text`.
        blocks: how many blocks to keep (MoGAN: 16 of 30).
        tap_at: after which blocks heads read, ascending (MoGAN: 7, 13, 15).
        sigma: the noise level the transformer is told (MoGAN: 0, whatever the input).
        dtype: dtype of the matrix products, unless a call says otherwise.
    """

    def __init__(
        self,
        transformer: Any,
        text_1LD: Float[Tensor, "1 l d"],
        *,
        blocks: int,
        tap_at: Sequence[int],
        sigma: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if max(tap_at) >= blocks or blocks > len(transformer.blocks):
            raise ValueError(f"taps {tuple(tap_at)} must lie below {blocks} of {len(transformer.blocks)} blocks")
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        transformer.blocks = transformer.blocks[:blocks]
        for unused in (transformer.proj_out.weight, transformer.proj_out.bias, transformer.scale_shift_table):
            unused.requires_grad_(False)
        self.transformer: Any = transformer
        self.tap_at = tuple(tap_at)
        self.sigma = sigma
        self.dtype = dtype
        heads = transformer.config.num_attention_heads
        self.heads = nn.ModuleList(TokenHead(width, heads, 4 * width) for _ in tap_at)
        self.final = final_layers(width, len(tap_at))
        self.beside = channels_beside(transformer.config)  # of an image-to-video trunk, which is given no frame here
        self.text_1LD: Tensor
        self.register_buffer("text_1LD", text_1LD)

    def forward(
        self,
        observation_BCFHW: Float[Tensor, "b c f h w"],
        sigma_B: Float[Tensor, " b"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, " b"]:
        """Logits of a batch of observations (encoded flow, or latents for the latent-space ablation).

        ``sigma_B`` replaces the fixed level the trunk is told; the caller has then noised the observations to it.
        ``dtype`` replaces the network's own for this call.
        """
        batch = len(observation_BCFHW)
        fixed = torch.full((batch,), self.sigma, device=observation_BCFHW.device)
        timestep = 1000.0 * (fixed if sigma_B is None else sigma_B)
        text = self.text_1LD.expand(batch, -1, -1)
        dtype = dtype or self.dtype
        if self.beside:
            observation_BCFHW = F.pad(observation_BCFHW, (0, 0, 0, 0, 0, 0, 0, self.beside))
        with torch.autocast(observation_BCFHW.device.type, dtype, enabled=dtype != torch.float32):
            with taps(self.transformer.blocks, self.tap_at) as features:
                self.transformer(observation_BCFHW, timestep, text, return_dict=False)
            read = [head(f) for head, f in zip(self.heads, features, strict=True)]
        return self.final(torch.cat(read, dim=-1).float())[:, 0]


class LevelHeads(nn.Module):
    """A head per noise level on features of a frozen transformer: a learned token that attends to them, then a logit; fp32.

    AccVideo (arXiv 2503.19462) has small convolutions in their place.

    Args:
        width: of the transformer; ``attention``: its attention heads.
        blocks: after which of its blocks each head reads.
    """

    def __init__(self, width: int, attention: int, blocks: Sequence[int]):
        super().__init__()
        self.blocks = tuple(blocks)
        self.heads = nn.ModuleList(
            nn.Sequential(TokenHead(width, attention, width), nn.LayerNorm(width), nn.Linear(width, 1)) for _ in blocks
        )

    def forward(self, features_BLD: Float[Tensor, "b l d"], number: int) -> Float[Tensor, " b"]:
        """Logits by the head of one level, positive = real."""
        return self.heads[number](features_BLD.float())[:, 0]


def features_of(
    denoiser: Denoiser,
    block: int,
    latents_BCFHW: Float[Tensor, "b c f h w"],
    sigma_B: Float[Tensor, " b"],
    text_BLD: Float[Tensor, "b l d"],
) -> Float[Tensor, "b l d"]:
    """What a block returns of latents at the level that the transformer is told."""
    with taps(denoiser.transformer.blocks, (block,)) as features:
        denoiser.velocity(latents_BCFHW, sigma_B, text_BLD)
    return all_tokens(features[0], denoiser.transformer)


def generator_loss(fake_logits: Float[Tensor, " b"]) -> Tensor:
    """``E softplus(-D(fake))``, a scalar (MoGAN eq. 5)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Float[Tensor, " b"], fake_logits: Float[Tensor, " b"]) -> Tensor:
    """``E [softplus(-D(real)) + softplus(D(fake))]``, a scalar (MoGAN eq. 4)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def approximate_penalty(logits: Tensor, noisy_logits: Tensor, sigma: float, normalise: bool) -> Tensor:
    """Approximate R1 (real input) or R2 (generated input): ``E (D(o) - D(o + sigma n))^2`` (MoGAN eq. 6-7).

    Logits are ``(B,)``, the penalty a scalar. For small ``sigma`` this is ``sigma^2 ||grad D||^2``. As printed its effective
    weight is ``weight * sigma^2``, 3e-5 with MoGAN's values; ``normalise`` divides the difference by ``sigma`` so that the
    weight is the weight.

    Both logits must come from fp32 products: at the paper's sigma of 0.01 the difference is as small as what bf16 rounds
    off, and an eighth of that, TF32's part, is still too much for its gradient.
    """
    difference = logits - noisy_logits
    return (difference / sigma if normalise else difference).square().mean()
