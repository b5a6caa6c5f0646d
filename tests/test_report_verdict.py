"""What would change the verdict, against its own definition and closed forms."""

from pathlib import Path

import numpy as np
import pytest

from mogan.evaluation.motion import dynamic_degree
from mogan.evaluation.sets import paired
from mogan.evaluation.statistics import mean_interval
from mogan.report.sources import Result
from mogan.report.verdict import in_a_sentence, prompts_to_lose, prompts_to_win, threshold_table, verdicts


def result(name: str, values, metric="flow_top5", **more) -> Result:
    clips = [{"prompt": f"p{k}", "index": 0, "values": {metric: value}, **more} for k, value in enumerate(values)]
    return Result(name, Path(), {}, {}, clips)


def test_differences_are_of_the_same_prompt_and_number():
    one, two = result("a", [1.0, 2.0, None, 4.0]), result("b", [1.5, 2.0, 7.0])
    assert paired(one.good, two.good, "flow_top5") == ([0.5, 0.0], ["p0", "p1"])
    assert paired(one.good, two.good, "lab_net") == ([], [])


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
    found = {v.system: v for v in verdicts([first, sure, most, open_, same], ["flow_top5", "lab_net"])}
    assert found["sure"].clear
    assert found["sure"].change == "clear even on the two prompts of 30 that favour it least"
    assert found["most"].clear
    assert found["most"].change.startswith("clear until the ")
    assert found["sure"].label == "Flow, top 5 %"
    assert not found["open"].clear
    assert found["open"].change.startswith("open; ")
    assert (found["same"].change, found["same"].difference) == ("no difference at all", "0 (0 to 0)")
    assert verdicts([first], ["flow_top5"]) == []


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


def test_a_sentence_tells_motion_better_and_worse_apart_and_leaves_out_what_is_open():
    def system(name, **shift):
        base = {"flow_top5": 1.0, "lab_identity": 0.5, "lab_wobble": 0.5, "saturation": 0.2, "lab_net": 1.0}
        clips = [
            {
                "prompt": f"p{i}",
                "index": 0,
                "values": {m: v + shift.get(m, 0) + 0.01 * (-1) ** i for m, v in base.items()},
            }
            for i in range(8)
        ]
        for clip in clips[::2]:
            clip["values"]["lab_net"] += 2 * shift.get("noise", 0)
        for clip in clips[1::2]:
            clip["values"]["lab_net"] -= 2 * shift.get("noise", 0)
        return Result(name, None, {}, {}, clips)

    metrics = ("flow_top5", "lab_net", "lab_identity", "lab_wobble", "saturation")
    other = system("b", flow_top5=-0.5, lab_identity=0.25, lab_wobble=0.125, saturation=1.0, noise=0.5)
    said = in_a_sentence(system("a"), other, metrics)
    assert said == "against a: moves less (flow, top 5 % -0.5), better (identity kept +0.25), worse (wobble +0.125)"
    assert in_a_sentence(system("a"), system("c"), metrics) == "against a: no difference is clear"
    elsewhere = Result("d", None, {}, {}, [{"prompt": "another", "index": 0, "values": {"flow_top5": 9.0}}])
    assert "nothing can be compared" in in_a_sentence(system("a"), elsewhere, metrics)
