"""``mogan stream``: a causal student's clips as they are made, on a page of this machine or in a file."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from mogan.data.video import write_video
from mogan.devices import choose_device
from mogan.disk.files import writable_file
from mogan.disk.locks import alone_at
from mogan.errors import UserError
from mogan.ranges import above, between, is_seed
from mogan.stream.engine import Studio, Times, checked, cut, lab_prompt, open_studio, pieces
from mogan.survey.serve import listen, run

MP4 = rb"(?s)....ftyp"


def stream(
    *,
    model: str,
    prompt: tuple[str, ...] = (),
    seed: int = 0,
    out: Path | None = None,
    seconds: float = 10.0,
    steps: int | None = None,
    port: int = 8766,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: str = "auto",
) -> None:
    """Watch what a causal student makes while it makes it, and change the prompt meanwhile; or write it into a file.

    Without --out a page is served until Ctrl-C, to this machine alone; what nobody watches is not made. On another machine,
    reach it by `ssh -L 8766:127.0.0.1:8766 HOST`.

    Example: mogan stream --model runs/self_forcing

    Args:
        model: a causal student: a run such as one of self_forcing_lab, an export, or an import with --chunks.
        prompt: what is shown first. With --out several may be given, quoted each; they share the seconds evenly.
        seed: of the noise; the same one, with the same prompts, gives the same frames.
        out: an mp4 to write, in place of the page.
        seconds: length of --out.
        steps: of a student that was trained for several numbers of steps one of them, else the largest.
        port: of the page; 0 takes a free one.
        precision: of the networks; auto is fp32 on a CPU, else bf16.
        device: auto, cpu or cuda.
    """
    is_seed(seed=seed)
    above(0, seconds=seconds)
    between(1, 1000, steps=steps)
    between(0, 65535, port=port)
    target = choose_device(device)
    texts = [checked(text, "--prompt") for text in prompt]
    if out is None and len(texts) > 1:
        raise UserError("the page begins with one --prompt and is told others while it plays; give several with --out")
    if out is not None:
        if out.suffix.lower() != ".mp4":
            raise UserError(f"--out {out} must end in .mp4: give another --out")
        writable_file(out, MP4)
    if out is None:
        _serve(model, texts, seed, port, steps, precision, target)
        return
    studio = open_studio(model, target, precision, steps)
    texts = texts or _usual(studio)
    for note in (note for text in texts for note in studio.notes(text)):
        print(f"prompt: {note}")
    with alone_at(out):
        _write(studio, texts, seed, out, max(1, round(seconds * studio.source.geometry.fps)))


def _usual(studio: Studio) -> list[str]:
    if not studio.of_lab:
        raise UserError("say with --prompt what is to be shown")
    return [lab_prompt("red", "circle", "bouncing")]


def _write(studio: Studio, prompts: list[str], seed: int, out: Path, frames: int) -> None:
    texts, each = [studio.text(prompt) for prompt in prompts], studio.frames_per_latent
    begun, first, times = time.perf_counter(), 0.0, Times()

    def text_at(latent: int) -> torch.Tensor:
        return texts[min(latent * each * len(texts) // frames, len(texts) - 1)]

    def seen() -> Iterator[np.ndarray]:
        nonlocal first
        for frame in tqdm(cut(pieces(studio, text_at, seed, times), frames), "stream", frames, unit="frame"):
            first = first or time.perf_counter() - begun
            yield frame

    write_video(out, seen(), studio.source.geometry.fps)
    rate = frames / (time.perf_counter() - begun)
    print(f"{out}: {frames} frames, the first after {first:.2f} s, {rate:.1f} a second")


def _serve(
    model: str, texts: list[str], seed: int, port: int, steps: int | None, precision: str, device: torch.device
) -> None:
    try:
        import uvicorn  # noqa: F401  said before anything is loaded

        from mogan.stream.app import make_app
    except ModuleNotFoundError as error:
        raise UserError(f"The page needs {error.name}: pip install 'mogan[survey]', or give --out.") from error
    with listen("127.0.0.1", port) as listener:
        studio = open_studio(model, device, precision, steps)
        begins_with = (texts or (_usual(studio) if studio.of_lab else [""]))[0]
        app = make_app(studio, begins_with, seed)
        print(f"{studio.name} plays at http://127.0.0.1:{listener.getsockname()[1]}/ (Ctrl-C stops it)", flush=True)
        run(app, listener)
