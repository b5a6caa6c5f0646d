"""What the student makes while it is trained: its own steps, gradient through one of them.

Kinds of rollout answer three questions (:class:`mogan.config.RolloutKind`): which step is judged, what has been made up to
there, and how many steps that takes. :class:`FewStep` is the rule that DMD students are trained and shipped with (diffusers'
``FlowMatchLCMScheduler``): predict the clean latent, then noise it afresh to the next level. :class:`Euler` follows the
student's flow to a level above 0 and hands over what lies there. :class:`Intervals` follows it in one of several numbers of
steps and hands over what lies at the end of one of them, to be judged within that step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mogan.config import EULER, LCM
from mogan.devices import sent
from mogan.errors import UserError
from mogan.models.conditions import conditioned
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.schedule import add_noise, levels_of


@dataclass(frozen=True)
class Rollout:
    """What the student made and how it came about.

    Attributes:
        sample_BCFHW: the sample; carries gradient if asked for.
        exit_step: index of the step after which the rollout stopped.
        text_BLD: the condition it was made under.
        level: noise level at which the sample lies; 0: it is clean.
        interval: levels between which it may be judged; whoever judges noises it to one of them.
        clean_BCFHW: the clean latent that the judged step predicted, detached; ``None``: it is the sample.
        toward: the level that a fake score is told which is told; ``None``: nothing.
        count: in how many steps it is made, where that is drawn; else 0.
    """

    sample_BCFHW: Float[Tensor, "b c f h w"]
    exit_step: int
    text_BLD: Float[Tensor, "b l d"]
    level: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    clean_BCFHW: Float[Tensor, "b c f h w"] | None = None
    toward: float | None = None
    count: int = 0

    def finished(self, who: str) -> Float[Tensor, "b c f h w"]:
        """The sample, for objectives that judge clean clips only.

        Raises:
            UserError: it lies above level 0.
        """
        if self.level:
            raise UserError(
                f"{who} judges clean clips, and a rollout of this recipe stops at level {self.level:.4g}: leave {who} out "
                "of the updates with that rollout"
            )
        return self.sample_BCFHW

    @property
    def guess_BCFHW(self) -> Float[Tensor, "b c f h w"]:
        """The clean latent that the student predicted, detached."""
        return self.sample_BCFHW.detach() if self.clean_BCFHW is None else self.clean_BCFHW


@dataclass(frozen=True)
class FewStep:
    """Fresh noise between steps, stopped after a step drawn uniformly, whose clean prediction is the sample."""

    solver: ClassVar[str] = LCM

    def draw(self, sigmas: tuple[float, ...], generator: torch.Generator) -> int:
        """The step that is judged: uniform over the student's steps."""
        return int(torch.randint(len(sigmas), (1,), generator=generator))

    def steps(self, sigmas: tuple[float, ...]) -> float:
        """Steps before it, a mean."""
        return (len(sigmas) - 1) / 2

    def make(
        self,
        student: Denoiser,
        noise: Tensor,
        text: Tensor,
        sigmas: tuple[float, ...],
        generator: torch.Generator | list[torch.Generator],
        step: int,
        grad: bool,
    ) -> Rollout:
        """:func:`roll_out` from noise ``(B, C, F, H, W)`` for texts ``(B, L, D)``."""
        return roll_out(student, noise, text, sigmas, generator, exit_step=step, grad=grad)


