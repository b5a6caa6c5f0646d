"""Frame-sparse attention: exact without a mask, counted, searched; and where a model's attention goes."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mogan.cli import main
from mogan.errors import UserError
from mogan.models import frame_sparse, wan
from mogan.models.frame_sparse import (
    attend,
    errors,
    kept_share,
    references,
    search,
    sees,
    set_frame_sparse,
    sight,
    tiles,
    watched,
)


@given(st.integers(1, 24), st.data())
def test_kept_pairs_are_as_many_as_the_formula_says(frames, data):
    count = data.draw(st.integers(1, frames))
    chosen = references(frames, count)
    assert len(set(chosen)) == count
    assert chosen[0] == 0
    assert max(chosen) < frames
    mask = sees(frames, count)
    assert torch.equal(mask, mask.T)
    assert mask.sum().item() == frames + 2 * count * (frames - count) + count * (count - 1)
    assert kept_share(frames, count) == pytest.approx(mask.float().mean().item())


def test_shares_are_the_published_ones():
    """Efficient-vDiT's tables 3 and 4: how much 8 and 24 latent frames leave out, within what rounding to blocks makes."""
    for frames, count, left_out in ((8, 4, 0.176), (8, 3, 0.2988), (8, 1, 0.6438), (24, 12, 0.2151), (24, 3, 0.7205)):
        assert 1 - kept_share(frames, count) == pytest.approx(left_out, abs=0.016)


def test_a_number_of_references_that_no_clip_has_is_refused():
    for count in (0, 6):
        with pytest.raises(ValueError, match="from 1 to 5"):
            references(5, count)


def inputs(frames, tokens=3, heads=2, width=4, batch=2):
    generator = torch.Generator().manual_seed(frames)
    return [
        torch.randn(batch, heads, frames * tokens, width, generator=generator, dtype=torch.double) for _ in range(3)
    ]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.data())
def test_it_equals_masked_attention_forwards_and_backwards(frames, data):
    count = data.draw(st.integers(1, frames))
    mask = sees(frames, count).repeat_interleave(3, 0).repeat_interleave(3, 1)
    found = []
    for compute in (
        lambda q, k, v: attend(q, k, v, frames, count),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    ):
        leaves = [x.requires_grad_() for x in inputs(frames)]
        out = compute(*leaves)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, masked in zip(*found, strict=True):
        torch.testing.assert_close(ours, masked)


def test_with_all_frames_as_references_it_is_dense_bit_for_bit():
    query, key, value = inputs(5)
    dense = F.scaled_dot_product_attention(query, key, value)
    for count in (4, 5):  # of five frames four references see all, and the fifth sees them and itself
        assert kept_share(5, count) == 1
        assert torch.equal(attend(query, key, value, 5, count), dense)
    assert not torch.equal(attend(query, key, value, 5, 3), dense)


def test_frames_that_are_no_references_do_not_see_one_another():
    query, key, value = inputs(5)
    before = attend(query, key, value, 5, 2)
    chosen = references(5, 2)
    other = next(f for f in range(5) if f not in chosen)
    key[:, :, 3 * other : 3 * other + 3] += 1
    value[:, :, 3 * other : 3 * other + 3] += 1
    changed = (attend(query, key, value, 5, 2) != before).unflatten(2, (5, 3)).any(-1).any(-1).any(0).any(0)
    assert [f for f in range(5) if changed[f]] == sorted({*chosen, other})


@pytest.mark.parametrize("autocast", [False, True])
def test_flex_attention_sees_what_is_gathered(autocast, monkeypatch):
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5 * 8, 16) for _ in range(3))
    v = v.bfloat16() if autocast else v  # norms of keys and queries leave them in fp32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gathered = attend(q, k, v, 5, 2)
        monkeypatch.setattr(frame_sparse, "flex_attention_on", lambda device: flex)
        found = attend(q, k, v, 5, 2)
    assert found.dtype == gathered.dtype
    torch.testing.assert_close(found, gathered, atol=2e-2 if autocast else 1e-5, rtol=0)
    assert torch.equal(sight(5, 2).mask(), sees(5, 2))


def test_mass_and_likeness_of_attention_that_is_known():
    """Without preference every frame gets its share and all tiles are alike; of keys that only one frame has, all goes there."""
    query, key, _ = inputs(4, width=8)
    mass, alike = tiles(torch.zeros_like(query), key, 4)
    torch.testing.assert_close(mass, torch.full((4, 4), 0.25))
    torch.testing.assert_close(alike, torch.ones(4))
    drawn = torch.zeros_like(key)
    drawn[:, :, 3:6] = 100 * query.new_ones(8)
    mass, _ = tiles(query.abs() + 1, drawn, 4)
    torch.testing.assert_close(mass, F.one_hot(torch.ones(4, dtype=torch.long), 4).float())


def test_likeness_is_the_mean_cosine_between_tiles():
    query, key, _ = inputs(4, batch=1, heads=1)
    shares = (query[0, 0] @ key[0, 0].T / 2).softmax(-1).view(4, 3, 4, 3)
    _, alike = tiles(query, key, 4)
    for frame in range(4):
        others = [shares[frame, :, f].flatten() for f in range(4) if f != frame]
        pairs = [F.cosine_similarity(a, b, dim=0) for n, a in enumerate(others) for b in others[n + 1 :]]
        assert alike[frame].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


