"""SHIFT (arXiv 2603.17426): motion rewards weigh a denoising loss, so nothing is differentiated through the sampler.

A clip is sampled for every real one, from the same first frame and prompt. Both are rewarded, and the student denoises
both, each as much as its advantage says. The paper's equations 8 to 12 are not public: the loss is a reconstruction of
what it says about them, see ``docs/methods/shift.md``.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogan.config import Config
from mogan.costs.calls import Tracer, one_after_the_other
from mogan.costs.shapes import Shapes
from mogan.costs.trace import Call, fake, sizes, trace
from mogan.data.batches import Batch
from mogan.data.cache import Cache
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser
from mogan.models.discriminator import discriminator_loss
from mogan.motion.observation import motion_amount
from mogan.motion.pixel_flux import PixelFlux, state_size
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness, guided_calls
from mogan.objectives.base import Base
from mogan.objectives.flow_matching import OF_CLIPS, learns_alone, velocity_error
from mogan.objectives.rewards import MotionRewards
from mogan.sampling.rollout import animate, normal
from mogan.schedule import draw_sigma, uniform
from mogan.sharding import shard
from mogan.terms import Alarm, Terms

STILLER = Alarm(
    "motion",
    lambda first, now: now < 0.7 * max(first, 1e-8),
    "the student is stiller than at its start: its clips move {now:.2f} px/frame, at first {first:.2f}; stop here, or raise "
    "shift.beta",
)
FLOOR = -1.0  # least weight of the linear form


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Advantage-weighted denoising with motion rewards; see :class:`Shift`.

    Attributes:
        guidance: of the sampler; its levels are the config's ``sigmas``.
        level_shift: of the levels at which pairs are denoised.
        weight: ``exp`` or ``linear``; ``beta``: its temperature; see :func:`pair_weights`.
        clip: range of a reward.
        points: query points per clip, drawn at random each time.
        patch: frames, height and width of a patch of the flux maps.
        width, depth, heads: of each reward's transformer.
        flow: flow estimator (see :func:`mogan.motion.estimators.load_flow`); ``flow_iterations``: its refinement steps.
    """

    guidance: float
    level_shift: float
    weight: str
    beta: float
    clip: tuple[float, float]
    points: int
    patch: tuple[int, int, int]
    width: int
    depth: int
    heads: int
    flow: str
    flow_iterations: int = 12

    def __post_init__(self):
        if self.weight not in ("exp", "linear"):
            raise ValueError(f"shift: weight is exp or linear, not {self.weight!r}")

    def terms(self, config: Config) -> Terms:
        """Pairs are made of clips and their captions; the baseline is the mean over the generated ones of a batch."""
        lesson = replace(OF_CLIPS, least=2)
        return Terms(lessons={"student": lesson, "reward": lesson}, alarms=(STILLER,), fill=self._fill)

    def _fill(self, cache: Cache) -> "ShiftConfig":
        cache.require_clips()
        frames, height, width = (cache.facts[k] for k in ("frames", "height", "width"))
        if any(a % b for a, b in zip((frames - 1, height, width), self.patch, strict=True)):
            raise UserError(
                f"clips of {frames} x {height} x {width} do not split into patches {self.patch}: change shift.patch"
                " in the recipe so that it divides frames - 1, height and width"
            )
        return self

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The rewards and what they see."""
        size = base.geometry
        torch.manual_seed(base.config.seed)
        rewards = MotionRewards(
            (size.frames, size.height, size.width),
            patch=self.patch,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            clip=self.clip,
        )
        blocks = nn.ModuleList([*rewards.instantaneous.blocks.layers, *rewards.long_term.blocks.layers])
        shard(rewards, blocks, base.world, torch.float32)
        rewards = rewards.to(base.device).train()
        flow = base.flow(self.flow, self.flow_iterations)
        found = Shift(
            base.student,
            rewards,
            PixelFlux(base.vae, flow),
            base.no_text(base.config.negative_prompt),
            self,
            sigmas=base.config.sigmas,
            given=base.config.given,
            average=base.world.average,
        )
        losses = {"student": found.student_loss, "reward": found.judge_loss}
        return Objective(found, losses, {"reward": rewards}, prepare=found.prepare, flow=flow)

    def price(self, config: Config, tracer: Tracer) -> Price:
        """Pairs once an iteration: sampled, observed there and back, rewarded; then both clips of each are learnt from."""
        _, parameters = tracer.flow(self.flow, self.flow_iterations)
        fields = tracer.flow_fields(self.flow, self.flow_iterations, tracer.shapes.size.frames)
        flux = one_after_the_other((tracer.decode, fields, fields))
        reward, weights = tracer.once(("reward", self), lambda: reward_call(self, tracer.shapes))
        calls, forward = guided_calls(self.guidance), tracer.student[0]
        steps = len(config.sigmas)
        sampled = replace(forward.times(calls).freed(), work=forward.work * (steps * calls))
        seen = replace(flux.freed(), work=(flux.work + reward.work * (1 / 3)) * 2)  # forward alone is a third
        bills = {"student": learns_alone(config, tracer, 2), "reward": Bill((reward.times(2),), 0)}
        kept = [Kept("reward", weights)]
        if parameters:
            kept.append(Kept("flow network", parameters, learns=False, sharded=False))
        return Price(
            bills,
            tuple(kept),
            prepare=Bill((sampled, seen), steps),
            check=tracer.check(self.flow, self.flow_iterations),
        )


def advantages(
    generated_B: Float[Tensor, " b"], real_B: Float[Tensor, " b"], average: Callable[[Tensor], Tensor] = lambda x: x
) -> Float[Tensor, "b 2"]:
    """Rewards of generated and real clips less the mean reward of the generated ones; not divided by a deviation.

    ``average``, of a scalar, is over the processes that have a part of the batch each.
    """
    return torch.stack([generated_B, real_B], 1) - average(generated_B.mean())


def pair_weights(advantage: Tensor, form: str, beta: float) -> Tensor:
    """Weights of clips' denoising losses, of the same shape as the advantages (reconstructed).

    ``exp``: ``exp(A / beta)``, the Gibbs tilt whose forward KL the paper minimises; never negative. ``linear``:
    ``A / beta``, not below -1: a policy gradient, which pushes away from clips worse than the mean.
    """
    return (advantage / beta).exp() if form == "exp" else (advantage / beta).clamp(min=FLOOR)


@dataclass(frozen=True)
class Pairs:
    """Generated and real clips from the same first frames and prompts; index 0 of a pair is the generated clip."""

    generated_BCFHW: Tensor
    real_BCFHW: Tensor
    advantage_B2: Tensor
    maps_B2CFHW: Tensor
    states_B2ND: Tensor

    def __getitem__(self, window: slice) -> "Pairs":
        return Pairs(*(getattr(self, field.name)[window] for field in fields(self)))


class Shift:
    """Advantage-weighted denoising of generated and real clips. Owns the rewards.

    Pairs are sampled once per iteration. All updates in it share them: several of the student, and the refresh of the
    rewards, which the paper does on "the most recent on-policy samples".

    Args:
        student: the network being trained, which is also the sampler.
        rewards: the two discriminators; ``see``: what they are shown of latents.
        null_1LD: embedding of the empty (or negative) prompt.
        settings: guidance, levels, weights and points.
        sigmas: the sampler's levels.
        given: latent frames that are given (image to video: 1).
        average: a tensor over the processes that have a part of the batch each.
    """

    def __init__(
        self,
        student: Denoiser,
        rewards: MotionRewards,
        see: PixelFlux,
        null_1LD: Tensor,
        settings: ShiftConfig,
        *,
        sigmas: tuple[float, ...],
        given: int,
        average: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        self.student, self.rewards, self.see, self.null_1LD = student, rewards, see, null_1LD
        self.settings, self.sigmas, self.given, self.average = settings, sigmas, given, average
        self.latest: tuple[int, Batch] | None = None  # iteration and its pairs, which all updates in it share
        self.seen: dict[str, Tensor] = {}

    def prepare(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """The pairs of an iteration: sampled from ``batch`` by its first update, the same for all that follow in it."""
        if self.latest is None or self.latest[0] != iteration:
            self.latest = iteration, self.sample(batch, generator, most)
        return self.latest[1]

    def sample(self, batch: Batch, generator: Randomness, most: int) -> Batch:
        """The batch with :class:`Pairs`: a generated clip beside each real one, both observed and rewarded.

        Made of at most ``most`` at a time, which bounds memory; the baseline is that of the whole batch.
        """
        assert batch.latent_BCFHW is not None, "SHIFT needs clips, not only prompts"
        device = self.null_1LD.device
        real_BCFHW, text_BLD = sent(batch.latent_BCFHW, device), stack_text(batch.text, device)
        windows = [slice(at, at + most) for at in range(0, len(real_BCFHW), most)]
        own = [generator[w] if isinstance(generator, list) else generator for w in windows]
        made, maps, states, rewards, motion = zip(
            *(self._pair(real_BCFHW[w], text_BLD[w], g) for w, g in zip(windows, own, strict=True)), strict=True
        )
        reward_B2 = torch.cat(rewards)
        self.seen = {"reward": reward_B2[:, 0].mean(), "real_reward": reward_B2[:, 1].mean()}
        self.seen["motion"] = torch.cat(motion).mean()
        advantage_B2 = advantages(reward_B2[:, 0], reward_B2[:, 1], self.average)
        pairs = Pairs(torch.cat(made), real_BCFHW, advantage_B2, torch.cat(maps), torch.cat(states))
        return replace(batch, more=batch.more | {"pairs": pairs})

    @torch.no_grad()
    def _pair(self, real: Tensor, text: Tensor, generator: Randomness) -> tuple[Tensor, ...]:
        """Generated clips, maps and states and rewards of both, and how much the generated ones move."""
        noise = normal(real.shape, generator, real.device)
        made = animate(
            self.student, noise, real[:, :, : self.given], text, self.null_1LD, self.sigmas, self.settings.guidance
        )
        # a pair has the same first frame, so both are followed from the same points
        queries = sent(uniform(len(real), generator, self.settings.points, 2), real.device).to(real)
        fluxes = [self.see(clips, queries) for clips in (made, real)]
        reward_B2 = torch.stack([self.rewards.reward(f.maps_BCFHW, f.states_BND) for f in fluxes], 1)
        maps, states = (torch.stack(x, 1) for x in zip(*((f.maps_BCFHW, f.states_BND) for f in fluxes), strict=True))
        return made, maps, states, reward_B2, motion_amount(fluxes[0].flow_BCFHW)

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """``mean_b [w(A~_b) ell(x~_b; t_b, e_b) + w(A_b) ell(x_b; t_b, e_b)]``: a pair shares level and noise."""
        pairs: Pairs = batch.more["pairs"]
        real = pairs.real_BCFHW
        sigma = sent(draw_sigma(len(real), generator, k=self.settings.level_shift), real.device).to(real)
        noise, text = normal(real.shape, generator, real.device), stack_text(batch.text, real.device)
        twice = [torch.cat([x, x]) for x in (noise, sigma, text)]
        error = velocity_error(self.student, torch.cat([pairs.generated_BCFHW, real]), *twice, given=self.given)
        weight_B2 = pair_weights(pairs.advantage_B2, self.settings.weight, self.settings.beta)
        loss = (weight_B2 * error.unflatten(0, (2, -1)).T).sum(1).mean()
        return loss, self.seen | {"weight": weight_B2[:, 0].mean(), "real_weight": weight_B2[:, 1].mean()}

    def judge_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """``-E log D(x) - E log (1 - D(x~))`` of both rewards (SHIFT eq. 7), on the newest on-policy clips."""
        pairs: Pairs = batch.more["pairs"]
        made, real = (self.rewards(pairs.maps_B2CFHW[:, i], pairs.states_B2ND[:, i]) for i in (0, 1))
        gap = (real - made).detach().mean(0)
        return discriminator_loss(real, made), {"gap_instantaneous": gap[0], "gap_long_term": gap[1]}


def reward_call(shift: ShiftConfig, shapes: Shapes) -> tuple[Call, int]:
    """SHIFT's two rewards on one clip, forward and backward; their parameters."""
    size = shapes.size
    options = {k: getattr(shift, k) for k in ("patch", "width", "depth", "heads", "clip")}
    with fake():
        with warnings.catch_warnings(action="ignore"):  # of the copies that torch makes of a transformer's first layer
            rewards = MotionRewards((size.frames, size.height, size.width), **options)
        maps = torch.empty(1, 4, size.frames - 1, size.height, size.width)
        states = torch.empty(1, shift.points, state_size(size.frames))
        return trace(rewards.parameters(), partial(rewards, maps, states), backward=True), sizes(rewards)[0]
