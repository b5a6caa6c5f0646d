"""Kinds of rollout: what they hand over, and that distribution matching starts from where it lies."""

import math
from dataclasses import replace

import pytest
import torch

from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.models.denoiser import Denoiser
from mogan.objectives.dmd import DMD, DMDConfig, target
from mogan.runs.checkpoint import latest_checkpoint
from mogan.sampling.rollout import Euler, FewStep, Rollout, roll_out
from mogan.schedule import add_noise, draw_between, renoise
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from tiny_recipes import dmd

TEXT = torch.zeros(1, 2, 8)
BATCH = Batch([], [], [])


class Gaussian(torch.nn.Module):
    """The exact velocity for data ``N(mean, deviation^2)``, every number on its own."""

    def __init__(self, mean=0.7, deviation=0.5):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.deviation, self.calls = deviation, []

    def velocity(self, x, sigma, text):
        s = sigma.view(-1, 1, 1, 1, 1)
        variance = (1 - s) ** 2 * self.deviation**2 + s**2
        gap = x - (1 - s) * self.mean
        self.calls.append(torch.is_grad_enabled())
        return s / variance * gap - (self.mean + (1 - s) * self.deviation**2 / variance * gap)

    def forward(self, x, sigma, text):
        return x - sigma.view(-1, 1, 1, 1, 1) * self.velocity(x, sigma, text)


def at_the_marginal_of(level, x):
    deviation = math.sqrt((1 - level) ** 2 * 0.25 + level**2)
    middle = x.mean().item() == pytest.approx((1 - level) * 0.7, abs=0.01)
    return middle and x.std().item() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("stop", [150, 300])
def test_euler_reaches_the_marginal_of_the_level_where_it_stops(stop):
    sigmas = tuple(1 - i / 300 for i in range(300))
    student, noise = Gaussian(), torch.randn(1, 1, 1, 1, 40000, generator=torch.Generator().manual_seed(0))
    kind = Euler(stop=stop)
    made = kind.make(student, noise, TEXT, sigmas, torch.Generator(), kind.draw(sigmas, None), False)
    level = 1 - stop / 300
    assert made.level == pytest.approx(level)
    assert made.interval == ((level + 0.02, 1.0) if stop < 300 else (0.0, 1.0))
    assert at_the_marginal_of(level, made.sample_BCFHW)
    # and what fails: a neighbouring level, and fresh noise between the steps, which narrows what is made
    assert not at_the_marginal_of(level + 0.05, made.sample_BCFHW)
    drawn = torch.Generator().manual_seed(1)
    fresh = FewStep().make(student, noise, TEXT, sigmas, drawn, stop - 1, False).sample_BCFHW
    assert not at_the_marginal_of(level, add_noise(fresh, torch.randn_like(fresh), torch.tensor([level])))


def test_gradient_flows_through_the_last_step_alone_and_nothing_is_drawn():
    student, noise, sigmas = Gaussian(), torch.randn(2, 1, 1, 2, 2), (1.0, 0.8, 0.5)
    kind, generator = Euler(stop=2), torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert (kind.draw(sigmas, generator), kind.steps(sigmas)) == (1, 1)
    made = kind.make(student, noise, TEXT, sigmas, generator, 1, True)
    assert student.calls == [False, True]
    assert made.sample_BCFHW.requires_grad
    assert torch.equal(generator.get_state(), before)
    assert not kind.make(student, noise, TEXT, sigmas, generator, 1, False).sample_BCFHW.requires_grad


def test_few_steps_are_what_they_were():
    class Student(torch.nn.Module):
        def forward(self, x, sigma, text):
            return 0.5 * x

    sigmas, noise = (1.0, 0.8, 0.5), torch.randn(2, 1, 2, 2, 2)
    kind, drawn = FewStep(), [FewStep().draw(sigmas, torch.Generator().manual_seed(i)) for i in range(60)]
    assert {0, 1, 2} == set(drawn)
    assert kind.steps(sigmas) == 1.0
    ours = kind.make(Student(), noise, TEXT, sigmas, torch.Generator().manual_seed(3), 2, False)
    expected = roll_out(Student(), noise, TEXT, sigmas, torch.Generator().manual_seed(3), exit_step=2)
    assert torch.equal(ours.sample_BCFHW, expected.sample_BCFHW)
    assert (ours.level, ours.interval) == (0.0, (0.0, 1.0))


