"""Recipes at the size of the test family; everything else as in the lab's."""

import os
from dataclasses import replace

from mogan import recipes
from mogan.config import Config


def shrink(config: Config) -> Config:
    plan = tuple(replace(u, batch=2, times=min(u.times, 2)) for u in config.plan)
    gan = config.gan and replace(
        config.gan,
        blocks=3,
        taps=(0, 1, 2),
        window=2,
        starts=(0, 1),
        flow=os.environ["MOGAN_TEST_RAFT"],
        flow_iterations=2,
    )
    surrogate = config.surrogate and replace(config.surrogate, width=8, blocks=1, pairs=4)
    pairs = config.shift and replace(
        config.shift, points=5, width=16, depth=1, heads=2, flow=os.environ["MOGAN_TEST_RAFT"], flow_iterations=1
    )
    return replace(
        config,
        plan=plan,
        shift=pairs,
        gan=gan,
        surrogate=surrogate,
        iterations=3,
        save_every=1,
        sample_every=100,
        sample_prompts=0,
        precision="fp32",
    )


def mogan() -> Config:
    return shrink(recipes.mogan_lab())


def surrogate() -> Config:
    return shrink(recipes.mogan_surrogate_lab())


def dmd() -> Config:
    return shrink(recipes.dmd_lab())


def msm() -> Config:
    return shrink(recipes.msm_lab())


def mogan_msm() -> Config:
    return shrink(recipes.mogan_msm_lab())


def motion_score() -> Config:
    config = recipes.motion_score_lab()
    windows = ((1, 3), (0, 3), (2, 1))  # of the test family's 4 latent frames
    return shrink(replace(config, motion_score=replace(config.motion_score, windows=windows)))


def flow_matching() -> Config:
    return shrink(recipes.flow_matching_lab())


def wan() -> Config:
    """The full-size recipe with batches, depth and window that a CPU bears."""
    config = recipes.mogan_wan_1_3b()
    assert config.gan is not None
    plan = tuple(replace(u, batch=2, accumulate=2, times=1) for u in config.plan)
    gan = replace(
        config.gan,
        blocks=2,
        taps=(0, 1),
        window=2,
        starts=(0, 1),
        flow=os.environ["MOGAN_TEST_RAFT"],
        flow_iterations=2,
    )
    return replace(config, plan=plan, gan=gan, iterations=2, save_every=1, sample_every=2, sample_prompts=1)


def sft_i2v() -> Config:
    return shrink(recipes.sft_i2v_lab())


def shift() -> Config:
    config = shrink(recipes.shift_lab())
    warm, student, refresh = config.plan
    plan = (replace(warm, stop=1, times=1), replace(student, start=1), replace(refresh, start=1, every=2, times=1))
    return replace(config, plan=plan, sigmas=(1.0, 0.5))
