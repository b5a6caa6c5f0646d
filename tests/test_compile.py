"""Compiled blocks give the run that eager ones give, but for rounding. Slow: needs a C++ compiler."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from mogan.distributed import World
from mogan.errors import UserError
from mogan.models.denoiser import compile_blocks
from mogan.runs.checkpoint import check_same_run, latest_checkpoint, stored
from mogan.training.load import check_processes
from mogan.training.loop import resume, run_training
from test_distributed import assert_same_trajectory, train_alone, train_together
from test_train import build
from tiny_recipes import dmd, mogan

TOLERANCE = 1e-3  # relative; fp32, and a step's rounding is carried into the next
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")


def losses(config, family, cache, run):
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(asdict(config)))
    run_training(build(config, family, cache, run), run)
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "change"),
    [(mogan, {}), (mogan, {"checkpointing": True}), (dmd, {"lora": 3})],
    ids=["all weights", "recomputed", "adapters"],
)
def test_a_compiled_run_is_the_eager_run_and_each_resumes_the_other(recipe, change, family, cache, tmp_path):
    eager = replace(recipe(), iterations=2, save_every=1, **change)
    compiled = replace(eager, compile=True)
    torch._dynamo.reset()
    expected = losses(eager, family, cache, tmp_path / "eager")
    torch._dynamo.utils.counters.clear()
    found = losses(compiled, family, cache, tmp_path / "compiled")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert found == pytest.approx(expected, rel=TOLERANCE)
    names = [stored(latest_checkpoint(tmp_path / run)) for run in ("eager", "compiled")]
    assert names[0] == names[1]
    for run, other in (("eager", compiled), ("compiled", eager)):
        check_same_run(tmp_path / run, other)
        assert resume(build(other, family, cache), tmp_path / run) == 2


@needs_compiler
@pytest.mark.slow
def test_two_sharded_processes_that_compile_follow_the_eager_run_of_one(family, cache, tmp_path):
    before = train_alone(dmd(), family, cache, tmp_path / "one")
    train_together(2, "dmd", family, cache, tmp_path / "two", "--compile")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "two")


def test_a_machine_that_cannot_compile_is_told_what_is_missing(monkeypatch):
    def broken(function):
        raise RuntimeError("No working C++ compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"\(No working C\+\+ compiler found\).*leave --compile out"):
        compile_blocks([], torch.device("cpu"))


def test_shared_samples_are_not_compiled():
    world = World(torch.device("cpu"), ranks=2, sequence=object())
    with pytest.raises(UserError, match="does not go with --context-parallel"):
        check_processes(replace(dmd(), compile=True), world)
