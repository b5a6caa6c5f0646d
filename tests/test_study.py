"""Studies: which columns there are, how jobs go on, and whether the numbers mean what the table says."""

import gzip
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from mogan.cli import main
from mogan.errors import UserError
from mogan.evaluation.statistics import mean_interval
from mogan.models.denoiser import Denoiser
from mogan.recipes import find_recipe, mogan_lab
from mogan.sampling import samplers
from mogan.sampling.flowmo import FlowMo, temporal_variance
from mogan.study import columns
from mogan.study.bars import bars
from mogan.study.collect import combine, markdown, minus, variety_of
from mogan.study.commands import PROMPT_SEED, jobs_of, shared_jobs
from mogan.study.cost import Training, from_teacher, iterations_that_fit, read_training, training
from mogan.study.figure import PANELS, draw, figure_of
from mogan.study.jobs import Job, core_seconds, run_jobs
from mogan.study.measured import keep_measured, path_of, read_measured
from mogan.study.methods import methods, shift_frozen
from mogan.study.signatures import signatures
from mogan.study.study import TITLES, background, chosen, left_to_do, measure_all, needed, seeds_of, write_prompts
from mogan.world.scenes import make_scene

STUDIES = [columns.table1, columns.table2, methods, signatures]


@pytest.mark.parametrize("table", STUDIES)
def test_every_column_has_a_recipe_or_a_length_that_differs_from_the_others(table):
    found = table()
    assert len({c.name for c in found}) == len(found)
    bodies = []
    for c in found:
        config = {k: v for k, v in vars(find_recipe(c.recipe)).items() if k != "recipe"} if c.recipe else {}
        bodies.append((config, c.start, c.iterations, c.as_long_as, c.sampling))
    assert all(a != b for i, a in enumerate(bodies) for b in bodies[:i])


def test_a_name_means_the_same_column_in_every_study():
    known = {}
    for column in (c for table in STUDIES for c in table()):
        assert known.setdefault(column.name, column) == column
    assert not set(known) & {"videos", "rich", "world", "cache", "captions", "held_out", "logs"}  # also folders


def student_updates(column, known):
    """From the teacher on, by the plan alone."""
    before = student_updates(known[column.start], known) if column.start else 0
    if column.recipe is None:
        return before
    config = find_recipe(column.recipe)
    steps = range(column.iterations or config.iterations)
    return before + sum(u.times for i in steps for u in config.plan if u.learns == "student" and u.happens(i))


def test_columns_are_held_against_mogan_and_against_their_own_pair_of_as_many_updates_or_seconds():
    known = {c.name: c for c in methods()}
    first = {c.against[0] for c in known.values() if c.first_frames and not c.as_long_as}
    first_for_as_long = {c.against[0] for c in known.values() if c.first_frames and c.as_long_as}
    assert (first, first_for_as_long) == ({"sft_i2v_long"}, {"sft_i2v_long_t"})
    assert {c.against[0] for c in known.values() if not c.first_frames} == {"mogan"}
    pairs = {c.name: c.against[1] for c in known.values() if len(c.against) > 1}
    assert pairs.keys() >= {
        "msm",
        "redmd",
        "phased",
        "tdm",
        "vdot",
        "accvideo",
        "efficient_vdit",
        "asd",
        "mogan_causal",
    }
    for name, pair in pairs.items():
        mine, its = known[name], known[pair]
        assert bool(mine.as_long_as) == bool(its.as_long_as)
        more = 40 if mine.start == pair else 0  # MoGAN on top of it
        assert student_updates(mine, known) == student_updates(its, known) + more or mine.as_long_as


def test_methods_are_compared_at_equal_student_updates():
    known = {c.name: c for c in methods()}
    found = {n: student_updates(c, known) for n, c in known.items() if not c.as_long_as}
    assert found == {
        "teacher": 0, "flowmo": 0, "dmd": 400, "msm": 400, "sft_i2v": 400, "surrogate": 560,
        "sft": 440, "dmd_long": 440, "msm_long": 440, "mogan": 440, "mogan_msm": 440, "sft_i2v_long": 436, "shift": 436,
        "shift_frozen": 436, "redmd": 440, "vdot": 440, "tdm": 440, "phased": 440, "accvideo": 440, "mcd": 300,
        "efficient_vdit": 440, "causal_teacher": 200, "causal_cd": 500, "self_forcing": 700, "self_forcing_long": 740,
        "reward_forcing": 740, "asd": 740, "mogan_causal": 740, "llia": 800,
        "dmd_i2v": 800, "mogan_i2v": 840, "mogan_mcd": 340, "mogan_reward_forcing": 780, "mogan_asd": 780,
        **{f"mogan_{on}": 480 for on in ("redmd", "vdot", "phased", "accvideo", "efficient_vdit")},
    }  # fmt: skip
    for name, column in known.items():
        if column.as_long_as:
            assert column.as_long_as == (name.removesuffix("_t"), "mogan")


