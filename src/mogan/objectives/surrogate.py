"""MoGAN's adversarial objective through a motion surrogate: no decoding, no optical flow, no encoding."""

import torch
from torch import Tensor

from mogan.data.cache import Batch
from mogan.models.denoiser import frozen
from mogan.objectives import Loss, Randomness
from mogan.objectives.gan import GAN
from mogan.objectives.surrogate_network import MotionSurrogate, relative_error, window_of
from mogan.sampling.rollout import Rollout


class Surrogate:
    """The same losses as ``gan``'s, on predicted observations; and the surrogate's own loss. Owns the surrogate.

    The discriminator compares like with like: predictions of real clips with predictions of the student's here, exact
    observations of both in ``gan``'s own updates. A blur of the surrogate is on both sides and gives nobody away. The
    penalties fall on ``gan``'s updates alone, which are few: give them as much more weight (lazy regularisation,
    StyleGAN2, arXiv 1912.04958, appendix B).

    Args:
        network: the surrogate.
        gan: the objective whose discriminator judges, and whose exact observations the surrogate remembers.
        limit: of :meth:`mogan.objectives.surrogate_network.MotionSurrogate.error`; above it every update is ``gan``'s. ``None``: no limit.
    """

    needs_rollout = True

    def __init__(self, network: MotionSurrogate, gan: GAN, limit: float | None):
        self.network, self.gan, self.limit = network, gan, limit

    def _trusted(self) -> bool:
        return self.limit is None or bool(
            self.network.error() <= self.limit
        )  # a host synchronisation: a path is chosen

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """:meth:`GAN.student_loss` on the prediction; gradient passes through the surrogate and not into it."""
        if not self._trusted():
            loss, logs = self.gan.student_loss(rollout, batch, generator)
            return loss, logs | _predicted(loss, 0.0)
        with frozen(self.network):
            observation = self.network.see(rollout.x0_BCFHW, batch.window_start or 0)
        loss, logs = self.gan.persuade(observation, generator)
        return loss, logs | _predicted(loss, 1.0)

    def judge_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """:meth:`GAN.judge_loss`, without penalties, on predictions of real latents and of the student's."""
        if not self._trusted():
            loss, logs = self.gan.judge_loss(rollout, batch, generator, penalise=False)
            return loss, logs | _predicted(loss, 0.0)
        assert batch.latent_BCFHW is not None, "the batch holds no real latents"
        fake = rollout.x0_BCFHW
        with torch.no_grad():
            both = self.network.see(torch.cat([batch.latent_BCFHW.to(fake), fake]), batch.window_start or 0)
        loss, logs = self.gan.tell_apart(both[: len(fake)], both[len(fake) :], generator, penalise=False)
        return loss, logs | _predicted(loss, 1.0)

    def surrogate_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """Relative error on real clips and on as many of the student's that are remembered."""
        assert batch.latent_BCFHW is not None
        assert batch.observation_BCFHW is not None
        like = self.network.observations
        windows = window_of(batch.latent_BCFHW.to(like), batch.window_start or 0, self.network.window)
        observations = batch.observation_BCFHW.to(like)
        if self.network.count > 0:
            recalled, seen = self.network.recall(len(windows), generator)
            windows, observations = torch.cat([windows, recalled]), torch.cat([observations, seen])
        error = self.network.error()
        logs = {"surrogate_error": error} if torch.isfinite(error) else {}
        return relative_error(self.network(windows), observations), logs


def _predicted(loss: Tensor, share: float) -> dict[str, Tensor]:
    return {"predicted": torch.full_like(loss.detach(), share)}
