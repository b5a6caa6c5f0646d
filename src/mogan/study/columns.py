"""The columns of the studies: which recipe, from which start, sampled how.

A column is repeated by hand with the commands that :mod:`mogan.study.jobs` prints into its log: nothing here is known to
the training loop.
"""

from dataclasses import dataclass, replace

from mogan.config import Config, Update
from mogan.recipes import ablate, mogan_lab, mogan_surrogate_lab


@dataclass(frozen=True)
class Column:
    """One system of a table.

    Attributes:
        name: in tables and files.
        about: what it is, in a few words.
        recipe: what ``mogan train`` is given; None for a system that is sampled as it is, the base model or its start.
        start: the column whose student it starts from, seed by seed; None starts from the base model.
        data: what it is trained on: ``cache``, the motion-rich videos; ``captions`` alone; ``paths`` of the teacher; ``states``,
            videos of things that take up a state.
        training: further options of ``mogan train``, with ``before``'s placeholders.
        keeps: what is exported beside the student for those who start from it, options of ``mogan export``.
        before: commands that make the folder START of its own from what it starts from, with ``{start}`` (that student's
            export), ``{run}`` (its run), ``{home}`` (the folder of this column and seed), ``{seed}`` and ``{out}`` (the study's
            folder); the last writes ``{home}/start``.
        sampling: further options of ``mogan sample``.
        calls: of the network for one clip; a call for one chunk of a causal student counts as its share of the frames.
        iterations: of training, in place of the recipe's.
        first_frames: image to video: sampled from the first frames of the held-out prompts' own clips.
        against: columns whose clips its own are held against, clip by clip.
        as_long_as: ``(column, other)``: train for as many iterations as take from the teacher to ``other``'s student, at
            the pace that ``column`` was trained at, seed by seed; in place of ``iterations``.
    """

    name: str
    about: str
    recipe: str | None = None
    start: str | None = None
    data: str = "cache"
    training: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()
    sampling: tuple[str, ...] = ()
    calls: float = 3
    iterations: int | None = None
    first_frames: bool = False
    against: tuple[str, ...] = ("mogan",)
    as_long_as: tuple[str, str] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that must be trained before."""
        return (*((self.start,) if self.start else ()), *(self.as_long_as or ()))


TEACHER = Column("teacher", "50 steps, guidance 3", calls=100)
FAKE_SCORE = ("--fake-score",)
DMD = Column("dmd", "3 steps, distribution matching alone", "dmd_lab", data="captions", keeps=FAKE_SCORE)
MOGAN = Column("mogan", "3 steps, MoGAN on the motion-rich videos", "mogan_lab", start="dmd")

FLOWMO = Column("flowmo", "teacher with FlowMo guidance in its first 12 steps", sampling=("--flowmo",), calls=100)
SURROGATE = Column(
    "surrogate", "motion updates through a surrogate, every eighth exact", "mogan.study.columns:surrogate", start="dmd"
)


def table1() -> tuple[Column, ...]:
    """MoGAN's Table 1: teacher, FlowMo guidance on it, DMD, MoGAN."""
    return (TEACHER, FLOWMO, DMD, MOGAN)


def table2() -> tuple[Column, ...]:
    """MoGAN's Table 2, and the knobs that the paper leaves open, one at a time."""
    here = "mogan.study.columns:"
    variants = (
        ("no_dmd", "without distribution matching"),
        ("no_r1r2", "without R1 and R2"),
        ("latent_gan", "the discriminator sees video latents, not flow"),
        ("printed_r1r2", "R1 and R2 as printed: effective weight 3e-5"),
        ("weak_r1r2", "R1 and R2 normalised, weight 3e-3"),
        ("flow_half", "2 px/frame drawn as 1"),
        ("flow_double", "8 px/frame drawn as 1"),
        ("flow_faint", "17 px/frame drawn as 1: motion fills a tenth of the range"),
        ("drawn_levels", "discriminator at drawn noise levels"),
        ("two_moments", "the motion update as strong as DMD's: its learning rate whole"),
        ("one_moments", "one optimiser state for the student's two updates"),
        ("judge_first", "discriminator learns before the student"),
        ("window_start", "window always at the start of the clip"),
        ("heads_only", "discriminator's trunk frozen"),
        ("guidance_1", "teacher without guidance"),
        ("guidance_5", "teacher guided by 5"),
        ("surrogate_limited", "the same, and all exact while the surrogate's error is above 0.5"),
        ("surrogate_unchecked", "a surrogate that learns in the first 10 iterations and is trusted ever after"),
        ("half_flow", "flow estimated at half resolution"),
        ("few_refinements", "flow refined twice, not 4 times"),
        ("short_window", "2 of 5 latent frames decoded, not 3"),
        ("shared_rollout", "one update of the student for both losses"),
    )
    one_changed = tuple(Column(name, about, here + name, start="dmd") for name, about in variants)
    return (TEACHER, DMD, MOGAN, *one_changed, SURROGATE, for_as_long(SURROGATE))


