"""Phased DMD: each phase has its expert and its part of the noise range; the earlier expert stands still."""

from dataclasses import replace

import pytest
import torch

import tiny_recipes
from mogan import recipes
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.objectives.dmd import DMD, DMDConfig, target
from mogan.recipes.phased import alternating
from mogan.sampling.rollout import Euler, Rollout
from mogan.schedule import renoise
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, learn, positions, step

BATCH = Batch([], [], [])


def build(config, family, cache):
    return assemble(config, open_cache(cache), model=str(family / "teacher"), run=None, device="cpu")


def moved(parts, where):
    """The parts of networks that an update changes."""
    before = {f"{n}.{k}": v.clone() for n, m in parts.networks.items() for k, v in m.state_dict().items()}
    step(parts, where)
    after = {f"{n}.{k}": v for n, m in parts.networks.items() for k, v in m.state_dict().items()}
    return {".".join(k.split(".")[:2]) for k in before if not torch.equal(before[k], after[k])}


@pytest.mark.parametrize("lora", [None, 3])
def test_a_phase_teaches_its_expert_and_its_fake_score_and_nothing_else(lora, family, cache):
    parts = build(replace(tiny_recipes.phased(), lora=lora), family, cache)
    seen = [
        (where.iteration, parts.config.plan[where.update].label, moved(parts, where))
        for where in positions(replace(parts.config, iterations=2), 0)
        if where.repeat == 0
    ]
    assert seen == [
        (0, "student<high", {"student.transformer"}),
        (0, "fake_score<high", {"fake_score.transformer"}),
        (1, "student<low", {"student.transformer_2"}),
        (1, "fake_score_low<low", {"fake_score_low.transformer"}),
    ]


def test_the_public_trainers_order_is_every_other_iteration_and_a_drawn_last_step():
    config = alternating(recipes.phased_lab())
    happens = [[u.by for u in config.plan if u.happens(i)] for i in range(4)]
    assert happens == [["high", "high"], ["low", "low"]] * 2
    generator = torch.Generator().manual_seed(0)
    for update, steps in ((config.plan[0], {0, 1}), (config.plan[2], {2, 3})):
        assert {update.rollout.draw(config.sigmas, generator) for _ in range(50)} == steps
        assert update.rollout.steps(config.sigmas) == sum(steps) / 2


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, 3])
def test_phases_in_turn_go_on_bit_for_bit_whichever_is_next(lora, family, cache, tmp_path):
    config, ends = replace(tiny_recipes.phased_alternating(), lora=lora), []
    for name, stops in (("whole", (3,)), ("parts", (1, 2, 3))):
        (tmp_path / name).mkdir()
        for iterations in stops:
            parts = assemble(
                replace(config, iterations=iterations), open_cache(cache), model=str(family / "teacher"),
                run=tmp_path / name, device="cpu",
            )  # fmt: skip
            run_training(parts, tmp_path / name)
        ends.append(parts.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_drawn_last_step_goes_straight_to_the_end_of_the_phase():
    class Known(torch.nn.Module):
        def velocity(self, x, sigma, text):
            return torch.full_like(x, float(sigma[0]))

    noise, text, sigmas = torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 8), (1.0, 0.9, 0.75, 0.5)
    kind = Euler(stop=2, since=0)
    ends = [kind.make(Known(), noise, text, sigmas, None, step, False) for step in (0, 1)]
    assert [made.level for made in ends] == [0.75, 0.75]
    found = [float(made.sample_BCFHW) for made in ends]
    assert found == pytest.approx([1.0 * (0.75 - 1.0), 1.0 * (0.9 - 1.0) + 0.9 * (0.75 - 0.9)])
    with pytest.raises(ValueError, match="its last one from 2 on"):
        Euler(stop=2, since=2).steps(sigmas)


def test_one_phase_of_one_step_is_distribution_matching_bit_for_bit(family, cache):
    """K = 1, s = 0: the sample is clean, its level 0, and all of the range is open to it."""
    one = replace(tiny_recipes.dmd(), sigmas=(1.0,))
    numbers = []
    for config in (one, replace(one, rollout=Euler(stop=1)), replace(one, rollout=Euler(stop=1), sigmas=(1.0, 0.5))):
        parts = build(config, family, cache)
        numbers.append([step(parts, where)["loss"] for where in positions(config, 0)])
    assert numbers[0] == numbers[1]
    assert numbers[0] != numbers[2]  # one that stops above level 0 is another thing


