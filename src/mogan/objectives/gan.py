"""Adversarial objectives: MoGAN's on optical flow, and the latent-space one it is compared with.

Both are one class; they differ in what the discriminator is shown.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mogan.data.cache import Batch
from mogan.models.denoiser import frozen
from mogan.models.discriminator import Discriminator, approximate_penalty, discriminator_loss, generator_loss
from mogan.motion.observation import Observed, motion_amount, saturation
from mogan.objectives import Loss, Randomness
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, uniform


class GAN:
    """Logistic adversarial loss with approximate R1 and R2 (MoGAN eq. 4-8). Owns the discriminator.

    Args:
        discriminator: real-or-generated network.
        observe: what it is shown of a latent (see :class:`mogan.motion.observation.MotionObservation`); ``None`` shows the latent itself (the paper's "video-space" ablation).
        student_weight: lambda_1; judge_weight: lambda_2.
        r1, r2: weights of the penalties on real and on generated observations; 0 leaves the extra inputs out.
        noise: sigma of the penalties, in units of the discriminator's (normalised) input.
        normalise: divide the penalties by ``noise`` squared; see :func:`mogan.models.discriminator.approximate_penalty`.
        drawn_levels: show observations noised to levels drawn uniformly, and tell the trunk; the paper's level is
            always 0.
    """

    needs_rollout = True

    def __init__(
        self,
        discriminator: Discriminator,
        observe: Callable[[Tensor, int], Observed] | None,
        *,
        student_weight: float,
        judge_weight: float,
        r1: float,
        r2: float,
        noise: float,
        normalise: bool,
        drawn_levels: bool = False,
    ):
        self.discriminator, self.observe = discriminator, observe
        self.student_weight, self.judge_weight = student_weight, judge_weight
        self.r1, self.r2, self.noise, self.normalise = r1, r2, noise, normalise
        self.drawn_levels = drawn_levels

    def _observe(self, rollout: Rollout, start: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.observe is None:
            return rollout.x0_BCFHW, {}
        seen = self.observe(rollout.x0_BCFHW, start)
        with torch.no_grad():
            logs = {
                "motion": motion_amount(seen.flow_BCFHW).mean(),
                "saturation": saturation(seen.video_BCFHW).mean(),
            }
        return seen.latent_BCFHW, logs

    def _shown(self, observation: Tensor, generator: Randomness) -> tuple[Tensor, Tensor | None]:
        """The observation as the discriminator gets it, and the level it is told where that is drawn."""
        if not self.drawn_levels:
            return observation, None
        sigma = uniform(len(observation), generator).to(observation.device)
        return add_noise(observation, normal(observation.shape, generator, observation.device), sigma), sigma

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``lambda_1 E softplus(-D(o))``; gradient passes through the discriminator and the observation, not into them."""
        observation, logs = self._observe(rollout, batch.window_start or 0)
        loss, more = self.persuade(observation, generator)
        return loss, logs | more

    def persuade(self, observation: Tensor, generator: Randomness) -> Loss:
        """The student's loss on an observation of its clips, exact or not."""
        with frozen(self.discriminator):
            logits = self.discriminator(*self._shown(observation, generator))
        return self.student_weight * generator_loss(logits), {"fake_logit": logits.detach().mean()}

    def judge_loss(self, rollout: Rollout, batch: Batch, generator: Randomness, penalise: bool = True) -> Loss:
        """``lambda_2`` (logistic) ``+ r1 R1 + r2 R2`` on real observations of the batch and on the student's."""
        with torch.no_grad():
            fake, logs = self._observe(rollout, batch.window_start or 0)
        real = batch.latent_BCFHW if self.observe is None else batch.observation_BCFHW
        assert real is not None, "the batch holds no real observations"
        loss, more = self.tell_apart(real.to(fake), fake, generator, penalise)
        return loss, logs | more

    def tell_apart(self, real: Tensor, fake: Tensor, generator: Randomness, penalise: bool = True) -> Loss:
        """The discriminator's loss on observations of real clips and of the student's, both exact or neither."""
        sides = [("r1", self.r1, *self._shown(real, generator)), ("r2", self.r2, *self._shown(fake, generator))]
        seen, levels = [side[2] for side in sides], [side[3] for side in sides]
        penalised = [side for side in sides if side[1] and penalise]
        for _, _, shown, sigma in penalised:
            seen.append(shown + self.noise * normal(shown.shape, generator, shown.device))
            levels.append(sigma)
        # in one pass: sharded weights are gathered once, and small batches fill the device; of penalised inputs in fp32,
        # since the penalties divide a small difference of logits by a small number
        sigma_B = torch.cat([level for level in levels if level is not None]) if self.drawn_levels else None
        dtype = torch.float32 if penalised else None
        clean_and_noisy = self.discriminator(torch.cat(seen), sigma_B, dtype).chunk(len(seen))
        real_logits, fake_logits, *noisy = clean_and_noisy
        loss = self.judge_weight * discriminator_loss(real_logits, fake_logits)
        logs = {
            "real_logit": real_logits.detach().mean(),
            "fake_logit": fake_logits.detach().mean(),
            "gap": (real_logits.detach().mean() - fake_logits.detach().mean()),
        }
        logits = {"r1": real_logits, "r2": fake_logits}
        for (name, weight, _, _), noisy_logits in zip(penalised, noisy, strict=True):
            penalty = approximate_penalty(logits[name], noisy_logits, self.noise, self.normalise)
            loss = loss + weight * penalty
            logs[name] = penalty.detach()
        return loss, logs
