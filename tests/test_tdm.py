"""TDM: its trajectories and intervals, its metric, what the fake score learns in an interval, and the recipe in the loop."""

import json
import runpy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mogan.costs.calls import build_transformer
from mogan.costs.shapes import PUBLISHED
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser
from mogan.models.step_condition import tell_steps
from mogan.objectives.dmd import DMD, DMDConfig, dmd_direction, pseudo_huber, reweighted_target, target
from mogan.recipes import tdm_wan_1_3b
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.sampling.rollout import FewStep, Intervals, Rollout
from mogan.schedule import draw_between, draw_sigma, renoise, shifted_levels
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from tiny_recipes import tdm


def test_levels_are_numbers_between_0_and_1_even_if_one_is_written_as_a_whole_number():
    config = replace(tdm(), sigmas=(1, *tdm().sigmas[1:]))
    assert all(
        type(sigma) is float for sigma in config.sigmas
    )  # the end of a step goes into a tensor of its beginning's kind


TEXT, BATCH = torch.zeros(1, 2, 8), Batch([], [], [])
SIGMAS = shifted_levels(4, 3.0)
KIND = Intervals(counts=(1, 2, 4))


class Linear(torch.nn.Module):
    """A transformer's stand-in whose velocity is ``a x + b sigma``; notes the levels it is called at, and with gradient or not."""

    def __init__(self, a=0.5, b=0.1):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.tensor(b))
        self.calls = []

    def forward(self, x, timestep, text, return_dict=False):
        self.calls.append((float(timestep[0]) / 1000, torch.is_grad_enabled()))
        return (self.a * x + self.b * (timestep / 1000).view(-1, 1, 1, 1, 1),)


