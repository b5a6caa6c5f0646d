"""The columns of ``mogan study signatures``: of each method the comparison that would show what its paper claims.

A group starts from one place and changes one thing. Pages of the methods (docs/methods) say what was found.
"""

from dataclasses import replace

from mogan.config import Config
from mogan.objectives.ot import TransportConfig
from mogan.recipes import asd_lab, dmd_lab, redmd_lab, tdm_lab
from mogan.recipes.vdot import RHO
from mogan.sampling.rollout import Intervals
from mogan.schedule import levels_of
from mogan.study.columns import DMD, TEACHER, Column
from mogan.study.methods import DMD_LONG, methods

HERE = "mogan.study.signatures:"


def signatures() -> tuple[Column, ...]:
    """What is compared: Re-DMD's beta, VDOT's transport, TDM's numbers of steps, AccVideo's discriminator, Phased DMD's variety, ASD's
    discriminator.
    """
    known = {column.name: column for column in methods()}
    return (
        TEACHER, DMD, *_rewarded(), *_transported(), *_told(known["tdm"]), *_followed(known["accvideo"]), DMD_LONG,
        known["phased"], *(known[name] for name in ("causal_teacher", "causal_cd", "self_forcing")), *_stepped(known["asd"]),
    )  # fmt: skip


def _rewarded() -> tuple[Column, ...]:
    """Re-DMD: does displacement rise with 1 / beta, at what cost, and not by more DMD alone?"""
    base = replace(DMD_LONG, name="dmd_160", about="DMD, 160 iterations more", iterations=160, against=("dmd",))
    half = replace(base, name="redmd_half", about="Re-DMD for as long, beta 1/2", recipe="redmd_lab")
    half = replace(half, against=("dmd", "dmd_160"))
    one = replace(half, name="redmd_1", about="the same, beta 1", recipe=HERE + "redmd_1")
    fifth = replace(half, name="redmd_fifth", about="the same, beta 1/5", recipe=HERE + "redmd_fifth")
    return base, one, half, fifth


def _transported() -> tuple[Column, ...]:
    """VDOT: is transport ahead while student and teacher are far apart?"""
    found: list[Column] = []
    for count in (50, 100, 150):
        alone = replace(DMD, name=f"dmd_at_{count}", about=f"DMD, its first {count} iterations", iterations=count)
        alone = replace(alone, keeps=(), against=())
        both = replace(alone, name=f"transport_at_{count}", about=f"with transport, {count}", recipe=HERE + "transport")
        found += [alone, replace(both, against=(alone.name,))]
    return tuple(found)


def _told(tdm: Column) -> tuple[Column, ...]:
    """TDM: one student that is told its number of steps, one that is not, and three of one number each.

    The three get as many updates together as the one: a third each, as it draws its three numbers equally often.
    """
    untold = replace(tdm, name="tdm_untold", about="not told its number of steps", recipe=HERE + "tdm_untold")
    found = [tdm, replace(untold, against=("tdm",))]
    for count in (2, 1):
        told = _in_fewer(tdm, count, ("dmd",))
        found += [told, _in_fewer(untold, count, (told.name,))]
    for count, told_name in ((4, "tdm"), (2, "tdm_in_2"), (1, "tdm_in_1")):
        alone = replace(tdm, name=f"tdm_for_{count}", about=f"a student of {count} alone", calls=count, iterations=147)
        found.append(replace(alone, recipe=f"{HERE}tdm_for_{count}", against=(told_name,)))
    return tuple(found)


def _in_fewer(column: Column, count: int, against: tuple[str, ...]) -> Column:
    """The same student, sampled in fewer steps."""
    return Column(
        f"{column.name}_in_{count}", f"`{column.name}`, sampled in {count}", start=column.name, calls=count,
        sampling=("--steps", str(count)), against=against,
    )  # fmt: skip


def _followed(accvideo: Column) -> tuple[Column, ...]:
    """AccVideo: what its discriminator adds. Half of the student's updates are by it, so without it there are twice the iterations."""
    alone = replace(accvideo, name="accvideo_no_gan", about="along the paths alone", recipe="accvideo_lab_no_gan")
    return accvideo, replace(alone, iterations=440, against=("accvideo",))


def _stepped(asd: Column) -> tuple[Column, ...]:
    """ASD: what its discriminator adds. Fewer steps of these students, with FFE and without: benchmarks/asd_steps.py."""
    alone = replace(asd, name="asd_dmd", about="one student for 1 to 4, by DMD alone", recipe=HERE + "asd_dmd")
    return asd, replace(alone, against=("asd",))


# ---------------------------------------------------------------------------------------------- variants


def redmd_1() -> Config:
    """Beta 1."""
    return _beta(1.0)


def redmd_fifth() -> Config:
    """Beta 1/5."""
    return _beta(0.2)


def transport() -> Config:
    """DMD with transport in its direction and no discriminator."""
    return dmd_lab().changed("dmd", transport=TransportConfig(rho=RHO, eps=0.5))


def tdm_untold() -> Config:
    """TDM without the end of the step among its inputs."""
    return replace(tdm_lab(), rollout=Intervals(counts=(1, 2, 4), told=False))


def tdm_for_4() -> Config:
    """TDM of 4 steps."""
    return _alone(4)


def tdm_for_2() -> Config:
    """TDM of 2 steps."""
    return _alone(2)


def tdm_for_1() -> Config:
    """TDM of 1 step."""
    return _alone(1)


def asd_dmd() -> Config:
    """ASD's levels and numbers of steps without its discriminator."""
    config = asd_lab()
    student, fake_score, _ = config.plan
    objectives = {name: one for name, one in config.objectives.items() if name != "asd"}
    optimizers = {name: one for name, one in config.optimizers.items() if name != "critic"}
    return replace(config, plan=(replace(student, by="dmd"), fake_score), objectives=objectives, optimizers=optimizers)


def _beta(beta: float) -> Config:
    base = redmd_lab()
    weights = base.objectives["dmd"].weights  # type: ignore[attr-defined]
    return base.changed("dmd", weights=replace(weights, beta=beta))


def _alone(count: int) -> Config:
    return replace(tdm_lab(), sigmas=levels_of(tdm_lab().sigmas, count), rollout=Intervals(counts=(count,), told=False))
