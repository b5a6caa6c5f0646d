"""What can be sampled: a folder of a model, or a training run on top of one; and the motion model of a run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogan.config import EULER, LCM
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.denoiser import Denoiser
from mogan.models.experts import LOW, boundary_of, low_noise
from mogan.models.frame_sparse import Mask, masked, read_mask
from mogan.models.lora import merge_learned
from mogan.models.states import attach_states, read_states, state_names
from mogan.models.step_condition import tell_steps
from mogan.runs.checkpoint import load_part, settings, student_checkpoint
from mogan.runs.identity import causal_of_config, part_of_run, read_config
from mogan.schedule import levels_of


@dataclass(frozen=True)
class Generator:
    """Where a generator's parts lie: a diffusers folder, or a training run on top of one.

    ``told``: the run's student reads where its steps end. ``counts``: numbers of steps it was trained for, if several.
    ``causal``: how it makes clips, if it sees the past alone. ``states``: that it can be told (:mod:`mogan.models.states`).
    ``animates``: the run's student was distilled to go on from a first frame that it is given at level 0. ``continues``: it is
    given that, and is sampled with guidance. ``fine_tuned``: the run trained a model on clips, which is sampled in many guided
    steps as its base is.
    """

    folder: Path
    sigmas: tuple[float, ...] | None
    geometry: wan.Geometry
    run: Path | None = None
    lora: int | None = None
    solver: str = LCM
    counts: tuple[int, ...] = ()
    told: bool = False
    boundary: float | None = None
    causal: Causal | None = None
    states: tuple[str, ...] = ()
    animates: bool = False
    continues: bool = False
    fine_tuned: bool = False

    def in_steps(self, count: int) -> "Generator":
        """The same generator, sampled in so many steps.

        Raises:
            UserError: it was not trained for that.
        """
        if count not in self.counts or self.sigmas is None:
            offered = ", ".join(map(str, self.counts))
            raise UserError(f"the student was trained for {offered} steps, not for {count}: give --steps one of these")
        return replace(self, sigmas=levels_of(self.sigmas, count))

    def in_chunks(self, size: int) -> "Generator":
        """The same generator, in chunks of so many latents after the first.

        Raises:
            UserError: it was not trained for that.
        """
        assert self.causal is not None
        sizes = self.causal.sizes or (self.causal.rest,)
        if size not in sizes:
            offered = ", ".join(map(str, sizes))
            raise UserError(
                f"the student was trained for chunks of {offered} latents, not of {size}: give --chunk one of these"
            )
        return replace(self, causal=replace(self.causal, rest=size))

    def require_whole_clips(self, name: str) -> None:
        """Refuse a student that sees the past alone. Raises UserError."""
        if self.causal is not None:
            raise UserError(
                f"{name} sees the past alone, which a teacher does not: name the model it was made from with --model"
            )

    @property
    def mask(self) -> Mask | None:
        """What its blocks see of a clip; None: everything."""
        return read_mask(self.folder / "transformer")

    def steps_told(self) -> dict[str, Any]:
        """What is said of a few-step student's steps: their levels, and the solver where it is not the usual one."""
        told: dict[str, Any] = {"sigmas": list(self.sigmas or ())}
        told |= {} if self.solver == LCM else {"solver": self.solver}
        return told | ({"causal": self.causal.facts()} if self.causal else {})

    def load(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        """The network, computing in ``dtype``; of a run, with the averaged weights or adapters of the checkpoint that
        :func:`mogan.runs.checkpoint.student_checkpoint` names, the latter merged.
        """
        low = None if self.boundary is None else self.start(low_noise(self.folder))
        if self.causal is not None:
            denoiser: Denoiser = CausalDenoiser(self.start(), dtype, self.causal)
        else:
            denoiser = Denoiser(self.start(), dtype, low, self.boundary)
        if self.lora is not None:
            merge_learned(denoiser.learner, self.average())
        elif self.run is not None:
            denoiser.learner.load_state_dict(self.average())
        return denoiser

    def start(self, part: str = "transformer") -> torch.nn.Module:
        """A transformer of the folder as the run began with it, frame-sparse where the folder says so."""
        transformer = masked(wan.load_transformer(self.folder, part), self.folder / part)
        if self.states and part == "transformer" and not state_names(transformer):
            attach_states(transformer, dict.fromkeys(self.states, torch.zeros(transformer.config.text_dim)))
        return tell_steps(transformer) if self.told else transformer

    def average(self) -> dict[str, Tensor]:
        """What a run's student learned, averaged: its weights or its adapters. Raises UserError where a checkpoint lacks them."""
        if found := load_part(self._checkpoint(), "ema"):
            return found
        raise UserError(f"{self._checkpoint()} holds no weights of a student: delete that folder to use the one before")

    def mark(self) -> str:
        """Sixteen hex digits that change with the weights that are sampled."""
        if self.run is None:
            parts = ["transformer"] if self.boundary is None else ["transformer", LOW]
            return "-".join(wan.fingerprint(self.folder, part) for part in parts)
        checkpoint = self._checkpoint()
        return wan.fingerprint(checkpoint.parent, checkpoint.name)

    def _checkpoint(self) -> Path:
        assert self.run is not None
        return student_checkpoint(self.run)


def open_generator(name: str) -> Generator:
    """Find a generator by model name, diffusers folder, hub id or training run.

    Raises:
        UserError: there is no such model or run, or it cannot be sampled.
    """
    run = Path(name)
    if (run / "run.json").is_file():
        folder = part_of_run(run, "student")
        config = read_config(run)
        if settings(config).get("motion_score"):
            raise UserError(
                f"{name} is a motion model, not a generator: give it as --motion beside a teacher as --model"
            )
        kind, own_boundary = config.get("rollout") or {}, config.get("boundary")
        return Generator(
            folder, tuple(config["sigmas"]), wan.geometry(folder), run, config.get("lora"), config.get("solver", LCM),
            tuple(kind.get("counts") or ()), bool(kind.get("told")),
            boundary_of(folder) if own_boundary is None else own_boundary, causal_of_config(kind.get("causal")),
            tuple(sorted(config.get("states") or read_states(folder))),
            bool(config.get("given")) and config.get("solver", LCM) == EULER,
            bool(config.get("given")) and config.get("solver", LCM) == LCM and not kind.get("causal"),
            set(config.get("objectives") or ()) == {"flow_matching"} and not (kind or config.get("given")),
        )  # fmt: skip
    folder = wan.resolve_model(name)
    own = wan.defaults(folder)
    return Generator(
        folder,
        own.sigmas,
        own.size,
        solver=own.solver,
        counts=own.counts,
        boundary=boundary_of(folder),
        causal=own.causal,
        states=tuple(sorted(read_states(folder))),
    )


def open_motion(run: Path, base: Path, frames: int) -> tuple[torch.nn.Module, int]:
    """The transformer of a motion model's run that saw whole clips of ``frames`` latents, and how many it was given.

    Raises:
        UserError: the run is none, was trained on other latents or text than ``base``'s, or on shorter windows.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a training run: give --motion the --out of a motion score recipe")
    config = settings(read_config(run))
    folder = part_of_run(run, "student")
    if "motion_score" not in config:
        raise UserError(f"{run} trained {config['recipe']}, no motion model: use a recipe such as motion_score_lab")
    if any(wan.fingerprint(folder, part) != wan.fingerprint(base, part) for part in ("vae", "text_encoder")):
        raise UserError(f"{run} was trained on latents or text of another model than {base}: train it from that one")
    windows = config["motion_score"]["windows"]
    given = next((k for k in (1, 0) if [k, frames - 1] in windows), None)
    if given is None:
        raise UserError(f"{run} never saw a whole clip of {frames} latents (windows {windows}): add (1, {frames - 1})")
    return Generator(folder, None, wan.geometry(folder), run, config.get("lora")).load().transformer, given