def latents(seed=0, batch=3):
    return torch.randn(batch, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def generators(batch=3):
    return [torch.Generator().manual_seed(k) for k in range(batch)]


def matching(direction=dmd_direction, **options):
    networks = Denoiser(Linear(0.9, -0.1)), Denoiser(Linear(0.2, 0.3))
    return DMD(*networks, torch.ones(1, 2, 8), DMDConfig(guidance=4.0, shift=3.0, **options), direction)


# ------------------------------------------------------------------------------------------------ trajectories


def test_a_number_of_steps_is_drawn_and_then_one_of_them():
    stages = KIND.stages(SIGMAS)
    grids = {1: (1.0, 0.0), 2: (1.0, 0.75, 0.0), 4: (1.0, 0.9, 0.75, 0.5, 0.0)}
    assert [(len(levels) - 1, step) for levels, step in stages] == [
        (1, 0),
        (2, 0),
        (2, 1),
        (4, 0),
        (4, 1),
        (4, 2),
        (4, 3),
    ]
    assert all(levels == pytest.approx(grids[len(levels) - 1]) for levels, _ in stages)
    drawn = torch.tensor([KIND.draw(SIGMAS, torch.Generator().manual_seed(i)) for i in range(6000)])
    shares = torch.bincount(drawn, minlength=7) / len(drawn)
    expected = torch.tensor([1 / 3, *[1 / 6] * 2, *[1 / 12] * 4])
    assert (shares - expected).abs().max() < 5 * (0.25 / 6000) ** 0.5
    assert KIND.steps(SIGMAS) == pytest.approx((0 + 0.5 + 1.5) / 3)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("k", [3.0, 5.0])
def test_every_so_maniest_level_is_the_grid_of_fewer_steps(count, k):
    levels = next(levels for levels, _ in KIND.stages(shifted_levels(4, k)) if len(levels) == count + 1)
    assert levels == (*shifted_levels(count, k), 0.0)


@pytest.mark.parametrize("stage", range(7))
def test_a_sample_is_the_end_of_a_step_of_the_deterministic_trajectory_with_gradient_through_that_step(stage):
    levels, step = KIND.stages(SIGMAS)[stage]
    student, noise = Denoiser(Linear(0.3, 0.2)), latents(1)
    made = KIND.make(student, noise, TEXT, SIGMAS, generators(), stage, True)
    x, v = noise.double(), None
    for high, low in pairwise(levels[: step + 2]):
        v = 0.3 * x + 0.2 * high
        before, x = x, x + (low - high) * v
    torch.testing.assert_close(made.sample_BCFHW.double(), x)
    torch.testing.assert_close(made.guess_BCFHW.double(), before - levels[step] * v)
    assert [grad for _, grad in student.transformer.calls] == [False] * step + [True]
    (slope,) = torch.autograd.grad(made.sample_BCFHW.sum(), student.transformer.a)
    torch.testing.assert_close(slope.double(), (levels[step + 1] - levels[step]) * before.sum(), rtol=1e-4, atol=1e-4)
    again = KIND.make(student, noise, TEXT, SIGMAS, [torch.Generator().manual_seed(9)] * 3, stage, False)
    assert torch.equal(again.sample_BCFHW, made.sample_BCFHW)  # nothing but the starting noise
    assert not again.sample_BCFHW.requires_grad
    assert not made.guess_BCFHW.requires_grad


def test_intervals_of_a_trajectory_are_disjoint_and_leave_out_the_gaps_alone():
    noise, student = latents(), Denoiser(Linear())
    made = [KIND.make(student, noise, TEXT, SIGMAS, generators(), stage, False) for stage in range(7)]
    assert [(r.level, *r.interval) for r in made] == [
        pytest.approx(each)
        for each in (
            (0, 0, 1), (0.75, 0.77, 1), (0, 0, 0.74), (0.9, 0.92, 1), (0.75, 0.77, 0.89), (0.5, 0.52, 0.74), (0, 0, 0.49),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "sigmas", "words"),
    [
        ((1, 3), SIGMAS, "must each divide the student's 4 levels"),
        ((), SIGMAS, "must each divide"),
        ((0, 1), SIGMAS, "must each divide"),
        ((2,), (1.0, 0.99), "leave no level to judge at"),
        ((4,), (1.0, 0.9, 0.88, 0.5), "between 0.88 and 0.9 the gaps"),
    ],
)
def test_numbers_of_steps_that_cannot_be_taken_are_refused(counts, sigmas, words):
    with pytest.raises(ValueError, match=words):
        replace(tdm(), rollout=Intervals(counts=counts), sigmas=sigmas)


# ------------------------------------------------------------------------------------------------ one step is DMD


def test_one_step_is_distribution_matching_bit_for_bit():
    one, noise, student = Intervals(counts=(1,)), latents(2), Denoiser(Linear(0.3, 0.2))
    rollouts = [kind.make(student, noise, TEXT, (1.0,), generators(), 0, True) for kind in (one, FewStep())]
    for kind_of_loss in ("student_loss", "fake_score_loss"):
        losses = [getattr(matching(), kind_of_loss)(r, BATCH, generators())[0] for r in rollouts]
        assert torch.equal(*losses)
    gradients = [
        torch.autograd.grad(matching(huber=huber).student_loss(r, BATCH, generators())[0], r.sample_BCFHW)[0]
        for r, huber in zip(rollouts, (0.00054, None), strict=True)
    ]
    huber, squared = (g.flatten(1) for g in gradients)
    cosines = torch.cosine_similarity(huber, squared)
    torch.testing.assert_close(cosines, torch.ones(3))  # each sample is moved the same way, by another amount
    torch.testing.assert_close(huber.norm(dim=1), torch.full((3,), 1 / 3 / 96**0.5), rtol=1e-3, atol=0)


def test_more_steps_are_not_distribution_matching_of_what_few_steps_make():
    noise, student = latents(2), Denoiser(Linear(0.3, 0.2))
    r = KIND.make(student, noise, TEXT, SIGMAS, generators(), 4, False)
    clean = Rollout(r.guess_BCFHW, 0, TEXT)
    assert not torch.allclose(*(matching().fake_score_loss(x, BATCH, generators())[0] for x in (r, clean)))


def test_the_metric_is_the_papers_but_for_the_root_of_the_dimension():
    gap = latents(4).double()
    n = gap[0].numel()
    paper = ((gap.flatten(1) ** 2).sum(1) + (0.00054 * n**0.5) ** 2).sqrt() - 0.00054 * n**0.5
    torch.testing.assert_close(pseudo_huber(gap, 0.00054), (paper / n**0.5).mean())


def test_small_gaps_count_as_squares_and_large_ones_as_lengths():
    gap, c = latents(5).double(), 0.1
    small, large = 1e-3 * gap, 1e3 * gap
    torch.testing.assert_close(pseudo_huber(small, c), small.square().mean() / (2 * c), rtol=1e-4, atol=0)
    lengths = large.square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(pseudo_huber(large, c), lengths.mean() - c, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ within an interval


def test_all_levels_but_for_a_tenth_at_each_end_are_all():
    whole = [
        DMDConfig(guidance=1.0, shift=1.0, low=low, high=high).whole
        for low, high in ((0.1, 0.9), (0.11, 0.9), (0.1, 0.89))
    ]
    assert whole == [True, False, False]


def test_levels_of_an_interval_are_those_of_all_levels_that_fall_into_it():
    low, high, k = 0.77, 0.89, 3.0
    found = draw_between(200_000, torch.Generator().manual_seed(1), low=low, high=high, k=k)
    everywhere = draw_sigma(1_000_000, torch.Generator().manual_seed(2), k=k)
    expected = everywhere[(everywhere >= low) & (everywhere <= high)]
    assert low <= found.min() < low + 1e-4
    assert high - 1e-4 < found.max() <= high
    quantiles = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(found.quantile(quantiles), expected.quantile(quantiles), rtol=0, atol=2e-3)
    clamped = draw_sigma(1000, torch.Generator().manual_seed(1), low=low, high=high, k=k)
    assert ((clamped == low) | (clamped == high)).float().mean() > 0.5  # what clamping would do


def test_a_step_too_close_to_noise_is_a_sentence():
    r = Rollout(latents(), 0, TEXT, 0.965, (0.985, 1.0))
    with pytest.raises(UserError, match=r"DMD at levels up to 0\.98: take fewer steps"):
        matching().fake_score_loss(r, BATCH, generators())


class Student:
    """One that is not linear: of each of five noises it makes a point at a level, and a guess at the clean one."""

    noise = torch.tensor([-1.9, -0.8, 0.1, 0.9, 2.2]).double()

    def __init__(self, high, low):
        velocity = 0.8 * torch.sin(2 * self.noise) + self.noise - 0.3
        self.at_low, self.clean = self.noise + (low - high) * velocity, self.noise - high * velocity


def velocity_of(x_t, t, points, scale, spread):
    """Of the law of ``scale points + spread noise``, by its score: ``v = -x / (1 - t) - score t / (1 - t)``."""
    away = x_t[:, None] - scale * points
    weight = torch.softmax(-(away**2) / (2 * spread**2), 1)
    score = -(weight * away).sum(1) / spread**2
    return -x_t / (1 - t) - score * t / (1 - t)


@pytest.mark.parametrize(("high", "low", "t"), [(0.9, 0.75, 0.8), (0.75, 0.5, 0.6), (0.75, 0.5, 0.73)])
def test_the_fake_score_learns_the_velocity_of_what_the_student_makes_and_of_tdms_target_another(high, low, t):
    g, size, student = torch.Generator().manual_seed(0), 400_000, Student(high, low)
    which = torch.randint(5, (size,), generator=g)
    noise = torch.randn(size, generator=g).double()
    level, to = torch.full((1,), low).double(), torch.full((1,), t).double()
    x_s = student.at_low[which]
    x_t = renoise(x_s[None], noise[None], level, to)[0]
    made = Rollout(x_s.view(-1, 1, 1, 1, 1), 0, TEXT, low, clean_BCFHW=student.clean[which].view(-1, 1, 1, 1, 1))
    as_clips = [x.view(-1, 1, 1, 1, 1) for x in (x_t, noise)]
    ours = target(made, as_clips[1], to).flatten()
    theirs, weight = (x.flatten() for x in reweighted_target(made, *as_clips, to.expand(size)))

    scale = (1 - t) / (1 - low)
    spread = (t**2 - scale**2 * low**2) ** 0.5
    exact = velocity_of(x_t, t, student.at_low, scale, spread)
    noised_guess = velocity_of(x_t, t, student.clean, 1 - t, t)

    def off(velocity, expected, weight=1.0):  # in standard errors, of the worst of some functions of x_t
        gaps = [weight * (velocity - expected) * probe for probe in (x_t**0, x_t, x_t**2, torch.sin(3 * x_t))]
        return max(float(gap.mean().abs() / gap.std()) * size**0.5 for gap in gaps)

    assert off(ours, exact) < 5
    assert off(noise - x_s, exact) > 20  # as if the sample were clean
    assert off(theirs, exact) > 20  # without the weight
    assert off(theirs, exact, weight) > 20  # and with it,
    assert off(theirs, noised_guess, weight) < 5  # which teaches the law of the guess, noised: another one


def test_over_many_numbers_the_weight_of_tdms_target_is_one():
    r = KIND.make(Denoiser(Linear()), torch.randn(4, 16, 5, 60, 104), TEXT, SIGMAS, None, 4, False)
    noise, sigma = torch.randn(r.sample_BCFHW.shape), torch.full((4,), 0.8)
    x_t = renoise(r.sample_BCFHW, noise, torch.full((4,), 0.75), sigma)
    weight = reweighted_target(r, x_t, noise, sigma)[1]
    assert weight.std() < 0.01 * weight.mean()  # samples count alike: nothing is corrected


def test_the_error_of_the_fake_score_is_in_the_samples_own_units():
    r = KIND.make(Denoiser(Linear()), latents(), TEXT, SIGMAS, None, 3, False)
    found = matching().fake_score_loss(r, BATCH, generators())[0]
    dmd = matching()
    x_t, noise, sigma = dmd._noised(r, generators())
    error = (dmd.fake_score.velocity(x_t, sigma, TEXT) - target(r, noise, sigma)).square().mean()
    torch.testing.assert_close(found, error * 0.1**2)


def test_the_gap_is_measured_in_units_of_the_clean_guess():
    seen = []

    def direction(x0, real, fake, sigma):
        seen.append(x0)
        return dmd_direction(x0, real, fake, sigma)

    r = KIND.make(Denoiser(Linear()), latents(), TEXT, SIGMAS, None, 4, True)
    matching(direction=direction, huber=0.00054).student_loss(r, BATCH, generators())
    assert torch.equal(seen[0], r.guess_BCFHW)


@pytest.mark.parametrize("options", [{}, {"huber": 0.00054, "reweighted": True}])
@pytest.mark.parametrize("stage", [0, 4, 6])
def test_each_loss_teaches_its_own_network_alone(stage, options):
    dmd, student = matching(**options), Denoiser(Linear())
    networks = {"student": student, "teacher": dmd.teacher, "fake": dmd.fake_score}

    def taught():
        names = {name for name, n in networks.items() if any(p.grad is not None for p in n.parameters())}
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        return names

    dmd.student_loss(KIND.make(student, latents(), TEXT, SIGMAS, None, stage, True), BATCH, generators())[0].backward()
    assert taught() == {"student"}
    dmd.fake_score_loss(KIND.make(student, latents(), TEXT, SIGMAS, None, stage, False), BATCH, generators())[
        0
    ].backward()
    assert taught() == {"fake"}


def test_moving_against_the_direction_brings_samples_nearer_to_the_teachers_law():
    """Gaussians, exact predictions: samples of N(1, .5) at level .5 of the way; the teacher's clean law is N(0, .5)."""
    g, s, t = torch.Generator().manual_seed(3), 0.5, 0.6
    made = (1 - s) * (1.0 + 0.5 * torch.randn(20_000, generator=g)) + s * torch.randn(20_000, generator=g)
    level, to = torch.full((1,), s), torch.full((1,), t)
    x_t = renoise(made[None], torch.randn(1, 20_000, generator=g), level, to)[0]

    def denoised(mean):
        variance = (1 - t) ** 2 * 0.25 + t**2
        return mean + (1 - t) * 0.25 / variance * (x_t - (1 - t) * mean)

    gradient = dmd_direction(made[None], denoised(0.0), denoised(1.0), to)[0]
    assert 0 < (made - 0.1 * gradient).mean() < made.mean() - 0.01


@pytest.mark.slow
def test_one_student_told_learns_every_number_of_steps_where_everything_is_known():
    here = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "tdm_steps.py"))
    start = here["learnt"](0, updates=1000)
    before = [here["distance"](here["denoiser"](start, False), n, torch.Generator().manual_seed(1)) for n in (1, 2, 4)]
    after = here["run"]("told", start, 300, 0)
    assert all(now < 0.5 * was for now, was in zip(after, before, strict=True)), (before, after)


