"""A relativistic discriminator on the trunk of the fake score (VDOT, arXiv 2512.06802; the loss: arXiv 1807.00734).

The fake score's features of noised latents, at the level and under the prompt that it is told, are read by small heads, which
alone learn. A clip need not be called real, only more so than the clip it is paired with, or less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer, build_transformer, judge_call
from mogan.costs.shapes import Shapes
from mogan.costs.trace import Call, fake, sizes, trace
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser, frozen, recomputed, taps
from mogan.models.discriminator import Heads
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness
from mogan.objectives.base import Base, wins_outright
from mogan.sampling.rollout import Rollout, normal
from mogan.schedule import add_noise, draw_sigma
from mogan.sharding import all_tokens, shard
from mogan.terms import LATENT, Lesson, Terms


@dataclass(frozen=True, kw_only=True)
class RelativisticConfig:
    """See :class:`Relativistic`.

    Attributes:
        taps: after which blocks of the fake score heads read.
        shift: of the levels that latents are noised to; ``low``, ``high``: least and largest.
        of: name of the objective whose fake score is the trunk.
    """

    taps: tuple[int, ...]
    shift: float
    low: float = 0.02
    high: float = 0.98
    of: str = "dmd"

    def terms(self, config: Config) -> Terms:
        """Real clips beside what the student makes of their captions."""
        if "fake_score" not in (config.terms(self.of).lessons if self.of in config.objectives else ()):
            raise ValueError(
                f"a relativistic discriminator reads a fake score, and the config has no {self.of!r} with one"
            )
        lesson = Lesson(clips=(LATENT,), captions=True)
        return Terms(
            lessons={"student": lesson, "critic": lesson},
            alarms=(wins_outright("lower its learning rate"),),
            controls=True,
        )

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The heads, on a trunk that is there already."""
        found = self.on_fake_score(base, others)
        critic = found.critic
        return Objective(found, {"student": found.student_loss, "critic": found.critic_loss}, {"critic": critic})

    def on_fake_score(self, base: Base, others: Mapping[str, Objective], outputs: int = 1) -> "Relativistic":
        """Heads of so many logits on the fake score of an objective that was built before.

        Raises:
            UserError: there is none to read, or not so deep.
        """
        if self.of not in others:
            raise UserError(f"the recipe builds its discriminator before {self.of}: name {self.of} first in objectives")
        trunk = others[self.of].judge.fake_score
        if trunk.transformer_2 is not None:
            raise UserError(
                f"{base.folder} has two experts, and heads read the features of one network: leave them out"
            )
        if max(self.taps) >= len(trunk.transformer.blocks):
            raise UserError(
                f"the recipe's heads read after block {max(self.taps)} and the fake score has "
                f"{len(trunk.transformer.blocks)}: lower taps"
            )
        if base.config.checkpointing:
            trunk.transformer.enable_gradient_checkpointing(recomputed)  # frozen or not as when it was called
        torch.manual_seed(base.config.seed)  # the heads start at random
        made = trunk.transformer.config
        width, attention = made.num_attention_heads * made.attention_head_dim, made.num_attention_heads
        critic = Heads(width, attention, len(self.taps), outputs)
        shard(critic, critic.heads, base.world, torch.float32)
        return Relativistic(trunk, critic.to(base.device).train(), self)

    def price(self, config: Config, tracer: Tracer, outputs: int = 1, shown: int = 2) -> Price:
        """The trunk on a real and a generated clip; the student's gradient passes through it, the heads learn beside it, from
        ``shown`` clips.
        """
        layers, forward = tracer.shapes.transformer["num_layers"], tracer.forward
        passes, _ = tracer.once(
            ("trunk", len(self.taps)),
            lambda: judge_call(
                tracer.shapes,
                layers,
                len(self.taps),
                tracer.shapes.latent[1],
                tracer.checkpointing,
                tracer.dtype,
                learns=False,
            ),
        )
        heads, parameters = tracer.once(
            ("token heads", len(self.taps), outputs), lambda: heads_call(tracer.shapes, len(self.taps), outputs)
        )
        again = forward.work.flops if config.checkpointing else 0.0
        bills = {
            "student": Bill((forward.freed(), passes), 3, again),
            "critic": Bill((*[forward.freed()] * shown, heads.times(shown).freed()), shown),
        }
        return Price(bills, (Kept("critic", parameters),))


