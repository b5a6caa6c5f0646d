"""VDOT: transport between predictions as a direction of DMD, and a relativistic discriminator on the fake score's trunk."""

import runpy
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_recipes
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.denoiser import Denoiser
from mogan.models.discriminator import Discriminator, Heads
from mogan.objectives.dmd import DMD, DMDConfig, dmd_direction, dmd_scale
from mogan.objectives.ot import Transport, TransportConfig, frame_tokens, frames_of, sinkhorn, transport_gradient
from mogan.objectives.relativistic import Relativistic, RelativisticConfig, heads_call
from mogan.recipes import vdot_lab, vdot_wan_1_3b
from mogan.runs.checkpoint import latest_checkpoint
from mogan.sampling.rollout import Euler, Rollout
from mogan.terms import Lesson
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, step
from tiny_recipes import dmd, vdot

SIGMA = torch.tensor([0.3, 0.8])


def tokens(seed, count=12, offset=0.0):
    return torch.randn(1, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset


def clips(seed, batch=2):
    return torch.randn(batch, 3, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ transport


def test_the_plan_has_uniform_marginals_and_the_optimum_of_a_small_problem():
    cost = torch.rand(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan, error = sinkhorn(cost, 0.05, 3000)
    np.testing.assert_allclose(plan.sum(2), np.full((2, 5), 1 / 5), atol=1e-12)
    np.testing.assert_allclose(plan.sum(1), np.full((2, 7), 1 / 7), atol=1e-12)
    assert error.max() < 1e-12
    square, _ = sinkhorn(cost[:, :5, :5], 0.002, 4000)
    for one, its_plan in zip(cost[:, :5, :5].numpy(), square, strict=True):
        best = min(one[range(5), order].mean() for order in map(list, permutations(range(5))))
        assert float((its_plan * torch.from_numpy(one)).sum()) == pytest.approx(best, abs=0.01)


def test_the_envelope_gradient_is_the_slope_of_the_regularised_value_at_convergence():
    a, b, eps, many = tokens(0), tokens(1), 0.5, 3000

    def value(points):
        cost = torch.cdist(points, b).square()
        plan, _ = sinkhorn(cost, eps, many)
        return float((cost * plan).sum() + eps * torch.xlogy(plan, plan).sum())

    gradient, error = transport_gradient(a, b, eps, many)
    assert error < 1e-12
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        way = torch.randn(a.shape, dtype=torch.float64, generator=generator)
        slope = (value(a + 1e-4 * way) - value(a - 1e-4 * way)) / 2e-4
        assert float((gradient * way).sum()) == pytest.approx(slope, abs=1e-7)
    unsolved, error = transport_gradient(
        a, b, 0.02, 10
    )  # where the plan misses its marginals it is the slope of nothing
    assert error > 0.05
    assert (unsolved - transport_gradient(a, b, 0.02, 20000)[0]).abs().max() > 0.01


def test_transport_does_not_see_the_places_of_what_it_carries_to():
    a, b, order = tokens(0), tokens(1), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    one, two = (transport_gradient(a, x, 0.5, 500)[0] for x in (b, b[:, order]))
    torch.testing.assert_close(one, two, atol=1e-14, rtol=0)
    moved = transport_gradient(a[:, order], b, 0.5, 500)[0]
    torch.testing.assert_close(moved, one[:, order], atol=1e-14, rtol=0)
    difference = 2 / 12 * (a - b), 2 / 12 * (a - b[:, order])  # what DMD sees does change
    assert (difference[0] - difference[1]).abs().max() > 0.1


def test_much_entropy_carries_every_token_to_the_mean():
    a, b = tokens(0), tokens(1)
    found, _ = transport_gradient(a, b, 1e5, 50)
    torch.testing.assert_close(found, 2 / 12 * (a - b.mean(1, keepdim=True)), atol=2e-5, rtol=0)


def test_equal_sets_pull_only_where_the_bias_is_left_in():
    x = clips(0)
    pulls = {}
    for debias in (True, False):
        settings = TransportConfig(rho=1.0, eps=0.5, debias=debias)
        pulls[debias] = Transport(settings, dmd_direction, lambda a, b: torch.ones(()))(x, x, x, SIGMA)
    assert pulls[True].abs().max() < 1e-12
    assert pulls[False].abs().max() > 1e-2


def test_the_pull_is_written_out_with_the_rows_of_a_plan_that_is_not_there_yet_and_the_bias_is_the_first_sets_own():
    fake, real, x = clips(0), clips(1) + 1.0, clips(2)

    def pull(a, b):
        plan, _ = sinkhorn(torch.cdist(a, b).square(), 0.5, 1)
        assert (plan.sum(2) - 1 / a.shape[1]).abs().max() > 1e-3
        return 2 * torch.stack(
            [(p[:, :, None] * (q[:, None] - r[None])).sum(1) for p, q, r in zip(plan, a, b, strict=True)]
        )

    a, b = frame_tokens(fake), frame_tokens(real)
    torch.testing.assert_close(transport_gradient(a, b, 0.5, 1)[0], pull(a, b))
    for debias, gradient in ((False, pull(a, b)), (True, pull(a, b) - pull(a, a))):
        settings = TransportConfig(rho=1.0, eps=0.5, iterations=1, debias=debias)
        found = Transport(settings, dmd_direction, lambda a, b: torch.ones(()))(x, real, fake, SIGMA)
        torch.testing.assert_close(found, frames_of(gradient * (a.shape[1] / 2), x))


def test_the_error_of_the_marginals_falls_with_iterations_and_is_what_rows_miss():
    a, b = tokens(0), tokens(1)
    cost = torch.cdist(a, b).square()
    errors = []
    for iterations in (60, 200, 1000):
        plan, error = sinkhorn(cost, 0.1, iterations)
        assert float(error) == pytest.approx(float((plan.sum(2) - 1 / 12).abs().sum()))
        np.testing.assert_allclose(plan.sum(1), np.full((1, 12), 1 / 12), atol=1e-12)
        errors.append(float(error))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


# ------------------------------------------------------------------------------------------------ the direction


def test_tokens_are_the_means_of_two_by_two_of_each_frame_and_go_back_by_the_adjoint():
    x = clips(0)
    found = frame_tokens(x)
    assert found.shape == (2 * 4, 2 * 3, 3)
    for b, f, i, j in [(0, 0, 0, 0), (1, 2, 1, 2)]:
        mean = x[b, :, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
        torch.testing.assert_close(found[b * 4 + f, i * 3 + j], mean)
    y = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float((found * y).sum()) == pytest.approx(float((x * frames_of(y, x) / 4).sum()))


def test_a_plan_that_takes_every_token_to_its_own_place_is_dmd_on_means():
    base = torch.arange(24, dtype=torch.float64).view(1, 1, 1, 4, 6).expand(2, 3, 4, -1, -1) * 40.0  # places far apart
    fake, real = base + clips(0), base + clips(1)
    ot = Transport(TransportConfig(rho=1.0, eps=0.5, iterations=50), dmd_direction, dmd_scale)
    means = lambda x: frames_of(frame_tokens(x), x)  # noqa: E731
    expected = (means(fake) - means(real)) / dmd_scale(clips(2), real)
    torch.testing.assert_close(ot(clips(2), real, fake, SIGMA), expected, atol=1e-9, rtol=1e-9)


def test_frames_are_carried_apart():
    fake, real, x = clips(0), clips(1), clips(2)
    ot = Transport(TransportConfig(rho=1.0, eps=0.5, iterations=50), dmd_direction, lambda a, b: torch.ones(()))
    changed = real.clone()
    changed[:, :, 2] += 1.0
    gap = (ot(x, changed, fake, SIGMA) - ot(x, real, fake, SIGMA)).abs().amax((0, 1, 3, 4))
    assert gap[2] > 0.1
    assert not gap[[0, 1, 3]].any()


def test_per_frame_every_frame_weighs_the_same():
    ot = Transport(TransportConfig(rho=1.0, eps=0.5, per_frame=True), dmd_direction, dmd_scale)
    found = ot(clips(2), clips(1) + 100, clips(0), SIGMA)
    torch.testing.assert_close(found.square().mean((1, 3, 4)), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_rho_mixes_and_at_zero_it_is_dmd_bit_for_bit(rho):
    x, real, fake = (clips(i).float() for i in range(3))
    plain = dmd_direction(x, real, fake, SIGMA)
    whole = Transport(TransportConfig(rho=1.0, eps=0.5), dmd_direction, dmd_scale)(x, real, fake, SIGMA)
    mixed = Transport(TransportConfig(rho=rho, eps=0.5), dmd_direction, dmd_scale)(x, real, fake, SIGMA)
    torch.testing.assert_close(mixed, (1 - rho) * plain + rho * whole)
    assert torch.equal(mixed, plain) == (rho == 0.0)


def test_the_student_moves_against_the_way_and_nobody_else_is_moved():
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, x, timestep, text, return_dict=False):  # predicts the clean clip ``value``
            return ((x - self.value) / (timestep / 1000).view(-1, 1, 1, 1, 1),)

    networks = Denoiser(Constant(2.0)), Denoiser(Constant(-1.0))
    direction = Transport(TransportConfig(rho=1.0, eps=0.5), dmd_direction, dmd_scale)
    matching = DMD(*networks, torch.zeros(1, 2, 8), DMDConfig(guidance=1.0, shift=1.0), direction=direction)
    x = clips(0).float().requires_grad_()
    rollout = Rollout(x, 0, torch.zeros(2, 2, 8))
    loss, numbers = matching.student_loss(rollout, Batch([], [], []), torch.Generator().manual_seed(1))
    loss.backward()
    assert (x.grad < 0).all()  # descending raises it, from -1 towards 2
    assert numbers["marginal_error"] < 1e-4
    assert all(p.grad is None for n in networks for p in n.parameters())


# ------------------------------------------------------------------------------------------------ the discriminator


@pytest.fixture
def adversary(family):
    torch.manual_seed(0)
    trunk = Denoiser(wan.load_transformer(family / "teacher"))
    settings = RelativisticConfig(taps=(1, 3), shift=3.0)
    return Relativistic(trunk, Heads(24, 2, 2), settings)


def pair(grad=False):
    g = torch.Generator().manual_seed(5)
    made, real = (torch.randn(3, 4, 2, 4, 4, generator=g) for _ in range(2))
    rollout = Rollout(made.requires_grad_(grad), 2, torch.randn(3, 5, 64, generator=g))
    return rollout, Batch([], [], [], latent_BCFHW=real)


def test_losses_are_of_the_difference_of_logits_that_stand_as_written(adversary):
    rollout, batch = pair()
    found = {}
    with torch.no_grad():
        for name, loss in (("student", adversary.student_loss), ("critic", adversary.critic_loss)):
            found[name] = loss(rollout, batch, torch.Generator().manual_seed(6))
        g, logits = torch.Generator().manual_seed(6), []
        for x in (batch.latent_BCFHW, rollout.sample_BCFHW):  # real first; each drawn a level and noise of its own
            u = torch.rand(3, generator=g).numpy()
            s = np.clip(3 * u / (1 + 2 * u), 0.02, 0.98).astype(np.float32)
            at = torch.from_numpy(s).view(3, 1, 1, 1, 1)
            x_t = (1 - at) * x + at * torch.randn(x.shape, generator=g)
            outputs: list = []
            note = lambda m, a, out, outputs=outputs: outputs.append(out)  # noqa: E731
            hooks = [adversary.trunk.transformer.blocks[i].register_forward_hook(note) for i in (1, 3)]
            adversary.trunk.transformer(x_t, 1000 * torch.from_numpy(s), rollout.text_BLD)
            for hook in hooks:
                hook.remove()
            logits.append(adversary.critic(outputs).double().numpy())
    real, made = logits
    softplus = lambda x: np.log1p(np.exp(x)).mean()  # noqa: E731
    assert found["student"][0].item() == pytest.approx(softplus(real - made), rel=1e-4)
    assert found["critic"][0].item() == pytest.approx(softplus(made - real), rel=1e-4)
    assert found["critic"][1]["gap"].item() == pytest.approx((real - made).mean(), abs=1e-4)


def test_equal_logits_are_log_two_and_a_constant_added_to_all_changes_nothing(adversary, monkeypatch):
    rollout, batch = pair()
    spread = torch.randn(6, generator=torch.Generator().manual_seed(7))

    def losses(logits):
        monkeypatch.setattr(adversary.critic, "forward", lambda features, number: logits)
        both = (adversary.student_loss, adversary.critic_loss)
        return torch.stack([loss(rollout, batch, torch.Generator().manual_seed(1))[0] for loss in both])

    torch.testing.assert_close(losses(torch.full((6,), 3.0)), torch.full((2,), float(np.log(2))))
    torch.testing.assert_close(losses(spread + 5), losses(spread))
    assert not torch.allclose(losses(spread), losses(torch.cat([spread[:3] + 1, spread[3:]])))


def test_gradient_reaches_the_students_clips_through_the_trunk_and_only_the_heads_learn(adversary):
    rollout, batch = pair(grad=True)
    adversary.student_loss(rollout, batch, torch.Generator().manual_seed(1))[0].backward()
    assert rollout.sample_BCFHW.grad.abs().sum() > 0
    assert all(p.grad is None for n in (adversary.trunk, adversary.critic) for p in n.parameters())
    assert all(p.requires_grad for n in (adversary.trunk, adversary.critic) for p in n.parameters())
    made = pair()[0]
    adversary.critic_loss(made, batch, torch.Generator().manual_seed(1))[0].backward()
    assert all(p.grad is not None for p in adversary.critic.parameters())
    assert all(p.grad is None for p in adversary.trunk.parameters())


def test_recomputed_activations_give_the_same_gradient_and_leave_the_trunk_alone(family, cache):
    found = []
    for checkpointing in (False, True):
        parts = build(replace(vdot(), checkpointing=checkpointing), family, cache)
        learned = list(parts.student.parameters())
        parts.optimizers["student_adversarial"].step = lambda learned=learned: found.append(
            [None if p.grad is None else p.grad.clone() for p in learned]
        )
        step(parts, Position(0, 1, 1, 0))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert any(g is not None and g.abs().max() > 0 for g in found[0])


def test_heads_are_those_of_the_other_discriminator(family):
    torch.manual_seed(3)
    other = Discriminator(wan.load_transformer(family / "teacher"), torch.zeros(1, 2, 64), blocks=4, tap_at=(1, 3))
    mine = Heads(24, 2, 2)
    mine.load_state_dict({k: v for k, v in other.state_dict().items() if k.startswith(("heads.", "final."))})
    features = [torch.randn(2, 7, 24) for _ in range(2)]
    read = torch.cat([head(f) for head, f in zip(other.heads, features, strict=True)], -1)
    assert torch.equal(mine(features), other.final(read)[:, 0])


# ------------------------------------------------------------------------------------------------ a run


def build(config, family, cache, run=None):
    student = tiny_recipes.start(config, family)
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")


def test_the_plan_alternates_matching_and_the_discriminator():
    for config in (vdot_lab(), vdot_wan_1_3b()):
        for iteration in range(6):
            done = {(u.learns, u.by) for u in config.plan if u.happens(iteration)}
            even = {("student", "dmd"), ("fake_score", "dmd")}
            odd = {("student", "relativistic"), ("fake_score", "dmd"), ("critic", "relativistic")}
            assert done == (odd if iteration % 2 else even)
        assert config.lesson(config.plan[1]) == Lesson(clips=("latent",), captions=True)


def test_a_run_resumes_bit_for_bit(family, cache, tmp_path):
    ends = []
    for name, stops in (("through", (4,)), ("stopped", (1, 2, 4))):
        (tmp_path / name).mkdir()
        for iterations in stops:
            parts = build(replace(vdot(), iterations=iterations), family, cache, tmp_path / name)
            run_training(parts, tmp_path / name)
        assert latest_checkpoint(tmp_path / name).name == "000004"
        ends.append(parts.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_run_with_no_transport_in_it_is_the_run_of_dmd(family, cache, tmp_path):
    ends = []
    for rho in (None, 0.0, 0.8):
        transport = None if rho is None else TransportConfig(rho=rho, eps=0.5, iterations=5)
        (tmp_path / str(rho)).mkdir()
        parts = build(
            replace(dmd().changed("dmd", transport=transport), iterations=2), family, cache, tmp_path / str(rho)
        )
        run_training(parts, tmp_path / str(rho))
        ends.append(parts.state())
    plain, none, some = ends
    assert all(torch.equal(plain[k], none[k]) for k in plain)
    assert not all(torch.equal(plain[k], some[k]) for k in plain)


def test_an_update_costs_the_calls_it_makes():
    from test_estimate import TINY, price

    matching, adversarial, fake_score, critic = price(vdot_wan_1_3b()).steps
    rolled = 280e12 + 1120e12  # a step before the one with gradient, and that
    assert matching.flops == 64 * (rolled + 2 * 280e12 + 280e12 + 5e12)
    assert adversarial.flops == 64 * (rolled + 280e12 + 300e12)
    assert critic.flops == 64 * (2 * 280e12 + 2 * 280e12 + 2 * 7e12)
    assert (matching.share, adversarial.share, fake_score.share, critic.share) == (0.5, 0.5, 1.0, 0.5)
    call, parameters = heads_call(TINY, 3)
    assert parameters == sum(p.numel() for p in Heads(24, 2, 3).parameters())
    assert call.work.flops > 0


@pytest.mark.slow
def test_the_full_size_recipe_trains_and_resumes_at_wans_shapes(tmp_path):
    from test_scale import trained_and_gone_on

    lines = trained_and_gone_on("vdot_wan", tmp_path)
    assert [line["update"] for line in lines] == [
        "student<dmd", "fake_score<dmd", "student<relativistic", "fake_score<dmd", "critic<relativistic"
    ]  # fmt: skip
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rho": 1.5}, "rho lies within 0 and 1"),
        ({"eps": 0.0}, "eps above 0"),
        ({"iterations": 0}, "iterations are at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        TransportConfig(**{"rho": 0.5, "eps": 0.5} | change)


def test_two_directions_and_a_discriminator_without_a_fake_score_are_refused():
    with pytest.raises(ValueError, match="leave one out"):
        vdot().changed("dmd", motion_weight=1.0)
    with pytest.raises(ValueError, match="the config has no 'matching' with one"):
        vdot().changed("relativistic", of="matching")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.changed("relativistic", taps=(1, 4)), "read after block 4 and the fake score has 4: lower taps"),
        (lambda c: replace(c, objectives=dict(reversed(c.objectives.items()))), "name dmd first in objectives"),
        (lambda c: replace(c, rollout=Euler(stop=1)), "leave a discriminator of clips out"),
    ],
)
def test_mistakes_are_sentences(change, said, family, cache):
    with pytest.raises(UserError, match=said):
        step(build(change(vdot()), family, cache), Position(0, 1, 1, 0))


@pytest.mark.slow
def test_far_apart_transport_is_measured_beside_matching():
    here = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "vdot_far.py")))
    for rho in (0.0, 0.8):
        distance, cosine = zip(*here.run(rho, seed=0, updates=60), strict=True)
        assert distance[0] == pytest.approx(10.0)
        assert distance[-1] < 8
        assert min(cosine) > 0.5
