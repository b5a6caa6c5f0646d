"""One DMD update of ours beside that of other public code, both on random weights of one shape, as ratios of processor time.

    git clone https://github.com/NVlabs/FastGen ~/FastGen && git clone https://github.com/guandeh17/Self-Forcing ~/Self-Forcing
    pip install ...                                  # what they need
    python benchmarks/peers.py --fastgen ~/FastGen --self-forcing ~/Self-Forcing
    python benchmarks/peers.py --fastgen ~/FastGen --frames 9 --side 32 --text 100

Nothing of theirs is changed but where they ask for a GPU or for weights: their loss functions are called on their own network
classes. An update is one step of the student from noise with its gradient, a guided teacher, the fake score, and the backward
pass; or one of the fake score. Loading, optimisers and logs are left out. Each update of theirs is followed by one of ours.

Prompts have so many tokens; theirs are padded to 512 rows, as their code does with Wan's. ``--equal-text`` gives both the short
text. Networks compute in fp32, or under bf16 autocast with ``--bf16``.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from mogan.data.batches import Batch
from mogan.models.attention import TEXT_LENGTH, set_attention, stack_text
from mogan.models.denoiser import Denoiser
from mogan.objectives.dmd import DMD, DMDConfig
from mogan.sampling.rollout import Rollout

Updates = dict[str, Callable[[], Any]]  # a loss with its backward pass, by who learns
GUIDANCE = 3.0


def network_settings(given: argparse.Namespace) -> dict[str, Any]:
    """Of a Wan transformer; the lab's, unless the width is another."""
    heads = given.width // 32
    return {
        "attention_head_dim": 32, "num_attention_heads": heads, "num_layers": given.layers, "ffn_dim": 4 * given.width,
        "in_channels": given.channels, "out_channels": given.channels, "text_dim": 64, "freq_dim": 128, "rope_max_seq_len": 64,
    }  # fmt: skip


def ours(given: argparse.Namespace, rows: int) -> Updates:
    """Losses of this package."""
    dtype = torch.bfloat16 if given.bf16 else torch.float32

    def denoiser() -> Denoiser:
        return Denoiser(set_attention(WanTransformer3DModel(**network_settings(given))), dtype)

    student, teacher, fake = denoiser(), denoiser().requires_grad_(False), denoiser()
    text = stack_text(torch.randn(given.batch, rows, 64))
    dmd = DMD(teacher, fake, stack_text(torch.randn(1, rows, 64)), DMDConfig(guidance=GUIDANCE, shift=1.0))
    batch, noise = Batch(ids=[], prompts=[], text=[]), torch.randn(shape(given))
    level, draws = torch.full((given.batch,), 0.999), torch.Generator().manual_seed(0)

    def rollout(learns: bool) -> Rollout:
        with nullcontext() if learns else torch.no_grad():
            return Rollout(student(noise, level, text), 0, text)

    return {
        "student": lambda: dmd.student_loss(rollout(True), batch, draws)[0].backward(),
        "fake score": lambda: dmd.fake_score_loss(rollout(False), batch, draws)[0].backward(),
    }


def fastgen(root: Path, given: argparse.Namespace, rows: int) -> Updates:
    """FastGen's ``DMD2Model`` without its discriminator."""
    sys.path.insert(0, str(root))
    from fastgen.methods.distribution_matching.dmd2 import DMD2Model
    from fastgen.networks.Wan.network import Wan

    with tempfile.TemporaryDirectory() as folder:  # their network knows its size by the folder's name
        home = Path(folder) / "Wan2.1-T2V-1.3B-Diffusers"
        WanTransformer3DModel(**network_settings(given)).save_config(home / "transformer")
        os.environ |= {"HF_HOME": folder, "LOCAL_FILES_ONLY": "true"}
        nets = [
            Wan(str(home), load_pretrained=False, enable_logvar_linear=False, disable_grad_ckpt=True) for _ in range(3)
        ]
    model = object.__new__(DMD2Model)
    torch.nn.Module.__init__(model)
    model.device, model.precision = torch.device("cpu"), torch.float32
    model.config = SimpleNamespace(
        gan_loss_weight_gen=0.0, gan_r1_reg_weight=0.0, guidance_scale=GUIDANCE, skip_layers=None, fake_score_pred_type=None,
        student_sample_steps=1,
    )  # fmt: skip
    model.net, model.teacher, model.fake_score = nets
    model.teacher.requires_grad_(False)
    noise, text = torch.randn(shape(given)), torch.randn(given.batch, rows, 64)
    first = torch.full((given.batch,), 0.999, dtype=torch.float64)

    def levels() -> torch.Tensor:
        return 0.02 + 0.96 * torch.rand(given.batch, dtype=torch.float64)

    def student() -> None:
        model.fake_score.requires_grad_(False)
        own = {"condition": text, "neg_condition": text, "data": {"real": noise}}
        losses, _ = model._student_update_step(noise, first, levels(), torch.randn_like(noise), **own)
        losses["total_loss"].backward()

    def fake() -> None:
        model.fake_score.requires_grad_(True)
        own = {"real_data": noise, "condition": text}
        losses, _ = model._fake_score_discriminator_update_step(noise, first, levels(), torch.randn_like(noise), **own)
        losses["total_loss"].backward()

    return {"student": student, "fake score": fake}