def test_what_papers_claim_is_compared_at_equal_student_updates():
    known = {c.name: c for c in signatures()}
    found = {n: student_updates(c, known) for n, c in known.items()}
    assert found == {
        "teacher": 0, "dmd": 400, "dmd_160": 560, "redmd_1": 560, "redmd_half": 560, "redmd_fifth": 560,
        "dmd_at_50": 50, "transport_at_50": 50, "dmd_at_100": 100, "transport_at_100": 100, "dmd_at_150": 150,
        "transport_at_150": 150, "accvideo": 440, "accvideo_no_gan": 440, "dmd_long": 440, "phased": 440,
        **{n: 147 if n.startswith("tdm_for") else 440 for n in known if n.startswith("tdm")}, "causal_teacher": 200, "causal_cd": 500,
        "self_forcing": 700, **dict.fromkeys([n for n in known if n.startswith("asd")], 740),
    }  # fmt: skip
    changed = {"redmd_1": "dmd_160", "transport_at_50": "dmd_at_50"}
    for name, base in changed.items():
        one, other = (vars(find_recipe(known[n].recipe)) for n in (name, base))
        assert {k for k in one if one[k] != other[k]} - {"recipe", "iterations", "post_trains"} == {"objectives"}
    alone = find_recipe(known["asd_dmd"].recipe)
    assert {u.by for u in alone.plan} == {"dmd"}
    assert alone.rollout == find_recipe("asd_lab").rollout
    assert {find_recipe(known[f"redmd_{n}"].recipe).objectives["dmd"].weights.beta for n in ("1", "half", "fifth")} == {
        1.0, 0.5, 0.2,
    }  # fmt: skip


def test_a_student_that_is_sampled_otherwise_is_that_of_its_column_for_every_training_seed(tmp_path):
    known = {c.name: c for c in signatures()}
    sample, measure = jobs_of(known["tdm_in_2"], 1, tmp_path, 4, None)
    assert sample.command[sample.command.index("--model") + 1] == str(tmp_path / "tdm" / "seed1" / "export")
    assert (sample.command[-2:], sample.after) == (("--steps", "2"), ("tdm-1-export",))
    assert measure.after == (sample.name,)
    assert [c.name for c in chosen(signatures(), ("tdm_in_2",))] == ["tdm", "tdm_in_2"]
    assert seeds_of(known["tdm_in_2"], range(3)) == [0, 1, 2]
    assert seeds_of(known["teacher"], range(3)) == [0]
    trained = {("tdm", 0): Training(440, [1.0, 2.0])}
    assert from_teacher(known["tdm_in_2"], 0, known, trained) == (440, 3.0)


def test_variety_is_the_mean_distance_of_looks_within_a_prompt_and_seed():
    world = [{"features": [0.0, 0.0]}, {"features": [2.0, 4.0]}]  # deviations 1 and 2
    looks = {("a", "0"): [(0, 0), (1, 0), (0, 2)], ("b", "0"): [(5, 5), (5, 5)], ("a", "1"): [(9, 9)]}
    clips = [{"prompt": prompt, "features": f} for (prompt, _), found in looks.items() for f in found]
    seeds = [seed for (_, seed), found in looks.items() for _ in found]
    apart = np.mean([math.sqrt(1 / 2), math.sqrt(1 / 2), 1.0])  # per root of 2 features
    found = variety_of(clips, seeds, world)
    assert found.mean == pytest.approx((apart + 0) / 2)
    assert found.n == 2
    assert variety_of(clips[-1:], seeds[-1:], world) is None


def test_calls_are_those_of_the_steps_and_chunks():
    for column in (c for table in STUDIES for c in table() if c.recipe):
        config = find_recipe(column.recipe)
        steps, again = len(config.sigmas), 4 / 5 if config.causal else 0
        made = steps * (4 / 5 if config.causal and config.given else 1)
        guided = 2 if steps == 50 else 1
        assert column.calls == pytest.approx(made * guided + again), column.name


def logged(log, seconds_of_updates, **facts):
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"iteration": i, "update": update, "seconds": seconds, **facts}
        for i, updates in enumerate(seconds_of_updates)
        for update, seconds in updates
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_training(log)


def test_a_discriminator_that_is_none_of_motion_has_a_gap_and_no_motion_gradient(tmp_path):
    log = tmp_path / "metrics.jsonl"
    found = logged(log, [[("student<relativistic", 1.0)]] * 12, gap=0.5, grad_norm=2.0)
    assert (found.updates, found.final_gap, found.largest_motion_gradient) == (12, 0.5, None)
    found = logged(log, [[("student<dmd+gan", 1.0)]] * 12, gap=0.5, grad_norm=2.0)
    assert found.largest_motion_gradient == 2.0


