import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_recipes
from mogan import recipes
from mogan.config import Optimizer, Update
from mogan.data.cache import open_cache
from mogan.distributed import ONE
from mogan.errors import UserError
from mogan.recipes import ABLATIONS, ablate
from mogan.runs.checkpoint import (
    check_same_run,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stored,
)
from mogan.study.jobs import _stopped_by_sigterm
from mogan.training import loop
from mogan.training.assemble import assemble, filled
from mogan.training.loop import run_training
from mogan.training.steps import Position, complete, draw, learn, read, split, step
from mogan.training.train import _fitted, _require_shared
from tiny_recipes import dmd, flow_matching, mogan, motion_score, msm, redmd, sft_i2v, shift, surrogate

RECIPES = {
    "mogan": mogan,
    "accvideo": tiny_recipes.accvideo,
    "dmd": dmd,
    "flow_matching": flow_matching,
    "msm": msm,
    "redmd": redmd,
    "motion_score": motion_score,
    "sft_i2v": sft_i2v,
    "vace": tiny_recipes.vace,
    "shift": shift,
    "surrogate": surrogate,
    "phased": tiny_recipes.phased,
    "vdot": tiny_recipes.vdot,
    "asd": tiny_recipes.asd,
    "causal_teacher": tiny_recipes.causal_teacher,
    "causal_cd": tiny_recipes.causal_cd,
    "causal_ode": tiny_recipes.causal_ode,
    "llia": tiny_recipes.llia,
    "efficient_vdit_mcd": tiny_recipes.efficient_vdit_mcd,
    "efficient_vdit_kd": tiny_recipes.efficient_vdit_kd,
    "self_forcing_windowed": tiny_recipes.self_forcing_windowed,
    "reward_forcing": tiny_recipes.reward_forcing,
    "mogan_causal": tiny_recipes.mogan_causal,
    "msm_causal": tiny_recipes.msm_causal,
    "mogan_i2v": tiny_recipes.mogan_i2v,
    **{a: (lambda a=a: ablate(mogan, a)) for a in ABLATIONS},
}


def build(config, family, cache, run=None):
    student = tiny_recipes.start(config, family)
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")


def weights(parts):
    return {name: [p.clone() for p in network.parameters()] for name, network in parts.networks.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_update_moves_its_own_network_and_no_other(recipe, family, cache, paths):
    config = RECIPES[recipe]()
    parts = build(config, family, tiny_recipes.data(config, cache, paths))
    frozen = {
        "vae": parts.vae,
        "flow": parts.flow,
        "dmd": parts.objectives["dmd"].judge.teacher if "dmd" in parts.objectives else None,
    }
    made = []
    for index, update in enumerate(config.plan):
        before, where = weights(parts), Position(0, 0, index, 0)
        learnt = learn(parts, where, complete(parts, update, draw(parts, where)), made)
        read(parts, [(where, learnt.numbers)])
        made = learnt.rollouts if update.learns == "student" else made
        for name, network in parts.networks.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True))
            assert moved == (name == update.learns), (update.label, name)
        for name, network in frozen.items():
            if network is not None:
                assert all(p.grad is None and not p.requires_grad for p in network.parameters()), name
        for name, network in parts.networks.items():
            if name != update.learns:
                others = [u for u in config.plan[:index] if u.learns == name]
                if not others:
                    assert all(p.grad is None for p in network.parameters()), (update.label, name)


def test_the_tests_above_make_every_update_that_a_plan_may_hold():
    configs = [recipe() for recipe in RECIPES.values()]
    made = {(u.learns, judge) for config in configs for u in config.plan for judge in u.judges}
    assert made == {
        (learns, name) for config in configs for name in config.objectives for learns in config.terms(name).lessons
    }
    assert {type(b) for c in configs for b in c.objectives.values()} == {
        type(b) for recipe in recipes.RECIPES.values() for b in recipe().objectives.values()
    }


