"""Build the lab's family: run the stages, distil the student, put the folders together, draw what came out."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from mogan.data.cache import open_cache
from mogan.data.prepare_prompts import prepare_prompts
from mogan.data.video import contact_sheet, flow_picture
from mogan.devices import choose_device
from mogan.disk.files import writable_folder, write_atomically
from mogan.disk.locks import alone_in
from mogan.errors import UserError
from mogan.exchange.export import save_student
from mogan.lab.clips import HELD_OUT_SEED, TRAIN_SEED, rendered_clips, to_video
from mogan.lab.raft import train_raft
from mogan.lab.teacher import train_teacher
from mogan.lab.vae import train_vae
from mogan.models import attention, autoencoder, wan
from mogan.models.defaults import LAB
from mogan.models.denoiser import Denoiser
from mogan.motion.flow import RaftFlow, load_raft
from mogan.ranges import at_least
from mogan.recipes import find_recipe
from mogan.sampling.samplers import sample_student, sample_teacher, to_frames
from mogan.training.assemble import assemble
from mogan.training.loop import resume, run_training
from mogan.world.scenes import FPS, FRAMES, SIZE, exact_flow, make_scene

OWN = {"work", "teacher", "raft", "student", "distil", "prompts", "prompts.txt", "family", "pictures"}


def build(
    *,
    out: Path = Path("runs/lab"),
    vae_steps: int = 2200,
    raft_steps: int = 6000,
    teacher_steps: int = 23500,
    teacher_clips: int = 12500,
    teacher_batch: int = 32,
    student_iterations: int = 400,
    device: str = "auto",
    install: bool = False,
) -> None:
    """Train the laboratory's tiny Wan family from nothing: about eight hours on two cores.

    Every stage saves itself each minute; the same command goes on where it stopped. The result lies in OUT/family:
    teacher/ and student/ (folders stock WanPipeline opens), raft/, and pictures of what each part can do.

    Args:
        out: working folder.
        vae_steps: of the autoencoder.
        raft_steps: of the flow network.
        teacher_steps: of text encoder and teacher.
        teacher_clips: how many clips of the world they learn from, rendered by as many processes as there are cores.
        teacher_batch: clips a step.
        student_iterations: of distilling the 3-step student (recipe dmd_lab).
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        install: replace the family inside the package with this one.
    """
    at_least(
        1,
        vae_steps=vae_steps,
        raft_steps=raft_steps,
        teacher_steps=teacher_steps,
        teacher_clips=teacher_clips,
        teacher_batch=teacher_batch,
        student_iterations=student_iterations,
    )
    target = choose_device(device)
    writable_folder(out)
    with alone_in(out):
        _refuse_other_folders(out)
        family = _stages(
            out, vae_steps, raft_steps, teacher_steps, teacher_clips, teacher_batch, student_iterations, target
        )
    if install:
        packaged = wan.lab_folder()
        shutil.rmtree(packaged, ignore_errors=True)
        shutil.copytree(family, packaged)
    print(f"the family is in {family}, pictures of it in {out / 'pictures'}")


def _refuse_other_folders(out: Path) -> None:
    """Refuse to build into a folder that holds something else: its ``family`` would be replaced."""
    names = sorted(p.name for p in out.iterdir() if p.name[0] != "." and p.suffix != ".log")
    others = [name for name in names if name not in OWN or "work" not in names]  # which is made first
    if others:
        raise UserError(
            f"{out} holds other things than this command's ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): give an "
            "empty or a new folder as --out"
        )


def _stages(
    out: Path,
    vae_steps: int,
    raft_steps: int,
    teacher_steps: int,
    teacher_clips: int,
    teacher_batch: int,
    student_iterations: int,
    target: torch.device,
) -> Path:
    """All of them, as far as they are not done; returns the family's folder."""
    work, teacher = out / "work", out / "teacher"
    work.mkdir(parents=True, exist_ok=True)
    if not (teacher / "vae" / "config.json").is_file():
        train_vae(out, work, vae_steps, target)
    if not (out / "raft" / "model.safetensors").is_file():
        train_raft(out, work, raft_steps, target)
    if not (teacher / "transformer" / "config.json").is_file():
        train_teacher(out, work, teacher_steps, teacher_clips, teacher_batch, target)
    finish_teacher(teacher)
    student = distil(out, student_iterations, target)
    family = out / "family"
    shutil.rmtree(family, ignore_errors=True)
    for source, name in ((teacher, "teacher"), (student, "student"), (out / "raft", "raft")):
        shutil.copytree(source, family / name)
    draw(family, out / "pictures")
    return family


