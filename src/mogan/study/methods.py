"""The columns of ``mogan study methods``: every system of this package, from one teacher, at equal student updates.

docs/methods/comparison.md says what is equal and what is not. MoGAN adds 20 + 20 student updates to the 400 that made its DMD
student. Every other student that sees whole clips gets 440 too; SHIFT's come in twelves, so 36 after 400. A surrogate has to
learn first and gets 160 after 400. Causal students begin with two stages more, and get 40 each after their own Self-Forcing
student. ``_t`` gets MoGAN's seconds instead.
"""

from dataclasses import replace

from mogan.config import Config
from mogan.recipes import asd_lab, mogan_causal_lab, mogan_lab, phased_lab, reward_forcing_lab, shift_lab
from mogan.recipes.phased import phases
from mogan.sampling.rollout import Euler
from mogan.study.columns import DMD, FAKE_SCORE, FLOWMO, MOGAN, SURROGATE, TEACHER, Column, for_as_long

HERE = "mogan.study.methods:"
CHUNKS = 5  # of the lab's clips, a latent frame each
AGAIN = (CHUNKS - 1) / CHUNKS  # all but the last are seen once more, clean, for the cache
DMD_LONG = replace(DMD, name="dmd_long", about="3 steps, DMD and more of it", start="dmd", iterations=40)
SFT = Column(
    "sft", "50 steps, fine-tuned on the motion-rich videos", "flow_matching_lab", iterations=440,
    sampling=("--mode", "teacher"), calls=100,
)  # fmt: skip
I2V = Column(
    "sft_i2v",
    "10 steps, first frame given, fine-tuned",
    "sft_i2v_lab",
    first_frames=True,
    against=("sft_i2v_long",),
    calls=10,
)
I2V_LONG = replace(I2V, name="sft_i2v_long", about=f"{I2V.about}, more of it", start="sft_i2v", iterations=36)
DMD_I2V = Column(
    "dmd_i2v", "3 steps, first frame given, DMD", "dmd_i2v_lab", start="sft_i2v", data="cache", first_frames=True,
    before=(("export", "{run}", "--to", "teacher", "--out", "{home}/start"),), training=("--model", "{home}/start"),
    against=("sft_i2v_long",),
)  # fmt: skip
MOGAN_I2V = replace(
    DMD_I2V, name="mogan_i2v", about="3 steps, first frame given, MoGAN", recipe="mogan_i2v_lab", start="dmd_i2v", before=(),
    training=("--model", "{out}/dmd_i2v/seed{seed}/start"), against=("sft_i2v_long", "dmd_i2v"),
)  # fmt: skip
SHIFT = replace(I2V_LONG, name="shift", about="10 steps, first frame given, SHIFT", recipe="shift_lab", iterations=11)


def methods() -> tuple[Column, ...]:
    """All systems, and MoGAN on top of each few-step student."""
    msm = replace(DMD, name="msm", about="3 steps, DMD with motion scores", recipe="msm_lab", against=("mogan", "dmd"))
    msm_long = replace(msm, name="msm_long", about="3 steps, MSM and more of it", start="msm", iterations=40)
    msm_long = replace(msm_long, against=("mogan", "dmd_long"))
    mogan_msm = replace(
        MOGAN, name="mogan_msm", about="3 steps, MoGAN, motion scores in its DMD", recipe="mogan_msm_lab"
    )
    frozen = replace(SHIFT, name="shift_frozen", about=f"{SHIFT.about}, its rewards never refreshed")
    frozen = replace(frozen, recipe=HERE + "shift_frozen", against=("sft_i2v_long", "shift"))
    timed = (SFT, DMD_LONG, msm_long, SURROGATE, I2V_LONG, SHIFT)
    return (
        TEACHER, FLOWMO, SFT, DMD, DMD_LONG, msm, msm_long, MOGAN, mogan_msm, SURROGATE, *_few_steps(), *_on_top(), *_causal(),
        *_llia(), I2V, I2V_LONG, SHIFT, frozen, DMD_I2V, MOGAN_I2V, *map(for_as_long, timed),
    )  # fmt: skip


def _few_steps() -> tuple[Column, ...]:
    """Other ways to a student of few steps that sees whole clips."""
    alike = ("mogan", "dmd_long")
    short, long = (replace(column, against=alike) for column in (replace(DMD, iterations=440), DMD_LONG))
    return (
        replace(long, name="redmd", about="3 steps, DMD, then weighted by motion", recipe="redmd_lab"),
        replace(short, name="vdot", about="3 steps, transport, DMD and a GAN", recipe="vdot_lab", data="cache"),
        replace(short, name="tdm", about="4 steps of one student for 1, 2 and 4", recipe="tdm_lab", calls=4),
        replace(short, name="phased", about="4 steps, two experts", recipe=HERE + "phased", keeps=(), calls=4),
        Column(
            "accvideo", "3 steps along the teacher's paths, with a GAN", "accvideo_lab", data="paths", iterations=220,
            against=alike,
        ),
        Column("mcd", "3 steps, consistency in segments", "efficient_vdit_mcd_lab", iterations=300),
        Column(
            "efficient_vdit", "the same, then one reference frame, and distilled again", "efficient_vdit_kd_lab",
            start="mcd", iterations=140, against=alike,
            before=(
                ("attention", "--model", "{start}", "--prompts", "{out}/few.txt", "--levels", "1", "0.857", "0.6",
                 "--thresholds", "0.1", "--out", "{home}/attention"),
                ("tiles", "{home}/attention", "--references", "1", "--out", "{home}/start"),
            ),
        ),
    )  # fmt: skip


