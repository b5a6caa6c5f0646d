"""What a discriminator sees of real clips is computed where it is first needed, once, and nobody waits for it."""

import json
import shutil
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tiny_recipes
from mogan.config import Config
from mogan.data import observations as module
from mogan.data.batches import draw_batch
from mogan.data.cache import open_cache
from mogan.data.observations import Observations, drawn
from mogan.disk.files import replacing
from mogan.errors import UserError
from mogan.recipes import mogan_lab, mogan_surrogate_lab, mogan_wan_1_3b
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, positions, step
from test_data import folder  # noqa: F401  # a fixture
from test_distributed import train_together
from tiny_recipes import mogan, surrogate


@pytest.fixture
def fresh(cache, tmp_path):
    """The test family's cache, nothing observed yet."""
    shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns("observations"))
    return tmp_path / "cache"


def build(config, family, cache, run=None):
    student = str(family / "student")
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")


def kept(cache):
    """``{(clip, start): bytes}`` of every observation in a cache."""
    files = (cache / "observations").rglob("[!.]*.safetensors")
    return {(path.stem, int(path.parent.name)): path.read_bytes() for path in files}


def named(config, cache, first=0):
    entries = open_cache(cache).entries
    return {(entries[clip]["id"], start) for clip, start in drawn(config, len(entries), first)}


def shrunk(config: Config, iterations: int) -> Config:
    """A recipe with few iterations, every batch a multiple of four."""
    return replace(config.with_budget(iterations), plan=tuple(replace(u, times=min(u.times, 3)) for u in config.plan))


@given(st.sampled_from([mogan_lab, mogan_surrogate_lab, mogan_wan_1_3b]), st.integers(0, 3), st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None)
def test_what_a_run_will_draw_is_known_before_it_starts(folder, recipe, seed, ranks):  # noqa: F811
    config, cache = replace(shrunk(recipe(), 9), seed=seed), open_cache(folder)
    asked = set()

    def note(clip, start):
        asked.add((int(clip[1:]), start))

    for where in positions(config, 2):
        update = config.plan[where.update]
        if "observation" in config.lesson(update).clips:
            place = {"seed": seed, "iteration": where.iteration, "update": where.update, "repeat": where.repeat}
            for rank in range(ranks):
                share = {"size": update.batch // ranks, "rank": rank, "ranks": ranks}
                draw_batch(
                    cache,
                    **place,
                    **share,
                    want=("observation",),
                    observation=note,
                    starts=config.objectives["gan"].starts,
                )
    assert asked == drawn(config, len(cache), 2)


def test_of_a_run_without_an_end_as_many_observations_are_found_as_there_are():
    config = replace(mogan_lab(), iterations=10**9)
    starts = len(config.objectives["gan"].starts)
    assert len(drawn(config, 40)) == 40 * starts  # and in a moment


def test_of_the_papers_clips_a_third_of_all_windows_are_drawn():
    found = drawn(mogan_wan_1_3b(), 15000)
    assert len(found) <= 800 * 64
    # each draw of one of 150,000 pairs is nearly uniform: 1 - (9 / 10)^k of a clip's ten after k draws of it, 3.41 on average
    assert len(found) == pytest.approx(15000 * 10 * (1 - 0.59 * 0.9**3 - 0.41 * 0.9**4), rel=0.02)


def test_one_is_computed_once_alone_and_what_is_used_is_what_is_kept(folder, tmp_path):  # noqa: F811
    shutil.copytree(folder, tmp_path / "cache")
    cache, calls = open_cache(tmp_path / "cache"), []

    def observe(latent, start):
        calls.append((latent.shape[0], latent.unique().item(), start))
        return latent[:, :, start : start + 2] / 3 + start

    seen = Observations(cache, {"max_flow": 4.0}, observe)
    assert seen.read("c2", 1) is None
    first = seen.get("c2", 1)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, (cache.latent("c2")[:, 1:3] / 3 + 1).bfloat16())
    assert torch.equal(seen.get("c2", 1), first)
    assert torch.equal(Observations(cache, {"max_flow": 4.0}, observe).read("c2", 1), first)
    assert Observations(cache, {"max_flow": 8.0}, observe).read("c2", 1) is None
    assert calls == [(1, 2.0, 1)]
    assert torch.equal(load_file(seen.path("c2", 1))["observation"], first)
    where = {"seed": 0, "iteration": 0, "update": 1, "size": 3, "want": ("observation",), "starts": (0, 1)}
    batch = draw_batch(cache, **where, observation=seen.read)
    assert batch.observation_BCFHW is None
    whole = seen.complete(batch)
    assert [tuple(o.shape) for o in whole.observation_BCFHW] == [(2, 2, 2, 2)] * 3
    assert torch.equal(draw_batch(cache, **where, observation=seen.read).observation_BCFHW, whole.observation_BCFHW)
    assert all(count == 1 for count, _, _ in calls)
    seen.path("c2", 1).write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"cannot be read .*delete it"):
        seen.get("c2", 1)


