"""A causal student: cache = mask = prefix run again; policies; where gradient goes; chunk after chunk to a clip and its frames."""

import json
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SkyReelsV2Transformer3DModel, WanPipeline, WanTransformer3DModel

import tiny_recipes
from conftest import CAPTIONS
from mogan.cli import main
from mogan.config import Update
from mogan.costs.calls import TEXT_TOKENS, build_transformer
from mogan.costs.causal import chunk_calls
from mogan.costs.shapes import read_shapes
from mogan.costs.trace import fake, trace
from mogan.data.cache import open_cache
from mogan.distributed import World
from mogan.errors import UserError
from mogan.exchange.export import save_student
from mogan.exchange.stock_sampler import stock_sampler
from mogan.models import causal, wan
from mogan.models.attention import set_attention, stack_text
from mogan.models.autoencoder import decode_video, stream_chunks
from mogan.models.causal import CausalDenoiser, is_causal, make_causal
from mogan.models.causal_cache import Cache, Causal, Piece, Policy, read_causal
from mogan.models.denoiser import Denoiser
from mogan.models.lora import adapted, hold_in
from mogan.models.sight import _block_mask, block_causal, teacher_forcing
from mogan.objectives.flow_matching import FlowMatchingConfig
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import Chunked, roll_out_causal, sample_causal, stream_causal
from mogan.sampling.rollout import FewStep, normal, roll_out
from mogan.sampling.samplers import sample_student
from mogan.training.assemble import assemble
from mogan.training.load import check_processes, find_models
from mogan.training.loop import run_training
from test_train import build

CHUNKS = (2, 2, 2)
LEVELS = (1.0, 6 / 7, 0.6)  # of the chunks
SIGMAS = (1.0, 6 / 7, 0.6)
TEXT = F.pad(torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(5)), (0, 0, 0, 1))  # the last row is padding
B = torch.ones(2)


