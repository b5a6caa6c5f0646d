"""Re-DMD: weights by reward, of the whole batch; what they change and what they cannot; rewards of one's own."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tiny_recipes
from mogan.cli import main
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.distributed import ONE
from mogan.errors import UserError
from mogan.estimate.random_wan import random_wan
from mogan.models.attention import stack_text
from mogan.models.autoencoder import decode_video, stream_video
from mogan.models.denoiser import Denoiser
from mogan.motion.flow import flow_of_pieces
from mogan.motion.pixel_flux import net_motion
from mogan.objectives.dmd import DMD, DMDConfig
from mogan.objectives.redmd import SHARE, Standard, Weights, WeightsConfig, clip_weights
from mogan.recipes import dmd2_wan_1_3b, dmd_lab, redmd_lab, redmd_wan_1_3b
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.sampling.rollout import Euler, Rollout
from mogan.sampling.samplers import sample_teacher
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, step
from tiny_recipes import dmd, redmd

TEXT = torch.zeros(1, 2, 8)


def weighted(config=None, **settings):
    config = config or redmd()
    return config.changed("dmd", weights=replace(config.objectives["dmd"].weights, **settings))


def build(config, family, cache, run=None):
    student = tiny_recipes.start(config, family)
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")


# ------------------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize(
    ("beta", "masses", "effective"),
    [(2.0, (0.439, 0.362, 0.199), 0.87), (1.0, (0.279, 0.379, 0.343), 0.56), (0.5, (0.072, 0.268, 0.660), 0.22)],
)
def test_weights_tilt_a_mixture_as_the_gibbs_distribution_and_their_share_is_the_effective_one(beta, masses, effective):
    reward = torch.tensor([0.0] * 60 + [1.0] * 30 + [2.0] * 10).double()
    weight, share = clip_weights(reward, beta, True, ONE)
    assert [float(weight[reward == r].sum()) / 100 for r in (0, 1, 2)] == pytest.approx(masses, abs=6e-4)
    assert weight.mean() == pytest.approx(1.0)
    assert share == pytest.approx(effective, abs=6e-3)
    plain, same = clip_weights(reward, beta, False, ONE)
    np.testing.assert_allclose(plain, np.exp(reward.numpy() / beta))
    assert same == pytest.approx(share)


def test_adding_a_constant_changes_nothing_normalised_and_scales_the_others():
    reward = torch.randn(7, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(clip_weights(reward + 3, 0.5, True, ONE), clip_weights(reward, 0.5, True, ONE))
    scaled = clip_weights(reward + 3, 0.5, False, ONE)[0] / clip_weights(reward, 0.5, False, ONE)[0]
    torch.testing.assert_close(scaled, torch.full_like(scaled, math.exp(3 / 0.5)))


def halves(world_of):
    """What two processes with a half of the clips each make of it; ``world_of`` gives the other's numbers."""
    mine, theirs = torch.tensor([0.0, 1.0]).double(), torch.tensor([2.0, 3.0]).double()
    return [world_of(*both) for both in ((mine, theirs), (theirs, mine))]


def test_weights_of_processes_are_those_of_the_whole_batch():
    def weighed(own, other):
        also = iter([(other - 3).exp().mean(), (other - 3).exp().square().mean()])
        world = SimpleNamespace(largest=lambda x: torch.cat([own, other]).max(), average=lambda x: (x + next(also)) / 2)
        return clip_weights(own, 1.0, True, world)

    (first, share), (second, same) = halves(weighed)
    whole, expected = clip_weights(torch.arange(4.0).double(), 1.0, True, ONE)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(torch.stack([share, same]), expected.expand(2))


def test_the_unit_of_rewards_is_of_the_clips_of_all_processes():
    def measured(own, other):
        also = iter([other.mean(), (other - 1.5).square().mean()])
        weights = Weights(
            None,
            None,
            WeightsConfig(beta=1.0, flow="lab"),
            Standard(None),
            world=SimpleNamespace(average=lambda x: (x + next(also)) / 2),
            reference=lambda: iter([(own, ["a", "b"])]),
        )
        weights.rewards = lambda latent, prompts: latent
        weights._measure()
        return weights.standard.numbers_2

    for found in halves(measured):
        torch.testing.assert_close(found, torch.tensor([1.5, 1.25**0.5]))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_rewards_and_infinite_beta_weigh_one_exactly(count):
    assert torch.equal(clip_weights(torch.full((count,), 1.37), 0.5, True, ONE)[0], torch.ones(count))
    assert torch.equal(clip_weights(torch.randn(count), math.inf, True, ONE)[0], torch.ones(count))
    assert torch.equal(clip_weights(torch.randn(count), math.inf, False, ONE)[0], torch.ones(count))


