"""MoGAN's adversarial objective through a motion surrogate: no decoding, no optical flow, no encoding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.shapes import Shapes
from mogan.costs.trace import Call, fake, sizes, trace
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.models.denoiser import frozen
from mogan.objectives import Bill, Kept, Loss, LossFn, Objective, Price, Randomness
from mogan.objectives.base import Base
from mogan.objectives.gan import GAN, GANConfig
from mogan.objectives.surrogate_network import MotionSurrogate, Remembered, relative_error, spread, window_of
from mogan.sampling.rollout import Rollout
from mogan.terms import LATENT, OBSERVATION, Alarm, Lesson, Terms

ALARM = Alarm(
    "surrogate_error",
    lambda first, now: now > 1.0,
    "the surrogate predicts the motion no better than its mean would: its relative error is {now:.2f}; make more updates "
    "exact, or set surrogate.limit",
)


@dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """A network that predicts ``gan``'s observation; see :class:`mogan.objectives.surrogate_network.MotionSurrogate`.

    Attributes:
        width: channels inside, a multiple of 8; ``blocks``: how many residual blocks.
        pairs: of the student's latents and their exact observation that it remembers.
        limit: relative error above which updates by the surrogate are exact instead; ``None``: never.
    """

    width: int
    blocks: int
    pairs: int
    limit: float | None

    def _gan(self, config: Config) -> GANConfig:
        gan = config.objectives.get("gan")
        if not isinstance(gan, GANConfig) or not gan.in_motion:
            raise ValueError(
                f"{config.recipe}: a motion surrogate predicts what gan sees of motion: give a gan with space motion"
            )
        return gan

    def terms(self, config: Config) -> Terms:
        """As for ``gan``, on latents of real clips; the surrogate learns from their latents and observations."""
        starts, both = self._gan(config).starts, (LATENT, OBSERVATION)
        judges = both if self.limit is not None else (LATENT,)  # without a limit it sees predictions alone
        lessons = {
            "student": Lesson(starts=starts),
            "discriminator": Lesson(clips=judges, starts=starts),
            "surrogate": Lesson(rollout=False, clips=both, starts=starts),
        }
        return Terms(lessons=lessons, alarms=(ALARM,))

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The surrogate, which from now on watches ``gan``'s exact observations."""
        gan: GAN = others["gan"].judge
        torch.manual_seed(base.config.seed)
        (channels, _, height, width), window = base.latent_shape, gan.settings.window
        network = MotionSurrogate(
            (channels, height, width), window, width=self.width, blocks=self.blocks, pairs=self.pairs
        ).to(base.device)
        assert gan.observe is not None
        gan.observe = Remembered(gan.observe, network, base.world.samples)
        found = Surrogate(network, gan, self.limit, base.world.samples, base.world.any)
        losses: dict[str, LossFn] = {
            "student": found.student_loss,
            "discriminator": found.judge_loss,
            "surrogate": found.surrogate_loss,
        }
        return Objective(found, losses, {"surrogate": network}, prepare=found.prepare)

    def price(self, config: Config, tracer: Tracer) -> Price:
        """Predictions in the place of observations, real clips' and the student's in one pass; a judge without penalties."""
        gan = self._gan(config)
        key = ("surrogate", self.width, self.blocks, self.pairs, gan.window)
        traced = tracer.once(key, lambda: surrogate_calls(self, tracer.shapes, gan.window))
        (plain, passed, learns), parameters, remembered = traced
        (through, _), (judged, _) = (gan.judge(tracer, tracer.dtype, learns=learning) for learning in (False, True))
        again = judged.work.flops / 4 if config.checkpointing else 0.0
        bills = {
            "student": Bill((passed, through), 2, again),
            "discriminator": Bill((plain.times(2).freed(), judged.times(2).freed()), 2, 2 * again),
            "surrogate": Bill((learns.times(2),), 0),
        }
        return Price(bills, (Kept("surrogate", parameters, sharded=False, beside=4 * remembered),))


