from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_large

from mogan.errors import UserError
from mogan.motion.flow import (
    RaftConfig,
    RaftFlow,
    flow_of_pieces,
    load_raft,
    motion_picture,
    refinements,
    save_raft,
    warp,
)

SMALL = RaftConfig((8, 8, 8, 8, 16), (8, 8, 8, 8, 16), 8, 2, 2, 16, stride=8)  # the stride that torchvision knows


@pytest.fixture(scope="module")
def raft():
    torch.manual_seed(0)
    return SMALL.build()


def test_flow_of_a_video_is_torchvisions_flow_of_its_pairs(raft):
    video = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    flow = RaftFlow(raft, iterations=3, pairs_per_chunk=4)(video)
    assert flow.shape == (2, 2, 3, 32, 32)
    for b in range(2):
        for f in range(3):
            expected = raft(video[b : b + 1, :, f], video[b : b + 1, :, f + 1], num_flow_updates=3)[-1]
            torch.testing.assert_close(flow[b, :, f], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_chunks_change_neither_flow_nor_gradient(raft, chunk):
    video = (torch.rand(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1).requires_grad_()
    pairs = [raft(video[:, :, f], video[:, :, f + 1], num_flow_updates=3)[-1] for f in range(3)]
    plain = torch.stack(pairs, 2)
    chunked = RaftFlow(raft, iterations=3, pairs_per_chunk=chunk)(video)
    torch.testing.assert_close(chunked, plain, rtol=1e-3, atol=1e-3)
    weight = torch.randn(plain.shape)
    (expected,) = torch.autograd.grad((plain * weight).sum(), video)
    (found,) = torch.autograd.grad((chunked * weight).sum(), video)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def test_raft_stays_frozen_and_in_evaluation_mode(raft):
    estimator = RaftFlow(raft).train()
    assert not any(p.requires_grad for p in estimator.parameters())
    assert not any(m.training for m in estimator.modules())


def test_what_a_size_lacks_is_repeated_on_both_sides_the_odd_line_below(raft):
    frames = torch.rand(1, 2, 3, 35, 42) * 2 - 1
    padded = torch.nn.functional.pad(frames, (3, 3, 2, 3, 0, 0), mode="replicate")
    (found,), (whole,) = (refinements(raft, some, 2) for some in (frames, padded))
    torch.testing.assert_close(found, whole[..., 2:37, 3:45])


def test_every_refinement_is_torchvisions(raft):
    frames = torch.rand(1, 2, 3, 32, 32) * 2 - 1
    found, expected = refinements(raft, frames, 3, every=True), raft(frames[:, 0], frames[:, 1], num_flow_updates=3)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one[:, 0], two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [4, 8])
def test_sizes_that_are_not_multiples_of_the_stride_are_padded(stride):
    network = replace(SMALL, stride=stride).build().eval()
    cells = network.feature_encoder(torch.rand(1, 3, 32, 64)).shape[-2:]
    assert cells == (32 // stride, 64 // stride)
    assert RaftFlow(network, 2)(torch.rand(1, 3, 2, 35, 42)).shape == (1, 2, 1, 35, 42)


def test_upsampling_puts_the_flow_of_a_cell_over_its_pixels():
    """With a mask that picks the cell itself, a field at stride 4 is the nearest-neighbour enlargement, times 4."""
    network = replace(SMALL, stride=4).build().eval()
    mask = network.mask_predictor
    for p in mask.parameters():
        p.data.zero_()
    mask.conv.bias.data.view(9, 4, 4)[4] = 400.0  # of the nine neighbours the middle one
    coarse = []
    network.update_block.flow_head.register_forward_hook(lambda *call: coarse.append(call[2]))
    (flow,) = refinements(network, torch.rand(1, 2, 3, 32, 32), 1)
    expected = 4 * coarse[0].repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(flow[:, 0], expected)


def test_input_scale_matters(raft):
    video = torch.rand(1, 3, 2, 32, 32)
    assert not torch.allclose(RaftFlow(raft, 2)(video), RaftFlow(raft, 2)(video / 255), atol=1e-3)


def test_saved_raft_loads_the_same(raft, tmp_path):
    save_raft(raft, SMALL, tmp_path / "raft")
    video = torch.rand(1, 3, 2, 32, 32)
    torch.testing.assert_close(
        RaftFlow(load_raft(tmp_path / "raft"), 2)(video), RaftFlow(raft, 2)(video), rtol=0.05, atol=0.05
    )


def test_torchvisions_own_weights_load(tmp_path):
    torch.save(raft_large().state_dict(), tmp_path / "raft.pth")
    assert sum(p.numel() for p in load_raft(tmp_path / "raft.pth").parameters()) == sum(
        p.numel() for p in raft_large().parameters()
    )
    with pytest.raises(UserError, match="no flow network"):
        load_raft(tmp_path / "nothing")


def test_motion_picture_is_the_papers_three_channels_scaled():
    flow = torch.randn(2, 2, 3, 4, 5)
    found = motion_picture(flow, 4.0).numpy()
    o = np.concatenate([flow.numpy(), flow.numpy()[:, :, -1:]], 2)
    magnitude = np.linalg.norm(o, axis=1, keepdims=True)
    np.testing.assert_allclose(found, np.concatenate([o / 4, magnitude / 2 - 1], 1), atol=1e-5)


def test_still_pixels_have_a_finite_gradient():
    flow = torch.zeros(1, 2, 2, 2, 2, requires_grad=True)
    motion_picture(flow, 4.0).sum().backward()
    assert torch.isfinite(flow.grad).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3), (2, 1, 1), (4,)])
def test_flow_of_a_video_in_pieces_is_that_of_the_whole(sizes):
    video = torch.rand(1, 3, 4, 4, 4)
    change = lambda x: x.diff(dim=2)[:, :2]  # noqa: E731
    found = list(flow_of_pieces(iter(video.split(sizes, 2)), change))
    assert torch.equal(torch.cat(found, 2), change(video))


def test_warp_by_whole_pixels_is_indexing():
    image = torch.rand(1, 3, 6, 7)
    flow = torch.zeros(1, 2, 6, 7)
    flow[:, 0], flow[:, 1] = 2, 1
    torch.testing.assert_close(warp(image, flow)[..., :5, :5], image[..., 1:, 2:])
