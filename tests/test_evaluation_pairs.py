"""Flow of pairs of frames, one at a time and in a row."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mogan.errors import UserError
from mogan.evaluation.pairs import flow_of_pairs, neighbours
from mogan.flow import RaftConfig, RaftFlow

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