def test_equal_seconds_are_counted_from_the_teacher_and_a_warm_up_is_paid_once(tmp_path):
    known = {c.name: c for c in methods()}
    log = tmp_path / "metrics.jsonl"
    trained = {
        ("dmd", 1): logged(log, [[("student<dmd", 1.0), ("fake_score<dmd", 1.0)]] * 10),
        ("mogan", 1): logged(log, [[("student<dmd", 2.0), ("student<gan", 4.0)]] * 5),
        ("dmd_long", 1): logged(log, [[("student<dmd", 1.0)]] * 4),
        ("sft", 1): logged(log, [[("student<flow_matching", 0.5)]] * 4),
        ("sft_i2v", 1): logged(log, [[("student<flow_matching", 2.0)]] * 10),
        ("shift", 1): logged(log, [[("reward<shift", 9.0)]] * 2 + [[("student<shift", 4.0)]] * 4),
    }
    assert from_teacher(known["mogan"], 1, known, trained) == (20, 50.0)
    assert from_teacher(known["teacher"], 1, known, trained) == (0, 0.0)

    def fit(name):
        return iterations_that_fit(known[name], 1, known, trained)

    assert fit("dmd_long_t") == 30  # MoGAN's own 30 seconds: both start from the same student
    assert fit("sft_t") == 100  # 50 seconds from the teacher on
    assert fit("shift_t") == 5  # 30 seconds after its start's 20: two of warm-up take 18, three more take 12
    found = training(known["mogan"], [1], known, trained)
    assert found == {"training_seconds": {"1": 30.0}, "from_teacher": {"updates": 20, "seconds": 50.0}}
    trained["mogan", 1] = logged(log, [])
    assert fit("dmd_long_t") == 1


def test_a_log_tells_how_the_discriminator_stood(tmp_path):
    rows = [[("student<gan", 1.0), ("discriminator<gan", 1.0)]] * 12
    found = logged(tmp_path / "metrics.jsonl", rows, gap=2.0, grad_norm=3.0)
    assert found == Training(12, [2.0] * 12, 2.0, 3.0)


def test_seconds_of_cores_count_before_those_of_the_clock(tmp_path):
    steps = [[("student<dmd", 9.0), ("fake_score<dmd", 9.0)]] * 3
    assert logged(tmp_path / "metrics.jsonl", steps, core_seconds=2.0).seconds == [4.0] * 3
    assert logged(tmp_path / "metrics.jsonl", steps).seconds == [18.0] * 3


def test_one_factor_changes_at_a_time():
    whole = vars(mogan_lab())
    expected = {
        "two_moments": {"optimizers"},
        "one_moments": {"plan", "optimizers"},
        "judge_first": {"plan"},
        "guidance_5": {"objectives"},
        "no_dmd": {"plan", "objectives", "recipe"},
        "no_r1r2": {"objectives", "recipe"},
    }
    for name, keys in expected.items():
        found = vars(getattr(columns, name)())
        assert {k for k in whole if whole[k] != found[k]} == keys, name
    order = [u.label for u in columns.judge_first().plan]
    assert order.index("discriminator<gan") < order.index("student<gan")


def test_a_column_brings_what_it_starts_from():
    assert [c.name for c in chosen(columns.table1(), ("mogan",))] == ["dmd", "mogan"]
    found = [c.name for c in chosen(methods(), ("shift_t",))]
    assert found == ["dmd", "mogan", "sft_i2v", "shift", "shift_t"]
    with pytest.raises(UserError, match="the study has teacher"):
        chosen(columns.table1(), ("nothing",))


@pytest.mark.parametrize("table", STUDIES)
def test_every_job_waits_only_for_jobs_there_are(table, tmp_path):
    jobs = shared_jobs(tmp_path, 168) + [j for c in table() for s in (0, 1) for j in jobs_of(c, s, tmp_path, 5, 7)]
    names = [j.name for j in jobs]
    assert len(set(names)) == len(names)
    assert all(set(j.after) <= set(names[:i]) for i, j in enumerate(jobs))


def test_a_column_given_before_another_is_not_forgotten(tmp_path, capsys):
    given = ["study", "table1", "--out", str(tmp_path), "--column", "nobody", "--column", "mogan"]
    assert main(given) == 2
    assert "no column 'nobody'" in capsys.readouterr().err


def test_image_to_video_starts_from_the_clips_of_the_held_out_prompts(tmp_path):
    scenes = write_prompts(tmp_path / "held_out.txt", PROMPT_SEED, 3, "rich")
    jobs = {j.name: j for j in shared_jobs(tmp_path, scenes)}
    captions = [make_scene(PROMPT_SEED, i, motion="rich").caption for i in range(scenes)]
    assert list(dict.fromkeys(captions)) == (tmp_path / "held_out.txt").read_text().splitlines()
    assert jobs["held_out"].command[-6:] == ("--clips", str(scenes), "--motion", "rich", "--seed", str(PROMPT_SEED))
    shift = next(c for c in methods() if c.name == "shift")
    train, _, sample, _ = jobs_of(shift, 2, tmp_path, 5, shift.iterations)
    assert train.command[-4:] == ("--student", str(tmp_path / "sft_i2v" / "seed2" / "export"), "--iterations", "11")
    assert sample.command[-2:] == ("--first-frames", str(tmp_path / "held_out"))
    assert sample.after == ("shift-2-export", "held_out")
    mogan_i2v = jobs_of(next(c for c in methods() if c.name == "mogan_i2v"), 2, tmp_path, 5, None)[0].command
    assert mogan_i2v[mogan_i2v.index("--model") + 1] == str(tmp_path / "dmd_i2v" / "seed2" / "start")
    assert "held_out" not in {j.name for j in shared_jobs(tmp_path)}


