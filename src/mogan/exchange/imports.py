"""In from elsewhere: students and LoRAs made by other programs -> a diffusers folder that every command here reads."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from mogan.disk.files import writable_folder
from mogan.errors import UserError
from mogan.exchange.card import model_card
from mogan.exchange.export import save_student
from mogan.exchange.layouts import IMAGE, QUANTISED, UNMERGED, adapters_in, diffusers_name, is_lora, parts_of_lora
from mogan.exchange.lora_file import DTYPES
from mogan.exchange.schedulers import scheduler_for
from mogan.exchange.tensors import check_numbers, declared_alpha, files_of, read_tensors, some
from mogan.exchange.usage import ANIMATING_USAGE, CAUSAL_USAGE, FOLDER_USAGE
from mogan.models import wan
from mogan.models.causal_cache import Causal, Policy
from mogan.models.experts import boundary_of
from mogan.ranges import at_least, between

# of a training checkpoint, best first
GENERATORS = ("generator_ema", "generator", "ema", "model", "module", "state_dict")
CRITICS = ("critic", "fake_score")


def import_student(
    file: tyro.conf.Positional[Path],
    *,
    base: str,
    out: Path,
    sigmas: tuple[float, ...],
    chunks: tuple[int, int] | None = None,
    window: int | None = None,
    sink: int = 0,
    sink_decay: float | None = None,
    relative: bool = False,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> None:
    """Make a diffusers folder of a few-step student that another program trained.

    Reads weights (Self-Forcing, CausVid, FastVideo, the original Wan code, ComfyUI, diffusers) and LoRA files (diffusers,
    peft, ComfyUI, kohya), which are merged into the base. Nothing in a file is executed, and every number is checked.

    Args:
        file: .safetensors, .sft, .pt, .pth, .ckpt or .bin, or a folder with the .safetensors of one model.
        base: the model it was made from: a diffusers folder, a hub id, or lab (its teacher). All but the transformer is taken from it.
        out: the folder to write; must not exist yet.
        sigmas: noise levels it samples at, from 1 downwards, final 0 left out (timesteps divided by 1000).
        chunks: of a causal student: latent frames of the first chunk and of each later one (Self-Forcing 3 3); without it the
            student sees whole clips.
        window: latent frames that a chunk sees, its own among them (Reward Forcing 9); without it all of the past.
        sink: of these the first ones of the clip, which never leave (Reward Forcing 3).
        sink_decay: alpha of a sink that is averaged with what leaves the window (Reward Forcing 0.999).
        relative: number what is seen 0, 1, 2, ... and not as in the clip (Reward Forcing does).
        dtype: precision of the saved transformer.
    """
    between(1, 1024, window=window)
    at_least(0, sink=sink)
    between(0, 1, sink_decay=sink_decay)
    if out.exists():
        raise UserError(f"{out} exists already: give another --out or remove it")
    writable_folder(out.parent)
    if sigmas[:1] != (1.0,) or any(not 0 < low < high for high, low in pairwise(sigmas)):
        raise UserError(f"--sigmas fall from 1 to above 0 (a timestep of 757 is 0.757), not {list(sigmas)}")
    causal = _causal(chunks, (window, sink, sink_decay, relative))
    scheduler_for(sigmas)  # refuse before reading gigabytes
    files, folder = files_of(file), wan.resolve_model(wan.base_named(base))
    if boundary_of(folder) is not None:
        raise UserError(
            f"{base} has two experts, and a file of a student is imported as one: give the --base of a student of one transformer"
        )
    animates = wan.is_image_to_video(folder)
    if not animates:
        wan.refuse_controls(folder, "files of students have no part for them")
    elif causal is not None:
        raise UserError(f"{base} animates a first frame, and causal students make clips from text: leave out --chunks")
    if chunks is not None and max(chunks) > (longest := wan.latent_shape(folder, wan.geometry(folder))[1]):
        raise UserError(f"--chunks: a clip of {base} has {longest} latent frames, and no chunk can have {max(chunks)}")
    state, critic, part = read_student(files)
    refuse_unread(state, file)
    transformer = wan.load_transformer(folder)
    if is_lora(state):
        changed = add_lora(transformer, state, file, declared_alpha(files[0]))
        what = f"LoRA merged into {changed} tensors"
    else:
        set_weights(transformer, state, file)
        what = f"weights ({part})" if part else "weights"
    fake_score = None
    if critic is not None:
        fake_score = wan.load_transformer(folder)
        own = {name: value.shape for name, value in fake_score.state_dict().items()}
        if {diffusers_name(name): value.shape for name, value in critic.items()} == own:
            set_weights(fake_score, critic, file)
        else:  # with heads of a discriminator, or of another size: the student is as good without
            fake_score = None
            print("its critic is left out: its tensors are not those of a transformer of this base")
    note = f"- made from `{file.resolve().name}` ({what}) by `mogan import`; the licence of that file holds too"
    usage = CAUSAL_USAGE if causal else ANIMATING_USAGE if animates else FOLDER_USAGE
    card = model_card("Few-step Wan student", folder, sigmas, [note], usage, causal=causal)
    save_student(transformer, folder, out, sigmas, DTYPES[dtype], card, fake_score=fake_score, causal=causal)
    also = " and its critic as the fake score" if fake_score is not None else ""
    more = " --first-frames VIDEOS" if animates else ""
    print(
        f"imported {what}{also} to {out}; try: mogan sample --model {quote(str(out))} --prompts prompts.txt{more} --out clips"
    )


def _causal(chunks: tuple[int, int] | None, policy: tuple[int | None, int, float | None, bool]) -> Causal | None:
    """How a student makes clips, as options say it: see :class:`mogan.models.causal_cache.Policy`.

    Raises:
        UserError: they do not go together.
    """
    if chunks is None:
        if policy != (None, 0, None, False):
            raise UserError(
                "--window, --sink, --sink-decay and --relative are of a causal student: give its --chunks, too"
            )
        return None
    if min(chunks) < 1:
        raise UserError(f"--chunks are two numbers of latent frames above 0, not {list(chunks)}")
    try:
        causal = Causal(*chunks, Policy(*policy))
        causal.policy.seen(causal.chunks(sum(chunks) + 2 * (policy[0] or 0)))  # a clip that fills the window
    except ValueError as error:
        raise UserError(f"--chunks, --window and --sink do not go together: {error}") from error
    return causal


def read_student(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, str | None]:
    """The student's tensors, its critic's if the file holds one, and under which entry the student was found.

    Raises:
        UserError: the file holds no tensors of a student.
    """
    whole = read_tensors(files)
    part = next((name for name in GENERATORS if isinstance(whole.get(name), dict)), None)
    critics = (_tensors(whole[name]) for name in CRITICS if isinstance(whole.get(name), dict))
    critic = next((state for state in critics if state), None)
    tensors = _tensors(whole if part is None else whole[part])
    if not tensors:
        holds = f"nothing but {', '.join(map(str, list(whole)[:5]))}" if whole else "nothing"
        raise UserError(f"{files[0]} holds no tensors, {holds}; give a file of weights")
    return tensors, critic, part


def _tensors(state: dict) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and isinstance(k, str)}


def refuse_unread(names: Iterable[str], file: Path) -> None:
    """Refuse a file that looks like weights or a LoRA and is read by nothing here, saying what it is."""
    for name in names:
        kind = next((what for pattern, what in UNMERGED.items() if re.search(pattern, name)), None)
        if kind:
            raise UserError(
                f"{file} is {kind} ({name}); LoRA and whole differences are merged here: merge it where it was made, and "
                "import the weights"
            )
        if QUANTISED.search(name):
            raise UserError(f"{file} holds quantised or scaled weights ({name}): get the fp32, fp16 or bf16 file")


def set_weights(transformer: Any, state: dict[str, Tensor], file: Path) -> None:
    """Fill a transformer with a file's weights, all of them or none.

    Raises:
        UserError: tensors are missing, surplus or of another shape.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if diffusers_name(name) in named:
            raise UserError(f"{file} holds two networks in one list ({name}): save the student's alone")
        named[diffusers_name(name)] = tensor
    own = transformer.state_dict()
    lacks, more = own.keys() - named.keys(), named.keys() - own.keys()
    misfits = {k for k in own.keys() & named.keys() if own[k].shape != named[k].shape}
    if lacks == own.keys():
        raise UserError(f"{file} holds no Wan transformer but {some(more)}: name the file of the transformer")
    _refuse_image((name for name in state if diffusers_name(name) in more), file)
    wrong = [f"lacks {some(lacks)}"] if lacks else []
    wrong += [f"has {some(more)} too many"] if more else []
    wrong += [f"has another shape for {some(misfits)}"] if misfits else []
    if wrong:
        sizes = [_size({k: v.shape for k, v in weights.items()}) for weights in (named, own)]
        raise UserError(
            f"{file} does not fit this base: it {', and it '.join(wrong)}; "
            + (
                f"it has {sizes[0]}, the base {sizes[1]}: give the --base it was made from"
                if sizes[0] != sizes[1]
                else "it is damaged, or of another kind of model than the base"
            )
        )
    check_numbers(state, file)
    blank = {k for k in own if own[k].dim() > 1 and own[k].any() and not named[k].any()}
    if blank:
        raise UserError(
            f"{file} holds nothing but zeros where weights should be, in {some(blank)}: its download broke off, or it was saved "
            "too early; get it again"
        )
    transformer.load_state_dict(named)


