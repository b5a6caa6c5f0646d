"""What a run starts from: folders, geometry, precision, and networks loaded as its config wants them; and the checks that
config, cache, model and processes go together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache as once
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from mogan.config import Config
from mogan.data.cache import Cache, ensure_text
from mogan.distributed import World
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.causal_cache import Causal, Policy
from mogan.models.host import in_pieces
from mogan.models.lora import hold_in, twin
from mogan.models.parts import config_of
from mogan.objectives.base import Base, spread
from mogan.runs.generator import open_generator
from mogan.runs.identity import TEACHER, of_model
from mogan.terms import PATH


def filled(config: Config, cache: Cache) -> Config:
    """The config with what its objectives leave to the run's data.

    Raises:
        UserError: the data do not fit an objective.
    """
    objectives = dict(config.objectives)
    for name in config.objectives:
        fill = config.terms(name).fill
        objectives[name] = fill(cache) if fill else objectives[name]
    return replace(config, objectives=objectives)


def load(
    config: Config, cache: Cache, model: str, student: str | None, world: World, prompts: Cache | None = None
) -> Base:
    """Find and check everything a run needs; the arguments are :func:`mogan.training.assemble.assemble`'s.

    Raises:
        UserError: config, cache, model and processes do not go together.
    """
    check_processes(config, world)
    folder, start, adapters_of = find_models(config, model, student)
    size = wan.geometry(folder)
    for texts in filter(None, (cache, prompts)):
        read_by = [part for part in ("text_encoder", "tokenizer") if part in texts.facts and (folder / part).is_dir()]
        texts.require(**{part: wan.fingerprint(folder, part) for part in read_by})
    if cache.has_clips or cache.has_paths:
        cache.require(vae=wan.fingerprint(folder, "vae"))
        made_for, size = size, wan.Geometry(**{k: cache.facts[k] for k in ("fps", "height", "width", "frames")})
        if size != made_for and world.main:
            print(
                f"clips of {cache.path} are {_in_words(size)}, the model's {_in_words(made_for)}: `mogan sample` and exports of "
                "this run make the model's"
            )
    shape = wan.latent_shape(folder, size)
    if wan.has_controls(folder) or wan.has_controls(start):
        _check_controls(config, cache, prompts, world, folder, start)
        shape = (shape[0], shape[1] + (prompts or cache).references, *shape[2:])
    _check_tokens(world, folder, shape)
    _check_window(config, shape[1])
    _check_clips(config, cache, folder)
    _check_given(config, cache, prompts)
    _check_captions(config, cache, prompts)
    dtype = wan.dtype_of(config.precision, world.device)
    vae = wan.load_vae(folder, dtype).to(world.device)
    vae = in_pieces(vae) if config.offload else vae
    encode, (frozen, held) = _text_encoder(cache, folder, world), _frozen_weights(config, dtype, world)
    return Base(
        config, cache, world, folder, start, adapters_of, size, shape, dtype, vae, encode, frozen, held, prompts
    )


def _in_words(size: wan.Geometry) -> str:
    return f"{size.frames} x {size.height} x {size.width} at {size.fps} fps"


def find_models(config: Config, model: str, student: str | None) -> tuple[Path, Path, Path | None]:
    """Folders of the base model and of the student's start, and the run whose adapters it starts with, if any.

    Raises:
        UserError: a model is missing, or cannot take its part in the recipe.
    """
    base = wan.resolve_model(wan.base_named(model))
    if wan.is_told(base):
        raise UserError(
            f"{model} is told where its steps end, which a teacher is not: name the model it was made from with --model"
        )
    if wan.defaults(base).causal is not None:
        raise UserError(
            f"{model} sees the past alone, which a teacher does not: name the model it was made from with --model"
        )
    wan.refuse_few_steps(base, model)
    if student is None and config.post_trains and model != "lab":
        raise UserError(
            f"{config.recipe} post-trains a student: name it with --student (the export of the run that made it)"
        )
    if student is None and not config.post_trains:
        return base, base, None
    source = open_generator(student or "lab")
    if source.run is not None and (config.lora is None or source.lora != config.lora):
        raise UserError(
            f"{student} is a run with "
            + (f"adapters of rank {source.lora}: give --lora {source.lora}, or" if source.lora else "full weights:")
            + " export it with `mogan export` and name the export with --student"
        )
    if source.causal is None and config.causal is not None and config.post_trains:
        raise UserError(
            f"{student or 'the student of the lab'} sees whole clips and {config.recipe} post-trains a student that sees the past "
            "alone: name one with --student (an export of a run that trained one)"
        )
    if source.causal and not _follows(config.causal, source.causal):
        raise UserError(
            f"{student} is a causal student of {source.causal} and {config.recipe} trains "
            + (f"one of {config.causal}" if config.causal else "one that sees whole clips")
            + ": go on with the recipe that made it, or name another --student"
        )
    if config.post_trains and source.sigmas and not _agree(source.sigmas, config.sigmas):
        raise UserError(
            f"{student or 'the student of the lab'} samples at levels {list(source.sigmas)}, the recipe {config.recipe} at "
            f"{list(config.sigmas)}; they must agree: name a student that fits with --student, or another recipe"
        )
    return base, source.folder, source.run


def _follows(wanted: Causal | None, start: Causal) -> bool:
    """Whether a causal student is taken up: as it is, or to see less than all of its past, which is how windows begin; in
    chunks of any size by who trains it for several.
    """
    if wanted is None:
        return False
    known = replace(start.layout, first=wanted.first, rest=wanted.rest) if wanted.sizes else start.layout
    return known in (wanted.layout, replace(wanted.layout, policy=Policy()))


def _agree(sigmas: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return len(sigmas) == len(others) and all(abs(a - b) < 1e-4 for a, b in zip(sigmas, others, strict=True))


Frozen = Callable[[Path, str], Any]


def _frozen_weights(config: Config, dtype: torch.dtype, world: World) -> tuple[Frozen, Frozen]:
    """Load frozen transformers, each once: to be called, and as weights that networks with adapters share.

    What is shared lies whole on every process.
    """

    @once
    def held(folder: Path, part: str) -> Any:
        kept_in = dtype if config.lora else torch.float32
        return hold_in(wan.load_transformer(folder, part), kept_in).to(world.device if config.lora else "cpu")

    @once
    def frozen(folder: Path, part: str) -> Any:
        if config.lora is None:
            return spread(held(folder, part), world, dtype)
        # splitting tokens changes a module tree, and adapters need it as it was
        return (
            held(folder, part) if world.sequence is None else spread(twin(held(folder, part)), world, dtype, whole=True)
        )

    return frozen, held


def _check_window(config: Config, frames: int) -> None:
    """A causal student's chunks fit into its window, and what leaves it into its sink."""
    if config.causal is not None:
        try:
            for how in config.causal.variants:
                how.policy.seen(how.chunks(frames))
        except ValueError as error:
            raise UserError(f"{config.recipe}, clips of {frames} latent frames: {error}") from error