@dataclass(frozen=True)
class Euler:
    """Euler steps along the student's flow, no noise between them, to the level of step ``stop``; gradient through the last.

    A sample at a level above 0 can be judged only after more noise (Phased DMD, arXiv 2510.27684): at levels from ``gap`` above
    its own to 1. ``stop`` equal to the number of steps is the clean clip.

    With ``since`` the last step is one drawn from number ``since`` on, which goes straight to the level of ``stop``.
    """

    stop: int
    since: int | None = None
    gap: float = 0.02
    solver: ClassVar[str] = EULER

    def draw(self, sigmas: tuple[float, ...], generator: torch.Generator) -> int:
        """The last step; only with ``since`` is anything drawn."""
        if self.since is None:
            return self.stop - 1
        return int(torch.randint(self.since, self.stop, (1,), generator=generator))

    def steps(self, sigmas: tuple[float, ...]) -> float:
        """Steps before the last, a mean. Raises ValueError if the student has not so many."""
        first = self.stop - 1 if self.since is None else self.since
        if not 0 <= first < self.stop <= len(sigmas):
            raise ValueError(
                f"rollout: a student of {len(sigmas)} steps cannot stop after {self.stop}, its last one from {first} on"
            )
        return (first + self.stop - 1) / 2

    def make(
        self,
        student: Denoiser,
        noise: Tensor,
        text: Tensor,
        sigmas: tuple[float, ...],
        generator: torch.Generator | list[torch.Generator],
        step: int,
        grad: bool,
    ) -> Rollout:
        """The sample at level ``(*sigmas, 0)[stop]`` from noise ``(B, C, F, H, W)``; ``generator`` is not used."""
        end = (*sigmas, 0.0)[self.stop]
        x, clean = follow(student, noise, text, (*sigmas[: step + 1], end), grad)
        return Rollout(x, step, text, end, (end + self.gap, 1.0) if end else (0.0, 1.0), clean)


@dataclass(frozen=True)
class Intervals:
    """The student's own deterministic trajectory in one of several numbers of steps (TDM, arXiv 2503.06674).

    A number of steps is drawn, then one of them. The sample at its lower end is judged only between its two levels: the
    intervals of a trajectory are disjoint.

    With ``told`` the student gets the end of each step as input. The fake score must know the number of steps, since a level
    in the interval of one step lies in intervals of others, too. Its input is the end of the first step, which differs for
    each number.

    Attributes:
        counts: numbers of steps; their levels are :func:`mogan.schedule.levels_of` the student's.
        low_gap: margin above an interval's lower end, where the target diverges; none at 0.
        high_gap: margin below its upper end; none at 1.
        told: student and fake score are conditioned (see :mod:`mogan.models.step_condition`); else one serves all numbers.
    """

    counts: tuple[int, ...]
    low_gap: float = 0.02
    high_gap: float = 0.01
    told: bool = True
    solver: ClassVar[str] = EULER

    def draw(self, sigmas: tuple[float, ...], generator: torch.Generator) -> int:
        """A number of steps, then a step of it, each uniformly: the place in :meth:`stages`."""
        number = int(torch.randint(len(self.counts), (1,), generator=generator))
        return sum(self.counts[:number]) + int(torch.randint(self.counts[number], (1,), generator=generator))

    def steps(self, sigmas: tuple[float, ...]) -> float:
        """Steps before the drawn one, a mean. Raises ValueError for counts that the levels do not divide into."""
        if any(count < 1 or len(sigmas) % count for count in self.counts) or len(sigmas) not in self.counts:
            raise ValueError(
                f"rollout: counts {self.counts} must each divide the student's {len(sigmas)} levels, the largest be all of them"
            )
        for levels, step in self.stages(sigmas):
            low, high = self._interval(levels, step)
            if low >= high:
                raise ValueError(
                    f"rollout: between {levels[step + 1]:.4g} and {levels[step]:.4g} the gaps {self.low_gap} and "
                    f"{self.high_gap} leave no level to judge at: take fewer steps or smaller gaps"
                )
        return sum((count - 1) / 2 for count in self.counts) / len(self.counts)

    def stages(self, sigmas: tuple[float, ...]) -> list[tuple[tuple[float, ...], int]]:
        """Every step that can be drawn: the levels of its trajectory, final 0 included, and its number."""
        grids = {count: (*levels_of(sigmas, count), 0.0) for count in self.counts}
        return [(grids[count], step) for count in self.counts for step in range(count)]

    def _interval(self, levels: Sequence[float], step: int) -> tuple[float, float]:
        high, low = levels[step], levels[step + 1]
        return low + self.low_gap if low else 0.0, high - self.high_gap if step else 1.0

    def make(
        self,
        student: Denoiser,
        noise: Tensor,
        text: Tensor,
        sigmas: tuple[float, ...],
        generator: torch.Generator | list[torch.Generator],
        step: int,
        grad: bool,
    ) -> Rollout:
        """The sample at the end of a step of :meth:`stages`, from noise ``(B, C, F, H, W)``; ``generator`` is not used."""
        levels, number = self.stages(sigmas)[step]
        x, clean = follow(student, noise, text, levels[: number + 2], grad, self.told)
        toward = levels[1] if self.told else None
        return Rollout(x, number, text, levels[number + 1], self._interval(levels, number), clean, toward)