def for_as_long(column: Column) -> Column:
    """The column, trained for MoGAN's seconds."""
    about = f"{column.about}; for MoGAN's seconds"
    own = replace(column, name=f"{column.name}_t", about=about, iterations=None, as_long_as=(column.name, MOGAN.name))
    return replace(own, against=tuple(base if base == MOGAN.name else f"{base}_t" for base in column.against))


# ---------------------------------------------------------------------------------------------- variants


def no_dmd() -> Config:
    """Table 2, row 1."""
    return ablate(mogan_lab, "no-dmd")


def no_r1r2() -> Config:
    """Table 2, row 2."""
    return ablate(mogan_lab, "no-r1r2")


def latent_gan() -> Config:
    """Table 2, row 3."""
    return ablate(mogan_lab, "latent-gan")


def printed_r1r2() -> Config:
    """Penalties exactly as equations 6 and 7 print them."""
    return mogan_lab().changed("gan", normalise=False)


def weak_r1r2() -> Config:
    """Between the printed weight and the normalised one."""
    return mogan_lab().changed("gan", r1=3e-3, r2=3e-3)


def flow_half() -> Config:
    """Flow drawn twice as strong."""
    return mogan_lab().changed("gan", max_flow=2.0)


def flow_double() -> Config:
    """Flow drawn half as strong."""
    return mogan_lab().changed("gan", max_flow=8.0)


def flow_faint() -> Config:
    """The contrast that 0.15 of the diagonal gives clips of 480 x 832: the fastest points of a typical clip at a tenth."""
    return mogan_lab().changed("gan", max_flow=17.0)


def drawn_levels() -> Config:
    """The discriminator sees noised observations at drawn levels instead of clean ones at level 0."""
    return mogan_lab().changed("gan", drawn_levels=True)


def heads_only() -> Config:
    """Only the discriminator's tokens and heads learn."""
    return mogan_lab().changed("gan", train_trunk=False)


def window_start() -> Config:
    """The window never moves."""
    return mogan_lab().changed("gan", starts=(0,))


def two_moments() -> Config:
    """The motion update's own Adam has DMD's learning rate."""
    config = mogan_lab()
    return replace(config, optimizers=config.optimizers | {"student_motion": config.optimizers["student"]})


def one_moments() -> Config:
    """DMD and motion update share one Adam, at DMD's learning rate."""
    config = mogan_lab()
    plan = tuple(replace(u, optimizer=None) for u in config.plan)
    return replace(config, plan=plan, optimizers={k: v for k, v in config.optimizers.items() if k != "student_motion"})


def judge_first() -> Config:
    """The discriminator learns before the student is judged by it."""
    config = mogan_lab()
    judge = tuple(u for u in config.plan if u.learns == "discriminator")
    return replace(config, plan=judge + tuple(u for u in config.plan if u.learns != "discriminator"))


def guidance_1() -> Config:
    """The teacher's guidance is itself a motion knob."""
    return _guided(1.0)


def guidance_5() -> Config:
    """The teacher's guidance is itself a motion knob."""
    return _guided(5.0)


def surrogate() -> Config:
    """The surrogate, which learns from the exact update of every eighth iteration."""
    return mogan_surrogate_lab()


def surrogate_limited() -> Config:
    """The surrogate, left alone while its error is large."""
    return mogan_surrogate_lab().changed("surrogate", limit=0.5)


def surrogate_unchecked() -> Config:
    """What a surrogate is worth that the student may leave behind: exact for 10 iterations, then never again."""
    config, warm = mogan_surrogate_lab(), 10

    def changed(update: Update) -> Update:
        if update.by == "gan":
            return replace(update, every=1, stop=warm)
        if update.learns == "surrogate":
            return replace(update, stop=min(update.stop or warm, warm))
        return replace(update, unless=None, start=warm) if update.by == "surrogate" else update

    plan = tuple(changed(u) for u in config.plan)
    return replace(config, plan=plan)


def half_flow() -> Config:
    """Flow estimated at half of height and width."""
    return mogan_lab().changed("gan", flow_resolution=0.5)


def few_refinements() -> Config:
    """Flow refined 2 times."""
    return mogan_lab().changed("gan", flow_iterations=2)


def short_window() -> Config:
    """Windows of 2 latent frames."""
    return mogan_lab().changed("gan", window=2, starts=(0, 1, 2, 3))


def shared_rollout() -> Config:
    """The student's two losses are added on one rollout: half its rollouts, and half its steps."""
    config = mogan_lab()
    student = next(u for u in config.plan if u.learns == "student")
    others = tuple(u for u in config.plan if u.learns != "student")
    return replace(config, plan=(replace(student, by="dmd+gan"), *others))


def _guided(guidance: float) -> Config:
    return mogan_lab().changed("dmd", guidance=guidance)
