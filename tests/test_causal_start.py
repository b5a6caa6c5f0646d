"""How a causal student begins: teacher forcing, then consistency distillation; each against calls chunk by chunk."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tiny_recipes
from mogan.cli import main
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal, Policy
from mogan.objectives.consistency import Consistency, ConsistencyConfig
from mogan.objectives.teacher_forcing import TeacherForcing, TeacherForcingConfig
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import Chunked
from mogan.sampling.rollout import FewStep
from mogan.training.assemble import assemble
from mogan.training.load import find_models
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, learn
from test_causal import loaded, trained
from test_train import build

HOW = Causal(1, 2, Policy(window=4, sink=1), 0.1)  # chunks of 1, 2, 2 and 1 latents
CHUNKS, FRAMES = (1, 2, 2, 1), 6
GENERATOR = torch.Generator()
CLIPS = torch.randn(2, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(1))
TEXT = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
NULL = torch.randn(2, 64, generator=torch.Generator().manual_seed(9))
BATCH = Batch(["a", "b"], ["a", "b"], TEXT, CLIPS)


def noised(x, noise, level):
    return (1 - level) * x + level * noise


@torch.no_grad()
def called(network, chunks_of, levels, past, text):
    """Velocity of noisy chunks, each given the real ones before it, call by call."""
    cache, found, start = network.begin(text, HOW.policy), [], 0
    for number, frames in enumerate(CHUNKS):
        where = slice(start, start + frames)
        found.append(network.chunk_velocity(chunks_of[:, :, where], levels[:, number], text, cache))
        cache, start = network.remember(past[:, :, where], text, cache, HOW.context_sigma), start + frames
    return torch.cat(found, 2)


def drawn(seed, *kinds):
    """The numbers that an objective draws, in order: of a shape or of one number per clip and chunk."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(2, *shape, generator=generator) if uniform else torch.randn(2, *shape, generator=generator)
        for uniform, shape in kinds
    ]


def framed(levels):
    return levels.repeat_interleave(torch.tensor(CHUNKS), 1)[:, None, :, None, None]


LATENT = tuple(CLIPS.shape[1:])


@pytest.fixture
def student(family):
    return CausalDenoiser(loaded(family), how=HOW)


def test_teacher_forcing_is_flow_matching_of_every_chunk_given_the_real_past(student):
    u, dropped, noise, context = drawn(4, (True, (4,)), (True, ()), (False, LATENT), (False, LATENT))
    text = stack_text([NULL if d < 0.7 else t for d, t in zip(dropped, TEXT, strict=True)], "cpu")
    levels = 3 * u / (1 + 2 * u)
    noisy, past = noised(CLIPS, noise, framed(levels)), noised(CLIPS, context, 0.1)
    want = (called(student, noisy, levels, past, text) - (noise - CLIPS)).square().mean()
    objective = TeacherForcing(student, NULL, HOW, TeacherForcingConfig(shift=3.0, drop_text=0.7))
    loss, _ = objective.student_loss(None, BATCH, GENERATOR.manual_seed(4))
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    with torch.no_grad():
        wrong = (called(student, noisy, levels, noisy, text) - (noise - CLIPS)).square().mean()
    assert abs(float(wrong) / float(want) - 1) > 1e-3  # a noisy past is another task


SETTINGS = ConsistencyConfig(steps=5, shift=3.0, guidance=2.5, decay=0.75)


