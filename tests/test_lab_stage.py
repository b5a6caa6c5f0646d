"""How the lab's family is trained: Muon, stages that resume, clips rendered by other processes."""

import pytest
import torch
from torch import nn

from mogan.lab.clips import TRAIN_SEED, rendered_clips, rendered_elsewhere
from mogan.lab.muon import Muon, _orthogonalise, muon_and_adamw, set_rate
from mogan.lab.stage import run_stage


def test_an_update_is_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    for shape in ((3, 24, 8), (2, 8, 24)):
        matrices = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        for found, nearest in zip(_orthogonalise(matrices).float(), u @ v, strict=True):
            assert torch.nn.functional.cosine_similarity(found.flatten(), nearest.flatten(), dim=0) > 0.97
            assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4  # the quintic iteration stays near 1, not at it


def test_weights_of_one_shape_move_as_they_would_alone():
    torch.manual_seed(0)
    starts, gradients = torch.randn(2, 6, 4), torch.randn(3, 2, 6, 4)
    together = [nn.Parameter(s.clone()) for s in starts]
    alone = [nn.Parameter(s.clone()) for s in starts]
    optimizers = [Muon(together, 0.1), *(Muon([p], 0.1) for p in alone)]
    for step in gradients:
        for p, q, g in zip(together, alone, step, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(together, alone, starts, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert (p - start).abs().max() > 0.01


def test_a_rate_reaches_every_group_as_a_number_and_in_place_as_a_tensor():
    model = nn.Linear(3, 3)
    numbers = muon_and_adamw(model, 0.1)
    set_rate(numbers, 0.5)
    assert [g["lr"] for o in numbers for g in o.param_groups] == [0.5, 0.5]
    rate = torch.tensor(0.1)
    tensors = [Muon([model.weight], rate)]
    set_rate(tensors, 0.5)
    assert rate == 0.5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stage_that_was_stopped_ends_as_one_that_was_not(device, tmp_path):
    def train(folder, steps, stop=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)

        def loss_of(step, share):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(16, 4, device=device)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        try:
            run_stage("toy", model, loss_of, folder, steps=steps, lr=0.1, same_each_step=stop is None)
        except KeyboardInterrupt:
            return None
        return model.state_dict(), loss_of(0, 0.0).item()

    whole, loss = train(tmp_path / "whole", 120)
    assert loss < 2
    saves = pytest.MonkeyPatch()
    with saves.context() as patch:
        clock = iter(range(0, 10**6, 61))  # every look at the clock is a minute later
        patch.setattr("mogan.lab.stage.time.monotonic", lambda: next(clock))
        assert train(tmp_path / "cut", 120, stop=70) is None
    again, _ = train(tmp_path / "cut", 120)
    for key, value in whole.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_recorded_step_is_the_step_by_hand(tmp_path):
    def train(recorded):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to("cuda")

        def loss_of(step, share):
            x = torch.randn(16, 4, device="cuda")
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        folder = tmp_path / str(recorded)
        folder.mkdir()
        return run_stage("toy", model, loss_of, folder, steps=40, lr=0.02, same_each_step=recorded).state_dict()

    by_hand, recorded = train(False), train(True)
    for key, value in by_hand.items():
        torch.testing.assert_close(recorded[key], value, rtol=1e-5, atol=1e-6)


def test_clips_rendered_elsewhere_are_the_worlds_in_order():
    chunks = [range(0, 2), range(2, 5), range(9, 10)]
    found = list(rendered_elsewhere(chunks, TRAIN_SEED))
    assert [len(c) for c in found] == [2, 3, 1]
    assert torch.equal(torch.cat(found[:2]), rendered_clips(5, TRAIN_SEED))
    assert torch.equal(found[2], rendered_clips(1, TRAIN_SEED, offset=9))