# ------------------------------------------------------------------------------------------------ in the loop


def build(config, family, cache, run):
    return assemble(config, open_cache(cache), model=str(family / "teacher"), run=run, device="cpu")


@pytest.mark.parametrize("lora", [None, 3])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(lora, family, cache, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    config = replace(tdm(), iterations=4, lora=lora)
    for run, stops in ((whole, (4,)), (halves, (2, 4))):
        (run / "checkpoints").mkdir(parents=True)
        for stop in stops:
            run_training(build(replace(config, iterations=stop), family, cache, run), run)
    logs = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (whole, halves)]
    drop = [[{k: v for k, v in line.items() if k not in ("seconds", "core_seconds")} for line in log] for log in logs]
    assert drop[0] == drop[1]
    for part in ("student", "fake_score", "ema"):
        one, two = (load_part(latest_checkpoint(run), part) for run in (whole, halves))
        assert one
        assert all(torch.equal(v, two[k]) for k, v in one.items()), part


@pytest.mark.slow
def test_the_full_size_recipe_judges_at_real_shapes():
    config, shapes = tdm_wan_1_3b(), PUBLISHED["wan2.1-t2v-1.3b"]
    dmd = config.objectives["dmd"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, fake_score = (Denoiser(tell_steps(build_transformer(shapes, 1)), torch.bfloat16) for _ in range(2))
        teacher = Denoiser(build_transformer(shapes, 1), torch.bfloat16)
        null, text = torch.empty(1, 20, 4096), torch.empty(1, 30, 4096)
        judge = DMD(teacher, fake_score, null, dmd)
        noise = torch.empty(1, *shapes.latent)
        made = config.rollout.make(student, noise, text, config.sigmas, None, 5, True)
        assert made.sample_BCFHW.shape == (1, 16, 21, 60, 104)
        for loss in (judge.student_loss, judge.fake_score_loss):
            assert loss(made, BATCH, torch.Generator())[0].shape == ()


def test_estimate_counts_what_tells_student_and_fake_score_alone():
    from test_estimate import MADE_UP, price

    found = {n.name: n.parameters for n in price(tdm_wan_1_3b()).networks}
    whole, told = (MADE_UP.parameters[name] for name in ("transformer", "told"))
    assert (found["student"], found["fake_score"], found["teacher"]) == (whole + told, whole + told, whole)
    adapters = {n.name: n.parameters for n in price(tdm_wan_1_3b(), lora=8).networks}
    assert adapters["student"] == 8 * (MADE_UP.parameters["adapters"] + MADE_UP.parameters["told_adapters"])
    student, fake_score = price(tdm_wan_1_3b()).steps
    # two thirds of a step before the judged one, which the fake score's update makes without gradient
    assert student.flops == pytest.approx(64 * (2 / 3 * 280e12 + 1120e12 + 3 * 280e12))
    assert fake_score.flops == pytest.approx(64 * (5 / 3 * 280e12 + 1120e12))


def test_the_full_size_recipe_leaves_levels_in_every_interval_that_distribution_matching_judges():
    config = tdm_wan_1_3b()
    dmd = config.objectives["dmd"]
    for stage in range(len(config.rollout.stages(config.sigmas))):
        r = config.rollout.make(Denoiser(Linear()), latents(), TEXT, config.sigmas, None, stage, False)
        assert max(r.interval[0], dmd.low) + 0.01 < min(r.interval[1], dmd.high)
