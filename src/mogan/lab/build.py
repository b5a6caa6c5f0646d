"""Train the lab's tiny family from nothing: autoencoder, flow network, text encoder and teacher, few-step student.

Each stage is a loop over freshly rendered clips that saves itself every minute and goes on where it stopped. The result
is a diffusers folder that stock ``WanPipeline`` opens, beside a ``raft/`` folder.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from tqdm import tqdm

from mogan.flow import RaftConfig, load_raft, save_raft
from mogan.lab.muon import muon_and_adamw
from mogan.lab.world import FRAMES, exact_flow, make_scene, render

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
    stop_at: int | None = None,
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

    last = steps if stop_at is None else stop_at
    bar = tqdm(range(start, last), initial=start, total=steps, desc=f"lab {name}", mininterval=5)
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
    if start < last:
        save(last)
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
    vae = _fast_convolutions(AutoencoderKLWan(**VAE_CONFIG, latents_mean=[0.0] * 24, latents_std=[1.0] * 24))
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


def train_raft(out: Path, work: Path, steps: int, stop_at: int | None = None) -> None:
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
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            predictions = raft(first, second, num_flow_updates=6)
        weights = [0.8 ** (len(predictions) - 1 - i) for i in range(len(predictions))]
        return sum(w * (p - flow).abs().mean() for w, p in zip(weights, predictions, strict=True))

    run_stage("raft", raft, loss_of, work, steps=steps, lr=1e-3, stop_at=stop_at)
    save_raft(raft, config, out / "raft")


if __name__ == "__main__":
    import sys

    stage, steps = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(int(sys.argv[3]))
    out, work = Path("runs/lab"), Path("runs/lab/work")
    work.mkdir(parents=True, exist_ok=True)
    if stage == "vae":
        train_vae(out, work, steps)
    elif stage == "raft":
        train_raft(out, work, steps, int(sys.argv[4]) if len(sys.argv) > 4 else None)
