"""The stages that train the lab's tiny family from nothing: autoencoder, flow network, text encoder and teacher.

Each stage is a loop over rendered clips that saves itself every minute and goes on where it stopped.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from mogan.denoiser import Denoiser
from mogan.flow import RaftConfig, save_raft
from mogan.lab.muon import muon_and_adamw
from mogan.lab.world import COLOURS, DIRECTIONS, FRAMES, SHAPES, exact_flow, make_scene, render
from mogan.schedule import add_noise, shift
from mogan.wan import encode_video, fast_dtype, fold_padding

TRAIN_SEED, HELD_OUT_SEED = 1, 2

VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 24,
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


def rendered_clips(count: int, seed: int, motion: str = "all", offset: int = 0) -> Tensor:
    """Render clips ``offset ... offset + count - 1`` of a world: uint8 ``(N, 3, F, H, W)``."""
    clips = [render(make_scene(seed, offset + i, motion=motion)) for i in range(count)]
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()


def to_video(clips: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return clips.float() / 127.5 - 1


def run_stage(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, float], Tensor],
    work: Path,
    *,
    steps: int,
    lr: float,
    is_matrix: Callable[[str, nn.Parameter], bool] = lambda name, p: p.ndim >= 2,
    ema_decay: float = 0.995,
) -> nn.Module:
    """Minimise ``loss_of(step, share_done)`` with Muon, warm-up and a cosine; save every minute, resume by itself.

    Returns the model holding its averaged weights.
    """
    optimizers = muon_and_adamw(model, lr, is_matrix)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    path, start, saved = work / f"{name}.pt", 0, time.monotonic()
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        average, start = state["average"], state["step"]

    def save(step: int) -> None:
        states = [o.state_dict() for o in optimizers]
        torch.save({"model": model.state_dict(), "average": average, "optimizers": states, "step": step}, f"{path}.new")
        Path(f"{path}.new").replace(path)

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"lab {name}", mininterval=5)
    for step in bar:
        torch.manual_seed(step)
        share = step / steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        loss = loss_of(step, share)
        if not torch.isfinite(loss):
            raise RuntimeError(f"lab {name}: loss is {loss.item()} at step {step}; the last good state is {path}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(ema_decay, (1 + step) / (10 + step))
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if time.monotonic() - saved > 60:
            save(step + 1)
            saved = time.monotonic()
    if start < steps:
        save(steps)
    model.load_state_dict(average)
    return model


def _fast_convolutions(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return model


def train_vae(out: Path, work: Path, steps: int, pool: int = 1500) -> None:
    """Stage 1: the autoencoder, by squared error with a faint pull of the latents towards unit scale."""
    torch.manual_seed(0)
    vae: Any = _fast_convolutions(AutoencoderKLWan(**VAE_CONFIG, latents_mean=[0.0] * 24, latents_std=[1.0] * 24))
    clips = torch.cat([rendered_clips(pool // 2, TRAIN_SEED), rendered_clips(pool // 2, TRAIN_SEED, "rich")])

    def loss_of(step: int, share: float) -> Tensor:
        frames, batch = ((1, 24), (5, 8), (9, 5), (17, 3))[step % (3 if share < 0.5 else 4)]
        index = torch.randint(len(clips), (batch,))
        first = int(torch.randint(FRAMES - frames + 1, (1,)))
        video = to_video(clips[index, :, first : first + frames])
        if torch.rand(()) < 0.25:  # motion pictures go through the same codec: let it see smooth coloured fields too
            video = _as_motion_picture(video)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(video).latent_dist.mean
            decoded = vae.decode(mean + 0.05 * mean.detach().std() * torch.randn_like(mean), return_dict=False)[0]
        return F.mse_loss(decoded.float(), video) + 1e-4 * mean.float().square().mean()

    run_stage("vae", vae, loss_of, work, steps=steps, lr=3e-3)
    _normalise_latents(vae, clips)
    half = vae.half()
    half.save_pretrained(out / "teacher" / "vae")


def polish_decoder(out: Path, work: Path, steps: int, pool: int = 1500) -> None:
    """Stage 5: sharpen the decoder alone; the latents stay, so everything trained on them stays valid."""
    vae: Any = _fast_convolutions(AutoencoderKLWan.from_pretrained(out / "teacher" / "vae")).float()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    clips = torch.cat([rendered_clips(pool // 2, TRAIN_SEED), rendered_clips(pool // 2, TRAIN_SEED, "rich")])

    def loss_of(step: int, share: float) -> Tensor:
        frames, batch = ((5, 10), (17, 3))[step % 2]
        index = torch.randint(len(clips), (batch,))
        first = int(torch.randint(FRAMES - frames + 1, (1,)))
        video = to_video(clips[index, :, first : first + frames])
        if torch.rand(()) < 0.2:
            video = _as_motion_picture(video)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = vae.encode(video).latent_dist.mean
            decoded = vae.decode(mean + 0.03 * mean.std() * torch.randn_like(mean), return_dict=False)[0].float()
        return F.mse_loss(decoded, video) + 0.05 * F.l1_loss(decoded, video)

    run_stage("decoder", vae, loss_of, work, steps=steps, lr=2e-3)
    vae.half().save_pretrained(out / "teacher" / "vae")


def _as_motion_picture(video: Tensor) -> Tensor:
    """A stand-in for encoded flow: the clip's own shapes, flat-coloured on a flat ground with a saturated third channel."""
    strength = torch.rand(len(video), 1, 1, 1, 1)
    ground = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1, 1)
    mask = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)).clamp(0, 1)
    direction = torch.randn(len(video), 3, 1, 1, 1) * strength
    return (ground + mask * direction).clamp(-1.5, 1.5)


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKLWan, clips: Tensor) -> None:
    """Store the latents' mean and deviation per channel in the config, where every Wan pipeline looks for them."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([vae.encode(to_video(part)).latent_dist.mean.float() for part in clips[:256].split(16)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )


def train_raft(out: Path, work: Path, steps: int) -> None:
    """Stage 2: RAFT on exact flow; the last third of the steps also sees clips that went through the autoencoder."""
    torch.manual_seed(0)
    config = RaftConfig()
    raft = config.build()
    frozen_vae = out / "teacher" / "vae"
    pool: dict[bool, tuple[Tensor, Tensor]] = {}

    def pairs(decoded: bool) -> tuple[Tensor, Tensor]:
        if decoded not in pool:
            scenes = [make_scene(TRAIN_SEED, i, motion=("all", "rich", "rich")[i % 3]) for i in range(900)]
            clips = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 4, 1, 2, 3)
            if decoded:
                vae = AutoencoderKLWan.from_pretrained(frozen_vae)
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    parts = [vae.decode(vae.encode(to_video(p)).latent_dist.mean).sample for p in clips.split(16)]
                clips = ((torch.cat(parts).float().clamp(-1, 1) + 1) * 127.5).round().byte()
            pool[decoded] = clips, torch.from_numpy(np.stack([exact_flow(s)[0] for s in scenes]))
        return pool[decoded]

    def loss_of(step: int, share: float) -> Tensor:
        clips, flows = pairs(share > 0.66 and step % 2 == 0)
        clip, frame = torch.randint(len(clips), (12,)), torch.randint(FRAMES - 1, (12,))
        first, second, flow = to_video(clips[clip, :, frame]), to_video(clips[clip, :, frame + 1]), flows[clip, frame]
        for axis, channel in ((-1, 0), (-2, 1)):  # mirror, so that no direction is special
            if torch.rand(()) < 0.5:
                first, second, flow = first.flip(axis), second.flip(axis), flow.flip(axis)
                flow[:, channel] *= -1
        if torch.rand(()) < 0.5:  # blur, grain and exposure: generated frames are not clean renderings
            blur = 2 * int(torch.randint(2, (1,))) + 1
            pad = blur // 2
            first, second = (F.avg_pool2d(F.pad(x, (pad,) * 4, mode="replicate"), blur, 1) for x in (first, second))
            gain, grain = 0.8 + 0.4 * torch.rand(()), 0.04 * torch.rand(())
            first, second = (gain * x + grain * torch.randn_like(x) for x in (first, second))
        predictions = raft(first, second, num_flow_updates=6)
        weights = [0.8 ** (len(predictions) - 1 - i) for i in range(len(predictions))]
        return sum(w * (p - flow).abs().mean() for w, p in zip(weights, predictions, strict=True))

    run_stage("raft", raft, loss_of, work, steps=steps, lr=1e-3)
    save_raft(raft, config, out / "raft")


TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 24,
    "out_channels": 24,
    "text_dim": 64,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}


def caption_words() -> list[str]:
    """Every word the world can say, and those of the discriminator's fixed prompt."""
    text = "a and the camera pans over at rest moving bouncing falling spinning video with good motion"
    return sorted({*text.split(), *COLOURS, *SHAPES, *DIRECTIONS})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, ``</s>`` at the end as T5 has it."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *caption_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A small random UMT5 encoder for :func:`build_tokenizer`."""
    config = UMT5Config(
        vocab_size=3 + len(caption_words()), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config)