@torch.no_grad()
def add_lora(transformer: Any, state: dict[str, Tensor], file: Path, alpha: float | None) -> int:
    """Add the changes that a LoRA file of any layout describes, all of them or none; returns how many tensors change.

    The change of a weight is ``alpha / rank B A``, and ``B A`` where no alpha is given. ``diff``, ``diff_b`` and ``diff_m``
    are changes of the weight, of the bias and of the modulation themselves.

    Args:
        transformer: of the base.
        state: the file's tensors.
        file: its name.
        alpha: of every adapter, where it is kept outside of the tensors.

    Raises:
        UserError: the file holds several adapters, an unknown kind, or tensors that do not fit.
    """
    own = dict(transformer.named_parameters())
    modules = {n.removesuffix(".weight").removesuffix(".bias") for n in own}
    if len(several := adapters_in(state)) > 1:
        raise UserError(f"{file} holds several adapters ({', '.join(sorted(several))}): save the one to import alone")
    parts, lost = parts_of_lora(state, modules)
    _refuse_image(lost, file)
    if lost:
        blocks = {int(m[1]) for name in lost if (m := re.search(r"\bblocks[._](\d+)[._]", name))}
        deeper = blocks and min(blocks) >= len(transformer.blocks)
        raise UserError(
            f"{file} changes {some(set(lost))} that this base lacks; "
            + (
                f"it has a block {max(blocks)}, the base {len(transformer.blocks)} blocks: give the --base it was made from"
                if deeper
                else "it is no LoRA of a Wan transformer alone"
            )
        )
    check_numbers({k: v for k, v in state.items() if not k.endswith(".alpha") or v.is_floating_point()}, file)
    changes: dict[str, Tensor] = {}
    for module, found in parts.items():
        weight = module if module in own else f"{module}.weight"
        for parameter, names, change in _changes(module, weight, found, state, file, alpha):
            if parameter not in own or not _fits(change, own[parameter]):
                has = f"as {tuple(own[parameter].shape)}" if parameter in own else "not at all"
                raise UserError(
                    f"{file} changes {names[0]} as {tuple(change.shape)}, which this base has {has}; give the --base it was "
                    "made from"
                )
            changes[parameter] = changes.get(parameter, 0) + change.reshape(own[parameter].shape)
            if not (own[parameter] + changes[parameter]).isfinite().all():
                raise UserError(f"{file} makes {parameter} infinite ({names[0]}): it is damaged, get it again")
    if not any(change.any() for change in changes.values()):
        raise UserError(f"{file} changes nothing: all its differences are zero")
    for parameter, change in changes.items():
        own[parameter] += change
    return len(changes)


