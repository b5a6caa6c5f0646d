"""The motion surrogate: what it predicts, what it remembers, who learns from it, and when it is not trusted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mogan.config import Update
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.distributed import World
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.discriminator import Discriminator
from mogan.motion import estimators
from mogan.motion.observation import MotionObservation
from mogan.objectives.gan import GAN, GANConfig
from mogan.objectives.surrogate import Surrogate
from mogan.objectives.surrogate_network import MotionSurrogate, Remembered, relative_error, spread, window_of
from mogan.recipes import ablate, mogan_lab, mogan_surrogate_lab
from mogan.runs.checkpoint import latest_checkpoint, load_checkpoint, stored
from mogan.sampling.rollout import Rollout
from mogan.study import columns
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, complete, draw, learn, split, step
from tiny_recipes import shrink, surrogate

TEXT = torch.zeros(2, 3, 8)


def network(pairs=4, window=2):
    torch.manual_seed(0)
    return MotionSurrogate((4, 4, 4), window, width=8, blocks=2, pairs=pairs)


def seeded(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def judged(family):
    """Discriminator, exact observation and batch at the family's size."""
    torch.manual_seed(1)
    discriminator = Discriminator(
        wan.load_transformer(family / "teacher"), torch.randn(1, 4, 64), blocks=3, tap_at=(0, 1, 2)
    )
    vae, flow = wan.load_vae(family / "teacher", torch.float32), estimators.load_flow(str(family / "raft"), 2)
    observe = MotionObservation(vae, flow, window=2, max_flow=4.0)
    real = Batch(["a", "b"], ["", ""], [], seeded(3, 2, 4, 4, 4, 4), seeded(4, 2, 4, 2, 4, 4), window_start=1)
    return discriminator, observe, real


def objective(judged, limit, pairs=4):
    discriminator, observe, _ = judged
    seen = network(pairs)
    settings = GANConfig(space="motion", blocks=3, taps=(0, 1, 2), normalise=True, window=2, flow="lab")
    return Surrogate(seen, GAN(discriminator, Remembered(observe, seen), settings), limit)


# ------------------------------------------------------------------------------------------- the network


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.sampled_from([2, 4, 6]))
def test_it_predicts_one_latent_frame_per_frame_of_the_window(batch, window, start, side):
    latent = torch.randn(batch, 4, 5, side, 4)
    seen = MotionSurrogate((4, side, 4), window, width=8, blocks=1, pairs=2).see(latent, start)
    assert seen.shape == (batch, 4, window, side, 4)


def test_a_window_has_the_frame_before_it_and_no_gradient_goes_there():
    latent = seeded(0, 1, 4, 4, 4, 4).requires_grad_()
    assert torch.equal(window_of(latent, 2, 2), latent[:, :, 1:4])
    start = window_of(latent, 0, 2)
    assert torch.equal(start[:, :, 1:], latent[:, :, :2])
    assert not start[:, :, 0].any()
    window_of(latent, 2, 2).sum().backward()
    assert torch.equal(latent.grad.sum((0, 1, 3, 4)) > 0, torch.tensor([False, False, True, True]))


def test_the_error_is_relative_to_what_the_mean_of_a_channel_is_off_by():
    predicted, seen = seeded(1, 3, 4, 2, 4, 4), 2 * seeded(2, 3, 4, 2, 4, 4) + torch.arange(4.0).view(1, 4, 1, 1, 1)
    p, s = predicted.double().numpy(), seen.double().numpy()
    variance = np.mean([s[:, c].var() for c in range(4)])
    np.testing.assert_allclose(spread(seen), variance, rtol=1e-5)
    np.testing.assert_allclose(
        relative_error(predicted, seen, spread(seen)), ((p - s) ** 2).mean() / variance, rtol=1e-5
    )
    means = seen.mean((0, 2, 3, 4), keepdim=True).expand_as(seen)
    torch.testing.assert_close(relative_error(means, seen, spread(seen)), torch.tensor(1.0))


