"""Reward Forcing and MoGAN on a causal student: what they start from, what they change, and that windows and sinks travel."""

import json
import math
from dataclasses import replace

import pytest
import torch

import mogan.models.host as host
import tiny_recipes
from mogan.cli import main
from mogan.costs.calls import Tracer
from mogan.costs.causal import chunks
from mogan.costs.shapes import read_shapes
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.estimate.random_wan import random_wan
from mogan.models.causal_cache import Causal, Policy
from mogan.recipes import (
    mogan_causal_wan_1_3b,
    mogan_wan_1_3b,
    reward_forcing_lab,
    reward_forcing_wan_1_3b,
    self_forcing_wan_1_3b,
)
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.runs.generator import open_generator
from mogan.sampling.causal_rollout import Chunked
from mogan.sampling.rollout import roll_out
from mogan.sampling.samplers import sample_student
from mogan.training.assemble import assemble
from mogan.training.load import find_models
from mogan.training.loop import run_training
from mogan.training.steps import Position, complete, draw, rolled_out, step
from test_causal import TEXT, trained
from tiny_recipes import mogan, mogan_causal, reward_forcing, self_forcing


def build(config, family, cache, run=None, student=None):
    student = student or tiny_recipes.start(config, family)
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")


# ------------------------------------------------------------------------------------------------ where it begins


def test_a_student_that_sees_all_its_past_is_taken_up_by_one_that_sees_less_and_not_the_other_way_round(
    family, cache, tmp_path
):
    teacher, causal = str(family / "teacher"), str(family / "causal")
    assert find_models(reward_forcing(), teacher, causal)[1] == family / "causal"
    assert find_models(mogan_causal(), teacher, causal)[1] == family / "causal"
    twos = replace(reward_forcing(), rollout=Chunked(Causal(2, 2, Policy(window=4, sink=2))))
    with pytest.raises(UserError, match="go on with the recipe that made it"):
        find_models(twos, teacher, causal)  # chunks are another model
    run, out = trained(replace(reward_forcing(), iterations=1), family, cache, tmp_path / "run"), tmp_path / "windowed"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert find_models(reward_forcing(), teacher, str(out))[1] == out
    with pytest.raises(UserError, match="go on with the recipe that made it"):
        find_models(mogan_causal(), teacher, str(out))


def test_who_post_trains_a_causal_student_names_one(family):
    for config in (reward_forcing(), mogan_causal()):
        with pytest.raises(UserError, match=r"sees whole clips and .* post-trains a student that sees the past alone"):
            find_models(config, str(family / "teacher"), str(family / "student"))
        with pytest.raises(UserError, match="the student of the lab sees whole clips"):
            find_models(config, "lab", None)


def test_chunks_that_do_not_fit_a_window_are_refused_before_anything_is_made(family, cache):
    for how in (Causal(2, 2, Policy(window=2, sink=1)), Causal(3, 1, Policy(window=3, sink=2, decay=0.9))):
        with pytest.raises(UserError, match="clips of 4 latent frames: "):
            build(replace(self_forcing(), rollout=Chunked(how)), family, cache)


def test_a_window_and_a_sink_survive_run_export_and_import(family, cache, tmp_path):
    run, out, back = (tmp_path / name for name in ("run", "export", "import"))
    trained(replace(reward_forcing(), iterations=1), family, cache, run)
    assert main(["export", str(run), "--out", str(out)]) == 0
    sigmas = [str(sigma) for sigma in reward_forcing().sigmas]
    command = ["import", str(out / "transformer"), "--base", str(family / "teacher"), "--sigmas", *sigmas]
    said = ["--chunks", "1", "1", "--window", "3", "--sink", "1", "--sink-decay", "0.9", "--relative"]
    assert main([*command, *said, "--out", str(back)]) == 0
    sources = [open_generator(str(where)) for where in (run, out, back)]
    assert all(source.causal == reward_forcing_lab().causal for source in sources)

    def make(source):
        return sample_student(source.load().eval(), TEXT, (4, 8, 4, 4), source.sigmas, [0, 1])

    first, *others = map(make, sources)  # eight latents: five leave the window
    assert all(torch.equal(first, other) for other in others)
    for other in (Policy(window=3, sink=1), Policy(window=3, relative=True)):  # a static sink, none
        assert not torch.equal(first, make(replace(sources[0], causal=Causal(1, 1, other))))


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (["--window", "9"], "are of a causal student: give its --chunks, too"),
        (
            ["--chunks", "3", "3", "--window", "3", "--sink", "3"],
            "do not go together: a window of 3 frames has no room",
        ),
        (
            ["--chunks", "3", "3", "--window", "9", "--sink", "1", "--sink-decay", "0.9"],
            "frames leave the window at once",
        ),
        (["--chunks", "3", "3", "--sink", "3"], "a sink is of a window"),
        (["--chunks", "3", "3", "--sink-decay", "2"], "--sink-decay takes a number from 0 to 1, not 2"),
    ],
)
def test_windows_and_sinks_that_cannot_be_are_refused_in_one_sentence(said, answer, family, tmp_path, capsys):
    arguments = [
        "import",
        "no-file.pt",
        "--base",
        str(family / "teacher"),
        "--sigmas",
        "1",
        "--out",
        str(tmp_path / "a"),
    ]
    assert main([*arguments, *said]) == 2
    error = capsys.readouterr().err.strip()
    assert answer in error
    assert "\n" not in error


