"""The stopping rule on held-out motion: what is measured, when a run stops, which checkpoint its student is taken from."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_recipes
from mogan.data.cache import ensure_text, open_cache
from mogan.errors import UserError
from mogan.models.wan import load_text
from mogan.motion.pixel_flux import net_motion
from mogan.runs.checkpoint import checkpoints, held_out_motions, student_checkpoint, write_held_out_motions
from mogan.runs.generator import open_generator
from mogan.training import held_out as of_held_out
from mogan.training.assemble import assemble
from mogan.training.held_out import Gain
from mogan.training.loop import run_training
from tiny_recipes import flow_matching, mogan


def flow_of(fields):
    """These fields ``(1, 2, F-1, H, W)`` of two clips, a few pairs at a time."""
    return fields.expand(2, -1, -1, -1, -1).split((1, 4, 3), 2)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_what_moves_as_a_whole_gets_as_far_as_it_moves_and_what_shimmers_gets_nowhere(u, v):
    step = torch.tensor([u, v]).view(1, 2, 1, 1, 1).expand(1, 2, 8, 32, 32)
    torch.testing.assert_close(net_motion(flow_of(step)), torch.full((2,), (u * u + v * v) ** 0.5))
    to_and_fro = step * torch.tensor([1.0, -1.0] * 4).view(1, 1, 8, 1, 1)
    assert net_motion(flow_of(to_and_fro)).max() < 1e-5


def test_the_fastest_tenth_counts_and_points_are_carried_along():
    fields = torch.zeros(1, 2, 8, 32, 32)
    fields[:, 1, :, :, :4] = 1.0  # the left eighth falls: two of sixteen columns of points
    assert net_motion(flow_of(fields)) == pytest.approx([1.0, 1.0], abs=1e-5)
    fields = torch.zeros(1, 2, 8, 32, 32)
    fields[:, 0, :, :, 8:12] = 2.0  # points that a narrow stream takes leave it: no more than its width and a step
    assert net_motion(flow_of(fields))[0] * 8 <= 6


@pytest.fixture
def parts_of(family, cache, monkeypatch):
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))

    def build(run, config=None, **changes):
        config = replace(config or mogan(), **changes)
        student = tiny_recipes.start(config, family)
        run.mkdir(exist_ok=True)
        parts = assemble(
            config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu"
        )
        (run / "config.json").write_text(
            json.dumps({**vars(config), "plan": [], "optimizers": {}, "objectives": {}}, default=str)
        )
        (run / "run.json").write_text(tiny_recipes.places(config, family, cache, student))
        return parts

    return build


def test_of_prompts_that_processes_do_not_share_evenly_none_counts_twice(monkeypatch, parts_of, held_out, tmp_path):
    """Three prompts and two processes: the second makes the first prompt's clip, too, since both call the network as often."""
    parts = parts_of(tmp_path / "run")
    gain, made = Gain(tmp_path / "run", held_out, parts, 3), {}
    gain.prompts = 3 * gain.prompts[:1]  # numbers stand in for clips
    monkeypatch.setattr(of_held_out, "sample_student", lambda *given: torch.tensor(given[4]).float())
    monkeypatch.setattr(of_held_out, "net_motion", lambda pieces: pieces)
    monkeypatch.setattr(of_held_out, "flow_of_pieces", lambda pieces, flow: pieces)
    monkeypatch.setattr(of_held_out, "stream_video", lambda vae, latent: latent)
    for share in range(2):
        world = SimpleNamespace(
            device=parts.device,
            share=share,
            shares=2,
            mean=lambda sent, share=share: made.setdefault(share, torch.stack(sent)),
        )
        gain.measure(replace(parts, world=world))
    total, judged = (sum(float(sent[k]) for sent in made.values()) for k in range(2))
    assert (total, judged) == (0 + 1 + 2, 3)


@pytest.fixture(scope="module")
def held_out(family, cache, tmp_path_factory):
    """A cache of prompts, one of which is trained on."""
    folder = tmp_path_factory.mktemp("held-out")
    prompts = ["a red circle moving left", "a blue cross bouncing", "a green circle falling"]
    facts = json.loads((cache / "cache.json").read_text()) | {"contents": "prompts"}
    (folder / "cache.json").write_text(json.dumps(facts))
    (folder / "index.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "caption": p}) + "\n" for i, p in enumerate(prompts))
    )
    ensure_text(folder, ["", *prompts], load_text(family / "teacher"))
    return folder


