"""How likely a motion model of the lab finds the motion of folders of clips, with how much they move beside it.

    mogan train motion_score_lab --data CACHE --out RUN
    python benchmarks/motion_likelihood.py RUN FOLDER [FOLDER ...]   # two minutes a folder of 32 clips on one core

Nats per value of the latent differences, the first latent frame given; with the mean's standard error over clips, and that of
the trace estimate. Clips whose caption says what they do are told it, as in training.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from mogan.data.clips import to_video
from mogan.data.video import read_frames
from mogan.evaluation.clips import read_folder
from mogan.evaluation.likelihood import motion_log_likelihood
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.autoencoder import encode_video
from mogan.models.denoiser import Denoiser
from mogan.motion import estimators
from mogan.motion.observation import motion_amount
from mogan.runs.generator import open_motion


def main() -> None:
    """Print a line for every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of a motion score recipe")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", default="lab-teacher")
    parser.add_argument("--flow", default="lab")
    parser.add_argument("--clips", type=int, default=32, help="the first so many of each folder")
    parser.add_argument("--steps", type=int, default=12, help="of the solver")
    parser.add_argument("--probes", type=int, default=2)
    a = parser.parse_args()
    base = wan.resolve_model(a.model)
    vae, encode, flow = wan.load_vae(base, torch.float32), wan.load_text(base), estimators.load_flow(a.flow, 4)
    frames = wan.latent_shape(base, wan.geometry(base))[1]
    transformer, given = open_motion(a.run, base, frames)
    motion = Denoiser(transformer.eval().requires_grad_(False))
    print("| clips | moves, px/frame | nats per value | error of the trace |\n|---|---|---|---|")
    for folder in a.folders:
        entries = read_folder(folder, folder.name).clips[: a.clips]
        video = torch.cat([to_video(np.stack([f.image_HWC for f in read_frames(e.path)])) for e in entries])
        with torch.no_grad():
            moves = motion_amount(flow(video)).mean()
            latents = encode_video(vae, video)
        text, generator = stack_text(encode([e.prompt for e in entries])), torch.Generator().manual_seed(0)
        found = motion_log_likelihood(
            motion, latents, text, given=given, generator=generator, steps=a.steps, probes=a.probes
        )
        each, trace = found.nats_B / found.numbers, found.error_B / found.numbers
        error = each.std() / len(each) ** 0.5
        print(f"| {folder} | {moves:.2f} | {each.mean():.4f} +- {error:.4f} | {trace.mean():.4f} |", flush=True)


if __name__ == "__main__":
    main()