def test_it_remembers_the_newest_pairs_and_how_far_off_it_was_on_them():
    s = network(pairs=4)
    latents, seen = seeded(1, 6, 4, 4, 4, 4), seeded(2, 6, 4, 2, 4, 4)
    s.remember(latents[:3], 1, seen[:3])
    assert torch.isinf(s.error())  # of four pairs one is missing
    with torch.no_grad():
        expected = (s.see(latents[2:], 1) - seen[2:]).square().mean((1, 2, 3, 4))
    s.remember(latents[3:], 1, seen[3:])
    order = torch.tensor([2, 3, 0, 1])  # where pairs 2 ... 5 lie
    assert torch.equal(s.windows[order], latents[2:, :, 0:3])
    assert torch.equal(s.observations[order], seen[2:])
    torch.testing.assert_close(s.errors[order], expected)
    torch.testing.assert_close(s.error(), expected.mean() / spread(seen[2:]))
    assert set(s.state_dict()) >= {"windows", "observations", "errors", "count"}
    windows, drawn = s.recall(20, torch.Generator().manual_seed(0))
    assert all(any(torch.equal(d, o) for o in seen[2:]) for d in drawn)
    assert windows.shape == (20, 4, 3, 4, 4)


def test_places_that_nothing_is_stored_in_are_not_recalled():
    s = network(pairs=8)
    s.remember(seeded(1, 3, 4, 4, 4, 4), 1, seeded(2, 3, 4, 2, 4, 4))
    windows, seen = s.recall(100, torch.Generator().manual_seed(0))
    assert windows.flatten(1).any(1).all()
    assert len(seen.unique(dim=0)) == 3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 5))
def test_of_any_number_of_pairs_the_newest_stay(batches, pairs):
    s = network(pairs=pairs)
    stream = torch.arange(float(sum(batches))).view(-1, 1, 1, 1, 1).expand(-1, 4, 4, 4, 4)
    done = 0
    for size in batches:
        s.remember(stream[done : done + size], 0, stream[done : done + size, :, :2])
        done += size
    kept = set(s.observations[: min(done, pairs), 0, 0, 0, 0].tolist())
    assert kept == {float(n) for n in range(done)[-pairs:]}
    assert torch.isfinite(s.errors).sum() == min(done, pairs)


# ------------------------------------------------------------------------------------------- the objective


def test_student_gradient_goes_through_the_surrogate_and_reaches_the_student_alone(judged):
    ours, (discriminator, observe, real) = objective(judged, None), judged
    x0 = seeded(5, 2, 4, 4, 4, 4).requires_grad_()
    torch.nn.init.normal_(ours.network.last[-1].weight)
    discriminator.zero_grad()
    calls = []
    hook = observe.flow.register_forward_hook(lambda *a: calls.append(1))
    loss, logs = ours.student_loss(Rollout(x0, 0, TEXT), real, torch.Generator())
    loss.backward()
    hook.remove()
    assert not calls
    assert logs["predicted"] == 1
    assert x0.grad[:, :, 1:3].abs().sum() > 0
    assert x0.grad[:, :, 0].abs().sum() + x0.grad[:, :, 3].abs().sum() == 0
    untouched = (discriminator, ours.network, observe.vae, observe.flow)
    assert all(p.grad is None for n in untouched for p in n.parameters())


def test_the_discriminator_compares_predictions_with_predictions(judged):
    ours, (discriminator, _, real) = objective(judged, None), judged
    x0, shown = seeded(5, 2, 4, 4, 4, 4), []
    discriminator.zero_grad()
    hook = discriminator.register_forward_pre_hook(lambda m, a: shown.append(a[0]))
    ours.judge_loss(Rollout(x0, 0, TEXT), real, torch.Generator().manual_seed(0))[0].backward()
    hook.remove()
    with torch.no_grad():
        ((of_real, of_fake),) = [clips.split(len(x0)) for clips in shown]  # and no noisy ones: no penalties
        torch.testing.assert_close(of_real, ours.network.see(real.latent_BCFHW, 1))
        torch.testing.assert_close(of_fake, ours.network.see(x0, 1))
    assert all(p.grad is None for p in ours.network.parameters())
    assert all(p.grad is not None for p in discriminator.parameters() if p.requires_grad)


