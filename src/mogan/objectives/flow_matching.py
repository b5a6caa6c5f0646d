"""Flow matching on real clips (Lipman et al., arXiv 2210.02747): how the teacher was trained, and supervised fine-tuning (SFT)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser
from mogan.objectives import Bill, Loss, Objective, Price, Randomness
from mogan.objectives.base import Base
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, draw_sigma, uniform
from mogan.terms import LATENT, Lesson, Terms

OF_CLIPS = Lesson(rollout=False, clips=(LATENT,), captions=True)


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Flow matching on clips; see :class:`FlowMatching`.

    Attributes:
        shift: of the drawn levels.
        drop_text: probability with which a clip is trained without its prompt.
    """

    shift: float
    drop_text: float = 0.1

    def terms(self, config: Config) -> Terms:
        """The student learns from clips and their captions."""
        return Terms(lessons={"student": OF_CLIPS}, controls=True)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """On the student."""
        (null,) = base.encode([""])
        found = FlowMatching(base.student, null, self, base.config.given)
        return Objective(found, {"student": found.student_loss})

    def price(self, config: Config, tracer: Tracer) -> Price:
        """The student, trained."""
        return Price({"student": learns_alone(config, tracer)})


def learns_alone(config: Config, tracer: Tracer, times: int = 1) -> Bill:
    """The student denoises clips, ``times`` of them for each of the batch."""
    forward, train = tracer.student
    again = times * forward.work.flops if config.checkpointing else 0.0
    return Bill((train.times(times),), 2, again)


def stack_some(text: list[Tensor], null: Tensor, drop: float, generator: Randomness, device: torch.device) -> Tensor:
    """The batch's texts ``(L, D)`` stacked, ``(B, L, D)``, each replaced by ``null`` with probability ``drop``."""
    dropped = uniform(len(text), generator) < drop
    return stack_text([null if d else t for d, t in zip(dropped, text, strict=True)], device)


def velocity_error(
    student: Denoiser, x0_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, *, given: int
) -> Float[Tensor, " b"]:
    """Mean of ``||v - (noise - x0)||^2`` per clip. The first ``given`` latent frames are clean, at level 0, and do not count.

    Told apart by their level, given frames condition the others: image to video as Wan 2.2's TI2V does it.
    """
    levels = sigma_B
    if given:
        levels = sigma_B[:, None].repeat(1, x0_BCFHW.shape[2])
        levels[:, :given] = 0.0
    velocity = student.velocity(add_noise(x0_BCFHW, noise_BCFHW, levels), levels, text_BLD)
    return (velocity - (noise_BCFHW - x0_BCFHW))[:, :, given:].square().flatten(1).mean(1)


@dataclass(eq=False)
class FlowMatching:
    """``E ||v(x_t, t, text) - (noise - x0)||^2`` on the batch's clips; the prompt is dropped now and then for guidance.

    Attributes:
        student: the network being trained.
        null: embedding ``(L, D)`` of the empty prompt.
        settings: levels, and how often the prompt is dropped.
        given: latent frames that are given (image to video: 1).
    """

    student: Denoiser
    null: Tensor
    settings: FlowMatchingConfig
    given: int = 0

    def student_loss(self, rollout: Rollout | None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch; ``rollout`` is not used."""
        x0 = batch.latent_BCFHW
        assert x0 is not None, "flow matching needs clips, not only prompts"
        device = next(self.student.parameters()).device
        x0 = sent(x0, device)
        sigma = sent(draw_sigma(len(x0), generator, k=self.settings.shift), device)
        text = batch.told(device, stack_some(batch.text, self.null, self.settings.drop_text, generator, device))
        noise = normal(x0.shape, generator, device)
        return velocity_error(self.student, x0, noise, sigma, text, given=self.given).mean(), {}
