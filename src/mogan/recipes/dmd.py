"""Distribution matching (DMD2, arXiv 2405.14867): the few-step warm start."""

from dataclasses import replace

from mogan.config import Config, Optimizer, Update
from mogan.models.defaults import WAN_NEGATIVE_PROMPT
from mogan.objectives.dmd import DMDConfig
from mogan.sampling.rollout import Euler
from mogan.schedule import shifted_levels


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
        objectives={
            "dmd": DMDConfig(guidance=3.0, shift=3.0),
        },
        iterations=400,
        ema=0.98,
        save_every=25,
        sample_every=100,
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
        objectives={
            "dmd": DMDConfig(guidance=4.5, shift=8.0),  # CausVid; levels clamped to [0.02, 0.98] as in DMD
        },
        # CausVid: "saturates" below 1000 iterations, of which every fifth updates the student: 200 of ours
        iterations=200,
        ema=0.98,  # FastVideo's DMD2; Self-Forcing's 0.99 would leave 13 % of the start in the average after 200 updates
        negative_prompt=WAN_NEGATIVE_PROMPT,
        checkpointing=True,
        save_every=50,
        sample_every=50,
    )


def dmd2_long_wan_1_3b() -> Config:
    """``dmd2_wan_1_3b`` for as long as motion score matching trains: what ``msm_wan_1_3b`` is to be compared with.

    MSM's section 5.1 trains 14000 iterations by CausVid's code, whose every fifth updates the student: 2800 of ours. Its
    average and checkpoints are the short recipe's, so that it is the same run, gone on with.
    """
    return replace(dmd2_wan_1_3b(), recipe="dmd2_long_wan_1_3b", iterations=14000 // 5)


def dmd_i2v_lab() -> Config:
    """A 3-step student of the lab's image-conditioned model (``--model``: a sft_i2v_lab run exported ``--to teacher``), first frame given.

    Sampled by Euler steps, as the model is: the sample of a step drawn goes straight to the clean clip. Guidance 1, as of the
    lab's image-to-video sampling.
    """
    return first_frame_given(dmd_lab(), "dmd_i2v_lab", guidance=1.0)


def dmd_i2v_wan_1_3b() -> Config:
    """The same of Wan2.1-T2V-1.3B after ``sft_i2v_wan_1_3b``, or of Wan2.2-TI2V-5B as it is (``--model``)."""
    return first_frame_given(dmd2_wan_1_3b(), "dmd_i2v_wan_1_3b", guidance=5.0)  # Wan's own


def first_frame_given(config: Config, recipe: str, guidance: float) -> Config:
    """A recipe of few-step students made one of image to video."""
    return replace(
        config.changed("dmd", guidance=guidance),
        recipe=recipe,
        given=1,
        rollout=Euler(stop=len(config.sigmas), since=0),
    )