def test_frozen_rewards_learn_in_the_warm_up_alone():
    plan = shift_frozen().plan
    learners = [{u.learns for u in plan if u.happens(iteration)} for iteration in range(21)]
    assert learners == [{"reward"}] * 8 + [{"student"}] * 13


def test_jobs_run_once_and_a_failure_says_where_to_look(tmp_path):
    videos = ("lab", "render", "--out", str(tmp_path / "v"), "--clips", "1", "--motion", "rich", "--seed")
    jobs = [Job("render", (*videos, "0")), Job("again", (*videos, "0"), after=("render",))]
    run_jobs(jobs, tmp_path / "logs", 1)
    first, spent = (tmp_path / "logs" / "render.log").read_text(), core_seconds(jobs, tmp_path / "logs")
    run_jobs(jobs, tmp_path / "logs", 1)
    assert (tmp_path / "logs" / "render.log").read_text() == first
    assert core_seconds(jobs, tmp_path / "logs") == spent > core_seconds(jobs[:1], tmp_path / "logs") > 0
    with pytest.raises(UserError, match="other options"):
        run_jobs([Job("render", (*videos, "1"))], tmp_path / "logs", 1)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    videos = ("lab", "render", "--out", str(moved / "v"), "--clips", "1", "--motion", "rich", "--seed")
    run_jobs([Job("render", (*videos, "0"))], moved / "logs", 1)
    assert (moved / "logs" / "render.log").read_text() == first  # the same job in another folder, and done
    with pytest.raises(UserError, match=r"other failed: .*give another --out.*other\.log"):
        run_jobs([Job("other", (*videos, "1"))], tmp_path / "logs", 1)


def test_what_is_done_is_told_at_once_and_again_by_a_later_call(tmp_path, monkeypatch):
    exits = {"one": "pass", "two": "pass", "three": "raise SystemExit(1)"}
    monkeypatch.setattr(
        "mogan.study.jobs._start",
        lambda job, *_: subprocess.Popen([sys.executable, "-c", exits[job.name]], stderr=subprocess.DEVNULL),
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "three.log").touch()
    jobs, told = [Job("one", ()), Job("two", (), after=("one",)), Job("three", (), after=("two",))], []
    for _ in range(2):
        with pytest.raises(UserError, match="three failed"):
            run_jobs(jobs, tmp_path / "logs", 1, lambda job: told.append(job.name))
    assert told == ["one", "two", "one", "two"]


def test_a_job_alone_has_all_cores_and_several_share_them(tmp_path, monkeypatch):
    given = {}

    def start(job, logs, threads, inherits):
        given[job.name] = threads
        return subprocess.Popen([sys.executable, "-c", "pass"])

    monkeypatch.setattr("mogan.study.jobs._start", start)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    later = [Job(name, (), after=("first",)) for name in ("one", "two")]
    run_jobs([Job("first", ()), *later], tmp_path / "logs", 2)
    assert given == {"first": 8, "one": 4, "two": 4}
    run_jobs([Job(f"of three {i}", ()) for i in range(3)], tmp_path / "logs", 4)
    assert sorted(given[f"of three {i}"] for i in range(3)) == [2, 2, 4]


def test_a_measured_seed_is_not_made_again_but_what_starts_from_it_is(tmp_path):
    known = {c.name: c for c in columns.table1()}
    jobs = {(n, 0): jobs_of(known[n], 0, tmp_path, 2, 3) for n in ("teacher", "dmd", "mogan")}

    def left(*measured):
        return [job.name for job in left_to_do(jobs, {(name, 0) for name in measured}, known)]

    whole = ["train", "export", "sample", "measure"]
    assert left("teacher") == [f"{n}-0-{step}" for n in ("dmd", "mogan") for step in whole]
    assert left("teacher", "dmd") == ["dmd-0-train", "dmd-0-export", *(f"mogan-0-{step}" for step in whole)]
    assert left("teacher", "dmd", "mogan") == []
    shared = shared_jobs(tmp_path, 3)
    assert needed(shared, []) == []
    assert {j.name for j in needed(shared, jobs["mogan", 0])} == {"videos", "cache"}