def _on_top() -> tuple[Column, ...]:
    """MoGAN on other few-step students. TDM's is told where its steps end, which a discriminator of whole clips is not."""

    def on(start: str, recipe: str = "mogan_lab") -> Column:
        return _mogan_on(start, recipe, MOGAN)

    euler, phased = HERE + "mogan_euler", replace(on("phased", HERE + "mogan_phased"), calls=4)
    return on("redmd"), on("vdot"), phased, on("accvideo", euler), on("mcd", euler), on("efficient_vdit", euler)


def _mogan_on(start: str, recipe: str, like: Column) -> Column:
    """MoGAN on top of that student; all else as the column ``like``."""
    about = f"MoGAN on `{start}`"
    return replace(like, name=f"mogan_{start}", about=about, recipe=recipe, start=start, against=("mogan", start))


def _causal() -> tuple[Column, ...]:
    """Students that see the past alone, frame by frame of latents, and what is done to them."""
    teacher = Column("causal_teacher", "50 steps a frame, sees the past alone", "causal_teacher_lab", calls=100 + AGAIN)
    start = Column(
        "causal_cd", "3 steps a frame, consistency", "causal_cd_lab", start="causal_teacher", calls=3 + AGAIN
    )
    student = replace(
        start, name="self_forcing", about="3 steps a frame, DMD on its own past", recipe="self_forcing_lab"
    )
    student = replace(student, start="causal_cd", keeps=FAKE_SCORE)
    longer = replace(
        student, name="self_forcing_long", about="3 steps a frame, more of it", start="self_forcing", iterations=40
    )

    def more(name: str, about: str, iterations: int = 40, steps: int = 3) -> Column:
        own = replace(
            longer, name=name, about=f"{steps} steps a frame, {about}", recipe=f"{name}_lab", iterations=iterations
        )
        return replace(own, calls=steps + AGAIN, keeps=(), against=("mogan", "self_forcing_long"))

    def on(start: Column) -> Column:
        return _mogan_on(start.name, f"{HERE}mogan_{start.name}", replace(start, iterations=20))

    rewarded, several = more("reward_forcing", "EMA sink and rewards"), more("asd", "one student for 1 to 4", steps=4)
    return (
        teacher, start, student, longer, rewarded, several, more("mogan_causal", "MoGAN", iterations=20), on(rewarded),
        on(several),
    )  # fmt: skip


def _llia() -> tuple[Column, ...]:
    own = replace(
        I2V, name="llia", about="2 steps a frame, first frame given, states", recipe="llia_lab", start="causal_cd"
    )
    # the first chunk is given, and looked at once as all but the last
    return (replace(own, data="states", iterations=300, calls=2 * (CHUNKS - 1) / CHUNKS + AGAIN),)


# ---------------------------------------------------------------------------------------------- variants


def phased() -> Config:
    """Two phases of 220 updates each, where the recipe has 200."""
    return replace(phased_lab(), plan=phases(16, 1, 4, 220), iterations=440)


def mogan_euler() -> Config:
    """MoGAN on a student that is sampled by Euler steps, at the same levels."""
    return replace(mogan_lab(), rollout=Euler(stop=3, since=0))


def mogan_phased() -> Config:
    """MoGAN on two experts, each of which learns from the steps that are its own."""
    experts = phased_lab()
    return replace(
        mogan_lab(), sigmas=experts.sigmas, boundary=experts.boundary, rollout=Euler(stop=len(experts.sigmas), since=0)
    )


def mogan_reward_forcing() -> Config:
    """MoGAN on a causal student that sees a window with an EMA sink."""
    return replace(mogan_causal_lab(), rollout=reward_forcing_lab().rollout)


def mogan_asd() -> Config:
    """MoGAN on a causal student of 1 to 4 steps."""
    own = asd_lab()
    return replace(mogan_causal_lab(), sigmas=own.sigmas, rollout=own.rollout)


def shift_frozen() -> Config:
    """SHIFT judged by the rewards that its warm-up leaves."""
    config = shift_lab()
    return replace(config, plan=tuple(u for u in config.plan if u.learns != "reward" or u.stop is not None))