@pytest.mark.parametrize(
    ("learns", "by", "said"),
    [
        ("discriminator", "dmd", "by dmd learn student and fake_score, not 'discriminator'"),
        ("fake_score", "gan", "by gan learn student and discriminator, not 'fake_score'"),
        ("teacher", "dmd", "not 'teacher'"),
        ("student", "seed", "no objective named 'seed'; it has dmd, gan, surrogate"),
        ("student", "ema", "no objective named 'ema'"),
        ("student", "given+ema", "no objective named 'given'"),
        ("student", "", "no objective named ''"),
        ("student", "dmd+", "no objective named ''"),
        ("student", "dmd+dmd", "by each of them once"),
        ("discriminator", "gan+surrogate", "only the student learns by several"),
        ("student", "dmd+flow_matching", "the config has no objective named 'flow_matching'"),
        ("student", "shift", "the config has no objective named 'shift'"),
    ],
)
def test_a_plan_with_an_update_that_no_objective_offers_is_refused(learns, by, said):
    config = surrogate()
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(
            config,
            plan=(*config.plan, Update(learns=learns, by=by, batch=2)),
            optimizers=dict.fromkeys((*config.optimizers, learns), Optimizer(lr=1.0)),
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "student"}, "the optimiser student is the student's; give the fake_score its own"),
        ({"optimizer": "adam"}, "no optimiser named adam"),
        ({"times": 0}, "times must be a whole number of at least 1, not 0"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1"),
        ({"batch": 3, "accumulate": 2}, "batch 3 does not split into 2 parts"),
    ],
)
def test_a_plan_with_numbers_or_optimisers_that_mean_nothing_is_refused(wrong, said):
    config = dmd()
    with pytest.raises(ValueError, match=f"^fake_score<dmd: {said}"):
        replace(config, plan=(config.plan[0], replace(config.plan[1], **wrong)))


def test_accumulation_gives_the_same_gradient_as_one_batch_when_the_draws_agree(family, cache):
    config, where = flow_matching(), Position(0, 0, 0, 0)
    parts = build(replace(config, plan=(replace(config.plan[0], batch=4),)), family, cache)
    batch = draw(parts, where)
    pieces = split(batch, 2)
    assert [p.ids for p in pieces] == [batch.ids[:2], batch.ids[2:]]
    learned, loss = list(parts.student.parameters()), parts.objectives["flow_matching"].losses["student"]

    def gradient(piece):
        return torch.autograd.grad(loss(None, piece, where.generators(3, piece))[0], learned)

    halves = zip(*map(gradient, pieces), strict=True)
    for expected, (a, b) in zip(gradient(batch), halves, strict=True):
        torch.testing.assert_close((a + b) / 2, expected, rtol=1e-4, atol=1e-7)


def test_average_follows_the_student(family, cache):
    parts = build(dmd(), family, cache)
    before = {k: v.clone() for k, v in parts.average.weights.items()}
    step(parts, Position(0, 0, 0, 0))
    live = parts.networks["student"].transformer.state_dict()
    for key, value in parts.average.weights.items():
        expected = before[key] + (1 - parts.config.ema) * (live[key] - before[key])
        torch.testing.assert_close(value, expected)


