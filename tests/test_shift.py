"""SHIFT: pixel flux, rewards, advantages, the hybrid loss, and the loop that refreshes the rewards."""

import json
import runpy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mogan.config import Update
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser
from mogan.motion.flow import RaftFlow
from mogan.motion.pixel_flux import (
    Flux,
    PixelFlux,
    Tracks,
    chain_flow,
    correlation,
    flux_maps,
    mismatch,
    sample_at,
    state_size,
    track_states,
)
from mogan.objectives.flow_matching import velocity_error
from mogan.objectives.rewards import MotionRewards
from mogan.objectives.shift import Pairs, Shift, advantages, pair_weights
from mogan.recipes import shift_lab, shift_wan_1_3b
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.sampling.rollout import animate
from mogan.schedule import draw_sigma
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, split, step
from mogan.world.scenes import exact_flow, make_scene, owner
from tiny_recipes import shift

TEXT = torch.zeros(1, 2, 8)


# ------------------------------------------------------------------------------------------------ pixel flux


def lab_scene(kind, faster_than=0.0):
    return next(
        s
        for i in range(200)
        if (s := make_scene(5, i, motion="rich")).kind == kind and len(s.sprites) == 1 and s.speed > faster_than
    )


def both_ways(scene):
    turned = tuple(replace(s, centres_F2=s.centres_F2[::-1], angles_F=s.angles_F[::-1]) for s in scene.sprites)
    back = exact_flow(replace(scene, sprites=turned, camera_F2=scene.camera_F2[::-1]))[0][::-1].copy()
    return (torch.from_numpy(f).transpose(0, 1)[None] for f in (exact_flow(scene)[0], back))


def true_path(scene, start_2):
    """Where the surface point under ``start`` is in every frame, from the poses alone."""
    sprite, (x, y) = scene.sprites[0], start_2 - scene.sprites[0].centres_F2[0]
    turn = sprite.angles_F - sprite.angles_F[0]
    turned = np.stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y], 1)
    return sprite.centres_F2 + turned


@pytest.mark.parametrize("kind", ["linear", "falling", "rotating"])
def test_chained_flow_follows_the_labs_exact_trajectories(kind):
    scene = lab_scene(kind)
    starts = scene.sprites[0].centres_F2[0] + np.array([[0.0, 0.0], [1.5, 0.5], [-0.5, 1.5]])
    found = chain_flow(*both_ways(scene), torch.from_numpy(starts).float()[None])
    truth = np.stack([true_path(scene, s) for s in starts], 1)
    np.testing.assert_allclose(found.points_BFN2[0], truth, atol=0.02)
    assert found.visible_BFN.all()
    assert (found.confidence_BFN > 0.9).all()


def test_a_point_that_something_passes_over_is_lost_for_good():
    scene = lab_scene("linear", faster_than=1.5)
    owners = np.stack([owner(scene, t) for t in range(scene.frames)])
    covered = (owners[0] == -1) & (owners[-1] == 0)
    y, x = (axis[0] for axis in np.nonzero(covered))
    when = int(np.argmax(owners[:, y, x] == 0))
    tracks = chain_flow(*both_ways(scene), torch.tensor([[[float(x), float(y)]]]))
    seen = tracks.visible_BFN[0, :, 0]
    assert abs(int(seen.argmin()) - when) <= 1
    assert seen[: seen.argmin()].all()
    assert not seen[seen.argmin() :].any()


def test_a_point_that_leaves_the_picture_is_lost():
    flow = torch.zeros(1, 2, 4, 8, 8)
    flow[:, 0] = 3.0
    tracks = chain_flow(flow, -flow, torch.tensor([[[2.0, 3.0], [6.0, 3.0]]]))
    assert tracks.points_BFN2[0, :, 0, 0].tolist() == [2, 5, 8, 11, 14]
    assert tracks.visible_BFN[0].T.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_where_nothing_moves_the_way_there_and_back_may_miss_by_the_root_of_a_half():
    still = torch.zeros(1, 2, 1, 4, 4)
    back = still.clone()
    back[:, 0] = 0.6
    miss, allowed = mismatch(still, back)
    torch.testing.assert_close(miss, torch.full_like(miss, 0.36))
    torch.testing.assert_close(allowed, torch.full_like(allowed, 0.5 + 0.01 * 0.36))


