"""What a model is sampled and measured with where nobody says otherwise. Every command takes its defaults from here.

``mogan.json`` in a model's folder says what it wants. What it leaves out is stock Wan's: the defaults of Wan's own
inference code for text to video (``generate.py`` and ``wan/configs`` of Wan2.1, ``wan_ti2v_5B.py`` of Wan2.2), where
1.3B, 14B and TI2V-5B agree. Wan's own README tries other numbers for 1.3B (guidance 6, shift 8 to 12), diffusers'
example a shift of 3 at 480 lines.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mogan.config import EULER, LCM
from mogan.errors import UserError
from mogan.models.causal_cache import Causal, read_causal
from mogan.models.weights import is_here

WAN_NEGATIVE_PROMPT = (  # sample_neg_prompt
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


@dataclass(frozen=True)
class Geometry:
    """What a model was made to generate."""

    fps: int = 16
    height: int = 480
    width: int = 832
    frames: int = 81


WAN_22 = Geometry(fps=24, height=704, width=1280, frames=121)  # TI2V-5B, whose autoencoder has 48 channels

# Wan's image-to-video models: generate.py of Wan2.1 at 480 lines (5 at 720), wan_i2v_A14B.py of Wan2.2
ANIMATING = {"steps": 40, "shift": 3.0, "negative_prompt": f"镜头晃动，{WAN_NEGATIVE_PROMPT}"}  # camera shake, first
ANIMATING_22 = {"steps": 40, "guidance": 3.5}
# its text-to-video model, wan_t2v_A14B.py, whose guidance is 4 above the boundary and 3 below: one number is for both here
TWO_EXPERTS = {"steps": 40, "guidance": 4.0, "shift": 12.0}


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """A model's own numbers; the values here are stock Wan's.

    Attributes:
        size: frame rate and size of its clips.
        sigmas: levels of a few-step student, which needs no guidance; ``None``: a model of many guided steps.
        solver: how its steps follow one another, ``lcm`` (fresh noise between them) or ``euler``.
        counts: numbers of steps it was trained for, where there are several; of fewer than ``sigmas`` every so-maniest is taken.
        causal: how a student that sees the past alone makes clips; ``None``: it sees whole ones.
        steps, guidance, shift: of those.
        negative_prompt: negative prompt of guidance.
        first_frame_guidance: of a model that is given the first frame, at its own levels; 1 is none.
        flow: the estimator that measures its clips (:func:`mogan.motion.estimators.load_flow`); ``None``: see :func:`usual_flow`.
    """

    size: Geometry = Geometry()
    sigmas: tuple[float, ...] | None = None
    solver: str = LCM
    counts: tuple[int, ...] = ()
    causal: Causal | None = None
    steps: int = 50
    guidance: float = 5.0
    shift: float = 5.0
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    first_frame_guidance: float = 5.0
    flow: str | None = None

    def facts(self) -> dict[str, Any]:
        """As ``mogan.json`` holds it: sizes, steps, guidance, shift and negative prompt in full, since stock models differ in them;
        of the others what is not stock Wan's.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "size"}
        own["causal"] = self.causal and self.causal.facts()
        whole = ("steps", "guidance", "shift", "negative_prompt")
        return vars(self.size) | {k: v for k, v in own.items() if k in whole or v != getattr(Defaults, k)}


# of the lab's family, whose text encoder never read a negative prompt
LAB = {"guidance": 3.0, "shift": 3.0, "negative_prompt": "", "first_frame_guidance": 1.0, "flow": "lab"}


def read_defaults(facts: dict[str, Any], usual: Geometry, path: Path) -> Defaults:
    """Defaults of a model whose ``mogan.json`` holds ``facts``.

    Raises:
        UserError: an entry has a value that cannot be meant.
    """
    for name, (good, wanted) in _CHECKS.items():
        if name in facts and not good(facts[name]):
            raise UserError(f"{path}: {name} must be {wanted}, not {facts[name]!r}; correct it")
    size = replace(usual, **{f.name: facts[f.name] for f in fields(Geometry) if f.name in facts})
    own = {f.name: facts[f.name] for f in fields(Defaults) if f.name in facts}
    lists = {"sigmas": tuple(own["sigmas"]) if own.get("sigmas") else None, "counts": tuple(own.get("counts", ()))}
    causal = read_causal(own["causal"]) if own.get("causal") else None
    try:
        for how in causal.variants if causal else ():
            how.policy.seen(how.chunks(1 + (size.frames - 1) // 4))
    except ValueError as error:
        raise UserError(
            f"{path}: clips of {size.frames} frames cannot be made as causal says: {error}; correct it"
        ) from error
    return Defaults(**own | lists | {"size": size, "causal": causal})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_levels(value: Any) -> bool:
    """Whether it is a list of noise levels that fall to above 0, or None."""
    numbers = isinstance(value, list) and all(map(_number, value))
    return value is None or (numbers and all(high > low for high, low in pairwise([*value, 0.0])))


def _causal(value: Any) -> bool:
    try:
        return value is None or read_causal(value).facts() == value
    except (ValueError, TypeError, KeyError):
        return False


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("fps", "height", "width", "frames", "steps"), (_whole, "a whole number above 0")),
    "guidance": (_number, "a number"),
    "first_frame_guidance": (_number, "a number"),
    "shift": (lambda value: _number(value) and 0.001 <= value <= 1000, "a number from 0.001 to 1000"),
    "negative_prompt": (lambda value: isinstance(value, str), "a text"),
    "flow": (lambda value: value is None or isinstance(value, str), "the name of a flow estimator"),
    "solver": (lambda value: value in (LCM, EULER), f"{LCM} or {EULER}"),
    "counts": (lambda value: isinstance(value, list) and all(map(_whole, value)), "whole numbers above 0"),
    "sigmas": (is_levels, "numbers that fall to above 0"),
    "causal": (
        _causal,
        "chunks (first, rest), window, sink, sink_decay, relative and context_sigma of a causal student, and first_sigmas and "
        "sizes if it has them",
    ),
}


# ---------------------------------------------------------------------------------------------- what measures motion

WITHOUT_WEIGHTS = "dis"  # half of Farneback's warping error on the published clips, in three quarters of its time


def usual_flow(*wanted: str) -> str:
    """The estimator for clips of no model that names one: the first of these RAFT weights that is here, else DIS."""
    return next(filter(is_here, wanted), WITHOUT_WEIGHTS)
