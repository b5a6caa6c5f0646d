"""Recipes: functions that return one complete :class:`mogan.config.Config`.

The value of a paper stands beside each number with its place; a number without one was chosen here. Any importable
``module:function`` works as a recipe, so yours can live outside this package.
"""

import importlib
from dataclasses import replace

from mogan.config import (
    Config,
    DMDConfig,
    FlowMatchingConfig,
    GANConfig,
    MotionScoreConfig,
    Optimizer,
    ShiftConfig,
    SurrogateConfig,
    Update,
)
from mogan.errors import UserError
from mogan.schedule import shifted_levels

ABLATIONS = ("no-dmd", "no-r1r2", "latent-gan")


def dmd_lab() -> Config:
    """The lab's 3-step student from its teacher: DMD2 with backward simulation, on prompts alone."""
    return Config(
        recipe="dmd_lab",
        sigmas=shifted_levels(3, 3.0),
        plan=(
            Update(learns="student", by="dmd", batch=16),
            Update(learns="fake_score", by="dmd", times=4, batch=16),
        ),
        optimizers={
            "student": Optimizer(lr=1e-4, betas=(0.0, 0.999)),
            "fake_score": Optimizer(lr=2e-4, betas=(0.0, 0.999)),
        },
        dmd=DMDConfig(guidance=3.0, shift=3.0),
        iterations=400,
        ema=0.98,
        save_every=25,
        sample_every=100,
    )


def mogan_lab() -> Config:
    """MoGAN on the lab's student: 3 of 5 latent frames, 4 of 6 blocks, minutes on two cores."""
    return Config(
        recipe="mogan_lab",
        sigmas=shifted_levels(3, 3.0),
        plan=(  # appendix B
            Update(learns="student", by="dmd", batch=8),
            Update(learns="fake_score", by="dmd", times=4, batch=8),
            Update(learns="student", by="gan", batch=8),
            Update(learns="discriminator", by="gan", batch=8),
        ),
        optimizers={
            "student": Optimizer(lr=1e-4, betas=(0.0, 0.999)),
            "fake_score": Optimizer(lr=2e-4, betas=(0.0, 0.999)),
            "discriminator": Optimizer(lr=2e-4, betas=(0.0, 0.999)),
        },
        dmd=DMDConfig(guidance=3.0, shift=3.0),
        gan=GANConfig(
            space="motion",
            blocks=4,
            taps=(1, 2, 3),
            normalise=True,
            window=3,
            starts=(0, 1, 2),
            max_flow=4.0,
            flow="lab",
            flow_iterations=4,
        ),
        iterations=80,
        ema=0.95,
        save_every=20,
        sample_every=40,
    )


def mogan_surrogate_lab() -> Config:
    """MoGAN on the lab's student, its motion updates through a surrogate but for every eighth; every number chosen here."""
    base = mogan_lab()
    assert base.gan is not None
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
        gan=replace(base.gan, r1=8 * base.gan.r1, r2=8 * base.gan.r2),  # on the exact updates alone
        plan=(learning[0], *exact, *predicted, learning[1]),
        optimizers=base.optimizers | {"surrogate": Optimizer(lr=1e-3)},
        surrogate=SurrogateConfig(width=64, blocks=4, pairs=64, limit=None),
    )


def flow_matching_lab() -> Config:
    """Supervised fine-tuning of the lab's teacher on real clips."""
    return Config(
        recipe="flow_matching_lab",
        sigmas=shifted_levels(50, 3.0),
        plan=(Update(learns="student", by="flow_matching", batch=16),),
        optimizers={"student": Optimizer(lr=1e-4)},
        flow_matching=FlowMatchingConfig(shift=3.0),
        iterations=200,
        ema=0.99,
        save_every=50,
        sample_every=100,
    )


def sft_i2v_lab() -> Config:
    """The lab's teacher becomes image-conditioned: supervised fine-tuning on real clips, first latent frame given."""
    return replace(flow_matching_lab(), recipe="sft_i2v_lab", sigmas=shifted_levels(10, 3.0), given=1, iterations=400)


def shift_lab() -> Config:
    """SHIFT on the lab's image-conditioned model (``--student``: the export of a sft_i2v_lab run).

    The paper's constants are not public; these were chosen here. Order as its Algorithm 1: warm up the rewards, then
    sample, reward, denoise several times, refresh the rewards. Sampling and observing clips costs as much as 30 updates
    of the rewards, which tell held-out real clips from generated ones after a hundred: each set of clips is used often.
    """
    return Config(
        recipe="shift_lab",
        sigmas=shifted_levels(10, 3.0),
        given=1,
        plan=(
            Update(learns="reward", by="shift", times=16, batch=8, stop=8),
            Update(learns="student", by="shift", times=12, batch=8, start=8),
            Update(learns="reward", by="shift", times=8, batch=8, start=8),
        ),
        optimizers={"student": Optimizer(lr=1e-4), "reward": Optimizer(lr=3e-4, weight_decay=0.01)},
        shift=ShiftConfig(
            guidance=1.0,
            shift=3.0,
            weight="linear",
            beta=1.0,
            clip=(-4.0, 4.0),
            points=64,
            patch=(4, 8, 8),
            width=96,
            depth=3,
            heads=4,
            flow="lab",
            flow_iterations=4,
        ),
        iterations=21,
        ema=0.98,
        save_every=2,
        sample_every=10,
    )


