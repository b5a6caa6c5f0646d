"""Recipes at the size of the test family; everything else as in the lab's."""

import json
import os
from dataclasses import replace
from pathlib import Path

from mogan import recipes
from mogan.config import Config
from mogan.models import host
from mogan.models.causal_cache import Causal, Policy
from mogan.objectives.relativistic import RelativisticConfig
from mogan.recipes.phased import alternating
from mogan.sampling.causal_rollout import Chunked
from mogan.terms import PATH
from mogan.training.load import find_models


def shrink(config: Config) -> Config:
    plan = tuple(replace(u, batch=2, times=min(u.times, 2)) for u in config.plan)
    raft = os.environ.get("MOGAN_TEST_RAFT", "set MOGAN_TEST_RAFT")
    smaller = {
        "gan": {"blocks": 3, "taps": (0, 1, 2), "window": 2, "starts": (0, 1), "flow": raft, "flow_iterations": 2},
        "surrogate": {"width": 8, "blocks": 1, "pairs": 4},
        "key_levels": {"block": 3, "clean_block": 1},
        "shift": {"points": 5, "width": 16, "depth": 1, "heads": 2, "flow": raft, "flow_iterations": 1},
    }
    objectives = {name: replace(block, **smaller.get(name, {})) for name, block in config.objectives.items()}
    return replace(
        config,
        plan=plan,
        objectives=objectives,
        iterations=3,
        save_every=1,
        sample_every=100,
        sample_prompts=0,
        precision="fp32",
    )


def start(config: Config, family: Path) -> str | None:
    """The folder of the test family that a recipe's student starts from; None where it is the base model."""
    if "kd" in config.objectives:
        return str(family / "sparse")
    if not config.post_trains:
        return None
    if config.causal is not None:
        return str(family / "causal")
    return str(family / ("student" if "gan" in config.objectives else "teacher"))


def data(config: Config, cache: Path, paths: Path) -> Path:
    """What a recipe trains on: clips, or a teacher's paths."""
    return paths if any(PATH in config.lesson(update).clips for update in config.plan) else cache


def places(config: Config, family: Path, cache: Path, student: str | None = None) -> str:
    """``run.json`` of a run that no command started: where its parts lie."""
    folder, begin, _ = find_models(config, str(family / "teacher"), student)
    return json.dumps({"model": str(folder), "student": str(begin), "data": str(cache)})


def accvideo() -> Config:
    return shrink(recipes.accvideo_lab())


def accvideo_wan() -> Config:
    """The full-size recipe with batches and depth that a CPU bears."""
    config = recipes.accvideo_wan_1_3b().changed("key_levels", block=1, clean_block=0)
    plan = tuple(replace(u, batch=2, accumulate=2) for u in config.plan)
    return replace(config, plan=plan, save_every=1, sample_every=100, sample_prompts=0)


def mogan() -> Config:
    return shrink(recipes.mogan_lab())


def offloaded() -> Config:
    host.LEAST = 0  # here everything goes to the host
    return replace(mogan(), checkpointing=True, offload=True)


def surrogate() -> Config:
    return shrink(recipes.mogan_surrogate_lab())


def of_four(config: Config) -> Config:
    """A clip for each of four processes."""
    return replace(config, plan=tuple(replace(u, batch=4) for u in config.plan))


def surrogate_of_four() -> Config:
    return of_four(surrogate())


def mogan_of_four() -> Config:
    return of_four(mogan())


def dmd() -> Config:
    return shrink(recipes.dmd_lab())


def msm() -> Config:
    return shrink(recipes.msm_lab())


def redmd() -> Config:
    return _two_clips(shrink(recipes.redmd_lab()))


def _two_clips(config: Config) -> Config:
    raft = os.environ.get("MOGAN_TEST_RAFT", "set MOGAN_TEST_RAFT")
    weights = replace(config.objectives["dmd"].weights, clips=2, flow=raft, flow_iterations=2)
    return config.changed("dmd", weights=weights)


def redmd_wan() -> Config:
    """The full-size recipe with batches that a CPU bears."""
    config = recipes.redmd_wan_1_3b()
    plan = tuple(replace(u, batch=2, accumulate=2, times=1) for u in config.plan)
    weights = replace(config.objectives["dmd"].weights, clips=2, flow=os.environ["MOGAN_TEST_RAFT"], flow_iterations=2)
    return replace(config, plan=plan, save_every=1, sample_prompts=0).changed("dmd", weights=weights)


def vdot() -> Config:
    config = shrink(recipes.vdot_lab()).changed("relativistic", taps=(1, 2, 3))
    return config.changed("dmd", transport=replace(config.objectives["dmd"].transport, iterations=20))


def vdot_wan() -> Config:
    """The full-size recipe with batches and depth that a CPU bears."""
    config = recipes.vdot_wan_1_3b().changed("relativistic", taps=(0, 1))
    plan = tuple(replace(u, batch=2, accumulate=2, times=1) for u in config.plan)
    return replace(config, plan=plan, save_every=1, sample_prompts=0)


def mogan_msm() -> Config:
    return shrink(recipes.mogan_msm_lab())


def motion_score() -> Config:
    config = recipes.motion_score_lab()
    windows = ((1, 3), (0, 3), (2, 1))  # of the test family's 4 latent frames
    return shrink(config.changed("motion_score", windows=windows))


def flow_matching() -> Config:
    return shrink(recipes.flow_matching_lab())