class Relativistic:
    """``softplus(D(other) - D(own))``, of pairs that share a caption. Owns the heads.

    Args:
        trunk: the fake score, which does not learn here.
        critic: heads on its features.
        settings: taps and levels.
    """

    def __init__(self, trunk: Denoiser, critic: Heads, settings: RelativisticConfig):
        self.trunk, self.critic, self.settings = trunk, critic, settings

    def noised(self, x_BCFHW: Tensor, generator: Randomness) -> tuple[Tensor, Tensor]:
        """Latents noised to random levels, and the levels ``(B,)``."""
        s = self.settings
        sigma = sent(draw_sigma(len(x_BCFHW), generator, low=s.low, high=s.high, k=s.shift), x_BCFHW.device)
        return add_noise(x_BCFHW, normal(x_BCFHW.shape, generator, x_BCFHW.device), sigma), sigma

    def features(self, x_t: Tensor, sigma: Tensor, text_BLD: Tensor) -> list[Tensor]:
        """The trunk's features ``(B, L, D)``, a tap each, of noised latents ``(B, C, F, H, W)`` at levels ``(B,)``."""
        with frozen(self.trunk), taps(self.trunk.transformer.blocks, self.settings.taps) as found:
            out = self.trunk.velocity(x_t, sigma, text_BLD)
        # sharded weights outside the blocks are gathered again when a gradient of what the transformer returns arrives. They
        # cannot stay gathered, as those of a frozen trunk may (mogan.sharding.tapped): this one learns, elsewhere
        found[-1] = found[-1] + (0.0 * out.mean()).to(found[-1].dtype)
        return [all_tokens(features, self.trunk.transformer) for features in found]

    def _logits(self, rollout: Rollout, batch: Batch, generator: Randomness, grad: bool) -> tuple[Tensor, Tensor]:
        """Of the real clips and of the generated ones, at levels of their own."""
        assert batch.latent_BCFHW is not None, "the batch holds no real clips"
        fake = rollout.finished("a discriminator of clips")
        real = self.noised(sent(batch.latent_BCFHW, fake.device).to(fake), generator)
        made = self.noised(fake, generator)
        of_real, of_made = self.logits([real, made], rollout.text_BLD, grad)
        return of_real, of_made

    def logits(
        self, shown: Sequence[tuple[Tensor, Tensor]], text_BLD: Tensor, grad: bool, number: int = 0
    ) -> tuple[Tensor, ...]:
        """Of several ``(latents, levels)``, ``(B, C, F, H, W)`` and ``(B,)``, a logit ``(B,)`` each; gradient into the last."""
        read = []
        for place, (x_t, sigma) in enumerate(shown):
            with torch.set_grad_enabled(grad and place == len(shown) - 1):
                read.append(self.features(x_t, sigma, text_BLD))
        together = [torch.cat(features).float() for features in zip(*read, strict=True)]
        return self.critic(together, number).chunk(len(shown))

    def student_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``E softplus(D(real) - D(made))``; gradient passes through trunk and heads, not into them."""
        with frozen(self.critic):
            real, made = self._logits(rollout, batch, generator, True)
        return F.softplus(real - made).mean(), numbers(real, made)

    def critic_loss(self, rollout: Rollout, batch: Batch, generator: Randomness) -> Loss:
        """``E softplus(D(made) - D(real))``."""
        real, made = self._logits(rollout, batch, generator, False)
        return F.softplus(made - real).mean(), numbers(real, made)


def numbers(real_B: Tensor, made_B: Tensor) -> dict[str, Tensor]:
    """Means of logits, scalars, to log."""
    return {
        "real_logit": real_B.detach().mean(),
        "fake_logit": made_B.detach().mean(),
        "gap": (real_B - made_B).detach().mean(),
    }


def heads_call(shapes: Shapes, count: int, outputs: int = 1) -> tuple[Call, int]:
    """Heads on the features of one clip, forward and backward; their parameters."""
    with fake():
        made = build_transformer(shapes, 1).config
        width, _, frames, height, cross = made.num_attention_heads * made.attention_head_dim, *shapes.latent
        _, patch_h, patch_w = made.patch_size
        features = [torch.empty(1, frames * (height // patch_h) * (cross // patch_w), width) for _ in range(count)]
        critic = Heads(width, made.num_attention_heads, count, outputs)
        return trace(critic.parameters(), lambda: critic(features), backward=True), sizes(critic)[0]
