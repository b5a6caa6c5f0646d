"""Adversarial self-distillation (arXiv 2511.01419): a causal student in n steps against itself in n + 1.

One student serves several numbers of steps. What it makes in n steps is compared with what it makes of the same prompts, from
noise of their own, in one step more: a smaller gap than that to the teacher. The discriminator is
:class:`mogan.objectives.relativistic.Relativistic`'s, heads on the fake score's features, with a logit for each n.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.causal import roll_out_calls
from mogan.data.batches import Batch
from mogan.models.causal import CausalDenoiser
from mogan.models.denoiser import frozen
from mogan.models.discriminator import approximate_penalty
from mogan.objectives import Bill, Loss, Objective, Price, Randomness
from mogan.objectives.base import Base, wins_outright
from mogan.objectives.relativistic import Relativistic, RelativisticConfig, numbers
from mogan.sampling.causal_rollout import Chunked
from mogan.sampling.rollout import Rollout, normal
from mogan.terms import Lesson, Terms


@dataclass(frozen=True, kw_only=True)
class ASDConfig:
    """See :class:`ASD`.

    Attributes:
        critic: where heads read, to which levels latents are noised.
        weight: alpha, of the student's loss.
        r1, r2: weights of the penalties on clips of n + 1 steps and on those of n; 0 leaves the extra inputs out.
        noise: deviation of the penalties' noise, on noised latents; each is divided by its square, so a weight is a weight.
    """

    critic: RelativisticConfig
    weight: float
    r1: float = 0.3
    r2: float = 0.3
    noise: float = 0.1

    def terms(self, config: Config) -> Terms:
        """Prompts alone: the student makes both clips."""
        kind, most = config.rollout, len(config.sigmas)
        if not isinstance(kind, Chunked) or kind.counts != tuple(range(1, most + 1)) or most < 2:
            raise ValueError(
                "asd: n steps are compared with n + 1 of a causal student that is trained for them all: give the config "
                f"rollout=Chunked(Causal(...), counts=(1, ..., {most}))"
            )
        if kind.causal.sizes:
            raise ValueError(
                "asd: clips of n and of n + 1 steps are compared, and a student of several chunk sizes may make them in chunks "
                "of different sizes: leave sizes out of the config's rollout"
            )
        of_critic = (u.rollout or kind for u in config.plan if u.learns == "critic")
        if any(most in (getattr(each, "counts", None) or (most,)) for each in of_critic):
            raise ValueError(
                f"asd: in all {most} steps the critic has nothing to compare: give its updates a rollout of fewer counts"
            )
        self.critic.terms(config)
        wins = wins_outright("raise r1 and r2, or lower its learning rate", "those of one step more and the student's")
        return Terms(lessons={"student": Lesson(), "critic": Lesson()}, alarms=(wins,))

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The heads, on a trunk that is there already, and the student, to roll out."""
        kind, sigmas, student = base.config.rollout, base.config.sigmas, base.student
        assert isinstance(kind, Chunked)
        assert isinstance(student, CausalDenoiser)
        pair = self.critic.on_fake_score(base, others, outputs=len(sigmas) - 1)
        found = ASD(student, kind, sigmas, pair, self)
        return Objective(found, {"student": found.student_loss, "critic": found.critic_loss}, {"critic": pair.critic})

    def price(self, config: Config, tracer: Tracer) -> Price:
        """What the discriminator sees, and the rollouts of one step more where there are any."""
        shown = 2 + bool(self.r1) + bool(self.r2)
        price = self.critic.price(config, tracer, len(config.sigmas) - 1, shown)
        bills = {}
        for update in (u for u in config.plan if any(config.objectives.get(name) == self for name in u.judges)):
            kind = update.rollout or config.rollout
            assert isinstance(kind, Chunked)
            assert kind.counts is not None
            compared = [count for count in kind.counts if count < len(config.sigmas)]
            share = len(compared) / len(kind.counts)
            before = sum(compared) / len(compared)
            calls, passes = roll_out_calls(tracer, kind.causal, before, learns=False, whole=True)
            bill = price.bills[update.learns]
            more = (*(replace(c, work=c.work * share).freed() for c in calls), *bill.calls)
            bills[update.learns] = Bill(more, share * passes + bill.passes, bill.repeated)
        return Price(bills, price.kept)


@dataclass(eq=False)
class ASD:
    """``softplus(D_n(more) - D_n(made))`` for the student, its mirror and R1, R2 for the critic (L_ASD; the relativistic pair).

    ``made`` is the rollout that is judged, of n steps; ``more`` one of n + 1, without gradient, from noise of its own. Both are
    noised, each to a level of its own. In all of its steps the student has nobody above it, and the loss is 0.

    Attributes:
        student: the network being trained.
        kind: of rollouts, for all numbers of steps.
        sigmas: the student's levels.
        pair: trunk and heads, whose logit n - 1 is D_n.
        settings: weights.
    """

    student: CausalDenoiser
    kind: Chunked
    sigmas: tuple[float, ...]
    pair: Relativistic
    settings: ASDConfig

    @torch.no_grad()
    def one_step_more(self, rollout: Rollout, generator: Randomness) -> Tensor:
        """Clips ``(B, C, F, H, W)`` of the same prompts, made whole in one step more."""
        sample, place = rollout.sample_BCFHW, self.kind.whole(self.sigmas, rollout.count + 1)
        noise = normal(sample.shape, generator, sample.device)
        return self.kind.make(self.student, noise, rollout.text_BLD, self.sigmas, generator, place, False).sample_BCFHW

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``alpha E softplus(D_n(more) - D_n(made))``; gradient passes through trunk and heads into the clips of n steps."""
        if rollout.count == len(self.sigmas):
            return 0.0 * rollout.sample_BCFHW.sum(), {}
        clips = self.one_step_more(rollout, generator), rollout.sample_BCFHW
        shown = [self.pair.noised(x, generator) for x in clips]
        with frozen(self.pair.critic):
            more, made = self.pair.logits(shown, rollout.text_BLD, True, rollout.count - 1)
        return self.settings.weight * F.softplus(more - made).mean(), numbers(more, made)

    def critic_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``E softplus(D_n(made) - D_n(more)) + r1 R1(more) + r2 R2(made)``."""
        clips, settings = (self.one_step_more(rollout, generator), rollout.sample_BCFHW), self.settings
        shown = [self.pair.noised(x, generator) for x in clips]
        penalties = [(name, side) for side, name in enumerate(("r1", "r2")) if getattr(settings, name)]
        for _, side in penalties:
            x_t, sigma = shown[side]
            shown.append((x_t + settings.noise * normal(x_t.shape, generator, x_t.device), sigma))
        logits = self.pair.logits(shown, rollout.text_BLD, False, rollout.count - 1)
        loss, logs = F.softplus(logits[1] - logits[0]).mean(), numbers(logits[0], logits[1])
        for (name, side), noisy in zip(penalties, logits[2:], strict=True):
            penalty = approximate_penalty(logits[side], noisy, settings.noise, normalise=True)
            loss, logs = loss + getattr(settings, name) * penalty, logs | {name: penalty.detach()}
        return loss, logs