def test_what_is_measured_is_kept_though_the_study_ends_before_the_rest_is(tmp_path, monkeypatch):
    clips = [{"prompt": "a", "index": 0, "values": {}, "features": []}]
    monkeypatch.setattr("mogan.study.measured.records", lambda folder, results: clips)
    (tmp_path / "held_out.txt").write_text("a\n")
    ran = []

    def run(left, on_done):
        ran.append([job.name for job in left])
        for job in left[:2]:  # the teacher's
            on_done(job)
        raise UserError("the disk is full")

    def make(column, seed, count):
        return jobs_of(column, seed, tmp_path, 2, count)

    for _ in range(2):
        with pytest.raises(UserError, match="disk"):
            measure_all((columns.TEACHER, columns.DMD), range(1), tmp_path, make, run)
        assert path_of(tmp_path, "teacher", 0).is_file()
        assert not path_of(tmp_path, "dmd", 0).exists()
    dmd = [f"dmd-0-{step}" for step in ("train", "export", "sample", "measure")]
    assert ran == [["teacher-0-sample", "teacher-0-measure", *dmd], dmd]


def test_a_measured_seed_is_read_as_it_was_kept_and_only_for_the_same_options(tmp_path, monkeypatch):
    clips = [{"prompt": "a", "index": 0, "values": {"lab_net": 0.5}, "features": [1.0, 2.5], "sha256": "x"}]
    monkeypatch.setattr("mogan.study.measured.records", lambda folder, results: clips)
    one, other, home = tmp_path / "one", tmp_path / "other", tmp_path / "one" / "dmd" / "seed0"
    logged(home / "run" / "metrics.jsonl", [[("student<dmd", 1.5)]] * 4)
    dmd = columns.DMD
    kept = keep_measured(one / "dmd" / "seed0.json.gz", home, one, jobs_of(dmd, 0, one, 2, 3))
    path = path_of(other, "dmd", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes((one / "dmd" / "seed0.json.gz").read_bytes())
    found = read_measured(path, other, jobs_of(dmd, 0, other, 2, 3), {"a"})
    assert found == kept
    assert found.training == Training(4, [1.5] * 4)
    assert found.clips == [{"prompt": "a", "index": 0, "values": {"lab_net": 0.5}, "features": [1.0, 2.5]}]
    assert read_measured(path_of(other, "dmd", 1), other, [], {"a"}) is None
    for options, prompts in (((5, 3), {"a"}), ((2, 4), {"a"}), ((2, 3), {"a", "b"})):
        with pytest.raises(UserError, match="other options"):
            read_measured(path, other, jobs_of(dmd, 0, other, *options), prompts)
    spaced = tmp_path / "my study"  # whose name a shell quotes
    assert read_measured(path, spaced, jobs_of(dmd, 0, spaced, 2, 3), {"a"}) == kept
    whole = path.read_bytes()
    for torn in (whole[:-9], whole[:12] + bytes(20) + whole[32:], gzip.compress(b"5"), b"x"):
        path.write_bytes(torn)
        with pytest.raises(UserError, match="cannot be read"):
            read_measured(path, other, jobs_of(dmd, 0, other, 2, 3), {"a"})


def test_studies_share_a_folder_but_not_at_the_same_time(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            UserError, match=f"another study, or a job that a killed one left, is running in {tmp_path}: wait"
        ):
            run_jobs([Job("never", ("lab",))], tmp_path / "logs", 1)
    one, other = columns.table1(), columns.table2()
    jobs = [[*shared_jobs(tmp_path), *(j for c in t for j in jobs_of(c, 0, tmp_path, 5, None))] for t in (one, other)]
    shared = {j.name for j in jobs[0]} & {j.name for j in jobs[1]}
    assert {"cache", "teacher-0-measure", "dmd-0-export", "mogan-0-train"} <= shared
    first, second = ({j.name: j for j in found if j.name in shared} for found in jobs)
    assert first == second


def clips_of(values, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"prompt {i // 2}",
            "values": {"dynamic_degree": v, "lab_net": v, "lab_speed": float(v)},
            "features": list(rng.normal(size=4)),
        }
        for i, v in enumerate(values)
    ]


def test_a_studys_report_says_whose_clips_it_shows_and_what_systems_are_held_against():
    known = {c.name: c for c in methods()}
    seeds = {"mogan": 1, "teacher": 0, "dmd": 1, "msm": 2}
    found = background("methods", [(known[name], Path(name) / f"seed{seed}") for name, seed in seeds.items()])
    says = "Clips and numbers of training seed 1 (of msm: 2), with intervals over prompts alone; the table with all seeds is"
    assert (found.note, found.link) == (says, "methods.md")
    assert found.against["msm"] == ("mogan", "dmd")
    assert TITLES.keys() == {"table1", "table2", "methods", "signatures"}
    assert background("table1", [(known["teacher"], Path("teacher/seed0"))]).note.startswith(
        "Clips and numbers of training seed 0,"
    )