def test_the_surrogate_learns_from_real_and_remembered_pairs_alone(judged):
    ours, (discriminator, _, real) = objective(judged, 0.5, pairs=2), judged
    discriminator.zero_grad()

    def learnt(most=2):
        """The loss on the batch in parts of so many clips."""
        batch = ours.prepare(real, iteration=1, generator=torch.Generator().manual_seed(0), most=most)
        found = [ours.surrogate_loss(None, part, torch.Generator()) for part in split(batch, 2 // most)]
        return torch.stack([loss for loss, _ in found]).mean(), found[0][1]

    loss, logs = learnt()
    seen_real = real.observation_BCFHW
    torch.testing.assert_close(
        loss, relative_error(ours.network.see(real.latent_BCFHW, 1), seen_real, spread(seen_real))
    )
    assert not logs
    torch.testing.assert_close(learnt(most=1)[0], loss)
    x, seen = seeded(6, 2, 4, 4, 4, 4), seeded(7, 2, 4, 2, 4, 4)
    ours.network.remember(x, 0, seen)
    loss, logs = learnt()
    torch.testing.assert_close(learnt(most=1)[0], loss)
    chosen = (torch.rand(2, generator=torch.Generator().manual_seed(0)) * 2).long()
    with torch.no_grad():
        predicted = torch.cat([ours.network.see(real.latent_BCFHW, 1), ours.network.see(x, 0)[chosen]])
    compared = torch.cat([seen_real, seen[chosen]])
    torch.testing.assert_close(loss.detach(), relative_error(predicted, compared, spread(compared)))
    torch.testing.assert_close(logs["surrogate_error"], ours.network.error())
    loss.backward()
    assert all(p.grad is not None for p in ours.network.parameters())
    assert all(p.grad is None for p in discriminator.parameters())
    others = 3 * seeded(8, 2, 4, 2, 4, 4)  # another process's: the unit is of both
    both = replace(ours, rows=lambda mine: torch.cat([mine, others]))
    batch = both.prepare(real, iteration=1, generator=torch.Generator().manual_seed(0), most=2)
    torch.testing.assert_close(batch.more["unit"], spread(torch.cat([compared, others])).expand(2))


def test_above_the_limit_everything_is_as_without_a_surrogate_but_for_the_penalties(judged):
    ours, (discriminator, observe, real) = objective(judged, 0.5), judged
    plain = GAN(discriminator, observe, replace(ours.gan.settings, r1=0.0, r2=0.0))
    x0 = seeded(5, 2, 4, 4, 4, 4)
    for name in ("student_loss", "judge_loss"):
        found, logs = getattr(ours, name)(Rollout(x0, 0, TEXT), real, torch.Generator().manual_seed(1))
        expected, others = getattr(plain, name)(Rollout(x0, 0, TEXT), real, torch.Generator().manual_seed(1))
        assert torch.equal(found, expected)
        assert logs.pop("predicted") == 0
        assert logs == others
    ours.network.errors.zero_()  # four pairs were seen by now, predicted without error
    assert ours.student_loss(Rollout(x0, 0, TEXT), real, torch.Generator())[1]["predicted"] == 1


PARTS = ("student_weight", "judge_weight", "r1", "r2", "noise", "normalise")


def test_it_learns_what_the_exact_observation_is(judged):
    _, observe, _ = judged
    x = seeded(8, 4, 4, 3, 4, 4)
    with torch.no_grad():
        seen = observe(x, 1).latent_BCFHW
    torch.manual_seed(0)
    s = MotionSurrogate((4, 4, 4), 2, width=16, blocks=1, pairs=2)
    optimizer, errors = torch.optim.Adam(s.parameters(), 1e-2), []
    for _ in range(40):
        error = relative_error(s.see(x, 1), seen, spread(seen))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]


# ------------------------------------------------------------------------------------------- a run


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 5), st.integers(1, 9))
def test_one_of_two_updates_happens_where_one_leaves_out_what_the_other_has(iteration, start, every):
    common = {"learns": "student", "batch": 1, "start": start}
    exact = Update(by="gan", every=every, **common).happens(iteration)
    other = Update(by="surrogate", unless=every, **common).happens(iteration)
    assert exact + other == (iteration >= start)


