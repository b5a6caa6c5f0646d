"""AccVideo (arXiv 2503.19462): the student follows a teacher's kept paths from key level to key level, and is judged at each.

The batch holds what the teacher passed at the student's levels ``s_0 = 1 > ... > s_m = 0`` (:mod:`mogan.data.paths`). Two
objectives, of which the first is one by itself: regression on the mean velocity between neighbours, and a discriminator of the
frozen teacher's features with a head for each level, which sees the student's latents at that level as they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.config import EULER, Config
from mogan.costs.calls import TEXT_TOKENS, Tracer, build_transformer
from mogan.costs.shapes import Shapes
from mogan.costs.trace import Call, fake, sizes, trace
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser, frozen
from mogan.models.discriminator import LevelHeads, discriminator_loss, features_of, generator_loss
from mogan.models.experts import boundary_of
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness
from mogan.objectives.base import Base, wins_outright
from mogan.objectives.flow_matching import learns_alone
from mogan.objectives.queues import Queues
from mogan.sampling.rollout import normal
from mogan.schedule import uniform
from mogan.sharding import shard, tapped
from mogan.terms import PATH, Lesson, Terms

OF_PATHS = Lesson(rollout=False, clips=(PATH,), captions=True)
WINS = wins_outright("lower its learning rate", "the teacher's and the student's")


def key_levels(config: Config) -> tuple[float, ...]:
    """The key levels, 0 included.

    Raises:
        ValueError: the student would be sampled otherwise than it is trained, or is given frames, which paths do not have.
    """
    if config.solver != EULER or config.given:
        raise ValueError(
            "a student of paths makes whole clips by Euler steps: give the config rollout=Euler(...) and given=0"
        )
    return (*config.sigmas, 0.0)


# ---------------------------------------------------------------------------------------------- following the teacher


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Regression on the mean velocities of paths; see :class:`Trajectory`."""

    def terms(self, config: Config) -> Terms:
        """The student learns from a teacher's paths and their captions."""
        key_levels(config)
        return Terms(lessons={"student": OF_PATHS})

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """On the student."""
        found = Trajectory(base.student, key_levels(base.config))
        return Objective(found, {"student": found.student_loss})

    def price(self, config: Config, tracer: Tracer) -> Price:
        """The student, trained."""
        return Price({"student": learns_alone(config, tracer)})


class Trajectory:
    """``E ||v(x_k, s_k) - (x_k - x_{k+1}) / (s_k - s_{k+1})||^2`` with ``x_k`` what the teacher passed at ``s_k`` (L_traj).

    A student without error takes Euler's steps from one of the teacher's points to the next. Into level 0 it is regression
    on the clip, ``||x0(x_k, s_k) - x_{k+1}||^2 / s_k^2``. One step of the path is drawn per clip.

    Args:
        student: the network being trained.
        levels: ``s_0`` to ``s_m``.
    """

    def __init__(self, student: Denoiser, levels: tuple[float, ...]):
        self.student, self.levels = student, levels

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch's paths; ``rollout`` is not used."""
        assert batch.path_BKCFHW is not None, "the batch holds no paths"
        device = next(self.student.parameters()).device
        path, clips = sent(batch.path_BKCFHW, device), torch.arange(len(batch.ids), device=device)
        drawn = (uniform(len(clips), generator) * (len(self.levels) - 1)).long()
        level, following = (sent(torch.tensor(self.levels)[drawn + ahead], device) for ahead in (0, 1))
        step_B = sent(drawn, device)
        here, there = path[clips, step_B], path[clips, step_B + 1]
        mean_velocity = (here - there) / (level - following).view(-1, 1, 1, 1, 1)
        velocity = self.student.velocity(here, level, stack_text(batch.text, device))
        return (velocity - mean_velocity).square().mean(), {}


# ---------------------------------------------------------------------------------------------- judged at every level


