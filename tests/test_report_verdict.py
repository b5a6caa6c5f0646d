"""What would change the verdict, against its own definition and closed forms."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mogan.evaluation.motion import dynamic_degree
from mogan.evaluation.sets import paired
from mogan.evaluation.statistics import mean_interval
from mogan.report.sources import Result
from mogan.report.verdict import (
    held_against,
    in_a_sentence,
    in_full,
    prompts_to_lose,
    prompts_to_win,
    threshold_table,
    verdicts,
)


def result(name: str, values, metric="flow_top5", **more) -> Result:
    clips = [{"prompt": f"p{k}", "index": 0, "values": {metric: value}, **more} for k, value in enumerate(values)]
    return Result(name, Path(), {}, {}, clips)


def test_differences_are_of_the_same_prompt_and_number():
    one, two = result("a", [1.0, 2.0, None, 4.0]), result("b", [1.5, 2.0, 7.0])
    assert paired(one.good, two.good, "flow_top5") == ([0.5, 0.0], ["p0", "p1"])
    assert paired(one.good, two.good, "lab_net") == ([], [])
    told = result("c", [1.0, 2.0], task="depth")  # a clip under another control is no partner
    assert paired(one.good, told.good, "flow_top5") == ([], [])
    assert paired(told.good, told.good, "flow_top5")[0] == [0.0, 0.0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("mean", [0.5, 0.7, 1.0])
def test_the_fewest_prompts_that_carry_a_difference_are_what_they_say(sign, mean):
    rng = np.random.default_rng(3)
    gaps = (sign * (rng.normal(0, 1, 30) + mean)).tolist()
    prompts = [f"p{k}" for k in range(30)]

    def clear(left_out):
        order = sorted(range(30), key=lambda k: -sign * gaps[k])[left_out:]
        low, high = mean_interval([gaps[k] for k in order], [prompts[k] for k in order]).ci95
        return low > 0 or high < 0

    assert clear(0)
    count, first = prompts_to_lose(gaps, prompts)
    assert first == prompts[int(np.argmax(sign * np.array(gaps)))]
    assert clear(count - 1)
    assert not clear(count)


def test_a_difference_that_every_prompt_has_outlives_leaving_any_out():
    assert prompts_to_lose([0.2] * 10, [f"p{k}" for k in range(10)]) == (None, "p0")


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # half of them are clear
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=3, max_size=24))
def test_leaving_prompts_out_ends_where_the_difference_is_lost_and_not_where_it_is_clear_the_other_way(gaps):
    prompts = [str(k) for k in range(len(gaps))]

    def low(left_out):
        out = sorted(range(len(gaps)), key=lambda k: -gaps[k])[:left_out]
        kept = [k for k in range(len(gaps)) if k not in out]
        return mean_interval([gaps[k] for k in kept], [prompts[k] for k in kept]).ci95[0]

    assume(low(0) > 0)
    count, _ = prompts_to_lose(gaps, prompts)
    if count is None:
        assert low(len(gaps) - 2) > 0
    else:
        assert low(count - 1) > 0 >= low(count)


def test_prompts_needed_follow_the_square_of_spread_over_difference():
    rng = np.random.default_rng(0)
    for count in (40, 160):
        gaps = rng.normal(0, 1, count)
        gaps += 0.1 - gaps.mean()
        expected = (1.96 * gaps.std() / 0.1) ** 2
        assert prompts_to_win(gaps.tolist(), list(range(count))) == pytest.approx(expected, rel=0.12)
    assert prompts_to_win([0.0, 0.0], ["a", "b"]) is None


def test_verdicts_in_words():
    rng = np.random.default_rng(0)
    base = rng.normal(5, 1, 30)
    first = result("first", base)
    sure, most, open_, same = (
        result("sure", base + 1 + rng.normal(0, 0.1, 30)),
        result("most", base + 1 + rng.normal(0, 1, 30)),
        result("open", base + rng.normal(0, 1, 30)),
        result("same", base),
    )
    pairs = [(other, first) for other in (sure, most, open_, same)]
    found = {v.system: v for v in verdicts(pairs, ["flow_top5", "lab_net"])}
    assert {v.base for v in found.values()} == {"first"}
    assert found["sure"].clear
    assert found["sure"].change == "clear even on the two prompts of 30 that favour it least"
    assert found["most"].clear
    assert found["most"].change.startswith("clear until the ")
    assert found["sure"].label == "Flow, top 5 %"
    assert not found["open"].clear
    assert found["open"].change.startswith("open; ")
    assert (found["same"].change, found["same"].difference) == ("no difference at all", "0 (0 to 0)")
    assert verdicts([], ["flow_top5"]) == []


def test_systems_are_held_against_their_bases_or_else_against_the_first():
    systems = [result(name, [1.0]) for name in "abcd"]

    def held(bases):
        return {one.name: [base.name for base in against] for one, against in held_against(systems, bases)}

    assert held({}) == {"b": ["a"], "c": ["a", "b"], "d": ["a", "c"]}
    assert held({"a": ("a",), "b": ("a",), "c": ("gone", "d", "b")}) == {"b": ["a"], "c": ["d", "b"], "d": ["a"]}
    assert held({"a": ("c",)})["a"] == ["c"]
    assert held_against(systems[:1], {}) == held_against([], {}) == []


def test_thresholds_use_the_rule_of_dynamic_degree():
    import torch

    def flow(video):
        field = torch.zeros(video.shape[0], 2, video.shape[2] - 1, *video.shape[3:])
        field[:, 0] = 2.0
        return field

    frames = [np.zeros((48, 80, 3), np.uint8)] * 9
    found = dynamic_degree(frames, 8, flow)
    assert found.decision
    clip = {"threshold": found.threshold, "pair_scores": list(found.scores)}
    (name, cells), (other, empty) = threshold_table([result("a", [1.0], **clip), result("b", [1.0])])
    assert (name, cells) == ("a", ["1", "1", "1", "1", "0"])  # 2 px against 1.125 px times a half to two
    assert (other, empty) == ("b", ["–"] * 5)
    assert threshold_table([result("b", [1.0])]) == []


METRICS = ("flow_top5", "lab_net", "lab_identity", "lab_shape", "lab_wobble", "saturation")


def system(name: str, **shift: float) -> Result:
    """Eight clips whose metrics are shifted by these; ``noise`` keeps net displacement open."""
    noise = shift.pop("noise", 0.0)
    base = dict.fromkeys(METRICS, 1.0)
    clips = [
        {"prompt": f"p{i}", "index": 0, "values": {m: v + shift.get(m, 0) + 0.01 * (-1) ** i for m, v in base.items()}}
        for i in range(8)
    ]
    for i, clip in enumerate(clips):
        clip["values"]["lab_net"] += 2 * noise * (-1) ** i
        clip["values"]["lab_shape"] += 0.2 * (shift.get("lab_shape", 0) != 0) * (-1) ** (i // 2)  # clear, but less firm
    return Result(name, Path(), {}, {}, clips)


def test_all_that_is_clear_tells_motion_better_and_worse_apart_and_leaves_out_what_is_open():
    other = system("b", flow_top5=-0.5, lab_identity=0.25, lab_wobble=0.125, saturation=1.0, noise=0.5)
    said = in_full(system("a"), other, METRICS)
    assert said == "against a: moves less (flow, top 5 % -0.5), better (identity kept +0.25), worse (wobble +0.125)"
    assert in_full(system("a"), system("c"), METRICS) == "against a: no difference is clear"
    elsewhere = Result("d", Path(), {}, {}, [{"prompt": "another", "index": 0, "values": {"flow_top5": 9.0}}])
    assert "nothing can be compared" in in_full(system("a"), elsewhere, METRICS)
    assert in_a_sentence(system("a"), elsewhere, METRICS).startswith("cannot be compared with a: no clips share")


@pytest.mark.parametrize(
    ("shifts", "sentence"),
    [
        ({}, "differs clearly from a in nothing"),
        ({"flow_top5": 0.5}, "moves more than a (flow, top 5 % +0.5); nothing else is clear"),
        (
            {"flow_top5": -0.5, "lab_identity": 0.25, "lab_shape": 0.5, "lab_wobble": 0.125, "saturation": 9.0},
            "moves less than a (flow, top 5 % -0.5), gains most in identity kept +0.25 and loses most in wobble +0.125",
        ),
        (
            {"lab_shape": -0.5},
            "moves neither clearly more nor clearly less than a, gains nothing else and loses most in shape agrees -0.5",
        ),
        (
            {"flow_top5": 0.5, "lab_net": -0.25, "lab_wobble": -0.5},
            "moves more than a by one measure (flow, top 5 % +0.5) and less by another (net displacement -0.25), "
            "gains most in wobble -0.5 and loses nothing clearly",
        ),
    ],
)
def test_a_sentence_names_motion_and_the_firmest_gain_and_loss(shifts, sentence):
    assert in_a_sentence(system("a"), system("b", **shifts), METRICS) == sentence
