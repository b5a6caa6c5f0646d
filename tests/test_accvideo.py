"""AccVideo: mean velocities of a teacher's paths, judged at every key level on latents that wait there."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import nn

from conftest import CAPTIONS
from mogan.cli import main
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.distributed import ONE
from mogan.errors import UserError
from mogan.estimate.random_wan import random_wan
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser
from mogan.objectives.accvideo import KeyLevelGAN, Trajectory
from mogan.objectives.queues import EMPTY, Queues
from mogan.recipes import accvideo_lab, accvideo_lab_no_gan, accvideo_wan_1_3b
from mogan.runs.checkpoint import latest_checkpoint, load_checkpoint, stored
from mogan.sampling.rollout import normal
from mogan.sampling.samplers import sample_student
from mogan.sampling.trajectories import trajectories
from mogan.schedule import shifted_levels, uniform
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, step
from test_scale import CLIP, NARROW
from tiny_recipes import accvideo, shrink

LEVELS = (1.0, 6 / 7, 0.6, 0.0)
SHAPE = (2, 3, 2, 2)


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


# ---------------------------------------------------------------------------------------------- a linear teacher

SIZE = int(np.prod(SHAPE))
DATA = torch.linspace(0.2, 1.6, SIZE).double()  # deviations of Gaussian data, number by number


def exact_velocity(x, s):
    """Of a rectified flow from noise to ``N(0, DATA^2)``: linear in ``x``."""
    variance = (1 - s) ** 2 * DATA**2 + s**2
    return (s - (1 - s) * DATA**2) / variance * x


def teacher_paths(noise, steps=48, shift=3.0, keep=(0, 16, 32, 48)):
    """The linear teacher's Euler path, number by number in double precision."""
    grid, x, kept = (*shifted_levels(steps, shift), 0.0), noise.double(), []
    for i, s in enumerate(grid):
        if i in keep:
            kept.append(x)
        if i < steps:
            x = x + (grid[i + 1] - s) * exact_velocity(x, s)
    return torch.stack(kept, 1)


GAINS = teacher_paths(torch.ones(1, SIZE))[0]  # the paths are linear in the noise: x_k = GAINS[k] noise


class MeanVelocity(nn.Module):
    """A student that knows the mean velocity at each key level, plus ``off``; notes the levels that it is told."""

    told = False  # where its steps end

    def __init__(self, off=0.0):
        super().__init__()
        self.off, self.heard = nn.Parameter(torch.tensor(off)), []

    def velocity(self, x, sigma, text):
        rows = [min(range(3), key=lambda k: abs(LEVELS[k] - float(s))) for s in sigma]
        self.heard.append(sigma.clone())
        slopes = [(1 - GAINS[k + 1] / GAINS[k]) / (LEVELS[k] - LEVELS[k + 1]) for k in rows]
        return x * torch.stack(slopes).view(len(x), *SHAPE).float() + self.off


class Instantaneous(MeanVelocity):
    """The teacher's own velocity at the level, which bends away on the way to the next."""

    def velocity(self, x, sigma, text):
        flat = [exact_velocity(one.flatten().double(), float(s)) for one, s in zip(x, sigma, strict=True)]
        return torch.stack(flat).view_as(x).float() + self.off


def batch_of(paths_BKN, text=None):
    count = len(paths_BKN)
    text = text or [torch.zeros(2, 8)] * count
    path = paths_BKN.view(count, -1, *SHAPE).float()
    return Batch([f"c{i}" for i in range(count)], ["p"] * count, text, places=list(range(count)), path_BKCFHW=path)


def test_a_student_of_exact_mean_velocities_lands_on_every_key_point_by_euler():
    noise = normal(torch.Size((2, *SHAPE)), generators(2), "cpu")
    expected = teacher_paths(noise.flatten(1))
    for last in range(1, 4):  # sampled with the first levels alone it stops at each key point
        x = noise
        for k in range(last):
            level = torch.full((2,), LEVELS[k])
            x = x + (LEVELS[k + 1] - LEVELS[k]) * MeanVelocity().velocity(x, level, None)
        torch.testing.assert_close(x.flatten(1).double(), expected[:, last], atol=1e-6, rtol=1e-6)
    ends = {
        kind: sample_student(kind(), torch.zeros(2, 2, 8), SHAPE, LEVELS[:-1], [0, 1], solver="euler").flatten(1)
        for kind in (MeanVelocity, Instantaneous)
    }
    torch.testing.assert_close(ends[MeanVelocity].double(), expected[:, 3], atol=1e-6, rtol=1e-6)
    assert (ends[Instantaneous].double() - expected[:, 3]).abs().max() > 0.05


