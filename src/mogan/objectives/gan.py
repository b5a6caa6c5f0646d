"""Adversarial objectives: MoGAN's on optical flow, and the latent-space one it is compared with.

Both are one class; they differ in what the discriminator is shown.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer, judge_call
from mogan.costs.trace import Call
from mogan.data.batches import Batch
from mogan.data.cache import Cache
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models import attention, wan
from mogan.models.denoiser import frozen, recomputed
from mogan.models.discriminator import PROMPT, Discriminator, approximate_penalty, discriminator_loss, generator_loss
from mogan.models.experts import low_noise
from mogan.models.lora import adapted, twin
from mogan.motion.observation import Observed, full_scale, motion_amount, saturation
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness
from mogan.objectives.base import Base, wins_outright
from mogan.objectives.motion_view import observation_of, of_real_clips, price_observation
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, uniform
from mogan.sharding import shard
from mogan.terms import LATENT, OBSERVATION, Alarm, Lesson, Terms, several

MOTION = (
    Alarm(
        "motion",
        lambda first, now: now < 0.7 * max(first, 1e-8),
        "the student is stiller than at its start: its clips move {now:.2f} px/frame, at first {first:.2f}; stop here, or "
        "lower the guidance of dmd or raise the motion update's learning rate",
    ),
    Alarm(
        "saturation",
        lambda first, now: now - first > 0.1,
        "colours are saturating: {now:.2f}, at first {first:.2f}; lower the learning rate of the student or the guidance of dmd",
    ),
)
WINS = wins_outright("raise r1 and r2, or lower its learning rate")


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """Adversarial objective and its discriminator; see :class:`GAN`.

    Attributes:
        space: ``motion`` (decoded optical flow, MoGAN) or ``latent`` (the ablation).
        student_weight: lambda_1. Of an update with an optimiser of its own Adam undoes it: there the learning rate weighs.
        judge_weight: lambda_2, against ``r1`` and ``r2``.
        blocks: first blocks of the transformer that form the trunk; ``taps``: after which of them heads read.
        prompt: what the trunk is told; ``sigma``: the noise level it is told.
        r1, r2: weights of the penalties on real and on generated observations; 0 leaves the extra inputs out.
        noise: sigma of the penalties, in units of the discriminator's (normalised) input.
        normalise: divide the penalties by ``noise`` squared; see :func:`mogan.models.discriminator.approximate_penalty`.
        window: latent frames decoded; ``starts``: where a window may begin, one is drawn per update.
        max_flow: pixels per frame drawn as 1; ``None``: what the cached clips say (:func:`mogan.motion.observation.full_scale`).
        flow: flow estimator (see :func:`mogan.motion.estimators.load_flow`); ``flow_iterations``: its refinement steps;
            ``flow_resolution``: the part of height and width it sees, ``None`` for all.
        drawn_levels: noise the observation to levels drawn uniformly and tell them to the trunk, instead of ``sigma`` always.
        train_trunk: the trunk learns too; otherwise only tokens and heads.
    """

    space: str
    blocks: int
    taps: tuple[int, ...]
    prompt: str = PROMPT
    sigma: float = 0.0
    student_weight: float = 0.5
    judge_weight: float = 0.5
    r1: float = 0.3
    r2: float = 0.3
    noise: float = 0.01
    normalise: bool
    window: int
    starts: tuple[int, ...] = (0,)
    flow: str
    flow_iterations: int = 12
    flow_resolution: float | None = None
    max_flow: float | None = None
    drawn_levels: bool = False
    train_trunk: bool = True

    def __post_init__(self):
        if self.space not in ("motion", "latent"):
            raise ValueError(f"gan: space is motion or latent, not {self.space!r}")
        several("gan: taps", self.taps, int)
        several("gan: starts", self.starts, int)
        if not self.taps or not all(0 <= tap < self.blocks for tap in self.taps):
            raise ValueError(f"gan: taps are of blocks 0 to {self.blocks - 1}, at least one, not {self.taps}")
        if not self.starts:
            raise ValueError("gan: a window has at least one start")

    @property
    def in_motion(self) -> bool:
        """Whether the discriminator sees motion, not latents."""
        return self.space == "motion"

    def terms(self, config: Config) -> Terms:
        """The student is judged on a rollout; the discriminator tells it from real clips."""
        starts, real = (self.starts, OBSERVATION) if self.in_motion else ((), LATENT)
        lessons = {"student": Lesson(starts=starts), "discriminator": Lesson(clips=(real,), starts=starts)}
        windows = [window for window in (9, 6, 4, 3) if self.in_motion and window < self.window]
        smaller = tuple((f"a window of {window} latent frames", replace(self, window=window)) for window in windows)
        alarms = (*MOTION, WINS) if self.in_motion else (WINS,)
        return Terms(lessons=lessons, alarms=alarms, fill=self._fill, smaller=smaller, first_frames=True)

    def _fill(self, cache: Cache) -> "GANConfig":
        """With the scale of the motion picture, which a recipe may leave to the cache's clips.

        A run keeps the number in its ``config.json``, and the observations beside theirs.

        Raises:
            UserError: a window does not fit into the clips; the cache does not say how much they move, or they stand still.
        """
        if not self.in_motion:
            return self
        cache.require_clips()
        frames = 1 + (cache.facts["frames"] - 1) // 4
        if max(self.starts) + self.window > frames:
            raise UserError(
                f"the recipe looks at latent frames up to {max(self.starts) + self.window} and clips have {frames}: prepare "
                "longer clips, or give the recipe a shorter window and fewer starts"
            )
        if self.max_flow is not None:
            return self
        motions = [entry["motion"] for entry in cache.entries if "motion" in entry]
        scale = full_scale(motions) if motions else 0.0
        if scale <= 0:
            why = "most of its clips stand still" if motions else "it does not say how much its clips move"
            raise UserError(
                f"{cache.path} gives no scale for the picture of motion ({why}): prepare clips that move (--motion-rich), or "
                "give gan.max_flow in the recipe, pixels per frame"
            )
        return replace(self, max_flow=scale)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The discriminator, and what it is shown."""
        discriminator = self._discriminator(base)
        exact = observation_of(self, base) if self.in_motion else None
        gan = GAN(discriminator, exact, self, apart=bool(base.config.offload))
        losses = {"student": gan.student_loss, "discriminator": gan.judge_loss}
        found = Objective(gan, losses, {"discriminator": discriminator})
        if exact is not None:
            channels, _, height, width = base.latent_shape
            found.observations, found.flow, found.scale = of_real_clips(self, base, exact), exact.flow, exact.max_flow
            found.observation_bytes = channels * self.window * height * width * torch.bfloat16.itemsize
        return found

    def _discriminator(self, base: Base) -> Discriminator:
        torch.manual_seed(base.config.seed)  # the heads start at random
        text = attention.stack_text(base.encode([self.prompt]))
        lora, part = base.config.lora, low_noise(base.folder)
        if lora is None:
            trunk = wan.load_transformer(base.folder, part)
        else:
            held = base.held(base.folder, part)
            trunk = adapted(held, lora, base.config.seed) if self.train_trunk else twin(held)
        if self.blocks > len(trunk.blocks):
            raise UserError(
                f"the recipe's discriminator takes {self.blocks} blocks and {base.folder} has {len(trunk.blocks)}: lower "
                "gan.blocks and gan.taps"
            )
        network = Discriminator(trunk, text, blocks=self.blocks, tap_at=self.taps, sigma=self.sigma, dtype=base.dtype)
        if not self.train_trunk:
            network.transformer.requires_grad_(False)
        if lora is None:  # penalised it computes in fp32, so its blocks are gathered in fp32
            shard(network, trunk.blocks, base.world, torch.float32 if self.r1 or self.r2 else base.dtype)
        network = network.to(base.device).train()
        if base.config.checkpointing:
            network.transformer.enable_gradient_checkpointing(recomputed)
        return network

    def price(self, config: Config, tracer: Tracer) -> Price:
        """A discriminator looks at one observation for the student, and at real and generated ones, noised too, to learn."""
        learns, parameters = self.judge(tracer, torch.float32 if self.r1 or self.r2 else tracer.dtype, learns=True)
        passes, _ = self.judge(tracer, tracer.dtype, learns=False)
        shown = 2 + bool(self.r1) + bool(self.r2)
        several = learns.apart(shown) if config.offload else learns.times(shown)
        # of a pass: forward twice, and a backward pass of twice the work
        again = learns.work.flops / 4 if config.checkpointing else 0.0
        kept: tuple[Kept, ...] = (Kept("discriminator", parameters, trunk=self.blocks if self.train_trunk else 0),)
        if not self.in_motion:
            bills = {
                "student": Bill((passes,), 2, again),
                "discriminator": Bill((several.freed(),), 2, shown * again),
            }
            return Price(bills, kept)
        view = price_observation(self, config, tracer)
        inside = self.window / (self.window + sum(self.starts) / len(self.starts))  # what lies before is decoded once
        more = view.observe.work.flops * inside if config.checkpointing else 0.0
        bills = {
            "student": Bill((view.with_gradient, passes), 2, again + more),
            "discriminator": Bill((view.observe.freed(), several.freed()), 2, shown * again),
        }
        kept += view.kept
        return Price(bills, kept, observe=view.observe, stages=view.stages, check=view.check, pictured=True)

    def judge(self, tracer: Tracer, dtype: torch.dtype, *, learns: bool) -> tuple[Call, int]:
        """The discriminator on what it is shown of one clip, computing in ``dtype``; its parameters."""
        blocks, heads, checkpointing = self.blocks, len(self.taps), tracer.checkpointing
        frames = self.window if self.in_motion else tracer.shapes.latent[1]
        return tracer.once(
            ("judge", blocks, heads, frames, dtype, learns),
            lambda: judge_call(tracer.shapes, blocks, heads, frames, checkpointing, dtype, learns=learns),
        )