def test_maps_are_the_residual_of_transport_and_the_confidence_of_flow():
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 3, 3, 8, 8)).astype(np.float32)
    flow, back = (rng.integers(-2, 3, (1, 2, 2, 8, 8)).astype(np.float32) for _ in range(2))
    maps = flux_maps(*map(torch.from_numpy, (video, flow, back))).numpy()
    for t in range(2):
        for y in range(8):
            for x in range(8):
                u, v = flow[0, :, t, y, x]
                to = np.clip(int(y + v), 0, 7), np.clip(int(x + u), 0, 7)
                residual = video[0, :, t + 1, to[0], to[1]] - video[0, :, t, y, x]
                missed = np.hypot(*(flow[0, :, t, y, x] + back[0, :, t, to[0], to[1]]))
                np.testing.assert_allclose(maps[0, :3, t, y, x], residual, atol=2e-5)
                np.testing.assert_allclose(maps[0, 3, t, y, x], np.exp(-missed), atol=2e-5)


def test_correlation_is_the_cosine_of_centred_patches_one_frame_later():
    rng = np.random.default_rng(1)
    video = rng.uniform(-1, 1, (1, 3, 2, 16, 16)).astype(np.float32)
    here, there = (7, 8), (9, 6)  # x, y
    points = torch.tensor([[[here], [there]]], dtype=torch.float32)
    found = correlation(torch.from_numpy(video), points)[0, 0, 0].numpy()

    def patch(t, x, y):
        p = video[0, :, t, y - 1 : y + 2, x - 1 : x + 2].ravel()
        p = p - p.mean()
        return p / (np.linalg.norm(p) + 0.05)

    expected = [patch(0, *here) @ patch(1, there[0] + i, there[1] + j) for j in (-2, 0, 2) for i in (-2, 0, 2)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_points_row_holds_drift_visibility_confidence_correlation_and_start():
    rng = np.random.default_rng(2)
    points = torch.from_numpy(rng.uniform(0, 30, (2, 5, 3, 2))).float()
    visible, confidence = torch.rand(2, 2, 5, 3)
    video = torch.rand(2, 3, 5, 30, 40)
    rows = track_states(video, Tracks(points, visible, confidence))
    assert rows.shape == (2, 3, state_size(5))
    state = rows[1, 2, :20].view(5, 4).numpy()
    drift = np.diff(points[1, :, 2].numpy(), axis=0, prepend=points[1, :1, 2].numpy()) * 100 / 50  # diagonal 50
    np.testing.assert_allclose(state[:, :2], drift, atol=1e-5)
    np.testing.assert_allclose(state[:, 2:], np.stack([visible[1, :, 2], confidence[1, :, 2]], 1))
    np.testing.assert_allclose(rows[1, 2, 20:-2].view(4, 9), correlation(video, points)[1, :, 2])
    np.testing.assert_allclose(rows[1, 2, -2:], 2 * points[1, 0, 2].numpy() / np.array([39, 29]) - 1, atol=1e-6)


def test_another_tracker_is_one_callable(family):
    asked = []

    def tracker(video, queries):
        asked.append(queries)
        still = queries[:, None].expand(-1, video.shape[2], -1, -1)
        return Tracks(still, torch.ones(still.shape[:3]), torch.ones(still.shape[:3]))

    from mogan.models.wan import load_vae
    from mogan.motion.estimators import load_flow

    flow = load_flow(str(family / "raft"), 1)
    see = PixelFlux(load_vae(family / "teacher", torch.float32), flow, tracker)
    flux = see(torch.randn(1, 4, 2, 4, 4), torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]))
    assert torch.equal(asked[0], torch.tensor([[[0.0, 31.0], [15.5, 15.5]]]))
    assert flux.maps_BCFHW.shape == (1, 4, 4, 32, 32)
    assert flux.states_BND.shape == (1, 2, state_size(5))
    assert not flux.maps_BCFHW.requires_grad
    assert isinstance(flow, RaftFlow)


