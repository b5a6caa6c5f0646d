"""Stage 2 of the lab's family: the flow network, trained on the exact flow of rendered pairs of frames."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor
from tqdm import tqdm

from mogan.lab.clips import TRAIN_SEED, to_video
from mogan.lab.stage import fast_products, run_stage
from mogan.motion.flow import RaftConfig, refinements, save_raft
from mogan.world.scenes import Scene, exact_flow, make_scene, render


def train_raft(out: Path, work: Path, steps: int, device: torch.device) -> None:
    """Stage 2: RAFT on exact flow; after a third of the steps half of the pairs went through the autoencoder.

    Moving and still pixels weigh the same: most pixels are still, and an unweighted loss is first lowered by answering
    "nothing moves", from which RAFT does not recover. So does a turning sprite among panning backgrounds: it covers few
    pixels, so every clip's moving pixels weigh the same, however few they are.
    """
    torch.manual_seed(0)
    config = RaftConfig()
    raft = config.build().to(device)
    pools: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def loss_of(step: int, share: float) -> Tensor:
        decoded = share > 0.33 and step % 2 == 0
        if decoded not in pools:
            vae = AutoencoderKLWan.from_pretrained(out / "teacher" / "vae").to(device) if decoded else None
            pools[decoded] = flow_pairs(400 if decoded else 1000, vae)
        index = torch.randint(len(pools[decoded][0]), (12,))
        first, second, flow = (part[index].to(device) for part in pools[decoded])
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
    """Six frame pairs of each of many scenes: uint8 first and second frames ``(N, 3, H, W)``, exact flow ``(N, 2, H, W)`` in pixels.

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
            with torch.no_grad(), fast_products(vae.device):
                seen = to_video(video.to(vae.device))[None]
                video = vae.decode(vae.encode(seen).latent_dist.mean).sample[0].float().cpu()
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