@dataclass(frozen=True, kw_only=True)
class KeyLevelGANConfig:
    """Adversarial training at the key levels; see :class:`KeyLevelGAN`.

    Attributes:
        weight: lambda_adv, of the student's loss.
        block: of the teacher, after which heads of noisy levels read; ``clean_block``: the head of level 0.
    """

    weight: float
    block: int
    clean_block: int

    def terms(self, config: Config) -> Terms:
        """Both learn from a teacher's paths and their captions; the student's latents wait in queues."""
        key_levels(config), self.batch(config)
        lessons = {"student": replace(OF_PATHS, clips=()), "discriminator": OF_PATHS}
        return Terms(lessons=lessons, alarms=(WINS,))

    def blocks(self, config: Config) -> tuple[int, ...]:
        """After which block the head of each level reads, from the noisiest to 0."""
        return (*[self.block] * (len(config.sigmas) - 1), self.clean_block)

    def batch(self, config: Config) -> int:
        """Clips of its updates, whose places queues have."""
        sizes = {u.batch for u in config.plan if any(config.objectives.get(name) == self for name in u.judges)}
        if len(sizes) > 1:
            raise ValueError(
                f"student and discriminator share queues: give their updates one batch, not {sorted(sizes)}"
            )
        return max(sizes, default=1)

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """Heads on the frozen teacher, and the queues.

        Raises:
            UserError: the teacher has two transformers, or too few blocks.
        """
        if boundary_of(base.folder) is not None:
            raise UserError(
                f"{base.folder} holds two transformers, and heads read the features of one: leave {base.config.recipe}'s "
                "discriminator out, as accvideo_lab_no_gan does"
            )
        config, teacher = base.config, Denoiser(tapped(base.frozen(base.folder, "transformer")), base.dtype)
        if max(self.block, self.clean_block) >= len(teacher.transformer.blocks):
            raise UserError(
                f"the recipe's heads read after block {max(self.block, self.clean_block)} and {base.folder} has "
                f"{len(teacher.transformer.blocks)}, counted from 0: lower block and clean_block"
            )
        if config.checkpointing:
            teacher.transformer.enable_gradient_checkpointing()
        torch.manual_seed(config.seed)  # the heads start at random
        attention = teacher.transformer.config.num_attention_heads
        width = attention * teacher.transformer.config.attention_head_dim
        heads = LevelHeads(width, attention, self.blocks(config))
        shard(heads, heads.heads, base.world, torch.float32)
        heads.to(base.device)
        queues = Queues(base.cache, base.world, len(config.sigmas), self.batch(config), base.latent_shape)
        found = KeyLevelGAN(base.student, teacher, heads, queues, key_levels(config), self.weight)
        return Objective(
            found,
            {"student": found.student_loss, "discriminator": found.judge_loss},
            {"discriminator": heads},
            frozen=(teacher.transformer,),
            prepare=found.prepare,
            state=queues.state,
        )

    def price(self, config: Config, tracer: Tracer) -> Price:
        """A step of the student judged with gradient; the teacher's features of a clip of each kind, and a head's update."""
        shapes, blocks, checkpointing = tracer.shapes, self.blocks(config), config.checkpointing
        through, learns, parameters = tracer.once(
            ("heads", blocks, checkpointing), lambda: heads_calls(shapes, blocks, checkpointing, tracer.dtype)
        )
        again = tracer.forward.work.flops if checkpointing else 0.0
        rows = len(config.sigmas) * self.batch(config) * 4.0 * torch.Size(shapes.latent).numel()
        bills = {
            "student": Bill((tracer.student[1], through), 4, 2 * again),
            "discriminator": Bill((tracer.forward.times(2).freed(), learns.times(2)), 1),
        }
        kept = (
            Kept("teacher", tracer.parameters["transformer"], learns=False, transformer=True),
            Kept("discriminator", parameters, rows),
        )
        return Price(bills, kept)