def test_the_plan_has_one_motion_update_of_each_kind_in_every_iteration():
    for config in (mogan_surrogate_lab(), columns.surrogate_unchecked()):
        for iteration in range(20):
            motion = [u for u in config.plan if u.happens(iteration) and u.learns in ("student", "discriminator")]
            assert sorted(u.learns for u in motion if u.by != "dmd") == ["discriminator", "student"]


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_discriminator_judges_the_clips_of_the_students_update_again(pieces, family, cache, tmp_path, monkeypatch):
    config = surrogate()
    config = config.changed("surrogate", limit=None)
    plan = [
        replace(u, accumulate=pieces) if u.by == "surrogate" and u.learns != "surrogate" else u for u in config.plan
    ]
    config = replace(config, plan=tuple(plan))
    parts = assemble(
        config, open_cache(cache), model=str(family / "teacher"), student=str(family / "student"), run=tmp_path,
        device="cpu",
    )  # fmt: skip
    plan = {u.label: place for place, u in enumerate(config.plan)}
    judged = []
    monkeypatch.setattr(
        parts.objectives["surrogate"].judge.gan, "tell_apart", spy(judged, parts.objectives["surrogate"].judge.gan)
    )
    seen = []
    hook = parts.student.register_forward_hook(lambda m, a, out: seen.append(1))
    place = plan["student<surrogate"]
    where = Position(0, 1, place, 0)
    made = learn(parts, where, complete(parts, config.plan[place], draw(parts, where))).rollouts
    assert not made[0].sample_BCFHW.requires_grad
    rolled, place = len(seen), plan["discriminator<surrogate"]
    where = Position(0, 1, place, 0)
    step(parts, where, again=made)
    hook.remove()
    assert 0 < rolled == len(seen)
    start = draw(parts, where).window_start
    assert len(judged) == len(made) == pieces
    for one, again in zip(judged, made, strict=True):
        torch.testing.assert_close(one, parts.networks["surrogate"].see(again.sample_BCFHW, start).detach())


def spy(fakes, gan):
    original = gan.tell_apart

    def tell_apart(real, fake, *rest, **options):
        fakes.append(fake)
        return original(real, fake, *rest, **options)

    return tell_apart


@pytest.mark.parametrize("change", [{"batch": 4}, {"every": 2}, {"accumulate": 2}, {"start": 1}])
def test_clips_that_no_update_of_the_student_made_cannot_be_judged_again(change):
    config = mogan_surrogate_lab()
    plan = tuple(replace(u, **change) if u.again else u for u in config.plan)
    with pytest.raises(ValueError, match="discriminator<surrogate: the student's update before it"):
        replace(config, plan=plan)


def test_penalties_weigh_as_much_more_as_they_are_rarer():
    plain, rare = (recipe().objectives["gan"] for recipe in (mogan_lab, mogan_surrogate_lab))
    (every,) = {u.every for u in mogan_surrogate_lab().plan if u.by == "gan"}
    assert (rare.r1, rare.r2) == pytest.approx((every * plain.r1, every * plain.r2))


def run(family, cache, config, folder, iterations):
    student = str(family / "student")
    parts = assemble(
        config.with_budget(iterations), open_cache(cache), model=str(family / "teacher"), student=student, run=folder,
        device="cpu",
    )  # fmt: skip
    run_training(parts, folder)
    path = latest_checkpoint(folder)
    state = {name: torch.full(shape, torch.nan) for name, shape in stored(path).items()}
    load_checkpoint(path, state)
    return parts, state


