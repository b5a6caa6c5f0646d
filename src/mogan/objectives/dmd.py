"""Distribution matching distillation with backward simulation (DMD2, arXiv 2405.14867; rectified-flow form).

The student's sample is noised; the teacher says where the data lies, the fake score where the student's own samples lie;
the difference is the gradient of KL(student || teacher) with respect to the sample.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.trace import Call, fake, trace
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.models.experts import experts
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness, guided_calls
from mogan.objectives.base import Base
from mogan.objectives.ot import UNSOLVED, Transport, TransportConfig
from mogan.objectives.redmd import SHARE, WeightsConfig
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, broadcast, draw_between, draw_sigma, renoise, velocity_to_x0
from mogan.terms import Alarm, Lesson, Terms

Direction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SETTLED = 50  # iterations a fake score that starts from the teacher needs to find the student at all
LAGS = Alarm(
    "loss",
    lambda first, now: now > 1.3 * max(first, 1e-8),
    "the fake score lags behind the student: its loss is {now:.3f}, at first {first:.3f}; give it more updates per iteration "
    "or a higher learning rate",
    learns="fake_score",
    since=SETTLED,
)


@dataclass(frozen=True, kw_only=True)
class DMDConfig:
    """Distribution matching; see :class:`DMD`.

    Attributes:
        guidance: of the teacher.
        shift: of the levels at which samples are compared.
        low, high: least and largest of these; margins of at most a tenth are clamped after shifting, as in CausVid and Self-Forcing,
            and in a smaller part of all levels none is. A model of two experts has only those in memory that they take.
        fake_score: name of the network, by default ``fake_score``; objectives with one each may judge a student in turn.
        stable: weigh the fake score's errors by ``min(1, 10 b^2)``, ``b`` the noise between sample and level (Phased DMD,
            arXiv 2510.27684, eq. 13): its target has a deviation of about ``1 / b``.
        motion_weight: lambda of motion score matching (see :mod:`mogan.objectives.msm`); 0 is plain DMD.
        huber: ``c`` of :func:`pseudo_huber` in the place of the student's squared error.
        reweighted: of samples above level 0 the fake score learns TDM's reweighted target (see :func:`reweighted_target`).
        weights: of the student's clips, by reward (see :mod:`mogan.objectives.redmd`); ``None``: all weigh the same.
        transport: optimal transport in the direction (see :mod:`mogan.objectives.ot`); ``None``: DMD's alone.
    """

    guidance: float
    shift: float
    low: float = 0.02
    high: float = 0.98
    fake_score: str | None = None
    stable: bool | None = None
    motion_weight: float = 0.0
    huber: float | None = None
    reweighted: bool | None = None
    weights: WeightsConfig | None = None
    transport: TransportConfig | None = None

    def __post_init__(self):
        if self.transport is not None and self.motion_weight:
            raise ValueError("dmd: transport and motion_weight are directions of their own: leave one out")
        if self.weights is not None and self.huber is not None:
            raise ValueError("dmd: weights are of squared errors, and huber is another metric: leave one out")

    @property
    def whole(self) -> bool:
        """Whether these are all levels but for margins."""
        return self.low <= 0.1 and self.high >= 0.9

    @property
    def follower(self) -> str:
        """The name of the fake score."""
        return self.fake_score or "fake_score"

    def terms(self, config: Config) -> Terms:
        """The student and the fake score learn from rollouts alone."""
        lessons, lags = {"student": Lesson(), self.follower: Lesson()}, replace(LAGS, learns=self.follower)
        alarms = (lags, *((SHARE,) if self.weights else ()), *((UNSOLVED,) if self.transport else ()))
        plain = self.weights is None
        return Terms(lessons=lessons, alarms=alarms, controls=plain and not self.motion_weight, first_frames=plain)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """Teacher and fake score; the latter is the start's own where it has one, else it begins as the teacher."""
        from mogan.objectives.msm import motion_direction

        teacher = base.teacher(self.low, self.high)
        has_own = (base.start / self.follower / "config.json").is_file()
        fake = base.denoiser(base.start, self.follower) if has_own else base.follower(self.low, self.high)
        direction: Direction = motion_direction(self.motion_weight) if self.motion_weight else dmd_direction
        if self.transport is not None:
            direction = Transport(self.transport, dmd_direction, dmd_scale)
        dmd = DMD(teacher, fake, base.no_text(base.config.negative_prompt), self, direction)
        losses = {"student": dmd.student_loss, self.follower: dmd.fake_score_loss}
        found = Objective(dmd, losses, {self.follower: fake}, frozen=tuple(teacher.experts))
        return self.weights.added(found, base) if self.weights else found

    def price(self, config: Config, tracer: Tracer) -> Price:
        """A guided teacher and the fake score look at a rollout; the fake score learns from one."""
        calls, forward = guided_calls(self.guidance), tracer.forward
        looks = [Call(forward.work * calls, 0.0, calls * forward.peak), forward.freed()]
        if self.transport is not None:
            direction = Transport(self.transport, dmd_direction, dmd_scale)
            looks.append(tracer.once(("transport", self.transport), lambda: direction_call(direction, tracer)))
        again = forward.work.flops if config.checkpointing else 0.0
        one, parts = tracer.parameters["transformer"], experts(tracer.shapes.boundary, self.low, self.high)
        told = tracer.parameters["told"] if config.told else 0
        kept = (
            *(Kept(part.replace("transformer", "teacher"), one, learns=False, transformer=True) for part in parts),
            Kept(self.follower, len(parts) * (one + told), transformer=True),
        )
        price = Price({"student": Bill(tuple(looks), 2), self.follower: Bill((tracer.train,), 2, again)}, kept)
        return self.weights.priced(price, config, tracer, self.guidance) if self.weights else price


