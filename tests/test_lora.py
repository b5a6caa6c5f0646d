import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

import tiny_recipes
from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.exchange.export import export
from mogan.models import wan
from mogan.models.denoiser import Denoiser
from mogan.models.lora import TARGETS, adapted, decompose, factors, hold_in, learned_state, load_learned, merge
from mogan.models.wan import load_transformer
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.runs.generator import open_generator
from mogan.training.assemble import assemble
from mogan.training.loop import resume, run_training
from mogan.training.steps import Position, step
from test_train import assert_same
from tiny_recipes import asd, dmd, flow_matching, mogan, mogan_causal, redmd, reward_forcing, shift, vdot

RANK = 3


def low_rank(config, **changes):
    return replace(config, lora=RANK, **changes)


def build(config, family, cache, run=None, student=None, device="cpu"):
    chosen = student or (tiny_recipes.start(config, family))
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=chosen, run=run, device=device)


def inputs(count=2):
    generator = torch.Generator().manual_seed(4)
    x, text = torch.randn(count, 4, 4, 4, 4, generator=generator), torch.randn(count, 5, 64, generator=generator)
    return x, torch.linspace(0.3, 0.9, count), text


def trained(config, family, cache, run, **more):
    """A short run on disk, as `mogan train` writes it."""
    import json
    from dataclasses import asdict

    run.mkdir(exist_ok=True)
    parts = build(config, family, cache, run, **more)
    (run / "config.json").write_text(json.dumps(asdict(config)))
    (run / "run.json").write_text(
        tiny_recipes.places(config, family, cache, more.get("student") or tiny_recipes.start(config, family))
    )
    run_training(parts, run)
    return parts


def test_networks_of_one_start_share_their_frozen_tensors_and_learn_adapters_alone(family, cache):
    parts = build(low_rank(dmd()), family, cache)
    teacher, fake = parts.objectives["dmd"].judge.teacher, parts.networks["fake_score"]
    shared = {id(p) for p in teacher.parameters()}
    for network in (parts.student, fake):
        frozen = {id(p) for p in network.parameters() if not p.requires_grad}
        assert frozen == shared
        learned = [n for n, p in network.named_parameters() if p.requires_grad]
        assert all(".lora_" in n for n in learned)
        assert len(learned) == 2 * 10 * 4  # A and B; 4 + 4 + 2 matrices in each of 4 blocks
        assert all(p.dtype == torch.float32 for p in network.parameters() if p.requires_grad)
    assert not {id(p) for p in parts.student.parameters() if p.requires_grad} & {id(p) for p in fake.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everyone_starts_as_the_base_bit_for_bit_and_the_teacher_stays_it(family, cache, dtype):
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    parts = build(low_rank(dmd(), precision=precision), family, cache)
    plain = Denoiser(load_transformer(family / "teacher").eval(), dtype)
    expected = plain(*inputs())
    teacher = parts.objectives["dmd"].judge.teacher
    for network in (teacher, parts.student, parts.networks["fake_score"]):
        assert torch.equal(network(*inputs()), expected)
    for index in range(len(parts.config.plan)):
        step(parts, Position(0, 0, index, 0))
    assert torch.equal(teacher(*inputs()), expected)
    for network in (parts.student, parts.networks["fake_score"]):
        assert not torch.equal(network(*inputs()), expected)


def test_matrices_held_in_bf16_give_the_bits_of_matrices_rounded_at_every_call(family):
    whole, held = load_transformer(family / "teacher").eval(), load_transformer(family / "teacher")
    hold_in(held, torch.bfloat16)
    assert held.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert held.blocks[0].scale_shift_table.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(Denoiser(whole, torch.bfloat16)(*inputs()), Denoiser(held, torch.bfloat16)(*inputs()))


@pytest.mark.parametrize("recipe", [dmd, mogan, flow_matching, redmd, shift, vdot, asd, reward_forcing, mogan_causal])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_update_moves_its_own_adapters_and_nothing_else(recipe, checkpointing, family, cache):
    config = low_rank(recipe(), checkpointing=checkpointing)
    parts = build(config, family, cache)
    for index, update in enumerate(config.plan):
        before = {n: [p.clone() for p in net.parameters()] for n, net in parts.networks.items()}
        step(parts, Position(0, 0, index, 0))
        for name, network in parts.networks.items():
            for old, (key, new) in zip(before[name], network.named_parameters(), strict=True):
                moves = name == update.learns and (name in ("critic", "discriminator", "reward") or "lora_" in key)
                assert moves or torch.equal(old, new), (update.label, name, key)
            moved = [not torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True)]
            assert any(moved) == (name == update.learns), (update.label, name)


