"""Knowledge distillation of a frame-sparse student, block by block: the third stage of Efficient-vDiT (arXiv 2502.06155)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogan.config import Config
from mogan.costs.calls import Tracer
from mogan.costs.trace import Call, Work
from mogan.data.batches import Batch
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser
from mogan.models.frame_sparse import mask_of
from mogan.objectives import Bill, Kept, Loss, Objective, Price, Randomness
from mogan.objectives.base import Base
from mogan.objectives.flow_matching import OF_CLIPS, stack_some
from mogan.sampling.rollout import normal
from mogan.schedule import add_noise, draw_sigma, uniform
from mogan.terms import Terms


@dataclass(frozen=True, kw_only=True)
class BlockDistillationConfig:
    """Distillation of the dense model that the student was made of; see :class:`BlockDistillation`.

    Attributes:
        weight: of the blocks' errors, beside the velocity's.
        shift: of the drawn levels, at which real clips say what the velocity is (flow matching). ``None``: the student's own
            levels, at which the dense model says it: few steps are another velocity than that of flow matching.
        drop_text: probability with which a clip is trained without its prompt, for guidance; with ``shift`` alone.
    """

    weight: float
    shift: float | None = None
    drop_text: float = 0.0

    def terms(self, config: Config) -> Terms:
        """The student learns from clips and their captions."""
        if config.given or config.told:
            raise ValueError(
                "a distilled student makes whole clips and is told nothing but their level: leave out given, and a rollout that tells"
            )
        return Terms(lessons={"student": OF_CLIPS})

    def build(self, base: Base, others: Mapping[str, Objective]) -> Objective:
        """The start once more, frozen and dense. Raises UserError for a start that is dense, or sampled in another way."""
        config, student = base.config, base.student
        if len(student.experts) > 1:
            raise UserError(f"{base.start} holds two transformers, and {config.recipe} distils one: take another model")
        if mask_of(student.transformer) is None:
            raise UserError(
                f"{base.start} attends densely, and {config.recipe} makes good what a mask has cost: name a model that `mogan tiles` "
                "made with --student"
            )
        if base.adapters_of is not None:
            raise UserError(
                f"{config.recipe} distils the model that it starts from: name an export of {base.adapters_of}"
            )
        if config.compile:
            raise UserError(f"{config.recipe} looks into blocks, which --compile leaves no way to: leave it out")
        own = wan.defaults(base.start)
        if (own.sigmas is not None) and own.solver != config.solver:
            raise UserError(
                f"{base.start} samples by {own.solver} and {config.recipe} trains a student that samples by {config.solver}: take a "
                "recipe with the student's own rollout"
            )
        teacher = Denoiser(base.frozen(base.start, "transformer"), base.dtype)
        (null,) = base.encode([""])
        found = BlockDistillation(student, teacher, null, config.sigmas, self)
        return Objective(found, {"student": found.student_loss}, frozen=(teacher.transformer,))

    def price(self, config: Config, tracer: Tracer) -> Price:
        """The dense model, then the student, trained; what attention and MLP of every block gave stays of both."""
        forward, train = tracer.student
        sizes = tracer.shapes.transformer
        tokens = math.prod(tracer.shapes.latent[1:]) // math.prod(sizes["patch_size"])
        wide = sizes["num_attention_heads"] * sizes["attention_head_dim"]
        kept = 2.0 * sizes["num_layers"] * tokens * wide * tracer.dtype.itemsize
        looks = Call(tracer.forward.work, kept, tracer.forward.peak + kept, tracer.forward.copies)
        more = Call(Work(), kept if config.checkpointing else 0.0, kept)  # else it is held for the backward pass anyway
        bill = Bill((looks, more, train), 3, forward.work.flops if config.checkpointing else 0.0)
        teacher = Kept("teacher", tracer.parameters["transformer"], learns=False, transformer=True)
        return Price({"student": bill}, (teacher,))


@dataclass(eq=False)
class BlockDistillation:
    """``E ||v - u||^2 + w E mean_b (|a_b - a'_b|^2 / |a'_b|^2 + |m_b - m'_b|^2 / |m'_b|^2)``, ``a_b`` and ``m_b`` what attention and
    MLP of block ``b`` give in the student, ``a'_b`` and ``m'_b`` in the dense model, on the same noised clip.

    ``u`` is ``noise - x0`` or the dense model's own velocity, see :class:`BlockDistillationConfig`. A block's error is a share of
    what the dense block gives, as in the search for the mask.

    Attributes:
        student: the network being trained, frame-sparse; ``teacher``: the frozen dense one.
        null: embedding ``(L, D)`` of the empty prompt.
        sigmas: the student's levels.
        settings: weight, levels.
    """

    student: Denoiser
    teacher: Denoiser
    null: Tensor
    sigmas: tuple[float, ...]
    settings: BlockDistillationConfig

    def student_loss(self, rollout: None, batch: Batch, generator: Randomness) -> Loss:
        """The loss on the batch's clips; ``rollout`` is not used."""
        assert batch.latent_BCFHW is not None, "distillation needs clips, not only prompts"
        device, shift = next(self.student.parameters()).device, self.settings.shift
        x0 = sent(batch.latent_BCFHW, device)
        if shift is None:
            step = (uniform(len(x0), generator) * len(self.sigmas)).long()
            sigma, text = sent(torch.tensor(self.sigmas)[step], device), stack_text(batch.text, device)
        else:
            sigma = sent(draw_sigma(len(x0), generator, k=shift), device)
            text = stack_some(batch.text, self.null, self.settings.drop_text, generator, device)
        noise = normal(x0.shape, generator, device)
        x = add_noise(x0, noise, sigma)
        with torch.no_grad(), inside(self.teacher.transformer) as meant:
            dense = self.teacher.velocity(x, sigma, text)
        with inside(self.student.transformer) as found:
            velocity = self.student.velocity(x, sigma, text)
        blocks = 2 * torch.stack([share(ours, theirs) for ours, theirs in zip(found, meant, strict=True)]).mean()
        error = (velocity - (dense if shift is None else noise - x0)).square().mean()
        return error + self.settings.weight * blocks, {"blocks": blocks.detach(), "velocity": error.detach()}


def share(found: Tensor, meant: Tensor) -> Tensor:
    """Squared error over the square of the target, both ``(B, ...)``; the mean over clips, a scalar."""
    wrong, whole = (x.float().square().flatten(1).sum(1) for x in (found - meant, meant))
    return (wrong / whole.clamp(min=1e-12)).mean()


@contextmanager
def inside(transformer: Any) -> Iterator[list[Tensor]]:
    """Collect outputs ``(B, L, D)`` of attention and MLP, block by block, of calls within the ``with`` block."""
    found: list[Tensor] = []
    modules = [module for block in transformer.blocks for module in (block.attn1, block.ffn)]
    handles = [module.register_forward_hook(lambda module, args, out: found.append(out)) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