def direction_call(direction: Direction, tracer: Tracer) -> Call:
    """A direction of one clip."""
    with fake():
        x0, real, made = (torch.empty(1, *tracer.shapes.latent) for _ in range(3))
        return trace((), lambda: direction(x0, real, made, torch.empty(1)), backward=False).freed()


def dmd_scale(x0: Tensor, real: Tensor) -> Tensor:
    """``mean |x0 - real|`` per sample, ``(B, 1, ...)`` of ``(B, ...)``: the unit of DMD's differences (DMD eq. 8)."""
    return (x0 - real).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True).clamp(min=1e-8)


def dmd_direction(x0: Tensor, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    """``(fake - real) / mean |x0 - real|``, the mean per sample (DMD eq. 8 in x0 space, as CausVid and Self-Forcing).

    Moving ``x0`` against this direction goes from where the student's samples are to where the teacher's are. The scores
    differ by ``(1 - sigma) / sigma^2`` times as much; the mean takes the place of that factor, so ``sigma`` is not used.
    Latents, and the direction, are ``(B, C, F, H, W)``.
    """
    return (fake - real) / dmd_scale(x0, real)


def pseudo_huber(gap: Tensor, c: float) -> Tensor:
    """``sqrt(mean gap^2 + c^2) - c`` of ``(B, ...)``, the mean per sample; averaged over samples, a scalar.

    TDM's metric ``sqrt(|gap|^2 + C^2) - C`` with ``C = c sqrt(n)`` (arXiv 2503.06674), divided by ``sqrt(n)``, ``n`` numbers
    per sample: so ``c`` does not depend on the size of clips, nor does the gradient. Small gaps count as ``gap^2 / 2 c``; of
    large ones every sample pulls with the same strength.
    """
    return (gap.square().flatten(1).mean(1) + c**2).sqrt().mean() - c


@dataclass(eq=False)
class DMD:
    """Distribution matching. Owns the fake score.

    Attributes:
        teacher: frozen multi-step denoiser.
        fake_score: denoiser of the student's samples, trained by :meth:`fake_score_loss`.
        null_1LD: embedding of the empty (or negative) prompt.
        settings: guidance, levels, metric and weights.
        direction: ``(x0, real, fake, sigma) -> gradient``; where variants of DMD differ. What it has as ``seen`` is logged.
    """

    teacher: Denoiser
    fake_score: Denoiser
    null_1LD: Tensor
    settings: DMDConfig
    direction: Direction = dmd_direction

    def _noised(self, rollout: Rollout, generator: Randomness) -> tuple[Tensor, Tensor, Tensor]:
        """The sample at a drawn level of the interval that the rollout may be judged in, the noise, and the level.

        In a part of all levels the level is drawn as there, given that it lies in that part: clamped, most would lie on the
        part's ends, the lower of which is where the fake score learns least.
        """
        x, (low, high) = rollout.sample_BCFHW.detach(), rollout.interval
        draw, least, most = draw_between, max(low, self.settings.low), min(high, self.settings.high)
        if (low, high) == (0.0, 1.0) and self.settings.whole:
            draw = draw_sigma
        elif least >= most:
            raise UserError(
                f"a sample at level {rollout.level:.4g} is judged between {low:.4g} and {high:.4g}, and DMD at levels up to "
                f"{self.settings.high}: take fewer steps, or a smaller shift of the levels"
            )
        drawn = draw(len(x), generator, low=least, high=most, k=self.settings.shift)
        sigma, noise = sent(drawn, x.device), normal(x.shape, generator, x.device)
        if rollout.level == 0.0:
            return add_noise(x, noise, sigma), noise, sigma
        return renoise(x, noise, torch.full_like(sigma, rollout.level), sigma), noise, sigma

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``0.5 mean (x - sg(x - g))^2``, whose gradient with respect to ``x`` is ``g / numel``; or :func:`pseudo_huber`. The
        squares of clips that somebody gave a ``weight`` count that much.
        """
        x = rollout.sample_BCFHW
        with torch.no_grad():
            x_t, _, sigma = self._noised(rollout, generator)
            guidance = self.settings.guidance
            velocity = guided_velocity(self.teacher, x_t, sigma, rollout.text_BLD, self.null_1LD, guidance)
            real = velocity_to_x0(x_t, velocity, sigma)
            fake = self.fake_score(x_t, sigma, rollout.text_BLD, **_told(rollout))
            gradient = self.direction(rollout.guess_BCFHW, real, fake, sigma)
        gap = x - (x.detach() - gradient)
        error = broadcast(batch.more["weight"], x) * gap.square() if "weight" in batch.more else gap.square()
        c = self.settings.huber
        loss = 0.5 * error.mean() if c is None else pseudo_huber(gap, c)
        return loss, {"direction": gradient.square().mean().sqrt()} | getattr(self.direction, "seen", {})

    def fake_score_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """Flow matching of the fake score on the student's samples: ``E ||v - (noise - x0)||^2`` (MoGAN eq. 3).

        The target of a sample at level ``s`` is in units of ``1 / (1 - s)``, and so is its noise: the error counts ``1 - s``
        times as much, or the noisiest of several levels would drown the others. What is learnt at each is the same.
        """
        x_t, noise, sigma = self._noised(rollout, generator)
        velocity = self.fake_score.velocity(x_t, sigma, rollout.text_BLD, **_told(rollout))
        if self.settings.reweighted and rollout.level:
            wanted, weight_B = reweighted_target(rollout, x_t, noise, sigma)
            return (weight_B * (velocity - wanted).square().flatten(1).mean(1)).mean(), {"weight": weight_B.mean()}
        error = (velocity - target(rollout, noise, sigma)).square()
        if self.settings.stable:
            error = error * broadcast((10 * added(rollout.level, sigma).square()).clamp(max=1.0), error)
        return error.mean() * (1 - rollout.level) ** 2, {}


def added(level: float, sigma: Tensor) -> Tensor:
    """Deviation ``b`` of the noise from level ``s`` to ``sigma``, of any shape: ``b^2 = t^2 - ((1 - t) s / (1 - s))^2``."""
    return (sigma.square() - ((1 - sigma) * (level / (1 - level))).square()).sqrt()


def _told(rollout: Rollout) -> dict[str, float]:
    """What a fake score is told beside level and text."""
    return {} if rollout.toward is None else {"to": rollout.toward}


def target(rollout: Rollout, noise: Tensor, sigma: Tensor) -> Tensor:
    """The velocity whose mean, given the noised sample, is the flow of the student's distribution.

    ``noise - x0`` of a clean sample. Of a sample at level ``s`` (Phased DMD, arXiv 2510.27684, eq. 11, rectified flow)
    ``(t + (1 - t) s^2 / (1 - s)^2) / b noise - x_s / (1 - s)`` with ``b^2 = t^2 - ((1 - t) s / (1 - s))^2``: the clean
    sample is not known, and ``noise - x_s`` in its place is biased.

    ``noise`` and the target are ``(B, C, F, H, W)``, ``sigma`` is ``(B,)``.
    """
    x, s = rollout.sample_BCFHW.detach(), rollout.level
    if s == 0.0:
        return noise - x
    ratio = s / (1 - s)
    return broadcast((sigma + (1 - sigma) * ratio**2) / added(s, sigma), x) * noise - x / (1 - s)


def reweighted_target(rollout: Rollout, x_t: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """TDM's target for a sample above level 0, to compare with :func:`target`: a velocity and a weight per sample.

    ``x_t``, ``noise``: ``(B, C, F, H, W)``; ``sigma``: ``(B,)``; returns ``(B, C, F, H, W)`` and ``(B,)``. The clean latent
    that the student's step predicted takes the place of the unknown one; ``x_t`` is then it with a mixed noise ``m``, and the
    weight is ``exp((mean noise^2 - mean m^2) / 2)`` as in the authors' script: the ratio of the two ways' densities, but for
    the mean where the ratio has a sum. With the sum it would turn the law of ``x_t`` into that of the predicted latent, noised,
    which is another one; of a mean over many numbers it is 1.
    """
    clean = rollout.guess_BCFHW
    mixed = (x_t - broadcast(1 - sigma, x_t) * clean) / broadcast(sigma, x_t)
    weight_B = ((noise.square() - mixed.square()).flatten(1).mean(1) / 2).exp()
    return mixed - clean, weight_B
