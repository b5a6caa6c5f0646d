"""LLIA: one set of weights for chunks of several sizes, given its first frame; consistency with and without a solver's step."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_recipes
from mogan.cli import main
from mogan.config import Update
from mogan.costs.calls import Tracer
from mogan.costs.causal import forced, one_of
from mogan.costs.shapes import read_shapes
from mogan.costs.trace import Call, Work
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.data.choice import entries
from mogan.data.listing import scan
from mogan.errors import UserError
from mogan.models.attention import stack_text
from mogan.models.causal import CausalDenoiser
from mogan.models.causal_cache import Causal, Policy, read_causal
from mogan.models.denoiser import Denoiser
from mogan.models.lora import ROWS as LEARNT_ROWS
from mogan.models.states import (
    attach_states,
    detach_states,
    read_states,
    state_names,
    state_rows,
    told,
    write_states,
)
from mogan.objectives.consistency import Consistency, ConsistencyConfig, labels_of
from mogan.recipes import find_recipe
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import Chunked, stream_causal
from mogan.sampling.rollout import normal, roll_out
from mogan.training.assemble import assemble
from mogan.training.load import find_models
from mogan.training.loop import run_training
from mogan.world.states import make_state_scene
from test_causal import loaded, trained
from test_causal_start import OneClip, Pairs
from test_train import build

SIZES = Causal(1, 1, sizes=(1, 2, 4))
SIGMAS = (1.0, 0.6)
CLIPS = torch.randn(2, 4, 5, 4, 4, generator=torch.Generator().manual_seed(1))
TEXT = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
BATCH = Batch(["a", "b"], ["a", "b"], TEXT, CLIPS)
SETTINGS = ConsistencyConfig(steps=5, shift=3.0, guidance=None, decay=0.75, warm_up=2)


@pytest.fixture(scope="module")
def student(family):
    return CausalDenoiser(loaded(family), how=SIZES)


# ------------------------------------------------------------------------------------------------- sizes


def test_sizes_are_part_of_a_student_and_each_is_one_of_its_ways():
    assert [one.chunks(5) for one in SIZES.variants] == [(1, 1, 1, 1, 1), (1, 2, 2), (1, 4)]
    assert Causal(1, 2).variants == (Causal(1, 2),)
    assert read_causal(json.loads(json.dumps(SIZES.facts()))) == SIZES
    assert "sizes" not in Causal(1, 2).facts()
    assert (SIZES.fixed, SIZES.layout) == (Causal(1, 1), Causal(1, 1))
    for wrong in ((2, 4), (1, 4, 2), (0, 1), (1, 1)):
        with pytest.raises(ValueError, match="sizes of chunks rise"):
            Causal(1, 1, sizes=wrong)


def test_one_way_is_drawn_for_a_batch_each_as_often_and_warm_up_is_an_update_of_its_own(student):
    kind, generator = Chunked(SIZES), torch.Generator().manual_seed(0)
    places = [kind.draw(SIGMAS, generator) for _ in range(600)]
    assert sorted(set(places)) == list(range(6))
    assert all(60 < places.count(place) < 140 for place in range(6))
    noise, text = normal(CLIPS.shape, generator, "cpu"), stack_text(TEXT)
    for place in range(6):
        one, step = Chunked(SIZES.variants[place // 2]), place % 2
        made, want = (
            k.make(student, noise, text, SIGMAS, torch.Generator().manual_seed(4), p, False).sample_BCFHW
            for k, p in ((kind, place), (one, step))
        )
        assert torch.equal(made, want)
    config = replace(tiny_recipes.self_forcing(), rollout=kind)
    warm = Update(learns="student", by="dmd", batch=2, stop=1, rollout=Chunked(SIZES.fixed))
    assert len(replace(config, plan=(warm, replace(config.plan[0], start=1), config.plan[1])).plan) == 3
    with pytest.raises(ValueError, match="in the same way"):
        replace(config, plan=(replace(warm, rollout=Chunked(Causal(2, 2))), *config.plan))


def test_a_clip_in_one_chunk_is_the_bidirectional_samplers(student, family):
    student.how, text = Causal(5, 5), stack_text(TEXT)
    made = torch.cat(list(stream_causal(student, text, CLIPS.shape[1:], SIGMAS, [3, 4])), 2)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with torch.no_grad():
        want = roll_out(
            Denoiser(loaded(family)), normal(CLIPS.shape, generators, "cpu"), text, SIGMAS, generators
        ).sample_BCFHW
    assert torch.equal(made, want)


# ------------------------------------------------------------------------------------------------- consistency


def test_without_a_teacher_the_next_level_has_the_same_noise_and_given_frames_do_not_count(student, family):
    student.how = SIZES
    target = CausalDenoiser(loaded(family))
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.01)
    objective = Consistency(student, target, None, torch.zeros(1, 2, 64), SIZES, SETTINGS, given=1, seed=5)
    sizes = {objective.prepare(BATCH, iteration=i, generator=[], most=2).more.get("size", [None])[0] for i in range(2)}
    assert sizes == {None}  # the warm-up
    drawn = [objective.prepare(BATCH, iteration=i, generator=[], most=2).more["size"] for i in range(2, 80)]
    assert {tuple(one) for one in drawn} == {(n, n) for n in (1, 2, 4)}
    batch = replace(BATCH, more={"size": [2, 2]})
    with torch.no_grad():  # prepare has moved it
        for p, q in zip(target.parameters(), student.parameters(), strict=True):
            p.copy_(1.01 * q)
    generator = torch.Generator().manual_seed(6)
    step = (torch.rand(2, 3, generator=generator) * 5).long()  # chunks of 1, 2, 2
    noise = torch.randn(CLIPS.shape, generator=generator)
    grid = torch.tensor([1.0, 12 / 13, 9 / 11, 2 / 3, 3 / 7, 0.0])
    here, there = (grid[step + k].repeat_interleave(torch.tensor([1, 2, 2]), 1) for k in (0, 1))
    assert 4 in step  # one chunk ends at 0
    framed = [s[:, None, :, None, None] for s in (here, there)]
    x, moved = ((1 - s) * CLIPS + s * noise for s in framed)
    text = stack_text(TEXT)
    with torch.no_grad():
        v = student.teacher_forced(CLIPS, x, here, text, (1, 2, 2))
        w = target.teacher_forced(CLIPS, moved, there, text, (1, 2, 2))
    gap = (x - framed[0] * v) - (moved - framed[1] * w)
    loss, _ = objective.student_loss(None, batch, torch.Generator().manual_seed(6))
    assert float(loss.detach()) == pytest.approx(float(gap[:, :, 1:].square().mean()), rel=1e-5)
    assert abs(float(gap.square().mean()) / float(loss.detach()) - 1) > 1e-3


def test_the_exact_model_of_one_clip_is_consistent_without_a_solver_too():
    for student, wrong in ((OneClip(CLIPS[:1]), False), (OneClip(CLIPS[1:]), True)):
        target = OneClip(CLIPS[:1])
        one = replace(BATCH, latent_BCFHW=CLIPS[:1].repeat(2, 1, 1, 1, 1))
        objective = Consistency(student, target, None, torch.zeros(1, 2, 64), SIZES.fixed, SETTINGS)
        loss = float(objective.student_loss(None, one, torch.Generator().manual_seed(0))[0])
        assert (loss > 0.01) if wrong else (loss < 1e-10), loss


def test_the_solvers_step_is_the_mean_of_the_steps_with_the_same_noise():
    """Two frames, jointly Gaussian: of many clips and noises the two ends agree on average; single ones do not."""
    r, s, t = 0.8, 0.75, 0.5
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(200_000, generator=generator)
    second = r * first + (1 - r * r) ** 0.5 * torch.randn(len(first), generator=generator)
    noise = torch.randn(len(first), generator=generator)
    x = torch.stack([(1 - s) * z + s * noise for z in (first, second)], 1).view(-1, 1, 2, 1, 1)
    exact = Pairs(r, False)
    past = torch.stack([first, second], 1).view(-1, 1, 2, 1, 1)
    level = torch.full((len(first), 2), s)
    velocity = exact.teacher_forced(past, x, level, None, (1, 1), Policy(), 0.0)[:, 0, 1, 0, 0]
    solver = x[:, 0, 1, 0, 0] + (t - s) * velocity
    same = (1 - t) * second + t * noise
    near = (first.abs() < 0.2) & ((x[:, 0, 1, 0, 0] - 0.3).abs() < 0.2)
    assert float((solver - same)[near].mean()) == pytest.approx(0, abs=0.02)
    assert float((solver - same)[near].std()) > 0.05


# ------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("rank", [None, 2])
def test_it_trains_from_a_causal_student_resumes_and_is_exported_with_its_sizes(rank, family, cache, tmp_path, capsys):
    config = replace(tiny_recipes.llia(), iterations=2, lora=rank)
    run = trained(config, family, cache, tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    source = open_generator(str(tmp_path / "export"))
    assert source.causal == config.causal == open_generator(str(run)).causal
    assert source.states == open_generator(str(run)).states == ("idle", "listening", "speaking")
    loaded_ones = [g.load() for g in (source, open_generator(str(run)))]
    text = stack_text([told(t, "idle", source.states) for t in TEXT])
    made = [
        torch.cat(list(stream_causal(n, text, (4, 4, 4, 4), SIGMAS, [0, 1], CLIPS[:, :, :1])), 2) for n in loaded_ones
    ]
    assert torch.equal(*made)
    assert torch.equal(made[0][:, :, :1], CLIPS[:, :, :1])
    rows = read_states(tmp_path / "export", 64)
    assert all(torch.equal(a, rows[n]) for n, a in detach_states(loaded_ones[1].transformer).items())
    assert "states.safetensors" in (tmp_path / "export" / "README.md").read_text()
    (tmp_path / "export" / "states.safetensors").unlink()
    assert open_generator(str(tmp_path / "export")).states == ()
    open_generator(str(tmp_path / "export")).load()  # stock weights
    card = (tmp_path / "export" / "README.md").read_text()
    assert "then 1 or 2 at a time" in card
    teacher = str(family / "teacher")
    other = replace(config, rollout=Chunked(Causal(2, 2, sizes=(1, 2))), given=0)
    assert find_models(other, teacher, str(family / "causal"))[1] == family / "causal"  # chunks of any size
    with pytest.raises(UserError, match="go on with the recipe"):
        find_models(tiny_recipes.dmd(), teacher, str(tmp_path / "export"))


def test_what_does_not_go_together_is_refused():
    config = tiny_recipes.llia()
    with pytest.raises(ValueError, match="given 1 or 0"):
        replace(config, given=2)
    with pytest.raises(ValueError, match="leave out given"):
        replace(tiny_recipes.self_forcing(), given=1)
    with pytest.raises(ValueError, match="warm_up comes before"):
        replace(config, rollout=Chunked(Causal(1, 1)))


# ------------------------------------------------------------------------------------------------- states

ROWS = {name: torch.randn(64, generator=torch.Generator().manual_seed(k)) for k, name in enumerate(("b", "a", "c"))}
NAMES = ("a", "b", "c")


def test_a_state_is_one_more_row_of_text_and_none_is_the_stock_network(family):
    plain, knows = loaded(family), attach_states(loaded(family), ROWS)
    assert (state_names(plain), state_names(knows)) == ((), NAMES)
    x, time = torch.randn(2, 4, 2, 4, 4), torch.tensor([500.0, 900.0])
    told_ones = stack_text([told(TEXT[0], "b", NAMES), told(TEXT[1], None, NAMES)])
    assert told_ones.shape == (2, 6, 67)
    want = stack_text([torch.cat([TEXT[0], ROWS["b"][None]]), TEXT[1]])
    with torch.no_grad():
        made, stock = (n(x, time, t, return_dict=False)[0] for n, t in ((knows, told_ones), (plain, want)))
        assert torch.allclose(made, stock, atol=1e-6)
        assert torch.equal(knows(x, time, want, return_dict=False)[0], stock)  # who is told nothing is stock
        other = knows(x, time, stack_text([told(t, "a", NAMES) for t in TEXT]), return_dict=False)[0]
    assert not torch.allclose(other, stock, atol=1e-3)
    assert told(torch.zeros(512, 64), "c", NAMES).shape == (512, 67)  # the row has its place in the longest text
    assert told(TEXT[0], None, ()) is TEXT[0]
    knows(x, time, told_ones, return_dict=False)[0].square().mean().backward()
    moved = knows.condition_embedder.text_embedder.states.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, True, False]
    rows = detach_states(knows)
    assert all(torch.equal(rows[name], ROWS[name]) for name in NAMES)
    assert knows.state_dict().keys() == plain.state_dict().keys()


def test_files_of_states_are_read_or_refused(tmp_path):
    assert read_states(tmp_path) == {}
    write_states(tmp_path, ROWS)
    assert all(torch.equal(row, ROWS[name]) for name, row in read_states(tmp_path, 64).items())
    with pytest.raises(UserError, match="another model's"):
        read_states(tmp_path, 32)
    (tmp_path / "states.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        read_states(tmp_path)


def test_chunks_that_begin_before_their_state_are_not_asked_for_and_labels_are_dropped(student):
    labels = {"a": ("listening", 0), "b": ("idle", 2)}
    student.how = SIZES
    names = ("idle", "listening")
    objective = Consistency(student, student, None, torch.zeros(1, 2, 66), SIZES, SETTINGS, 1, 0, names, labels)
    asked = {one.rest: objective._asked(BATCH, one, 5).tolist() for one in SIZES.variants}
    assert asked == {
        1: [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
        2: [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]],
        4: [[0, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
    }
    generator, kept = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        text = objective._text(BATCH, generator)
        kept += int(text[0, 3, 65]) + int(text[1, 5, 64])
        assert text[..., 64:].sum() == text[0, 3, 65] + text[1, 5, 64]
    assert 330 < kept < 385


def test_the_loss_is_the_mean_over_clips_of_the_frames_that_are_asked_for():
    labels, names = {"a": ("listening", 0), "b": ("idle", 2)}, ("idle", "listening")
    one = replace(BATCH, latent_BCFHW=CLIPS[1:].repeat(2, 1, 1, 1, 1))
    exact = OneClip(CLIPS[1:])  # what is meant is the clip at all levels; the student finds the other one
    objective = Consistency(
        OneClip(CLIPS[:1]), exact, None, torch.zeros(1, 2, 66), Causal(1, 1), SETTINGS, 1, 0, names, labels
    )
    loss = float(objective.student_loss(None, one, torch.Generator().manual_seed(0))[0])
    gap_F = (CLIPS[0] - CLIPS[1]).square().mean((0, 2, 3))
    assert loss == pytest.approx(float(gap_F[1:].mean() + gap_F[2:].mean()) / 2, rel=1e-4)


def test_a_state_holds_from_the_first_latent_frame_that_is_wholly_in_it(cache):
    opened = open_cache(cache)
    fps, entry = opened.facts["fps"], opened.entries[0]
    # latent frame k > 0 is made of pictures 4 k - 3 to 4 k
    for picture, latent in ((0, 0), (1, 1), (2, 2), (4, 2), (5, 2), (6, 3), (9, 3)):
        entry["state_from"] = picture / fps
        assert labels_of(opened, ("idle", "listening", "speaking"))[entry["id"]] == (entry["state"], latent)


def test_clips_without_states_or_with_others_are_refused(cache):
    found = labels_of(open_cache(cache), ("idle", "listening", "speaking"))
    assert [found[f"clip{k}"] for k in range(3)] == [("idle", 0), ("listening", 1), ("speaking", 0)]
    other = open_cache(cache)
    assert labels_of(other, ()) == {}
    with pytest.raises(UserError, match="is in the state listening"):
        labels_of(other, ("idle", "speaking"))
    for entry in other.entries:
        entry.pop("state")
    with pytest.raises(UserError, match="no clip of"):
        labels_of(other, ("idle",))
    with pytest.raises(ValueError, match="at least one"):
        replace(tiny_recipes.llia(), states={})


def test_scenes_take_up_their_state_where_they_say_and_captions_do_not_tell():
    seen = set()
    for index in range(40):
        scene, state, since = make_state_scene(3, index)
        (sprite,) = scene.sprites
        moved = np.abs(np.diff(sprite.centres_F2, axis=0)).sum(1) > 0
        turned = np.abs(np.diff(sprite.angles_F)) > 0
        assert moved[since:].all() == (state == "speaking")
        assert turned[since:].all() == (state == "listening")
        before = ("speaking" if moved[0] else "listening" if turned[0] else "idle") if since > 1 else None
        assert before != state or since == 0
        assert scene.caption == f"a {sprite.colour} {sprite.shape}"
        r = sprite.radius
        assert (sprite.centres_F2 >= r).all()
        assert (sprite.centres_F2 <= 63 - r).all()
        seen.add((state, since > 0))
    assert len(seen) == 6


def test_a_list_says_states_and_a_cache_keeps_them(tmp_path):
    rows = [
        {"file_name": "a.mp4", "caption": "x", "state": " idle ", "state_from": 0.5},
        {"file_name": "b.mp4", "caption": "y"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    first, second = scan(tmp_path)
    assert (first.state, first.state_from, second.state) == ("idle", 0.5, None)
    clips = [{"start": k, "start_s": k / 16, "motion": 0.0, "repeats": 0} for k in (0, 16)]
    kept = entries([first, second], [{"sha": "0", "reader": 2, "clips": clips}] * 2)
    assert [(e.get("state"), e.get("state_from")) for e in kept] == [
        ("idle", 0.5),
        ("idle", 0.0),
        (None, None),
        (None, None),
    ]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0] | {"state_from": "soon"}))
    with pytest.raises(UserError, match="number of seconds"):
        scan(tmp_path)


# ------------------------------------------------------------------------------------------------- cost, resuming


def test_chunks_of_any_size_cost_their_mean_and_need_the_most_memory():
    works = [Work(Counter({(flops, 0.0, "bf16"): 1})) for flops in (100.0, 40.0)]
    mean = one_of([Call(works[0], 1.0, 5.0), Call(works[1], 2.0, 4.0, copies=3.0)])
    assert (mean.work.flops, mean.held, mean.peak, mean.copies) == (70.0, 2.0, 5.0, 3.0)
    assert one_of([mean]) is mean


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llia_lab", "llia_wan_1_3b"])
def test_a_recipe_has_a_price_and_a_teachers_step_costs_more(recipe, capsys):
    config, shapes = find_recipe(recipe), read_shapes("lab" if recipe == "llia_lab" else "wan2.1-t2v-1.3b")
    tracer = Tracer(shapes, config.checkpointing, torch.float32)
    plain, guided = (replace(config.objectives["consistency"], guidance=g).price(config, tracer) for g in (None, 3.0))
    assert [k.name for k in plain.kept] == ["target"]
    assert [k.name for k in guided.kept] == ["teacher", "target"]
    flops = [sum(call.work.flops for call in p.bills["student"].calls) for p in (plain, guided)]
    forward = forced(tracer, config.causal)[0].work.flops
    assert flops[1] - flops[0] == pytest.approx(2 * forward)
    each = [forced(tracer, one)[0].work.flops for one in config.causal.variants]
    assert forward == pytest.approx(sum(each) / 3)
    assert each[0] < each[1] < each[2]  # a larger chunk sees more of its own


def test_rows_of_states_learn_beside_adapters_and_those_of_a_start_go_on(family, cache, tmp_path):
    config = replace(tiny_recipes.llia(), iterations=2, lora=2)
    network = build(config, family, cache).networks["student"]
    others = [p for n, p in network.named_parameters() if p.requires_grad and ".lora_" not in n]
    (began,) = (p.detach().clone() for p in others)
    assert began.shape == (3, 64)
    run = trained(config, family, cache, tmp_path / "run")
    (rows,) = (t for n, t in load_part(latest_checkpoint(run), "student").items() if n.endswith(LEARNT_ROWS))
    assert not torch.equal(rows, began)
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    kept, teacher = read_states(tmp_path / "export", 64), str(family / "teacher")
    begin = {"model": teacher, "student": str(tmp_path / "export")}
    more = assemble(config, open_cache(cache), run=None, device="cpu", **begin)
    student = more.networks["student"].transformer
    assert all(torch.equal(row, kept[name]) for name, row in state_rows(student).items())
    own = student.condition_embedder.text_embedder.states
    assert own.requires_grad
    (target,) = (t for n, t in more.state().items() if n.startswith("consistency_state") and n.endswith(LEARNT_ROWS))
    assert target.data_ptr() != own.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_goes_on_bit_for_bit_with_its_states_and_sizes(rank, family, cache, tmp_path):
    config = replace(tiny_recipes.llia(), lora=rank)
    whole = trained(config, family, cache, tmp_path / "whole")
    part = trained(replace(config, iterations=1), family, cache, tmp_path / "part")
    run_training(build(config, family, cache, part), part)
    for name in ("ema", "consistency_state"):
        found = [load_part(latest_checkpoint(run), name) for run in (whole, part)]
        assert found[0].keys() == found[1].keys()
        assert any("states" in key for key in found[0])
        assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_an_update_costs_the_students_training_and_the_targets_look():
    from test_estimate import price

    config = find_recipe("llia_wan_1_3b")
    (student,) = price(config).steps
    assert student.flops == pytest.approx(64 * (1120e12 + 280e12))
    (guided,) = price(config.changed("consistency", guidance=3.0)).steps
    assert guided.flops == pytest.approx(64 * (1120e12 + 280e12 + 2 * 280e12))