def self_forcing(root: Path, given: argparse.Namespace, rows: int) -> Updates:
    """Self-Forcing's ``DMD`` with a student that sees the whole clip: theirs is causal, ours here is not."""
    sys.path.insert(0, str(root))
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0  # asked for when their modules are imported
    from model.dmd import DMD as Theirs
    from utils.loss import FlowPredLoss
    from utils.wan_wrapper import WanDiffusionWrapper
    from wan.modules import model as wan
    from wan.modules.attention import attention

    wan.flash_attention = partial(attention, dtype=torch.bfloat16 if given.bf16 else torch.float32)
    own = network_settings(given)
    tokens = given.frames * (given.side // 2) ** 2

    def network() -> Any:
        found = object.__new__(WanDiffusionWrapper)
        torch.nn.Module.__init__(found)
        found.model = wan.WanModel(
            text_len=rows, in_dim=given.channels, out_dim=given.channels, dim=given.width, ffn_dim=own["ffn_dim"], freq_dim=128,
            text_dim=64, num_heads=own["num_attention_heads"], num_layers=given.layers,
        )  # fmt: skip
        found.uniform_timestep, found.seq_len = True, tokens
        from utils.scheduler import FlowMatchScheduler

        found.scheduler = FlowMatchScheduler(shift=8.0, sigma_min=0.0, extra_one_step=True)
        found.scheduler.set_timesteps(1000, training=True)
        found.post_init()
        return found

    model = object.__new__(Theirs)
    torch.nn.Module.__init__(model)
    model.generator, model.real_score, model.fake_score = network(), network(), network()
    model.real_score.requires_grad_(False)
    model.scheduler, model.device = model.generator.get_scheduler(), "cpu"
    model.scheduler.alphas_cumprod = None
    model.args, model.denoising_loss_func = SimpleNamespace(denoising_loss_type="flow"), FlowPredLoss()
    settings = {
        "num_frame_per_block": 1, "min_step": 20, "max_step": 980, "num_train_timestep": 1000, "timestep_shift": 1.0,
        "ts_schedule": False, "ts_schedule_max": False, "min_score_timestep": 0, "fake_guidance_scale": 0.0,
        "real_guidance_scale": GUIDANCE - 1, "independent_first_frame": False,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(model, name, value)
    clip = shape(given)
    noise = torch.randn(clip[0], clip[2], clip[1], clip[3], clip[4])
    told, untold = ({"prompt_embeds": torch.randn(given.batch, rows, 64)} for _ in range(2))

    def one_step(**_: Any) -> tuple:
        when = torch.full((given.batch, given.frames), 999.0)
        sample = model.generator(noisy_image_or_video=noise, conditional_dict=told, timestep=when)[1]
        return sample, None, 1000, 0

    model._run_generator = one_step
    also = {"image_or_video_shape": list(noise.shape), "conditional_dict": told, "unconditional_dict": untold}

    def student() -> None:
        model.generator_loss(**also, clean_latent=None)[0].backward()

    def fake() -> None:
        model.critic_loss(**also, clean_latent=None)[0].backward()

    return {"student": student, "fake score": fake}


def shape(given: argparse.Namespace) -> tuple[int, ...]:
    """Of the latents: B C F H W."""
    return given.batch, given.channels, given.frames, given.side, given.side


def timed(update: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    began = time.process_time()
    update()
    return time.process_time() - began


def main() -> None:
    """Print a row per peer and update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = {"FastGen": fastgen, "Self-Forcing": self_forcing}
    for name in peers:
        parser.add_argument(f"--{name.lower()}", type=Path, help=f"a checkout of {name}")
    for name, value in {
        "batch": 8,
        "channels": 10,
        "frames": 5,
        "side": 8,
        "width": 128,
        "layers": 6,
        "text": 8,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--equal-text", action="store_true", help="theirs is as short as ours")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    found = []
    print("| peer | update | theirs, s | ours, s | ours : theirs, least to most |\n|---|---|---|---|---|")
    for name, build in peers.items():
        root = getattr(given, name.lower().replace("-", "_"))
        if root is None:
            continue
        theirs = build(root.expanduser(), given, given.text if given.equal_text else TEXT_LENGTH)
        mine = ours(given, given.text)
        for update in mine:
            with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
                pairs = [(timed(theirs[update]), timed(mine[update])) for _ in range(given.rounds + 1)][1:]
            ratios = [b / a for a, b in pairs]
            a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
            middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {name} | {update} | {a:.3f} | {b:.3f} | {middle} |", flush=True)
            found.append({"peer": name, "update": update, "theirs": a, "ours": b, "ratios": ratios})
    if given.out:
        settings = {k: v for k, v in vars(given).items() if isinstance(v, int)}
        given.out.write_text(json.dumps({"settings": settings, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
