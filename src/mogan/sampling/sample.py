"""Sampling to folders of mp4: a student with its own levels, a teacher with many guided steps.

A clip depends on its prompt and its seed alone, not on the batch it was made in: seed ``k`` gives what
``torch.manual_seed(k)`` followed by a call of the stock pipeline gives.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

from mogan.data.lists import read_prompts, whole
from mogan.data.prompts import KNOWN, fingerprint, warn_if_changed
from mogan.data.tokens import about_tokens, load_tokens
from mogan.data.video import write_video
from mogan.devices import choose_device
from mogan.disk.files import writable_folder
from mogan.disk.locks import alone_in
from mogan.disk.shards import share_of
from mogan.errors import UserError
from mogan.models import attention, autoencoder, wan
from mogan.models.defaults import Defaults
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.models.lora import factors, merge
from mogan.ranges import above, at_least, between
from mogan.runs.identity import part_of_run, read_config
from mogan.sampling.first_frames import clip_of_prompts, sample_from_first_frames
from mogan.sampling.flowmo import FLOWMO_STEPS, FlowMo
from mogan.sampling.motion_score import steer
from mogan.sampling.rollout import normal, roll_out
from mogan.sampling.samples import append_samples, listed_samples, refuse_others

PIXELS_AT_ONCE = 81 * 480 * 832  # of the clips that are made together: a clip of Wan's size keeps a GPU busy alone
CLIPS_AT_ONCE = 16  # of clips however small: a run that is stopped loses no more


def clips_at_once(size: wan.Geometry, most: int = CLIPS_AT_ONCE) -> int:
    """How many clips of a size are made together: as many as ``PIXELS_AT_ONCE`` holds, at least one."""
    return max(1, min(most, PIXELS_AT_ONCE // (size.frames * size.height * size.width)))


def seeded(seeds: list[int]) -> list[torch.Generator]:
    """One generator per clip."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def sample_student(
    student: Denoiser, text_BLD: Tensor, shape: tuple[int, ...], sigmas: tuple[float, ...], seeds: list[int]
) -> Tensor:
    """Latents of one clip per seed, by the student's own steps."""
    generators = seeded(seeds)
    noise = normal(torch.Size((len(seeds), *shape)), generators, text_BLD.device)
    return roll_out(student, noise, text_BLD, sigmas, generators).x0_BCFHW


