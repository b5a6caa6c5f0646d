"""MoGAN (arXiv 2511.21592), its ablations, MoGAN through a surrogate, and MoGAN on a causal student."""

from collections.abc import Callable
from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.errors import UserError
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.dmd import DMDConfig
from mogan.objectives.gan import GANConfig
from mogan.objectives.surrogate import SurrogateConfig
from mogan.recipes.dmd import first_frame_given
from mogan.recipes.self_forcing import self_forcing_lab, self_forcing_wan_1_3b
from mogan.schedule import shifted_levels

ABLATIONS = ("no-dmd", "no-r1r2", "latent-gan")
# lambda_1, 5.1: what a motion update weighs against one of DMD. In one Adam for both it would do so only as far as their
# gradients' norms let it, whose ratio grows a hundredfold within a run (benchmarks/balance.py, docs/methods/mogan.md). Each
# update has moments of its own, which no weight of a loss moves, so this weighs the learning rate too.
MOTION_WEIGHT = 0.5


def mogan_lab() -> Config:
    """MoGAN on the lab's student: 3 of 5 latent frames, 4 of 6 blocks, minutes on two cores."""
    return Config(
        recipe="mogan_lab",
        post_trains=True,
        sigmas=shifted_levels(3, 3.0),
        plan=(  # appendix B
            Update(learns="student", by="dmd", batch=8),
            Update(learns="fake_score", by="dmd", times=4, batch=8),
            Update(learns="student", by="gan", batch=8, optimizer="student_motion"),
            Update(learns="discriminator", by="gan", batch=8),
        ),
        optimizers={
            "student": Optimizer(lr=1e-4, betas=(0.0, 0.999)),
            "student_motion": Optimizer(lr=MOTION_WEIGHT * 1e-4, betas=(0.0, 0.999)),
            "fake_score": Optimizer(lr=2e-4, betas=(0.0, 0.999)),
            "discriminator": Optimizer(lr=2e-4, betas=(0.0, 0.999)),
        },
        objectives={
            "dmd": DMDConfig(guidance=3.0, shift=3.0),
            "gan": GANConfig(
                space="motion",
                blocks=4,
                taps=(1, 2, 3),
                normalise=True,
                window=3,
                starts=(0, 1, 2),
                flow="lab",
                flow_iterations=4,
            ),
        },
        iterations=20,  # 40 to 80 bring hardly more motion, and cost form: docs/results.md
        ema=0.95,
        save_every=5,
        sample_every=10,
    )


def mogan_surrogate_lab() -> Config:
    """MoGAN on the lab's student, its motion updates through a surrogate but for every eighth; every number chosen here."""
    base = mogan_lab()
    gan = gan_of(base)
    exact = tuple(replace(u, every=8) if u.by == "gan" else u for u in base.plan)
    predicted = tuple(
        replace(u, by="surrogate", unless=8, again=True if u.learns == "discriminator" else None)
        for u in base.plan
        if u.by == "gan"
    )
    learning = (
        Update(
            learns="surrogate", by="surrogate", batch=8, times=150, stop=1
        ),  # on real clips: there are no others yet
        Update(learns="surrogate", by="surrogate", batch=8, times=4, start=1),
    )
    return replace(
        base,
        recipe="mogan_surrogate_lab",
        iterations=80,  # it has to learn first; docs/methods/surrogate.md
        plan=(learning[0], *exact, *predicted, learning[1]),
        optimizers=base.optimizers | {"surrogate": Optimizer(lr=1e-3)},
        objectives=base.objectives
        | {
            "gan": replace(gan, r1=8 * gan.r1, r2=8 * gan.r2),  # on the exact updates alone
            "surrogate": SurrogateConfig(width=64, blocks=4, pairs=64, limit=None),
        },
    )


