"""The stages that train the lab's tiny family from nothing: autoencoder, flow network, text encoder and teacher.

Each stage is a loop over rendered clips that saves itself every minute and goes on where it stopped.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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

from mogan.disk.files import replacing
from mogan.lab.muon import muon_and_adamw
from mogan.models.attention import set_attention
from mogan.models.autoencoder import encode_video
from mogan.models.denoiser import Denoiser
from mogan.models.wan import fast_dtype
from mogan.motion.flow import RaftConfig, refinements, save_raft
from mogan.schedule import add_noise, shift
from mogan.world.scenes import COLOURS, DIRECTIONS, FRAMES, SHAPES, Scene, exact_flow, make_scene, render

TRAIN_SEED, HELD_OUT_SEED = 1, 2

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


def rendered_clips(count: int, seed: int, motion: str = "all", offset: int = 0) -> Tensor:
    """Render clips ``offset ... offset + count - 1`` of a world: uint8 ``(N, 3, F, H, W)``."""
    clips = [render(make_scene(seed, offset + i, motion=motion)) for i in range(count)]
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()


def to_video(clips: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return clips.float() / 127.5 - 1


def _fast_products() -> torch.autocast:
    """bf16 products where the processor has them; where it emulates them they are ten times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)


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
        with replacing(path) as new:
            torch.save({"model": model.state_dict(), "average": average, "optimizers": states, "step": step}, new)

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
    """Stage 1: the autoencoder, by squared error with a faint pull of the latents towards unit scale.

    It learns fastest with channels to spare, and a generator learns best without them. So after two thirds of the steps
    the latents are turned to their principal axes, the strongest are kept, and the decoder alone trains on, under noise.
    """
    torch.manual_seed(0)
    wide: Any = _fast_convolutions(build_vae(WIDE_CHANNELS))
    clips = torch.cat([rendered_clips(pool // 2, TRAIN_SEED), rendered_clips(pool // 2, TRAIN_SEED, "rich")])

    def loss_of(vae: Any, noise: float, step: int, share: float) -> Tensor:
        frames, batch = ((1, 24), (5, 8), (9, 5), (17, 3))[step % (3 if share < 0.5 else 4)]
        index = torch.randint(len(clips), (batch,))
        first = int(torch.randint(FRAMES - frames + 1, (1,)))
        video = to_video(clips[index, :, first : first + frames])
        if torch.rand(()) < 0.25:  # motion pictures go through the same codec: let it see smooth coloured fields too
            video = _as_motion_picture(video)
        with _fast_products():
            mean = vae.encode(video).latent_dist.mean
            decoded = vae.decode(mean + noise * mean.detach().std() * torch.randn_like(mean), return_dict=False)[0]
        return F.mse_loss(decoded.float(), video) + 1e-4 * mean.float().square().mean()

    wide_steps = 2 * steps // 3
    run_stage("vae", wide, partial(loss_of, wide, 0.05), work, steps=wide_steps, lr=3e-3)
    vae: Any = _fast_convolutions(narrow(wide, *principal_axes(wide, clips[:: len(clips) // 250]), CHANNELS))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    run_stage("decoder", vae, partial(loss_of, vae, 0.1), work, steps=steps - wide_steps, lr=1.5e-3)
    vae.half().save_pretrained(out / "teacher" / "vae")


@torch.no_grad()
def principal_axes(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(C,)``, variances ``(C,)`` and principal axes ``(C, C)`` (columns, strongest first) of clips' latents."""
    with _fast_products():
        latents = torch.cat([vae.encode(to_video(part)).latent_dist.mean.float() for part in clips.split(16)])
    flat = latents.transpose(0, 1).flatten(1)
    variances, axes = torch.linalg.eigh(torch.cov(flat).double())
    return flat.mean(1), variances.flip(0).float(), axes.flip(1).float()


@torch.no_grad()
def narrow(vae: Any, mean: Tensor, variances: Tensor, axes: Tensor, channels: int) -> AutoencoderKLWan:
    """The same autoencoder on the first ``channels`` axes of its latents, centred, one scale for all channels.

    The axes are folded into the convolutions next to the latents, which then carry what the two 1 x 1 x 1 convolutions
    between did. One scale: dividing every axis by its own deviation would make a generator work as hard for the least
    detail as for where things are.
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
    strength = torch.rand(len(video), 1, 1, 1, 1)
    ground = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1, 1)
    mask = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)).clamp(0, 1)
    direction = torch.randn(len(video), 3, 1, 1, 1) * strength
    return (ground + mask * direction).clamp(-1.5, 1.5)


def train_raft(out: Path, work: Path, steps: int) -> None:
    """Stage 2: RAFT on exact flow; after a third of the steps half of the pairs went through the autoencoder.

    Moving and still pixels weigh the same: most pixels are still, and an unweighted loss is first lowered by answering
    "nothing moves", from which RAFT does not recover. So does a turning sprite among panning backgrounds: it covers few
    pixels, so every clip's moving pixels weigh the same, however few they are.
    """
    torch.manual_seed(0)
    config = RaftConfig()
    raft = config.build()
    pools: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def loss_of(step: int, share: float) -> Tensor:
        decoded = share > 0.33 and step % 2 == 0
        if decoded not in pools:
            vae = AutoencoderKLWan.from_pretrained(out / "teacher" / "vae") if decoded else None
            pools[decoded] = flow_pairs(400 if decoded else 1000, vae)
        index = torch.randint(len(pools[decoded][0]), (12,))
        first, second, flow = (part[index] for part in pools[decoded])
        first, second = _worn(*_mirrored(to_video(first), to_video(second), flow))
        predictions = [p[:, 0] for p in refinements(raft, torch.stack([first, second], 1), 6, every=True)]
        moving = flow.square().sum(1, keepdim=True) > 0.01
        weight = (_share_of_each(moving) + _share_of_each(~moving)) / len(flow)
        discount = [0.8 ** (len(predictions) - 1 - i) for i in range(len(predictions))]
        errors = [d * (weight * (p - flow).abs()).sum() for d, p in zip(discount, predictions, strict=True)]
        return torch.stack(errors).sum() / 2

    run_stage("raft", raft, loss_of, work, steps=steps, lr=2e-3)
    save_raft(raft, config, out / "raft")


def _share_of_each(mask: Tensor) -> Tensor:
    """Weights that sum to 1 over the marked pixels of every picture."""
    return mask / mask.sum((1, 2, 3), keepdim=True).clamp(min=1)


def flow_pairs(scenes: int, vae: AutoencoderKLWan | None) -> tuple[Tensor, Tensor, Tensor]:
    """Six frame pairs of each of many scenes: uint8 first and second frames, exact flow between them.

    Turning sprites and panning cameras, the hardest to see, are twice as frequent as other motion. Half of the scenes
    are seen at half the frame rate, where things move twice as far: that is what is measured at 8 fps.
    """
    firsts, seconds, flows = [], [], []
    wanted = ("linear", "rotating", "pan", "bouncing", "rotating", "pan", "falling")
    numbers = iter(range(100 * scenes))
    for number in tqdm(range(scenes), desc="lab frame pairs", mininterval=5):
        kind, motion = wanted[number % len(wanted)], "all" if number % 5 == 0 else "rich"
        scene = next(s for n in numbers if (s := make_scene(TRAIN_SEED, n, motion=motion)).kind == kind)
        video = torch.from_numpy(render(scene)).permute(3, 0, 1, 2)
        if vae is not None:
            with torch.no_grad(), _fast_products():
                video = vae.decode(vae.encode(to_video(video)[None]).latent_dist.mean).sample[0].float()
            video = ((video + 1) * 127.5).round().clamp(0, 255).byte()
        stride = 1 + number // len(wanted) % 2
        flow = torch.from_numpy(exact_flow(every(scene, stride))[0])
        at = torch.linspace(0, len(flow) - 1, 6).round().long()
        firsts.append(video[:, at * stride].transpose(0, 1))
        seconds.append(video[:, (at + 1) * stride].transpose(0, 1))
        flows.append(flow[at])
    return torch.cat(firsts), torch.cat(seconds), torch.cat(flows)


def every(scene: Scene, stride: int) -> Scene:
    """The same scene seen at a lower frame rate."""
    sprites = tuple(replace(s, centres_F2=s.centres_F2[::stride], angles_F=s.angles_F[::stride]) for s in scene.sprites)
    camera = scene.camera_F2[::stride]
    return replace(scene, sprites=sprites, camera_F2=camera, frames=len(camera))


def _mirrored(first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror pictures, and ``flow`` in place, so that no direction is special."""
    for axis, channel in ((-1, 0), (-2, 1)):
        if torch.rand(()) < 0.5:
            first, second = first.flip(axis), second.flip(axis)
            flow.copy_(flow.flip(axis))
            flow[:, channel] *= -1
    return first, second


def _worn(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Blur, grain and exposure for every other batch: generated frames are not clean renderings."""
    if torch.rand(()) < 0.5:
        return first, second
    blur = 2 * int(torch.randint(2, (1,))) + 1
    gain, grain = 0.8 + 0.4 * torch.rand(()), 0.04 * torch.rand(())
    padded = (F.pad(x, (blur // 2,) * 4, mode="replicate") for x in (first, second))
    one, two = (gain * F.avg_pool2d(x, blur, 1) for x in padded)
    return one + grain * torch.randn_like(one), two + grain * torch.randn_like(two)


TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
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
        self.transformer = set_attention(WanTransformer3DModel(**TRANSFORMER_CONFIG))
        self.text_encoder = build_text_encoder()

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        text = F.pad(hidden, (0, 0, 0, 1))  # the last row is padding, as FoldedPadding expects
        return Denoiser(self.transformer, fast_dtype()).velocity(x, sigma, text)


def train_teacher(out: Path, work: Path, steps: int, clips: int = 8000, batch: int = 32) -> None:
    """Stage 3: text encoder and transformer by flow matching on the world's latents, prompt dropped one time in ten.

    Half of the levels are shifted as the samplers' are, half uniform: stillness is decided at low noise, where an
    outline that differs from frame to frame is all that is left to see.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_pretrained(out / "teacher" / "vae")
    latents, captions = world_latents(vae, work, clips)
    tokenizer = build_tokenizer()
    tokens = tokenizer([*captions, ""], padding="longest", return_tensors="pt")
    model = _TextToVideo()

    def loss_of(step: int, share: float) -> Tensor:
        index = torch.randint(len(latents), (batch,))
        x0 = latents[index].float()
        level = torch.rand(batch)
        sigma = torch.where(torch.rand(batch) < 0.5, shift(level, 3.0), level)
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