# ------------------------------------------------------------------------------------------------ what it is


def test_recipes_are_the_ones_they_are_made_of():
    ours, base, weights = reward_forcing_wan_1_3b(), self_forcing_wan_1_3b(), tiny_recipes.recipes.redmd_wan_1_3b()
    assert ours.objectives["dmd"].weights == weights.objectives["dmd"].weights
    assert replace(ours, recipe=base.recipe, rollout=base.rollout).changed("dmd", weights=None) == base
    policy = ours.causal.policy
    assert policy.seen(ours.causal.chunks(21))[-1] == (
        0,
        1,
        2,
        15,
        16,
        17,
    )  # of 21 latents the sink and the chunk before
    ours, base, start = mogan_causal_wan_1_3b(), mogan_wan_1_3b(), self_forcing_wan_1_3b()
    assert (ours.sigmas, ours.rollout) == (start.sigmas, start.rollout)
    assert ours.objectives == {"dmd": start.objectives["dmd"], "gan": base.objectives["gan"]}
    assert (ours.plan, ours.optimizers) == (base.plan, base.optimizers)


def test_with_equal_weights_reward_forcing_is_self_forcing_under_the_same_window(family, cache, tmp_path):
    ours = reward_forcing()
    weights = replace(ours.objectives["dmd"].weights, reward="test_redmd:brightness", standard=(0.0, 0.01), limit=100.0)
    ends = []
    for number, found in enumerate((None, replace(weights, beta=math.inf), weights)):
        (tmp_path / str(number)).mkdir()
        parts = build(replace(ours, iterations=1).changed("dmd", weights=found), family, cache, tmp_path / str(number))
        run_training(parts, tmp_path / str(number))
        ends.append(parts.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert not all(torch.equal(ends[0][k], ends[2][k]) for k in ends[0])


def test_in_one_chunk_mogan_on_a_causal_student_is_mogan_bit_for_bit(family, cache, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for part in (family / "causal").iterdir():
        (whole / part.name).symlink_to(part)
    facts = json.loads((whole / "mogan.json").read_text())
    facts["causal"]["chunks"] = {"first": 4, "rest": 4}
    (whole / "mogan.json").unlink()
    (whole / "mogan.json").write_text(json.dumps(facts))
    one = replace(mogan_causal(), rollout=Chunked(Causal(4, 4)))
    found = []
    for config, student in ((mogan(), None), (one, whole), (mogan_causal(), None)):
        parts = build(config, family, cache, student=student)
        found.append([step(parts, Position(0, 0, index, 0)) for index in range(len(config.plan))])
    same, other = ([r["loss"] for r in run] for run in found[1:])
    assert [r["loss"] for r in found[0]] == same
    assert same != other  # frame by frame it is another student


def test_the_discriminator_teaches_the_chunks_of_its_window_alone(family, cache):
    """Windows and chunks need not agree: a frame outside learns nothing, and none through what later chunks see of it."""
    config = mogan_causal()
    parts = build(config, family, cache)
    update = config.plan[2]
    where = Position(0, 0, 2, 0)
    batch = replace(complete(parts, update, draw(parts, where)), window_start=1)
    noise, text = torch.randn(2, *parts.latent_shape), batch.told(parts.device)
    gradients = []
    for kind in (Chunked(Causal(2, 1)), None):
        x = noise.clone().requires_grad_()
        if kind is None:  # a student that sees whole clips
            whole = open_generator(str(family / "student")).load()
            rollout = roll_out(whole, x, text, (1.0,), torch.Generator(), grad=True)
        else:
            rollout = kind.make(parts.student, x, text, (1.0,), torch.Generator(), 0, True)
        loss, _ = parts.objectives["gan"].losses["student"](rollout, batch, torch.Generator().manual_seed(0))
        gradients.append(torch.autograd.grad(loss, x)[0].abs().amax((0, 1, 3, 4)))
    causal, bidirectional = gradients
    assert (causal[:3] > 0).all()  # latents 1 and 2 are seen; 0 is of the chunk of 1
    assert causal[3] == 0
    assert (bidirectional > 0).all()


def test_what_waits_in_the_hosts_memory_changes_nothing(family, cache, monkeypatch):
    monkeypatch.setattr(host, "LEAST", 0)
    found = []
    for offload in (None, True):
        config = replace(mogan_causal(), checkpointing=bool(offload), offload=offload)
        parts, grads = build(config, family, cache), []
        for index, update in enumerate(config.plan):
            if update.learns == "student":
                learner = [p for p in parts.student.parameters() if p.requires_grad]
                optimizer = parts.optimizers[update.optimizer_name]
                monkeypatch.setattr(optimizer, "step", lambda g=grads, ps=learner: g.extend(p.grad.clone() for p in ps))
                step(parts, Position(0, 0, index, 0))
        found.append(grads)
    assert found[0]
    for plain, waited in zip(*found, strict=True):
        torch.testing.assert_close(waited, plain, rtol=1e-4, atol=1e-7)


def test_parts_of_a_batch_are_weighed_and_made_alike(family, cache):
    """Weights are of the whole batch; each part is made again, under its window, when it is judged."""
    config = reward_forcing()
    plan = (replace(config.plan[0], batch=4, accumulate=2), *config.plan[1:])
    parts = build(replace(config, plan=plan), family, cache)
    where, update = Position(0, 0, 0, 0), plan[0]
    batch = draw(parts, where)
    whole = rolled_out(parts, update, batch, where, grad=False).sample_BCFHW
    seen, objective = [], parts.objectives["dmd"]
    compare = objective.compare["student"]

    def compared(batch, made):
        seen.extend(rollout.sample_BCFHW for rollout in made)
        return compare(batch, made)

    def judged(rollout, piece, generator):
        seen.append(rollout.sample_BCFHW.detach())
        return rollout.sample_BCFHW.mean(), {}

    objective.compare["student"], objective.losses["student"] = compared, judged
    step(parts, where, batch)
    torch.testing.assert_close(torch.cat(seen[:2]), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(seen[2:]), whole, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ price and runs


@pytest.mark.slow
def test_weights_of_a_causal_student_cost_its_own_roll_out():
    """Not that of a student which sees whole clips: a pass more per chunk, over a shorter past."""
    tracer, ours = Tracer(read_shapes("lab"), False, torch.float32), reward_forcing_lab()
    block = ours.objectives["dmd"]
    bills = [b.price(ours, tracer).bills["student"] for b in (block, replace(block, weights=None))]
    more, made, _ = chunks(tracer, ours.causal)
    steps, judged, *_ = bills[0].calls
    assert (steps.work.flops, judged.work.flops) == (more.work.flops, made.work.flops)  # two steps, a mean
    assert bills[0].passes - bills[1].passes == 5 * 2 + 4


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, 3])
@pytest.mark.parametrize("recipe", [reward_forcing, mogan_causal, tiny_recipes.msm_causal])
def test_a_run_goes_on_bit_for_bit(recipe, lora, family, cache, tmp_path):
    config = replace(recipe(), iterations=2, lora=lora)
    whole = trained(config, family, cache, tmp_path / "whole")
    part = trained(replace(config, iterations=1), family, cache, tmp_path / "part")
    run_training(build(config, family, cache, part), part)
    for name in ("ema", "student", "fake_score"):
        found = [load_part(latest_checkpoint(run), name) for run in (whole, part)]
        assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["reward_forcing_wan", "mogan_causal_wan"])