def world_latents(vae: AutoencoderKLWan, work: Path, count: int) -> tuple[Tensor, list[str]]:
    """Latents and captions of the teacher's world, encoded once and kept in ``work``."""
    path = work / "latents.safetensors"
    captions = [make_scene(TRAIN_SEED, i).caption for i in range(count)]
    if not path.is_file() or len(load_file(path)["latents"]) != count:
        vae = vae.to(fast_dtype())
        parts = []
        with torch.no_grad():
            for first in tqdm(range(0, count, 50), desc="lab latents", mininterval=5):
                clips = rendered_clips(min(50, count - first), TRAIN_SEED, offset=first)
                parts.append(encode_video(vae, to_video(clips)).half())
        save_file({"latents": torch.cat(parts)}, path)
    return load_file(path)["latents"], captions


class _TextToVideo(nn.Module):
    """Transformer and text encoder trained together; afterwards the text encoder is frozen for good."""

    def __init__(self):
        super().__init__()
        self.transformer = fold_padding(WanTransformer3DModel(**TRANSFORMER_CONFIG))
        self.text_encoder = build_text_encoder()

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        text = F.pad(hidden, (0, 0, 0, 1))  # the last row is padding, as FoldedPadding expects
        return Denoiser(self.transformer, fast_dtype()).velocity(x, sigma, text)


