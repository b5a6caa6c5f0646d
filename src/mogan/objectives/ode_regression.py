"""Regression on the ends of a teacher's paths: how CausVid (arXiv 2412.07772) and Self-Forcing (2506.08009) begin a causal student.

The teacher sees whole clips: where its path ends depends on the noise of frames that the student has not seen yet. So the target is
no function of the student's input, and the regression ends at a conditional mean, which varies less than clips do (Causal Forcing,
arXiv 2602.02214). It is here to compare with; :mod:`mogan.objectives.consistency` is the start without that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.causal import diffusion_forced
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.sight import block_causal
from mogan.objectives import Bill, Loss, Objective, Price, Randomness
from mogan.objectives.accvideo import OF_PATHS
from mogan.objectives.base import Base
from mogan.objectives.teacher_forcing import per_chunk
from mogan.schedule import uniform, velocity_to_x0
from mogan.terms import Terms


@dataclass(frozen=True, kw_only=True)
class ODERegressionConfig:
    """Regression of a causal student on the ends of paths; see :class:`ODERegression`."""

    def terms(self, config: Config) -> Terms:
        """A causal student learns from a teacher's paths and their captions. Raises ValueError for one of another kind."""
        if config.causal is None or config.causal.sizes is not None or config.given:
            raise ValueError(
                "ODE regression is for a student that makes whole clips in chunks of one size: give the recipe a rollout that is "
                "Chunked, no sizes and given=0"
            )
        return Terms(lessons={"student": OF_PATHS}, forces=True)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """On the student. Raises UserError if one pass cannot follow what its chunks see."""
        config = base.config
        assert isinstance(base.student, CausalDenoiser)
        assert config.causal is not None
        try:
            block_causal(config.causal.chunks(base.latent_shape[1]), config.causal.policy)
        except ValueError as error:
            raise UserError(f"{config.recipe}: {error}") from error
        found = ODERegression(base.student, config.causal, (*config.sigmas, 0.0))
        return Objective(found, {"student": found.student_loss})

    def price(self, config: Config, tracer: Tracer) -> Price:
        """The student on all chunks of a clip in one pass, trained."""
        assert config.causal is not None
        forward, train = diffusion_forced(tracer, config.causal)
        return Price({"student": Bill((train,), 2, forward.work.flops if config.checkpointing else 0.0)})


class ODERegression:
    """``E ||x0(x_c, s_c; noisy chunks before c) - z_c||^2``: every chunk at a level of its own on the teacher's path to ``z``.

    A level is drawn per chunk among the student's and 0, at which a chunk is what later ones see and is asked for nothing. Chunks
    see earlier ones as noisy as those are (diffusion forcing), where rollouts see clean ones: that is the published regression.

    Args:
        student: the causal network being trained.
        how: chunks and what they see.
        levels: of the path's rows in the batch, descending to 0.
    """

    def __init__(self, student: CausalDenoiser, how: Causal, levels: tuple[float, ...]):
        self.student, self.how, self.levels = student, how, levels

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch's paths, mean over frames; those at level 0 count as nothing. ``rollout`` is not used."""
        assert batch.path_BKCFHW is not None, "the batch holds no paths"
        device = next(self.student.parameters()).device
        path = sent(batch.path_BKCFHW, device)
        frames, chunks = path.shape[3], self.how.chunks(path.shape[3])
        drawn = (uniform(len(path), generator, len(chunks)) * len(self.levels)).long()
        rows = per_chunk(drawn, self.how, frames)
        row, level = sent(rows, device), sent(torch.tensor(self.levels)[rows], device)
        clips, places = torch.arange(len(path), device=device)[:, None], torch.arange(frames, device=device)
        x = path[clips, row, :, places].transpose(1, 2)  # (B, F, C, H, W) before
        text = stack_text(batch.text, device)
        velocity = self.student.masked(x, level, text, chunks, self.how.policy)
        error = (velocity_to_x0(x, velocity, level) - path[:, -1]).square().mean((1, 3, 4))
        return (error * (level > 0)).mean(), {}