@given(st.floats(0, 6), st.floats(0, 6))
@settings(max_examples=20)
def test_sampling_a_linear_map_is_exact(x, y):
    ramp = torch.arange(7.0).view(1, 1, 1, 7) + 10 * torch.arange(7.0).view(1, 1, 7, 1)
    found = sample_at(ramp, torch.tensor([[[x, y]]]))
    assert float(found) == pytest.approx(x + 10 * y, abs=1e-3)


# ------------------------------------------------------------------------------------------------ rewards


def tiny_rewards(size=(5, 8, 8), clip=(-4.0, 4.0)):
    torch.manual_seed(0)
    return MotionRewards(size, patch=(2, 4, 4), width=16, depth=1, heads=2, clip=clip)


def random_flux(batch=2, points=6):
    return Flux(
        torch.randn(batch, 4, 4, 8, 8), torch.randn(batch, points, state_size(5)), torch.randn(batch, 2, 4, 8, 8)
    )


def test_the_reward_is_the_mean_of_clipped_raw_logits(monkeypatch):
    rewards = tiny_rewards(clip=(-4.0, 2.0))
    monkeypatch.setattr(rewards, "forward", lambda maps, states: torch.tensor([[-9.0, 1.0], [3.0, 0.5]]))
    assert rewards.reward(torch.empty(0), torch.empty(0)).tolist() == [(-4.0 + 1.0) / 2, (2.0 + 0.5) / 2]


def test_maps_are_cut_into_patches_and_points_are_a_set():
    rewards, flux, seen = tiny_rewards(), random_flux(), []
    hook = rewards.instantaneous.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        logits = rewards(flux.maps_BCFHW, flux.states_BND)
        shuffled = rewards(flux.maps_BCFHW, flux.states_BND.flip(1))
    hook.remove()
    torch.testing.assert_close(logits, shuffled)
    patch = flux.maps_BCFHW[1, :, 2:4, 0:4, 4:8]  # second of 2 in time, first row, second column
    torch.testing.assert_close(seen[0][1, 2 * 2 + 1], patch.flatten())
    assert seen[0].shape == (2, 8, 4 * 2 * 4 * 4)


# ------------------------------------------------------------------------------------------------ advantages


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=12), st.floats(-3, 3))
@settings(max_examples=50)
def test_advantages_are_recentred_on_the_generated_alone(values, constant):
    half = len(values) // 2
    made, real = np.array(values[:half]), np.array(values[half : 2 * half])
    found = advantages(torch.from_numpy(made), torch.from_numpy(real)).numpy()
    np.testing.assert_allclose(found, np.stack([made - made.mean(), real - made.mean()], 1), atol=1e-12)
    moved = advantages(torch.from_numpy(made + constant), torch.from_numpy(real + constant)).numpy()
    np.testing.assert_allclose(moved, found, atol=1e-9)
    larger = advantages(torch.from_numpy(10 * made), torch.from_numpy(10 * real)).numpy()
    np.testing.assert_allclose(larger, 10 * found, atol=1e-9)  # no division by the deviation
    other = advantages(torch.from_numpy(made), torch.from_numpy(real + 7)).numpy()
    np.testing.assert_allclose(other[:, 0], found[:, 0], atol=1e-12)


def test_weights_are_the_gibbs_tilt_or_the_floored_advantage():
    a = torch.tensor([-6.0, 0.0, 1.0])
    np.testing.assert_allclose(pair_weights(a, "exp", 2.0), np.exp(np.array([-3, 0, 0.5])), rtol=1e-6)
    assert pair_weights(a, "linear", 2.0).tolist() == [-1.0, 0.0, 0.5]


# ------------------------------------------------------------------------------------------------ the objective


