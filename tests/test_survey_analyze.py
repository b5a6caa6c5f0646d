"""From votes to a verdict: who is left out and why, what is said when there is little to say."""

import csv
import json
import sqlite3
from random import Random

import pytest

pytest.importorskip("starlette", reason="needs the extra `survey`")

from mogan.errors import UserError
from mogan.survey.analyze import analyze
from mogan.survey.app import to_side
from mogan.survey.ballots import from_side, read_votes
from mogan.survey.folder import read_survey
from mogan.survey.store import Store
from test_survey_study import DEVICE, WATCH, make_survey

TIES = {"motion": "tie", "quality": "tie", "text": "tie"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_survey(tmp_path_factory.mktemp("analyze"))


@pytest.fixture
def folder(built, tmp_path):
    (tmp_path / "survey.json").write_bytes((built / "survey.json").read_bytes())
    (tmp_path / "clips").symlink_to(built / "clips")
    return tmp_path


class Rater:
    """Answers every screen through the store: the known answer on checks, ``taste`` on pairs."""

    def __init__(self, folder, taste, *, seconds=20.0, claimed=None, attentive=True, shown=None, stop=99):
        survey = read_survey(folder)
        store = Store(folder, survey)
        items = {item.id: item for item in survey.items}
        now = 1000.0
        visit = store.open(None, {"PROLIFIC_PID": f"{Random().random()}"[2:]}, DEVICE, now)
        self.id = visit.rater
        for k, slot in enumerate(visit.slots[:stop]):
            item = items[slot.item]
            if item.systems:
                meant = {**TIES, **taste}
            else:
                meant = {**TIES, **item.expect} if attentive else dict.fromkeys(TIES, "second")
            sides = shown or {question: to_side(answer, slot.swapped) for question, answer in meant.items()}
            now += seconds
            watch = {**WATCH, "total_ms": int(1000 * (claimed or seconds))}
            assert store.vote(visit.rater, k, sides, watch, now)[0] == "new"
        store.close()


def test_sides_are_undone():
    for swapped in (False, True):
        for answer in ("first", "tie", "second"):
            assert from_side(to_side(answer, swapped), swapped) == answer
    assert from_side("left", False) == "first"
    assert from_side("left", True) == "second"


def test_careless_raters_are_left_out_by_the_rules_and_shown_beside(folder, capsys, monkeypatch):
    monkeypatch.setattr("mogan.survey.ballots.PAIRS_FOR_SIDE", 3)
    good = [Rater(folder, {"motion": "first"}) for _ in range(3)]
    asleep = Rater(folder, {"motion": "second"}, attentive=False)
    hasty = Rater(folder, {"motion": "second"}, seconds=1.0)
    faker = Rater(folder, {"motion": "second"}, seconds=1.0, claimed=60.0)
    lefty = Rater(folder, {}, shown=dict.fromkeys(TIES, "left"))
    results = analyze(folder)
    excluded = results["raters"]["excluded"]
    assert set(excluded) == {asleep.id, hasty.id, faker.id, lefty.id}
    assert excluded[asleep.id] == ["failed 2 of 2 attention checks"]
    assert excluded[hasty.id][0].startswith("median 1.0 s per pair")
    assert excluded[faker.id] == excluded[hasty.id]  # the server's clock counts, not the browser's
    assert any("on one side" in reason for reason in excluded[lefty.id])
    kept, everybody = (results[part]["comparisons"][0] for part in ("kept", "everybody"))
    assert kept["question"] == "motion"
    assert (kept["raters"], kept["votes"], kept["win"]["value"]) == (3, 9, 1)
    assert (everybody["raters"], everybody["votes"]) == (7, 21)
    assert everybody["win"]["value"] < 0.7
    assert results["kept"]["agreement"]["motion"]["alpha_nominal"] == 1
    told = capsys.readouterr().out
    assert "After exclusions: 9 votes by 3 raters" in told
    assert "Everybody: 21 votes by 7 raters" in told
    assert asleep.id in told
    rows = list(csv.DictReader((folder / "results" / "votes.csv").open()))
    assert {row["kept"] for row in rows if row["rater"] == good[0].id} == {"1"}
    assert {row["kept"] for row in rows if row["rater"] == hasty.id} == {"0"}
    assert len(rows) == 7 * 8 * 3
    assert [row["excluded"] == "" for row in csv.DictReader((folder / "results" / "raters.csv").open())].count(
        True
    ) == 3


def test_position_bias_is_found(folder):
    for _ in range(6):
        Rater(folder, {}, shown={"motion": "left", "quality": "tie", "text": "right"})
    results = analyze(folder)
    motion, quality = (results["everybody"]["position"][q] for q in ("motion", "quality"))
    assert motion["share_left"] == 1
    assert motion["left"] == 18
    assert motion["p"] == pytest.approx(2 / 2**6)  # of six raters, not of their three answers each
    assert (quality["share_left"], quality["p"]) == (None, 1)


def test_unfinished_visits_count_as_far_as_they_went_and_get_no_code(folder):
    Rater(folder, {"motion": "first"}, stop=5)
    results = analyze(folder)
    assert results["raters"]["finished"] == 0
    assert 0 < results["everybody"]["votes"] < 3
    assert "pairs have no vote yet" in " ".join(results["warnings"])
    assert [row["code"] for row in csv.DictReader((folder / "results" / "raters.csv").open())] == [""]


def test_the_same_votes_and_seed_give_the_same_numbers(folder):
    Rater(folder, {"motion": "first"})
    Rater(folder, {"text": "second"})
    assert analyze(folder) == analyze(folder, out=folder / "again")
    (folder / "again" / "results.json").write_text('{"systems": {}}')  # of `mogan evaluate`
    with pytest.raises(UserError, match="not what this command writes"):
        analyze(folder, out=folder / "again")


def test_metrics_are_held_against_the_votes(folder, tmp_path, capsys):
    Rater(folder, {"motion": "first"})
    names = read_survey(folder).systems
    prompts = {item.prompt for item in read_survey(folder).of_kind("pair")}
    clips = {
        name: [{"prompt": prompt, "index": 0, "values": {"flow_top5": float(-k)}} for prompt in prompts]
        for k, name in enumerate(names)
    }
    systems = {name: {"metrics": {}, "how": {}, "clips": clips[name]} for name in names}
    (tmp_path / "measured.json").write_text(json.dumps({"systems": systems}))
    results = analyze(folder, metrics=tmp_path / "measured.json")
    (row,) = results["metrics"]["motion"]
    assert (row["metric"], row["share"], row["votes"]) == ("flow_top5", 1.0, 3)
    assert results["metrics"]["quality"] == []  # all ties
    assert "Which number agrees with people" in capsys.readouterr().out
    assert json.loads((folder / "results" / "results.json").read_text())["metrics"]["motion"] == [row]


def test_it_reads_while_the_survey_is_served(folder):
    Rater(folder, {"motion": "first"})
    store = Store(folder, read_survey(folder))
    store.open(None, {}, DEVICE, 0.0)
    votes, raters = read_votes(folder, read_survey(folder))
    store.close()
    assert (len(votes), len(raters)) == (8, 2)


def test_one_prompt_gives_no_interval_and_nobody_kept_gives_no_numbers(tmp_path):
    folder = make_survey(tmp_path, per_rater=1)
    Rater(folder, {"motion": "first"}, attentive=False)
    results = analyze(folder)
    everybody = results["everybody"]["comparisons"][0]
    assert everybody["win"]["value"] == 1
    assert everybody["net"]["ci95"] is None
    assert everybody["detectable"] is None
    assert results["kept"]["comparisons"][0]["win"] is None
    assert any("exclude everybody" in warning for warning in results["warnings"])
    Rater(folder, {}, stop=0)  # who came and judged nothing breaks no rule
    assert any("exclude everybody" in warning for warning in analyze(folder)["warnings"])
    assert json.loads((folder / "results" / "results.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE votes SET answers = '{' WHERE slot = 3",
        "UPDATE votes SET answers = '[]' WHERE slot = 3",
        """UPDATE votes SET answers = '{"motion": "left"}' WHERE slot = 3""",
        """UPDATE votes SET answers = replace(answers, 'left', 'up')""",
        "UPDATE votes SET watch = '{}'",
        "UPDATE slots SET item = 'gone' WHERE slot = 2",
        "UPDATE raters SET device = 'x'",
        "UPDATE raters SET platform = '[1]'",
    ],
)
def test_votes_that_something_else_changed_are_not_counted(change, folder):
    Rater(folder, {}, shown={"motion": "left", "quality": "left", "text": "left"})
    with sqlite3.connect(folder / "votes.sqlite") as db:
        db.execute(change)
    db.close()
    with pytest.raises(UserError, match=r"votes.sqlite was changed by something else .*: restore it from a copy"):
        analyze(folder)


def test_votes_are_read_where_nothing_can_be_written_beside_them(folder, tmp_path):
    Rater(folder, {}, shown={"motion": "left", "quality": "left", "text": "left"})
    (folder / "votes.sqlite-shm").mkdir()  # a full or read-only disk, as SQLite sees it
    assert analyze(folder, out=tmp_path / "results")["raters"]["came"] == 1


def test_a_full_disk_does_not_make_votes_damaged(folder, monkeypatch):
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    Store(folder, read_survey(folder)).close()
    monkeypatch.setattr("mogan.survey.ballots._open", lambda path: (_ for _ in ()).throw(error))
    with pytest.raises(
        UserError, match=r"votes.sqlite cannot be read where it lies .*: free some space on its disk, or copy"
    ):
        analyze(folder)


def test_mistakes_are_told_in_one_sentence(folder):
    with pytest.raises(UserError, match="has no votes yet"):
        analyze(folder)
    Store(folder, read_survey(folder)).close()
    with pytest.raises(UserError, match="Nobody has judged"):
        analyze(folder)
    (folder / "votes.sqlite").write_bytes(b"not a database, but long enough to look at" * 10)
    with pytest.raises(UserError, match="cannot be read"):
        analyze(folder)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(folder, read_survey(folder))
