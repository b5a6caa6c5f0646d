"""What lies in examples/ runs."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.training.steps import Position, step
from test_outside_method import CODE
from test_train import build
from tiny_recipes import shrink

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path, monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    matplotlib.use("Agg")
    room: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), "notebooks are kept without outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), room)
    assert "student, 3 steps" in capsys.readouterr().out


@pytest.fixture
def found(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in ("latent_critic", "up_reward", "own_dataset"):
        sys.modules.pop(name, None)


def test_the_page_names_every_example():
    page = (EXAMPLES / "README.md").read_text()
    assert {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".ipynb")} == set(
        re.findall(r"\| \[(.*?)\]", page)
    )


def test_the_objective_is_that_of_docs_extending():
    """``tests/test_outside_method.py`` trains, resumes, prices and exports it."""
    assert (EXAMPLES / "latent_critic.py").read_text() == CODE


@pytest.mark.usefixtures("found")
def test_the_reward_favours_clips_in_which_things_rise(family, cache):
    import up_reward

    still = torch.zeros(1, 3, 9, 64, 64)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    rises, falls = still.clone(), still.clone()
    for frame in range(9):
        for video, height in ((rises, 48 - 3 * frame), (falls, 24 + 3 * frame)):
            video[0, 0, frame, (x - 32) ** 2 + (y - height) ** 2 < 64] = 1.0
    reward = up_reward.rising("cpu")
    assert reward(rises, [""]) > 2.0 > 1.0 > reward(falls, [""])

    config = shrink(up_reward.up_lab())
    weights = replace(config.objectives["dmd"].weights, standard=(0.0, 1.0))
    parts = build(config.changed("dmd", weights=weights), family, cache)
    numbers = step(parts, Position(seed=0, iteration=0, update=0, repeat=0))
    assert {"reward", "share"} <= numbers.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("found")
def test_the_data_set_is_prepared_and_trained_on(tmp_path, monkeypatch):
    import own_dataset

    own_dataset.main(tmp_path / "videos", clips=4)
    assert main(["prepare", str(tmp_path / "videos"), "--out", str(tmp_path / "cache")]) == 0
    data = open_cache(tmp_path / "cache")
    assert {entry["caption"] for entry in data.entries} == {f"a {c} circle bouncing" for c in ("red", "green", "blue")}
    given = ["train", "dmd_lab", "--data", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    assert main([*given, "--iterations", "1", "--batch", "2"]) == 0