class KeyLevelGAN:
    """Logistic loss between the teacher's latents at a key level and the student's at the same, no noise added (L_adv).

    An iteration is one step ``s_k -> s_{k+1}``, in turn from noise to clip: the student takes its latents from the queue of
    ``s_k`` (fresh noise at 1), its step is judged at ``s_{k+1}`` and put into the queue there, without gradient.

    Args:
        student: the network being trained; ``teacher``: frozen, whose features the heads read.
        heads: what learns to tell.
        queues: of the student's latents.
        levels: ``s_0`` to ``s_m``.
        weight: lambda_adv.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        heads: LevelHeads,
        queues: Queues,
        levels: tuple[float, ...],
        weight: float,
    ):
        self.student, self.teacher, self.heads = student, teacher, heads
        self.queues, self.levels, self.weight, self.step = queues, levels, weight, 0

    def prepare(self, batch: Batch, *, iteration: int, generator: Randomness, most: int) -> Batch:
        """Which step it is."""
        self.step = iteration % (len(self.levels) - 1)
        return batch

    def features(self, latents: Tensor, text: list[Tensor]) -> Float[Tensor, "b l d"]:
        """The head's input for latents ``(B, C, F, H, W)`` at the level that the step leads to; texts ``(L, D)``."""
        sigma = torch.full((len(latents),), self.levels[self.step + 1], device=latents.device)
        block = self.heads.blocks[self.step]
        return features_of(self.teacher, block, latents, sigma, stack_text(text, latents.device))

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """``lambda E softplus(-D_{k+1}(y))``, ``y`` the student's step; gradient passes through the teacher, not into it."""
        level, following = self.levels[self.step : self.step + 2]
        device, shape = self.queues.latents.device, self.queues.latents.shape[2:]
        if self.step:
            x, numbers = self.queues.take(self.step - 1, batch.places)
            text = self.queues.text(numbers)
        else:
            x = normal(torch.Size((len(batch.ids), *shape)), generator, device)
            numbers, text = [self.queues.number[clip] for clip in batch.ids], batch.text
        sigma = torch.full((len(x),), level, device=device)
        y = x + (following - level) * self.student.velocity(x, sigma, stack_text(text, device))
        self.queues.give(self.step, batch.places, y.detach(), numbers)
        with frozen(self.heads):
            fake = self.heads(self.features(y, text), self.step)
        return self.weight * generator_loss(fake), {"fake_logit": fake.detach().mean()}

    def judge_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """``E softplus(-D_{k+1}(teacher's)) + E softplus(D_{k+1}(student's))``, of what the student has just put there."""
        assert batch.path_BKCFHW is not None, "the batch holds no paths"
        made, numbers = self.queues.take(self.step, batch.places)
        passed = sent(batch.path_BKCFHW[:, self.step + 1], made.device).to(made)
        with torch.no_grad():
            features = self.features(torch.cat([passed, made]), [*batch.text, *self.queues.text(numbers)])
        real, fake = self.heads(features, self.step).chunk(2)
        logs = {"real_logit": real.detach().mean(), "fake_logit": fake.detach().mean()}
        return discriminator_loss(real, fake), logs | {"gap": logs["real_logit"] - logs["fake_logit"]}


def heads_calls(
    shapes: Shapes, blocks: Sequence[int], checkpointing: bool, dtype: torch.dtype
) -> tuple[Call, Call, int]:
    """A frozen transformer and a head on one noisy latent, forward and back to the latent; a head that learns; parameters of
    all heads.
    """
    attention, calls = shapes.transformer["num_attention_heads"], []
    width = attention * shapes.transformer["attention_head_dim"]
    steps = zip(shapes.latent[1:], shapes.transformer["patch_size"], strict=True)
    tokens = math.prod(side // step for side, step in steps)
    with fake():
        x, sigma = torch.empty(1, *shapes.latent, requires_grad=True), torch.full((1,), 0.5)
        text = torch.empty(1, TEXT_TOKENS, shapes.transformer["text_dim"])
        heads = LevelHeads(width, attention, blocks)
        learns = trace(heads.parameters(), partial(heads, torch.empty(1, tokens, width), 0), backward=True)
        parameters = sizes(heads)[0]
        heads.requires_grad_(False)
        for depth in (1, 2):
            network = build_transformer(shapes, depth).requires_grad_(False)
            if checkpointing:
                network.enable_gradient_checkpointing()
            denoiser = Denoiser(network, dtype)

            def look(denoiser: Denoiser = denoiser, block: int = depth - 1) -> Tensor:
                return heads(features_of(denoiser, block, x, sigma, text), 0)

            calls.append(trace(network.parameters(), look, backward=True))
    return calls[0].along(calls[1], max(blocks)), learns, parameters