def mogan_wan_1_3b() -> Config:
    """MoGAN as published, on a 3-step Wan2.1-T2V-1.3B (section 5.1 and appendices A and B)."""
    # lr: 5.1, of all networks as none is named; betas, weight decay and clip are not given: Self-Forcing's, a co-author's
    lr = Optimizer(lr=1e-5, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)
    return Config(
        recipe="mogan_wan_1_3b",
        post_trains=True,
        sigmas=(1.0, 0.757, 0.522),  # not given; CausVid's 3 steps, see dmd2_wan_1_3b
        plan=(  # order and 4 fake-score updates: appendix B; batch 64 of what judges, 16 of the student: 5.1
            Update(learns="student", by="dmd", batch=16, accumulate=16),
            Update(learns="fake_score", by="dmd", times=4, batch=64, accumulate=64),
            Update(learns="student", by="gan", batch=16, accumulate=16, optimizer="student_motion"),
            Update(learns="discriminator", by="gan", batch=64, accumulate=64),
        ),
        optimizers={
            "student": lr,
            "student_motion": replace(lr, lr=MOTION_WEIGHT * lr.lr),
            "fake_score": lr,
            "discriminator": lr,
        },
        objectives={
            "dmd": DMDConfig(guidance=4.5, shift=8.0),  # not given; as the warm start
            "gan": GANConfig(
                space="motion",
                blocks=16,  # 5.1
                taps=(7, 13, 15),  # 5.1
                student_weight=MOTION_WEIGHT,
                judge_weight=0.5,  # lambda_2, 5.1
                r1=0.3,  # 5.1
                r2=0.3,  # 5.1
                noise=0.01,  # 5.1; prompt "a video with good motion" and sigma 0, the defaults: section 4
                normalise=True,  # as printed the effective weight is 3e-5; see docs/methods/mogan.md
                window=12,  # 5.1; decodes to 45 or 48 frames, 45 are used
                starts=tuple(range(10)),  # every window inside 21 latent frames
                flow="raft_large_C_T_SKHT_V2.pth",  # RAFT: section 4; which weights and how many refinements is not given
                flow_iterations=12,
            ),
        },
        iterations=800,  # "early stop at step 800", appendix B
        ema=0.99,  # not given; Self-Forcing
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=50,
        sample_every=100,
    )


def mogan_causal_lab() -> Config:
    """MoGAN on a causal student of the lab, named with ``--student``: everything but the rollout is ``mogan_lab``'s."""
    return replace(mogan_lab(), recipe="mogan_causal_lab", rollout=self_forcing_lab().rollout)


def mogan_causal_wan_1_3b() -> Config:
    """MoGAN on ``self_forcing_wan_1_3b``'s student, which nobody has tried: plan, learning rates and discriminator are MoGAN's.

    Levels, rollout and distribution matching are those that made the student. All of MoGAN's windows stay, at chunk borders or
    not: a discriminator that met borders at one place alone could tell clips by them.
    """
    start, base = self_forcing_wan_1_3b(), mogan_wan_1_3b()
    return replace(
        base,
        recipe="mogan_causal_wan_1_3b",
        sigmas=start.sigmas,
        rollout=start.rollout,
        objectives=base.objectives | start.objectives,
    )


def mogan_i2v_lab() -> Config:
    """MoGAN on ``dmd_i2v_lab``'s student, named with ``--student``, which is given the first frame."""
    return first_frame_given(mogan_lab(), "mogan_i2v_lab", guidance=1.0)


def mogan_i2v_wan_1_3b() -> Config:
    """MoGAN on ``dmd_i2v_wan_1_3b``'s student: of Wan2.1-T2V-1.3B after ``sft_i2v_wan_1_3b``, or of Wan2.2-TI2V-5B."""
    return first_frame_given(mogan_wan_1_3b(), "mogan_i2v_wan_1_3b", guidance=5.0)


def gan_of(config: Config) -> GANConfig:
    """The settings of a recipe's discriminator.

    Raises:
        UserError: it has none.
    """
    gan = config.objectives.get("gan")
    if not isinstance(gan, GANConfig):
        raise UserError(f"{config.recipe} has no discriminator of motion: choose a recipe with one, such as mogan_lab")
    return gan


def ablate(recipe: Callable[[], Config], ablation: str) -> Config:
    """A recipe without one part, a row of MoGAN's Table 2: ``no-dmd``, ``no-r1r2`` or ``latent-gan``; everything else stays."""
    config = recipe()
    named = replace(config, recipe=f"{config.recipe}_{ablation.replace('-', '_')}")
    if ablation == "no-dmd":
        plan = tuple(u for u in config.plan if u.by != "dmd")
        return replace(named, plan=plan, objectives={k: v for k, v in config.objectives.items() if k != "dmd"})
    return named.changed("gan", r1=0.0, r2=0.0) if ablation == "no-r1r2" else named.changed("gan", space="latent")