@dataclass(eq=False)
class GAN:
    """Logistic adversarial loss with approximate R1 and R2 (MoGAN eq. 4-8). Owns the discriminator.

    Attributes:
        discriminator: real-or-generated network.
        observe: what it is shown of a latent (see :class:`mogan.motion.observation.MotionObservation`); ``None`` shows the
            latent itself (the paper's "video-space" ablation).
        settings: weights, penalties and levels.
        apart: the discriminator learns from real, generated and noised observations in a pass each, not in one: less memory.
    """

    discriminator: Discriminator
    observe: Callable[[Tensor, int], Observed] | None
    settings: GANConfig
    apart: bool = False

    def _observe(self, rollout: Rollout, start: int) -> tuple[Tensor, dict[str, Tensor]]:
        sample = rollout.finished("a discriminator of motion")
        if self.observe is None:
            return sample, {}
        seen = self.observe(sample, start)
        with torch.no_grad():
            logs = {
                "motion": motion_amount(seen.flow_BCFHW).mean(),
                "saturation": saturation(seen.video_BCFHW).mean(),
            }
        return seen.latent_BCFHW, logs

    def _shown(self, observation: Tensor, generator: Randomness) -> tuple[Tensor, Tensor | None]:
        """The observation as the discriminator gets it, and the level it is told where that is drawn."""
        if not self.settings.drawn_levels:
            return observation, None
        sigma = sent(uniform(len(observation), generator), observation.device)
        return add_noise(observation, normal(observation.shape, generator, observation.device), sigma), sigma

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``lambda_1 E softplus(-D(o))``; gradient passes through the discriminator and the observation, not into them."""
        observation, logs = self._observe(rollout, batch.window_start or 0)
        loss, more = self.persuade(observation, generator)
        return loss, logs | more

    def persuade(self, observation: Tensor, generator: Randomness) -> Loss:
        """The student's loss on an observation ``(B, C, F, H, W)`` of its clips, exact or not."""
        with frozen(self.discriminator):
            logits = self.discriminator(*self._shown(observation, generator))
        return self.settings.student_weight * generator_loss(logits), {"fake_logit": logits.detach().mean()}

    def judge_loss(self, rollout: Rollout, batch: Batch, generator: Randomness, penalise: bool = True) -> Loss:
        """``lambda_2`` (logistic) ``+ r1 R1 + r2 R2`` on real observations of the batch and on the student's."""
        with torch.no_grad():
            fake, logs = self._observe(rollout, batch.window_start or 0)
        real = batch.latent_BCFHW if self.observe is None else batch.observation_BCFHW
        assert real is not None, "the batch holds no real observations"
        loss, more = self.tell_apart(sent(real, fake.device).to(fake), fake, generator, penalise)
        return loss, logs | more

    def tell_apart(self, real: Tensor, fake: Tensor, generator: Randomness, penalise: bool = True) -> Loss:
        """The discriminator's loss on observations ``(B, C, F, H, W)`` of real clips and the student's, both exact or neither."""
        sides = [
            ("r1", self.settings.r1, *self._shown(real, generator)),
            ("r2", self.settings.r2, *self._shown(fake, generator)),
        ]
        seen, levels = [side[2] for side in sides], [side[3] for side in sides]
        penalised = [side for side in sides if side[1] and penalise]
        for _, _, shown, sigma in penalised:
            seen.append(shown + self.settings.noise * normal(shown.shape, generator, shown.device))
            levels.append(sigma)
        # in one pass: sharded weights are gathered once, and small batches fill the device; of penalised inputs in fp32,
        # since the penalties divide a small difference of logits by a small number
        dtype = torch.float32 if penalised else None
        if self.apart:
            clean_and_noisy = [self.discriminator(x, level, dtype) for x, level in zip(seen, levels, strict=True)]
        else:
            sigma_B = (
                torch.cat([level for level in levels if level is not None]) if self.settings.drawn_levels else None
            )
            clean_and_noisy = self.discriminator(torch.cat(seen), sigma_B, dtype).chunk(len(seen))
        real_logits, fake_logits, *noisy = clean_and_noisy
        loss = self.settings.judge_weight * discriminator_loss(real_logits, fake_logits)
        logs = {
            "real_logit": real_logits.detach().mean(),
            "fake_logit": fake_logits.detach().mean(),
            "gap": (real_logits.detach().mean() - fake_logits.detach().mean()),
        }
        logits = {"r1": real_logits, "r2": fake_logits}
        for (name, weight, _, _), noisy_logits in zip(penalised, noisy, strict=True):
            penalty = approximate_penalty(logits[name], noisy_logits, self.settings.noise, self.settings.normalise)
            loss = loss + weight * penalty
            logs[name] = penalty.detach()
        return loss, logs
