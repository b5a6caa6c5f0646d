from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mogan import schedule

levels = st.floats(0.001, 0.999)
factors = st.floats(0.2, 12.0)


@given(levels, factors)
def test_shift_inverts_and_stays_inside(sigma, k):
    moved = schedule.shift(sigma, k)
    assert 0 < moved < 1
    assert schedule.shift(moved, 1 / k) == pytest.approx(sigma, rel=1e-9)
    assert (moved >= sigma) == (k >= 1) or moved == pytest.approx(sigma)


@given(levels, factors, factors)
def test_shifts_compose_by_multiplication(sigma, a, b):
    assert schedule.shift(schedule.shift(sigma, a), b) == pytest.approx(schedule.shift(sigma, a * b), rel=1e-9)


@given(st.integers(1, 8), factors)
def test_shifted_levels_fall_from_one(steps, k):
    found = schedule.shifted_levels(steps, k)
    assert found[0] == 1.0
    assert all(a > b > 0 for a, b in pairwise(found))


def test_known_level_lists():
    np.testing.assert_allclose(schedule.shifted_levels(4, 5.0), [1.0, 0.9375, 0.83333333, 0.625], atol=1e-8)
    np.testing.assert_allclose(schedule.shifted_levels(4, 8.0), [1.0, 0.96, 0.88888889, 0.72727273], atol=1e-8)


@given(levels, st.integers(0, 2**31))
@settings(max_examples=30)
def test_velocity_and_x0_are_two_views_of_one_prediction(sigma, seed):
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 3, 2, 2, 2, generator=g, dtype=torch.float64)
    s = torch.full((2,), sigma, dtype=torch.float64)
    x_t = schedule.add_noise(x0, noise, s)
    np.testing.assert_allclose(x_t, (1 - sigma) * x0.numpy() + sigma * noise.numpy(), atol=1e-12)
    torch.testing.assert_close(schedule.velocity_to_x0(x_t, noise - x0, s), x0)


def test_levels_per_frame_noise_each_frame_by_its_own():
    x0, noise = torch.randn(2, 1, 2, 3, 4, 4).unbind(0)
    s = torch.tensor([[0.0, 0.5, 1.0]])
    x_t = schedule.add_noise(x0, noise, s)
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0])
    assert torch.equal(x_t[:, :, 2], noise[:, :, 2])


@given(st.floats(0.0, 0.6), st.floats(0.61, 0.95))
@settings(max_examples=20, deadline=None)
def test_renoising_has_the_marginals_of_direct_noising(u, t):
    g = torch.Generator().manual_seed(0)
    x0 = 1.5 + 0.5 * torch.randn(1, 1, 1, 1, 60000, generator=g, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    x_u = schedule.add_noise(x0, torch.randn(x0.shape, generator=g, dtype=torch.float64), u * one)
    x_t = schedule.renoise(x_u, torch.randn(x0.shape, generator=g, dtype=torch.float64), u * one, t * one)
    assert x_t.mean().item() == pytest.approx((1 - t) * 1.5, abs=0.02)
    assert x_t.var().item() == pytest.approx((1 - t) ** 2 * 0.25 + t**2, rel=0.03)
    covariance = ((x_t - x_t.mean()) * (x0 - x0.mean())).mean().item()
    assert covariance == pytest.approx((1 - t) * 0.25, abs=0.01)


@given(st.integers(0, 1000), factors)
@settings(max_examples=30)
def test_drawn_levels_are_shifted_then_clamped(seed, k):
    drawn = schedule.draw_sigma(64, torch.Generator().manual_seed(seed), low=0.02, high=0.98, k=k)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(seed)).double().numpy()
    np.testing.assert_allclose(drawn, np.clip(k * uniform / (1 + (k - 1) * uniform), 0.02, 0.98), rtol=1e-5)


def test_a_list_of_generators_draws_each_sample_by_itself():
    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    both = schedule.uniform(2, generators(1, 2), 3)
    assert both.shape == (2, 3)
    assert torch.equal(both[1:], schedule.uniform(1, generators(2), 3))
    levels = schedule.draw_sigma(2, generators(1, 2), low=0.02, high=0.98, k=3.0)
    assert torch.equal(levels[1:], schedule.draw_sigma(1, generators(2), low=0.02, high=0.98, k=3.0))
