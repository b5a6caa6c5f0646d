"""Stage 1 of the lab's family: the autoencoder, trained wide and shipped narrow."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from mogan.lab.clips import TRAIN_SEED, rendered_clips, to_video
from mogan.lab.stage import fast_products, run_stage
from mogan.models.wan import fast_convolutions
from mogan.world.scenes import FRAMES

VAE_CONFIG = {
    "base_dim": 16,
    "dim_mult": [2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "is_residual": True,  # Wan 2.2's shortcuts: without them so small a codec stays blurred for hours
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
WIDE_CHANNELS, CHANNELS = 24, 10  # of the latents, while the autoencoder learns and as it ships


def train_vae(out: Path, work: Path, steps: int, device: torch.device, pool: int = 1500) -> None:
    """Stage 1: the autoencoder, by squared error with a faint pull of the latents towards unit scale.

    It learns fastest with channels to spare, and a generator learns best without them. So after two thirds of the steps
    the latents are turned to their principal axes, the strongest are kept, and the decoder alone trains on, under noise.
    """
    torch.manual_seed(0)
    wide: Any = fast_convolutions(build_vae(WIDE_CHANNELS)).to(device)
    clips = torch.cat([rendered_clips(pool // 2, TRAIN_SEED), rendered_clips(pool // 2, TRAIN_SEED, "rich")])

    def loss_of(vae: Any, noise: float, step: int, share: float) -> Tensor:
        frames, batch = ((1, 24), (5, 8), (9, 5), (17, 3))[step % (3 if share < 0.5 else 4)]
        index = torch.randint(len(clips), (batch,))
        first = int(torch.randint(FRAMES - frames + 1, (1,)))
        video = to_video(clips[index, :, first : first + frames].to(device))
        if torch.rand(()) < 0.25:  # motion pictures go through the same codec: let it see smooth coloured fields too
            video = _as_motion_picture(video)
        with fast_products(device):
            mean = vae.encode(video).latent_dist.mean
            decoded = vae.decode(mean + noise * mean.detach().std() * torch.randn_like(mean), return_dict=False)[0]
        return F.mse_loss(decoded.float(), video) + 1e-4 * mean.float().square().mean()

    wide_steps = 2 * steps // 3
    run_stage("vae", wide, partial(loss_of, wide, 0.05), work, steps=wide_steps, lr=3e-3)
    axes = principal_axes(wide, clips[:: len(clips) // 250])
    vae: Any = fast_convolutions(narrow(wide.cpu(), *axes, CHANNELS)).to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    run_stage("decoder", vae, partial(loss_of, vae, 0.1), work, steps=steps - wide_steps, lr=1.5e-3)
    vae.half().save_pretrained(out / "teacher" / "vae")


@torch.no_grad()
def principal_axes(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(C,)``, variances ``(C,)`` and principal axes ``(C, C)`` (columns, strongest first) of clips' latents."""
    device = vae.device
    with fast_products(device):
        parts = [vae.encode(to_video(part.to(device))).latent_dist.mean.float().cpu() for part in clips.split(16)]
    latents = torch.cat(parts)
    flat = latents.transpose(0, 1).flatten(1)
    variances, axes = torch.linalg.eigh(torch.cov(flat).double())
    return flat.mean(1), variances.flip(0).float(), axes.flip(1).float()


@torch.no_grad()
def narrow(vae: Any, mean: Tensor, variances: Tensor, axes: Tensor, channels: int) -> AutoencoderKLWan:
    """The same autoencoder on the first ``channels`` axes of its latents, centred, one scale for all channels.

    The axes are folded into the convolutions next to the latents, which then carry what the two 1 x 1 x 1 convolutions between
    did. ``mean`` and ``variances`` are ``(C,)``, ``axes`` ``(C, C)``, a principal axis per column. One scale: dividing every
    axis by its own deviation would make a generator work as hard for the least detail as for where things are.
    """
    scale = variances[:channels].mean().sqrt().item()
    old, new, kept = vae.state_dict(), build_vae(channels, scale), axes[:, :channels]
    wide = len(mean)
    quant = old["quant_conv.weight"][:wide, :, 0, 0, 0]
    into = torch.cat([kept.T @ quant, torch.zeros(channels, 2 * wide)])  # the deviation, which nothing reads, is exp(0)
    offset = kept.T @ (old["quant_conv.bias"][:wide] - mean)
    back = old["post_quant_conv.weight"][:, :, 0, 0, 0]
    middle = back @ mean + old["post_quant_conv.bias"]
    first = old["decoder.conv_in.weight"]
    folded = {
        "encoder.conv_out.weight": torch.einsum("ko,oixyz->kixyz", into, old["encoder.conv_out.weight"]),
        "encoder.conv_out.bias": into @ old["encoder.conv_out.bias"] + torch.cat([offset, torch.zeros(channels)]),
        "quant_conv.weight": torch.eye(2 * channels)[..., None, None, None],
        "quant_conv.bias": torch.zeros(2 * channels),
        "post_quant_conv.weight": torch.eye(channels)[..., None, None, None],
        "post_quant_conv.bias": torch.zeros(channels),
        "decoder.conv_in.weight": torch.einsum("oixyz,ik->okxyz", first, back @ kept),
        "decoder.conv_in.bias": old["decoder.conv_in.bias"] + first.sum((2, 3, 4)) @ middle,
    }
    new.load_state_dict(old | folded)
    return new


def build_vae(channels: int, scale: float = 1.0) -> AutoencoderKLWan:
    """An untrained autoencoder of the lab; ``scale`` is what a Wan pipeline divides its latents by."""
    return AutoencoderKLWan(**VAE_CONFIG, z_dim=channels, latents_mean=[0.0] * channels, latents_std=[scale] * channels)


def _as_motion_picture(video: Tensor) -> Tensor:
    """A stand-in for encoded flow: the clip's own shapes, flat-coloured on a flat ground with a saturated third channel."""
    strength = torch.rand(len(video), 1, 1, 1, 1, device=video.device)
    ground = torch.tensor([0.0, 0.0, -1.0], device=video.device).view(1, 3, 1, 1, 1)
    mask = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)).clamp(0, 1)
    direction = torch.randn(len(video), 3, 1, 1, 1, device=video.device) * strength
    return (ground + mask * direction).clamp(-1.5, 1.5)