def test_the_loss_is_zero_for_that_student_and_the_square_of_what_is_added():
    paths = teacher_paths(torch.randn(64, SIZE, generator=torch.Generator().manual_seed(0)))
    for kind, off, expected in ((MeanVelocity, 0.0, 0.0), (MeanVelocity, 0.3, 0.09)):
        loss, _ = Trajectory(kind(off), LEVELS).student_loss(None, batch_of(paths), generators(64))
        assert loss.item() == pytest.approx(expected, abs=1e-6 if off else 1e-10)
    loss, _ = Trajectory(Instantaneous(), LEVELS).student_loss(None, batch_of(paths), generators(64))
    assert loss.item() > 1e-3


def test_the_loss_is_a_transcription_of_the_formula_at_the_level_that_is_told():
    student, paths = MeanVelocity(0.1), torch.randn(9, 4, SIZE)
    loss, _ = Trajectory(student, LEVELS).student_loss(None, batch_of(paths), generators(9))
    drawn = [int(3 * uniform(1, torch.Generator().manual_seed(seed))) for seed in range(9)]
    assert set(drawn) == {0, 1, 2}
    assert student.heard[0].tolist() == pytest.approx([LEVELS[k] for k in drawn])  # the level of the row it is given
    errors = []
    for path, k in zip(paths.numpy().astype(np.float64), drawn, strict=True):
        slope = (1 - GAINS[k + 1] / GAINS[k]).numpy() / (LEVELS[k] - LEVELS[k + 1])
        target = (path[k] - path[k + 1]) / (LEVELS[k] - LEVELS[k + 1])
        errors.append(np.mean((slope * path[k] + 0.1 - target) ** 2))
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_loss_into_level_0_is_regression_on_the_clip():
    levels, paths = (0.6, 0.0), torch.randn(7, 2, SIZE)  # a path whose only step is the last
    student = MeanVelocity(0.2)
    loss, _ = Trajectory(student, levels).student_loss(None, batch_of(paths), generators(7))
    here, clip = (paths[:, k].view(7, *SHAPE) for k in (0, 1))
    x0 = here - 0.6 * student.velocity(here, torch.full((7,), 0.6), None)
    assert loss.item() == pytest.approx((x0 - clip).square().mean().item() / 0.36, rel=1e-5)


# ---------------------------------------------------------------------------------------------- queues and heads


class Shrinking(nn.Module):
    """A student whose latents at level ``s`` are ``s`` times their first noise: ``v = x / s``. Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), []

    def velocity(self, x, sigma, text):
        self.seen.append((x.detach().clone(), sigma.clone(), text.clone()))
        return self.scale * x / sigma.view(-1, 1, 1, 1, 1)


class Blocks(nn.Module):
    """In a transformer's place: one block that makes tokens of latents; notes the levels that it is told."""

    def __init__(self):
        super().__init__()
        self.blocks, self.seen = nn.ModuleList([nn.Linear(SIZE, 6), nn.Identity()]), []

    def forward(self, x, timestep, text, return_dict=False):
        self.seen.append((x.detach().clone(), timestep / 1000, text.clone()))
        self.blocks[1](self.blocks[0](x.flatten(1)))
        return (x,)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = (0, 1, 0)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))

    def forward(self, features, number):
        return self.heads[number](features)[:, 0]


class Captions:
    """A cache of eight clips whose captions' embeddings are their numbers."""

    def __init__(self):
        self.entries = [{"id": f"c{i}", "caption": str(i)} for i in range(8)]

    def text(self, caption):
        return torch.full((2, 8), float(caption))


@pytest.fixture
def game():
    torch.manual_seed(0)
    queues = Queues(Captions(), ONE, 3, 4, SHAPE)
    return KeyLevelGAN(Shrinking(), Denoiser(Blocks()), Heads(), queues, LEVELS, 0.1)


def turn(game, iteration, clips=range(4), learns="student"):
    """One update of four clips in two parts, as training does it: gradients in the networks that learnt."""
    text = [torch.full((2, 8), float(i)) for i in clips]
    path = torch.full((4, 4, *SHAPE), 50.0) * torch.tensor(LEVELS).view(1, 4, 1, 1, 1, 1)
    whole = Batch([f"c{i}" for i in clips], ["p"] * 4, text, places=[0, 1, 2, 3], path_BKCFHW=path)
    random = generators(4, 100 * iteration)
    whole = game.prepare(whole, iteration=iteration, generator=random, most=2)
    for part in (slice(0, 2), slice(2, 4)):
        piece = replace(whole, ids=whole.ids[part], text=text[part], places=whole.places[part], path_BKCFHW=path[part])
        method = game.student_loss if learns == "student" else game.judge_loss
        loss, _ = method(None, piece, random[part])
        loss.backward()