def _check_clips(config: Config, cache: Cache, model: Path) -> None:
    """A batch of clips is no larger than the cache, and as large as who learns of it needs; a teacher's paths are this model's."""
    for update in config.plan:
        lesson = config.lesson(update)
        if update.batch < lesson.least:
            raise UserError(
                f"{update.label} compares the clips of a batch with each other: give --batch {lesson.least} or more"
            )
        if not lesson.clips:
            continue
        if PATH in lesson.clips:
            cache.require_paths((*config.sigmas, 0.0), of_model(model, TEACHER))
        if lesson.clips != (PATH,):
            cache.require_clips()
        if update.batch > len(cache):
            raise UserError(
                f"{update.label} takes {update.batch} clips at a time and {cache.path} holds {len(cache)}: make more, or "
                f"give --batch {len(cache)}"
            )


def _check_given(config: Config, cache: Cache, prompts: Cache | None) -> None:
    """First frames that a student is given are those of clips, and all that judge its clips pass them on."""
    rolled = [update for update in config.plan if config.lesson(update).rollout]
    if not config.given or not rolled:
        return
    for name in dict.fromkeys(name for update in rolled for name in update.judges):
        if not config.terms(name).first_frames:
            raise UserError(
                f"{config.recipe}: {name} asks networks under text alone, and the student is given its first frame: leave out "
                "given, or take another objective"
            )
    if not (prompts or cache).has_clips:
        raise UserError(
            f"{config.recipe} gives the student the first frames of clips, and {(prompts or cache).path} has prompts alone: "
            "prepare captioned videos"
        )