def test_consistency_compares_both_ends_of_one_guided_step(student, family):
    teacher, target = (CausalDenoiser(loaded(family), how=HOW) for _ in range(2))
    for network, by in ((teacher, 0.99), (target, 1.01)):
        network.requires_grad_(False)
        for p in network.parameters():
            p.mul_(by)
    u, noise, context = drawn(6, (True, (4,)), (False, LATENT), (False, LATENT))
    step, grid = (5 * u).floor().long(), torch.tensor([1.0, 12 / 13, 9 / 11, 2 / 3, 3 / 7, 0.0])  # 3 s / (1 + 2 s)
    assert 4 in step  # one chunk ends at 0
    here, there = grid[step], grid[step + 1]
    text = stack_text(TEXT, "cpu")
    null = F.pad(NULL[None], (0, 0, 0, text.shape[1] - 2)).expand(2, -1, -1).contiguous()
    x, past = noised(CLIPS, noise, framed(here)), noised(CLIPS, context, 0.1)
    cond, uncond = (called(teacher, x, here, past, t) for t in (text, null))
    moved = x + framed(there - here) * (uncond + 2.5 * (cond - uncond))
    meant = moved - framed(there) * called(target, moved, there, past, text)
    found = x - framed(here) * called(student, x, here, past, text)
    objective = Consistency(student, target, teacher, NULL[None], HOW, SETTINGS)
    loss, _ = objective.student_loss(None, BATCH, GENERATOR.manual_seed(6))
    assert float(loss) == pytest.approx(float((found - meant).square().mean()), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for network in (teacher, target) for p in network.parameters())
    assert any(p.grad is not None for p in student.parameters())


class OneClip:
    """The exact model of a world of one clip: ``v = (x - clip) / s``."""

    def __init__(self, clip):
        self.clip = clip

    def teacher_forced(self, past, x, sigma_BF, text, chunks, policy, context_sigma):
        return (x - self.clip) / sigma_BF[:, None, :, None, None].clamp(min=1e-9)


def test_what_is_exact_is_consistent():
    exact, other = OneClip(CLIPS[:1]), OneClip(CLIPS[1:])
    for student, wrong in ((exact, False), (other, True)):
        objective = Consistency(student, student, exact, NULL[None], HOW, SETTINGS)
        loss = float(objective.student_loss(None, BATCH, GENERATOR.manual_seed(0))[0])
        assert (loss > 0.01) if wrong else (loss < 1e-10), loss


class Pairs:
    """Exact models of clips of two frames, jointly Gaussian with correlation ``r``, given the first one or not.

    The teacher's velocity is ``E[noise - z | x, past]``; the student's predicts where its flow ends.
    """

    def __init__(self, r, flows, given=True):
        self.r, self.flows, self.given = r, flows, given

    def teacher_forced(self, past, x, sigma_BF, text, chunks, policy, context_sigma):
        s = sigma_BF[:, None, :, None, None]
        mean = torch.cat([0 * past[:, :, :1], self.r * past[:, :, :1] * self.given], 2)
        spread = torch.tensor([1.0, 1 - self.r**2 * self.given]).view(2, 1, 1)
        scale, away = (1 - s) ** 2 * spread + s**2, x - (1 - s) * mean
        if self.flows:
            return (x - mean - (spread / scale).sqrt() * away) / s.clamp(min=1e-9)
        return (s - (1 - s) * spread) / scale * away - mean


