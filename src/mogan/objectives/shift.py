"""SHIFT (arXiv 2603.17426): motion rewards weigh a denoising loss, so nothing is differentiated through the sampler.

A clip is sampled for every real one, from the same first frame and prompt. Both are rewarded, and the student denoises
both, each as much as its advantage says. The paper's equations 8 to 12 are not public: the loss is a reconstruction of
what it says about them, see ``docs/methods/shift.md``.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.data import Batch
from mogan.denoiser import Denoiser
from mogan.discriminator import discriminator_loss
from mogan.errors import UserError
from mogan.objectives import Loss
from mogan.objectives.flow_matching import velocity_error
from mogan.observation import motion_amount
from mogan.rewards import Flux, MotionRewards, PixelFlux
from mogan.rollout import animate, normal
from mogan.schedule import draw_sigma
from mogan.wan import stack_text

FLOOR = -1.0  # least weight of the linear form


def advantages(generated_B: Float[Tensor, " b"], real_B: Float[Tensor, " b"]) -> Float[Tensor, "b 2"]:
    """Rewards of generated and real clips less the mean reward of the generated ones; not divided by a deviation."""
    return torch.stack([generated_B, real_B], 1) - generated_B.mean()


def pair_weights(advantage: Tensor, form: str, beta: float) -> Tensor:
    """What a clip's denoising loss weighs (reconstructed).

    ``exp``: ``exp(A / beta)``, the Gibbs tilt whose forward KL the paper minimises; never negative. ``linear``:
    ``A / beta``, not below -1: a policy gradient, which pushes away from clips worse than the mean.
    """
    return (advantage / beta).exp() if form == "exp" else (advantage / beta).clamp(min=FLOOR)


class Shift:
    """Advantage-weighted denoising of generated and real clips. Owns the rewards.

    Args:
        student: the network being trained, which is also the sampler.
        rewards: the two discriminators; ``see``: what they are shown of latents.
        null_1LD: embedding of the empty (or negative) prompt; ``guidance``: of the sampler.
        sigmas: the sampler's levels.
        given: latent frames that are given (image to video: 1).
        points: query points per clip, drawn at random each time.
        shift: shift of the levels at which pairs are denoised.
        weight: ``exp`` or ``linear``; ``beta``: its temperature; see :func:`pair_weights`.
    """

    needs_rollout = False

    def __init__(
        self,
        student: Denoiser,
        rewards: MotionRewards,
        see: PixelFlux,
        null_1LD: Tensor,
        *,
        guidance: float,
        sigmas: tuple[float, ...],
        given: int,
        points: int,
        shift: float,
        weight: str,
        beta: float,
    ):
        self.student, self.rewards, self.see, self.null_1LD = student, rewards, see, null_1LD
        self.guidance, self.sigmas, self.given, self.points = guidance, sigmas, given, points
        self.shift, self.weight, self.beta = shift, weight, beta
        self.pairs: Batch | None = None  # of this iteration: all updates of the student in it share them
        self.seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator, parts: int) -> Batch:
        """The batch with a generated clip beside each real one; sampled in ``parts``, which bounds memory."""
        assert batch.latent_BCFHW is not None, "SHIFT needs clips, not only prompts"
        device = self.null_1LD.device
        real = batch.latent_BCFHW.float().to(device)
        text = stack_text(batch.text, device)
        made = [
            animate(self.student, normal(x.shape, generator, device), x[:, :, : self.given], t, self.null_1LD,
                    self.sigmas, self.guidance)
            for x, t in zip(real.chunk(parts), text.chunk(parts), strict=True)
        ]  # fmt: skip
        return replace(batch, latent_BCFHW=real, generated_BCFHW=torch.cat(made))

    @torch.no_grad()
    def weigh(self, batch: Batch, generator: torch.Generator, parts: int) -> Batch:
        """The batch with the advantages of its generated and real clips; the whole batch shares one baseline."""
        if len(batch.ids) < 2:
            raise UserError("SHIFT's baseline is the mean over the generated clips: give a batch of at least 2")
        assert batch.latent_BCFHW is not None and batch.generated_BCFHW is not None  # noqa: PT018
        rewards, motion = [], []
        for made, real in zip(batch.generated_BCFHW.chunk(parts), batch.latent_BCFHW.chunk(parts), strict=True):
            fluxes = self._observe(made, real, generator)
            rewards.append(torch.stack([self.rewards.reward(flux) for flux in fluxes], 1))
            motion.append(motion_amount(fluxes[0].flow_BCFHW))
        reward_B2 = torch.cat(rewards)
        self.seen = {"reward": reward_B2[:, 0].mean(), "real_reward": reward_B2[:, 1].mean()}
        self.seen["motion"] = torch.cat(motion).mean()
        return replace(batch, advantage_B2=advantages(*reward_B2.unbind(1)))

    def _observe(self, made: Tensor, real: Tensor, generator: torch.Generator) -> tuple[Flux, Flux]:
        """Both are followed from the same points: a pair has the same first frame."""
        queries = torch.rand(len(made), self.points, 2, generator=generator).to(made)
        return self.see(made, queries), self.see(real, queries)

    def student_loss(self, rollout: None, batch: Batch, generator: torch.Generator) -> Loss:
        """``mean_b [w(A~_b) ell(x~_b; t_b, e_b) + w(A_b) ell(x_b; t_b, e_b)]``: a pair shares level and noise."""
        made, real, advantage = batch.generated_BCFHW, batch.latent_BCFHW, batch.advantage_B2
        assert made is not None and real is not None and advantage is not None  # noqa: PT018
        sigma = draw_sigma(len(real), generator, k=self.shift).to(real)
        noise, text = normal(real.shape, generator, real.device), stack_text(batch.text, real.device)
        twice = [torch.cat([x, x]) for x in (noise, sigma, text)]
        error = velocity_error(self.student, torch.cat([made, real]), *twice, given=self.given)
        weight_B2 = pair_weights(advantage, self.weight, self.beta)
        loss = (weight_B2 * error.unflatten(0, (2, -1)).T).sum(1).mean()
        return loss, self.seen | {"weight": weight_B2[:, 0].mean(), "real_weight": weight_B2[:, 1].mean()}

    def judge_loss(self, rollout: None, batch: Batch, generator: torch.Generator) -> Loss:
        """``-E log D(x) - E log (1 - D(x~))`` of both rewards (SHIFT eq. 7), on real and freshly generated clips."""
        assert batch.generated_BCFHW is not None and batch.latent_BCFHW is not None  # noqa: PT018
        fluxes = self._observe(batch.generated_BCFHW, batch.latent_BCFHW, generator)
        made, real = (self.rewards(flux) for flux in fluxes)
        gap = (real - made).detach().mean(0)
        logs = {"gap_instantaneous": gap[0], "gap_long_term": gap[1]}
        return discriminator_loss(real, made), logs | {"motion": motion_amount(fluxes[0].flow_BCFHW).mean()}