def follow(
    student: Denoiser,
    noise_BCFHW: Tensor,
    text_BLD: Tensor,
    levels: Sequence[float],
    grad: bool = False,
    told: bool = False,
) -> tuple[Tensor, Tensor]:
    """Euler steps along the student's flow from one of ``levels`` to the next, gradient through the last alone.

    With ``told`` the student is told where each step ends.

    Returns the latent at the last level and the clean latent that the last step predicted, detached: ``(B, C, F, H, W)`` each.
    """
    x, last = noise_BCFHW, len(levels) - 2
    clean = x
    for number, (level, following) in enumerate(pairwise(levels)):
        with torch.set_grad_enabled(grad and number == last):
            ends = {"to": following} if told else {}
            velocity = student.velocity(x, torch.full((len(x),), level, device=x.device), text_BLD, **ends)
            clean = (x - level * velocity).detach()
            x = x + (following - level) * velocity
    return x, clean


def roll_out(
    student: Denoiser,
    noise_BCFHW: Float[Tensor, "b c f h w"],
    text_BLD: Float[Tensor, "b l d"],
    sigmas: tuple[float, ...],
    generator: torch.Generator | list[torch.Generator],
    *,
    exit_step: int | None = None,
    grad: bool = False,
) -> Rollout:
    """Sample with the student's levels, as at inference, and stop after ``exit_step`` (the last one by default).

    This is DMD2's backward simulation: only the exit step carries gradient, and what it receives is the student's own
    noisy sample rather than a noised real one.

    Args:
        student: the few-step generator.
        noise_BCFHW: starting noise, at level ``sigmas[0] = 1``.
        text_BLD: from :func:`mogan.models.attention.stack_text`.
        sigmas: descending levels, final 0 implied.
        generator: draws the fresh noise between steps; one for the batch, or one per sample (then a sample does not
            depend on its neighbours).
        exit_step: which step's prediction is returned.
        grad: let gradient flow through the exit step.
    """
    exit_step = len(sigmas) - 1 if exit_step is None else exit_step
    x = noise_BCFHW
    for step in range(exit_step + 1):
        sigma = torch.full((x.shape[0],), sigmas[step], device=x.device)
        with torch.set_grad_enabled(grad and step == exit_step):
            x0 = student(x, sigma, text_BLD)
        if step == exit_step:
            break
        level = torch.full((x.shape[0],), sigmas[step + 1], device=x.device)
        x = add_noise(x0, normal(x0.shape, generator, x0.device), level)
    return Rollout(x0, exit_step, text_BLD)


@torch.no_grad()
def animate(
    denoiser: Denoiser,
    noise_BCFHW: Float[Tensor, "b c f h w"],
    given_BCFHW: Float[Tensor, "b c g h w"],
    text_BLD: Float[Tensor, "b l d"],
    null_1LD: Tensor,
    sigmas: tuple[float, ...],
    guidance: float,
) -> Float[Tensor, "b c f h w"]:
    """Image to video by Euler steps: the first latent frames are given, and stay clean at level 0 throughout.

    That is how Wan 2.2's TI2V model is conditioned (diffusers: ``expand_timesteps``). ``sigmas`` descend from 1, final 0
    implied; guidance as in :func:`mogan.models.denoiser.guided_velocity`.
    """
    x, told = noise_BCFHW, conditioned(text_BLD, given_BCFHW)
    for level, following in pairwise((*sigmas, 0.0)):
        sigma = torch.full((len(x),), level, device=x.device)
        x = x + (following - level) * guided_velocity(denoiser, x, sigma, told, null_1LD, guidance)
    return torch.cat([given_BCFHW, x[:, :, given_BCFHW.shape[2] :]], 2)


def normal(shape: torch.Size, generator: torch.Generator | list[torch.Generator], device) -> Tensor:
    """Standard normal noise of a shape ``(B, ...)``; with a list of generators, sample ``i`` of the batch comes from generator ``i``."""
    if isinstance(generator, list):
        rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device) for g in generator]
        return sent(torch.cat(rows), device)
    return sent(torch.randn(shape, generator=generator, device=generator.device), device)
