"""``mogan stream``: a causal student's clips as they are made, on a page of this machine or in a file."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from mogan.data.video import write_video
from mogan.devices import choose_device
from mogan.disk.files import writable_file
from mogan.disk.locks import alone_at
from mogan.errors import UserError, goes_with
from mogan.ranges import above, between, is_seed
from mogan.stream.engine import Studio, Times, checked, cut, open_studio, pieces
from mogan.stream.script import Following, When, follow_sound, read_script
from mogan.survey.serve import listen, run

USUAL = 10.0  # seconds of --out
LONGEST = 86_400  # the same, at most
PORT = 8766


def stream(
    *,
    model: str,
    prompt: tuple[str, ...] = (),
    seed: int = 0,
    first_frame: Path | None = None,
    script: Path | None = None,
    audio: Path | None = None,
    out: Path | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    chunk: int | None = None,
    recache: bool = True,
    port: int | None = None,
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto",
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
        first_frame: a picture, or a video whose first frame is meant, with which it begins; for a student that was given its first
            frame (llia_lab) or any other whose first chunk is one latent.
        script: lines of JSON, {"at": seconds, "state": name}, with a prompt or a picture or one alone: each from its second on. A
            picture takes the place of the first frame.
        audio: a recording that chooses the states speaking, listening and idle by loudness and voicing; it is not heard.
        out: an mp4 to write, in place of the page; must not exist yet.
        seconds: length of --out; 10, or that of --audio.
        steps: of a student that was trained for several numbers of steps one of them, else the largest.
        chunk: latents at a time of a student that was trained for several sizes: 1 comes soonest, more are made faster.
        recache: the KV cache is recomputed under another prompt or state; --no-recache keeps it as it is.
        port: of the page, 8766 if not given; 0 takes a free one.
        precision: of the networks; auto is fp32 on a CPU, else bf16; int8 is auto with products in 8 bits (torchao).
        device: auto, cpu or cuda.
    """
    is_seed(seed=seed)
    above(0, seconds=seconds)
    between(0, LONGEST, seconds=seconds)
    between(1, 1000, steps=steps, chunk=chunk)
    between(0, 65535, port=port)
    target = choose_device(device)
    texts = [checked(text, "--prompt") for text in prompt]
    if out is None and len(texts) > 1:
        raise UserError("the page begins with one --prompt and is told others while it plays; give several with --out")
    goes_with("--out", out is not None, seconds=seconds is not None)
    if out is not None:
        if port is not None:
            raise UserError("--port is the page's, and with --out there is no page: leave one of them out")
        if out.suffix.lower() != ".mp4":
            raise UserError(f"--out {out} must be named like clip.mp4: give another --out")
        writable_file(out, b"")
        if out.exists():
            raise UserError(f"--out {out} is there already: give another --out, or remove it")
    if script is not None and (audio is not None or len(texts) > 1):
        raise UserError("--script says what happens when: leave out --audio, and give one --prompt at most")
    if audio is not None and len(texts) > 1:
        raise UserError("--audio chooses states under one prompt: give one --prompt")
    opened = partial(open_studio, model, target, precision, steps, chunk, first_frame, recache)
    if out is None:
        _serve(opened, texts, seed, PORT if port is None else port, script, audio)
        return
    studio = opened()
    when, length = _when(studio, script, audio, seconds or USUAL)
    texts = texts or _usual(studio, when)
    for note in (note for text in texts for note in studio.notes(text)):
        print(f"prompt: {note}")
    frames = max(1, round((seconds or length) * studio.source.geometry.fps))
    _refuse_what_is_never_seen(studio, len(texts), frames)
    with alone_at(out):
        _write(studio, texts, seed, out, frames, when)


def _usual(studio: Studio, when: When | None) -> list[str]:
    if when is not None and (first := when(0.0, 0.0).prompt) is not None:
        return [first]
    if not studio.of_lab:
        raise UserError("say with --prompt what is to be shown")
    return [studio.usual]


def _when(studio: Studio, script: Path | None, audio: Path | None, end: float) -> tuple[When | None, float]:
    """What happens when, if something does, and for how long, seconds; ``end`` is that of a clip under a script."""
    if script is not None:
        return read_script(script, studio.source.states, studio.another_picture, end), USUAL
    return follow_sound(audio, studio.source.states) if audio is not None else (None, USUAL)


def _text_of(latent: int, texts: int, frames: int, each: int) -> int:
    """Which of the texts the chunk that begins with this latent has."""
    return min(latent * each * texts // frames, texts - 1)


def _refuse_what_is_never_seen(studio: Studio, texts: int, frames: int) -> None:
    each = studio.frames_per_latent
    begins = accumulate(studio.student.how.chunks(1 + -(-(frames - 1) // each))[:-1], initial=0)
    if len({_text_of(begin, texts, frames, each) for begin in begins}) < texts:
        raise UserError(
            f"{frames} frames are too few for {texts} prompts, each of which begins with a chunk: give more --seconds, or fewer prompts"
        )


def _write(studio: Studio, prompts: list[str], seed: int, out: Path, frames: int, when: When | None) -> None:
    texts, each = [studio.text(prompt) for prompt in prompts], studio.frames_per_latent
    begun, first, times = time.perf_counter(), 0.0, Times()
    following = None if when is None else Following(studio, prompts[0], when)

    def text_at(latent: int) -> torch.Tensor:
        return texts[_text_of(latent, len(texts), frames, each)]

    def seen() -> Iterator[np.ndarray]:
        nonlocal first
        made = pieces(studio, following or text_at, seed, times, given_at=following and following.given)
        for frame in tqdm(cut(made, frames), "stream", frames, unit="frame"):
            first = first or time.perf_counter() - begun
            yield frame

    write_video(out, seen(), studio.source.geometry.fps)
    rate = frames / (time.perf_counter() - begun)
    print(f"{out}: {frames} frames, the first after {first:.2f} s, {rate:.1f} a second")


def _serve(
    opened: Callable[[], Studio], texts: list[str], seed: int, port: int, script: Path | None, audio: Path | None
) -> None:
    try:
        import uvicorn  # noqa: F401  said before anything is loaded

        from mogan.stream.app import make_app
    except ModuleNotFoundError as error:
        raise UserError(f"The page needs {error.name}: pip install 'mogan[survey]', or give --out.") from error
    with listen("127.0.0.1", port) as listener:
        studio = opened()
        when, _ = _when(studio, script, audio, math.inf)
        begins_with = (texts or (_usual(studio, when) if studio.of_lab else [""]))[0]
        app = make_app(studio, begins_with, seed, when)
        print(f"{studio.name} plays at http://127.0.0.1:{listener.getsockname()[1]}/ (Ctrl-C stops it)", flush=True)
        run(app, listener)