def test_intervals_resample_prompts_and_training_seeds():
    reference = clips_of(np.linspace(0, 1, 20), 9)
    by_seed = {"0": clips_of([0.0] * 20, 1), "1": clips_of([1.0] * 20, 2)}
    column = columns.Column("x", "a test")
    system = combine(column, by_seed, reference, reference)
    found = system["metrics"]["lab_net"]
    assert found["mean"] == 0.5
    assert found["ci95"] == [0.0, 1.0]  # two seeds that disagree: clips within a seed add no certainty
    assert system["per_seed"]["0"]["lab_net"] == 0.0
    alone = combine(column, {"0": clips_of(np.linspace(0, 1, 20), 1)}, reference, reference)["metrics"]["lab_net"]
    expected = mean_interval(np.linspace(0, 1, 20), [f"prompt {i // 2}" for i in range(20)])
    assert alone["ci95"] == pytest.approx(expected.ci95)
    assert system["metrics"]["speed_to_rich"]["mean"] == pytest.approx(0.25, abs=0.02)  # half at 0, half at 1


def test_differences_are_taken_clip_by_clip_and_what_is_common_cancels():
    rng = np.random.default_rng(0)
    easy = {f"prompt {i}": rng.normal(0, 5) for i in range(20)}

    def clips(shift, index_of_broken=None):
        return [
            {
                "prompt": p,
                "index": i,
                "values": {"lab_net": e + shift + 0.01 * rng.normal(), "contrast": 1.0, "lab_shape": None},
            }
            if i != index_of_broken
            else {"prompt": p, "index": i, "error": "torn"}
            for p, e in easy.items()
            for i in range(3)
        ]

    base = {"0": clips(0.0), "1": clips(0.0)}
    found = minus({"0": clips(0.3, index_of_broken=2), "1": clips(0.5)}, base)
    assert set(found) == {"lab_net"}  # nothing of shape, and contrast is not compared
    assert found["lab_net"]["n"] == 20 * 2 + 20 * 3
    assert found["lab_net"]["mean"] == pytest.approx((40 * 0.3 + 60 * 0.5) / 100, abs=0.01)
    low, high = found["lab_net"]["ci95"]
    assert 0.29 < low < high < 0.51  # between the seeds' own gaps, though prompts differ by 5
    untrained = minus({"0": clips(0.1)}, base)["lab_net"]
    assert untrained["n"] == 120
    assert untrained["mean"] == pytest.approx(0.1, abs=0.01)


def systems_with(degree, net):
    def system(name):
        values = {"dynamic_degree": degree[name], "lab_net": net[name], "lab_wobble": 0.1, "lab_pulsing": 0.1}
        values |= {"motion_smoothness": 0.98, "appearance_distance": 1.0, "speed_to_rich": 1.0 - degree[name]}
        return {
            "about": name,
            "metrics": {k: {"mean": v, "ci95": [v - 0.04, v + 0.04], "n": 9} for k, v in values.items()},
            "per_seed": {"0": values},
        }

    return {name: system(name) for name in degree}