@torch.no_grad()
def sample_teacher(
    teacher: Denoiser,
    text_BLD: Tensor,
    null_1LD: Tensor,
    shape: tuple[int, ...],
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    shift: float,
    solver: str = "unipc",
    flowmo: bool = False,
    change: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Latents of one clip per seed, by ``steps`` guided steps of UniPC (Wan's own solver) or Euler.

    With ``flowmo`` the first 12 steps are guided towards latents whose temporal variance is low. ``change`` maps
    ``(velocity, x, sigma)`` to the velocity that is followed; see :func:`mogan.sampling.motion_score.steer`.
    """
    x = normal(torch.Size((len(seeds), *shape)), seeded(seeds), text_BLD.device)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(steps, device=x.device)
    levels = scheduler.sigmas.to(x.device)
    smoother = FlowMo() if flowmo else None
    for i, timestep in enumerate(scheduler.timesteps):
        told = (timestep / 1000).expand(len(x)).float()  # UniPC rounds timesteps; the network is told what Wan tells it
        predict = partial(guided_velocity, teacher, sigma=told, text_BLD=text_BLD, null_BLD=null_1LD, guidance=guidance)
        if smoother is not None and i < FLOWMO_STEPS:
            x = smoother(x, predict, levels[i])
        velocity = predict(x)
        if change is not None:
            velocity = change(velocity, x, told)
        if solver == "euler":
            x = x + (levels[i + 1] - levels[i]) * velocity
        else:
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    return x


@dataclass(frozen=True)
class Job:
    """One clip to make: ``index`` counts the seeds of a prompt from 0."""

    prompt: str
    index: int
    seed: int

    @property
    def file(self) -> str:
        """VBench's name, ``{prompt}-{index}.mp4``."""
        return f"{safe_name(self.prompt)}-{self.index}.mp4"


def safe_name(prompt: str) -> str:
    """A prompt as a file name: the prompt itself, path separators replaced, cut to what file systems take."""
    name = prompt.replace("/", "_").replace("\0", "").strip() or "empty"
    return name.encode()[:240].decode(errors="ignore")


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
            VBench_full_info.json.
        out: folder for the clips and samples.jsonl.
        model: lab, lab-teacher, a diffusers folder, an export, or a training run.
        mode: few steps at the student's own levels, or many guided steps; auto asks the model.
        seeds: clips per prompt.
        first_seed: seed of the first clip of every prompt; the others follow.
        steps: steps of a teacher.
        guidance: guidance of a teacher, or of a model that is given the first frame.
        shift: level shift of a teacher.
        negative_prompt: what guidance leads away from; "" for none.
        solver: solver of a teacher.
        flowmo: FlowMo guidance (arXiv 2506.01144) in a teacher's first 12 steps.
        motion: run of a motion score recipe; its motion is mixed into a teacher's.
        motion_ratio: 0 is the teacher's own motion, 1 the motion model's.
        first_frames: folder of captioned clips, for a model trained to be given the first frame: every prompt is the
            caption of one and starts from its first frame. Sampled by Euler steps at the model's own levels.
        batch: clips made at once; by default as many as fit into the pixels of one clip of 81 x 480 x 832, at most 16.
            They are decoded one after the other.
        limit: use only so many prompts.
        shard: i/n makes every n-th clip, starting with the i-th: for many GPUs, into the same folder.
        precision: of the networks; auto is fp32 for a few-step student on a CPU (as the stock pipeline there), else bf16.
        device: auto, cpu or cuda.
    """
    at_least(1, seeds=seeds, steps=steps, batch=batch, limit=limit)
    between(0, 2**63 - seeds, first_seed=first_seed)  # torch takes 64 bits
    at_least(0, guidance=guidance)
    above(0, shift=shift)
    between(0, 1, motion_ratio=motion_ratio)
    target = choose_device(device)
    lines = read_prompts(prompts)
    list_sha = fingerprint(lines)
    if told := KNOWN.get(list_sha) or warn_if_changed(prompts, lines):
        print(f"prompts: {told}")
    jobs = share_of(jobs_of(lines[:limit], seeds, first_seed), shard)
    source = open_generator(model)
    texts = {job.prompt: job.prompt for job in jobs}
    if negative_prompt is not None:
        texts["--negative-prompt"] = whole(negative_prompt, "--negative-prompt")
    for note in about_tokens(texts, load_tokens(source.folder)):
        print(f"prompts: {note}")
    few_steps = source.sigmas is not None if mode == "auto" else mode == "student"
    _refuse_what_does_not_go_together(model, source, few_steps, flowmo, motion, first_frames)
    own = {"steps": steps, "guidance": guidance, "shift": shift, "negative_prompt": negative_prompt}
    guided = _guided(model, source, few_steps, first_frames, {k: v for k, v in own.items() if v is not None})
    as_teacher = TeacherSteps(guided, solver, flowmo, motion, motion_ratio)
    how = {"sigmas": list(source.sigmas or ())} if few_steps else as_teacher.told()
    if first_frames:
        how |= {"first_frames": str(first_frames)} | (_guidance_told(guided) if guided.guidance != 1 else {})
    starts = clip_of_prompts(first_frames, lines[:limit]) if first_frames else None
    about_all = {"system": out.name, "fps": source.geometry.fps, **how, "weights": source.mark()}
    about_all["prompts_sha256"] = list_sha
    writable_folder(out)
    with alone_in(out, shard):
        _fill(
            out,
            jobs,
            about_all,
            batch or clips_at_once(source.geometry),
            lambda todo: _maker(source, None if few_steps else as_teacher, guided, starts, todo, target, precision),
        )


def _fill(out: Path, jobs: list[Job], about_all: dict, batch: int, maker: Callable[[list[str]], Callable]) -> None:
    """Make the clips that a folder lacks; ``maker`` loads what makes them of these prompts."""
    listed = listed_samples(out)

    def record(job: Job) -> dict:
        return json.loads(json.dumps({"file": job.file, **vars(job), **about_all}))  # as it is read again

    there = {job for job in jobs if (out / job.file).is_file()}
    if strange := [job.file for job in jobs if job in there and job.file not in listed]:
        raise UserError(
            f"{out} holds {len(strange)} of these clips in no line of samples.jsonl, first {strange[0][:60]}, so nobody knows "
            "what made them: move them away, or give another --out"
        )
    refuse_others(out, listed, [record(job) for job in jobs if job in there])
    todo = [job for job in jobs if job not in there]
    if not todo:
        print(f"{out}: all {len(jobs)} clips are there" if jobs else f"{out}: this shard has no clip to make")
        return
    make = maker([job.prompt for job in todo])
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=f"sample {out.name}", unit="clip") as bar:
        for first in range(0, len(todo), batch):
            part = todo[first : first + batch]
            for job, frames in zip(part, make(part), strict=True):
                if listed.get(job.file) != record(job):  # before the clip: a kill leaves no clip that no line names
                    append_samples(out, [record(job)])
                write_video(out / job.file, frames, about_all["fps"])
                bar.update()


def _refuse_what_does_not_go_together(
    model: str, source: "Generator", few_steps: bool, flowmo: bool, motion: Path | None, first_frames: Path | None
) -> None:
    if few_steps and source.sigmas is None:
        raise UserError(f"{model} does not say at which levels it samples (no mogan.json): use --mode teacher")
    if motion is not None and few_steps:
        raise UserError("--motion is mixed into a teacher's steps: name a teacher with --model, or use --mode teacher")
    if first_frames is not None and not few_steps:
        raise UserError("--first-frames is for a model trained with them: give the export of such a run, and no --mode")
    if flowmo and few_steps:
        raise UserError("--flowmo guides a teacher's many steps; leave it out for a few-step student")


def _guided(
    model: str, source: "Generator", few_steps: bool, first_frames: Path | None, own: dict[str, Any]
) -> Defaults:
    """The model's defaults, but for what was asked for."""
    useless = own.keys() - ({"guidance", "negative_prompt"} if first_frames else set()) if few_steps else set()
    if useless:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in own if name in useless)
        how = "at its own levels" if first_frames else "at its own levels, without guidance"
        raise UserError(f"{model} samples {how}: leave out {names}, or use --mode teacher")
    usual = wan.defaults(source.folder)
    return replace(usual, **({"guidance": usual.first_frame_guidance} if first_frames else {}) | own)


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
    source: "Generator",
    teacher: TeacherSteps | None,
    guided: Defaults,
    starts: dict[str, Path] | None,
    prompts: list[str],
    device: torch.device,
    precision: str,
) -> Callable[[list[Job]], list[Iterator[np.ndarray]]]:
    """Load a generator's networks; what comes back makes the clips of a few jobs at once, each as a stream of frames."""
    nulls = [guided.negative_prompt] if teacher is not None or starts is not None else []
    nulls += [""] if teacher is not None and teacher.motion is not None else []
    text_of = encode_each(prompts + nulls, source.folder, device)

    def stacked(prompts: list[str]) -> Tensor:
        return attention.stack_text([text_of[prompt] for prompt in prompts], device)

    fast = wan.fast_dtype(device)
    auto = torch.float32 if teacher is None and device.type == "cpu" else fast
    dtype = {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    vae = wan.load_vae(source.folder, dtype).to(device)
    denoiser = Denoiser(source.load().to(device).eval(), dtype)
    shape = wan.latent_shape(source.folder, source.geometry)
    change = None
    if teacher is not None and teacher.motion is not None:
        network, given = open_motion(teacher.motion, source.folder, shape[1])
        network = Denoiser(network.to(device).eval(), dtype)
        change = partial(
            steer,
            motion=network,
            given=given,
            null_1LD=stacked([""]),  # what it was trained with
            guidance=guided.guidance,
            ratio=teacher.motion_ratio,
        )

    @torch.no_grad()
    def make(jobs: list[Job]) -> list[Iterator[np.ndarray]]:
        text = stacked([job.prompt for job in jobs])
        numbers = [job.seed for job in jobs]
        if teacher is not None:
            latents = sample_teacher(
                denoiser, text, stacked([guided.negative_prompt]), shape, numbers, steps=guided.steps,
                guidance=guided.guidance, shift=guided.shift, solver=teacher.solver, flowmo=teacher.flowmo,
                change=change and partial(change, text_BLD=text),
            )  # fmt: skip
            return clips_of(vae, latents)
        assert source.sigmas is not None
        if starts is None:
            latents = sample_student(denoiser, text, shape, source.sigmas, numbers)
        else:
            first = [starts[job.prompt] for job in jobs]
            latents = sample_from_first_frames(
                denoiser, vae, first, text, shape, source.sigmas, seeded(numbers), source.geometry,
                null_1LD=stacked([guided.negative_prompt]), guidance=guided.guidance,
            )  # fmt: skip
        return clips_of(vae, latents)

    return make


def encode_each(prompts: list[str], model: Path, device: torch.device) -> dict[str, Tensor]:
    """Embeddings ``(L, D)`` on the CPU by prompt, each prompt read once and by itself; the encoder is gone afterwards."""
    encode = wan.load_text(model, device)
    bar = tqdm(dict.fromkeys(prompts), desc="text", unit="prompt")
    return {prompt: encode([prompt])[0] for prompt in bar}


def clips_of(vae: Any, latents_BCFHW: Tensor) -> list[Iterator[np.ndarray]]:
    """Each clip as a stream of frames.

    Raises:
        UserError: one is not made of numbers; it would be shown as black.
    """
    if not latents_BCFHW.isfinite().all():
        raise UserError(
            "sampling ended in numbers that are infinite or none (NaN): take a guidance and a shift nearer to the model's own, or "
            "--precision fp32; if it samples so by itself, its weights are damaged"
        )
    return [pictures(vae, latent) for latent in latents_BCFHW.split(1)]


def pictures(vae: Any, latent_1CFHW: Tensor) -> Iterator[np.ndarray]:
    """Frames of one clip, uint8 ``(H, W, 3)``, as they are decoded."""
    for piece in autoencoder.stream_video(vae, latent_1CFHW):
        yield from to_frames(piece)[0]


def to_frames(video_BCFHW: Tensor) -> np.ndarray:
    """Video in [-1, 1] to uint8 arrays ``(B, F, H, W, 3)``."""
    return ((video_BCFHW + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def jobs_of(prompts: list[str], seeds: int, first_seed: int) -> list[Job]:
    """Clips of every prompt and seed, in order.

    Raises:
        UserError: two prompts would have clips of one name.
    """
    jobs = [Job(prompt, k, first_seed + k) for prompt in prompts for k in range(seeds)]
    prompt_of: dict[str, str] = {}
    for job in jobs:
        if prompt_of.setdefault(job.file, job.prompt) != job.prompt:
            raise UserError(f"two prompts would both be called {job.file[:60]}...: sample them into different folders")
    return jobs


@dataclass(frozen=True)
class Generator:
    """Where a generator's parts lie: a diffusers folder, or a training run on top of one."""

    folder: Path
    sigmas: tuple[float, ...] | None
    geometry: wan.Geometry
    run: Path | None = None
    lora: int | None = None

    def load(self) -> torch.nn.Module:
        """The transformer; of a run, with the averaged weights or adapters of its newest checkpoint, the latter merged."""
        transformer = wan.load_transformer(self.folder)
        if self.lora is not None:
            merge(transformer, factors(self.average()))
        elif self.run is not None:
            transformer.load_state_dict(self.average())
        return transformer

    def average(self) -> dict[str, Tensor]:
        """What a run's student learned, averaged: its weights or its adapters."""
        from mogan.runs.checkpoint import load_part

        return load_part(self._checkpoint(), "ema")

    def mark(self) -> str:
        """Sixteen hex digits that change with the weights that are sampled."""
        if self.run is None:
            return wan.fingerprint(self.folder, "transformer")
        checkpoint = self._checkpoint()
        return wan.fingerprint(checkpoint.parent, checkpoint.name)

    def _checkpoint(self) -> Path:
        from mogan.runs.checkpoint import student_checkpoint

        assert self.run is not None
        return student_checkpoint(self.run)


def open_generator(name: str) -> Generator:
    """Find a generator by model name, diffusers folder, hub id or training run."""
    run = Path(name)
    if (run / "run.json").is_file():
        folder = part_of_run(run, "student")
        config = read_config(run)
        if config.get("motion_score"):
            raise UserError(
                f"{name} is a motion model, not a generator: give it as --motion beside a teacher as --model"
            )
        return Generator(folder, tuple(config["sigmas"]), wan.geometry(folder), run, config.get("lora"))
    folder = wan.resolve_model(name)
    levels = wan.model_facts(folder).get("sigmas")
    return Generator(folder, tuple(levels) if levels else None, wan.geometry(folder))


def open_motion(run: Path, base: Path, frames: int) -> tuple[torch.nn.Module, int]:
    """The transformer of a motion model's run that saw whole clips of ``frames`` latents, and how many it was given.

    Raises:
        UserError: the run is none, was trained on other latents or text than ``base``'s, or on shorter windows.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a training run: give --motion the --out of a motion score recipe")
    config = read_config(run)
    folder = part_of_run(run, "student")
    if not config.get("motion_score"):
        raise UserError(f"{run} trained {config['recipe']}, no motion model: use a recipe such as motion_score_lab")
    if any(wan.fingerprint(folder, part) != wan.fingerprint(base, part) for part in ("vae", "text_encoder")):
        raise UserError(f"{run} was trained on latents or text of another model than {base}: train it from that one")
    windows = config["motion_score"]["windows"]
    given = next((k for k in (1, 0) if [k, frames - 1] in windows), None)
    if given is None:
        raise UserError(f"{run} never saw a whole clip of {frames} latents (windows {windows}): add (1, {frames - 1})")
    return Generator(folder, None, wan.geometry(folder), run).load(), given
