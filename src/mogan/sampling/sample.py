"""Sampling to folders of mp4: what was asked for and what the model's own way is, checked, then clip after clip."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mogan.config import EULER
from mogan.data.cache import Cache, open_cache
from mogan.data.clips import to_video
from mogan.data.lists import read_prompts, whole
from mogan.data.prompts import KNOWN, fingerprint, warn_if_changed
from mogan.data.tasks import Task, control_of, read_tasks
from mogan.data.tokens import about_tokens, load_tokens
from mogan.devices import choose_device
from mogan.disk.files import writable_folder
from mogan.disk.locks import alone_in
from mogan.disk.shards import share_of
from mogan.errors import UserError, goes_with
from mogan.models import attention, states, wan
from mogan.models.conditions import conditioned, encode_control, encode_first_frame, nothing_shown
from mogan.models.defaults import Defaults
from mogan.models.denoiser import Denoiser
from mogan.ranges import at_least, between
from mogan.runs.generator import Generator, open_generator, open_motion
from mogan.sampling.first_frames import clip_of_prompts, first_pictures, sample_from_first_frames
from mogan.sampling.folder import Job, fill, jobs_of
from mogan.sampling.motion_score import steer
from mogan.sampling.samplers import clips_at_once, clips_of, sample_student, sample_teacher, seeded


def sample(
    *,
    prompts: Path,
    out: Path,
    model: str = "lab",
    mode: Literal["auto", "student", "teacher"] = "auto",
    seeds: int = 1,
    first_seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    negative_prompt: str | None = None,
    solver: Literal["unipc", "euler"] = "unipc",
    flowmo: bool = False,
    motion: Path | None = None,
    motion_ratio: float = 0.5,
    first_frames: Path | None = None,
    controls: Path | None = None,
    state: str | None = None,
    batch: int | None = None,
    limit: int | None = None,
    shard: str | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: str = "auto",
) -> None:
    """Sample clips for every prompt and seed into a folder of mp4 files; run it again to go on where it stopped.

    What is not given follows the model: its mogan.json, else stock Wan (50 steps, guidance 5, shift 5 and Wan's own
    negative prompt). The lab's teacher has guidance 3, shift 3 and no negative prompt.

    Args:
        prompts: text file with one prompt per line, or rows with a caption or prompt: jsonl, csv, tsv, or json such as
            VBench_full_info.json. Of rows with a column `task` every clip is one of that task, and made under the `control`, `mask`
            and `references` that it names by a VACE.
        out: folder for the clips and samples.jsonl.
        model: lab (its 3-step student), lab-teacher, a diffusers folder, an export, or a training run.
        mode: few steps at the student's own levels, or many guided steps; auto asks the model.
        seeds: clips per prompt.
        first_seed: seed of the first clip of every prompt; the others follow.
        steps: steps of a teacher; of a student that was trained for several numbers of steps one of them, else the largest.
        guidance: guidance of a teacher, or of a model that is given the first frame.
        shift: level shift of a teacher.
        negative_prompt: negative prompt of guidance; "" for none.
        solver: solver of a teacher.
        flowmo: FlowMo guidance (arXiv 2506.01144) in a teacher's first 12 steps.
        motion: run of a motion score recipe; its motion is mixed into a teacher's.
        motion_ratio: 0 is the teacher's own motion, 1 the motion model's.
        first_frames: folder of captioned clips, for image-to-video models and others trained to be given the first frame: every
            prompt is the caption of one and starts from its first frame. A Wan that became one by fine-tuning is sampled by
            Euler steps at its own levels, a causal student chunk by chunk.
        controls: of a VACE, a cache made with `mogan prepare --controls`: every prompt is the caption of one of its clips and is made
            under that clip's control and reference pictures. Without it a VACE makes clips from text.
        state: of a student that is conditioned on states (LLIA): the state of all clips; none if left out.
        batch: clips made at once; by default as many as fit into the pixels of one clip of 81 x 480 x 832, at most 16.
            They are decoded one after the other.
        limit: use only so many prompts.
        shard: i/n makes every n-th clip, starting with the i-th: for many GPUs, into the same folder.
        precision: of the networks; auto is fp32 for a few-step student on a CPU (as the stock pipeline there), else bf16.
        device: auto, cpu or cuda.
    """
    at_least(1, batch=batch, limit=limit)
    between(1, 1000, seeds=seeds, steps=steps)  # a model is trained at 1000 levels
    between(0, 2**63 - seeds, first_seed=first_seed)  # torch takes 64 bits
    at_least(0, guidance=guidance)
    between(0.001, 1000, shift=shift)  # beyond, all levels round to one
    between(0, 1, motion_ratio=motion_ratio)
    goes_with("--motion", motion is not None, motion_ratio=motion_ratio != 0.5)
    target = choose_device(device)
    tasks = read_tasks(prompts)
    lines = list(dict.fromkeys(prompt for prompt, _ in tasks)) or read_prompts(prompts)
    list_sha = fingerprint(lines)
    if told := KNOWN.get(list_sha) or warn_if_changed(prompts, lines):
        print(f"prompts: {told}")
    jobs = jobs_of(lines[:limit], seeds, first_seed, tasks[:limit])
    source = open_generator(model)
    _tell_of_tokens(source, share_of(jobs, shard), negative_prompt)
    few_steps = source.sigmas is not None and not source.fine_tuned if mode == "auto" else mode == "student"
    goes_with("a teacher as --model", not few_steps, solver=solver != "unipc")
    _refuse_what_does_not_go_together(model, source, few_steps, flowmo, motion, first_frames)
    if few_steps and source.counts and steps is not None:
        source, steps = source.in_steps(steps), None
    shown = _open_controls(model, source, controls, lines[:limit], first_frames, motion)
    under_tasks = _under_tasks(model, source, tasks, controls)
    own = {"steps": steps, "guidance": guidance, "shift": shift, "negative_prompt": negative_prompt}
    by_level = first_frames is not None and not source.causal and not wan.is_image_to_video(source.folder)
    guided = _guided(model, source, few_steps, by_level, {k: v for k, v in own.items() if v is not None})
    as_teacher = None if few_steps else TeacherSteps(guided, solver, flowmo, motion, motion_ratio)
    how = as_teacher.told() if as_teacher else source.steps_told()
    how |= {"first_frames": str(first_frames)} if first_frames else {}
    how |= _guidance_told(guided) if by_level and guided.guidance != 1 else {}
    how |= {"controls": str(controls)} if controls else {"controls": "of its task"} if under_tasks else {}
    how |= {} if states.known(state, source.states, "--state") is None else {"state": state}
    starts = clip_of_prompts(first_frames, lines[:limit]) if first_frames else None
    dtype = wan.dtype_of(precision, target, few_steps=few_steps)
    about_all = {"system": out.resolve().name, "fps": source.geometry.fps, **how, "weights": source.mark()}
    about_all |= {"prompts_sha256": list_sha, "precision": str(dtype).removeprefix("torch.")}
    size = batch or clips_at_once(source.geometry)

    def maker(todo: list[str]) -> Callable[[list[Job]], list[Iterator[np.ndarray]]]:
        return _maker(source, as_teacher, guided, starts, todo, target, dtype, shown, state)

    writable_folder(out)
    with alone_in(out, shard):
        fill(out, jobs, shard, about_all, size, maker)


def _tell_of_tokens(source: Generator, jobs: list[Job], negative_prompt: str | None) -> None:
    texts = {job.prompt: job.prompt for job in jobs}
    if negative_prompt is not None:
        texts["--negative-prompt"] = whole(negative_prompt, "--negative-prompt")
    for note in about_tokens(texts, load_tokens(source.folder)):
        print(f"prompts: {note}")


def _refuse_what_does_not_go_together(
    model: str, source: Generator, few_steps: bool, flowmo: bool, motion: Path | None, first_frames: Path | None
) -> None:
    if few_steps and source.sigmas is None:
        raise UserError(f"{model} names no levels to sample at (no sigmas in a mogan.json): use --mode teacher")
    if source.causal is not None and not few_steps:
        raise UserError(f"{model} makes clips chunk by chunk, at its own levels: leave out --mode teacher")
    if motion is not None and few_steps:
        raise UserError("--motion is mixed into a teacher's steps: name a teacher with --model, or use --mode teacher")
    animates = wan.is_image_to_video(source.folder)
    if animates and (first_frames is None or motion is not None):
        raise UserError(
            f"{model} animates first frames: "
            + ("leave out --motion" if motion else "give --first-frames, captioned clips")
        )
    if first_frames is not None and not few_steps and not animates:
        raise UserError("--first-frames is for a model trained with them: give the export of such a run, and no --mode")
    if flowmo and few_steps:
        raise UserError("--flowmo guides a teacher's many steps; leave it out for a few-step student")


def _open_controls(
    model: str,
    source: Generator,
    controls: Path | None,
    prompts: list[str],
    first_frames: Path | None,
    motion: Path | None,
) -> Cache | None:
    """The cache that holds a control for every prompt, if there is one."""
    if not wan.has_controls(source.folder) or wan.is_image_to_video(source.folder):
        if controls is not None:
            raise UserError(f"{model} reads no controls: leave out --controls, or name a VACE with --model")
        return None
    if first_frames is not None or motion is not None:
        raise UserError(f"{model} is a VACE: give --controls in place of --{'motion' if motion else 'first-frames'}")
    if controls is None:
        return None
    cache = open_cache(controls)
    if not cache.has_controls:
        raise UserError(f"the clips of {controls} have no controls: prepare them with `mogan prepare --controls`")
    cache.require(vae=wan.fingerprint(source.folder, "vae"), **vars(source.geometry))
    captions = {entry["caption"] for entry in cache.entries}
    if lacking := [prompt for prompt in prompts if prompt not in captions]:
        raise UserError(
            f"{controls} has no clip with the caption {lacking[0]!r}: give --prompts that are captions of its clips"
        )
    return cache


def _under_tasks(model: str, source: Generator, tasks: list[tuple[str, Task]], controls: Path | None) -> bool:
    """Whether clips are made under the controls that a list names."""
    if not any(task.files for _, task in tasks):
        return False
    if controls is not None:
        raise UserError("rows of --prompts name controls of their own: leave out --controls")
    if not wan.has_controls(source.folder) or wan.is_image_to_video(source.folder):
        print(f"{model} reads no controls: clips are made from the prompts alone, as a measure of what chance follows")
        return False
    return True


def _guided(model: str, source: Generator, few_steps: bool, by_level: bool, own: dict[str, Any]) -> Defaults:
    """The model's defaults, but for what was asked for; ``by_level``: it is given first frames at a level of their own."""
    useless = own.keys() - ({"guidance", "negative_prompt"} if by_level else set()) if few_steps else set()
    if useless:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in own if name in useless)
        how = "at its own levels" if by_level else "at its own levels, without guidance"
        raise UserError(
            f"{model} samples {how}: leave out {names}, or name a teacher by --model (--mode teacher has a student take its steps)"
        )
    usual = wan.defaults(source.folder)
    # a distilled student, which Euler steps say it is, has guidance in its weights
    guidance = 1.0 if source.solver == EULER else usual.first_frame_guidance
    return replace(usual, **({"guidance": guidance} if by_level and few_steps else {}) | own)