class Exact(torch.nn.Module):
    """Velocity of data N(mean, deviation^2), every number on its own."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def velocity(self, x, sigma, text):
        s = sigma.view(-1, 1, 1, 1, 1)
        clean = self.mean + (1 - s) * self.deviation**2 / ((1 - s) ** 2 * self.deviation**2 + s**2) * (
            x - (1 - s) * self.mean
        )
        return (x - clean) / s

    def forward(self, x, sigma, text):
        return x - sigma.view(-1, 1, 1, 1, 1) * self.velocity(x, sigma, text)


def divergence(mean, deviation, mean_2, deviation_2):
    """KL of two Gaussians."""
    return torch.log(deviation_2 / deviation) + (deviation**2 + (mean - mean_2) ** 2) / (2 * deviation_2**2) - 0.5


@pytest.mark.parametrize("s", [0.0, 0.3, 0.75])
def test_a_step_against_the_gradient_brings_the_samples_nearer_to_the_teachers_at_their_level(s):
    level = torch.tensor(s)
    teacher, student = Exact(torch.tensor(0.4), torch.tensor(0.5)), Exact(torch.tensor(-0.3), torch.tensor(0.9))

    def at(data):  # mean and deviation of noised data
        return (1 - level) * data.mean, ((1 - level) ** 2 * data.deviation**2 + level**2).sqrt()

    (mean, deviation), wanted = at(student), at(teacher)
    x = mean + deviation * torch.randn(4096, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    text = torch.zeros(4096, 1, 8)
    made = Rollout(x, 0, text, s, (s + 0.02, 1.0) if s else (0.0, 1.0))
    made = replace(made, clean_BCFHW=student(x.detach(), level.expand(4096), text) if s else None)
    matching = DMD(teacher, student, torch.zeros(1, 1, 8), DMDConfig(guidance=1.0, shift=1.0))
    loss, _ = matching.student_loss(made, BATCH, torch.Generator().manual_seed(1))
    loss.backward()
    x_new = x.detach() - 0.05 * x.numel() * x.grad
    before, after = divergence(mean, deviation, *wanted), divergence(x_new.mean(), x_new.std(), *wanted)
    assert after < 0.95 * before


def test_the_stable_weighting_is_equation_13(monkeypatch):
    """``clamp(1 / b^2, 0, 10) |b psi - (...)|^2``, written out for rectified flow."""
    s, size = 0.6, 64
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(size, 1, 1, 1, 8, generator=generator), torch.zeros(size, 1, 8)
    made, fake = Rollout(x, 0, text, s, (s + 0.02, 1.0)), Exact(torch.tensor(0.2), torch.tensor(0.7))
    matching = DMD(fake, fake, text[:1], DMDConfig(guidance=1.0, shift=1.0, stable=True))
    found, _ = matching.fake_score_loss(made, BATCH, torch.Generator().manual_seed(3))
    x_t, noise, t = matching._noised(made, torch.Generator().manual_seed(3))
    psi = fake.velocity(x_t, t, text)
    t = t.view(-1, 1, 1, 1, 1)
    a_s, a_t = 1 - s, 1 - t
    b = (t**2 - (a_t / a_s) ** 2 * s**2).sqrt()
    inside = b * psi - ((a_s**2 * t + a_t * s**2) / a_s**2 * noise - b * x / a_s)
    expected = ((1 / b**2).clamp(0, 10) * inside**2).mean() * (1 - s) ** 2  # the last factor: in units of the data
    torch.testing.assert_close(found, expected)
    assert ((1 / b**2) > 10).any()
    assert ((1 / b**2) < 10).any()
    plain, _ = replace_stable(matching).fake_score_loss(made, BATCH, torch.Generator().manual_seed(3))
    torch.testing.assert_close(plain, (psi - target(made, noise, t.flatten())).square().mean() * (1 - s) ** 2)
    assert not torch.isclose(plain, found, rtol=1e-2)


def replace_stable(matching):
    return DMD(matching.teacher, matching.fake_score, matching.null_1LD, DMDConfig(guidance=1.0, shift=1.0))


def test_the_roll_out_of_a_phase_lies_at_its_boundary_and_is_judged_above_it(family, cache):
    config = tiny_recipes.phased()
    parts = build(config, family, cache)
    made = learn(parts, where := Position(0, 0, 0, 0), draw(parts, where)).rollouts[0]
    assert (made.level, made.interval) == (config.sigmas[2], (config.sigmas[2] + 0.02, 1.0))
    assert made.guess_BCFHW.shape == made.sample_BCFHW.shape
    x_t, noise, sigma = parts.objectives["high"].judge._noised(made, torch.Generator())
    assert sigma.min() >= config.sigmas[2] + 0.02
    torch.testing.assert_close(x_t, renoise(made.sample_BCFHW, noise, torch.full_like(sigma, made.level), sigma))


def test_a_boundary_that_leaves_an_expert_without_a_level_is_refused():
    with pytest.raises(ValueError, match="for both experts to have one"):
        replace(recipes.phased_lab(), boundary=0.5)


def test_the_base_model_of_two_experts_is_compared_by_one_of_them_in_each_phase():
    config = recipes.phased_wan_a14b()
    high, low = config.objectives["high"], config.objectives["low"]
    assert high.low > 0.875 > low.high
    assert isinstance(high, DMDConfig)
    assert (high.follower, low.follower) == ("fake_score", "fake_score_low")


@pytest.mark.parametrize(("name", "low", "high"), [("high", 0.9, 0.98), ("low", 0.02, 0.87)])
def test_levels_of_a_part_are_drawn_within_it_and_not_moved_onto_its_ends(name, low, high):
    settings = recipes.phased_wan_a14b().objectives[name]
    matching = DMD(None, None, torch.zeros(1, 1, 1), settings)
    made = Rollout(torch.zeros(4000, 1, 1, 1, 1), 1, torch.zeros(4000, 1, 1), 0.0, (0.0, 1.0))
    levels = matching._noised(made, torch.Generator().manual_seed(0))[2]
    assert ((levels >= low) & (levels <= high)).all()
    assert levels.unique().numel() > 3900  # clamped, half of the low ones are 0.87
    uniform = levels / (7 - 6 * levels)  # before the shift
    ends = [x / (7 - 6 * x) for x in (low, high)]
    assert float(uniform.mean()) == pytest.approx(sum(ends) / 2, abs=0.01)
