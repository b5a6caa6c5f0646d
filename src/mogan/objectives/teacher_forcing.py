"""Teacher forcing: a causal student learns each chunk of a real clip from the clean ones before it (Causal Forcing, 2602.02214)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.causal import forced
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.sight import teacher_forcing
from mogan.objectives import Bill, Loss, Objective, Price, Randomness
from mogan.objectives.base import Base
from mogan.objectives.flow_matching import OF_CLIPS, stack_some
from mogan.sampling.rollout import normal
from mogan.schedule import add_noise, shift, uniform
from mogan.terms import Terms


@dataclass(frozen=True, kw_only=True)
class TeacherForcingConfig:
    """Autoregressive flow matching on clips; see :class:`TeacherForcing`.

    Attributes:
        shift: of the drawn levels.
        drop_text: probability with which a clip is trained without its prompt.
    """

    shift: float
    drop_text: float = 0.1

    def terms(self, config: Config) -> Terms:
        """Those of all that teacher-forces."""
        return forcing_terms(config)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """On the student."""
        (null,) = base.encode([""])
        student = require_one_pass(base)
        found = TeacherForcing(student, null, base.config.causal, self)
        return Objective(found, {"student": found.student_loss})

    def price(self, config: Config, tracer: Tracer) -> Price:
        """The student on twice a clip's frames, trained."""
        forward, train = forced(tracer, config.causal)
        return Price({"student": Bill((train,), 2, forward.work.flops if config.checkpointing else 0.0)})


def forcing_terms(config: Config) -> Terms:
    """A causal student learns from clips and their captions. Raises ValueError for one that sees whole clips."""
    if config.causal is None:
        raise ValueError(
            "teacher forcing is for a student that sees the past alone: give the recipe a rollout that is Chunked"
        )
    return Terms(lessons={"student": OF_CLIPS}, forces=True)


def require_one_pass(base: Base) -> CausalDenoiser:
    """The student, whose policy a pass over all chunks of a clip can follow. Raises UserError."""
    how: Causal = base.config.causal
    try:
        for one in how.variants:
            teacher_forcing(one.chunks(base.latent_shape[1]), one.policy)
    except ValueError as error:
        raise UserError(f"{base.config.recipe}: {error}") from error
    assert isinstance(base.student, CausalDenoiser)
    return base.student


def per_chunk(value_BN: Float[Tensor, "b n"], how: Causal, frames: int) -> Float[Tensor, "b f"]:
    """Of every frame what its chunk has."""
    return value_BN.repeat_interleave(torch.tensor(how.chunks(frames), device=value_BN.device), 1)


@dataclass(frozen=True)
class Forced:
    """A causal network on noisy chunks, each of which sees the clean ones before it: all of a clip in one pass.

    Attributes:
        network: the causal one.
        past_BCFHW: what chunks see of earlier ones, at the level ``how.context_sigma``.
        how: chunks and what they see.
    """

    network: CausalDenoiser
    past_BCFHW: Tensor
    how: Causal

    def velocity(
        self, x_BCFHW: Float[Tensor, "b c f h w"], sigma_BF: Float[Tensor, "b f"], text_BLD: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c f h w"]:
        """As :meth:`mogan.models.denoiser.Denoiser.velocity`; a batch may be so many times the past's, as guidance makes it."""
        past = self.past_BCFHW.repeat(len(x_BCFHW) // len(self.past_BCFHW), 1, 1, 1, 1)
        chunks, policy = self.how.chunks(x_BCFHW.shape[2]), self.how.policy
        return self.network.teacher_forced(past, x_BCFHW, sigma_BF, text_BLD, chunks, policy, self.how.context_sigma)


def past_of(x0_BCFHW: Tensor, how: Causal, generator: Randomness) -> Tensor:
    """Real clips ``(B, C, F, H, W)`` as later chunks see them: clean, or noised to the level of the student's contexts."""
    if not how.context_sigma:
        return x0_BCFHW
    level = torch.full((len(x0_BCFHW),), how.context_sigma, device=x0_BCFHW.device)
    return add_noise(x0_BCFHW, normal(x0_BCFHW.shape, generator, x0_BCFHW.device), level)


@dataclass(eq=False)
class TeacherForcing:
    """``E ||v(x_c, s_c | clean chunks before c) - (noise - x0)_c||^2``, mean over frames; every chunk has a level of its own.

    Gradient also reaches the keys and values of the clean half, which are made in the same pass: what a chunk leaves for
    later ones to see is learnt here, and only here, since rollouts keep it detached.

    Attributes:
        student: the causal network being trained.
        null: embedding ``(L, D)`` of the empty prompt.
        how: chunks and what they see.
        settings: levels, and how often the prompt is dropped.
    """

    student: CausalDenoiser
    null: Tensor
    how: Causal
    settings: TeacherForcingConfig

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch's clips; ``rollout`` is not used."""
        assert batch.latent_BCFHW is not None, "teacher forcing needs clips, not only prompts"
        device = next(self.student.parameters()).device
        x0 = sent(batch.latent_BCFHW, device)
        frames = x0.shape[2]
        drawn = shift(uniform(len(x0), generator, len(self.how.chunks(frames))), self.settings.shift)
        sigma = sent(per_chunk(drawn, self.how, frames), device)
        text = stack_some(batch.text, self.null, self.settings.drop_text, generator, device)
        noise = normal(x0.shape, generator, device)
        forced = Forced(self.student, past_of(x0, self.how, generator), self.how)
        velocity = forced.velocity(add_noise(x0, noise, sigma), sigma, text)
        return (velocity - (noise - x0)).square().mean(), {}