def dmd2_wan_1_3b() -> Config:
    """The 3-step warm start MoGAN post-trains: DMD2 on Wan2.1-T2V-1.3B.

    MoGAN does not give its warm-start recipe; these are the values of CausVid's bidirectional stage, the only public
    3-step one (steps 1000/757/522, shift 8, guidance 3.5 written as ``cond + w (cond - uncond)``, so 4.5 here), with
    DMD2's backward simulation in place of CausVid's noised real latents: MoGAN trains so, and prompts are enough.
    """
    lr = Optimizer(lr=2e-6, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0)  # CausVid
    return Config(
        recipe="dmd2_wan_1_3b",
        sigmas=(1.0, 0.757, 0.522),  # CausVid
        plan=(  # batch 64: CausVid; 5 to 1: DMD2, CausVid
            Update(learns="student", by="dmd", batch=64, accumulate=64),
            Update(learns="fake_score", by="dmd", times=5, batch=64, accumulate=64),
        ),
        optimizers={"student": lr, "fake_score": lr},
        dmd=DMDConfig(guidance=4.5, shift=8.0),  # CausVid; levels clamped to [0.02, 0.98] as in DMD
        # CausVid: "saturates" below 1000 iterations, of which every fifth updates the student: 200 of ours
        iterations=200,
        ema=0.98,  # FastVideo's DMD2; Self-Forcing's 0.99 would leave 13 % of the start in the average after 200 updates
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=50,
        sample_every=50,
    )


def mogan_wan_1_3b() -> Config:
    """MoGAN as published, on a 3-step Wan2.1-T2V-1.3B (section 5.1 and appendices A and B)."""
    # lr: 5.1, of all networks as none is named; betas, weight decay and clip are not given: Self-Forcing's, a co-author's
    lr = Optimizer(lr=1e-5, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)
    return Config(
        recipe="mogan_wan_1_3b",
        sigmas=(1.0, 0.757, 0.522),  # not given; CausVid's 3 steps, see dmd2_wan_1_3b
        plan=(  # order and 4 fake-score updates: appendix B; batch 64 of what judges, 16 of the student: 5.1
            Update(learns="student", by="dmd", batch=16, accumulate=16),
            Update(learns="fake_score", by="dmd", times=4, batch=64, accumulate=64),
            Update(learns="student", by="gan", batch=16, accumulate=16),
            Update(learns="discriminator", by="gan", batch=64, accumulate=64),
        ),
        optimizers={"student": lr, "fake_score": lr, "discriminator": lr},
        dmd=DMDConfig(guidance=4.5, shift=8.0),  # not given; as the warm start
        gan=GANConfig(
            space="motion",
            blocks=16,  # 5.1
            taps=(7, 13, 15),  # 5.1
            student_weight=0.5,  # lambda_1, 5.1
            judge_weight=0.5,  # lambda_2, 5.1
            r1=0.3,  # 5.1
            r2=0.3,  # 5.1
            noise=0.01,  # 5.1; prompt "a video with good motion" and sigma 0, the defaults: section 4
            normalise=True,  # as printed the effective weight is 3e-5; see docs/methods/mogan.md
            window=12,  # 5.1; decodes to 45 or 48 frames, 45 are used
            starts=tuple(range(10)),  # every window inside 21 latent frames
            max_flow=144.0,  # 0.15 of the diagonal of 480 x 832 (VideoJAM's scale)
            flow="raft_large_C_T_SKHT_V2.pth",  # RAFT: section 4; which weights and how many refinements is not given
            flow_iterations=12,
        ),
        iterations=800,  # "early stop at step 800", appendix B
        ema=0.99,  # not given; Self-Forcing
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=50,
        sample_every=100,
    )


def msm_lab() -> Config:
    """The lab's student by DMD with motion score matching; everything but ``motion_weight`` as in ``dmd_lab``."""
    base = dmd_lab()
    return replace(base, recipe="msm_lab", dmd=_with_motion(base.dmd))


def msm_wan_1_3b() -> Config:
    """Motion score matching, stage 1 of its section 5: a 3-step Wan2.1-T2V-1.3B.

    The paper follows CausVid's released code, so does ``dmd2_wan_1_3b``: steps, guidance, shift, lr 2e-6 and betas
    (0.9, 0.999) are those of its section 5.1. Clipping, weight decay, batch and average are not given there.
    """
    base = dmd2_wan_1_3b()
    return replace(base, recipe="msm_wan_1_3b", dmd=_with_motion(base.dmd), iterations=14000)  # 5.1