def _changes(
    module: str, weight: str, found: dict[str, list[str]], state: dict[str, Tensor], file: Path, alpha: float | None
) -> Iterator[tuple[str, list[str], Tensor]]:
    """What a file changes in one module: the parameter's name, the file's names, the change."""
    if twice := next((names for names in found.values() if len(names) > 1), None):
        raise UserError(f"{file} says twice what it changes ({', '.join(twice)}): save one of them alone")
    one = {kind: state[names[0]] for kind, names in found.items()}
    if odd := one.keys() - {"A", "B", "alpha", "diff", "diff_b"}:
        name = found[min(odd)][0]
        raise UserError(f"{file} holds {name} beside changes: only LoRA and whole differences are merged here")
    if ("A" in one) != ("B" in one):
        (name,) = found["A" if "A" in one else "B"]
        raise UserError(f"{file} holds {name} without its other factor: it was saved in part, get it again")
    if "A" in one:
        a, b = one["A"].float(), one["B"].float()
        if min(a.ndim, b.ndim) < 2 or not a.shape[0] == b.flatten(1).shape[1] > 0:
            raise UserError(
                f"{file}: the ranks of {found['A'][0]} {tuple(a.shape)} and {found['B'][0]} {tuple(b.shape)} differ or are 0: it is "
                "damaged, get it again"
            )
        if "alpha" in one and one["alpha"].numel() != 1:
            raise UserError(f"{file}: {found['alpha'][0]} is not one number: it is damaged, get it again")
        strength = float(one["alpha"]) if "alpha" in one else alpha
        scale = 1.0 if strength is None else strength / a.shape[0]
        yield weight, found["A"], scale * (b.flatten(1) @ a.flatten(1))
    for kind, parameter in (("diff", weight), ("diff_b", f"{module}.bias")):
        if kind in one:
            yield parameter, found[kind], one[kind].float()


def _fits(change: Tensor, parameter: Tensor) -> bool:
    """Whether a change is of a parameter's shape; sides of length 1 and a convolution's flattened kernel do not count."""
    sides = [n for n in change.shape if n != 1]
    return sides in (
        [n for n in shape if n != 1]
        for shape in (parameter.shape, parameter.flatten(1).shape if parameter.ndim > 1 else ())
    )


def _refuse_image(names: Iterable[str], file: Path) -> None:
    seen = {name for name in names if IMAGE.search(name)}
    if seen:
        raise UserError(
            f"{file} is of an image-to-video Wan with CLIP ({min(seen)}), which this base is not: give the --base it was made from"
        )


def _size(shapes: Mapping[str, torch.Size]) -> str:
    """Depth and width of a Wan transformer, in words."""
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}
    shape = next((s for name, s in shapes.items() if name.endswith("attn1.to_q.weight") and s), None)
    return f"{len(blocks)} blocks" + (f" of width {shape[0]}" if shape else "")
