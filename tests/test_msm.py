"""Motion score matching as a direction of DMD: its algebra, its gradient, and what it does to the path of learning."""

from dataclasses import asdict

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from mogan import recipes
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser
from mogan.objectives.dmd import DMD, DMDConfig, dmd_direction
from mogan.objectives.msm import motion_direction
from mogan.sampling.motion_score import centred_path, differences, differences_adjoint
from mogan.sampling.rollout import Rollout
from mogan.training.assemble import assemble
from tiny_recipes import dmd, msm

SIGMA = torch.tensor([0.3, 0.8])


def clips(seed=0, frames=5, dtype=torch.float64):
    return torch.randn(2, 3, frames, 2, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix(frames):
    """``D`` as a matrix, written down."""
    return np.eye(frames)[1:] - np.eye(frames)[:-1]


def along_time(operator, x):
    """A matrix applied to the frames of ``B C F H W``, in numpy."""
    return np.einsum("gf,bcfhw->bcghw", operator, np.asarray(x))


# ------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("frames", [2, 5, 21])
def test_differences_adjoint_and_pseudo_inverse_are_the_matrices(frames):
    d, x = matrix(frames), clips(1, frames)
    m = differences(x)
    np.testing.assert_allclose(m, along_time(d, x), atol=1e-12)
    np.testing.assert_allclose(differences_adjoint(m), along_time(d.T, m), atol=1e-12)
    np.testing.assert_allclose(centred_path(m), along_time(np.linalg.pinv(d), m), atol=1e-10)


@pytest.mark.parametrize("frames", [5, 21])
def test_a_frequency_is_multiplied_by_one_plus_lambda_two_minus_two_cosine(frames):
    for k in range(frames):
        wave = np.cos(np.pi * k * (np.arange(frames) + 0.5) / frames)  # the frequencies of a clip: DCT-II
        g = torch.from_numpy(wave).view(1, 1, -1, 1, 1)
        found = g + 0.7 * differences_adjoint(differences(g))
        torch.testing.assert_close(found, (1 + 0.7 * (2 - 2 * np.cos(np.pi * k / frames))) * g)


# ------------------------------------------------------------------------------------------- the direction


@given(st.floats(0.0, 20.0), st.integers(2, 9))
@settings(max_examples=25)
def test_closed_form_is_the_gradient_of_the_two_term_loss(weight, frames):
    x0, real, fake = (clips(i, frames) for i in range(3))
    g = dmd_direction(x0, real, fake, SIGMA)
    x = x0.clone().requires_grad_()
    motion = x[:, :, 1:] - x[:, :, :-1]
    aim = (x0 - g)[:, :, 1:] - (x0 - g)[:, :, :-1]
    loss = 0.5 * (x - (x0 - g)).square().sum() + weight * 0.5 * (motion - aim).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(motion_direction(weight)(x0, real, fake, SIGMA), gradient)


def test_score_differences_at_one_level_are_the_same_direction_up_to_a_factor():
    """Eq. 10 to 12 are written in scores; at one level per clip they differ from x0 predictions by a factor alone."""
    x0, real, fake, x_t = (clips(i) for i in range(4))
    s = SIGMA.view(-1, 1, 1, 1, 1).double()
    score = lambda clean: -(x_t - (1 - s) * clean) / s**2  # noqa: E731
    pulled = lambda v: v + 2.0 * along_time(matrix(5).T @ matrix(5), v)  # noqa: E731  (eq. 12 with lambda 2)
    literal = -torch.as_tensor(pulled(score(real) - score(fake)))
    ratio = literal / motion_direction(2.0)(x0, real, fake, SIGMA)
    for row in ratio:
        torch.testing.assert_close(row, row.flatten()[0].expand_as(row), rtol=1e-6, atol=0)
        assert row.flatten()[0] > 0


def test_what_does_not_move_is_left_alone():
    x0, real, fake = clips(), clips(1)[:, :, :1].expand(-1, -1, 5, -1, -1), clips(2)[:, :, :1].expand(-1, -1, 5, -1, -1)
    torch.testing.assert_close(
        motion_direction(9.0)(x0, real, fake, SIGMA), dmd_direction(x0, real, fake, SIGMA), atol=1e-12, rtol=0
    )


def test_features_identity_is_the_closed_form_and_linear_ones_are_their_matrices():
    x0, real, fake = (clips(i) for i in range(3))
    torch.testing.assert_close(
        motion_direction(1.5, lambda x: x)(x0, real, fake, SIGMA), motion_direction(1.5)(x0, real, fake, SIGMA)
    )
    mix = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = motion_direction(1.5, lambda x: torch.einsum("dc,bcfhw->bdfhw", mix, x))(x0, real, fake, SIGMA)
    g = dmd_direction(x0, real, fake, SIGMA).numpy()
    d = matrix(5)
    expected = g + 1.5 * np.einsum("dc,de,befhw->bcfhw", mix, mix, along_time(d.T @ d, g))
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_features_of_any_kind_give_the_slope_of_the_feature_space_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1)), nn.Tanh()).double()
    x0, real, fake, step = (clips(i) for i in range(4))
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
    with torch.no_grad():  # as DMD calls it
        found = motion_direction(2.0, net)(x0, real, fake, SIGMA) - dmd_direction(x0, real, fake, SIGMA)
        motion = lambda x: net(x)[:, :, 1:] - net(x)[:, :, :-1]  # noqa: E731
        aim = motion(x0) - (motion(fake) - motion(real)) / scale
        loss = lambda x: 2.0 * 0.5 * (motion(x) - aim).square().sum().item()  # noqa: E731
        slope = (loss(x0 + 1e-5 * step) - loss(x0 - 1e-5 * step)) / 2e-5
    assert (found * step).sum().item() == pytest.approx(slope, rel=1e-6)
    assert all(p.grad is None for p in net.parameters())
    assert not found.requires_grad


