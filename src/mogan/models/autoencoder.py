"""Video to latents and back through Wan's autoencoder, whole or in a window, with gradient.

Latents are always normalised by the autoencoder's stored mean and deviation. Shapes: video ``B 3 F H W`` in [-1, 1],
latents ``B C F H W``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mogan.devices import sent
from mogan.models.host import once_more


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        sent(torch.tensor(numbers).view(shape), like.device)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _recurrent(step: Callable, chunks: list[tuple[Tensor, bool]], cache: list, checkpointed: bool) -> Iterator[Tensor]:
    """Run ``step(chunk, first, *cache) -> (out, *cache)`` along time; each step may be recomputed in the backward pass.

    diffusers hides the convolutions' memory in the module and refuses checkpointing; passing it explicitly makes every
    step a pure function, which gives the same frames and gradients bit for bit. ``cache`` is left as the last step made it.
    """
    for chunk, first in chunks:
        if checkpointed and torch.is_grad_enabled():
            out, *cache[:] = checkpoint(
                step, chunk, first, *cache, use_reentrant=False, context_fn=lambda: (nullcontext(), once_more())
            )
        else:
            out, *cache[:] = step(chunk, first, *cache)
        yield out


def _decoder_step(vae: AutoencoderKLWan, chunk: Tensor, first: bool, *before: Any) -> tuple[Tensor, ...]:
    cache = list(before)
    return vae.decoder(chunk, feat_cache=cache, feat_idx=[0], first_chunk=first), *cache


def _encoder_step(vae: AutoencoderKLWan, chunk: Tensor, first: bool, *before: Any) -> tuple[Tensor, ...]:
    cache = list(before)
    return vae.encoder(chunk, feat_cache=cache, feat_idx=[0]), *cache


def _empty_cache(module: nn.Module) -> list:
    return [None] * sum(isinstance(m, WanCausalConv3d) for m in module.modules())


def decode_window(
    vae: AutoencoderKLWan,
    latent_BCFHW: Float[Tensor, "b c f h w"],
    start: int = 0,
    length: int | None = None,
    checkpointing: bool = True,
) -> Float[Tensor, "b 3 g h2 w2"]:
    """Decode latent frames ``start ... start + length - 1`` exactly as a full decode would, and stop.

    The decoder is recurrent: the frames before the window are decoded without gradient for their state alone, which is
    detached (truncated back-propagation, MoGAN appendix A). With ``checkpointing`` each latent frame inside is recomputed in
    the backward pass, so memory does not grow with the window either. A window from the start has ``1 + 4 (length - 1)`` frames, any other ``4 length``.

    Returns fp32 video, clamped to [-1, 1] as the stock decoder does.
    """
    return torch.cat(list(_window(vae, latent_BCFHW, start, length, checkpointing)), 2)


def _window(
    vae: AutoencoderKLWan, latent_BCFHW: Tensor, start: int, length: int | None, checkpointing: bool
) -> Iterator[Tensor]:
    """The frames of :func:`decode_window`, those of one latent frame at a time."""
    total = latent_BCFHW.shape[2]
    length = total - start if length is None else length
    if not (0 <= start and length > 0 and start + length <= total):
        raise ValueError(f"window {start}..{start + length} does not lie within {total} latent frames")
    mean, deviation = _statistics(vae, latent_BCFHW)
    z = (latent_BCFHW[:, :, : start + length].float() * deviation + mean).to(vae.dtype)
    x = vae.post_quant_conv(z)
    step = partial(_decoder_step, vae)
    chunks = [(x[:, :, i : i + 1], i == 0) for i in range(start + length)]
    cache = _empty_cache(vae.decoder)
    with torch.no_grad():
        for _ in _recurrent(step, chunks[:start], cache, checkpointed=False):
            pass
    for frames in _recurrent(step, chunks[start:], cache, checkpointed=checkpointing):
        video = frames if vae.config.patch_size is None else unpatchify(frames, patch_size=vae.config.patch_size)
        yield video.float().clamp(-1.0, 1.0)


@torch.no_grad()
def stream_video(vae: AutoencoderKLWan, latent_BCFHW: Tensor) -> Iterator[Float[Tensor, "b 3 g h w"]]:
    """A whole clip in [-1, 1], ``(B, 3, 1 or 4, H, W)`` at a time, without gradient: 1 frame, then 4 for every further latent.

    The same frames as :func:`decode_video`, bit for bit, and never more than those of one latent frame in memory.
    """
    yield from _window(vae, latent_BCFHW, 0, None, checkpointing=False)


@torch.no_grad()
def stream_chunks(
    vae: AutoencoderKLWan, chunks: Iterable[Float[Tensor, "b c f h w"]]
) -> Iterator[Float[Tensor, "b 3 g h w"]]:
    """:func:`stream_video` of a clip whose latents come a few at a time: each is decoded as soon as it is there."""
    cache, first = _empty_cache(vae.decoder), True
    for latents in chunks:
        mean, deviation = _statistics(vae, latents)
        x = vae.post_quant_conv((latents.float() * deviation + mean).to(vae.dtype))
        for i in range(x.shape[2]):
            frames, *cache = _decoder_step(vae, x[:, :, i : i + 1], first, *cache)
            video = frames if vae.config.patch_size is None else unpatchify(frames, patch_size=vae.config.patch_size)
            yield video.float().clamp(-1.0, 1.0)
            first = False


def decode_video(vae: AutoencoderKLWan, latent_BCFHW: Tensor) -> Tensor:
    """Decode a whole clip of ``F`` latent frames: ``(B, 3, 4 F - 3, H, W)``, fp32 in [-1, 1]."""
    return decode_window(vae, latent_BCFHW)


def encode_video(
    vae: AutoencoderKLWan, video_BCFHW: Float[Tensor, "b 3 f h w"], checkpointing: bool = True
) -> Float[Tensor, "b c g h2 w2"]:
    """Encode ``4 k + 1`` frames to ``k + 1`` normalised latent frames (mean of the posterior), fp32, with gradient."""
    if video_BCFHW.shape[2] % 4 != 1:
        raise ValueError(f"a clip must have 4 k + 1 frames to be encoded, not {video_BCFHW.shape[2]}")
    x = video_BCFHW.to(vae.dtype)
    if vae.config.patch_size is not None:
        x = patchify(x, patch_size=vae.config.patch_size)
    chunks = [(x[:, :, :1], True)] + [(x[:, :, i : i + 4], False) for i in range(1, x.shape[2], 4)]
    encoded = _recurrent(partial(_encoder_step, vae), chunks, _empty_cache(vae.encoder), checkpointing)
    moments = vae.quant_conv(torch.cat(list(encoded), 2))
    mean, deviation = _statistics(vae, video_BCFHW)
    return (moments.chunk(2, dim=1)[0].float() - mean) / deviation