# ------------------------------------------------------------------------------------------------ the loss


class Linear(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x, timestep, text, return_dict=False):
        return (self.a * x,)


def loss_and_gradient(more, real=0.9, fake=0.2):
    x = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    matching = DMD(Denoiser(Linear(real)), Denoiser(Linear(fake)), TEXT, DMDConfig(guidance=1.0, shift=1.0))
    rollout = Rollout(x, 0, TEXT.expand(3, -1, -1))
    loss, _ = matching.student_loss(rollout, Batch([], [], [], more=more), torch.Generator().manual_seed(2))
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def test_a_clips_gradient_is_its_weight_times_that_of_dmd():
    weight = torch.tensor([0.5, 2.0, 0.0])
    (plain, gradient), (loss, found) = loss_and_gradient({}), loss_and_gradient({"weight": weight})
    torch.testing.assert_close(found, weight.view(-1, 1, 1, 1, 1) * gradient)
    numel = gradient[0].numel()  # a clip's loss is half the mean square of g, and its gradient g / (3 numel)
    clips = [0.5 * ((3 * numel * g) ** 2).mean() for g in gradient.double().numpy()]
    assert plain.item() == pytest.approx(np.mean(clips), rel=1e-4)
    assert loss.item() == pytest.approx(np.mean(weight.numpy() * clips), rel=1e-4)


