"""Which metric agrees with people: shares with known answers, and what the table says."""

import json
from random import Random

import numpy as np
import pytest

from mogan.errors import UserError
from mogan.survey.ballots import Vote
from mogan.survey.folder import Item
from mogan.survey.metrics import agreement, agreement_markdown, read_values


def vote(prompt: int, answer: str, rater: str = "r", kind: str = "pair") -> Vote:
    item = Item(f"i{prompt}", "pair", f"p{prompt}", "x", "y", 0, systems=("a", "b"))
    return Vote(rater, kind, item, False, {"motion": answer}, {}, 1.0, {})


def values_of(gaps: dict[str, list[float | None]]) -> dict:
    """Values such that a minus b is the gap, per prompt."""
    values = {}
    for p in range(len(next(iter(gaps.values())))):
        values["a", f"p{p}", 0] = {name: None if gap[p] is None else 1.0 + gap[p] for name, gap in gaps.items()}
        values["b", f"p{p}", 0] = dict.fromkeys(gaps, 1.0)
    return values


def rows_of(votes, gaps):
    return {row["metric"]: row for row in agreement(votes, values_of(gaps), "motion", 0)}


def test_a_metric_that_always_agrees_never_agrees_or_says_nothing():
    votes = [vote(p, "first" if p % 2 else "second") for p in range(20)]
    sides = [1.0 if p % 2 else -1.0 for p in range(20)]
    found = rows_of(
        votes,
        {
            "flow_top5": sides,
            "motion_smoothness": [-s for s in sides],
            "warping_error": [-s for s in sides],  # lower is better
            "dynamic_degree": [0.0] * 20,
        },
    )
    assert (found["flow_top5"]["share"], found["flow_top5"]["ci95"]) == (1.0, [1.0, 1.0])
    assert (found["motion_smoothness"]["share"], found["warping_error"]["share"]) == (0.0, 1.0)
    assert (found["warping_error"]["prefers"], found["flow_top5"]["prefers"]) == ("lower", "higher")
    assert (found["dynamic_degree"]["share"], found["dynamic_degree"]["undecided"]) == (0.5, 1.0)
    assert list(found)[-1] == "dynamic_degree"  # the least telling is last


def test_ties_repeats_checks_and_clips_not_measured_do_not_count():
    votes = [vote(0, "first"), vote(1, "tie"), vote(2, "second"), vote(3, "first"), vote(0, "second", kind="repeat")]
    found = rows_of(votes, {"flow_top5": [1.0, 1.0, 1.0, None]})["flow_top5"]
    assert (found["votes"], found["share"]) == (2, 0.5)
    assert agreement([vote(9, "first")], values_of({"flow_top5": [1.0]}), "motion", 0) == []


def test_one_prompt_has_no_interval_and_copies_of_a_vote_narrow_none():
    assert rows_of([vote(0, "first")], {"flow_top5": [1.0]})["flow_top5"]["ci95"] is None
    rng = np.random.default_rng(0)
    sides = [1.0 if x < 0.7 else -1.0 for x in rng.random(40)]
    once = [vote(p, "first") for p in range(40)]
    one, five = rows_of(once, {"flow_top5": sides}), rows_of(once * 5, {"flow_top5": sides})
    assert one["flow_top5"]["ci95"] == pytest.approx(five["flow_top5"]["ci95"])
    assert five["flow_top5"]["votes"] == 200
    share = np.mean(np.array(sides) > 0)
    naive = 1.96 * np.sqrt(share * (1 - share) / 40)
    low, high = one["flow_top5"]["ci95"]
    assert (high - low) / 2 == pytest.approx(naive, rel=0.2)


def test_a_random_metric_has_an_interval_around_one_half():
    random = Random(0)
    votes = [vote(p, random.choice(("first", "second")), f"r{k}") for p in range(40) for k in range(5)]
    low, high = rows_of(votes, {"flow_top5": [random.gauss(0, 1) for _ in range(40)]})["flow_top5"]["ci95"]
    assert low < 0.5 < high


def test_the_table_says_the_share_the_interval_and_how_many():
    row = {"metric": "flow_top5", "prefers": "higher", "share": 0.75, "ci95": [0.6, 0.9], "votes": 8, "undecided": 0.25}
    text = agreement_markdown({"motion": [row], "text": []}, {"motion": "Motion", "text": "Match"})
    assert "| Flow, top 5 % (per 1/8 s at 256 px) ↑ | 75 [60, 90], n 8 | - | 25 |" in text
    assert "| - | 75 [60, 90], n 8 | 25 |" in agreement_markdown(
        {"motion": [], "text": [row]}, {"motion": "Motion", "text": "Match"}
    )
    assert "No voted pair was measured" in agreement_markdown({"motion": []}, {"motion": "Motion"})


def test_results_of_other_systems_or_of_another_kind_are_refused(tmp_path):
    class Design:
        systems = ("a", "b")

    path = tmp_path / "results.json"
    clip = {"prompt": "p", "index": 0, "values": {"flow_top5": 1.0}}
    path.write_text(json.dumps({"systems": {"a": {"clips": [clip, {"prompt": "q", "index": 0, "error": "torn"}]}}}))
    with pytest.raises(UserError, match="no clips of b: evaluate under the survey's names"):
        read_values(path, Design)
    path.write_text(json.dumps({"systems": {"a": {"clips": [clip]}, "b": {"clips": [clip]}}}))
    assert read_values(path, Design) == {("a", "p", 0): {"flow_top5": 1.0}, ("b", "p", 0): {"flow_top5": 1.0}}
    for text in ("[]", "nonsense", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"is no results\.json"):
            read_values(path, Design)
