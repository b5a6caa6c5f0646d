"""Distribution matching weighted by reward (Re-DMD; Reward Forcing, arXiv 2512.04678).

A frozen reward judges the student's decoded clips, and a clip weighs ``exp(reward / beta)`` in the student's loss. Nothing is
differentiated through the reward or the decoder. What this changes, and what it cannot: ``docs/methods/redmd.md``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from mogan.config import Config
from mogan.costs.calls import Tracer, one_after_the_other
from mogan.costs.causal import roll_out_calls
from mogan.costs.trace import Call, Work
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.distributed import World
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.autoencoder import decode_video
from mogan.motion.flow import FlowEstimator
from mogan.motion.pixel_flux import net_motion
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness, guided_calls
from mogan.objectives.base import Base
from mogan.own import own_function, theirs
from mogan.sampling.rollout import FewStep, Rollout
from mogan.sampling.samplers import clips_at_once, sample_teacher
from mogan.terms import Alarm

Reward = Callable[[Tensor, list[str]], Tensor]  # clips (B, 3, F, H, W) in [-1, 1] and their prompts -> (B,)
NET_MOTION = "net_motion"
SHARE = Alarm(
    "share",
    lambda first, now: now < 0.3,
    "few clips carry the student's updates: weights of an effective share of {now:.2f}; raise beta, or the batch",
    learns="student",
)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Weights by reward; see :class:`Weights`.

    Attributes:
        beta: temperature, in deviations of the reward; infinite: all clips weigh the same.
        normalise: divide by the mean weight of the whole batch.
        limit: a reward farther than so many deviations from the mean counts as that far.
        reward: ``net_motion`` (how far carried points get, px/frame), or ``module:function`` of yours: called once with the
            device, it returns a :data:`Reward`.
        standard: mean and deviation in which rewards are measured; ``None``: those of clips of the teacher, sampled once at the
            start of the run.
        clips: how many.
        flow: flow estimator of ``net_motion`` (see :func:`mogan.motion.estimators.load_flow`); ``flow_iterations``: its
            refinement steps.
    """

    beta: float
    normalise: bool = True
    limit: float = 2.0
    reward: str = NET_MOTION
    standard: tuple[float, float] | None = None
    clips: int = 64
    flow: str
    flow_iterations: int = 12

    def __post_init__(self):
        if not self.beta > 0 or not self.limit > 0:
            raise ValueError(f"weights: beta and limit must be above 0, not {self.beta} and {self.limit}")
        if self.standard is not None and not self.standard[1] > 0:
            raise ValueError(f"weights: the standard's deviation must be above 0, not {self.standard[1]}")
        if self.standard is None and self.clips < 2:
            raise ValueError(f"weights: a deviation needs at least 2 clips, not {self.clips}")
        if self.reward != NET_MOTION and ":" not in self.reward:
            raise ValueError(f"weights: reward is {NET_MOTION} or module:function of yours, not {self.reward!r}")

    def added(self, objective: Objective, base: Base) -> Objective:
        """Distribution matching whose student learns by weighted clips."""
        flow = base.flow(self.flow, self.flow_iterations) if self.reward == NET_MOTION else None
        reward = self._own(base.device) if flow is None else by_motion(flow)
        standard = Standard(self.standard).to(base.device)
        weights = Weights(
            reward,
            base.vae,
            self,
            standard,
            world=base.world,
            reference=lambda: teacher_clips(objective.judge, base, self.clips),
        )

        def student_loss(rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
            loss, numbers = objective.losses["student"](rollout, batch, generator)
            return loss, numbers | weights.seen

        networks = dict(objective.networks) | ({} if self.standard else {"reward_standard": standard})
        losses = dict(objective.losses) | {"student": student_loss}
        return replace(objective, losses=losses, networks=networks, compare={"student": weights.compare}, flow=flow)

    def _own(self, device: torch.device) -> Reward:
        made = own_function(self.reward, "reward", "returns one, called with a device")
        with theirs(self.reward):
            reward = made(device)
        if not callable(reward):
            raise UserError(
                f"{self.reward} returns a {type(reward).__name__}: let it return a function of clips and their prompts"
            )

        def told(video: Tensor, prompts: list[str]) -> Tensor:
            with theirs(self.reward):
                return reward(video, prompts)

        return told

    def priced(self, price: Price, config: Config, tracer: Tracer, guidance: float) -> Price:
        """What weights add: the clips once more, decoded and judged; once, clips of the teacher. What a reward of one's own
        costs beside decoding nobody knows.
        """
        steps, seen, kept = (config.rollout or FewStep()).steps(config.sigmas) + 1, tracer.decode.freed(), price.kept
        looks: tuple[Call, ...] = (replace(tracer.student[0].freed(), work=tracer.student[0].work * steps),)
        if config.causal is not None:
            looks, steps = roll_out_calls(tracer, config.causal, steps - 1, learns=False)
        if self.reward == NET_MOTION:
            fields = tracer.flow_fields(self.flow, self.flow_iterations, tracer.shapes.size.frames)
            seen = one_after_the_other((tracer.decode, fields)).freed()
            if parameters := tracer.flow(self.flow, self.flow_iterations)[1]:
                kept = (*kept, Kept("flow network", parameters, learns=False, sharded=False))
        bill = price.bills["student"]
        bill = Bill((*looks, seen, *bill.calls), bill.passes + steps, bill.repeated)
        once = {}
        if self.standard is None:
            usual, calls = wan.Defaults().steps, guided_calls(guidance)
            sampled: Work = tracer.forward.work * (usual * calls) + seen.work
            peak = max(calls * tracer.forward.peak, seen.peak)
            once = {"judge a clip of the teacher": (self.clips, Call(sampled, 0.0, peak))}
        check = tracer.check(self.flow, self.flow_iterations) if self.reward == NET_MOTION else None
        bills = dict(price.bills) | {"student": bill}
        return replace(price, bills=bills, kept=kept, once=once, check=check)


def by_motion(flow: FlowEstimator) -> Reward:
    """The default reward: :func:`mogan.motion.pixel_flux.net_motion`, px/frame; the prompt is not read."""
    return lambda video, prompts: net_motion([flow(video)])


def clip_weights(
    reward_B: Float[Tensor, " b"], beta: float, normalise: bool, world: World
) -> tuple[Float[Tensor, " b"], Tensor]:
    """``exp(r / beta)`` of each clip and the effective share ``(sum w)^2 / (B sum w^2)`` of the whole batch, a scalar.

    Normalised, the whole batch's weights have mean 1: ``sum w L / sum w`` is the mean of ``w L``. The greatest reward is
    taken off first, which changes nothing then, so that equal rewards give 1 exactly. ``world``'s processes have a part of
    the batch each.
    """
    exponent = reward_B / beta
    if normalise:
        exponent = exponent - world.largest(exponent.max())
    weight = exponent.exp()
    mean = world.average(weight.mean())
    share = mean.square() / world.average(weight.square().mean())
    return (weight / mean if normalise else weight), share


class Standard(nn.Module):
    """Mean and deviation of a reward, in a run's checkpoints once they have been measured."""

    def __init__(self, known: tuple[float, float] | None):
        super().__init__()
        self.numbers_2: Tensor
        self.register_buffer("numbers_2", torch.tensor(known or (torch.nan, torch.nan)))


class Weights:
    """Weighs the student's clips by a reward.

    Args:
        reward: frozen.
        vae: decodes clips.
        settings: temperature and limit.
        standard: the unit of rewards; not a number until it is measured.
        world: the processes that have a part of the batch each.
        reference: latents and prompts of the clips that it is measured on, this process's part of them.
    """

    def __init__(
        self,
        reward: Reward,
        vae: Any,
        settings: WeightsConfig,
        standard: Standard,
        *,
        world: World,
        reference: Callable[[], Iterator[tuple[Tensor, list[str]]]],
    ):
        self.reward, self.vae, self.settings, self.standard = reward, vae, settings, standard
        self.world, self.reference = world, reference
        self.known = False
        self.seen: dict[str, Tensor] = {}

    def compare(self, batch: Batch, rollouts: Sequence[Rollout]) -> Batch:
        """The batch with the ``weight`` of each clip, which :class:`mogan.objectives.dmd.DMD` reads.

        A reward that is not finite weighs NaN: the host does not wait for rewards here, and reads them with the loss.
        """
        reward_B = self.rewards(torch.cat([rollout.finished("a reward") for rollout in rollouts]), batch.prompts)
        self._measure()
        mean, deviation = self.standard.numbers_2.to(reward_B)
        standing_B = ((reward_B - mean) / deviation).clamp(-self.settings.limit, self.settings.limit)
        standing_B = standing_B.where(reward_B.isfinite(), torch.nan)  # the loss then is none, and the run says why
        weight_B, share = clip_weights(standing_B, self.settings.beta, self.settings.normalise, self.world)
        self.seen = {"reward": reward_B.mean(), "share": share}
        return replace(batch, more=batch.more | {"weight": weight_B})

    @torch.no_grad()
    def rewards(self, latent_BCFHW: Tensor, prompts: list[str]) -> Float[Tensor, " b"]:
        """Raw rewards of clips, decoded and judged one at a time.

        Raises:
            UserError: the reward returns no tensor, or another shape.
        """
        found = [
            self.reward(decode_video(self.vae, latent), [prompt])
            for latent, prompt in zip(latent_BCFHW.split(1), prompts, strict=True)
        ]
        for one in found:
            if not isinstance(one, Tensor) or one.shape != (1,):
                what = f"a tensor of shape {tuple(one.shape)}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
                raise UserError(f"{self.settings.reward} returns {what} for one clip: a reward is a tensor (B,)")
        return sent(torch.cat(found), latent_BCFHW.device).float()

    def _measure(self) -> None:
        """The unit of rewards, unless the recipe or a checkpoint knows it; all processes call it at once.

        Raises:
            UserError: rewards of the teacher's clips are not finite, or all the same.
        """
        if self.known or bool(self.standard.numbers_2.isfinite().all()):
            self.known = True
            return
        reward_B = torch.cat([self.rewards(latent, prompts) for latent, prompts in self.reference()])
        mean = self.world.average(reward_B.mean())
        deviation = self.world.average((reward_B - mean).square().mean()).sqrt()
        if not bool(deviation.isfinite()):
            raise UserError(
                f"the reward {self.settings.reward} of clips of the teacher is not finite: let it return finite numbers"
            )
        if not bool(deviation > 0):
            raise UserError(
                f"the reward {self.settings.reward} is the same for all {self.settings.clips} clips of the teacher, which gives it no "
                "unit: give weights.standard in the recipe, its mean and deviation"
            )
        self.standard.numbers_2.copy_(torch.stack([mean, deviation]))
        self.known = True


def teacher_clips(matching: Any, base: Base, count: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Latents ``(B, C, F, H, W)`` and prompts of clips of DMD's teacher, guided as there, in the model's own number of steps.

    Prompts are taken evenly from those that the student makes clips of; of ``count`` clips every process has as many.
    """
    texts, usual, world = base.prompts or base.cache, wan.defaults(base.folder), base.world
    each = max(1, count // world.shares)
    numbers = [each * world.share + i for i in range(each)]
    together = clips_at_once(base.geometry)
    for first in tqdm(range(0, each, together), desc="clips of the teacher", disable=not world.main):
        seeds = numbers[first : first + together]
        prompts = [texts.entries[n * len(texts) // (each * world.shares)]["caption"] for n in seeds]
        text = stack_text([texts.text(prompt) for prompt in prompts], base.device)
        yield (
            sample_teacher(
                matching.teacher,
                text,
                matching.null_1LD,
                base.latent_shape,
                seeds,
                steps=usual.steps,
                guidance=matching.settings.guidance,
                shift=usual.shift,
            ),
            prompts,
        )