def test_a_disk_without_room_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(folder, tmp_path / "cache")
    seen = Observations(open_cache(tmp_path / "cache"), {}, lambda latent, start: latent)
    told = seen.announce({(0, 0), (1, 0)}, 10)
    assert "2 of the 2 observations" in told
    seen.get("c0", 0)
    assert "1 of the 2 observations" in seen.announce({(0, 0), (1, 0)}, 10)
    assert seen.announce({(0, 0)}, 10) == ""
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=module.DISK_MARGIN)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: nearly_full)
    with pytest.raises(UserError, match="free some space"):
        Observations(open_cache(tmp_path / "cache"), {"other": 1}, seen.observe).announce({(0, 0)}, 10)
    assert list(kept(tmp_path / "cache")) == [("c0", 0)]


def test_a_full_disk_later_on_is_a_sentence(folder, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(folder, tmp_path / "cache")

    def full(*rest, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mogan.data.cache.save_file", full)
    with pytest.raises(UserError, match="disk is full"):
        Observations(open_cache(tmp_path / "cache"), {}, lambda latent, start: latent).get("c0", 0)


def test_a_run_observes_what_it_draws_and_a_longer_one_the_rest(family, fresh, tmp_path, capsys):
    config = mogan()
    parts = build(config, family, fresh, tmp_path)
    assert not kept(fresh)  # training starts at once
    run_training(parts, tmp_path)
    made = kept(fresh)
    assert made.keys() == named(config, fresh)
    assert f"{len(made)} of the {len(made)} observations" in capsys.readouterr().out
    longer = config.with_budget(6)
    parts, count = build(longer, family, fresh, tmp_path), []
    observe = parts.observations.observe
    parts.objectives["gan"].observations = replace(
        parts.observations, observe=lambda *a: (count.append(1), observe(*a))[1]
    )
    run_training(parts, tmp_path)
    after = kept(fresh)
    assert after.keys() == named(longer, fresh) > made.keys()
    assert len(count) == len(after) - len(made)
    assert all(after[pair] == made[pair] for pair in made)
    shutil.rmtree(tmp_path / "checkpoints")
    parts = build(config, family, fresh, tmp_path)
    parts.objectives["gan"].observations = replace(parts.observations, observe=None)  # all is there
    run_training(parts, tmp_path)


def test_an_observation_depends_neither_on_its_company_nor_on_the_run(family, fresh, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(fresh, other)
    run_training(build(mogan(), family, fresh), tmp_path / "one")
    config = mogan()
    config = replace(config, seed=5, plan=tuple(replace(u, batch=4) for u in config.plan))
    run_training(build(config, family, other), tmp_path / "two")
    one, two = kept(fresh), kept(other)
    both = one.keys() & two.keys()
    assert both
    assert all(one[pair] == two[pair] for pair in both)


def test_another_precision_is_another_folder(family, fresh):
    one, two = (build(replace(mogan(), precision=p), family, fresh).observations.folder for p in ("fp32", "bf16"))
    assert one != two


def test_a_surrogate_learns_from_observations_made_on_the_spot(family, fresh):
    config = surrogate()
    parts = build(config, family, fresh)
    step(parts, Position(0, 0, 0, 0))
    assert kept(fresh).keys() <= named(config, fresh)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--context-parallel", "2")])
def test_two_processes_make_those_of_one(more, family, fresh, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(fresh, alone)
    run_training(build(mogan(), family, alone), tmp_path / "one")
    train_together(2, "mogan", family, fresh, tmp_path / "two", *more)
    one, two = kept(alone), kept(fresh)
    assert one.keys() == two.keys() == named(mogan(), fresh)
    assert one == two
    assert not list((fresh / "observations").rglob(".tmp-*"))


def write_often(path, byte):
    for _ in range(30):
        with replacing(path) as temporary:
            temporary.write_bytes(byte * 5000)


def test_several_processes_may_write_one_shared_file(tmp_path):
    path = tmp_path / "file"
    processes = [get_context("fork").Process(target=write_often, args=(path, b)) for b in (b"a", b"b", b"c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert path.read_bytes() in (b"a" * 5000, b"b" * 5000, b"c" * 5000)
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------- prompts of their own


@pytest.fixture
def prompts(family, cache, tmp_path):
    """A cache of prompts that no clip has as its caption."""
    from mogan.data.prepare_prompts import prepare_prompts
    from mogan.models.wan import load_text

    (tmp_path / "p.txt").write_text("a red square bouncing\na green circle falling\na white cross\n")
    facts = {k: v for k, v in json.loads((cache / "cache.json").read_text()).items() if k.startswith("t")}
    assert prepare_prompts(tmp_path / "p.txt", tmp_path / "prompts", facts, load_text(family / "teacher")) == 3
    return tmp_path / "prompts"


def without_captions(cache):
    entries = [json.loads(line) | {"caption": None} for line in (cache / "index.jsonl").read_text().splitlines()]
    (cache / "index.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def test_clips_without_captions_teach_motion_beside_prompts_of_their_own(
    family, fresh, prompts, tmp_path, monkeypatch, capsys
):
    from mogan.cli import main
    from mogan.training import steps

    without_captions(fresh)
    words = ["train", "tests.tiny_recipes:mogan", "--model", str(family / "teacher"), "--data", str(fresh)]
    words += ["--student", str(family / "student"), "--device", "cpu", "--out", str(tmp_path / "run")]
    heard, roll_out = [], steps.rolled_out
    monkeypatch.setattr(
        steps, "rolled_out", lambda p, u, batch, w: (heard.extend(batch.prompts), roll_out(p, u, batch, w))[1]
    )
    assert main([*words, "--prompts", str(prompts)]) == 0
    assert set(heard) == {"a red square bouncing", "a green circle falling", "a white cross"}
    assert json.loads((tmp_path / "run/run.json").read_text())["prompts"] == str(prompts)
    assert kept(fresh).keys() == named(mogan(), fresh)
    assert main([*words, "--iterations", "4"]) == 2  # captions again
    other = shutil.copytree(prompts, tmp_path / "other")
    (other / "index.jsonl").write_text((prompts / "index.jsonl").read_text().splitlines()[0] + "\n")
    assert main([*words, "--iterations", "4", "--prompts", str(other)]) == 2
    assert "prompts" in capsys.readouterr().err
    moved = prompts.rename(tmp_path / "moved")  # the same prompts elsewhere are the same
    assert main([*words, "--iterations", "4", "--prompts", str(moved)]) == 0


@pytest.mark.parametrize(
    ("recipe", "with_prompts", "message"),
    [
        ("mogan", False, "8 clips of .* have no caption .*student<dmd reads it.*--prompts"),
        ("flow_matching", False, "have no caption .*flow_matching<?.* reads it: prepare them with captions$"),
        ("flow_matching", True, "leave out --prompts"),
    ],
)
def test_captions_that_are_needed_are_asked_for(recipe, with_prompts, message, family, fresh, prompts):

    without_captions(fresh)
    config = getattr(tiny_recipes, recipe)()
    student = tiny_recipes.start(config, family)
    words = open_cache(prompts) if with_prompts else None
    with pytest.raises(UserError, match=message):
        assemble(
            config,
            open_cache(fresh),
            model=str(family / "teacher"),
            student=student,
            prompts=words,
            run=None,
            device="cpu",
        )


def test_who_compares_clips_with_the_students_on_one_caption_reads_the_clips_own(family, fresh, prompts):
    config, words = tiny_recipes.vdot(), open_cache(prompts)
    parts = assemble(
        config, open_cache(fresh), model=str(family / "teacher"), student=tiny_recipes.start(config, family),
        prompts=words, run=None, device="cpu",
    )  # fmt: skip
    captions = {entry["id"]: entry["caption"] for entry in parts.cache.entries}
    theirs = {entry["caption"] for entry in words.entries}
    for place, update in enumerate(config.plan):
        batch = draw(parts, Position(0, 1, place, 0))
        if config.lesson(update).captions:
            assert batch.prompts == [captions[name] for name in batch.ids]
        else:
            assert {*batch.prompts} <= theirs
    assert any(config.lesson(update).captions for update in config.plan)


def test_prompts_of_another_text_encoder_are_refused(family, fresh, prompts):
    facts = json.loads((prompts / "cache.json").read_text()) | {"text_encoder": "another"}
    (prompts / "cache.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="text_encoder another"):
        assemble(
            mogan(), open_cache(fresh), model=str(family / "teacher"), student=str(family / "student"),
            prompts=open_cache(prompts), run=None, device="cpu",
        )  # fmt: skip
