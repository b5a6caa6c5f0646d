"""Phased DMD (arXiv 2510.27684): phases of the noise range, an expert each, each judged within its own part of the range."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.dmd import DMDConfig
from mogan.sampling.rollout import Euler
from mogan.schedule import shifted_levels


def phases(batch: int, accumulate: int, times: int, length: int) -> tuple[Update, ...]:
    """The paper's order: the high phase for ``length`` iterations, then the low one, whose rollouts pass the first expert."""
    high = Update(learns="student", by="high", batch=batch, accumulate=accumulate, rollout=Euler(stop=2), stop=length)
    low = replace(high, by="low", rollout=Euler(stop=4), start=length, stop=None)
    return (
        high,
        replace(high, learns="fake_score", times=times),
        low,
        replace(low, learns="fake_score_low", times=times),
    )


def alternating(config: Config) -> Config:
    """The order of the group's public trainer: the two phases in turn, and in each a last step drawn from its own."""

    def turned(update: Update) -> Update:
        high = update.by == "high"
        kind = Euler(stop=2, since=0) if high else Euler(stop=4, since=2)
        return replace(update, rollout=kind, start=0 if high else 1, stop=None, every=2)

    return replace(config, plan=tuple(turned(update) for update in config.plan))


def phased_lab() -> Config:
    """Two phases of two steps on the lab's teacher; learning rates and guidance are ``dmd_lab``'s."""
    dmd = DMDConfig(guidance=3.0, shift=3.0, stable=True)
    fake = Optimizer(lr=2e-4, betas=(0.0, 0.999))
    return Config(
        recipe="phased_lab",
        sigmas=shifted_levels(4, 3.0),  # 1, .9 | .75, .5
        boundary=0.825,
        rollout=Euler(stop=4),
        plan=phases(16, 1, 4, 200),
        optimizers={"student": Optimizer(lr=1e-4, betas=(0.0, 0.999)), "fake_score": fake, "fake_score_low": fake},
        objectives={"high": dmd, "low": replace(dmd, fake_score="fake_score_low")},
        iterations=400,
        ema=0.98,
        save_every=25,
        sample_every=100,
    )


def phased_alternating_lab() -> Config:
    """``phased_lab`` in the public trainer's order."""
    return replace(alternating(phased_lab()), recipe="phased_alternating_lab")


def phased_wan_1_3b() -> Config:
    """Two phases of two steps on Wan2.1-T2V-1.3B, at the paper's levels for Wan (1000/938/833/625).

    The paper trains LoRA of rank 64 at 5e-5 (``--lora 64 --lr 5e-5``) beside fully trained fake scores at 4e-7; all weights
    learn at the public trainer's 2e-6. How long a phase is trained the paper does not say, its trainer has 1000 updates.
    """
    dmd = DMDConfig(guidance=5.0, shift=5.0, stable=True)  # guidance: the public trainer's for 1.3B
    fake = Optimizer(lr=4e-7, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)
    student = Optimizer(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)
    return Config(
        recipe="phased_wan_1_3b",
        sigmas=shifted_levels(4, 5.0),
        boundary=0.885,
        rollout=Euler(stop=4),
        plan=phases(64, 64, 5, 500),  # batch and 5 to 1: the paper
        optimizers={"student": student, "fake_score": fake, "fake_score_low": fake},
        objectives={"high": dmd, "low": replace(dmd, fake_score="fake_score_low")},
        iterations=1000,
        ema=0.98,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=50,
        sample_every=100,
    )


def phased_wan_a14b() -> Config:
    """Two phases on Wan2.2-T2V-A14B, whose two experts are the two phases' starts; levels and guidance are the trainer's.

    The high phase is compared above the boundary of the base model, the low one below it, so that each fake score is one
    transformer and not two: the public trainer adds a third fake score for the low phase's upper levels.
    """
    config = phased_wan_1_3b()
    dmd = DMDConfig(guidance=4.0, shift=7.0, stable=True)
    return replace(
        config,
        recipe="phased_wan_a14b",
        sigmas=shifted_levels(4, 7.0),  # 1, .955 | .875, .7
        boundary=0.9,
        objectives={
            "high": replace(dmd, low=0.9),
            "low": replace(dmd, high=0.87, fake_score="fake_score_low"),
        },
    )