def latents(frames=6, seed=0, batch=2):
    return torch.randn(batch, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


CLEAN, NOISY = latents(seed=1), latents(seed=2)
PER_FRAME = torch.tensor(LEVELS).repeat_interleave(2).expand(2, -1)


def spans(chunks=CHUNKS):
    return [slice(stop - size, stop) for size, stop in zip(chunks, accumulate(chunks), strict=True)]


def loaded(folder):
    """Random weights, made to matter: a fresh network's gates are small."""
    transformer = wan.load_transformer(folder / "teacher").eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return transformer


@pytest.fixture
def stock(family):
    return Denoiser(loaded(family))


@pytest.fixture
def student(family):
    return CausalDenoiser(loaded(family))


@torch.no_grad()
def cached(student, clean, noisy, levels=LEVELS, chunks=CHUNKS, policy=causal.FULL, noisy_past=False):
    """Velocity of noisy chunks, each given clean ones, call by call; and the last cache."""
    cache, found = student.begin(TEXT, policy), []
    for where, level in zip(spans(chunks), levels, strict=True):
        found.append(student.chunk_velocity(noisy[:, :, where], level * B, TEXT, cache))
        past, told = (noisy, level) if noisy_past else (clean, 0.0)
        cache = student.remember(past[:, :, where], TEXT, cache, told)
    return torch.cat(found, 2), cache


def far(a, b):
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------- the same function


def test_a_way_of_chunks_is_said_in_words():
    assert str(Causal(1, 3)) == "chunks of 1, 3, ... latents"
    assert str(Causal(1, 1, Policy(4, 1), 0.1)) == "chunks of 1, 1, ... latents, window 4, sink 1, context_sigma 0.1"


def test_a_clip_in_one_chunk_is_what_the_stock_transformer_makes_of_it(stock, student):
    x = latents()
    with torch.no_grad():
        want = stock.velocity(x, 0.7 * B, TEXT)
        assert torch.equal(student.chunk_velocity(x, 0.7 * B, TEXT, student.begin(TEXT)), want)
        whole = student.masked(x, 0.7 * torch.ones(2, 6), TEXT, (6,))
        assert torch.equal(whole, stock.velocity(x, 0.7 * torch.ones(2, 6), TEXT))
        assert far(whole, want) < 1e-5  # a level per token


def test_calls_with_a_cache_are_one_teacher_forced_pass(student):
    found, _ = cached(student, CLEAN, NOISY)
    with torch.no_grad():
        whole = student.teacher_forced(CLEAN, NOISY, PER_FRAME, TEXT, CHUNKS)
    assert far(found, whole) < 1e-5
    # and what fails: the past as noisy as it is
    assert far(cached(student, CLEAN, NOISY, noisy_past=True)[0], whole) > 0.05


def test_calls_whose_cache_noisy_calls_wrote_are_one_block_causal_pass(student):
    found, _ = cached(student, CLEAN, NOISY, noisy_past=True)
    with torch.no_grad():
        assert far(found, student.masked(NOISY, PER_FRAME, TEXT, CHUNKS)) < 1e-5


def test_a_cached_call_is_the_last_chunk_of_its_prefix_run_again(student):
    found, _ = cached(student, CLEAN, NOISY)
    x = torch.cat([CLEAN[:, :, :4], NOISY[:, :, 4:]], 2)
    with torch.no_grad():
        again = student.masked(x, torch.tensor([0, 0, 0, 0, 0.6, 0.6]).expand(2, -1), TEXT, CHUNKS)
    assert far(found[:, :, 4:], again[:, :, 4:]) < 1e-5


@pytest.mark.parametrize("policy", [Policy(), Policy(window=4), Policy(window=4, sink=2)], ids=str)
def test_told_per_token_as_a_masked_pass_is_a_cached_call_is_the_same_numbers(student, monkeypatch, policy):
    """What is left above, a few 1e-6, is between a level per sample and one per token."""
    own = CausalDenoiser.velocity

    def per_token(denoiser, x, sigma, text, to=None):
        return own(denoiser, x, sigma if sigma.ndim == 2 else sigma[:, None].expand(-1, x.shape[2]), text, to)

    monkeypatch.setattr(CausalDenoiser, "velocity", per_token)
    found, _ = cached(student, CLEAN, NOISY, policy=policy)
    noisy, _ = cached(student, CLEAN, NOISY, policy=policy, noisy_past=True)
    prefix = torch.cat([CLEAN[:, :, :4], NOISY[:, :, 4:]], 2)
    levels = torch.tensor([0, 0, 0, 0, 0.6, 0.6]).expand(2, -1)
    with torch.no_grad():
        assert far(found, student.teacher_forced(CLEAN, NOISY, PER_FRAME, TEXT, CHUNKS, policy)) == 0
        assert far(noisy, student.masked(NOISY, PER_FRAME, TEXT, CHUNKS, policy)) == 0
        assert far(found[:, :, 4:], student.masked(prefix, levels, TEXT, CHUNKS, policy)[:, :, 4:]) == 0


def test_the_stock_class_of_a_causal_wan_says_the_same(student):
    """diffusers' SkyReels V2: another author's mask over the same tensors, without a cache."""
    config = {k: v for k, v in student.transformer.config.items() if not k.startswith("_")}
    names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    own = {k: config[k] for k in (*names, "freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len", "eps")}
    other = SkyReelsV2Transformer3DModel(**own, num_frame_per_block=2, inject_sample_info=False).eval()
    other.load_state_dict(student.transformer.state_dict(), strict=True)
    full = F.pad(TEXT, (0, 0, 0, 512 - TEXT.shape[1]))
    found, _ = cached(student, CLEAN, NOISY)
    for number, where in enumerate(spans()):
        x = torch.cat([CLEAN[:, :, : where.start], NOISY[:, :, where]], 2)
        level = 1000 * torch.tensor([0.0] * where.start + [LEVELS[number]] * 2).expand(2, -1)
        with torch.no_grad():
            want = other(x, level, full, enable_diffusion_forcing=True, return_dict=False)[0]
        assert far(found[:, :, where], want[:, :, where]) < 2e-4


@pytest.mark.parametrize(
    "mistake", [("keys", lambda view: view.k_cos), ("queries", None)], ids=["rotated twice", "queries from 0"]
)
def test_wrong_positions_do_not_go_unseen(student, monkeypatch, mistake):
    right, _ = cached(student, CLEAN, NOISY)
    if mistake[0] == "queries":
        monkeypatch.setattr(Cache, "positions", lambda cache, new: (list(cache.frames), list(range(new))))
    else:
        own, first = causal.CausalAttention.__call__, causal.rotate

        def twice(processor, attn, hidden, encoder=None, mask=None, view=None):
            out = own(processor, attn, hidden, encoder, mask, view)
            if view.store is not None:
                k, v = view.store[-1]
                tokens = k.shape[1]
                view.store[-1] = (first(k, view.k_cos[:, -tokens:], view.k_sin[:, -tokens:]), v)
            return out

        monkeypatch.setattr(causal.CausalAttention, "__call__", twice)
    wrong, _ = cached(student, CLEAN, NOISY)
    assert far(wrong[:, :, 2:], right[:, :, 2:]) > 1e-3


def test_only_differences_of_positions_count(student, monkeypatch):
    right, _ = cached(student, CLEAN, NOISY)
    own = Cache.positions
    monkeypatch.setattr(Cache, "positions", lambda cache, new: tuple([p + 20 for p in q] for q in own(cache, new)))
    assert far(cached(student, CLEAN, NOISY)[0], right) < 5e-5


def test_what_is_seen_is_gathered_masked_or_flexed_alike(student, monkeypatch):
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    with torch.no_grad():
        gathered = student.teacher_forced(CLEAN, NOISY, PER_FRAME, TEXT, CHUNKS)
        monkeypatch.setattr(causal, "flex_attention_on", lambda device: flex)
        assert far(student.teacher_forced(CLEAN, NOISY, PER_FRAME, TEXT, CHUNKS), gathered) < 1e-5

        def dense(flex, q, k, v, sight):
            hidden = ~sight.mask(q.shape[2] // sight.frames)
            bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
            return F.scaled_dot_product_attention(q, k, v, bias)

        monkeypatch.setattr(causal, "flex_masked", dense)
        assert far(student.teacher_forced(CLEAN, NOISY, PER_FRAME, TEXT, CHUNKS), gathered) < 1e-5


@pytest.mark.parametrize(
    ("sight", "tokens"),
    [
        (teacher_forcing((1, 2, 1)), 128),  # frames are blocks
        (teacher_forcing((3, 3, 1)), 60),  # a block holds several frames, and the last one ends beyond the clip
        (block_causal((1, 1, 4, 2)), 96),
        (block_causal((2, 1, 1, 1), Policy(window=3, sink=1)), 200),
        (teacher_forcing((2, 2), Policy(window=2)), 20),  # all of it is less than two blocks
    ],
)
def test_blocks_are_those_that_flex_attention_would_find_pair_by_pair(sight, tokens):
    create = pytest.importorskip("torch.nn.attention.flex_attention").create_block_mask
    length, seen = tokens * sight.frames, sight.mask()
    stock = create(lambda b, h, q, k: seen[q // tokens, k // tokens], 1, 1, length, length, device="cpu")
    ours = _block_mask(sight, length, torch.device("cpu"))
    assert ours.seq_lengths == stock.seq_lengths
    assert ours.BLOCK_SIZE == stock.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, places = getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        assert torch.equal(counts, getattr(stock, f"{name}_num_blocks"))
        assert torch.equal(places, getattr(stock, f"{name}_indices"))
        assert (counts.dtype, places.dtype) == (torch.int32, torch.int32)


def test_masks_are_those_of_the_papers():
    """Chunks of 2, 1 and 2 frames, written out: rows look at columns."""
    rows = ["11000", "11000", "11100", "11111", "11111"]
    assert block_causal((2, 1, 2)).mask().int().tolist() == [[int(c) for c in row] for row in rows]
    forced = teacher_forcing((2, 1, 2)).mask().int()
    assert forced[:5, :5].tolist() == [[int(c) for c in row] for row in rows]
    assert not forced[:5, 5:].any()
    assert forced[5:, :5].tolist() == [[0] * 5, [0] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    own = ["11000", "11000", "00100", "00011", "00011"]
    assert forced[5:, 5:].tolist() == [[int(c) for c in row] for row in own]
    # the share that is computed of 7 chunks of 3, twice 28 of 49 quarters (specification, 3.11)
    assert float(teacher_forcing((3,) * 7).mask().float().mean()) == pytest.approx(2 * 28 / 49 / 4)


# ------------------------------------------------------------------------------------------------- policies


def test_frames_that_are_seen():
    ones, threes = (1,) * 8, (3,) * 5
    assert Policy().seen(threes)[-1] == tuple(range(12))
    assert Policy(window=4).seen(ones)[-1] == (4, 5, 6)
    assert Policy(window=5).seen((2,) * 4)[-1] == (4, 5)  # whole chunks
    assert Policy(window=5, sink=1).seen(ones)[-1] == (0, 4, 5, 6)
    assert Policy(window=9, sink=3).seen(threes)[-1] == (0, 1, 2, 9, 10, 11)
    assert Policy(window=9, sink=1).seen(threes)[-1] == (0, 7, 8, 9, 10, 11)  # with a sink no more than must
    assert Policy(window=9, sink=1, relative=True).seen((1, 3, 3, 3))[-1] == (0, 2, 3, 4, 5, 6)
    cache = Cache(Policy(window=5, sink=1, relative=True))
    for _ in range(8):
        cache = cache.make_room(1).append((), 1)
    assert cache.make_room(1).positions(1) == ([0, 1, 2, 3], [4])
    absolute = replace(cache, policy=Policy(window=5, sink=1)).make_room(1)
    assert absolute.positions(1) == ([0, 5, 6, 7], [8])
    assert absolute.make_room(1) == absolute


POLICIES = [
    Policy(window=12),
    Policy(window=12, sink=1),
    Policy(window=12, sink=1, decay=0.9),
    Policy(window=12, sink=1, decay=0.9, relative=True),
]


def long(student, policy, frames=12):
    return cached(student, latents(frames, 1), latents(frames, 2), (0.7,) * frames, (1,) * frames, policy)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_window_as_long_as_the_clip_changes_nothing(student, policy):
    assert torch.equal(long(student, policy)[0], long(student, Policy())[0])


def test_policies_are_alike_before_the_first_eviction_and_not_after(student):
    full = long(student, Policy())[0]
    static = Policy(window=5, sink=1)
    found = {p: long(student, p)[0] for p in (Policy(window=5), static, replace(static, relative=True))}
    for velocity in found.values():
        assert torch.equal(velocity[:, :, :5], full[:, :, :5])
        assert far(velocity[:, :, 5:], full[:, :, 5:]) > 1e-3
    relative = found[replace(static, relative=True)]
    assert torch.equal(relative[:, :, :5], found[static][:, :, :5])
    assert far(relative[:, :, 6:], found[static][:, :, 6:]) > 1e-3  # two models: the choice is kept with the weights


@pytest.mark.parametrize("relative", [False, True])
def test_an_ema_sink_that_learns_nothing_is_a_static_one_and_one_that_keeps_nothing_is_the_last_to_leave(
    student, relative
):
    static = Policy(window=5, sink=1, relative=relative)
    assert torch.equal(long(student, replace(static, decay=1.0))[0], long(student, static)[0])
    _, cache = long(student, replace(static, decay=0.0))
    _, full = long(student, Policy(window=12, sink=1))  # of the same frames in the first block, which sees no past
    last = cache.frames[1] - 1
    assert torch.equal(cache.pieces[0].kv[0][0], full.pieces[last].kv[0][0])


def test_an_ema_sink_has_its_closed_form():
    """``S_n = a^n S_0 + (1 - a) sum_k a^(n-1-k) E_k``."""
    a, sent = 0.9, torch.randn(9, 2, 6, 1, 2, generator=torch.Generator().manual_seed(0))
    cache = Cache(Policy(window=9, sink=3, decay=a))
    for kv in sent:
        cache = cache.make_room(3).append(((kv, 2 * kv),), 3)
    gone = sent[1:8]  # all but the sink and the two that are in the window
    want = a**6 * sent[0] + (1 - a) * sum(a ** (5 - k) * gone[k] for k in range(6))
    assert cache.frames == (0, 1, 2, *range(21, 27))
    assert torch.allclose(cache.pieces[0].kv[0][0], want, atol=1e-6)
    assert torch.allclose(cache.pieces[0].kv[0][1], 2 * want, atol=1e-6)


def test_a_rolling_cache_is_a_fresh_one_of_the_kept_chunks(student):
    """With positions that count from what is kept: evicting is as if the rest had never been seen by this call."""
    policy = Policy(window=3, relative=True)
    _, rolled = long(student, policy, 6)
    kept = replace(rolled.make_room(1), length=0)
    fresh = Cache(policy, (), 0, rolled.words)
    for piece in kept.pieces:
        fresh = fresh.append(piece.kv, 1)
    x = latents(1, 9)
    with torch.no_grad():
        a, b = (student.chunk_velocity(x, 0.7 * B, TEXT, c) for c in (rolled, fresh))
    assert torch.equal(a, b)


@pytest.mark.parametrize("policy", [Policy(window=4), Policy(window=4, sink=2), Policy(window=5, sink=1)], ids=str)
def test_a_window_in_one_pass_is_a_window_in_a_cache(student, policy):
    clean, noisy, chunks = latents(8, 1), latents(8, 2), (2,) * 4
    found, _ = cached(student, clean, noisy, (0.7,) * 4, chunks, policy)
    with torch.no_grad():
        whole = student.teacher_forced(clean, noisy, 0.7 * torch.ones(2, 8), TEXT, chunks, policy)
    assert far(found, whole) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: Policy(window=3, sink=3),
        lambda s: Policy(sink=1),
        lambda s: Policy(window=3, decay=0.9),
        lambda s: Policy(window=3).seen((1, 4)),
        lambda s: Policy(window=4, sink=1, decay=0.9).seen((2,) * 4),
        lambda s: block_causal((1,) * 4, Policy(window=2, relative=True)),
        lambda s: Causal(0, 1),
        lambda s: roll_out_causal(s, latents(6), TEXT, SIGMAS, torch.Generator(), chunks=(2, 2)),
        lambda s: roll_out_causal(
            s, latents(6), TEXT, SIGMAS, torch.Generator(), chunks=CHUNKS, given_BCFHW=latents(1)
        ),
    ],
)
def test_what_cannot_be_is_refused(student, wrong):
    with pytest.raises(ValueError, match=r"."):
        wrong(student)


def test_absolute_positions_end_where_the_model_stops_counting(student):
    x = latents(1)
    cache = Cache(Policy(window=2), length=32)  # the tiny family counts 32 places
    with pytest.raises(UserError, match="32 places in time"):
        student.chunk(x, B, TEXT, cache)
    assert student.chunk(x, B, TEXT, replace(cache, policy=Policy(window=2, relative=True))).isfinite().all()


def test_memory_does_not_grow_with_the_clip(student):
    def held(frames):
        _, cache = long(student, Policy(window=5, sink=1, decay=0.9, relative=True), frames)
        tensors = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for p in cache.pieces
            for kv in p.kv
            for t in kv
        }
        return sum(tensors.values())

    assert held(6) == held(12) == held(40)


def test_facts_of_a_causal_student_come_back():
    how = Causal(1, 3, Policy(window=9, sink=3, decay=0.99, relative=True), 0.1)
    assert read_causal(how.facts()) == how
    assert how.chunks(9) == (1, 3, 3, 2)
    assert how.chunks(1) == (1,)
    assert Causal(3, 3).chunks(21) == (3,) * 7


# ------------------------------------------------------------------------------------------------- the network stays


def test_names_stay_and_again_changes_nothing(stock, student):
    before, after = stock.transformer.state_dict(), student.transformer.state_dict()
    assert list(before) == list(after)
    assert not is_causal(stock.transformer)
    make_causal(set_attention(student.transformer))
    make_causal(student.transformer)
    assert [len(block._forward_pre_hooks) for block in student.transformer.blocks] == [1] * 4
    x = latents()
    with torch.no_grad():
        again = student.chunk_velocity(x, 0.7 * B, TEXT, student.begin(TEXT))
        assert torch.equal(again, stock.velocity(x, 0.7 * B, TEXT))


def test_stock_attention_without_folded_text_will_do(family):
    bare = WanTransformer3DModel.from_pretrained(family / "teacher" / "transformer").eval()
    full, x = F.pad(TEXT, (0, 0, 0, 507)), latents()
    with torch.no_grad():
        want = Denoiser(bare).velocity(x, 0.7 * B, full)
        student = CausalDenoiser(bare)
        assert (
            far(student.chunk_velocity(x, 0.7 * B, full, student.begin(full)), want) < 1e-6
        )  # positions: complex products


def test_a_causal_network_is_not_called_as_another_by_mistake(student):
    with pytest.raises(AssertionError, match="chunk by chunk"):
        student(latents(), B, TEXT)


def test_fused_projections_are_refused(family):
    transformer = wan.load_transformer(family / "teacher")
    transformer.blocks[0].attn1.fuse_projections()
    with pytest.raises(UserError, match="unfuse"):
        make_causal(transformer)


def test_adapters_make_a_causal_tree_over_a_base_that_stays(family):
    base = hold_in(wan.load_transformer(family / "teacher"), torch.float32)
    tree = CausalDenoiser(adapted(base, 2, 0))
    assert not is_causal(base)
    found, _ = cached(tree, CLEAN, NOISY)
    assert far(found, cached(CausalDenoiser(wan.load_transformer(family / "teacher")), CLEAN, NOISY)[0]) < 1e-6
    roll_out_causal(
        tree, NOISY, TEXT, SIGMAS, torch.Generator(), chunks=CHUNKS, grad=True
    ).sample_BCFHW.sum().backward()
    learnt = {name for name, p in tree.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt
    assert all(".lora_B" in name for name in learnt)
    copied = adapted(make_causal(wan.load_transformer(family / "teacher")).requires_grad_(False), 2, 0)
    assert torch.equal(cached(CausalDenoiser(copied), CLEAN, NOISY)[0], found)


def test_a_text_is_read_once_and_another_one_is_noticed(student, monkeypatch):
    read = []
    own = causal.TextOnce.keys
    monkeypatch.setattr(causal.TextOnce, "keys", lambda p, attn, text: (read.append(attn), own(p, attn, text))[1])
    made = roll_out_causal(student, NOISY, TEXT, SIGMAS, torch.Generator().manual_seed(0), chunks=CHUNKS)
    with torch.no_grad():
        once = roll_out_causal(student, NOISY, TEXT, SIGMAS, torch.Generator().manual_seed(0), chunks=CHUNKS)
    assert torch.equal(made.sample_BCFHW, once.sample_BCFHW)
    assert len(read) == 2 * 4  # blocks
    read.clear()
    _, cache = cached(student, CLEAN, NOISY)
    other = TEXT.flip(0).contiguous()
    with torch.no_grad():
        a = student.chunk_velocity(latents(2), B, other, cache)
        b = student.chunk_velocity(latents(2), B, other, replace(cache, words=None))
        assert torch.equal(a, b)
        cache = student.remember(latents(2), other, cache)
    assert cache.words.text is other


# ------------------------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("exit_step", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_one_chunk_it_is_the_roll_out(stock, student, exit_step, checkpointing):
    gradients, samples = [], []
    for network, more in ((stock, {}), (student, {"chunks": (6,)})):
        if checkpointing:
            network.transformer.enable_gradient_checkpointing()
        network.transformer.requires_grad_(True)
        generators, way = [torch.Generator().manual_seed(k) for k in (0, 1)], roll_out_causal if more else roll_out
        made = way(network, NOISY, TEXT, SIGMAS, generators, exit_step=exit_step, grad=True, **more)
        made.sample_BCFHW.square().sum().backward()
        samples.append(made.sample_BCFHW.detach())
        gradients.append([p.grad for p in network.parameters()])
        assert made.exit_step == exit_step
    assert torch.equal(*samples)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


def test_gradient_goes_through_a_chunks_judged_step_and_nowhere_else(student):
    noise = NOISY.clone().requires_grad_(True)
    made = roll_out_causal(student, noise, TEXT, SIGMAS, torch.Generator(), chunks=CHUNKS, exit_step=0, grad=True)
    made.sample_BCFHW[:, :, 4:].sum().backward()
    assert noise.grad[:, :, 4:].abs().max() > 0
    assert not noise.grad[:, :, :4].any()  # exactly: nothing through the cache
    # and the same through the weights: the gradient of chunk 3 alone, its past given as numbers
    whole = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    cache = student.begin(TEXT)
    for where in spans()[:2]:
        cache = student.remember(made.sample_BCFHW[:, :, where].detach(), TEXT, cache)
    assert not any(t.requires_grad for piece in cache.pieces for kv in piece.kv for t in kv)
    student.chunk(NOISY[:, :, 4:], B, TEXT, cache).sum().backward()
    alone = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert whole.keys() == alone.keys()
    assert all(torch.equal(whole[n], alone[n]) for n in whole)


def test_gradient_through_a_cache_that_is_not_detached_does_not_go_unseen(student):
    """The same keys and values, of a call with gradient: noise of the first chunk then moves the second."""
    noise, found = NOISY[:, :, :2].clone().requires_grad_(True), []
    heads = student.transformer.config.num_attention_heads
    for block in student.transformer.blocks:
        for part in (block.attn1.norm_k, block.attn1.to_v):
            part.register_forward_hook(lambda part, given, out: found.append(out.unflatten(2, (heads, -1))))
    student.chunk_velocity(noise, 0 * B, TEXT, student.begin(TEXT))
    kept, live = student.remember(noise, TEXT, student.begin(TEXT)), tuple(zip(found[::2], found[1::2], strict=True))
    live = live[: len(student.transformer.blocks)]  # those of the first call
    assert all(
        torch.equal(a, b) for x, y in zip(kept.pieces[0].kv, live, strict=True) for a, b in zip(x, y, strict=True)
    )
    for kv, moves in ((kept.pieces[0].kv, False), (live, True)):
        cache = replace(kept, pieces=(Piece((0, 1), kv),))
        made = student.chunk(NOISY[:, :, 2:4], B, TEXT, cache).sum()
        (gradient,) = torch.autograd.grad(made, noise, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == moves


@pytest.mark.parametrize("policy", [Policy(window=2), Policy(window=3, sink=1, decay=0.9, relative=True)], ids=str)
def test_recomputation_sees_the_past_that_was_seen(family, policy):
    found = []
    for checkpointing in (False, True):
        student = CausalDenoiser(loaded(family))
        if checkpointing:
            student.transformer.enable_gradient_checkpointing()
        made = roll_out_causal(
            student,
            NOISY,
            TEXT,
            SIGMAS,
            torch.Generator().manual_seed(0),
            chunks=(1,) * 6,
            policy=policy,
            exit_step=1,
            grad=True,
        )
        made.sample_BCFHW.square().sum().backward()
        found.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_clip_depends_on_its_own_seed_and_words_alone(student):
    def made(rows):
        generators = [torch.Generator().manual_seed(k) for k in rows]
        noise = normal(torch.Size((len(rows), 4, 6, 4, 4)), generators, "cpu")
        return roll_out_causal(student, noise, TEXT[list(rows)].clone(), SIGMAS, generators, chunks=CHUNKS).sample_BCFHW

    both = made((0, 1))
    assert far(made((1, 0)).flip(0), both) < 1e-4
    assert far(made((1,)), both[1:]) < 1e-4


def test_given_frames_stay_and_are_seen_clean(student):
    given = latents(2, 7)
    made = roll_out_causal(
        student, NOISY, TEXT, SIGMAS, torch.Generator().manual_seed(0), chunks=CHUNKS, given_BCFHW=given
    ).sample_BCFHW
    assert torch.equal(made[:, :, :2], given)
    with torch.no_grad():
        cache = student.remember(given, TEXT, student.begin(TEXT))
        first = student.chunk(NOISY[:, :, 2:4], B, TEXT, cache)
    once = roll_out_causal(
        student, NOISY, TEXT, SIGMAS, torch.Generator(), chunks=CHUNKS, given_BCFHW=given, exit_step=0
    ).sample_BCFHW
    assert torch.equal(once[:, :, 2:4], first)


def test_a_chunk_may_have_steps_of_its_own_and_a_noisy_context(student):
    calls = []
    own = student.velocity
    student.velocity = lambda x, sigma, *rest: (calls.append((x.shape[2], float(sigma[0]))), own(x, sigma, *rest))[1]
    roll_out_causal(
        student, NOISY, TEXT, SIGMAS, torch.Generator(), chunks=CHUNKS, context_sigma=0.1,
        steps_of=lambda number: SIGMAS if number == 0 else SIGMAS[:1],
    )  # fmt: skip
    levels = [round(level, 4) for _, level in calls]
    assert levels == [1.0, round(6 / 7, 4), 0.6, 0.1, 1.0, 0.1, 1.0]  # no pass after the last chunk, which nobody sees
    calls.clear()
    roll_out_causal(
        student, NOISY, TEXT, SIGMAS[:1], torch.Generator(), chunks=CHUNKS, context_sigma=0.1,
        given_BCFHW=NOISY[:, :, : CHUNKS[0]],
    )  # fmt: skip
    assert [round(level, 4) for _, level in calls] == [0.0, 1.0, 0.1, 1.0]  # what is given is seen as it is


def test_frames_that_stream_are_those_of_the_whole_clip(student, family):
    vae = wan.load_vae(family / "teacher", torch.float32)
    student.how = Causal(1, 2, Policy(window=4, sink=1, relative=True))
    assert student.how.chunks(6) == (1, 2, 2, 1)
    parts = list(stream_causal(student, TEXT, (4, 6, 4, 4), SIGMAS, [3, 4]))
    assert [p.shape[2] for p in parts] == [1, 2, 2, 1]
    frames = list(sample_causal(student, vae, TEXT, (4, 6, 4, 4), SIGMAS, [3, 4]))
    assert [f.shape[2] for f in frames] == [1, 4, 4, 4, 4, 4]
    with torch.no_grad():
        whole = decode_video(vae, torch.cat(parts, 2))
    assert torch.equal(torch.cat(frames, 2), whole)
    assert torch.equal(sample_student(student, TEXT, (4, 6, 4, 4), SIGMAS, [3, 4]), torch.cat(parts, 2))


def test_a_chunk_is_decoded_before_the_next_is_made(student, family):
    vae, made = wan.load_vae(family / "teacher", torch.float32), []

    def chunks():
        for part in stream_causal(student, TEXT, (4, 4, 4, 4), SIGMAS, [0, 1]):
            made.append(part)
            yield part

    frames = stream_chunks(vae, chunks())
    next(frames)
    assert len(made) == 1
    next(frames)
    assert len(made) == 2


def test_the_labs_teacher_obeys_too():
    """Trained weights, six frames in chunks of two: numbers of the specification."""
    student = CausalDenoiser(wan.load_transformer(wan.lab_folder() / "teacher").eval())
    size = wan.latent_shape(wan.lab_folder() / "teacher", wan.geometry(wan.lab_folder() / "teacher"))
    clean, noisy = (torch.randn(2, size[0], 6, *size[2:], generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    found, _ = cached(student, clean, noisy)
    with torch.no_grad():
        whole = student.teacher_forced(clean, noisy, PER_FRAME, TEXT, CHUNKS)
        blocked = student.masked(noisy, PER_FRAME, TEXT, CHUNKS)
    assert far(found, whole) < 2e-5
    assert far(whole, blocked) > 0.5  # clean or noisy pasts are two tasks


# ------------------------------------------------------------------------------------------------- a folder


HOW = Causal(1, 2, Policy(window=3, sink=1, decay=0.9, relative=True), 0.1)


@pytest.fixture
def folder(family, tmp_path):
    """A causal student as it lies on disk."""
    save_student(
        make_causal(loaded(family)),
        family / "teacher",
        tmp_path / "causal",
        SIGMAS,
        torch.float32,
        "a test",
        causal=HOW,
    )
    return tmp_path / "causal"


def test_a_folder_says_how_its_clips_come_about_and_they_come_about_so(folder, student, tmp_path):
    source = open_generator(str(folder))
    assert source.causal == HOW
    student.how = HOW
    made = [sample_student(s, TEXT, (4, 4, 4, 4), SIGMAS, [0, 1]) for s in (source.load().eval(), student)]
    assert torch.equal(*made)
    (tmp_path / "prompts.txt").write_text(CAPTIONS[0] + "\n")
    sample = [
        "sample",
        "--model",
        str(folder),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "clips"),
    ]
    assert main(sample) == 0
    row = json.loads((tmp_path / "clips" / "samples.jsonl").read_text().splitlines()[0])
    assert row["causal"] == HOW.facts()
    assert (tmp_path / "clips" / row["file"]).is_file()
    own = student.transformer.state_dict()
    stored = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[k], stored[k]) for k in own)


def test_the_card_samples_it_with_diffusers_alone(family, tmp_path, monkeypatch):
    """The code is run as it is printed, to latents that a cache gives."""
    where = tmp_path / "causal"
    base, how = make_causal(loaded(family)), Causal(2, 2)
    save_student(base, family / "teacher", where, SIGMAS, torch.float32, "a test", causal=how)
    facts = json.loads((where / "mogan.json").read_text())
    (where / "mogan.json").write_text(json.dumps(facts | {"frames": 13}))  # four latents
    source = open_generator(str(where))
    (entry,) = stock_sampler(source)
    code = entry.split("```python\n")[1].split("\n```")[0]
    monkeypatch.chdir(tmp_path)
    told = {"PATH": str(where), "PROMPT": CAPTIONS[0]}
    for name, value in told.items():
        code = code.replace(f'"{name}"', repr(value))
    found: dict = {}
    exec(code, found)  # the card's own
    text = stack_text(wan.load_text(where)([CAPTIONS[0]]), "cpu")
    want = sample_student(source.load().eval(), text, (4, 4, 4, 4), SIGMAS, [0])
    assert found["shape"] == tuple(wan.latent_shape(where, source.geometry))
    assert far(found["made"], want) < 5e-4
    assert (tmp_path / "clip.mp4").is_file()
    other = sample_student(source.load().eval(), text, (4, 4, 4, 4), SIGMAS, [1])
    assert far(found["made"], other) > 0.1


@pytest.mark.parametrize(
    "how",
    [
        Causal(1, 1),
        Causal(1, 2),
        Causal(2, 2, context_sigma=0.1),
        Causal(2, 2, Policy(3, 1)),
        Causal(2, 2, first_sigmas=(1.0, 0.5)),
    ],
    ids=["one latent", "unequal chunks", "a noisy past", "frames leave", "FFE"],
)
def test_no_card_prints_it_for_what_the_stock_class_is_not(family, tmp_path, how):
    save_student(
        make_causal(loaded(family)), family / "teacher", tmp_path / "c", SIGMAS, torch.float32, "a test", causal=how
    )
    facts = json.loads((tmp_path / "c" / "mogan.json").read_text())
    (tmp_path / "c" / "mogan.json").write_text(json.dumps(facts | {"frames": 13}))
    assert stock_sampler(open_generator(str(tmp_path / "c"))) == []


@pytest.mark.parametrize("pipeline", [WanPipeline, DiffusionPipeline])
def test_stock_pipelines_refuse_what_they_would_sample_wrongly(folder, pipeline):
    with pytest.raises((AttributeError, ValueError, ModuleNotFoundError, OSError)):
        pipeline.from_pretrained(folder)


def test_what_sees_whole_clips_does_not_take_it(folder, family, tmp_path, capsys):
    (tmp_path / "p.txt").write_text(CAPTIONS[0] + "\n")
    sample = ["sample", "--model", str(folder), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "clips")]
    assert main([*sample, "--mode", "teacher"]) == 2
    assert "chunk by chunk" in capsys.readouterr().err
    paths = [
        "trajectories",
        "--model",
        str(folder),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--out",
        str(tmp_path / "store"),
    ]
    assert main(paths) == 2
    assert "sees the past alone" in capsys.readouterr().err
    with pytest.raises(UserError, match="sees the past alone, which a teacher does not"):
        find_models(tiny_recipes.dmd(), str(folder), None)
    with pytest.raises(UserError, match="one that sees whole clips"):
        find_models(tiny_recipes.dmd(), str(family / "teacher"), str(folder))


def test_facts_that_cannot_be_meant_are_refused(folder):
    facts = json.loads((folder / "mogan.json").read_text())
    for wrong in ({"chunks": 3}, {"chunks": {"first": 0, "rest": 1}}, "frames", {}, HOW.facts() | {"window": 1}):
        (folder / "mogan.json").write_text(json.dumps(facts | {"causal": wrong}))
        with pytest.raises(UserError, match="causal must be chunks"):
            wan.defaults(folder)


def test_a_vace_is_refused(student):
    student.transformer.vace_blocks = []
    with pytest.raises(UserError, match="VACE"):
        make_causal(student.transformer)


# ------------------------------------------------------------------------------------------------- a run


def trained(config, family, cache, run):
    run.mkdir(exist_ok=True)
    student = tiny_recipes.start(config, family)
    (run / "config.json").write_text(json.dumps(config.as_json()))
    (run / "run.json").write_text(tiny_recipes.places(config, family, cache, student))
    run_training(build(config, family, cache, run), run)
    return run


WINDOWED = replace(tiny_recipes.self_forcing_windowed(), iterations=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        WINDOWED,
        replace(WINDOWED, lora=3),
        replace(tiny_recipes.self_forcing(), iterations=2),
    ],
    ids=["windowed", "adapters", "frame by frame"],
)
def test_a_run_goes_on_bit_for_bit(config, family, cache, tmp_path):
    whole = trained(config, family, cache, tmp_path / "whole")
    part = trained(replace(config, iterations=1), family, cache, tmp_path / "part")
    parts = build(config, family, cache, part)
    run_training(parts, part)
    found = [load_part(latest_checkpoint(run), "ema") for run in (whole, part)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert isinstance(parts.student, CausalDenoiser)
    assert type(parts.networks["fake_score"]) is Denoiser  # it sees whole clips, as the teacher does


def test_a_run_and_its_export_are_sampled_alike_and_taken_up(family, cache, tmp_path, capsys):
    config = replace(WINDOWED, iterations=1)
    run, out = trained(config, family, cache, tmp_path / "run"), tmp_path / "export"
    assert main(["export", str(run), "--out", str(out)]) == 0
    first, second = open_generator(str(run)), open_generator(str(out))
    assert first.causal == second.causal == config.causal
    assert first.steps_told() == second.steps_told()
    made = [sample_student(g.load().eval(), TEXT, (4, 4, 4, 4), g.sigmas, [0, 1]) for g in (first, second)]
    assert torch.equal(*made)
    card = (out / "README.md").read_text()
    assert "mogan sample --model PATH" in card
    assert "pipe(" not in card
    assert main(["export", str(run), "--out", str(tmp_path / "a.safetensors"), "--to", "lora"]) == 2
    assert "causal" in capsys.readouterr().err
    teacher = str(family / "teacher")
    assert find_models(config, teacher, str(out))[1] == out
    for other in (tiny_recipes.self_forcing(), tiny_recipes.dmd()):
        with pytest.raises(UserError, match="go on with the recipe that made it"):
            find_models(other, teacher, str(out))


@pytest.mark.parametrize(
    "change",
    [
        {"given": 1},
        {"boundary": 0.7},
        {"objectives": {"dmd": FlowMatchingConfig(shift=3.0)}, "plan": (Update(learns="student", by="dmd", batch=2),)},
        {"plan": (replace(tiny_recipes.self_forcing().plan[0], rollout=FewStep()),)},
    ],
    ids=["given", "two experts", "on whole clips", "another rollout"],
)
def test_configs_that_no_causal_student_can_be_trained_by_are_refused(change):
    with pytest.raises(ValueError, match="causal"):
        replace(tiny_recipes.self_forcing(), **change)


def test_two_experts_and_split_tokens_are_refused(two, cache):
    with pytest.raises(UserError, match="two experts"):
        assemble(
            tiny_recipes.self_forcing(),
            open_cache(cache),
            model=str(two),
            run=None,
            device="cpu",
        )
    alone = World(torch.device("cpu"))
    with pytest.raises(UserError, match="leave out --context-parallel"):
        check_processes(tiny_recipes.self_forcing(), replace(alone, sequence=object()))
    with pytest.raises(UserError, match="leave out --compile"):
        check_processes(replace(tiny_recipes.self_forcing(), compile=True), alone)


@pytest.mark.slow
def test_a_causal_roll_out_costs_what_it_computes():
    shapes, how = read_shapes("lab"), Causal(2, 3, Policy(window=4))
    found = chunk_calls(shapes, how, False, torch.float32)
    with fake():
        network = build_transformer(shapes).train()
        student, noise = CausalDenoiser(network), torch.empty(1, *shapes.latent)
        text = torch.empty(1, TEXT_TOKENS, shapes.transformer["text_dim"])

        def clip(sigmas):
            kind, last, draws = Chunked(how), len(sigmas) - 1, torch.Generator()
            return kind.make(student, noise, text, sigmas, draws, last, torch.is_grad_enabled()).sample_BCFHW

        once, twice, learns = (
            trace(network.parameters(), partial(clip, sigmas), backward=backward)
            for sigmas, backward in (((1.0,), False), ((1.0, 0.5), False), ((1.0,), True))
        )
    assert found[0].work.flops == pytest.approx(twice.work.flops - once.work.flops, rel=1e-6)
    assert found[1].work.flops == pytest.approx(once.work.flops, rel=1e-6)
    assert found[2].work.flops == pytest.approx(learns.work.flops, rel=1e-6)
    assert (found[1].peak, found[2].peak) == pytest.approx((once.peak, learns.peak), rel=0.1)
    assert found[0].work.flops < found[1].work.flops  # which makes the passes that keep, too