def test_weights_of_one_are_dmd_bit_for_bit():
    for a, b in zip(loss_and_gradient({}), loss_and_gradient({"weight": torch.ones(3)}), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(loss_and_gradient({})[1], loss_and_gradient({"weight": torch.tensor([1.0, 1.0, 1.01])})[1])


def test_a_student_that_matches_its_teacher_is_left_alone_whatever_is_rewarded():
    """The fixed point is the teacher's distribution, not the tilted one: a weight of zero difference is zero."""
    weight = torch.tensor([0.1, 1.0, 9.0])
    assert not loss_and_gradient({"weight": weight}, real=0.4, fake=0.4)[1].any()
    assert loss_and_gradient({"weight": weight}, real=0.4, fake=0.5)[1].any()


# ------------------------------------------------------------------------------------------------ in a run


class Brightness(nn.Module):
    """A small local model in a reward's place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.prompts = nn.Linear(3, 1), []

    def forward(self, video, prompts):
        self.prompts += prompts
        return self.layer(video.mean((2, 3, 4)))[:, 0]


def brightness(device):
    return Brightness().to(device)


def constant(device):
    return lambda video, prompts: torch.full((len(video),), 0.3)


def no_function(device):
    return 3


def fails(device):
    def judge(video, prompts):
        return {}["a score"]

    return judge


def a_scalar(device):
    return lambda video, prompts: video.mean()


def a_number(device):
    return lambda video, prompts: float(video.mean())


def none(device):
    return lambda video, prompts: torch.full((len(video),), math.nan)


def endless(device):
    return lambda video, prompts: torch.full((len(video),), math.inf)


def own(function, **settings):
    return weighted(reward=f"test_redmd:{function.__name__}", **{"standard": (0.0, 1.0), **settings})


def test_gradient_reaches_neither_the_decoder_nor_the_reward(family, cache):
    parts = build(own(brightness), family, cache)
    reward = Brightness()
    weights = Weights(
        reward,
        parts.vae,
        WeightsConfig(beta=0.5, flow="lab"),
        Standard((0.0, 1.0)),
        world=ONE,
        reference=lambda: iter(()),
    )
    z = torch.randn(2, *parts.latent_shape, requires_grad=True)
    parts.vae.requires_grad_(True)
    batch = weights.compare(Batch(["a", "b"], ["x", "y"], []), [Rollout(z[:1], 0, TEXT), Rollout(z[1:], 0, TEXT)])
    assert reward.prompts == ["x", "y"]
    assert not batch.more["weight"].requires_grad
    with torch.no_grad():
        r = reward(decode_video(parts.vae, z), ["", ""]).clamp(-2, 2).double().numpy()
    np.testing.assert_allclose(batch.more["weight"], 2 * np.exp(r / 0.5) / np.exp(r / 0.5).sum(), rtol=1e-4)
    parts.vae.requires_grad_(False)
    step(parts, Position(0, 0, 0, 0))
    assert all(p.grad is None for p in (*parts.vae.parameters(), *reward.parameters()))


def test_rewards_are_limited():
    found = {}
    for limit in (2.0, 100.0):
        weights = Weights(
            lambda video, prompts: torch.full((1,), float(prompts[0])),
            None,
            WeightsConfig(beta=1.0, flow="lab", limit=limit),
            Standard((1.0, 2.0)),
            world=ONE,
            reference=lambda: iter(()),
        )
        weights.rewards = lambda latent, prompts: torch.tensor([float(p) for p in prompts])
        made = [Rollout(torch.zeros(3, 1, 1, 1, 1), 0, TEXT)]
        found[limit] = weights.compare(Batch(["a"] * 3, ["1", "5", "15"], []), made).more["weight"]
    r = np.exp([0.0, 2.0, 2.0])
    np.testing.assert_allclose(found[2.0], 3 * r / r.sum(), rtol=1e-5)
    assert found[100.0][2] > 2.5


@pytest.mark.parametrize("settings", [{"reward": "test_redmd:constant"}, {"beta": math.inf}])
def test_a_run_of_equal_rewards_or_infinite_beta_is_the_run_of_dmd(settings, family, cache, tmp_path):
    ends = []
    for config in (dmd(), weighted(standard=(0.1, 0.2), **settings), own(brightness)):
        (tmp_path / str(len(ends))).mkdir()
        parts = build(replace(config, iterations=2), family, cache, tmp_path / str(len(ends)))
        run_training(parts, tmp_path / str(len(ends)))
        ends.append(parts.state())
    plain, ours, others = ends
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[k], ours[k]) for k in plain)
    assert not all(torch.equal(plain[k], others[k]) for k in plain)  # a reward that tells clips apart is another run


def test_weights_are_of_the_whole_batch_however_it_is_cut(family, cache):
    found = {}
    for pieces in (1, 2, 4):
        config = own(brightness, standard=(0.0, 0.01), limit=100.0)
        plan = (replace(config.plan[0], batch=4, accumulate=pieces), *config.plan[1:])
        parts, seen = build(replace(config, plan=plan), family, cache), []
        loss = parts.objectives["dmd"].losses["student"]

        def noted(rollout, batch, generator, loss=loss, seen=seen):
            seen.append(batch.more["weight"])
            return loss(rollout, batch, generator)

        parts.objectives["dmd"].losses["student"] = noted
        numbers = step(parts, Position(0, 0, 0, 0))
        del numbers["direction"]  # a root of a mean: the mean of the parts' is another number
        assert len(seen) == pieces
        found[pieces] = torch.cat(seen), numbers
    for pieces in (2, 4):
        torch.testing.assert_close(found[pieces][0], found[1][0], rtol=1e-3, atol=1e-4)
        assert found[pieces][1] == pytest.approx(found[1][1], rel=1e-3)
    weight, numbers = found[1]
    assert weight.std() > 0.05  # told apart: weights of parts of one clip each would all be 1
    assert weight.mean() == pytest.approx(1.0, abs=1e-5)
    assert numbers["share"] == pytest.approx(float(weight.sum() ** 2 / (4 * weight.square().sum())), rel=1e-4)


def test_the_clips_that_are_judged_are_the_clips_that_were_weighed(family, cache):
    config = own(brightness)
    parts = build(replace(config, plan=(replace(config.plan[0], accumulate=2), *config.plan[1:])), family, cache)
    seen = {"weighed": [], "judged": []}
    compare, loss = parts.objectives["dmd"].compare["student"], parts.objectives["dmd"].losses["student"]

    def weighed(batch, rollouts):
        seen["weighed"] += [r.sample_BCFHW for r in rollouts]
        assert not any(r.sample_BCFHW.requires_grad for r in rollouts)
        return compare(batch, rollouts)

    def judged(rollout, batch, generator):
        seen["judged"].append(rollout.sample_BCFHW.detach())
        return loss(rollout, batch, generator)

    parts.objectives["dmd"].compare = {"student": weighed}
    parts.objectives["dmd"].losses["student"] = judged
    step(parts, Position(0, 0, 0, 0))
    for a, b in zip(seen["weighed"], seen["judged"], strict=True):
        assert torch.equal(a, b)
    step(parts, Position(0, 0, 1, 0))
    assert len(seen["weighed"]) == 2  # the fake score learns of all clips alike


# ------------------------------------------------------------------------------------------------ the unit of rewards


def test_the_unit_is_the_teachers_clips_measured_once_and_kept(family, cache, tmp_path):
    config = weighted(clips=3)
    parts = build(replace(config, iterations=1), family, cache, tmp_path)
    judge, encode = parts.objectives["dmd"].judge, open_cache(cache)
    run_training(parts, tmp_path)
    kept = load_part(latest_checkpoint(tmp_path), "reward_standard")["numbers_2"]

    motions = []
    for n in range(3):
        caption = encode.entries[n * 8 // 3]["caption"]
        text = stack_text([encode.text(caption)])
        z = sample_teacher(
            judge.teacher, text, judge.null_1LD, parts.latent_shape, [n], steps=50, guidance=3.0, shift=5.0
        )
        motions.append(net_motion(flow_of_pieces(stream_video(parts.vae, z), parts.flow)).item())
    assert kept.tolist() == pytest.approx([np.mean(motions), np.std(motions)], rel=1e-3)

    again = build(replace(config, iterations=2), family, cache, tmp_path)
    again.objectives["dmd"].compare["student"].__self__.reference = None  # nothing is measured a second time
    run_training(again, tmp_path)
    through = tmp_path / "through"
    through.mkdir()
    whole = build(replace(config, iterations=2), family, cache, through)
    run_training(whole, through)
    a, b = again.state(), whole.state()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_run_of_adapters_goes_on_bit_for_bit(family, cache, tmp_path):
    ends = []
    for name, stops in (("whole", (2,)), ("parts", (1, 2))):
        (tmp_path / name).mkdir()
        for iterations in stops:
            parts = build(replace(redmd(), iterations=iterations, lora=3), family, cache, tmp_path / name)
            run_training(parts, tmp_path / name)
        ends.append(parts.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_unit_in_the_recipe_is_taken_and_nothing_is_measured(family, cache):
    parts = build(weighted(standard=(0.5, 2.0)), family, cache)
    assert "reward_standard" not in parts.networks
    step(parts, Position(0, 0, 0, 0))


def test_the_student_goes_on_with_a_run_of_adapters_whose_unit_is_measured_anew(family, cache):
    parts = build(replace(redmd(), lora=2), family, cache)
    step(parts, Position(0, 0, 0, 0))
    assert parts.networks["reward_standard"].numbers_2.isfinite().all()


# ------------------------------------------------------------------------------------------------ mistakes and warnings


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: own(fails), r"test_redmd:fails failed\n.*in judge(.|\n)*KeyError: 'a score'"),
        (lambda: own(no_function), "returns a int: let it return a function of clips"),
        (lambda: own(a_scalar), r"of shape \(\) for one clip: a reward is a tensor \(B,\)"),
        (lambda: own(a_number), r"returns a float for one clip: a reward is a tensor \(B,\)"),
        (lambda: weighted(reward="test_redmd:brightnes"), "has no function 'brightnes': did you mean 'brightness'"),
        (lambda: weighted(reward="no_such_module:f"), "no module 'no_such_module'"),
        (lambda: own(constant, standard=None), "the same for all 2 clips of the teacher, which gives it no unit"),
        (lambda: own(none, standard=None), "test_redmd:none of clips of the teacher is not finite"),
        (lambda: own(none), r"the loss is nan .* Look at .*reward \(nan\)"),
        (lambda: own(endless), r"the loss is nan .* Look at .*reward \(inf\)"),  # not a clip that is at the limit
        (lambda: replace(weighted(standard=(0.0, 1.0)), rollout=Euler(stop=1)), "leave a reward out"),
    ],
)
def test_mistakes_are_sentences(config, said, family, cache):
    with pytest.raises(UserError, match=said):
        step(build(config(), family, cache), Position(0, 0, 0, 0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0}, "beta and limit must be above 0"),
        ({"limit": -1.0}, "beta and limit must be above 0"),
        ({"standard": (0.0, 0.0)}, "deviation must be above 0"),
        ({"clips": 1}, "at least 2 clips"),
        ({"reward": "motion"}, "net_motion or module:function of yours, not 'motion'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        weighted(**settings)


def test_weights_and_another_metric_do_not_go_together():
    with pytest.raises(ValueError, match="leave one out"):
        redmd().changed("dmd", huber=0.1)


def test_a_small_share_is_told():
    assert SHARE in redmd_lab().terms("dmd").alarms
    assert SHARE not in dmd_lab().terms("dmd").alarms
    assert SHARE.wrong(0.9, 0.29)
    assert not SHARE.wrong(0.1, 0.31)


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(("ours", "base"), [(redmd_lab, dmd_lab), (redmd_wan_1_3b, dmd2_wan_1_3b)])
def test_recipes_differ_from_dmd_by_the_weights_and_what_they_start_from(ours, base):
    ours, base = ours(), base()
    assert ours.objectives["dmd"].weights.beta == 0.5
    assert ours.objectives["dmd"].weights.normalise
    same = replace(ours, recipe=base.recipe, post_trains=False, iterations=base.iterations).changed("dmd", weights=None)
    assert same == base


def test_a_config_of_weights_is_written_and_read_as_the_same_run(family, cache, tmp_path):
    config = weighted(beta=math.inf, standard=(0.0, 1.0))
    text = json.dumps(config.as_json())
    assert json.loads(text)["objectives"]["dmd"]["weights"]["beta"] == math.inf


def test_weights_cost_a_roll_out_a_decoding_and_its_flow_more():
    from test_estimate import price

    plain, ours = price(replace(dmd2_wan_1_3b(), post_trains=True)), price(redmd_wan_1_3b())
    more = ours.steps[0].flops - plain.steps[0].flops
    assert more == pytest.approx(64 * ((1 + 1) * 280e12 + 700e12))
    assert ours.steps[1].flops == plain.steps[1].flops
    judged = next(b for b in ours.beside if b.name == "judge a clip of the teacher")
    assert judged.times == 64


@pytest.mark.slow
def test_the_full_size_recipe_trains_and_resumes_at_wans_shapes(tmp_path, monkeypatch):
    from test_scale import CLIP, NARROW, videos

    model, cache, run = (tmp_path / name for name in ("model", "cache", "run"))
    random_wan(model, layers=2, text_layers=1, clip=CLIP, changes=NARROW)
    clips = str(videos(tmp_path / "videos"))
    assert main(["prepare", clips, "--model", str(model), "--out", str(cache), "--flow", "dis"]) == 0
    train = ["train", "tiny_recipes:redmd_wan", "--model", str(model), "--student", str(model), "--data", str(cache)]
    assert main([*train, "--out", str(run), "--iterations", "1"]) == 0
    assert main([*train, "--out", str(run), "--iterations", "2"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], "share" in line) for line in lines] == [(0, True), (0, False), (1, True), (1, False)]


@pytest.mark.slow
def test_weights_tilt_a_student_on_the_way_and_not_to_the_tilted_masses():
    here = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "redmd_masses.py")))
    plain, tilted = here.run(here.Network, (math.inf, 0.5), 0, first=600, then=300)[:, -3:].mean(1)
    assert plain == pytest.approx(here.MASSES, abs=0.06)
    assert here.MASSES[2] + 0.05 < tilted[2] < here.tilted(0.5)[2] - 0.2


def test_draws_are_those_of_dmd(family, cache):
    a, b = (
        draw(build(config, family, cache), Position(0, 0, 0, 0)) for config in (dmd(), weighted(standard=(0.0, 1.0)))
    )
    assert a.ids == b.ids