def train_teacher(out: Path, work: Path, steps: int, clips: int = 8000, batch: int = 16) -> None:
    """Stage 3: text encoder and transformer by flow matching on the world's latents, prompt dropped one time in ten."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_pretrained(out / "teacher" / "vae")
    latents, captions = world_latents(vae, work, clips)
    tokenizer = build_tokenizer()
    tokens = tokenizer([*captions, ""], padding="longest", return_tensors="pt")
    model = _TextToVideo()

    def loss_of(step: int, share: float) -> Tensor:
        index = torch.randint(len(latents), (batch,))
        x0 = latents[index].float()
        sigma = shift(torch.rand(batch), 3.0)
        noise = torch.randn_like(x0)
        index = torch.where(torch.rand(batch) < 0.1, len(captions), index)
        ids, mask = tokens.input_ids[index], tokens.attention_mask[index]
        velocity = model(add_noise(x0, noise, sigma), sigma, ids, mask)
        return F.mse_loss(velocity, noise - x0)

    run_stage("teacher", model, loss_of, work, steps=steps, lr=2e-3, is_matrix=_hidden_matrix, ema_decay=0.998)
    model.transformer.half().save_pretrained(out / "teacher" / "transformer")
    model.text_encoder.save_pretrained(out / "teacher" / "text_encoder")
    tokenizer.save_pretrained(out / "teacher" / "tokenizer")


def _hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return ".block" in name and parameter.ndim == 2 and "table" not in name and "embed" not in name
