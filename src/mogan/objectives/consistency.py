"""Causal consistency distillation: few steps from a causal model of many, on real clips, without its paths (2602.02214).

Or consistency training, which needs no teacher (LLIA, arXiv 2506.05806, on Song et al., arXiv 2303.01469).
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.causal import forced
from mogan.data.batches import Batch
from mogan.data.cache import Cache
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.models.lora import learned_state
from mogan.models.states import state_names, told
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness, guided_calls
from mogan.objectives.base import Base
from mogan.objectives.teacher_forcing import Forced, forcing_terms, past_of, per_chunk, require_one_pass
from mogan.sampling.rollout import normal
from mogan.schedule import add_noise, broadcast, shifted_levels, uniform, velocity_to_x0
from mogan.sharding import local
from mogan.terms import Terms

DROPPED = 0.1  # of clips' states, so that a student without one is one, too


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency distillation of the causal model that the student starts as; see :class:`Consistency`.

    Attributes:
        steps: of the teacher's grid; ``shift``: of its levels.
        guidance: of the teacher; ``None``: none takes a step, the next level is reached with the same noise.
        decay: of the average that is the target; ``since``: iteration before which the target is the student itself.
        warm_up: iterations in chunks of one size, ``rest``, of a student for several.
    """

    steps: int
    shift: float
    guidance: float | None
    decay: float
    since: int = 0
    warm_up: int | None = None

    def terms(self, config: Config) -> Terms:
        """Those of all that teacher-forces."""
        if self.warm_up is not None and (config.causal is None or config.causal.sizes is None):
            raise ValueError(
                "consistency: warm_up comes before chunks of several sizes: give the recipe's Causal sizes"
            )
        return forcing_terms(config)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The start twice more: as the frozen teacher, and as the target that follows the student.

        Raises:
            UserError: the start is none that this can distil.
        """
        if base.adapters_of is not None:
            raise UserError(
                f"{base.config.recipe} distils the model that it starts from: name an export of {base.adapters_of}"
            )
        student = require_one_pass(base)
        if base.world.main and wan.defaults(base.start).causal is None:
            print(
                f"{base.config.recipe} distils the model that it starts from, and {base.start} has never seen the past alone: name "
                "the export of a teacher-forced run (causal_teacher_lab) with --student",
                file=sys.stderr,
            )
        target = CausalDenoiser(base.denoiser(base.start, "transformer").transformer.requires_grad_(False), base.dtype)
        teacher = None
        if self.guidance is not None:
            teacher = CausalDenoiser(base.frozen(base.start, "transformer"), base.dtype)
        config = base.config
        states = state_names(student.transformer)
        null = told(base.no_text(config.negative_prompt)[0], None, states)[None]
        if states and teacher is not None and state_names(teacher.transformer) != states:
            raise UserError(
                f"{config.recipe} teaches states by steps of a teacher, and {base.start} knows none: start from one that does, or "
                "make its guidance None"
            )
        labels = labels_of(base.cache, states)
        found = Consistency(
            student, target, teacher, null, config.causal, self, config.given, config.seed, states, labels
        )
        frozen = tuple(network.transformer for network in (teacher, target) if network)
        losses = {"student": found.student_loss}
        return Objective(found, losses, frozen=frozen, prepare=found.prepare, state=learned_state(target))

    def price(self, config: Config, tracer: Tracer) -> Price:
        """Twice a clip's frames: the teacher guided, the target, and the student, trained."""
        forward, train = forced(tracer, config.causal)
        weights, steps, names = tracer.parameters["transformer"], [train, forward.freed()], ["target"]
        if self.guidance is not None:
            steps, names = [forward.times(guided_calls(self.guidance)).freed(), *steps], ["teacher", "target"]
        bill = Bill(tuple(steps), 1 + len(steps), forward.work.flops if config.checkpointing else 0.0)
        kept = (Kept(name, weights, learns=False, transformer=True, saved=name == "target") for name in names)
        return Price({"student": bill}, tuple(kept))