def _guidance_told(guided: Defaults) -> dict[str, Any]:
    return {"guidance": guided.guidance, "negative_prompt": guided.negative_prompt}


@dataclass(frozen=True)
class TeacherSteps:
    """How a teacher samples: of ``guided`` steps, guidance, shift and negative prompt."""

    guided: Defaults
    solver: str
    flowmo: bool
    motion: Path | None
    motion_ratio: float

    def told(self) -> dict:
        """What ``samples.jsonl`` says of them; of what few use, only where it was used."""
        told: dict = {"steps": self.guided.steps, "shift": self.guided.shift, **_guidance_told(self.guided)}
        told |= {"solver": self.solver} if self.solver != "unipc" else {}
        told |= {"flowmo": True} if self.flowmo else {}
        return told | ({"motion": str(self.motion), "motion_ratio": self.motion_ratio} if self.motion else {})


def _maker(
    source: Generator,
    teacher: TeacherSteps | None,
    guided: Defaults,
    starts: dict[str, Path] | None,
    prompts: list[str],
    device: torch.device,
    dtype: torch.dtype,
    shown: Cache | None,
    state: str | None,
) -> Callable[[list[Job]], list[Iterator[np.ndarray]]]:
    """Load a generator's networks; what comes back makes the clips of a few jobs at once, each as a stream of frames."""
    nulls = [guided.negative_prompt] if teacher is not None or starts is not None else []
    nulls += [""] if teacher is not None and teacher.motion is not None else []
    text_of = encode_each(prompts + nulls, source.folder, device)

    names = () if state is None else source.states

    def stacked(*prompts: str, told_state: str | None = None) -> Tensor:
        return attention.stack_text([states.told(text_of[prompt], told_state, names) for prompt in prompts], device)

    vae = wan.load_vae(source.folder, dtype).to(device)
    denoiser = source.load(dtype).to(device).eval()
    shape, levels = wan.latent_shape(source.folder, source.geometry), source.sigmas or ()
    told = _told(denoiser, vae, source, shown, starts, device)
    from_pictures = starts is not None and not denoiser.animates
    change = None
    if teacher is not None and teacher.motion is not None:
        network, given = open_motion(teacher.motion, source.folder, shape[1])
        network = Denoiser(network.to(device).eval(), dtype)
        null = stacked("")  # what it was trained with
        change = partial(
            steer, motion=network, given=given, null_1LD=null, guidance=guided.guidance, ratio=teacher.motion_ratio
        )

    @torch.no_grad()
    def make(jobs: list[Job]) -> list[Iterator[np.ndarray]]:
        if len({len(job.task.references) for job in jobs if job.task}) > 1:  # of other numbers of latent frames
            return [clip for job in jobs for clip in make([job])]
        control, picture = told(jobs)
        references = 0 if control is None else control.shape[2] - shape[1]
        whole = (shape[0], shape[1] + references, *shape[2:])
        text = conditioned(stacked(*(job.prompt for job in jobs), told_state=state), control, picture)
        numbers = [job.seed for job in jobs]
        if teacher is not None:
            latents = sample_teacher(
                denoiser, text, stacked(guided.negative_prompt), whole, numbers, steps=guided.steps,
                guidance=guided.guidance, shift=guided.shift, solver=teacher.solver, flowmo=teacher.flowmo,
                change=change and partial(change, text_BLD=text),
            )  # fmt: skip
        elif not from_pictures:
            latents = sample_student(denoiser, text, whole, levels, numbers, source.solver)
        else:
            assert starts is not None
            first = [starts[job.prompt] for job in jobs]
            latents = sample_from_first_frames(
                denoiser, vae, first, text, shape, levels, seeded(numbers), source.geometry,
                null_1LD=stacked(guided.negative_prompt), guidance=guided.guidance,
            )  # fmt: skip
        return clips_of(vae, latents[:, :, references:])

    return make