@dataclass(eq=False)
class Surrogate:
    """The same losses as ``gan``'s, on predicted observations; and the surrogate's own loss. Owns the surrogate.

    The discriminator compares like with like: predictions of real clips with predictions of the student's here, exact
    observations of both in ``gan``'s own updates. A blur of the surrogate is on both sides and gives nobody away. The
    penalties fall on ``gan``'s updates alone, which are few: give them as much more weight (lazy regularisation,
    StyleGAN2, arXiv 1912.04958, appendix B).

    Attributes:
        network: the surrogate.
        gan: the objective whose discriminator judges, and whose exact observations the surrogate remembers.
        limit: of :meth:`mogan.objectives.surrogate_network.MotionSurrogate.error`; above it every update is ``gan``'s. ``None``: no limit.
        rows: gives the samples of all processes.
        anywhere: says whether something is so on any of them.
    """

    network: MotionSurrogate
    gan: GAN
    limit: float | None
    rows: Callable[[Tensor], Tensor] = lambda mine: mine
    anywhere: Callable[[bool], bool] = lambda here: here

    def _trusted(self) -> bool:
        # a host synchronisation: a path is chosen, by all processes the same
        return self.limit is None or not self.anywhere(not bool(self.network.error() <= self.limit))

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """:meth:`GAN.student_loss` on the prediction; gradient passes through the surrogate and not into it."""
        if not self._trusted():
            loss, logs = self.gan.student_loss(rollout, batch, generator)
            return loss, logs | _predicted(loss, 0.0)
        with frozen(self.network):
            observation = self.network.see(rollout.finished("a surrogate"), batch.window_start or 0)
        loss, logs = self.gan.persuade(observation, generator)
        return loss, logs | _predicted(loss, 1.0)

    def judge_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """:meth:`GAN.judge_loss`, without penalties, on predictions of real latents and of the student's."""
        if not self._trusted():
            loss, logs = self.gan.judge_loss(rollout, batch, generator, penalise=False)
            return loss, logs | _predicted(loss, 0.0)
        assert batch.latent_BCFHW is not None, "the batch holds no real latents"
        fake = rollout.finished("a surrogate")
        with torch.no_grad():
            both = self.network.see(
                torch.cat([sent(batch.latent_BCFHW, fake.device).to(fake), fake]), batch.window_start or 0
            )
        loss, logs = self.gan.tell_apart(both[: len(fake)], both[len(fake) :], generator, penalise=False)
        return loss, logs | _predicted(loss, 1.0)

    def prepare(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """As many of the student's pairs that are remembered as there are real clips, and the spread of all, over all processes.

        The parts of a batch that is judged in parts then have one unit of error.
        """
        if batch.observation_BCFHW is None:
            return batch
        like = self.network.observations
        observations, more = sent(batch.observation_BCFHW, like.device).to(like), batch.more
        count = len(observations)
        remembered = int(self.network.count)  # a host synchronisation: what is learned from depends on it
        if remembered:
            windows, seen = self.network.recall(count, generator)
            observations, more = torch.cat([observations, seen]), more | {"windows": windows, "seen": seen}
        unit, known = spread(self.rows(observations)), remembered >= len(self.network.errors)
        return replace(batch, more=more | {"unit": unit.expand(count), "known": [known] * count})

    def surrogate_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """Relative error on real clips and on as many of the student's that are remembered."""
        assert batch.latent_BCFHW is not None
        assert batch.observation_BCFHW is not None
        like = self.network.observations
        windows = window_of(
            sent(batch.latent_BCFHW, like.device).to(like), batch.window_start or 0, self.network.window
        )
        observations = sent(batch.observation_BCFHW, like.device).to(like)
        if "seen" in batch.more:
            windows = torch.cat([windows, batch.more["windows"]])
            observations = torch.cat([observations, batch.more["seen"]])
        logs = {"surrogate_error": self.network.error()} if batch.more["known"][0] else {}  # else infinite
        return relative_error(self.network(windows), observations, batch.more["unit"][0]), logs


def _predicted(loss: Tensor, share: float) -> dict[str, Tensor]:
    return {"predicted": torch.full_like(loss.detach(), share)}


def surrogate_calls(
    surrogate: SurrogateConfig, shapes: Shapes, window: int
) -> tuple[tuple[Call, Call, Call], int, int]:
    """A surrogate on one window: without gradient, with its input's, with its weights'; its parameters, and what it keeps."""
    channels, _, height, width = shapes.latent
    options = {k: getattr(surrogate, k) for k in ("width", "blocks", "pairs")}
    with fake():
        network = MotionSurrogate((channels, height, width), window, **options)
        seen = torch.empty(1, channels, window + 1, height, width)
        learns = trace(network.parameters(), partial(network, seen), backward=True)
        plain = trace(network.parameters(), partial(network, seen), backward=False)
        network.requires_grad_(False)
        passed = trace((), partial(network, seen.requires_grad_(True)), backward=True)
        return (plain, passed, learns), sizes(network)[0], sum(b.numel() for b in network.buffers())
