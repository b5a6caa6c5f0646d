"""Sample sheets: what the averaged student makes of the first prompts, to look at while it trains."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mogan.data.video import contact_sheet, flow_picture, write_video
from mogan.models.attention import stack_text
from mogan.models.autoencoder import stream_video
from mogan.models.causal import CausalDenoiser
from mogan.models.conditions import conditioned
from mogan.motion.flow import RaftFlow, flow_of_pieces
from mogan.sampling.causal_rollout import stream_causal
from mogan.sampling.rollout import animate, normal
from mogan.sampling.samplers import clips_at_once, sample_student, seeded, to_frames
from mogan.training.assemble import Assembly


@torch.no_grad()
def sample_sheet(parts: Assembly, run: Path, iteration: int) -> None:
    """Clips of the averaged student on the first prompts (image to video: from the first clips' first frames), their
    flow, and one sheet of both.
    """
    config = parts.config
    texts = parts.texts
    first = {e["caption"]: e["id"] for e in reversed(texts.entries)}  # of each prompt, its first clip
    prompts = list(dict.fromkeys(e["caption"] for e in texts.entries))[: config.sample_prompts]
    latents: list[Tensor] = []
    together = clips_at_once(parts.geometry)
    with parts.average.in_place():
        for begin in range(0, len(prompts), together):
            part = prompts[begin : begin + together]
            seeds = list(range(begin, begin + len(part)))
            text = stack_text([texts.text(p) for p in part], parts.device)
            if parts.student.controlled:
                text = conditioned(text, *texts.shown([first[p] for p in part], parts.device))
            if config.given:
                noise = normal(torch.Size((len(seeds), *parts.latent_shape)), seeded(seeds), parts.device)
                real = torch.stack([texts.latent(first[p]) for p in part]).to(noise)
                given = real[:, :, : config.given]
                if isinstance(parts.student, CausalDenoiser):
                    stream = stream_causal(parts.student, text, parts.latent_shape, config.sigmas, seeds, given)
                    made = torch.cat(list(stream), 2)
                else:
                    made = animate(parts.student, noise, given, text, text, config.sigmas, guidance=1.0)
            else:
                made = sample_student(parts.student, text, parts.latent_shape, config.sigmas, seeds, config.solver)
            latents += made[:, :, parts.references :].split(1)
    if not parts.world.main:
        return
    folder = run / "samples" / f"{iteration:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, titles = [], []
    for number, (prompt, latent) in enumerate(zip(prompts, latents, strict=True)):
        frames, flow = _frames_and_flow(parts, latent)
        write_video(folder / f"{number}.mp4", frames, parts.geometry.fps)
        rows.append(frames)
        titles.append(prompt)
        if flow is not None and parts.scale is not None:
            rows.append(flow_picture(flow, parts.scale))
            titles.append(f"flow, {parts.scale:g} px/frame")
    contact_sheet(rows, folder / "sheet.png", titles=titles)


def _frames_and_flow(parts: Assembly, latent_1CFHW: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """A clip ``(F, H, W, 3)``, and its flow ``(F - 1, 2, H, W)`` where a discriminator sees motion through RAFT; made as it is decoded."""
    frames: list[np.ndarray] = []

    def decoded() -> Iterator[Tensor]:
        for piece in stream_video(parts.vae, latent_1CFHW):
            frames.extend(to_frames(piece)[0])
            yield piece

    flow = None
    if isinstance(parts.flow, RaftFlow) and parts.scale is not None:
        fields = torch.cat([field.cpu() for field in flow_of_pieces(decoded(), parts.flow)], 2)
        flow = fields[0].transpose(0, 1).numpy()
    else:
        deque(decoded(), maxlen=0)
    return np.stack(frames), flow