def test_bars_hold_and_fail_where_they_should(tmp_path):
    good = systems_with({"teacher": 0.5, "dmd": 0.3, "mogan": 0.7}, {"teacher": 0.2, "dmd": 0.1, "mogan": 0.2})
    assert all(b.holds for b in bars(good))
    bad = systems_with({"teacher": 0.5, "dmd": 0.45, "mogan": 0.5}, {"teacher": 0.2, "dmd": 0.1, "mogan": 0.2})
    failed = [b.says for b in bars(bad) if not b.holds]
    assert any("0.10 below" in s for s in failed)
    assert any("0.15 above" in s for s in failed)
    assert any("do not overlap" in s for s in failed)
    assert bars({"teacher": good["teacher"]}) == []
    page = markdown(
        "table1", {"systems": bad, "how": {"sentence": "s", "command": "c"}, "bars": [vars(b) for b in bars(bad)]}
    )
    assert "**no**" in page
    assert "| mogan | 0 |" in page
    assert "Student updates" not in page
    assert "Minus" not in page
    bad["mogan"] |= {"from_teacher": {"updates": 560, "seconds": 90.0}, "first_frames": True}
    gaps = {"lab_net": {"mean": -0.1, "ci95": [-0.2, -0.05]}, "lab_shape": {"mean": 0.1, "ci95": [-0.2, 0.4]}}
    bad["dmd"] |= {"minus_mogan": gaps}
    command = "mogan study methods --seeds 3 " + " ".join(f"--column column_{n}" for n in range(20))
    page = markdown("methods", {"systems": bad, "how": {"sentence": "s", "command": command}, "bars": []})
    lines = page.split("```")[1].strip().splitlines()
    assert len(lines) > 3
    assert all(len(line) < 120 and line.count("--column") == line.count("column_") for line in lines)
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)
    assert "| Student updates, from the teacher on | - | - | 560 |" in page
    assert "| Training, from the teacher on (core-minutes) | - | - | 1.5 |" in page
    assert "Minus `mogan`, clip by clip" in page
    assert "Minus `dmd`" not in page
    assert "| dmd | - | **-0.100 [-0.200, -0.050]** | - | - | - | - | - | +0.100 [-0.200, +0.400] |" in page
    draw(bad, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_figure_of_many_systems_tells_them_apart_and_no_name_lies_on_another():
    names = [f"system_{number}" for number in range(45)]
    systems = systems_with(dict.fromkeys(names, 0.5), {name: 0.3 + 0.001 * i for i, name in enumerate(names)})
    for number, (name, system) in enumerate(systems.items()):
        system["per_seed"]["0"]["appearance_distance"] = 1.0 + 0.01 * (number % 7)
        system |= {"first_frames": number % 2 == 1, "calls": 1 if name == "system_3" else 3.8}
        system["metrics"]["lab_shape"] = {"mean": 0.5, "ci95": None, "n": 9}
    figure = figure_of(systems)
    scatter, *panels = figure.axes
    assert len(panels) == len(PANELS)
    assert {"Shape agrees", "Identity kept"} <= {panel.get_title(loc="left") for panel in panels}
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels[2:4] == ["system_2, 3.8 calls", "system_3, 1 call"]
    assert len({(line.get_marker(), str(line.get_color())) for line in scatter.lines}) == 45
    assert [line.get_markerfacecolor() == "none" for line in scatter.lines] == [n % 2 == 1 for n in range(45)]
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in scatter.texts]  # without their lines
    assert len(boxes) == 45
    assert not any(one.padded(-0.5).overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_bars_of_parts_compare_each_with_mogan():
    degrees = {
        "teacher": 0.5,
        "dmd": 0.3,
        "mogan": 0.7,
        "no_dmd": 0.7,
        "latent_gan": 0.4,
        "no_r1r2": 0.7,
        "surrogate": 0.68,
    }
    looks = {
        "teacher": 0.2,
        "dmd": 0.2,
        "mogan": 0.2,
        "no_dmd": 0.5,
        "latent_gan": 0.2,
        "no_r1r2": 0.2,
        "surrogate": 0.2,
    }
    systems = systems_with(degrees, looks)
    systems["mogan"] |= {"final_gap": {"0": 1.0, "1": 2.0}, "largest_motion_gradient": {"0": 2.0, "1": 2.0}}
    systems["no_r1r2"] |= {"final_gap": {"0": 6.0}, "largest_motion_gradient": {"0": 2.5}}
    found = {b.says: (b.found, b.holds) for b in bars(systems)}
    assert found["without R1 and R2 the gap of logits is at least 1.5 times as large"] == ("4.00", True)
    assert found["without R1 and R2 the largest motion gradient is at least 1.5 times as large"] == ("1.25", False)
    assert found["the surrogate brings at least 90 % of MoGAN's gain in dynamic degree"] == ("0.95", True)


# ---------------------------------------------------------------------------------------------- FlowMo


def test_flowmo_is_zero_for_constant_velocity_and_is_the_worst_place_otherwise():
    steady = torch.arange(6.0).view(1, 1, 6, 1, 1) * torch.randn(1, 3, 1, 4, 4)
    assert temporal_variance(steady).item() == pytest.approx(0, abs=1e-10)
    x = torch.randn(2, 3, 6, 4, 4, dtype=torch.float64)
    changes = np.abs(np.diff(x.numpy(), axis=2))
    expected = changes.var(axis=2).mean(axis=1).reshape(2, -1).max(1)
    np.testing.assert_allclose(temporal_variance(x), expected)


def test_flowmo_guidance_lowers_the_variance_of_each_clip_by_itself():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 4, 4)
    velocity, sigma = lambda z: 0.3 * z, torch.tensor(0.8)

    def guided(start):
        guide, z = FlowMo(rate=0.02), start
        for _ in range(20):
            z = guide(z, velocity, sigma)
        return z

    z = guided(x)
    before, after = temporal_variance(0.76 * x), temporal_variance(0.76 * z)
    assert (after < 0.8 * before).all()
    torch.testing.assert_close(guided(x[:1]), z[:1])
    still = torch.ones(1, 3, 6, 4, 4)
    torch.testing.assert_close(guided(still), still)


def test_flowmo_goes_down_the_variance_of_the_prediction_through_the_network_too():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, 4, 4)
    z = FlowMo(0.02)(
        x, lambda z: 2 * z, torch.tensor(1.0)
    )  # x0 is -z: with the network held still it would be taken for z
    assert temporal_variance(-z) < temporal_variance(-x)