def finish_teacher(folder: Path) -> None:
    """Write what makes the parts a pipeline: scheduler, index and the geometry."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
        scheduler=scheduler,
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = {k: v for k, v in pipeline.config.items() if isinstance(v, (list, tuple)) or k in ("_diffusers_version",)}
    index = {"_class_name": "WanPipeline", **index, "boundary_ratio": None, "expand_timesteps": False}
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    facts = {"fps": FPS, "height": SIZE, "width": SIZE, "frames": FRAMES} | LAB
    write_atomically(folder / "mogan.json", json.dumps(facts, indent=2) + "\n")


def distil(out: Path, iterations: int, device: torch.device, prompts: int = 4000) -> Path:
    """Stage 4: the 3-step student by DMD on the world's captions; returns its folder."""
    folder, run, cache = out / "student", out / "distil", out / "prompts"
    if (folder / "model_index.json").is_file():
        return folder
    captions = dict.fromkeys(make_scene(TRAIN_SEED, i).caption for i in range(prompts))
    write_atomically(out / "prompts.txt", "\n".join(captions) + "\n")
    prepare_prompts(
        out / "prompts.txt",
        cache,
        {p: wan.fingerprint(out / "teacher", p) for p in ("vae", "text_encoder")},
        wan.load_text(out / "teacher"),
    )
    run.mkdir(exist_ok=True)
    config = find_recipe("dmd_lab")
    config = config.with_budget(iterations)
    parts = assemble(config, open_cache(cache), model=str(out / "teacher"), run=run, device=str(device))
    run_training(parts, run)
    resume(parts, run)
    student, fake = parts.student, parts.networks["fake_score"]
    assert isinstance(fake, Denoiser)
    student.transformer.load_state_dict(parts.average.weights)
    card = "The lab's 3-step student, distilled from its teacher by the recipe `dmd_lab`.\n"
    save_student(
        student.transformer, out / "teacher", folder, config.sigmas, torch.float16, card, fake_score=fake.transformer
    )
    return folder


@torch.no_grad()
def draw(family: Path, out: Path) -> None:
    """Reconstructions, flow beside the truth, and samples of teacher and student, as PNG sheets on one page."""
    out.mkdir(parents=True, exist_ok=True)
    vae = wan.load_vae(family / "teacher")
    scenes = [make_scene(HELD_OUT_SEED, i, motion="rich") for i in range(6)]
    clips = rendered_clips(6, HELD_OUT_SEED, "rich")
    decoded = autoencoder.decode_video(vae, autoencoder.encode_video(vae, to_video(clips)))
    rows = [r for a, b in zip(to_frames(to_video(clips)), to_frames(decoded), strict=True) for r in (a, b)]
    contact_sheet(rows, out / "reconstructions.png", titles=[t for s in scenes for t in (s.caption, "decoded")])
    flow = RaftFlow(load_raft(family / "raft"), iterations=4)(to_video(clips)).transpose(1, 2).numpy()
    rows = [flow_picture(f, 4.0) for s, e in zip(scenes, flow, strict=True) for f in (exact_flow(s)[0], e)]
    contact_sheet(rows, out / "flow.png", titles=[t for s in scenes for t in (f"{s.caption}: exact flow", "RAFT")])
    prompts = [s.caption for s in scenes]
    text = wan.load_text(family / "teacher")
    usual = wan.defaults(family / "teacher")
    stacked, null = attention.stack_text(text(prompts)), attention.stack_text(text([usual.negative_prompt]))
    shape = wan.latent_shape(family / "teacher", usual.size)
    seeds = list(range(len(prompts)))
    teacher = Denoiser(wan.load_transformer(family / "teacher").eval(), wan.fast_dtype())
    student = Denoiser(wan.load_transformer(family / "student").eval(), wan.fast_dtype())
    sigmas = tuple(wan.model_facts(family / "student")["sigmas"])
    made = {
        "teacher": sample_teacher(
            teacher, stacked, null, shape, seeds, steps=usual.steps, guidance=usual.guidance, shift=usual.shift
        ),
        "student": sample_student(student, stacked, shape, sigmas, seeds),
    }
    for name, latents in made.items():
        contact_sheet(list(to_frames(autoencoder.decode_video(vae, latents))), out / f"{name}.png", titles=prompts)
    sheets = "".join(f"<h2>{p.stem}</h2><img src='{p.name}'>" for p in sorted(out.glob("*.png")))
    write_atomically(out / "index.html", f"<!doctype html><title>The lab's family</title>{sheets}\n")