def test_a_queue_holds_latents_of_its_own_level_alone_and_they_go_from_level_to_level(game):
    assert (game.queues.clips == EMPTY).all()
    first = normal(torch.Size((4, *SHAPE)), generators(4, 0), "cpu")
    fourth = normal(torch.Size((4, *SHAPE)), generators(4, 300), "cpu")
    for iteration in range(6):
        turn(game, iteration, clips=range(iteration, iteration + 4) if iteration < 5 else range(4))
        row, noise = iteration % 3, first if iteration < 3 else fourth
        for k in range(3):  # Shrinking's latents say at which level they lie
            filled = iteration >= k
            assert (game.queues.clips[k] != EMPTY).all() == filled
            origin = fourth if iteration >= 3 + k else first
            at = LEVELS[k + 1] * origin if filled else torch.zeros_like(origin)
            torch.testing.assert_close(game.queues.latents[k], at, atol=1e-6, rtol=1e-5)
        given = game.student.seen[-2:]
        told = torch.cat([sigma for _, sigma, _ in given])
        torch.testing.assert_close(told, torch.full((4,), LEVELS[row]))
        torch.testing.assert_close(torch.cat([x for x, _, _ in given]), LEVELS[row] * noise, atol=1e-6, rtol=1e-5)
        judged = torch.cat([sigma for _, sigma, _ in game.teacher.transformer.seen[-2:]])
        torch.testing.assert_close(judged, torch.full((4,), LEVELS[row + 1]))
        # words stay with the latents they were begun with
        words = torch.cat([text[:, 0, 0] for _, _, text in given])
        assert words.tolist() == [float(i) for i in (range(4) if iteration < 3 else range(3, 7))]
    assert (game.queues.clips != EMPTY).all()  # full after as many updates as levels


def test_a_latent_at_another_level_does_not_go_unseen(game):
    """Given to the queue of the level before its own."""
    give, game.queues.give = game.queues.give, lambda row, *what: give(max(row - 1, 0), *what)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_a_queue_holds_latents_of_its_own_level_alone_and_they_go_from_level_to_level(game)


def test_the_discriminator_is_shown_both_at_the_same_level_as_they_are(game):
    for iteration in range(4):
        turn(game, iteration)
        game.teacher.transformer.seen.clear()
        turn(game, iteration, clips=range(4, 8), learns="discriminator")
        row = iteration % 3
        for part, (shown, told, words) in zip((slice(0, 2), slice(2, 4)), game.teacher.transformer.seen, strict=True):
            passed, made = shown.chunk(2)
            torch.testing.assert_close(told, torch.full((4,), LEVELS[row + 1]))
            torch.testing.assert_close(passed, torch.full_like(passed, 50.0 * LEVELS[row + 1]))  # no noise added
            assert torch.equal(made, game.queues.latents[row, part])
            assert words[2:, 0, 0].tolist() == [float(i) for i in range(4)][part]
            assert words[:2, 0, 0].tolist() == [float(i) for i in range(4, 8)][part]


def test_the_head_of_the_level_learns_and_no_other_nor_the_trunk_nor_who_is_judged(game):
    for iteration in range(3):
        turn(game, iteration)
        assert game.student.scale.grad is not None
        assert all(p.grad is None for p in game.heads.parameters())
        game.student.scale.grad = None
        game.teacher.requires_grad_(False)
        turn(game, iteration, learns="discriminator")
        moved = [any(p.grad is not None for p in head.parameters()) for head in game.heads.heads]
        assert moved == [k == iteration for k in range(3)]
        assert game.student.scale.grad is None
        game.heads.zero_grad(set_to_none=True)