def mogan_msm_lab() -> Config:
    """MoGAN on the lab's student, its distribution matching with motion scores; a combination no paper has tried."""
    base = mogan_lab()
    return replace(base, recipe="mogan_msm_lab", dmd=_with_motion(base.dmd))


def _with_motion(dmd: DMDConfig | None) -> DMDConfig:
    assert dmd is not None
    return replace(dmd, motion_weight=1.0)  # lambda is given nowhere: chosen, the fastest motion weighs up to 5 times


def motion_score_lab() -> Config:
    """A motion score model of the lab's world, from the lab's teacher; the paper's section 6.3 gives no number at all."""
    return Config(
        recipe="motion_score_lab",
        sigmas=shifted_levels(50, 3.0),
        plan=(Update(learns="student", by="motion_score", batch=16),),
        optimizers={"student": Optimizer(lr=1e-4)},
        motion_score=MotionScoreConfig(windows=((0, 4), (1, 4), (2, 2)), shift=3.0),  # eq. 15, 16, 17; 5 latent frames
        iterations=400,
        ema=0.99,
        save_every=50,
        sample_prompts=0,  # differences are no clip to look at
    )


def motion_score_wan_1_3b() -> Config:
    """A motion score model from Wan2.1-T2V-1.3B; every number chosen here, none tried at this size."""
    return Config(
        recipe="motion_score_wan_1_3b",
        sigmas=shifted_levels(50, 5.0),
        plan=(Update(learns="student", by="motion_score", batch=64, accumulate=64),),
        optimizers={"student": Optimizer(lr=1e-5, weight_decay=0.01)},
        motion_score=MotionScoreConfig(windows=((0, 20), (1, 20), (3, 3)), shift=5.0),  # 21 latent frames
        iterations=10000,
        ema=0.999,
        checkpointing=True,
        sample_prompts=0,
    )


def shift_wan_1_3b() -> Config:
    """SHIFT at full size, on a Wan made image-conditioned by the same first-frame conditioning (Wan 2.2's TI2V has it).

    The paper trains LoRA of rank 32 on SVD-1.2B and Wan2.2-TI2V-5B; its learning rates, batch, clip range, beta, M and
    transformer sizes are not public, and numbers without a source were chosen here.
    """
    return Config(
        recipe="shift_wan_1_3b",
        sigmas=shifted_levels(30, 3.0),  # shift: Wan's for 480p
        given=1,
        plan=(  # order: the paper's Algorithm 1
            Update(learns="reward", by="shift", times=4, batch=8, accumulate=8, stop=50),
            Update(learns="student", by="shift", times=16, batch=8, accumulate=8, start=50),
            Update(learns="reward", by="shift", times=4, batch=8, accumulate=8, start=50, every=2),
        ),
        optimizers={
            "student": Optimizer(lr=1e-5, weight_decay=0.01),
            "reward": Optimizer(lr=1e-4, weight_decay=0.01),
        },
        shift=ShiftConfig(
            guidance=5.0,  # Wan's own
            shift=3.0,
            weight="exp",
            beta=2.0,
            clip=(-4.0, 4.0),
            points=256,
            patch=(8, 32, 32),
            width=384,
            depth=6,
            heads=6,
            flow="raft_large_C_T_SKHT_V2.pth",  # torchvision's in place of SEA-RAFT
            flow_iterations=12,
        ),
        negative_prompt=WAN_NEGATIVE_PROMPT,
        iterations=200,
        ema=0.99,
        checkpointing=True,
        save_every=10,
        sample_every=50,
    )


# The negative prompt of Wan's own inference code, which its teacher is meant to be guided with.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


def ablate(config: Config, ablation: str) -> Config:
    """One row of MoGAN's Table 2: ``no-dmd``, ``no-r1r2`` or ``latent-gan``; everything else stays."""
    if ablation not in ABLATIONS or config.gan is None:
        raise UserError(f"--ablation takes {', '.join(ABLATIONS)} and a recipe with a discriminator")
    name = f"{config.recipe}_{ablation.replace('-', '_')}"
    if ablation == "no-dmd":
        plan = tuple(u for u in config.plan if u.by != "dmd")
        return replace(config, recipe=name, plan=plan, dmd=None)
    if ablation == "no-r1r2":
        return replace(config, recipe=name, gan=replace(config.gan, r1=0.0, r2=0.0))
    return replace(config, recipe=name, gan=replace(config.gan, space="latent"))


def find_recipe(name: str) -> Config:
    """The config of a recipe by name, or of any importable ``module:function``."""
    module, _, function = name.rpartition(":")
    known = sorted(
        n
        for n, f in globals().items()
        if callable(f)
        and getattr(f, "__annotations__", {}).get("return") is Config
        and n not in ("ablate", "find_recipe")
    )
    try:
        found = getattr(importlib.import_module(module), function) if module else globals()[name]
        config = found()
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"no recipe {name!r}: use one of {', '.join(known)}, or module:function of your own") from error
    if not isinstance(config, Config):
        raise UserError(f"{name} does not return a mogan Config; use one of {', '.join(known)}")
    return config