def test_flowmos_steps_are_those_of_one_adam():
    torch.manual_seed(0)
    x, guide = torch.randn(1, 3, 6, 4, 4), FlowMo(0.02)
    still = lambda z: 0 * z  # noqa: E731  x0 is z itself
    z = guide(guide(x, still, torch.tensor(1.0)), still, torch.tensor(1.0))
    moved = torch.nn.Parameter(x.clone())
    adam = torch.optim.Adam([moved], lr=0.02)
    for _ in range(2):
        adam.zero_grad()
        temporal_variance(moved).sum().backward()
        adam.step()
    torch.testing.assert_close(z, moved.data)


def test_flowmo_guides_the_first_twelve_steps(monkeypatch):
    steps = []
    monkeypatch.setattr(samplers, "FlowMo", lambda: lambda x, velocity, sigma: (steps.append(float(sigma)), x)[1])

    class Still(torch.nn.Module):
        def forward(self, x, timestep, text, return_dict=False):
            return (0 * x,)

    text = torch.zeros(1, 2, 4)
    settings = {"steps": 20, "guidance": 1.0, "shift": 3.0, "flowmo": True, "solver": "euler"}
    samplers.sample_teacher(Denoiser(Still()), text, text, (2, 2, 2, 2), [0], **settings)
    assert len(steps) == 12
    assert steps == sorted(steps, reverse=True)


def test_flowmo_is_refused_for_a_student(tmp_path, family, capsys):
    (tmp_path / "p.txt").write_text("a red circle bouncing\n")
    command = ["sample", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "s"), "--flowmo", "--model"]
    assert main([*command, str(family / "student")]) == 2
    assert "leave it out" in capsys.readouterr().err
    assert main([*command, str(family / "teacher"), "--steps", "3"]) == 0
    assert json.loads((tmp_path / "s" / "samples.jsonl").read_text())["flowmo"] is True


def test_no_number_is_not_a_number_in_a_table():
    assert math.isnan(mean_interval([math.nan], ["a"]).mean)


@pytest.mark.slow
def test_a_study_runs_from_nothing_and_a_second_call_only_writes_the_table(tmp_path, monkeypatch, capsys):
    for name, small in (("commands.TRAIN_VIDEOS", 12), ("study.TRAIN_PROMPTS", 16), ("commands.REFERENCE", 4)):
        monkeypatch.setattr(f"mogan.study.{name}", small)
    options = ["--seeds", "1", "--column", "mogan", "--prompts", "2", "--clips", "1", "--iterations", "1"]
    command = ["study", "table1", "--out", str(tmp_path / "s"), *options]
    assert main(command) == 0
    results = json.loads((tmp_path / "s" / "table1.json").read_text())
    assert list(results["systems"]) == ["dmd", "mogan"]
    for system in results["systems"].values():
        assert system["metrics"]["dynamic_degree"]["n"] == 2
        assert set(system["per_seed"]) == {"0"}
        assert system["training_seconds"]["0"] > 0
    assert "final_gap" in results["systems"]["mogan"]
    page = (tmp_path / "s" / "table1.html").read_text()
    assert "<title>MoGAN&#39;s Table 1, in the laboratory</title>" in page
    assert 'the table with all seeds is <a href="table1.md">table1.md</a>.' in page
    assert (tmp_path / "s" / "table1.png").is_file()
    start = json.loads((tmp_path / "s" / "mogan" / "seed0" / "run" / "run.json").read_text())["student"]
    assert start == str(tmp_path / "s" / "dmd" / "seed0" / "export")

    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*.mp4")}
    assert main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*.mp4")} == made
    assert "| dmd | 0 |" in capsys.readouterr().out
    assert main([*command[:-1], "2"]) == 2
    assert "other options" in capsys.readouterr().err

    for column in ("dmd", "mogan"):
        (tmp_path / "copy" / column).mkdir(parents=True)
        file = tmp_path / "s" / column / "seed0.json.gz"
        (tmp_path / "copy" / column / file.name).write_bytes(file.read_bytes())
    assert main(["study", "table1", "--out", str(tmp_path / "copy"), *options]) == 0
    copied = json.loads((tmp_path / "copy" / "table1.json").read_text())
    assert copied["systems"] == results["systems"]
    assert not (tmp_path / "copy" / "dmd" / "seed0").exists()


STUDY = """
import sys
from pathlib import Path
from mogan.study.jobs import Job, run_jobs
out = Path(sys.argv[1])
run_jobs([Job("long", ("lab", "render", "--out", str(out / "clips"), "--clips", "100000"))], out / "logs", 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_ends_leaves_no_job_that_another_study_could_meet(tmp_path, ending):
    study = subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("clips/*.mp4")):
        assert time.monotonic() < deadline
        assert study.poll() is None
        time.sleep(0.1)
    study.send_signal(ending)
    study.wait(60)
    if ending == signal.SIGTERM:
        before = len(list(tmp_path.glob("clips/*")))
        time.sleep(1)
        assert len(list(tmp_path.glob("clips/*"))) == before
        return
    try:
        with pytest.raises(UserError, match="a job that a killed one left"):
            run_jobs([], tmp_path / "logs", 1)
    finally:
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "clips")], check=False)