Beside = tuple[Tensor | None, Tensor | None]  # controls, and what an image encoder sees of first frames


def _told(
    denoiser: Denoiser,
    vae: Any,
    source: Generator,
    shown: Cache | None,
    starts: dict[str, Path] | None,
    device: torch.device,
) -> Callable[[list[Job]], Beside]:
    """Gives jobs what a network is told beside text; of a VACE without a cache, the controls of text to video."""
    size = source.geometry
    if not denoiser.controlled:
        return lambda jobs: (None, None)
    if denoiser.animates:
        eye = wan.load_eye(source.folder, device) if wan.sees_pictures(source.folder) else None

        def of_first_frames(jobs: list[Job]) -> Beside:
            assert starts is not None
            pictures = first_pictures([starts[job.prompt] for job in jobs], size)
            images = torch.cat([to_video(picture[None])[:, :, 0] for picture in pictures]).to(device)
            return encode_first_frame(vae, images, size.frames), None if eye is None else eye(pictures)

        return of_first_frames
    if shown is None:
        video, mask = (t.to(device) for t in nothing_shown(size.frames, size.height, size.width))
        grey = encode_control(vae, video, mask)
        return lambda jobs: (torch.cat([control_of(vae, job.task, size) if job.task else grey for job in jobs]), None)
    first = {entry["caption"]: entry["id"] for entry in reversed(shown.entries)}
    return lambda jobs: shown.shown([first[job.prompt] for job in jobs], device)


def encode_each(prompts: list[str], model: Path, device: torch.device) -> dict[str, Tensor]:
    """Embeddings ``(L, D)`` on the CPU by prompt, each prompt read once and by itself; the encoder is gone afterwards."""
    encode = wan.load_text(model, device)
    bar = tqdm(dict.fromkeys(prompts), desc="text", unit="prompt")
    return {prompt: encode([prompt])[0] for prompt in bar}
