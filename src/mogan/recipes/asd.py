"""Adversarial self-distillation and First-Frame Enhancement (arXiv 2511.01419): one causal student for 1 to 4 steps."""

from dataclasses import replace

from mogan.config import Config, Update
from mogan.objectives.asd import ASDConfig
from mogan.objectives.relativistic import RelativisticConfig
from mogan.recipes.self_forcing import self_forcing_lab, self_forcing_wan_1_3b
from mogan.sampling.causal_rollout import Chunked
from mogan.schedule import shifted_levels

ALPHA = 0.1  # not recoverable from the paper; to be searched between 0.03 and 0.3


def asd_lab() -> Config:
    """A latent frame at a time, the first in all four steps; name a ``self_forcing_lab`` student with ``--student``."""
    critic = RelativisticConfig(taps=(3, 4, 5), shift=3.0)  # as vdot_lab
    return _asd(replace(self_forcing_lab(), sigmas=shifted_levels(4, 3.0)), "asd_lab", critic)


def asd_wan_1_3b() -> Config:
    """Chunks of three latents of Wan2.1-T2V-1.3B, whose levels, rates and updates are ``self_forcing_wan_1_3b``'s: the paper
    gives none but a schedule of four levels. Name a Self-Forcing student with ``--student``.
    """
    critic = RelativisticConfig(taps=(17, 23, 29), shift=5.0)  # as vdot_wan_1_3b; the shift is the student's
    return _asd(self_forcing_wan_1_3b(), "asd_wan_1_3b", critic)


def _asd(base: Config, name: str, critic: RelativisticConfig) -> Config:
    causal = replace(base.causal, first_sigmas=base.sigmas)  # FFE: the first chunk in all steps
    counts = tuple(range(1, len(base.sigmas) + 1))
    student, fake_score = base.plan
    plan = (
        replace(student, by="dmd+asd"),
        fake_score,
        # of all steps there is nothing for it to compare
        Update(
            learns="critic",
            by="asd",
            batch=student.batch,
            accumulate=student.accumulate,
            rollout=Chunked(causal, counts[:-1]),
        ),
    )
    return replace(
        base,
        recipe=name,
        rollout=Chunked(causal, counts),
        plan=plan,
        optimizers=base.optimizers | {"critic": base.optimizers["fake_score"]},
        objectives=base.objectives | {"asd": ASDConfig(critic=critic, weight=ALPHA)},
    )