def test_a_resumed_run_trusts_the_surrogate_where_the_whole_one_does(family, cache, tmp_path):
    config = surrogate()
    config = replace(config.changed("surrogate", limit=1e6), save_every=100)
    _, whole = run(family, cache, config, tmp_path / "whole", 3)
    run(family, cache, config, tmp_path / "parts", 2)
    parts, resumed = run(family, cache, config, tmp_path / "parts", 3)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert {k for k in whole if k.startswith("surrogate.")} >= {
        "surrogate.windows",
        "surrogate.errors",
        "surrogate.count",
    }
    assert parts.networks["surrogate"].count == 4  # student and discriminator exact in iteration 0; then predicted ...
    assert torch.isfinite(parts.networks["surrogate"].error())  # ... since the memory of 4 was full


def test_one_update_judged_by_two_is_the_sum_of_both(family, cache):
    config = shrink(columns.shared_rollout())
    assert [u.label for u in config.plan] == ["student<dmd+gan", "fake_score<dmd", "discriminator<gan"]
    parts = assemble(
        config, open_cache(cache), model=str(family / "teacher"), student=str(family / "student"), run=None
    )
    seen = []
    for part in parts.judges(config.plan[0]):
        original = part.losses["student"]
        part.losses["student"] = lambda *a, f=original: (seen.append((a[0], f(*a))), seen[-1][1])[1]
    record = step(parts, Position(0, 0, 0, 0))
    (first, (dmd, _)), (second, (gan, _)) = seen
    assert first is second
    assert record["loss"] == pytest.approx(dmd.item() + gan.item())
    assert {"motion", "fake_logit"} <= set(record)


def test_what_cannot_be_is_refused_in_a_sentence(family, cache, monkeypatch):
    with pytest.raises(ValueError, match="a gan with space motion"):
        ablate(surrogate, "latent-gan")
    settings = type(surrogate().objectives["surrogate"])
    own = settings.terms
    monkeypatch.setattr(
        settings, "terms", lambda self, config: replace(own(self, config), alone="it keeps to one process")
    )
    with pytest.raises(UserError, match="one process: start one, or choose another recipe"):
        assemble(surrogate(), open_cache(cache), model="", run=None, world=World(torch.device("cpu"), 0, 2))


# ------------------------------------------------------------------------------------------- other columns


def test_flow_at_half_resolution_is_in_pixels_of_the_whole_video(judged):
    _, observe, _ = judged
    sizes = []

    def moving(video):
        sizes.append(video.shape[-2:])
        return torch.ones(len(video), 2, video.shape[2] - 1, *video.shape[3:]) * torch.tensor([1.0, -2.0]).view(
            1, 2, 1, 1, 1
        )

    coarse = replace(observe, flow=moving, flow_resolution=0.5)
    seen = coarse(seeded(1, 1, 4, 3, 4, 4), 0)
    assert sizes == [(16, 16)]
    assert seen.flow_BCFHW.shape == (1, 2, 4, 32, 32)
    torch.testing.assert_close(seen.flow_BCFHW[0, :, 2, 5, 7], torch.tensor([2.0, -4.0]))
    wide = coarse._coarse_flow(torch.zeros(1, 3, 3, 24, 40), 0.3)  # 7 of 24 lines, 12 of 40 columns
    assert sizes[1:] == [(7, 12)]
    torch.testing.assert_close(wide[0, :, 1, 5, 7], torch.tensor([40 / 12, -2 * 24 / 7]))


def test_columns_change_what_they_say():
    assert columns.half_flow().objectives["gan"].flow_resolution == 0.5
    assert columns.few_refinements().objectives["gan"].flow_iterations == 2
    short = columns.short_window().objectives["gan"]
    assert (short.window, max(short.starts) + short.window) == (2, 5)