def test_a_level_per_frame_is_refused():
    x0 = clips()
    with pytest.raises(UserError, match=r"a level per frame: set motion_weight to 0"):
        motion_direction(1.0)(x0, x0 + 1, x0 - 1, torch.full((2, 5), 0.5))


class Waves(nn.Module):
    """A transformer's stand-in that knows frames apart: ``a_f x``."""

    def __init__(self, seed):
        super().__init__()
        self.a = nn.Parameter(torch.randn(1, 1, 5, 1, 1, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x, timestep, text, return_dict=False):
        return (self.a * x,)


def test_the_student_receives_the_motion_gradient_and_nobody_else_any():
    x0 = clips(5, dtype=torch.float32).requires_grad_()
    text, networks = torch.zeros(2, 3, 8), (Denoiser(Waves(0)), Denoiser(Waves(1)))
    gradients = []
    for direction in (dmd_direction, motion_direction(3.0)):
        objective = DMD(*networks, torch.zeros(1, 2, 8), DMDConfig(guidance=1.0, shift=1.0), direction=direction)
        loss, _ = objective.student_loss(Rollout(x0, 0, text), Batch([], [], []), torch.Generator().manual_seed(4))
        gradients.append(torch.autograd.grad(loss, x0)[0])
    operator = np.eye(5) + 3.0 * matrix(5).T @ matrix(5)
    np.testing.assert_allclose(gradients[1], along_time(operator, gradients[0]), rtol=1e-3, atol=1e-8)
    assert all(p.grad is None for network in networks for p in network.parameters())


# ------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("with_motion", "without"),
    [("msm_lab", "dmd_lab"), ("mogan_msm_lab", "mogan_lab"), ("msm_wan_1_3b", "dmd2_long_wan_1_3b")],
)
def test_recipes_differ_from_their_baseline_by_the_motion_weight_alone(with_motion, without):
    ours, base = (asdict(recipes.find_recipe(name)) for name in (with_motion, without))
    assert ours["objectives"]["dmd"].pop("motion_weight") == 1.0
    assert base["objectives"]["dmd"].pop("motion_weight") == 0.0
    changed = {key for key in ours if ours[key] != base[key]}
    assert changed == {"recipe"}