POINTS = torch.tensor([-1.0, -0.2, 0.5, 1.4]).double()


def posterior_velocity(x_t, t):
    """Of a mixture of four points of equal weight, in closed form."""
    weight = torch.softmax(-((x_t[:, None] - (1 - t) * POINTS) ** 2) / (2 * t**2), 1)
    x0 = weight @ POINTS
    return (x_t - (1 - t) * x0) / t - x0


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.6), (0.3, 0.5), (0.6, 0.8), (0.75, 0.95)])
def test_the_fake_scores_target_has_the_posterior_velocity_as_its_mean(s, t):
    g, size = torch.Generator().manual_seed(0), 400_000
    x0 = POINTS[torch.randint(4, (size,), generator=g)]
    x_s = (1 - s) * x0 + s * torch.randn(size, generator=g).double()
    noise = torch.randn(size, generator=g).double()
    level, to = torch.full((1,), s).double(), torch.full((1,), t).double()
    x_t = renoise(x_s[None], noise[None], level, to)[0] if s else add_noise(x0[None], noise[None], to)[0]
    made = Rollout((x_s if s else x0).view(1, 1, 1, 1, -1), 0, TEXT, s)
    ours = target(made, noise.view(1, 1, 1, 1, -1), to).flatten()
    exact = posterior_velocity(x_t, t)

    def off(
        velocity,
    ):  # in standard errors; E[v | x_t] is the posterior velocity iff no function of x_t tells them apart
        probes = (torch.ones_like(x_t), x_t, x_t**2, torch.sin(3 * x_t))
        gaps = [(velocity - exact) * probe for probe in probes]
        return max(float(gap.mean().abs() / gap.std()) * size**0.5 for gap in gaps)

    assert off(ours) < 5
    if s:
        assert off(noise - x_s) > 20


def test_distribution_matching_noises_on_from_where_the_sample_lies():
    seen = []

    class Seen(torch.nn.Module):
        def forward(self, x, t, text, **rest):
            seen.append((x.clone(), t.clone()))
            return (torch.zeros_like(x),)

    networks = Denoiser(Seen()), Denoiser(Seen())
    matching = DMD(*networks, torch.zeros(1, 2, 8), DMDConfig(guidance=1.0, shift=2.0, low=0.02, high=0.98))
    sample, s = torch.randn(64, 1, 1, 2, 2), 0.5
    made = Rollout(sample, 1, TEXT.expand(64, -1, -1), s, (0.55, 1.0))
    x_t, noise, sigma = matching._noised(made, torch.Generator().manual_seed(2))
    again = draw_between(64, torch.Generator().manual_seed(2), low=0.55, high=0.98, k=2.0)
    assert torch.equal(sigma, again)
    torch.testing.assert_close(x_t, renoise(sample, noise, torch.full((64,), s), sigma))
    x_t, noise, sigma = matching._noised(replace(made, level=0.0, interval=(0.0, 1.0)), torch.Generator())
    assert torch.equal(x_t, add_noise(sample, noise, sigma))
    assert torch.equal(target(replace(made, level=0.0), noise, sigma), noise - sample)


def test_a_run_with_a_stop_level_trains_and_a_stop_that_is_none_is_refused(family, cache, tmp_path):
    config = replace(dmd(), rollout=Euler(stop=2), iterations=2)
    parts = assemble(config, open_cache(cache), model=str(family / "teacher"), run=tmp_path, device="cpu")
    run_training(parts, tmp_path)
    assert latest_checkpoint(tmp_path).name == "000002"
    with pytest.raises(ValueError, match="a student of 3 steps cannot stop after 4"):
        replace(config, rollout=Euler(stop=4))