def test_the_losses_are_logistic_and_push_the_logits_where_they_say(game):
    turn(game, 0)
    batch = replace(batch_of(torch.randn(4, 4, SIZE)), ids=[f"c{i}" for i in range(4)], text=[torch.zeros(2, 8)] * 4)
    game.teacher.requires_grad_(False)
    loss, logs = game.judge_loss(None, batch, generators(4))
    trunk, head = game.teacher.transformer.blocks[0], game.heads.heads[0]
    real, fake = (
        head(trunk(x.flatten(1)))[:, 0].detach().numpy() for x in (batch.path_BKCFHW[:, 1], game.queues.latents[0])
    )
    expected = np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert float(logs["gap"]) == pytest.approx(real.mean() - fake.mean(), rel=1e-5)
    loss, _ = game.student_loss(None, batch, generators(4, 7))
    fake = head(trunk(game.queues.latents[0].flatten(1)))[:, 0].detach().numpy()
    assert loss.item() == pytest.approx(0.1 * np.log1p(np.exp(-fake)).mean(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, game.student.scale)
    slope = head.weight @ trunk.weight  # of a logit with respect to the latents y = x (1 + (s' - s) scale)
    x = normal(torch.Size((4, *SHAPE)), generators(4, 7), "cpu").flatten(1)
    by_hand = (0.1 * -1 / (1 + np.exp(fake)) * ((LEVELS[1] - 1) * (x @ slope.T))[:, 0].detach().numpy()).mean()
    assert float(gradient) == pytest.approx(by_hand, rel=1e-4)


def test_a_queue_that_nobody_filled_is_told_and_so_are_batches_that_do_not_fit(game):
    with pytest.raises(UserError, match="no latents of the student wait at its level 1"):
        turn(game, 1)
    turn(game, 0)
    turn(game, 1)
    with pytest.raises(UserError, match="wait at its level 3"):
        turn(game, 2, learns="discriminator")
    config = accvideo_lab()
    with pytest.raises(ValueError, match=r"one batch, not \[8, 16\]"):
        replace(config, plan=(*config.plan[:2], replace(config.plan[2], batch=8)))
    with pytest.raises(ValueError, match="by Euler steps"):
        replace(config, rollout=None)
    with pytest.raises(ValueError, match="given=0"):
        replace(config, given=1)


# ---------------------------------------------------------------------------------------------- runs


def put_together(config, family, data, run):
    run.mkdir(exist_ok=True)
    return assemble(config, open_cache(data), model=str(family / "teacher"), run=run, device="cpu")


def final(run):
    path = latest_checkpoint(run)
    state = {name: torch.full(shape, -7.0) for name, shape in stored(path).items()}
    state |= {name: torch.full_like(x, -7).long() for name, x in state.items() if name.endswith("state.clips")}
    load_checkpoint(path, state)
    return state


@pytest.mark.parametrize("lora", [None, 3])
def test_an_update_moves_who_learns_alone(lora, family, paths, tmp_path):
    config = replace(accvideo(), lora=lora)
    parts = put_together(config, family, paths, tmp_path)
    for number, update in enumerate(config.plan):
        before = {name: [p.clone() for p in network.parameters()] for name, network in parts.networks.items()}
        frozen = [p.clone() for p in parts.objectives["key_levels"].frozen[0].parameters()]
        record = step(parts, Position(0, 0, number, 0))
        assert np.isfinite(list(record.values())).all()
        moved = {
            name: any((a != b).any() for a, b in zip(old, parts.networks[name].parameters(), strict=True))
            for name, old in before.items()
        }
        assert moved == {name: name == update.learns for name in moved}
        now = parts.objectives["key_levels"].frozen[0].parameters()
        assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))