@pytest.fixture
def call(family):
    """The lab's teacher and a call of it."""
    transformer = wan.load_transformer(family / "teacher").eval()
    channels, frames, height, width = wan.latent_shape(family / "teacher", wan.geometry(family / "teacher"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, frames, height, width, generator=generator)
    text = torch.randn(2, 6, transformer.config.text_dim, generator=generator)

    def run():
        with torch.no_grad():
            return transformer(x, torch.tensor([400.0, 700.0]), text, return_dict=False)[0]

    return transformer, frames, run


def test_a_transformer_is_itself_when_watched_and_with_all_references(call):
    transformer, frames, run = call
    names, dense, seen = set(transformer.state_dict()), run(), {}
    with watched(transformer, lambda number, q, k: seen.update({number: tiles(q, k, frames)[0].sum(1)})):
        assert torch.equal(run(), dense)
    assert list(seen) == list(range(len(transformer.blocks)))
    for rows in seen.values():
        torch.testing.assert_close(rows, torch.ones(frames))
    set_frame_sparse(transformer, frames, [frames] * len(transformer.blocks))
    assert torch.equal(run(), dense)
    assert set(transformer.state_dict()) == names
    sparse = set_frame_sparse(transformer, frames, [1] * len(transformer.blocks))
    assert (run() - dense).abs().max() > 1e-3
    with pytest.raises(UserError, match=f"clips of {frames} latent frames, and one has {frames - 1}"):
        sparse(torch.zeros(1, 16, frames - 1, 4, 4), torch.zeros(1), torch.zeros(1, 6, 4))


def test_the_search_takes_the_fewest_references_that_a_block_bears(call):
    transformer, frames, run = call
    dense = run()
    costs = errors(transformer, frames, run)
    assert torch.equal(run(), dense)  # nothing was left behind
    assert (costs[:, -1] == 0).all()
    assert (costs[:, 0] > 1e-4).all()
    assert search(costs, 0.0) == [frames - 1] * len(transformer.blocks)  # which is dense
    assert search(costs, 1e9) == [1] * len(transformer.blocks)
    chosen = [search(costs, threshold) for threshold in (0.5, 0.1, 0.02, 0.0)]
    for looser, tighter in pairwise(chosen):
        assert all(a <= b for a, b in zip(looser, tighter, strict=True))


def test_a_blocks_error_is_what_it_alone_does_wrong(call):
    transformer, frames, run = call
    caught = {}
    handle = transformer.blocks[0].register_forward_hook(lambda m, args, out: caught.update(x=args[0], out=out))
    run()
    dense = caught["out"]
    set_frame_sparse(transformer, frames, [2] + [frames] * (len(transformer.blocks) - 1))
    run()
    expected = (caught["out"] - dense).square().sum() / (dense - caught["x"]).square().sum()
    handle.remove()
    set_frame_sparse(transformer, frames, [frames] * len(transformer.blocks))
    assert errors(transformer, frames, run)[0, 1].item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_command_writes_numbers_and_a_picture(family, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left\na blue square at rest\n")
    out = tmp_path / "out"
    words = ["attention", "--prompts", prompts, "--model", family / "student", "--out", out, "--levels", "0.7"]
    words += ["--precision", "fp32"]
    assert main([str(w) for w in [*words, "--thresholds", "0", "1e9"]]) == 0
    facts = json.loads((out / "attention.json").read_text())
    blocks = facts["blocks"]["0.7"]
    for block in blocks:
        torch.testing.assert_close(torch.tensor(block["mass"]).sum(1), torch.ones(facts["frames"]))
        assert block["own"] == pytest.approx(torch.tensor(block["mass"]).diagonal().mean().item())
    kept = facts["sparse"]["0.7"]["thresholds"]
    assert kept["0.0"]["kept"] == 1
    assert kept["1000000000.0"]["kept"] == pytest.approx(kept_share(facts["frames"], 1))
    assert (out / "attention.png").stat().st_size > 1000
    assert "of pairs of frames kept" in capsys.readouterr().out
    (out / "attention.json").write_text('{"mine": 1}')
    assert main([str(w) for w in words]) == 2
    assert "not what this command writes" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--levels", "1.5"), ("--levels", "0"), ("--thresholds", "-1")])
def test_levels_and_thresholds_that_mean_nothing_are_refused(option, value, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle at rest\n")
    words = ["attention", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out", f"{option}={value}"]
    assert main([str(w) for w in words]) == 2
    assert f"{option} " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_set_before_is_replaced_and_watching_changes_nothing(call):
    transformer, frames, run = call
    blocks = len(transformer.blocks)
    sparse = set_frame_sparse(transformer, frames, [2] * blocks) and run()
    set_frame_sparse(transformer, frames + 1, [1] * blocks)
    with pytest.raises(UserError, match=f"clips of {frames + 1}"):
        run()
    set_frame_sparse(transformer, frames, [2] * blocks)
    assert torch.equal(run(), sparse)
    with watched(transformer, lambda number, q, k: None):
        assert torch.equal(run(), sparse)


def test_gradients_pass_with_blocks_recomputed(call):
    transformer, frames, _ = call
    set_frame_sparse(transformer, frames, [2] * len(transformer.blocks))
    x = torch.randn(1, transformer.config.in_channels, frames, 4, 4)
    found = []
    for recompute in (False, True):
        (transformer.enable_gradient_checkpointing if recompute else transformer.disable_gradient_checkpointing)()
        transformer.train(recompute).zero_grad()
        out = transformer(x, torch.tensor([300.0]), torch.zeros(1, 3, transformer.config.text_dim), return_dict=False)[
            0
        ]
        out.square().sum().backward()
        found.append(transformer.blocks[0].attn1.to_q.weight.grad.clone())
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found)
