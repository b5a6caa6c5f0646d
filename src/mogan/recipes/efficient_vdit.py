"""Efficient-vDiT (arXiv 2502.06155): fewer steps, then fewer pairs of frames in attention, then what the mask lost learnt again."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.block_distillation import BlockDistillationConfig
from mogan.objectives.mcd import MCDConfig
from mogan.sampling.rollout import Euler
from mogan.schedule import shifted_levels


def efficient_vdit_mcd_lab() -> Config:
    """Stage 1, multi-step consistency distillation: the lab's teacher in three segments, each a step of the student.

    With ``--student`` it starts elsewhere, from a frame-sparse model too; the teacher is the base model, dense.
    """
    return Config(
        recipe="efficient_vdit_mcd_lab",
        sigmas=shifted_levels(3, 3.0),
        rollout=Euler(stop=3),
        plan=(Update(learns="student", by="mcd", batch=16),),
        optimizers={"student": Optimizer(lr=1e-4)},
        objectives={"mcd": MCDConfig(steps=24, shift=3.0, guidance=3.0, decay=0.98)},
        iterations=300,
        ema=0.98,
        save_every=50,
        sample_every=100,
    )


def efficient_vdit_mcd_wan_1_3b() -> Config:
    """Stage 1 on Wan2.1-T2V-1.3B: a fifth of the teacher's steps, as the paper has it. Learning rate, batch, shift, decay
    and the iteration from which the target lags are those of ``causal_cd_wan_1_3b``; the rest was chosen here, none tried at this size.
    """
    return Config(
        recipe="efficient_vdit_mcd_wan_1_3b",
        sigmas=shifted_levels(10, 5.0),
        rollout=Euler(stop=10),
        plan=(Update(learns="student", by="mcd", batch=64, accumulate=64),),
        optimizers={"student": Optimizer(lr=2e-6, weight_decay=0.01)},
        objectives={"mcd": MCDConfig(steps=50, shift=5.0, guidance=5.0, decay=0.99, since=200)},
        negative_prompt=WAN_NEGATIVE_PROMPT,
        iterations=2000,
        ema=0.99,
        checkpointing=True,
        save_every=100,
        sample_every=500,
    )


def efficient_vdit_kd_lab() -> Config:
    """Stage 3, knowledge distillation: ``--student`` is what `mogan tiles` made of stage 1's export, and learns from the same
    weights with dense attention.
    """
    return _from_dense(efficient_vdit_mcd_lab(), "efficient_vdit_kd_lab", iterations=200)


def efficient_vdit_kd_teacher_lab() -> Config:
    """The same of a teacher of many guided steps that `mogan tiles` made sparse, beside flow matching on real clips."""
    return _of_a_teacher(efficient_vdit_kd_lab(), "efficient_vdit_kd_teacher_lab", shift=3.0)


def efficient_vdit_kd_wan_1_3b() -> Config:
    """Stage 3 on Wan2.1-T2V-1.3B; every number chosen here, none tried at this size."""
    base = efficient_vdit_mcd_wan_1_3b()
    config = _from_dense(base, "efficient_vdit_kd_wan_1_3b", iterations=2000)
    return replace(config, optimizers={"student": Optimizer(lr=1e-5, weight_decay=0.01)})


def efficient_vdit_kd_teacher_wan_1_3b() -> Config:
    """Wan2.1-T2V-1.3B made sparse, at all levels; every number chosen here, none tried at this size."""
    return _of_a_teacher(efficient_vdit_kd_wan_1_3b(), "efficient_vdit_kd_teacher_wan_1_3b", shift=5.0)


def _from_dense(few: Config, name: str, iterations: int) -> Config:
    """Stage 3 for the student of a stage 1."""
    return replace(
        few,
        recipe=name,
        post_trains=True,
        plan=tuple(replace(update, by="kd") for update in few.plan),
        objectives={"kd": BlockDistillationConfig(weight=1.0)},
        iterations=iterations,
    )


def _of_a_teacher(few: Config, name: str, shift: float) -> Config:
    """Stage 3 for a teacher, which has many steps and its own text."""
    return replace(
        few,
        recipe=name,
        post_trains=False,
        sigmas=shifted_levels(50, shift),
        rollout=None,
        objectives={"kd": BlockDistillationConfig(weight=1.0, shift=shift, drop_text=0.1)},
    )
