"""Flow matching on differences of latent frames: a dedicated motion score model (Motion Score Matching, section 6.3)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser
from mogan.objectives import Loss, Objective, Price, Randomness
from mogan.objectives.base import Base
from mogan.objectives.flow_matching import OF_CLIPS, learns_alone, stack_some
from mogan.sampling.motion_score import differences, motion_velocity
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, draw_sigma, uniform
from mogan.terms import Terms

WINDOW = 3  # purpose of a draw, beside those of data.batches and objectives.consistency


@dataclass(frozen=True, kw_only=True)
class MotionScoreConfig:
    """A motion model; see :class:`MotionScore`.

    Attributes:
        windows: pairs of given clean frames and differences to predict; one pair is drawn per iteration. ``(0, F - 1)`` is eq. 15,
            ``(1, F - 1)`` eq. 16, ``(k, l)`` eq. 17.
        shift: of the drawn levels.
        drop_text: probability with which a clip is trained without its prompt.
    """

    windows: tuple[tuple[int, int], ...]
    shift: float
    drop_text: float = 0.1

    def terms(self, config: Config) -> Terms:
        """The student learns from clips and their captions."""
        return Terms(lessons={"student": OF_CLIPS})

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """On the student."""
        (null,) = base.encode([""])
        found = MotionScore(base.student, null, self, base.config.seed)
        return Objective(found, {"student": found.student_loss}, prepare=found.prepare)

    def price(self, config: Config, tracer: Tracer) -> Price:
        """The student, trained; its longest window is as long as a clip."""
        return Price({"student": learns_alone(config, tracer)})


@dataclass(eq=False)
class MotionScore:
    """``E ||u(D x_t, t, given frames, text) - D (noise - x0)||^2`` on windows of the batch's clips.

    Attributes:
        student: the network being trained; see :mod:`mogan.sampling.motion_score` for what it reads.
        null: embedding ``(L, D)`` of the empty prompt.
        settings: windows, levels, and how often the prompt is dropped.
        seed: of the windows.
    """

    student: Denoiser
    null: Tensor
    settings: MotionScoreConfig
    seed: int

    def prepare(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """The window of this iteration, the same for all processes and parts of the batch."""
        window = int(np.random.default_rng([self.seed, WINDOW, iteration]).integers(len(self.settings.windows)))
        return replace(batch, more=batch.more | {"window": [window] * len(batch.ids)})

    def student_loss(self, rollout: Rollout | None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on one window per clip, its start drawn; ``rollout`` is not used.

        Raises:
            UserError: clips are shorter than the window.
        """
        x0 = batch.latent_BCFHW
        assert x0 is not None, "a motion score is learnt from clips, not from prompts"
        device = next(self.student.parameters()).device
        starts = uniform(len(x0), generator)
        given, ahead = self.settings.windows[batch.more["window"][0]]
        first = max(given, 1) - 1  # the frame the first difference subtracts
        room = x0.shape[2] - (first + 1 + ahead)
        if room < 0:
            raise UserError(
                f"a window of {given} given frames and {ahead} differences needs {first + 1 + ahead} latent frames, the "
                f"clips have {x0.shape[2]}: prepare longer clips or give the recipe smaller windows"
            )
        begin = (starts * (room + 1)).long().tolist()
        x0 = sent(torch.stack([x[:, b : b + first + 1 + ahead] for x, b in zip(x0, begin, strict=True)]), device)
        sigma = sent(draw_sigma(len(x0), generator, k=self.settings.shift), device)
        text = stack_some(batch.text, self.null, self.settings.drop_text, generator, device)
        noise = normal(x0.shape, generator, device)
        noisy = differences(add_noise(x0, noise, sigma)[:, :, first:])
        velocity = motion_velocity(self.student, x0[:, :, :given], noisy, sigma, text)
        return (velocity - differences((noise - x0)[:, :, first:])).square().mean(), {}