def test_a_loss_that_is_not_finite_ends_the_run_and_nothing_of_the_iteration_is_kept(family, cache, tmp_path):
    config = dmd()
    parts = build(config, family, cache, tmp_path)
    good, times = parts.objectives["dmd"].losses["student"], []

    def breaks_later(rollout, batch, generator):
        times.append(1)
        loss, logs = good(rollout, batch, generator)
        return (loss * float("nan") if len(times) == 3 else loss), logs

    parts.objectives["dmd"].losses["student"] = breaks_later
    with pytest.raises(UserError, match=r"(?s)iteration 2, student<dmd.*last checkpoint is .*000002.*learning rate"):
        run_training(parts, tmp_path)
    kept = latest_checkpoint(tmp_path)
    state = {name: torch.empty(shape) for name, shape in stored(kept).items()}
    load_checkpoint(kept, state)
    assert all(torch.isfinite(x).all() for x in state.values())
    assert {json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").open()} == {0, 1}


def test_recipe_with_a_discriminator_wants_a_student(family, cache):
    with pytest.raises(UserError, match="--student"):
        assemble(mogan(), open_cache(cache), model=str(family / "teacher"), run=None)


def test_clips_of_another_rate_than_the_models_are_told(family, cache, tmp_path, capsys):
    build(dmd(), family, cache)
    assert "the model's" not in capsys.readouterr().out
    own = shutil.copytree(cache, tmp_path / "c")
    facts = json.loads((own / "cache.json").read_text())
    (own / "cache.json").write_text(json.dumps(facts | {"fps": 8}))
    build(dmd(), family, own)
    assert "x 32 at 8 fps, the model's 13 x 32 x 32 at 16 fps: `mogan sample`" in capsys.readouterr().out


def test_student_made_for_other_levels_is_refused(family, cache):
    config = replace(mogan(), sigmas=(1.0, 0.5))
    with pytest.raises(UserError, match="levels"):
        build(config, family, cache)


def test_the_scale_of_the_picture_is_the_caches_unless_the_recipe_says(family, cache, tmp_path):
    measured = build(mogan(), family, cache)
    assert measured.config.objectives["gan"].max_flow == 3.8  # 1.9 times the clips' 2 px/frame
    assert measured.observations.key["max_flow"] == 3.8
    assert measured.objectives["gan"].judge.observe.max_flow == 3.8
    own = mogan().changed("gan", max_flow=7.0)
    chosen = build(own, family, cache)
    assert (chosen.config, chosen.objectives["gan"].judge.observe.max_flow) == (own, 7.0)
    assert chosen.observations.folder != measured.observations.folder
    assert (
        build(ablate(mogan, "latent-gan"), family, cache).config.objectives["gan"].max_flow is None
    )  # it sees no picture


@pytest.mark.parametrize(("motion", "why"), [(0.0, "stand still"), (None, "does not say how much")])
def test_a_cache_without_motion_gives_no_scale(motion, why, family, cache, tmp_path):
    opened = open_cache(cache)
    entries = [{k: v for k, v in e.items() if k != "motion"} for e in opened.entries]
    opened.entries = [e | ({} if motion is None else {"motion": motion}) for e in entries]
    with pytest.raises(UserError, match=f"{why}.*gan.max_flow"):
        filled(mogan(), opened)


def test_the_picture_of_a_bf16_run_is_encoded_in_fp32(family, cache):
    observe = build(replace(mogan(), precision="bf16"), family, cache).objectives["gan"].judge.observe
    assert observe.vae.dtype == torch.bfloat16
    assert {p.dtype for p in observe.encoder.parameters()} == {torch.float32}
    assert build(mogan(), family, cache).objectives["gan"].judge.observe.encoder is None  # it is fp32 already


def run_cli(family, cache, out, *more):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "MOGAN_TEST_RAFT": str(family / "raft")}
    command = [sys.executable, "-W", "ignore", "-m", "mogan", "train", "tiny_recipes:mogan"]
    command += ["--model", str(family / "teacher"), "--student", str(family / "student"), "--data", str(cache)]
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out), *more], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def final(run):
    """Every tensor of the newest checkpoint."""
    path = latest_checkpoint(run)
    state = {name: torch.full(shape, torch.nan) for name, shape in stored(path).items()}
    load_checkpoint(path, state)
    return state


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def uninterrupted(family, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    process = run_cli(family, cache, out, "--iterations", "4")
    assert process.wait(300) == 0, process.stderr.read()
    return out


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_identical_weights(family, cache, uninterrupted, tmp_path):
    process = run_cli(family, cache, tmp_path, "--iterations", "4")
    wait_for(lambda: latest_checkpoint(tmp_path) is not None, process)
    wait_for(lambda: (tmp_path / "metrics.jsonl").read_text().count('"iteration": 1') >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = run_cli(family, cache, tmp_path, "--iterations", "4")
    assert process.wait(300) == 0, process.stderr.read()
    assert_same(final(uninterrupted), final(tmp_path))

    def log(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "core_seconds")} for line in lines]

    assert log(uninterrupted) == log(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_save_first(ending, code, family, cache, tmp_path):
    process = run_cli(family, cache, tmp_path, "--iterations", "500", "--save-every", "1000")
    wait_for(lambda: (tmp_path / "metrics.jsonl").is_file() and (tmp_path / "metrics.jsonl").read_text(), process)
    process.send_signal(ending)
    assert process.wait(60) == code
    assert latest_checkpoint(tmp_path) is not None
    said = process.stderr.read()
    assert "stopping after this iteration" in said
    assert "goes on from there" in said
    assert f" {int(latest_checkpoint(tmp_path).name)}/500 " in said  # the bar ends where the run does
    assert "Traceback" not in said


@pytest.mark.slow
def test_another_recipe_does_not_resume_a_run(family, cache, uninterrupted):
    process = run_cli(family, cache, uninterrupted, "--lr", "1e-3")
    assert process.wait(120) == 2
    assert "another optimizers" in process.stderr.read()


@pytest.mark.slow
def test_a_run_keeps_the_scale_it_began_with(uninterrupted):
    for config in (uninterrupted / "config.json", latest_checkpoint(uninterrupted) / "config.json"):
        assert json.loads(config.read_text())["objectives"]["gan"]["max_flow"] == 3.8


def test_a_run_and_a_study_may_be_started_in_another_thread(family, cache, tmp_path):
    def work() -> Path | None:
        with _stopped_by_sigterm():
            run_training(build(replace(flow_matching(), iterations=1), family, cache, tmp_path), tmp_path)
        return latest_checkpoint(tmp_path)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is not None


def test_only_the_newest_checkpoints_are_kept_and_none_is_half_written(family, cache, tmp_path):
    config = replace(flow_matching(), iterations=5, keep=2)
    (tmp_path / "checkpoints").mkdir()
    run_training(build(config, family, cache, tmp_path), tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["000004", "000005"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000004", "000005"]


def test_full_disk_while_saving_keeps_the_old_checkpoint(family, cache, tmp_path, monkeypatch):
    config = replace(flow_matching(), iterations=1)
    run_training(build(config, family, cache, tmp_path), tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    longer = build(replace(config, iterations=2), family, cache, tmp_path)
    with pytest.raises(UserError, match="free some disk space"):
        run_training(longer, tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["000001"]


def test_two_updates_may_have_their_own_optimiser_states(family, cache):
    config = mogan()
    plan = tuple(replace(u, optimizer="student_motion") if u.label == "student<gan" else u for u in config.plan)
    config = replace(config, plan=plan, optimizers=config.optimizers | {"student_motion": Optimizer(lr=1e-5)})
    parts = build(config, family, cache)
    step(parts, Position(0, 0, 0, 0))
    assert parts.optimizers["student"].state
    assert not parts.optimizers["student_motion"].state


def test_an_option_that_is_newer_than_a_run_does_not_stop_it(tmp_path):
    config = mogan()
    old = asdict(config)
    old |= old.pop("objectives")  # as runs had it before
    del old["rollout"], old["post_trains"], old["gan"]["flow_resolution"]
    for update in old["plan"]:
        del update["unless"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_same_run(tmp_path, config)
    with pytest.raises(UserError, match="another optimizers"):
        check_same_run(tmp_path, replace(config, optimizers=config.optimizers | {"student": Optimizer(lr=1.0)}))
    with pytest.raises(UserError, match="another gan"):
        check_same_run(tmp_path, config.changed("gan", flow_resolution=0.5))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"iterations": "many"}, "iterations must be a whole number of at least 1, not 'many'"),
        ({"iterations": 2.5}, "iterations must be a whole number"),
        ({"iterations": -3}, "iterations must be"),
        ({"save_every": 0}, "save_every must be"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"sample_prompts": -1}, "sample_prompts must be"),
        ({"precision": "fp8"}, "precision one of auto, bf16, fp32"),
        ({"recipe": 5}, "recipe is text"),
        ({"ema": 2.0}, "ema from 0 to below 1"),
    ],
)
def test_a_setting_of_ones_own_recipe_that_means_nothing_is_refused_where_it_is_set(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(flow_matching(), **settings)


def test_the_student_cannot_learn_again_from_clips_without_gradient():
    first, *rest = mogan().plan
    with pytest.raises(ValueError, match="kept without gradient"):
        replace(mogan(), plan=(first, replace(first, again=True), *rest))


def test_only_clips_that_the_student_made_are_judged_again():
    learnt, judge = (next(u for u in mogan().plan if u.learns == learns) for learns in ("student", "discriminator"))
    judge = replace(judge, again=True, batch=learnt.batch, accumulate=learnt.accumulate, every=1)
    from_clips = replace(learnt, by="flow_matching")  # rolls nothing out
    config = replace(mogan(), objectives=mogan().objectives | flow_matching().objectives, plan=(learnt, judge))
    replace(config, plan=(from_clips, learnt, judge))
    with pytest.raises(ValueError, match="does not make the clips to judge again"):
        replace(config, plan=(from_clips, judge))


@pytest.mark.parametrize(
    ("recipe", "block", "settings", "said"),
    [
        (mogan, "gan", {"space": "Motion"}, "space is motion or latent, not 'Motion'"),
        (mogan, "gan", {"taps": (1, 9)}, "taps are of blocks 0 to"),
        (mogan, "gan", {"starts": ()}, "a window has at least one start"),
        (shift, "shift", {"weight": "expo"}, "weight is exp or linear, not 'expo'"),
    ],
)
def test_a_choice_that_an_objective_does_not_have_is_refused(recipe, block, settings, said):
    with pytest.raises(ValueError, match=said):
        recipe().changed(block, **settings)


def test_a_long_iteration_is_saved_though_the_recipe_saves_after_many(family, cache, tmp_path, monkeypatch):
    config = replace(dmd(), iterations=3, save_every=100)
    parts = build(config, family, cache, tmp_path)
    saved = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda run, done, *more: saved.append(done))
    clock = iter(range(0, 10**6, 1200))  # 20 minutes between any two looks at it
    monkeypatch.setattr(loop, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: float(next(clock))}))
    run_training(parts, tmp_path)
    assert saved == [3]
    monkeypatch.setattr(loop, "SAVE_WITHIN", 2000.0)
    saved.clear()
    run_training(parts, tmp_path)
    assert saved == [2, 3]


