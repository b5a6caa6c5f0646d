"""ODE regression, the start of causal students that Causal Forcing replaced: its loss, and the variance that it loses."""

from dataclasses import replace
from math import sqrt

import pytest
import torch

import tiny_recipes
from mogan.costs.causal import forced_calls
from mogan.costs.shapes import read_shapes
from mogan.data.batches import Batch
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal, Policy
from mogan.objectives.ode_regression import ODERegression
from mogan.sampling.causal_rollout import Chunked
from mogan.sampling.rollout import FewStep
from test_causal import loaded
from test_train import build

HOW = Causal(1, 2, Policy(window=4, sink=1))  # chunks of 1, 2, 2 and 1 latents
LEVELS = (1.0, 0.8, 0.4, 0.0)
PATH = torch.randn(2, 4, 4, 6, 4, 4, generator=torch.Generator().manual_seed(1))
TEXT = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
GENERATOR = torch.Generator()


def batch_of(path):
    return Batch(["a"] * len(path), ["a"] * len(path), [TEXT[0]] * len(path), path_BKCFHW=path)


def test_every_chunk_is_asked_where_its_path_ends_from_a_level_of_its_own(family):
    student = CausalDenoiser(loaded(family), how=HOW)
    step = (4 * torch.rand(2, 4, generator=torch.Generator().manual_seed(3))).floor().long()
    assert set(step.flatten().tolist()) == {0, 1, 2, 3}  # also the clip itself, of which nothing is asked
    want = []
    with torch.no_grad():
        text = stack_text(TEXT, "cpu")
        for clip in range(2):
            words = text[clip : clip + 1]
            cache, start = student.begin(words, HOW.policy), 0
            for number, frames in enumerate(HOW.chunks(6)):
                where, level = slice(start, start + frames), LEVELS[step[clip, number]]
                x, end = PATH[clip, step[clip, number]][None, :, where], PATH[clip, -1][None, :, where]
                x0 = student.chunk(x, torch.tensor([level]), words, cache)
                want.append((x0 - end).square().mean((0, 1, 3, 4)) * (level > 0))
                cache, start = student.remember(x, words, cache, level), start + frames
    objective = ODERegression(student, HOW, LEVELS)
    batch = Batch(["a", "b"], ["a", "b"], TEXT, path_BKCFHW=PATH)
    loss, logs = objective.student_loss(None, batch, GENERATOR.manual_seed(3))
    assert float(loss.detach()) == pytest.approx(float(torch.cat(want).mean()), rel=1e-5)
    assert not logs
    loss.backward()
    assert all(p.grad is not None for p in student.transformer.blocks.parameters())


# ---------------------------------------------------------------------------------------------- what the target is


class Linear(torch.nn.Module):
    """A student of pairs of frames, one number each: the end is a multiple of the first frame, of its own for each level."""

    def __init__(self, share):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(float(share)))

    def masked(self, x, level, text, chunks, policy):
        ends = torch.cat([self.share * x[:, :, :1], x[:, :, 1:]], 2)
        return (x - ends) / level[:, None, :, None, None].clamp(min=1e-9)


def pairs(r, past=False):
    """Paths ``(B, 2, 1, 2, 8, 8)`` from noise to pairs of unit variance and correlation ``r``: of the teacher that makes both at once
    (its flow is the root of the covariance) or, with ``past``, of one that makes the second given the first.
    """
    noise = torch.randn(4000, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    spread = torch.tensor([[1.0, r], [r, 1.0]])
    values, vectors = torch.linalg.eigh(spread)
    root = torch.linalg.cholesky(spread) if past else vectors @ values.sqrt().diag() @ vectors.T
    return torch.stack([noise, torch.einsum("ij,bjhw->bihw", root, noise)], 1)[:, :, None]


def learnt(path):
    """The share of the first frame's noise at which the objective's loss is least: a parabola through three values."""
    batch, losses = batch_of(path), []
    for share in (0.0, 1.0, 2.0):
        objective = ODERegression(Linear(share), Causal(1, 1), (1.0, 0.0))
        losses.append(float(objective.student_loss(None, batch, GENERATOR.manual_seed(0))[0].detach()))
    a, b, c = losses
    return (3 * a - 4 * b + c) / (2 * (a - 2 * b + c))


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9, 0.99])
def test_the_first_of_two_frames_keeps_the_known_share_of_its_variance(r):
    kept = learnt(pairs(r)) ** 2
    assert kept == pytest.approx(((sqrt(1 + r) + sqrt(1 - r)) / 2) ** 2, abs=0.01)
    assert learnt(pairs(r, past=True)) ** 2 == pytest.approx(1, abs=1e-4)  # a causal teacher's path hides nothing


# ---------------------------------------------------------------------------------------------- runs


def test_an_update_learns_from_paths_of_the_teacher_alone(family, cache, paths):
    config = tiny_recipes.causal_ode()
    build(config, family, paths)
    with pytest.raises(UserError, match="mogan trajectories"):
        build(config, family, cache)
    for wrong in (
        {"rollout": FewStep()},
        {"rollout": Chunked(Causal(1, 1, sizes=(1, 2)))},
        {"given": 1},
    ):
        with pytest.raises(ValueError, match="in chunks of one size"):
            replace(config, **wrong)
    with pytest.raises(UserError, match="need a pass per chunk"):
        build(replace(config, rollout=Chunked(Causal(1, 1, Policy(window=2, relative=True)))), family, paths)


def test_it_costs_about_half_of_teacher_forcing():
    shapes = read_shapes("lab")
    (clean, _), (noisy, _) = (forced_calls(shapes, Causal(1, 1), kind, False, torch.float32) for kind in (True, False))
    assert 0.4 < noisy.work.flops / clean.work.flops < 0.6