@given(st.lists(st.integers(0, 4), max_size=8), st.integers(1, 3))
def test_the_gain_is_over_when_the_last_checks_bring_nothing_new(motions, patience):
    before, last = motions[:-patience], motions[-patience:]
    expected = bool(before) and max(before) >= max(last)
    assert over(motions, patience) == expected


def over(motions, patience):
    gain = object.__new__(Gain)
    gain.patience = patience
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mogan.training.held_out.held_out_motions", lambda run: dict(enumerate(motions)))
        gain.run = None
        return gain.over


def test_the_averaged_student_is_judged_on_prompts_no_update_sees_always_with_the_same_noise(
    parts_of, held_out, tmp_path
):
    parts = parts_of(tmp_path / "run")
    gain = Gain(tmp_path / "run", held_out, parts, 3)
    assert gain.prompts == ["a blue cross bouncing", "a green circle falling"]
    live = {k: v.clone() for k, v in parts.student.transformer.state_dict().items()}
    first = gain.measure(parts)
    torch.rand(3)
    assert gain.measure(parts) == first
    assert all(torch.equal(v, live[k]) for k, v in parts.student.transformer.state_dict().items())
    for name, weight in parts.average.weights.items():
        parts.average.weights[name] = weight + 0.1
    assert gain.measure(parts) != first


def test_a_run_stops_when_motion_no_longer_rises_and_its_student_is_the_best_one(
    parts_of, held_out, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    measured = iter([0.3, 0.5, 0.4, 0.45, 9.0])
    monkeypatch.setattr(Gain, "measure", lambda self, parts: next(measured))
    parts = parts_of(run, iterations=6, save_every=1, keep=1)
    write_held_out_motions(run, {4: 7.0}, {})  # of a run that was killed before it saved
    run_training(parts, run, Gain(run, held_out, parts, 2))
    assert held_out_motions(run) == {1: 0.3, 2: 0.5, 3: 0.4, 4: 0.45}
    assert [path.name for path in checkpoints(run)] == ["000002", "000004"]
    assert student_checkpoint(run).name == "000002"
    said = capsys.readouterr().out
    assert "highest after iteration 2: 0.500 px/frame, after 4 0.450" in said
    again = parts_of(run, iterations=6, save_every=1, keep=1)
    run_training(again, run, Gain(run, held_out, again, 2))  # the same command: over is over
    assert len(held_out_motions(run)) == 4
    assert capsys.readouterr().out == said[said.index("motion on") :]
    best = open_generator(str(run)).average()
    stored = parts.average.weights
    assert any(not torch.equal(best[name], stored[name]) for name in best)


def test_motion_on_other_prompts_is_not_compared(parts_of, held_out, cache, tmp_path):
    run = tmp_path / "run"
    parts = parts_of(run)
    first = Gain(run, held_out, parts, 3)
    first.forget_after(0)
    assert not (run / "held_out.json").exists()  # nothing is written of a run that has measured nothing
    write_held_out_motions(run, {2: 0.5}, first.of)
    moved = tmp_path / "moved"
    shutil.copytree(held_out, moved)
    assert Gain(run, moved, parts, 3).prompts  # a cache that has moved holds the same prompts
    lines = (moved / "index.jsonl").read_text().splitlines(keepends=True)
    (moved / "index.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"other held-out prompts .*held-out.* then, of .*moved now"):
        Gain(run, moved, parts, 3)
    (run / "held_out.json").write_text('{"2": 0.5}')  # of an older run
    assert Gain(run, moved, parts, 3).said().startswith("motion on 1 held-out prompts was highest after iteration 2")


def test_without_held_out_prompts_the_newest_checkpoint_is_the_student(parts_of, tmp_path):
    run = tmp_path / "run"
    parts = parts_of(run, iterations=2, save_every=1)
    run_training(parts, run)
    assert student_checkpoint(run).name == "000002"
    assert not (run / "held_out.json").exists()


@pytest.mark.parametrize(
    ("config", "patience", "prompts", "message"),
    [
        (None, 0, "held_out", "at least 1, not 0"),
        (None, 3, "cache", "has no prompt that .* lacks"),
        (flow_matching, 3, "held_out", "--held-out is for recipes with a flow network"),
    ],
)
def test_what_cannot_be_judged_is_refused(config, patience, prompts, message, parts_of, held_out, cache, tmp_path):
    parts = parts_of(tmp_path / "run", config and config())
    with pytest.raises(UserError, match=message):
        Gain(tmp_path / "run", {"held_out": held_out, "cache": cache}[prompts], parts, patience)
