"""Flow of pairs of frames, one at a time and in a row."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mogan.errors import UserError
from mogan.evaluation.interpolators import flow_warp
from mogan.evaluation.motion import dynamic_degree, motion_smoothness
from mogan.evaluation.pairs import EachPairOnce, device_of, flow_of_pairs, neighbours
from mogan.motion.flow import RaftConfig, RaftFlow

FRAMES = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)  # more than fit at once


@pytest.fixture(scope="module")
def raft():
    torch.manual_seed(0)
    return RaftFlow(RaftConfig((8, 8, 8, 8, 16), (8, 8, 8, 8, 16), 8, 2, 2, 16).build(), iterations=2)


def test_pairs_in_a_row_have_the_flow_they_have_alone(raft):
    in_a_row = list(flow_of_pairs(neighbours(FRAMES), raft))
    alone = list(flow_of_pairs(((a.copy(), b.copy()) for a, b in pairwise(FRAMES)), raft))
    assert len(in_a_row) == len(FRAMES) - 1
    np.testing.assert_allclose(np.stack(in_a_row), np.stack(alone), rtol=1e-3, atol=1e-3)


def test_pairs_in_a_row_show_every_frame_once():
    seen = []

    def flow(video):
        seen.append(video.shape[2] * len(video))
        return torch.zeros(len(video), 2, video.shape[2] - 1, 64, 64)

    assert len(list(flow_of_pairs(neighbours(FRAMES[:9]), flow))) == 8
    assert seen == [9]
    assert len(list(flow_of_pairs([(FRAMES[0], FRAMES[1]), (FRAMES[5], FRAMES[6])], flow))) == 2
    assert seen == [9, 4]


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        list(flow_of_pairs([(FRAMES[0], FRAMES[1])], lambda video: torch.full((1, 2, 1, 64, 64), torch.nan)))


def test_an_estimator_that_skips_pairs_is_refused():
    with pytest.raises(ValueError, match="1 fields for 9 frames"):
        list(flow_of_pairs(neighbours(FRAMES[:9]), lambda video: torch.zeros(1, 2, 1, 64, 64)))


def still(video):
    return torch.zeros(len(video), 2, video.shape[2] - 1, *video.shape[3:])


def counted(flow):
    def estimate(video):
        estimate.fields += len(video) * (video.shape[2] - 1)
        return flow(video)

    estimate.fields = 0
    return estimate


def test_flow_warp_gives_frames_in_a_row_the_middle_they_have_alone(raft):
    frames = torch.from_numpy(FRAMES[:9:2]).permute(0, 3, 1, 2).float() / 255
    before, after = frames[:-1], frames[1:]
    alone = torch.cat([flow_warp(raft)(a[None], b[None]) for a, b in zip(before, after, strict=True)])
    torch.testing.assert_close(flow_warp(raft)(before, after), alone, rtol=0, atol=1.01 / 255)
    shuffled = torch.tensor([2, 0, 3, 1])
    out_of_order = flow_warp(raft)(before[shuffled], after[shuffled])
    torch.testing.assert_close(out_of_order, alone[shuffled], rtol=0, atol=1.01 / 255)


def test_numbers_that_need_the_same_fields_share_them():
    frames = FRAMES[:17]
    for fps, fields in ((16, 8 + 8 + 16), (8, 16 + 8 + 8), (24, 5 + 16 + 16)):
        flow = counted(still)
        known = EachPairOnce(flow)
        dynamic_degree(frames, fps, known)
        motion_smoothness(frames, flow_warp(known))
        list(flow_of_pairs(neighbours(frames), known))
        assert flow.fields == fields, fps


def test_what_is_remembered_is_the_answer_and_is_forgotten_when_it_is_much(monkeypatch):
    flow = counted(lambda video: video[:, :2, 1:] - video[:, :2, :-1])
    known = EachPairOnce(flow)
    videos = torch.randn(3, 1, 3, 5, 64, 64)
    for video in (*videos, *videos):
        torch.testing.assert_close(known(video), video[:, :2, 1:] - video[:, :2, :-1], rtol=0, atol=0)
    assert flow.fields == 3 * 4
    monkeypatch.setattr("mogan.evaluation.pairs.KEPT_BYTES", 2 * known(videos[0]).nbytes)
    known(videos[0] + 1)  # now two are kept, the last two asked for
    flow.fields = 0
    known(videos[2])
    assert flow.fields == 0
    known(videos[0])
    assert flow.fields == 4


def test_frames_are_brought_to_where_the_estimator_is():
    class Elsewhere(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, video):
            assert video.device.type == "meta"
            return torch.zeros(len(video), 2, video.shape[2] - 1, *video.shape[3:], device="meta")

    one, two = torch.rand(2, 1, 3, 64, 64)
    assert device_of(EachPairOnce(Elsewhere())).type == "meta"
    assert device_of(EachPairOnce(still)).type == "cpu"
    assert flow_warp(Elsewhere())(one, two).device.type == "meta"
