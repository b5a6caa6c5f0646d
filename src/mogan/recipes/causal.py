"""From a model that sees whole clips to a few-step causal student (Causal Forcing, arXiv 2602.02214): where Self-Forcing starts."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.models.causal_cache import Causal
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.consistency import ConsistencyConfig
from mogan.objectives.ode_regression import ODERegressionConfig
from mogan.objectives.teacher_forcing import TeacherForcingConfig
from mogan.sampling.causal_rollout import Chunked
from mogan.schedule import shifted_levels

ODE = Update(learns="student", by="ode_regression", batch=16)


def causal_teacher_lab() -> Config:
    """The lab's teacher learns to see the past alone, a latent frame at a time."""
    return Config(
        recipe="causal_teacher_lab",
        sigmas=shifted_levels(50, 3.0),
        rollout=Chunked(Causal(first=1, rest=1)),
        plan=(Update(learns="student", by="teacher_forcing", batch=16),),
        optimizers={"student": Optimizer(lr=3e-4)},
        objectives={"teacher_forcing": TeacherForcingConfig(shift=3.0)},
        iterations=200,
        ema=0.98,
        save_every=50,
        sample_every=200,
    )


def causal_cd_lab() -> Config:
    """The lab's causal teacher, named with ``--student``, becomes a student of three steps."""
    return Config(
        recipe="causal_cd_lab",
        sigmas=shifted_levels(3, 3.0),
        rollout=Chunked(Causal(first=1, rest=1)),
        plan=(Update(learns="student", by="consistency", batch=16),),
        optimizers={"student": Optimizer(lr=1e-4)},
        objectives={"consistency": ConsistencyConfig(steps=24, shift=3.0, guidance=3.0, decay=0.98)},
        iterations=300,
        ema=0.98,
        save_every=50,
        sample_every=100,
    )


def causal_ode_lab() -> Config:
    """The lab's student from its teacher's paths: ``mogan trajectories --steps 48 --keep 0,16,32,48``, guidance and shift 3.

    To compare with ``causal_cd_lab``, whose batch, rate and iterations it has. It starts from the teacher's weights.
    """
    return replace(
        causal_cd_lab(), recipe="causal_ode_lab", plan=(ODE,), objectives={"ode_regression": ODERegressionConfig()}
    )


def causal_teacher_wan_1_3b() -> Config:
    """Teacher forcing of Wan2.1-T2V-1.3B in chunks of three latents; numbers are the released config's, none tried at this size."""
    return Config(
        recipe="causal_teacher_wan_1_3b",
        sigmas=shifted_levels(50, 5.0),
        rollout=Chunked(Causal(first=3, rest=3)),
        plan=(Update(learns="student", by="teacher_forcing", batch=64, accumulate=64),),  # the batch: chosen
        optimizers={"student": Optimizer(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)},
        objectives={"teacher_forcing": TeacherForcingConfig(shift=5.0)},
        iterations=2000,  # at least; "5-10K better"
        ema=0.99,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=100,
        sample_every=500,
    )


def causal_cd_wan_1_3b() -> Config:
    """Consistency distillation of ``causal_teacher_wan_1_3b``'s export; numbers are the released config's, none tried at this size."""
    return Config(
        recipe="causal_cd_wan_1_3b",
        sigmas=shifted_levels(4, 5.0),
        rollout=Chunked(Causal(first=3, rest=3)),
        plan=(Update(learns="student", by="consistency", batch=64, accumulate=64),),  # the batch: chosen
        optimizers={"student": Optimizer(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)},
        objectives={"consistency": ConsistencyConfig(steps=48, shift=5.0, guidance=3.0, decay=0.99, since=200)},
        iterations=3000,
        ema=0.99,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=100,
        sample_every=500,
    )


def causal_ode_wan_1_3b() -> Config:
    """Regression of Wan2.1-T2V-1.3B on ``mogan trajectories --steps 48 --guidance 6 --shift 5 --keep 0,12,24,36,48``.

    Rate, betas and updates are CausVid's. Levels are those of ``self_forcing_wan_1_3b``, which goes on from it; Self-Forcing's own
    paths have shift 8, so its student begins at other levels than it is trained at afterwards. None tried at this size.
    """
    return replace(
        causal_cd_wan_1_3b(),
        recipe="causal_ode_wan_1_3b",
        plan=(replace(ODE, batch=64, accumulate=64),),  # the batch: chosen
        optimizers={"student": Optimizer(lr=2e-6, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0)},
        objectives={"ode_regression": ODERegressionConfig()},
    )