def test_a_folder_that_only_one_machine_sees_is_refused(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    name = []
    first = SimpleNamespace(
        mesh=1, main=True, any=lambda flag: flag, from_main=lambda make: name.append(make()) or name[-1]
    )
    _require_shared(here, first)
    assert not list(here.iterdir())
    monkeypatch.setattr("mogan.training.train.time.sleep", lambda seconds: None)
    first.any = lambda flag: True  # another machine's word
    with pytest.raises(UserError, match="not one folder for all processes"):
        _require_shared(here, first)
    second = SimpleNamespace(mesh=1, main=False, any=lambda flag: flag, from_main=lambda make: name[0])
    with pytest.raises(UserError, match="not one folder for all processes"):
        _require_shared(there, second)


def test_made_to_fit_a_run_with_adapters_gives_their_rank(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mogan.training.train.open_generator", lambda student: SimpleNamespace(lora=3))
    monkeypatch.setattr("mogan.training.train.find_models", lambda *names: (tmp_path,))
    monkeypatch.setattr("mogan.training.train.open_cache", lambda data: None)
    monkeypatch.setattr("mogan.training.train.fit_run", lambda config, *rest: (config, ("it fits",)))
    assert _fitted(mogan(), 24.0, tmp_path, "m", "runs/dmd", tmp_path, ONE).lora == 3
    assert "adapters of rank 3, which is what runs/dmd has" in capsys.readouterr().err
    assert _fitted(replace(mogan(), lora=5), 24.0, tmp_path, "m", "runs/dmd", tmp_path, ONE).lora == 5


def test_the_recipes_own_checkpoints_outlast_those_of_the_clock(tmp_path):
    config = replace(dmd(), save_every=10, keep=2)
    for number in (8, 9, 10, 11, 12, 20, 21):
        save_checkpoint(tmp_path, number, {"student.x": torch.zeros(2)}, config)
        left = [int(path.name) for path in checkpoints(tmp_path)]
        assert left == {8: [8], 9: [8, 9], 10: [9, 10], 11: [10, 11], 12: [10, 12], 20: [10, 20], 21: [20, 21]}[number]


def test_moments_of_an_optimiser_with_a_dot_in_its_name_are_resumed(family, cache, tmp_path):
    config = replace(
        flow_matching(),
        optimizers={"student.motion": Optimizer(lr=1e-3)},
        plan=tuple(replace(u, optimizer="student.motion") for u in flow_matching().plan),
    )
    parts = build(config, family, cache)
    step(parts, Position(0, 0, 0, 0))
    saved, again = parts.state(), build(config, family, cache)
    again.prepare_to_load(saved)
    assert again.state().keys() == saved.keys()
    assert any(name.startswith("student.motion_optimizer.") for name in saved)


def test_what_a_kill_leaves_of_an_old_checkpoint_is_swept(family, cache, tmp_path, monkeypatch):
    config = replace(flow_matching(), keep=1)
    parts = build(config, family, cache, tmp_path)
    save_checkpoint(tmp_path, 1, parts.state(), config)

    def killed(path, **more):
        if path.name == ".000001.new":
            (path / "config.json").unlink()
            raise KeyboardInterrupt
        return rmtree(path, **more)

    rmtree = shutil.rmtree
    monkeypatch.setattr("mogan.runs.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, parts.state(), config)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path).name == "000002"
    save_checkpoint(tmp_path, 3, parts.state(), config)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000003"]