def test_the_full_size_recipes_train_and_resume_at_wans_shapes(recipe, family, tmp_path, monkeypatch):
    from test_scale import LONG, NARROW, frames_seen, videos

    model, cache, run = (tmp_path / name for name in ("model", "cache", "run"))
    random_wan(model, layers=2, text_layers=1, clip=LONG, changes=NARROW)
    facts = json.loads((model / "mogan.json").read_text()) if (model / "mogan.json").exists() else {}
    student = tmp_path / "student"
    student.mkdir()
    for part in model.iterdir():
        (student / part.name).symlink_to(part)
    config = getattr(tiny_recipes, recipe)()
    (student / "mogan.json").unlink(missing_ok=True)
    told = {"sigmas": list(config.sigmas), "causal": replace(config.causal, policy=Policy()).facts()}
    (student / "mogan.json").write_text(json.dumps(facts | told))
    clips, seen = str(videos(tmp_path / "videos", 48)), frames_seen(monkeypatch)
    assert main(["prepare", clips, "--model", str(model), "--out", str(cache), "--flow", "dis"]) == 0
    train = ["train", f"tiny_recipes:{recipe}", "--model", str(model), "--student", str(student), "--data", str(cache)]
    assert main([*train, "--out", str(run), "--iterations", "1"]) == 0
    assert main([*train, "--out", str(run), "--iterations", "2"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0] * len(config.plan) + [1] * len(config.plan)
    assert set(seen) == {(), (0, 1, 2), (0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 7, 8)}  # the second chunk has left the window