def _check_controls(config: Config, cache: Cache, prompts: Cache | None, world: World, base: Path, start: Path) -> None:
    """A VACE or an image-to-video model learns from who passes its conditions on, of clips that have them."""
    kinds = [(wan.has_controls(m), wan.is_image_to_video(m), wan.sees_pictures(m)) for m in (base, start)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{base} and {start} are told different things beside text (a VACE controls, an image-to-video model the first "
            "frame): take both of one kind"
        )
    animates = wan.is_image_to_video(base)
    kind = "an image-to-video model" if animates else "a VACE, which reads controls"
    for name in config.objectives:
        terms = config.terms(name)
        if not (terms.controls or (animates and terms.first_frames)):
            raise UserError(
                f"{config.recipe}: {name} asks networks under text alone, and {base} is {kind}: take another recipe, or a model that "
                "makes clips from text"
            )
    if config.given or config.told:
        told = "is told where its steps end" if config.told else "is given its first frame by its level"
        raise UserError(
            f"the student of {config.recipe} {told}, and {base} is {kind}, which cannot be: take another recipe"
        )
    if world.sequence is not None:
        raise UserError(f"--context-parallel does not go with {kind}: leave it out")
    for texts in filter(None, (cache, prompts)):
        if not texts.has_controls:
            raise UserError(
                f"{base} is {kind}, and {texts.path} has no "
                + (
                    f"first frames: prepare videos with `mogan prepare --model {quote(str(base))}`"
                    if animates
                    else "controls of its clips: prepare them with `mogan prepare --controls`"
                )
            )
    if prompts is not None and prompts.references != cache.references:
        raise UserError(
            f"clips of {cache.path} have {cache.references} reference pictures and those of {prompts.path} "
            f"{prompts.references}: prepare them with as many"
        )


def _check_captions(config: Config, cache: Cache, prompts: Cache | None) -> None:
    """Every update has words: clips may lack a caption where nobody reads it."""
    if prompts is not None and all(config.lesson(update).captions for update in config.plan):
        raise UserError(f"{config.recipe} learns from clips and their own captions alone: leave out --prompts")
    for update in config.plan:
        of_clips = config.lesson(update).captions
        texts = cache if prompts is None or of_clips else prompts
        bare = [entry["id"] for entry in texts.entries if entry["caption"] is None]
        if bare:
            instead = "" if of_clips else ", or give --prompts a cache of prompts (`mogan prepare prompts.txt`)"
            raise UserError(
                f"{len(bare)} clips of {texts.path} have no caption (first {bare[0]}), and {update.label} reads it: prepare "
                f"them with captions{instead}"
            )


def _check_tokens(world: World, folder: Path, shape: Sequence[int]) -> None:
    """Processes that share a sample take equal parts of its tokens."""
    if world.sequence is None:
        return
    patch, count = (config_of(folder, "transformer") or {}).get("patch_size", (1, 2, 2)), world.sequence.size()
    tokens = math.prod(size // p for size, p in zip(shape[1:], patch, strict=True))
    if tokens % count:
        raise UserError(
            f"--context-parallel {count} does not divide the {tokens} tokens of a clip: take another number"
        )


def check_processes(config: Config, world: World) -> None:
    """Refuse what cannot be spread over these processes."""
    if config.causal is not None and world.sequence is not None:
        raise UserError(
            "a causal student's tokens are not split over processes, since its past would have to be: leave out "
            "--context-parallel"
        )
    if config.causal is not None and config.compile:
        raise UserError("a causal student's blocks would be compiled once per length of the past: leave out --compile")
    if config.compile and world.sequence is not None:
        raise UserError(
            "--compile does not go with --context-parallel, whose hooks lie inside the blocks: leave one out"
        )
    if world.ranks > 1 and config.alone:
        raise UserError(f"{config.alone}: start one, or choose another recipe")
    for update in config.plan:
        if update.batch % world.shares:
            raise UserError(
                f"{update.label}: a batch of {update.batch} does not split over {world.shares} processes; give --batch a "
                f"multiple of {world.shares}, start fewer processes, or let several share a sample (--context-parallel)"
            )


def _text_encoder(cache: Cache, base: Path, world: World) -> wan.TextEncoder:
    """Encode through the cache, on the first process for all.

    The text encoder, Wan's largest part, is loaded only for a prompt that is not in the cache, and not kept.
    """

    def encode(prompts: list[str]) -> list[Tensor]:
        encoder = once(lambda: wan.load_text(base))
        ensure_text(cache.path, prompts, lambda missing: encoder()(missing))
        return [cache.text(p) for p in prompts]

    return lambda prompts: world.from_main(lambda: encode(prompts))