def test_the_flow_of_what_comes_given_what_was_is_consistent():
    one, two = torch.randn(2, 32, 1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    batch = Batch(["a"] * 32, ["a"] * 32, [TEXT[0]] * 32, torch.cat([one, 0.9 * one + 0.19**0.5 * two], 2))
    teacher, found = Pairs(0.9, False), {}
    for steps in (20, 40, 80):
        settings = ConsistencyConfig(steps=steps, shift=1.0, guidance=1.0, decay=0.0)
        for given in (True, False):
            student = Pairs(0.9, True, given)
            objective = Consistency(student, student, teacher, NULL[None], Causal(1, 1), settings)
            found[steps, given] = float(objective.student_loss(None, batch, GENERATOR.manual_seed(0))[0])
    # the teacher's step is wrong by the grid's square, and the loss is a square of that
    assert found[20, True] < 1e-4
    assert 8 < found[20, True] / found[40, True] < 32
    assert 8 < found[40, True] / found[80, True] < 32
    assert found[80, False] > 100 * found[80, True]  # who does not look at the past disagrees with the teacher


def test_the_target_is_an_average_of_the_student_as_it_was_when_it_learnt():
    student, target = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
    objective = Consistency(student, target, None, NULL[None], HOW, replace(SETTINGS, since=1))
    found = []
    for iteration, value in enumerate((1.0, 2.0, 4.0, 0.0)):
        torch.nn.init.constant_(student.weight, value)
        objective.prepare(BATCH, iteration=iteration, generator=GENERATOR, most=2)
        found.append(float(target.weight[0, 0]))
    assert found == [1.0, 2.0, 2.5, 1.875]  # the student itself up to iteration 1, then 3/4 of what it was


def test_an_update_moves_the_student_and_the_next_one_its_target(family, cache):
    parts = build(tiny_recipes.causal_cd(), family, cache)
    state = parts.objectives["consistency"].state
    begin = {k: v.clone() for k, v in state.items()}
    for iteration in (0, 1):
        where = Position(0, iteration, 0, 0)
        learn(parts, where, draw(parts, where))
        moved = [k for k in state if not torch.equal(state[k], begin[k])]
        assert bool(moved) == (iteration == 1)
    live = parts.student.state_dict()
    assert state.keys() == live.keys()
    assert {f"consistency_state.{k}" for k in state} <= parts.state().keys()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, 3])
@pytest.mark.parametrize("recipe", [tiny_recipes.causal_teacher, tiny_recipes.causal_cd, tiny_recipes.causal_ode])
def test_a_run_goes_on_bit_for_bit(recipe, lora, family, cache, paths, tmp_path):
    config = replace(recipe(), lora=lora)
    data = tiny_recipes.data(config, cache, paths)
    whole = trained(config, family, data, tmp_path / "whole")
    part = trained(replace(config, iterations=1), family, data, tmp_path / "part")
    run_training(build(config, family, data, part), part)
    for name in ("ema", "consistency_state"):
        found = [load_part(latest_checkpoint(run), name) for run in (whole, part)]
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_each_is_exported_and_the_next_starts_there(family, cache, tmp_path, capsys):
    config = replace(tiny_recipes.causal_teacher(), iterations=1)
    run, out = trained(config, family, cache, tmp_path / "run"), tmp_path / "export"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert open_generator(str(out)).causal == config.causal
    teacher = str(family / "teacher")
    for following in (tiny_recipes.causal_cd(), tiny_recipes.self_forcing()):
        assert find_models(following, teacher, str(out))[1] == out
        capsys.readouterr()
        parts = assemble(following, open_cache(cache), model=teacher, student=str(out), run=None, device="cpu")
        own, start = parts.student.transformer.state_dict(), open_generator(str(out)).load().transformer.state_dict()
        assert all(torch.equal(own[k], start[k]) for k in own)
        assert "has never seen the past alone" not in capsys.readouterr().err
    build(tiny_recipes.causal_cd(), family, cache)
    assert "has never seen the past alone" in capsys.readouterr().err


def test_what_no_pass_can_follow_is_refused(family, cache):
    with pytest.raises(ValueError, match="give the recipe a rollout that is Chunked"):
        replace(tiny_recipes.causal_teacher(), rollout=FewStep())
    relative = Chunked(Causal(1, 1, Policy(window=2, relative=True)))
    for recipe in (tiny_recipes.causal_teacher, tiny_recipes.causal_cd):
        with pytest.raises(UserError, match="need a pass per chunk"):
            build(replace(recipe(), rollout=relative), family, cache)
    block = tiny_recipes.causal_cd().objectives["consistency"]
    base = SimpleNamespace(
        config=tiny_recipes.causal_cd(), latent_shape=(4, 4, 4, 4), adapters_of=cache, start=family / "teacher"
    )
    with pytest.raises(UserError, match="name an export of"):
        block.build(base, {})
    assert json.dumps(tiny_recipes.causal_cd().as_json())