class Consistency:
    """``E ||x0(x_i, s_i) - sg x0_target(x_{i+1}, s_{i+1})||^2``: one step of the teacher apart, both mean the same clip.

    ``x_i`` is a real clip noised to a level of the teacher's grid, one per chunk; ``x_{i+1} = x_i + (s_{i+1} - s_i) v(x_i, s_i)``
    with the guided teacher's ``v``; where ``s_{i+1} = 0`` the target is ``x_{i+1}`` itself. All three see the real past.

    Without a teacher ``x_{i+1}`` is the same clip with the same noise at ``s_{i+1}``, whose mean, given ``x_i``, is the
    unguided teacher's step from it: no bias but that of a finite grid.

    Args:
        student: the causal network being trained; ``target``: its average; ``teacher``: frozen, or ``None``.
        null_1LD: embedding of the negative prompt.
        how: chunks and what they see. Of several sizes one is drawn per update, the same for all processes.
        settings: grid, guidance, decay.
        given: first latent frames that are only seen, never asked for.
        seed: of the sizes.
        states: that the networks read; ``labels``: of clips by id, and the latent frame from which each holds: chunks that begin
            before it are not asked for.
    """

    def __init__(
        self,
        student: CausalDenoiser,
        target: CausalDenoiser,
        teacher: CausalDenoiser | None,
        null_1LD: Tensor,
        how: Causal,
        settings: ConsistencyConfig,
        given: int = 0,
        seed: int = 0,
        states: tuple[str, ...] = (),
        labels: Mapping[str, tuple[str | None, int]] = MappingProxyType({}),
    ):
        self.student, self.target, self.teacher, self.null_1LD = student, target, teacher, null_1LD
        self.how, self.settings, self.given, self.seed = how, settings, given, seed
        self.states, self.labels = states, labels
        self.levels = (*shifted_levels(settings.steps, settings.shift), 0.0)

    @torch.no_grad()
    def prepare(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """The target takes in what the student has learnt up to this update; the size of its chunks."""
        follow(self.target, self.student, 1.0 if iteration <= self.settings.since else 1 - self.settings.decay)
        if self.how.sizes is None or iteration < (self.settings.warm_up or 0):
            return batch
        size = int(np.random.default_rng([self.seed, 2, iteration]).choice(self.how.sizes))
        return replace(batch, more=batch.more | {"size": [size] * len(batch.ids)})

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch's clips, mean over frames; ``rollout`` is not used."""
        assert batch.latent_BCFHW is not None, "consistency distillation needs clips, not only prompts"
        device = self.null_1LD.device
        x0, text = sent(batch.latent_BCFHW, device), sent(self._text(batch, generator), device)
        frames, how = x0.shape[2], replace(self.how, rest=batch.more.get("size", [self.how.rest])[0], sizes=None)
        drawn = uniform(len(x0), generator, len(how.chunks(frames))) * self.settings.steps
        step = per_chunk(drawn.long(), how, frames)
        level, following = (sent(torch.tensor(self.levels)[step + ahead], device) for ahead in (0, 1))
        noise = normal(x0.shape, generator, device)
        x, past = add_noise(x0, noise, level), past_of(x0, how, generator)
        with torch.no_grad():
            there = add_noise(x0, noise, following)
            if self.teacher is not None and self.settings.guidance is not None:
                guide: Any = Forced(self.teacher, past, how)
                velocity = guided_velocity(guide, x, level, text, self.null_1LD, self.settings.guidance)
                there = x + broadcast(following - level, x) * velocity
            velocity = Forced(self.target, past, how).velocity(there, following, text)
            meant = velocity_to_x0(there, velocity, following)  # at level 0 it is what is there
        found = velocity_to_x0(x, Forced(self.student, past, how).velocity(x, level, text), level)
        error = (found - meant).square()
        if not self.states:
            return error[:, :, self.given :].mean(), {}
        asked = sent(self._asked(batch, how, frames), device)
        return ((error.mean((1, 3, 4)) * asked).sum(1) / asked.sum(1).clamp(min=1)).mean(), {}

    def _text(self, batch: Batch, generator: Randomness) -> Tensor:
        """Texts with their clips' states, one in ten of which is left out."""
        if not self.states:
            return stack_text(batch.text)
        dropped = uniform(len(batch.ids), generator) < DROPPED
        kept = [None if drop else self.labels[i][0] for i, drop in zip(batch.ids, dropped, strict=True)]
        return stack_text([told(text, state, self.states) for text, state in zip(batch.text, kept, strict=True)])

    def _asked(self, batch: Batch, how: Causal, frames: int) -> Tensor:
        """``(B, F)``, 1 at frames of chunks that begin where their clip is in its state, and that are not given."""
        starts = [start for size, start in zip(*_spans(how, frames), strict=True) for _ in range(size)]
        since = torch.tensor([max(self.labels[i][1], self.given) for i in batch.ids])
        return (torch.tensor(starts)[None] >= since[:, None]).float()


def _spans(how: Causal, frames: int) -> tuple[tuple[int, ...], list[int]]:
    """Sizes of chunks and where they begin."""
    sizes = how.chunks(frames)
    return sizes, [stop - size for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def labels_of(cache: Cache, states: tuple[str, ...]) -> dict[str, tuple[str | None, int]]:
    """Of every clip its state, if it has one, and the latent frame from which it holds; empty for a network that reads none.

    Raises:
        UserError: none of the clips has a state, or one has another than these.
    """
    if not states:
        return {}
    found = {entry["id"]: entry.get("state") for entry in cache.entries}
    if unknown := {state for state in found.values() if state} - {*states}:
        raise UserError(
            f"a clip of {cache.path} is in the state {min(unknown)}, and the student learns {', '.join(states)}"
        )
    if not any(found.values()):
        raise UserError(
            f"no clip of {cache.path} has a state: prepare videos whose metadata.jsonl has a column state, one of {', '.join(states)}"
        )
    since = {e["id"]: round(float(e.get("state_from") or 0) * cache.facts["fps"]) for e in cache.entries}
    return {i: (state, -(-(since[i] + 3) // 4) if since[i] else 0) for i, state in found.items()}


def follow(target: Denoiser, student: Denoiser, share: float) -> None:
    """Move a target's weights a share of the way to the student's, in place; 1 copies them."""
    mine, live = learned_state(target), student.state_dict()
    torch._foreach_lerp_([local(v) for v in mine.values()], [local(live[k]) for k in mine], share)