def test_recomputed_activations_meet_the_adapters_they_were_computed_with(family, cache):
    """Between the student's forward and backward pass teacher and fake score are called; gradients must not notice."""
    gradients = []
    for checkpointing in (False, True):
        parts = build(low_rank(dmd(), checkpointing=checkpointing), family, cache)
        with torch.no_grad():  # different adapters, so that meeting the wrong ones would show
            for number, network in enumerate((parts.student, parts.networks["fake_score"])):
                torch.manual_seed(number)
                for p in network.parameters():
                    p.add_(0.3 * torch.randn_like(p)) if p.requires_grad else None
        learned = [p for p in parts.student.parameters() if p.requires_grad]
        parts.optimizers["student"].step = lambda learned=learned: gradients.append([p.grad.clone() for p in learned])
        step(parts, Position(0, 0, 0, 0))
    assert any(g.abs().max() > 0 for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_checkpoint_holds_adapters_and_the_discriminator(family, cache):
    parts = build(low_rank(mogan()), family, cache)
    state = parts.state()
    of = {part: {k.partition(".")[2] for k in state if k.startswith(f"{part}.")} for part in (*parts.networks, "ema")}
    assert all(of[part] and all(".lora_" in k for k in of[part]) for part in ("student", "fake_score", "ema"))
    heads = {k for k in of["discriminator"] if not k.startswith("transformer.")}
    assert {k.partition(".")[0] for k in heads} == {"heads", "final", "text_1LD"}
    assert of["discriminator"] - heads
    assert all(".lora_" in k for k in of["discriminator"] - heads)


def test_a_discriminators_trunk_shares_the_base_and_computes_penalties_in_fp32_on_it(family, cache):
    parts = build(low_rank(mogan(), precision="bf16"), family, cache)
    judge, teacher = parts.networks["discriminator"], parts.objectives["dmd"].judge.teacher
    shared = {id(p) for p in teacher.parameters()}
    assert {id(p) for p in judge.transformer.parameters() if not p.requires_grad} <= shared
    seen, held = torch.randn(1, 4, 2, 4, 4), judge.transformer.blocks[0].ffn.net[2].weight
    assert held.dtype == torch.bfloat16
    found = judge(seen, dtype=torch.float32)
    for module in judge.transformer.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.float()
    assert torch.equal(judge(seen, dtype=torch.float32), found)
    assert not torch.equal(judge(seen), found)


def test_a_resumed_run_is_the_run_that_was_never_stopped(family, cache, tmp_path):
    whole = trained(low_rank(mogan(), iterations=2), family, cache, tmp_path / "whole")
    trained(low_rank(mogan(), iterations=1), family, cache, tmp_path / "parts")
    resumed = trained(low_rank(mogan(), iterations=2), family, cache, tmp_path / "parts")
    assert_same(whole.state(), resumed.state())


def test_the_average_is_of_adapters_and_comes_and_goes(family, cache):
    parts = build(low_rank(dmd()), family, cache)
    step(parts, Position(0, 0, 0, 0))
    live = parts.student(*inputs())
    with parts.average.in_place():
        averaged = parts.student(*inputs())
    assert not torch.equal(live, averaged)
    assert torch.equal(parts.student(*inputs()), live)


def test_a_run_with_adapters_is_a_model_and_a_start(family, cache, tmp_path):
    parts = trained(low_rank(dmd(), iterations=2), family, cache, tmp_path / "dmd")
    source = open_generator(str(tmp_path / "dmd"))
    assert source.lora == RANK
    with parts.average.in_place(), torch.no_grad():
        torch.testing.assert_close(source.load().eval()(*inputs()), parts.student(*inputs()), atol=1e-5, rtol=1e-5)

    then = build(low_rank(mogan()), family, cache, student=str(tmp_path / "dmd"))
    newest = latest_checkpoint(tmp_path / "dmd")
    assert_same(then.average.weights, load_part(newest, "ema"))
    assert_same(learned_state(then.networks["fake_score"]), load_part(newest, "fake_score"))
    shared = {id(p) for p in then.objectives["dmd"].judge.teacher.parameters()}
    assert {id(p) for p in then.student.parameters() if not p.requires_grad} == shared
    with pytest.raises(UserError, match="rank 3: give --lora 3"):
        build(replace(mogan(), lora=4), family, cache, student=str(tmp_path / "dmd"))
    with pytest.raises(UserError, match="mogan export"):
        build(mogan(), family, cache, student=str(tmp_path / "dmd"))


def test_a_student_with_weights_of_its_own_is_a_second_frozen_base(family, cache):
    parts = build(low_rank(mogan()), family, cache)
    shared = {id(p) for p in parts.objectives["dmd"].judge.teacher.parameters()}
    assert not {id(p) for p in parts.student.parameters()} & shared
    assert {id(p) for p in parts.networks["fake_score"].parameters() if not p.requires_grad} == shared


def test_adapters_of_another_rank_do_not_load(family):
    base = hold_in(load_transformer(family / "teacher"), torch.float32)
    one, other = adapted(base, 2, 0), adapted(base, 3, 0)
    with pytest.raises(UserError, match="--lora"):
        load_learned(one, learned_state(other))
    with pytest.raises(UserError, match="--lora"):
        load_learned(one, base.state_dict())


def test_adapters_larger_than_the_matrices_are_refused(family):
    base = hold_in(load_transformer(family / "teacher"), torch.float32)
    width = base.config.num_attention_heads * base.config.attention_head_dim
    adapted(base, width, 0)
    with pytest.raises(UserError, match=f"give --lora {width} or less"):
        adapted(base, width + 1, 0)


def test_merging_gives_what_the_adapters_give(family):
    base = hold_in(load_transformer(family / "teacher"), torch.float32)
    tree = adapted(base, RANK, 0)
    with torch.no_grad():
        for p in tree.parameters():
            p.add_(0.2 * torch.randn_like(p)) if p.requires_grad else None
    merged = load_transformer(family / "teacher").eval()
    merge(merged, factors(learned_state(tree)))
    with torch.no_grad():
        torch.testing.assert_close(Denoiser(merged)(*inputs()), Denoiser(tree.eval())(*inputs()), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(Denoiser(merged)(*inputs()), Denoiser(base)(*inputs()), atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_the_best_factors_of_a_rank_lose_the_small_singular_values_and_no_more(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values, last = torch.linalg.svdvals(matrix.double()), float("inf")
    for rank in range(1, min(rows, columns) + 1):
        a, b = decompose(matrix, rank)
        assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
        error = (matrix - b @ a).norm().item()
        assert error == pytest.approx(values[rank:].norm().item(), abs=1e-5 * values.norm().item())
        assert error <= last + 1e-6
        last = error
    assert last <= 1e-5 * matrix.norm()


def test_no_text_encoder_outlives_the_assembly_and_none_is_loaded_twice(family, cache, monkeypatch):
    seen = []
    original = UMT5EncoderModel.from_pretrained.__func__

    def watched(cls, *args, **kwargs):
        model = original(cls, *args, **kwargs)
        seen.append(weakref.ref(model[0] if isinstance(model, tuple) else model))
        return model

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", classmethod(watched))
    config = low_rank(dmd(), negative_prompt=f"not in the cache {id(seen)}")
    parts = build(config, family, cache)
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None
    build(config, family, cache)
    assert len(seen) == 1
    assert parts is not None


def test_targets_name_every_matrix_of_every_block(family):
    transformer = load_transformer(family / "teacher")
    names = {n for n, m in transformer.blocks.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(any(n.endswith(f".{t}") for t in TARGETS) for n in names)


@pytest.mark.parametrize("has_own", [False, True])
def test_a_fake_score_is_exported_over_what_its_adapters_were_learnt_over(has_own, family, cache, tmp_path):
    student, model = tmp_path / "student", family / "teacher"
    shutil.copytree(family / "student", student)
    if has_own:
        shutil.copytree(student / "transformer", student / "fake_score")
    for part, factor in (("transformer", 0.9), ("fake_score", 1.1)):  # neither is the teacher
        for file in (student / part).glob("*.safetensors"):
            save_file({k: v * factor for k, v in load_file(file).items()}, file, {"format": "pt"})
    words = ["train", "tiny_recipes:mogan", "--model", str(model), "--student", str(student), "--data", str(cache)]
    run = tmp_path / "run"
    assert main([*words, "--out", str(run), "--lora", "2", "--iterations", "1", "--device", "cpu"]) == 0
    export(run, out=tmp_path / "export", fake_score=True)
    config = replace(tiny_recipes.mogan(), lora=2)
    parts = assemble(config, open_cache(cache), model=str(model), student=str(student), run=run, device="cpu")
    resume(parts, run)
    clip = torch.randn(1, *parts.latent_shape, generator=torch.Generator().manual_seed(1))
    seen = (clip, torch.tensor([0.6]), torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        learnt = parts.networks["fake_score"].velocity(*seen)
        exported = Denoiser(wan.load_transformer(tmp_path / "export", "fake_score")).velocity(*seen)
    torch.testing.assert_close(exported, learnt, atol=1e-4, rtol=1e-4)