class Linear(nn.Module):
    """A transformer's stand-in whose velocity is known: ``a x + b sigma`` of each place."""

    config = SimpleNamespace(patch_size=(1, 1, 1))

    def __init__(self, a=0.5, b=0.1):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x, timestep, text, return_dict=False):
        shape = (1, 1, 1) if timestep.ndim == 1 else x.shape[2:]
        level = timestep.view(len(x), 1, *shape) / 1000
        return (self.a * x + self.b * level,)


class Brightness(nn.Module):
    """Rewards whose logits are known: two multiples of a clip's mean."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([1.0, 3.0]))

    def forward(self, maps, states):
        return maps.mean((1, 2, 3, 4))[:, None] * self.slopes

    def reward(self, maps, states):
        return self(maps, states).clamp(-4, 4).mean(1)


def stand_in(**changes):
    settings = replace(shift_lab().objectives["shift"], points=4, weight="exp", beta=2.0)
    run = {"sigmas": changes.pop("sigmas", (1.0, 0.6)), "given": changes.pop("given", 1)}
    run |= {"average": changes.pop("average")} if "average" in changes else {}
    student, rewards = Denoiser(Linear()), Brightness()
    see = lambda x, queries: Flux(x, queries, x[:, :2])  # noqa: E731
    return Shift(student, rewards, see, TEXT, replace(settings, **changes), **run), student, rewards


def real_batch(size=4):
    clips = torch.randn(size, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return Batch([str(i) for i in range(size)], [""] * size, [torch.zeros(1, 8)] * size, latent_BCFHW=clips)


def test_image_to_video_is_euler_from_a_first_frame_that_stays():
    torch.manual_seed(1)
    noise, first, levels = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 1, 4, 4), []
    model = Linear(0.3, 0.2)
    model.register_forward_pre_hook(lambda m, a: levels.append(a[1].view(2, 3, 4, 4)[:, :, 0, 0]))
    found = animate(Denoiser(model), noise, first, TEXT, TEXT, (1.0, 0.6), 1.0)
    assert torch.equal(found[:, :, :1], first)
    x = noise[:, :, 1:]
    for s, following in ((1.0, 0.6), (0.6, 0.0)):
        x = x + (following - s) * (0.3 * x + 0.2 * s)
    torch.testing.assert_close(found[:, :, 1:], x)
    torch.testing.assert_close(levels[1], torch.tensor([[0.0, 600.0, 600.0]] * 2))


def test_given_frames_are_clean_at_level_zero_and_do_not_count():
    model, seen = Linear(0.3, 0.2), []
    model.register_forward_pre_hook(lambda m, a: seen.append(a))
    x0, noise, sigma = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4), torch.tensor([0.8, 0.3])
    found = velocity_error(Denoiser(model), x0, noise, sigma, TEXT, given=1)
    assert torch.equal(seen[0][0][:, :, :1], x0[:, :, :1])
    assert (seen[0][1].view(2, 3, 16)[:, 0] == 0).all()
    s = sigma.view(2, 1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise
    squares = (0.3 * x_t + 0.2 * s - (noise - x0)).square()
    torch.testing.assert_close(found, squares[:, :, 1:].mean((1, 2, 3, 4)))
    whole = velocity_error(Denoiser(model), x0, noise, sigma, TEXT, given=0)  # text to video
    torch.testing.assert_close(whole, squares.mean((1, 2, 3, 4)))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_baseline_is_that_of_the_whole_batch_however_it_is_split(most):
    objective, _, _ = stand_in()
    pairs = objective.sample(real_batch(), torch.Generator().manual_seed(1), most).more["pairs"]
    made, real = (2 * x.numpy().mean((1, 2, 3, 4)) for x in (pairs.generated_BCFHW, pairs.real_BCFHW))
    expected = np.stack([made - made.mean(), real - made.mean()], 1)
    np.testing.assert_allclose(pairs.advantage_B2, expected, atol=1e-5)
    assert torch.equal(pairs.real_BCFHW, real_batch().latent_BCFHW)
    assert torch.equal(pairs.generated_BCFHW[:, :, :1], pairs.real_BCFHW[:, :, :1])  # the same first frame
    assert not torch.equal(pairs.generated_BCFHW, pairs.real_BCFHW)


def test_a_pair_is_observed_in_order_and_followed_from_the_same_random_points():
    objective, _, _ = stand_in()
    pairs = objective.sample(real_batch(3), torch.Generator(), 3).more["pairs"]
    assert torch.equal(pairs.maps_B2CFHW, torch.stack([pairs.generated_BCFHW, pairs.real_BCFHW], 1))
    assert torch.equal(pairs.states_B2ND[:, 0], pairs.states_B2ND[:, 1])
    assert len(pairs.states_B2ND[:, 0].unique()) == 3 * 4 * 2


def pairs_of(made, real, advantage):
    both = torch.stack([made, real], 1)
    return Pairs(made, real, advantage, both, torch.zeros(len(made), 2, 4, 2))


@pytest.mark.parametrize("form", ["exp", "linear"])
def test_the_loss_weighs_both_halves_and_a_pair_shares_level_and_noise(form):
    objective, student, _ = stand_in(weight=form)
    seen = []
    made, real = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    batch = replace(real_batch(2), more={"pairs": pairs_of(made, real, torch.tensor([[1.0, 3.0], [-1, 2]]))})
    student.transformer.register_forward_pre_hook(lambda m, a: seen.append(a))
    loss, _ = objective.student_loss(None, batch, torch.Generator().manual_seed(4))

    g = torch.Generator().manual_seed(4)
    u = torch.rand(2, generator=g).double().numpy()
    s = (3 * u / (1 + 2 * u)).reshape(2, 1, 1, 1, 1)
    noise = torch.randn(2, 2, 3, 4, 4, generator=g).double().numpy()[:, :, 1:]

    def error(x0):
        x0 = x0.double().numpy()[:, :, 1:]
        x_t = (1 - s) * x0 + s * noise
        return np.square(0.5 * x_t + 0.1 * s - (noise - x0)).mean((1, 2, 3, 4))

    a = batch.more["pairs"].advantage_B2.double().numpy() / 2.0
    w = np.exp(a) if form == "exp" else np.maximum(a, -1)
    expected = (w[:, 0] * error(made) + w[:, 1] * error(real)).mean()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    levels = seen[0][1]
    assert torch.equal(levels[:2], levels[2:])
    x_t, level = seen[0][0], levels.view(4, 1, 3, 4, 4) / 1000
    clean = torch.cat([made, real])
    added = (x_t - (1 - level) * clean)[:, :, 1:] / level[:, :, 1:]
    torch.testing.assert_close(added[:2], added[2:], atol=1e-4, rtol=1e-4)


def test_shared_level_and_noise_make_the_difference_within_a_pair_less_noisy():
    objective, student, _ = stand_in(weight="linear", beta=1.0)
    torch.manual_seed(5)
    real = torch.randn(1, 2, 3, 4, 4)
    made = real + 0.3 * torch.randn(real.shape)  # the two of a pair resemble each other
    batch = replace(real_batch(1), more={"pairs": pairs_of(made, real, torch.tensor([[-1.0, 1.0]]))})
    parameters = list(student.parameters())

    def gradient(loss):
        return torch.stack(torch.autograd.grad(loss, parameters))

    shared, apart = [], []
    for seed in range(300):
        g = torch.Generator().manual_seed(seed)
        shared.append(gradient(objective.student_loss(None, batch, g)[0]))
        errors = [
            velocity_error(student, x, torch.randn(x.shape, generator=g), draw_sigma(1, g, k=3.0), TEXT, given=1)
            for x in (made, real)
        ]
        apart.append(gradient((errors[1] - errors[0]).mean()))
    shared, apart = torch.stack(shared), torch.stack(apart)
    assert (shared.var(0) < 0.5 * apart.var(0)).all()
    assert ((shared.mean(0) - apart.mean(0)).abs() < 4 * (apart.var(0) / 300).sqrt()).all()  # the same on average


def test_no_gradient_passes_between_student_and_rewards():
    objective, student, rewards = stand_in()
    batch = objective.sample(real_batch(), torch.Generator().manual_seed(1), 4)
    assert not any(getattr(batch.more["pairs"], field.name).requires_grad for field in fields(Pairs))
    objective.student_loss(None, batch, torch.Generator())[0].backward()
    assert all(p.grad is None for p in rewards.parameters())
    assert all(p.grad is not None for p in student.parameters())
    student.zero_grad(set_to_none=True)
    objective.judge_loss(None, batch, torch.Generator())[0].backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in rewards.parameters())


def test_rewards_learn_by_binary_cross_entropy():
    objective, _, rewards = stand_in()
    made, real = torch.randn(4, 2, 3, 4, 4), torch.randn(4, 2, 3, 4, 4)
    batch = replace(real_batch(), more={"pairs": pairs_of(made, real, torch.zeros(4, 2))})
    loss, _ = objective.judge_loss(None, batch, torch.Generator())
    logits = [x.mean((1, 2, 3, 4))[:, None] * rewards.slopes for x in (real, made)]
    each = [
        F.binary_cross_entropy_with_logits(logits[0][:, k], torch.ones(4))
        + F.binary_cross_entropy_with_logits(logits[1][:, k], torch.zeros(4))
        for k in (0, 1)
    ]
    torch.testing.assert_close(loss, sum(each) / 2)


# ------------------------------------------------------------------------------------------------ in the loop


def build(config, family, cache, run=None):
    start = str(family / "teacher")  # which is not made for the levels of another student
    return assemble(config, open_cache(cache), model=start, student=start, run=run, device="cpu")


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 4))
def test_an_update_happens_in_a_range_of_iterations(start, length, every):
    update = Update(learns="reward", by="shift", batch=2, start=start, stop=start + length, every=every)
    happened = [i for i in range(20) if update.happens(i)]
    assert happened == list(range(start, start + length, every))
    assert Update(learns="reward", by="shift", batch=2, start=start, every=every).happens(start + 7 * every)


def test_updates_of_an_iteration_share_pairs_and_the_next_iteration_samples_anew(family, cache):
    config = shift()
    parts, student, reward = build(config, family, cache), config.plan[1], config.plan[2]

    def pairs_of(update, where):
        drawn = draw(parts, where)
        return parts.objectives["shift"].prepare(
            drawn, iteration=where.iteration, generator=where.generators(2, drawn), most=2
        )

    first = pairs_of(student, Position(0, 1, 1, 0))
    assert pairs_of(student, Position(0, 1, 1, 1)) is first
    assert pairs_of(reward, Position(0, 1, 2, 0)) is first  # the newest on-policy samples
    again = pairs_of(student, Position(0, 2, 1, 0))
    assert not torch.equal(again.more["pairs"].generated_BCFHW, first.more["pairs"].generated_BCFHW)
    pieces = split(first, 2)
    assert [p.ids for p in pieces] == [first.ids[:1], first.ids[1:]]
    for field in fields(Pairs):
        whole = getattr(first.more["pairs"], field.name)
        assert torch.equal(torch.cat([getattr(p.more["pairs"], field.name) for p in pieces]), whole)


def test_rewards_warm_up_then_refresh_every_m_and_a_resumed_run_is_the_same(family, cache, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    config = replace(shift(), iterations=4)
    for run, stops in ((whole, (4,)), (halves, (2, 4))):
        (run / "checkpoints").mkdir(parents=True)
        for stop in stops:
            run_training(build(replace(config, iterations=stop), family, cache, run), run)
    lines = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (whole, halves)]
    told = [(line["iteration"], line["update"]) for line in lines[0]]
    assert told == [
        (0, "reward<shift"),
        (1, "student<shift"), (1, "student<shift"), (1, "reward<shift"),
        (2, "student<shift"), (2, "student<shift"),
        (3, "student<shift"), (3, "student<shift"), (3, "reward<shift"),
    ]  # fmt: skip
    drop = [[{k: v for k, v in line.items() if k not in ("seconds", "core_seconds")} for line in log] for log in lines]
    assert drop[0] == drop[1]
    for part in ("student", "reward", "ema"):
        one, two = (load_part(latest_checkpoint(run), part) for run in (whole, halves))
        assert one
        assert all(torch.equal(v, two[k]) for k, v in one.items()), part


def test_one_clip_has_no_baseline(family, cache):
    config = shift()
    alone = tuple(replace(update, batch=1, accumulate=1) for update in config.plan)
    with pytest.raises(UserError, match="--batch 2"):
        build(replace(config, plan=alone), family, cache)


def test_a_pair_does_not_depend_on_its_neighbours_and_the_baseline_is_averaged_over_processes():
    objective, _, _ = stand_in(average=lambda mean: mean + 1.0)
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    whole = objective.sample(real_batch(), generators(), 4).more["pairs"]
    alone = objective.sample(real_batch(), generators(), 1).more["pairs"]
    for field in fields(Pairs):
        torch.testing.assert_close(getattr(whole, field.name), getattr(alone, field.name))
    rewards = 2 * whole.generated_BCFHW.mean((1, 2, 3, 4))
    torch.testing.assert_close(whole.advantage_B2[:, 0], rewards - rewards.mean() - 1.0)


def test_clips_that_do_not_split_into_patches_are_refused(family, cache):
    config = shift()
    with pytest.raises(UserError, match=r"shift\.patch"):
        build(config.changed("shift", patch=(5, 8, 8)), family, cache)


def test_student_update_moves_with_its_weights_alone(family, cache):
    config = shift()
    parts = build(config, family, cache)
    record = step(parts, Position(0, 1, 1, 0))
    assert {"reward", "real_reward", "motion", "weight", "real_weight"} <= set(record)
    assert all(p.grad is None for p in parts.networks["reward"].parameters())


# Wan2.1-T2V-1.3B, and Wan2.2-TI2V-5B whose first-frame conditioning this is (transformer/config.json of each)
SIZES = {
    "1.3B": ({"num_attention_heads": 12, "ffn_dim": 8960}, (16, 21, 60, 104)),
    "TI2V-5B": (
        {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        (48, 21, 30, 52),
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_models_take_a_level_per_frame(name):
    from diffusers import WanTransformer3DModel

    from mogan.models.attention import set_attention

    changes, shape = SIZES[name]
    with FakeTensorMode():
        denoiser = Denoiser(set_attention(WanTransformer3DModel(**changes, num_layers=2)))
        x, text = torch.randn(1, *shape), torch.randn(1, 20, 4096)
        assert velocity_error(denoiser, x, x, torch.rand(1), text, given=1).shape == (1,)


def test_full_size_rewards_take_the_recipes_clips():
    s = shift_wan_1_3b().objectives["shift"]
    with torch.device("meta"):
        rewards = MotionRewards((81, 480, 832), patch=s.patch, width=s.width, depth=1, heads=s.heads, clip=s.clip)
        maps, states = torch.randn(1, 4, 80, 480, 832), torch.randn(1, s.points, state_size(81))
        assert rewards.reward(maps, states).shape == (1,)


@pytest.mark.slow
def test_rewards_speed_a_still_student_up_and_are_cheated_when_they_are_frozen():
    here = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "shift_speeds.py"))
    start = here["collapsed"](0, updates=1000)
    names = ("fine-tuning", "SHIFT, linear", "SHIFT, exp", "SHIFT, linear, frozen", "SHIFT, exp, frozen")
    tuned, linear, exp, *frozen = [here["run"](name, start, 100, seed=0) for name in names]
    above = "reward above real clips'"
    assert tuned[0]["fast"] < 0.1
    for fresh in (linear, exp):
        assert fresh[2]["fast"] > tuned[2]["fast"]  # after 40 updates; half of the real clips are fast
        assert 0.35 < fresh[-1]["fast"] < 0.75
        assert fresh[-1]["distance"] < tuned[0]["distance"] / 2
        assert fresh[-1][above] < 0.2
    for cheated in frozen:
        assert cheated[-1]["fast"] > 0.9
        assert cheated[-1]["distance"] > tuned[0]["distance"]  # worse than at the start,
        assert cheated[-1][above] > 0.5  # and rewarded more than what is real
