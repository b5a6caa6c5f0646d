"""A method that the package has never heard of, as docs/extending.md has it, does what the package's own do."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.recipes import find_recipe
from mogan.runs.checkpoint import latest_checkpoint, load_checkpoint, stored
from mogan.runs.watch import Watch
from mogan.training.assemble import assemble
from mogan.training.steps import Position, step

RECIPE = "latent_critic:critic_lab"
PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
CODE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture(scope="module", autouse=True)
def _written(tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("outside"), pytest.MonkeyPatch()
    (folder / "latent_critic.py").write_text(CODE)
    patch.syspath_prepend(folder)
    patch.chdir(folder)
    yield
    patch.undo()
    sys.modules.pop("latent_critic", None)


def train(family, cache, out, iterations):
    given = [RECIPE, "--data", cache, "--model", family / "teacher", "--out", out, "--iterations", iterations]
    return main(["train", *map(str, given), "--batch", "2", "--precision", "fp32", "--save-every", "1"])


def state(run):
    newest = latest_checkpoint(run)
    found = {name: torch.empty(shape) for name, shape in stored(newest).items()}
    load_checkpoint(newest, found)
    return found


@pytest.fixture(scope="module")
def run(family, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("critic") / "run"
    assert train(family, cache, out, 2) == 0
    return out


def test_it_takes_eighty_lines():
    assert sum(bool(line.strip()) for line in CODE.splitlines()) <= 80


def test_it_trains_and_goes_on_bit_for_bit(run, family, cache, tmp_path):
    for iterations in (1, 2):
        assert train(family, cache, tmp_path / "parts", iterations) == 0
    whole, parts = state(run), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(name.startswith("critic.layers") for name in whole)
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert {r["update"] for r in records} == {"student<dmd+critic", "fake_score<dmd", "critic<critic"}
    assert all("critic_gap" in r for r in records if r["update"] == "critic<critic")


def test_other_settings_are_another_run(run, family, cache, monkeypatch, capsys):
    import latent_critic

    heavier = lambda: latent_critic.replace(  # noqa: E731
        find_recipe(RECIPE).changed("critic", weight=0.2), iterations=3
    )
    monkeypatch.setattr(latent_critic, "heavier", heavier, raising=False)
    given = ["train", "latent_critic:heavier", "--data", cache, "--model", family / "teacher", "--out", run]
    assert main([*map(str, given), "--batch", "2", "--precision", "fp32"]) == 2
    assert "another critic" in capsys.readouterr().err


def test_each_network_gets_its_own_gradient(family, cache):
    config = find_recipe(RECIPE)
    parts = assemble(
        latent_critic_small(config), open_cache(cache), model=str(family / "teacher"), run=None, device="cpu"
    )
    for index, learns in ((0, "student"), (2, "critic")):
        before = {n: [p.clone() for p in network.parameters()] for n, network in parts.networks.items()}
        step(parts, Position(0, 0, index, 0))
        moved = {
            n
            for n, network in parts.networks.items()
            if any(not torch.equal(a, b) for a, b in zip(before[n], network.parameters(), strict=True))
        }
        assert moved == {learns}


def latent_critic_small(config):
    from mogan.training.steps import with_batch

    plan = tuple(with_batch(update, 2) for update in config.plan)
    return replace(config, plan=plan, precision="fp32", sample_prompts=0)


def test_it_has_a_price(family, capsys):
    assert main(["estimate", RECIPE, "--model", str(family / "teacher")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^critic +0 M", shown, re.MULTILINE)
    assert "student<dmd+critic" in shown
    assert "critic<critic" in shown


def test_it_is_watched():
    watch, said = Watch(find_recipe(RECIPE)), []
    for iteration in range(20):
        line = {"iteration": iteration, "update": "critic<critic", "loss": 1.0, "critic_gap": 9.0}
        said += watch.read(line)
    assert len(said) == 1
    assert said[0].startswith("the critic wins outright: its logits are 9.0 apart")


def test_a_plan_that_it_cannot_serve_is_refused_when_it_is_read():
    config = find_recipe(RECIPE)
    wrong = latent_critic_small(config).plan[0]
    with pytest.raises(ValueError, match="by critic learn student and critic, not 'fake_score'"):
        replace(config, plan=(replace(wrong, learns="fake_score", by="critic"),))


MISTAKES = {
    "leaves the critic learning": (
        "with frozen(critic):",
        "with torch.enable_grad():",
        r"student<dmd\+critic sends gradient into critic",
    ),
    "returns a loss alone": (
        "generator_loss(critic(rollout.sample_BCFHW)), {}",
        "generator_loss(critic(rollout.sample_BCFHW))",
        "returns no .loss, numbers",
    ),
    "lists no network": (
        ', {"critic": critic})\n\n    def price',
        ")\n\n    def price",
        "has no network 'critic' to learn",
    ),
    "lists no loss": (', "critic": critic_loss}', "}", "has a lesson and no loss for critic"),
    "takes a name that is taken": (
        '{"critic": critic})\n\n    def price',
        '{"critic": critic, "fake_score": critic})\n\n    def price',
        "names a network 'fake_score'",
    ),
    "misspells a kind of clip": ('("latent",)', '("latents",)', "clips of kind latent, observation, path, not latents"),
    "has words for a number that is none": ("{now:.1f}", "{value:.1f}", "may hold {first} and {now}"),
    "forgets a comma": ('clips=("latent",)', 'clips=("latent")', r"a lesson's clips: a tuple of str, .* not 'latent'"),
    "gives no clips": ('clips=("latent",)', "clips=None", "a lesson's clips: a tuple of str, .* not None"),
    "gives one alarm alone": ("alarms=(WINS,)", "alarms=(WINS)", "alarms: a tuple of Alarm"),
    "has no Lesson for a network": ('"student": Lesson()', '"student": ()', "lessons are a Lesson by the name"),
    "watches who does not learn": ('apart; lower its learning rate",', 'apart", learns="critc",', "updates of 'critc'"),
    "has a setting that is no JSON": (
        "width: int = 32",
        "width: object = torch.ones(2)",
        "objectives.critic.width is a Tensor",
    ),
    "has a setting that does not equal itself": ("= 0.1", '= float("nan")', "objectives.critic.weight is NaN"),
    "gives a class for settings": ('"critic": CriticConfig()', '"critic": CriticConfig', "objectives.critic is a type"),
    "logs what a record has": ('{"critic_gap": (real', '{"seconds": (real', "logs 'seconds', as the run or another"),
    "logs what is no number": (".detach().mean()}", ".detach()}", r"returns as 'critic_gap' a tensor of shape \(2,\)"),
    "has settings that nobody keeps": ("@dataclass(frozen=True, kw_only=True)\n", "", "settings are a dataclass"),
}


def test_two_objectives_of_an_update_log_under_names_of_their_own():
    from mogan.objectives import Objective
    from mogan.training.steps import judged

    def logging(name):
        return Objective(None, {"student": lambda *_: (torch.zeros(()), {name: torch.zeros(())})})

    assert set(judged([logging("gap"), logging("push")], "student", None, None, [])[1]) == {"gap", "push"}
    with pytest.raises(TypeError, match="logs 'gap', as the run or another objective"):
        judged([logging("gap"), logging("gap")], "student", None, None, [])


def test_an_alarm_that_nobody_can_hear_is_told_once():
    watch, said = Watch(find_recipe(RECIPE)), []
    for iteration in range(60):
        for update in ("student<dmd+critic", "critic<critic"):
            said += watch.read({"iteration": iteration, "update": update, "loss": 1.0, "critics_gap": 9.0})
    told = "an alarm of critic watches 'critic_gap', which no loss of it logs: did you mean 'critics_gap'?"
    assert said == [told]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_method_is_named(mistake, family, cache, tmp_path, monkeypatch, capsys):
    before, after, said = MISTAKES[mistake]
    assert before in CODE
    (tmp_path / "mistaken.py").write_text(CODE.replace(before, after))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mistaken", raising=False)
    given = ["mistaken:critic_lab", "--data", cache, "--model", family / "teacher", "--out", tmp_path / "run"]
    try:
        assert main(["train", *map(str, given), "--iterations", "1", "--batch", "2", "--precision", "fp32"]) == 2
        found = capsys.readouterr().err
    except TypeError as error:  # a bug in one's own code is a traceback, with a sentence
        found = str(error)
    assert re.search(said, found)


def test_another_kind_of_roll_out_is_another_run(run, family, cache, monkeypatch, capsys):
    import latent_critic

    from mogan.sampling.rollout import FewStep

    monkeypatch.setattr(
        latent_critic, "few", lambda: latent_critic.replace(find_recipe(RECIPE), rollout=FewStep()), raising=False
    )
    given = ["latent_critic:few", "--data", cache, "--model", family / "teacher", "--out", run, "--iterations", "3"]
    assert main(["train", *map(str, given), "--batch", "2", "--precision", "fp32"]) == 2
    assert "another rollout" in capsys.readouterr().err


def test_its_student_is_exported_and_reported(run, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "student")]) == 0
    assert (tmp_path / "student" / "model_index.json").is_file()
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "critic" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_the_command_finds_it_in_the_folder_where_one_works(family, cache, tmp_path):
    (tmp_path / "latent_critic.py").write_text(CODE)
    given = [
        RECIPE,
        "--data",
        cache,
        "--model",
        family / "teacher",
        "--out",
        "run",
        "--iterations",
        "1",
        "--batch",
        "2",
    ]
    command = [sys.executable, "-W", "ignore", "-m", "mogan", "train", *map(str, given)]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
