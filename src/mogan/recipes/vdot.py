"""VDOT (arXiv 2512.06802): distribution matching with optimal transport, and a relativistic discriminator in turn with it."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.objectives.ot import TransportConfig
from mogan.objectives.relativistic import RelativisticConfig
from mogan.recipes.dmd import dmd2_wan_1_3b, dmd_lab

RHO = 0.8  # the released code: 0.8 of transport, 0.2 of DMD
# weight of the adversarial loss in the released code. Its updates have Adam moments of their own here, which no weight of a
# loss moves, so it weighs their learning rate (as MOTION_WEIGHT of mogan_lab)
ADVERSARIAL = 0.1


def vdot_lab() -> Config:
    """The lab's 3-step student from its teacher, as in ``dmd_lab``; of 400 updates every second one is the discriminator's."""
    base = dmd_lab()
    plan = (
        Update(learns="student", by="dmd", batch=16, every=2),
        Update(learns="student", by="relativistic", batch=16, optimizer="student_adversarial", start=1, every=2),
        Update(learns="fake_score", by="dmd", times=4, batch=16),
        Update(learns="critic", by="relativistic", batch=16, start=1, every=2),
    )
    return _vdot(
        base, "vdot_lab", plan, TransportConfig(rho=RHO, eps=0.5), RelativisticConfig(taps=(3, 4, 5), shift=3.0)
    )


def vdot_wan_1_3b() -> Config:
    """VDOT on Wan2.1-T2V-1.3B, or with conditions on Wan2.1-VACE-1.3B; steps, levels and learning rates of ``dmd2_wan_1_3b``.

    The paper distils VACE of 14 B in four steps (Adam, lr 2e-6, of the critic 4e-7, a student's update every fifth, batch 1 on 4
    GPUs, 1500 and 1200 steps) from a student that somebody else had accelerated.
    """
    base = dmd2_wan_1_3b()
    plan = (
        Update(learns="student", by="dmd", every=2, batch=64, accumulate=64),
        Update(
            learns="student",
            by="relativistic",
            optimizer="student_adversarial",
            start=1,
            every=2,
            batch=64,
            accumulate=64,
        ),
        Update(learns="fake_score", by="dmd", times=5, batch=64, accumulate=64),
        Update(learns="critic", by="relativistic", start=1, every=2, batch=64, accumulate=64),
    )
    transport = TransportConfig(rho=RHO, eps=0.5)  # the released code: 0.1, which 60 iterations leave unsolved
    # released code: blocks 23, 31 and 39 of 40, shift 12
    config = _vdot(base, "vdot_wan_1_3b", plan, transport, RelativisticConfig(taps=(17, 23, 29), shift=12.0))
    return replace(config, iterations=400)  # as many updates by distribution matching as dmd2_wan_1_3b has


def _vdot(base: Config, name: str, plan: tuple, transport: TransportConfig, critic: RelativisticConfig) -> Config:
    student: Optimizer = base.optimizers["student"]
    optimizers = base.optimizers | {
        "student_adversarial": replace(student, lr=ADVERSARIAL * student.lr),
        "critic": base.optimizers["fake_score"],
    }
    config = replace(
        base, recipe=name, plan=plan, optimizers=optimizers, objectives=base.objectives | {"relativistic": critic}
    )
    return config.changed("dmd", transport=transport)