def test_full_size_recipe_holds_the_papers_numbers():
    config, warm = recipes.msm_wan_1_3b(), recipes.dmd2_wan_1_3b()
    assert len(config.sigmas) == 3
    student, fake_score = config.plan
    assert fake_score.times == 5 * student.times
    # the papers count updates of the fake score: 14000 where CausVid's own run has 1000
    assert [c.iterations * fake_score.times for c in (config, recipes.dmd2_long_wan_1_3b(), warm)] == [
        14000,
        14000,
        1000,
    ]
    assert {(o.lr, o.betas) for o in config.optimizers.values()} == {(2e-6, (0.9, 0.999))}


def test_the_weight_of_the_config_reaches_the_objective(family, cache):
    three = msm().changed("dmd", motion_weight=3.0)
    found = {}
    for config in (dmd(), three):
        parts = assemble(config, open_cache(cache), model=str(family / "teacher"), run=None, device="cpu")
        found[config.recipe] = parts.objectives["dmd"].judge.direction(clips(), clips(1), clips(2), SIGMA)
    expected = along_time(np.eye(5) + 3.0 * matrix(5).T @ matrix(5), found["dmd_lab"])
    np.testing.assert_allclose(found["msm_lab"], expected, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------- the path of learning


def expected_gradient(w, target, weight):
    """Mean gradient of DMD (unnormalised) for a linear generator ``x = w z`` of one-pixel clips, fake score exact.

    ``x0 = (1 - s) C ((1 - s)^2 C + s^2 I)^-1 x_t`` is the exact denoiser of a Gaussian of covariance ``C``; the mean is
    over ``z``, over the noise, and over levels.
    """
    frames, gradient = len(w), 0
    for s in (0.1, 0.3, 0.5, 0.7, 0.9):
        denoise = [
            (1 - s) * c @ torch.linalg.inv((1 - s) ** 2 * c + s**2 * torch.eye(frames).double())
            for c in (w @ w.T, target)
        ]
        gradient = gradient + (1 - s) * (denoise[0] - denoise[1]) @ w / 5
    columns = gradient.T.reshape(frames, 1, frames, 1, 1)
    return (columns + weight * differences_adjoint(differences(columns))).reshape(frames, frames).T


def cosines(frames):
    basis = np.cos(np.pi * np.outer(np.arange(frames), np.arange(frames) + 0.5) / frames)
    return torch.from_numpy(basis / np.linalg.norm(basis, axis=1, keepdims=True))


def half_times(weight, target_f, frames, steps=6000, rate=0.05):
    """When each frequency's deviation has gone half the way from a third of the target to the target."""
    basis = cosines(frames)
    target = basis.T @ torch.diag(target_f**2) @ basis
    w = basis.T @ torch.diag(target_f / 3) @ basis
    times = torch.full((frames,), torch.nan).double()
    for i in range(steps):
        w = w - rate * expected_gradient(w, target, weight)
        arrived = (basis @ w @ w.T @ basis.T).diagonal().sqrt() >= target_f * 2 / 3
        times = torch.where(arrived & times.isnan(), (i + 1) * rate, times)
        if not times.isnan().any():
            return times
    raise AssertionError("a frequency did not arrive")


def test_motion_weight_speeds_every_frequency_up_by_its_factor():
    frames, weight = 6, 1.0
    target = torch.tensor([2.0, 1.5, 1.2, 1.0, 0.9, 0.8]).double()
    plain, with_motion = half_times(0.0, target, frames), half_times(weight, target, frames)
    factor = 1 + weight * (2 - 2 * np.cos(np.pi * np.arange(frames) / frames))
    np.testing.assert_allclose(plain / with_motion, factor, rtol=0.03)


def test_motion_weight_does_not_move_the_fixed_point():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator).double()
    target = root @ root.T / 4 + 0.5 * torch.eye(4).double()  # no frequency is an eigenvector of it
    for weight in (0.0, 4.0):
        w = torch.eye(4).double()
        assert expected_gradient(w, target, weight).abs().max() > 0.01
        for _ in range(400):
            w = w - 0.5 * expected_gradient(w, target, weight)
        torch.testing.assert_close(w @ w.T, target, rtol=1e-3, atol=1e-3)