def wan() -> Config:
    """The full-size recipe with batches, depth and window that a CPU bears."""
    config = recipes.mogan_wan_1_3b()
    plan = tuple(replace(u, batch=2, accumulate=2, times=1) for u in config.plan)
    raft = os.environ["MOGAN_TEST_RAFT"]
    small = config.changed("gan", blocks=2, taps=(0, 1), window=2, starts=(0, 1), flow=raft, flow_iterations=2)
    return replace(small, plan=plan, iterations=2, save_every=1, sample_every=2, sample_prompts=1, keep=1)


def phased() -> Config:
    """Its phases an iteration or two long."""
    config = shrink(recipes.phased_lab())
    plan = tuple(replace(u, stop=1 if u.stop else None, start=1 if u.start else 0) for u in config.plan)
    return replace(config, plan=plan)


def phased_alternating() -> Config:
    return alternating(phased())


def phased_a14b() -> Config:
    config = recipes.phased_wan_a14b()
    plan = tuple(
        replace(u, batch=1, accumulate=1, times=1, stop=1 if u.stop else None, start=1 if u.start else 0)
        for u in config.plan
    )
    return replace(config, plan=plan, save_every=1, sample_prompts=0)


def asd() -> Config:
    return shrink(recipes.asd_lab()).changed("asd", critic=RelativisticConfig(taps=(1, 2, 3), shift=3.0))


def _windowed(config: Config) -> Config:
    """Under the window and the sink of Reward Forcing, which drop a chunk of four."""

    def kind(rollout):
        return rollout and replace(rollout, causal=replace(rollout.causal, policy=Policy(window=9, sink=3)))

    plan = tuple(replace(u, rollout=kind(u.rollout)) for u in config.plan)
    return replace(config, plan=plan, rollout=kind(config.rollout))


def asd_wan() -> Config:
    """The full-size recipe with batches and depth that a CPU bears, and a window."""
    config = recipes.asd_wan_1_3b().changed("asd", critic=RelativisticConfig(taps=(0, 1), shift=5.0))
    plan = tuple(replace(u, batch=2, accumulate=2, times=1) for u in config.plan)
    return _windowed(replace(config, plan=plan, save_every=1, sample_prompts=0))


def causal_teacher() -> Config:
    return shrink(recipes.causal_teacher_lab())


def causal_cd() -> Config:
    return shrink(recipes.causal_cd_lab())


def causal_ode() -> Config:
    return shrink(recipes.causal_ode_lab())


def llia() -> Config:
    """Chunks of two sizes from the second iteration on."""
    config = shrink(recipes.llia_lab()).changed("consistency", warm_up=1)
    return replace(config, rollout=Chunked(Causal(1, 1, sizes=(1, 2))))


def efficient_vdit_mcd() -> Config:
    return shrink(recipes.efficient_vdit_mcd_lab())


def efficient_vdit_kd() -> Config:
    return shrink(recipes.efficient_vdit_kd_lab())


def efficient_vdit_kd_teacher() -> Config:
    return shrink(recipes.efficient_vdit_kd_teacher_lab())


def self_forcing() -> Config:
    return shrink(recipes.self_forcing_lab())


def self_forcing_windowed() -> Config:
    """Chunks of one and two latents, a window that drops some, an EMA sink, noisy contexts."""
    how = Causal(1, 1, Policy(window=3, sink=1, decay=0.9, relative=True), 0.1)
    return replace(self_forcing(), rollout=Chunked(how))


def reward_forcing() -> Config:
    return _two_clips(shrink(recipes.reward_forcing_lab()))


def reward_forcing_wan() -> Config:
    """The full-size recipe with batches that a CPU bears; of 12 latents its window drops a chunk of four."""
    config = recipes.reward_forcing_wan_1_3b()
    plan = tuple(replace(u, batch=2, accumulate=2, times=1) for u in config.plan)
    return _two_clips(replace(config, plan=plan, save_every=1, sample_prompts=0))


def mogan_causal() -> Config:
    return shrink(recipes.mogan_causal_lab())


def mogan_causal_wan() -> Config:
    """The full-size recipe with batches, depth and window that a CPU bears."""
    config = recipes.mogan_causal_wan_1_3b()
    objectives = config.objectives | {"gan": wan().objectives["gan"]}
    return _windowed(replace(config, plan=wan().plan, objectives=objectives, save_every=1))


def msm_causal() -> Config:
    return shrink(recipes.msm_causal_lab())


def sft_i2v() -> Config:
    return shrink(recipes.sft_i2v_lab())


def vace() -> Config:
    return shrink(recipes.vace_lab())


def dmd_i2v() -> Config:
    return shrink(recipes.dmd_i2v_lab())


def mogan_i2v() -> Config:
    """With guidance: teacher and fake score begin alike, and without it the first update moves nothing."""
    return shrink(recipes.mogan_i2v_lab()).changed("dmd", guidance=3.0)


def shift() -> Config:
    config = shrink(recipes.shift_lab())
    warm, student, refresh = config.plan
    plan = (replace(warm, stop=1, times=1), replace(student, start=1), replace(refresh, start=1, every=2, times=1))
    return replace(config, plan=plan, sigmas=(1.0, 0.5))


def tdm() -> Config:
    return shrink(recipes.tdm_lab())


def tdm_wan() -> Config:
    config = recipes.tdm_wan_1_3b()
    plan = tuple(replace(u, batch=2, accumulate=2) for u in config.plan)
    return replace(config, plan=plan, iterations=2, save_every=1, sample_every=2, sample_prompts=1)
