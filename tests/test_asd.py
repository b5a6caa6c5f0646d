"""ASD and FFE: which steps, which gradient, which logit; what a student of several numbers of steps keeps beside its weights."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_recipes
from mogan.cli import main
from mogan.data.batches import Batch
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal
from mogan.models.denoiser import Denoiser
from mogan.models.discriminator import Heads
from mogan.objectives.asd import ASD, ASDConfig
from mogan.objectives.relativistic import Relativistic, RelativisticConfig
from mogan.recipes import asd_lab, asd_wan_1_3b
from mogan.runs.checkpoint import latest_checkpoint
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import Chunked, roll_out_causal
from mogan.sampling.rollout import FewStep, normal
from mogan.sampling.samplers import sample_student, seeded
from mogan.schedule import levels_of, shifted_levels
from mogan.training.load import find_models
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, step
from test_causal import TEXT, latents, loaded, trained
from test_train import build

SIGMAS = shifted_levels(4, 3.0)
NOTHING = Batch([], [], [])
FFE = Causal(1, 2, first_sigmas=SIGMAS)  # chunks of one and two latents
ALL = Chunked(FFE, (1, 2, 3, 4))


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def asd(family):
    student = CausalDenoiser(loaded(family), how=FFE)
    torch.manual_seed(0)
    settings = ASDConfig(critic=RelativisticConfig(taps=(1, 3), shift=3.0), weight=0.25)
    pair = Relativistic(Denoiser(wan.load_transformer(family / "teacher")), Heads(24, 2, 2, 3), settings.critic)
    return ASD(student, ALL, SIGMAS, pair, settings)


def made(asd, count, grad=False, seed=1):
    place = ALL.whole(SIGMAS, count)
    return ALL.make(asd.student, latents(3, seed), TEXT, SIGMAS, seeded([5, 6]), place, grad)


# ------------------------------------------------------------------------------------------------- which steps


def test_fewer_steps_take_levels_spread_evenly_over_all():
    for steps in range(1, 9):
        for count in range(1, steps + 1):
            levels = levels_of(tuple(range(steps)), count)
            assert levels == tuple(math.floor(i * steps / count) for i in range(count))
            if steps % count == 0:
                assert levels == tuple(range(steps))[:: steps // count]
                assert levels_of(shifted_levels(steps, 3.0), count) == pytest.approx(shifted_levels(count, 3.0))
    assert [levels_of((0, 1, 2, 3), n) for n in (1, 2, 3)] == [(0,), (0, 2), (0, 1, 2)]


@pytest.mark.parametrize("first", [None, SIGMAS], ids=["plain", "FFE"])
def test_every_number_of_steps_and_of_each_every_step_of_every_chunk_is_judged_as_often(first):
    stages = Chunked(Causal(1, 1, first_sigmas=first), (1, 2, 3, 4)).stages(SIGMAS)
    of_counts = Counter(count for count, *_ in stages)
    assert len(set(of_counts.values())) == 1
    for count in (1, 2, 3, 4):
        own = 4 if first else count
        firsts, others = (Counter(s[place] for s in stages if s[0] == count) for place in (1, 2))
        assert firsts == Counter(dict.fromkeys(range(own), of_counts[count] / own))
        assert others == Counter(dict.fromkeys(range(count), of_counts[count] / count))
        whole = ALL.stages(SIGMAS)[ALL.whole(SIGMAS, count)]
        assert whole == (count, 3, count - 1)
    plain = Chunked(Causal(1, 1))
    for seed in range(20):  # what was drawn before there were numbers of steps
        assert plain.draw(SIGMAS, generator(seed)) == FewStep().draw(SIGMAS, generator(seed))
    assert plain.steps(SIGMAS) == FewStep().steps(SIGMAS)
    assert ALL.steps(SIGMAS) == 0.75


def test_all_steps_always_are_self_forcing_and_a_first_chunk_at_the_same_levels_changes_nothing(asd):
    noise, how = latents(3), Causal(1, 2)
    for exit_step in range(4):
        want = roll_out_causal(
            asd.student, noise, TEXT, SIGMAS, generator(3), chunks=(1, 2), exit_step=exit_step
        ).sample_BCFHW
        for kind in (Chunked(how), Chunked(how, (4,)), Chunked(FFE)):
            found = kind.make(asd.student, noise, TEXT, SIGMAS, generator(3), exit_step, False)
            assert torch.equal(found.sample_BCFHW, want)
            assert (found.exit_step, found.count) == (exit_step, 4)
    fewer, enhanced = (
        kind.make(asd.student, noise, TEXT, SIGMAS, generator(3), kind.whole(SIGMAS, 2), False).sample_BCFHW
        for kind in (Chunked(how, (2,)), Chunked(FFE, (2,)))
    )
    assert not torch.equal(fewer, enhanced)
    want = sample_student(asd.student, TEXT, (4, 3, 4, 4), SIGMAS, [0, 1])
    for other in (Causal(1, 2), replace(FFE, first_sigmas=SIGMAS)):
        asd.student.how = other
        assert torch.equal(sample_student(asd.student, TEXT, (4, 3, 4, 4), SIGMAS, [0, 1]), want)


def test_calls_are_those_of_the_first_chunk_and_of_the_others_and_a_pass_between(asd, monkeypatch):
    """Sampling and whole training rollouts: ``n0 + (chunks - 1) n`` steps and ``chunks - 1`` passes that keep."""
    asd.student.how = replace(FFE, rest=1)
    kind, calls, velocity = Chunked(asd.student.how, (1, 2, 3, 4)), [], asd.student.velocity
    monkeypatch.setattr(
        asd.student, "velocity", lambda x, sigma, *a: (calls.append(float(sigma[0])), velocity(x, sigma, *a))[1]
    )
    for count in (1, 2, 3, 4):
        own = list(levels_of(SIGMAS, count))
        sample_student(asd.student, TEXT, (4, 3, 4, 4), tuple(own), [0, 1])
        expected = [*SIGMAS, 0, *own, 0, *own]
        assert calls == pytest.approx(expected)
        assert sum(level > 0 for level in calls) == 4 + 2 * count
        calls.clear()
        kind.make(asd.student, latents(3), TEXT, SIGMAS, generator(0), kind.whole(SIGMAS, count), False)
        assert calls == pytest.approx(expected)
        calls.clear()


# ------------------------------------------------------------------------------------------------- which gradient


def test_what_is_compared_with_is_what_is_sampled_in_one_step_more_from_other_noise(asd):
    for count in (1, 2, 3):
        more = asd.one_step_more(made(asd, count), seeded([8, 9]))
        levels = levels_of(SIGMAS, count + 1)
        assert torch.equal(more, sample_student(asd.student, TEXT, (4, 3, 4, 4), levels, [8, 9]))
        assert not more.requires_grad


def test_gradient_flows_through_the_clips_of_n_steps_and_through_none_of_one_step_more(asd):
    found = []
    for frozen_copy in (False, True):
        draws, rollout = seeded([8, 9]), made(asd, 1, grad=True)
        if frozen_copy:
            more = asd.one_step_more(rollout, draws)
            asd.one_step_more = lambda rollout, generator, more=more: more.clone()
        asd.student_loss(rollout, NOTHING, draws)[0].backward()
        found.append([p.grad.clone() for p in asd.student.parameters() if p.grad is not None])
        asd.student.zero_grad()
    assert all(map(torch.equal, *found))
    assert any(g.abs().max() > 0 for g in found[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_critic_learns_by_one_logit_alone_and_the_student_through_what_does_not_learn(asd, count):
    critic, trunk = asd.pair.critic, asd.pair.trunk
    asd.critic_loss(made(asd, count), NOTHING, seeded([8, 9]))[0].backward()
    last = critic.final[-1]
    rows = last.weight.grad.abs().sum(1)
    assert [bool(row > 0) for row in rows] == [number == count - 1 for number in range(3)]
    assert last.bias.grad.abs().max() < 1e-6  # of a difference a constant is nothing
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in critic.heads.parameters() if p.ndim > 2)
    assert all(p.grad is None for n in (trunk, asd.student) for p in n.parameters())
    critic.zero_grad()
    asd.student_loss(made(asd, count, grad=True), NOTHING, seeded([8, 9]))[0].backward()
    assert all(p.grad is None for n in (trunk, critic) for p in n.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in asd.student.parameters())


def test_in_all_of_its_steps_the_student_has_nobody_above_it(asd):
    rollout = made(asd, 4, grad=True)
    loss, numbers = asd.student_loss(rollout, NOTHING, seeded([8, 9]))
    loss.backward()
    assert (loss.item(), numbers) == (0.0, {})
    assert all(p.grad is None or not p.grad.any() for p in asd.student.parameters())


# ------------------------------------------------------------------------------------------------- the losses


def test_losses_stand_as_written(asd):
    """Levels and noise of their own, the trunk told them; the pair of a logit; penalties in units of their noise."""
    rollout = made(asd, 2)
    with torch.no_grad():
        student = asd.student_loss(rollout, NOTHING, seeded([8, 9]))
        critic = asd.critic_loss(rollout, NOTHING, seeded([8, 9]))
        draws, logits = seeded([8, 9]), []
        more = asd.one_step_more(rollout, draws)
        noisy = []
        for x in (more, rollout.sample_BCFHW):
            u = torch.cat([torch.rand(1, generator=g) for g in draws]).numpy()
            s = torch.from_numpy(np.clip(3 * u / (1 + 2 * u), 0.02, 0.98).astype(np.float32))
            at = s.view(2, 1, 1, 1, 1)
            noisy.append(((1 - at) * x + at * normal(x.shape, draws, "cpu"), s))
        noisy += [(x + 0.1 * normal(x.shape, draws, "cpu"), s) for x, s in noisy]
        for x, s in noisy:
            outputs: list = []
            note = lambda m, a, out, outputs=outputs: outputs.append(out)  # noqa: E731
            hooks = [asd.pair.trunk.transformer.blocks[i].register_forward_hook(note) for i in (1, 3)]
            asd.pair.trunk.transformer(x, 1000 * s, TEXT)
            for hook in hooks:
                hook.remove()
            read = [head(f) for head, f in zip(asd.pair.critic.heads, outputs, strict=True)]
            logits.append(asd.pair.critic.final(torch.cat(read, -1))[:, 1].double().numpy())
    softplus = lambda x: np.log1p(np.exp(x)).mean()  # noqa: E731
    r1, r2 = (((logits[k] - logits[k + 2]) / 0.1) ** 2 for k in (0, 1))
    assert student[0].item() == pytest.approx(0.25 * softplus(logits[0] - logits[1]), rel=1e-4)
    expected = softplus(logits[1] - logits[0]) + 0.3 * r1.mean() + 0.3 * r2.mean()
    assert critic[0].item() == pytest.approx(expected, rel=1e-3)
    assert critic[1]["r1"].item() == pytest.approx(r1.mean(), rel=1e-2)
    assert critic[1]["gap"].item() == pytest.approx((logits[0] - logits[1]).mean(), abs=1e-4)


def test_equal_logits_are_log_two_and_a_constant_added_to_all_changes_nothing(asd, monkeypatch):
    asd.settings, rollout = replace(asd.settings, weight=1.0), made(asd, 2)
    spread = torch.randn(8, generator=generator(7))

    def losses(logits):
        monkeypatch.setattr(asd.pair.critic, "forward", lambda features, number: logits[: len(features[0])])
        both = (asd.student_loss, asd.critic_loss)
        return torch.stack([loss(rollout, NOTHING, seeded([8, 9]))[0] for loss in both])

    torch.testing.assert_close(losses(torch.full((8,), 3.0)), torch.full((2,), math.log(2)))
    torch.testing.assert_close(losses(spread + 5), losses(spread))
    assert not torch.allclose(losses(spread), losses(torch.cat([spread[:2] + 1, spread[2:]])))


# ------------------------------------------------------------------------------------------------- a run


def at_count(parts, count, update=0):
    """An iteration in which an update draws so many steps."""
    kind = parts.rollout(parts.config.plan[update])
    for iteration in range(200):
        where = Position(0, iteration, update, 0)
        if kind.stages(SIGMAS)[kind.draw(SIGMAS, where.generator(0))][0] == count:
            return where
    raise AssertionError


def test_in_all_steps_the_students_update_is_that_of_distribution_matching_and_in_fewer_it_is_not(family, cache):
    config = tiny_recipes.asd()
    plain = replace(config, plan=(replace(config.plan[0], by="dmd"), *config.plan[1:]))
    for count, same in ((4, True), (2, False)):
        after = []
        for each in (config, plain):
            parts = build(each, family, cache)
            where = at_count(parts, count)
            step(parts, where, draw(parts, where))
            after.append([p.clone() for p in parts.student.parameters()])
        assert all(map(torch.equal, *after)) == same


def test_recipes_train_one_student_for_one_to_four_steps_and_the_critic_for_fewer():
    for config in (asd_lab(), asd_wan_1_3b()):
        student, fake_score, critic = config.plan
        assert (config.counts, critic.rollout.counts) == ((1, 2, 3, 4), (1, 2, 3))
        assert (student.by, fake_score.by, critic.learns) == ("dmd+asd", "dmd", "critic")
        assert config.causal.first_sigmas == config.sigmas
        assert config.objectives["asd"].weight == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, 3])
def test_a_run_resumes_bit_for_bit(lora, family, cache, tmp_path):
    ends = []
    for name, stops in (("through", (4,)), ("stopped", (1, 2, 4))):
        (tmp_path / name).mkdir()
        for iterations in stops:
            parts = build(replace(tiny_recipes.asd(), lora=lora, iterations=iterations), family, cache, tmp_path / name)
            run_training(parts, tmp_path / name)
        assert latest_checkpoint(tmp_path / name).name == "000004"
        ends.append(parts.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_recomputed_activations_give_the_same_gradient(family, cache):
    found = []
    for checkpointing in (False, True):
        parts = build(replace(tiny_recipes.asd(), checkpointing=checkpointing), family, cache)
        learned = list(parts.student.parameters())
        parts.optimizers["student"].step = lambda learned=learned: found.append(
            [None if p.grad is None else p.grad.clone() for p in learned]
        )
        step(parts, at_count(parts, 2))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_run_and_export_are_sampled_alike_in_every_number_of_steps(family, cache, tmp_path, capsys):
    config = replace(tiny_recipes.asd(), iterations=1)
    run, out = trained(config, family, cache, tmp_path / "run"), tmp_path / "export"
    assert main(["export", str(run), "--out", str(out)]) == 0
    facts = json.loads((out / "mogan.json").read_text())
    assert (facts["counts"], facts["causal"]["first_sigmas"]) == ([1, 2, 3, 4], list(SIGMAS))
    card = (out / "README.md").read_text()
    assert "`--steps` of `mogan sample` may be 1, 2, 3, 4; left out: 4" in card
    assert "the first always at noise levels 1, 0.9, 0.75, 0.5" in card
    both = [open_generator(str(place)) for place in (run, out)]
    assert both[0].causal == both[1].causal == config.causal
    clips = {}
    for count in (1, 2, 3, 4):
        some = [g.in_steps(count) for g in both]
        assert some[0].sigmas == some[1].sigmas == levels_of(SIGMAS, count)
        assert some[0].steps_told() == some[1].steps_told()
        made = [sample_student(g.load().eval(), TEXT, (4, 4, 4, 4), g.sigmas, [0, 1]) for g in some]
        assert torch.equal(*made)
        clips[count] = made[0]
    assert torch.equal(clips[1][:, :, :1], clips[4][:, :, :1])  # the first chunk takes all steps
    assert not torch.equal(clips[1], clips[4])
    with pytest.raises(UserError, match="trained for 1, 2, 3, 4 steps, not for 5"):
        both[0].in_steps(5)
    (tmp_path / "p.txt").write_text("a\n")
    sample = ["sample", "--model", str(out), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "clips")]
    assert main([*sample, "--steps", "2"]) == 0
    row = json.loads((tmp_path / "clips" / "samples.jsonl").read_text().splitlines()[0])
    assert (row["sigmas"], row["causal"]["first_sigmas"]) == ([1.0, 0.75], list(SIGMAS))
    capsys.readouterr()
    (out / "mogan.json").write_text(json.dumps(facts | {"causal": facts["causal"] | {"first_sigmas": [1, 2]}}))
    with pytest.raises(UserError, match="first_sigmas and sizes if it has them"):
        wan.defaults(out)


def test_it_starts_from_a_student_whose_first_chunk_takes_no_steps_of_its_own(family, cache, tmp_path):
    config, teacher = tiny_recipes.asd(), str(family / "teacher")
    run = trained(replace(tiny_recipes.self_forcing(), iterations=1), family, cache, tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    assert find_models(config, teacher, str(tmp_path / "export"))[1] == tmp_path / "export"
    how = replace(config.causal, rest=3)
    critic = replace(config.plan[2], rollout=Chunked(how, (1, 2, 3)))
    other = replace(config, rollout=Chunked(how, (1, 2, 3, 4)), plan=(*config.plan[:2], critic))
    with pytest.raises(UserError, match="go on with the recipe that made it"):
        find_models(other, teacher, str(tmp_path / "export"))


def test_an_update_costs_the_calls_it_makes():
    from test_estimate import price

    student, fake_score, critic = price(asd_wan_1_3b()).steps
    whole = (2 + 1 / 7) * 280e12 + 280e12  # two steps more on the average, three of one chunk of seven
    rolled = (0.75 + 0.75 / 7) * 280e12
    asd = 0.75 * whole + 280e12 + 300e12
    assert student.flops == pytest.approx(64 * (rolled + 1120e12 + 3 * 280e12 + asd))
    assert fake_score.flops == pytest.approx(64 * (rolled + 280e12 + 1120e12))
    assert critic.flops == pytest.approx(64 * ((0.5 + 1 / 7) * 280e12 + 280e12 + whole + 4 * 280e12 + 4 * 7e12))


@pytest.mark.slow
def test_the_full_size_recipe_trains_and_resumes_at_wans_shapes(tmp_path, monkeypatch):
    from test_scale import LONG, frames_seen, trained_and_gone_on

    seen = frames_seen(monkeypatch)
    lines = trained_and_gone_on("asd_wan", tmp_path, LONG)
    assert set(seen) == {(), (0, 1, 2), (0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 7, 8)}  # the second chunk has left the window
    assert [line["update"] for line in lines] == ["student<dmd+asd", "fake_score<dmd", "critic<asd"] * 2
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: replace(c, rollout=Chunked(c.causal)), "trained for them all"),
        (lambda c: replace(c, rollout=Chunked(c.causal, (1, 2, 4))), "trained for them all"),
        (lambda c: replace(c, rollout=Chunked(c.causal, (1, 2, 3, 5))), "must rise and lie within 1"),
        (lambda c: replace(c, rollout=Chunked(c.causal, (2, 1, 3, 4))), "must rise and lie within 1"),
        (lambda c: replace(c, plan=(*c.plan[:2], replace(c.plan[2], rollout=None))), "nothing to compare"),
        (lambda c: replace(c, rollout=FewStep()), "trained for them all"),
        (
            lambda c: replace(
                c, rollout=replace(c.rollout, causal=replace(c.causal, sizes=(c.causal.rest, c.causal.rest + 1)))
            ),
            "leave sizes out",
        ),
        (
            lambda c: c.changed("asd", critic=RelativisticConfig(taps=(1,), shift=3.0, of="other")),
            "no 'other' with one",
        ),
        (lambda c: Causal(1, 1, first_sigmas=(0.9, 0.5)), "first chunk fall from 1"),
    ],
)
def test_mistakes_are_sentences(change, said):
    with pytest.raises(ValueError, match=said):
        change(tiny_recipes.asd())