@pytest.mark.parametrize("lora", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_stopped_between_levels_goes_on_bit_for_bit_by_what_its_queues_held(lora, family, paths, tmp_path):
    config = replace(accvideo(), iterations=5, lora=lora)
    run_training(put_together(config, family, paths, tmp_path / "whole"), tmp_path / "whole")
    run_training(put_together(replace(config, iterations=2), family, paths, tmp_path / "two"), tmp_path / "two")
    held = final(tmp_path / "two")
    assert (held["key_levels_state.clips"] >= 0).tolist() == [[True, True]] * 2 + [[False, False]]
    run_training(put_together(config, family, paths, tmp_path / "two"), tmp_path / "two")
    one, two = final(tmp_path / "whole"), final(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    parts, losses, where = put_together(config, family, paths, tmp_path / "third"), [], Position(0, 5, 1, 0)
    for held in (1.0, 1.0, 0.5):  # the control: with other latents in the queues the next update is another
        load_checkpoint(latest_checkpoint(tmp_path / "whole"), parts.state())
        parts.objectives["key_levels"].state["latents"].mul_(held)
        losses.append(step(parts, where)["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_accumulation_changes_nothing_but_rounding(family, paths, tmp_path):
    config = accvideo()
    records = []
    for parts_of in (1, 2):
        plan = tuple(replace(u, accumulate=parts_of) for u in config.plan)
        run = tmp_path / str(parts_of)
        run_training(put_together(replace(config, plan=plan), family, paths, run), run)
        records.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    for a, b in zip(*records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_following_alone_is_a_recipe_of_its_own_and_both_may_judge_one_step(family, paths, tmp_path):
    config = accvideo()
    alone = shrink(accvideo_lab_no_gan())
    together = replace(config, plan=(replace(config.plan[0], by="trajectory+key_levels"), config.plan[2]))
    for name, one in (("alone", alone), ("together", together)):
        run_training(put_together(one, family, paths, tmp_path / name), tmp_path / name)
    lines = (tmp_path / "together" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines[:2]] == [
        "student<trajectory+key_levels",
        "discriminator<key_levels",
    ]


def test_paths_of_two_experts_are_followed_and_heads_on_them_refused(two, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    ask = {"keep": "0,2,4,6", "steps": 6, "guidance": 1.0, "shift": 3.0, "precision": "fp32", "device": "cpu"}
    trajectories(prompts=tmp_path / "prompts.txt", out=tmp_path / "store", model=str(two), **ask)
    data, model = open_cache(tmp_path / "store"), str(two)
    with pytest.raises(UserError, match="holds two transformers, and heads read the features of one"):
        assemble(accvideo(), data, model=model, run=None, device="cpu")
    run = tmp_path / "run"
    run.mkdir()
    run_training(assemble(shrink(accvideo_lab_no_gan()), data, model=model, run=run, device="cpu"), run)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_random_wan_goes_from_its_paths_to_a_stock_pipeline_with_equal_output(tmp_path, monkeypatch):
    """The full-size recipe at its own levels and reduced depth: paths, train, resume, sample, export."""
    model, store, run, out, clips = (tmp_path / name for name in ("model", "store", "run", "export", "clips"))
    random_wan(model, layers=2, text_layers=1, clip=CLIP, changes=NARROW)
    (tmp_path / "prompts.txt").write_text("a square moving right\na circle at rest\n")
    on = ["--model", str(model), "--device", "cpu"]
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "50", "--shift", "7", "--guidance", "2"]
    kept = ["--keep", "0,10,20,30,40,50", "--precision", "fp32"]
    assert main(["trajectories", *on, *asked, *kept, "--out", str(store)]) == 0
    train = ["train", "tiny_recipes:accvideo_wan", *on, "--data", str(store), "--out", str(run)]
    for iterations in ("2", "6"):  # stops between two levels
        assert main([*train, "--iterations", iterations]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines[:3]] == [
        "student<trajectory",
        "student<key_levels",
        "discriminator<key_levels",
    ]
    assert len(lines) == 3 * 6
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert main(["sample", "--model", str(run), *asked[:2], "--out", str(clips), "--device", "cpu"]) == 0
    record = json.loads((clips / "samples.jsonl").read_text().splitlines()[0])
    assert record["solver"] == "euler"
    assert record["sigmas"] == pytest.approx(accvideo_wan_1_3b().sigmas)

    pipeline = WanPipeline.from_pretrained(out)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        "a circle at rest", num_frames=CLIP[0], height=CLIP[1], width=CLIP[2], num_inference_steps=5,
        guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(4),
    ).frames  # fmt: skip
    student = Denoiser(wan.load_transformer(out).eval())
    text = stack_text(wan.load_text(out)(["a circle at rest"]))
    ours = sample_student(student, text, stock.shape[1:], accvideo_wan_1_3b().sigmas, [4], solver="euler")
    torch.testing.assert_close(ours, stock, atol=1e-3, rtol=1e-3)
    again = sample_student(student, text, stock.shape[1:], accvideo_wan_1_3b().sigmas, [4])
    assert (again - stock).abs().max() > 0.1  # with fresh noise between the steps it is another clip


def test_the_recipes_levels_are_those_of_the_stores_they_name_and_of_the_paper():
    for config, steps, shift, keep in (
        (accvideo_lab(), 48, 3.0, (0, 16, 32, 48)),
        (accvideo_wan_1_3b(), 50, 7.0, (0, 10, 20, 30, 40, 50)),
    ):
        grid = (*shifted_levels(steps, shift), 0.0)
        assert (*config.sigmas, 0.0) == pytest.approx([grid[i] for i in keep], abs=1e-9)
    # the paper prints 1, .9651, .9130, .8235, .6363
    assert accvideo_wan_1_3b().sigmas == pytest.approx((1, 0.9655, 0.9130, 0.8235, 0.6364), abs=5e-5)
    assert [u.by for u in accvideo_wan_1_3b().plan] == ["trajectory", "key_levels", "key_levels"]
