"""Tools that measure what other methods' papers claim: what they print where it is known."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import CAPTIONS, SIGMAS
from mogan.config import EULER
from mogan.data.cache import open_cache
from mogan.exchange.export import save_student
from mogan.models.wan import load_transformer
from mogan.sampling.trajectories import trajectories
from mogan.world.scenes import Scene, make_scene, render


def tool(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / f"{name}.py")))


# ------------------------------------------------------------------------------------------------ following a teacher


def test_a_student_that_steps_as_its_teacher_did_ends_at_the_same_clips(family, tmp_path):
    here, folder = tool("accvideo_follow"), family / "teacher"
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:2]))
    trajectories(
        prompts=tmp_path / "prompts.txt", out=tmp_path / "store", model=str(folder), seeds=2, first_seed=50, steps=3,
        guidance=1.0, shift=3.0, negative_prompt="", precision="fp32", device="cpu",
    )  # fmt: skip
    same = load_transformer(folder)
    save_student(same, folder, tmp_path / "same", SIGMAS, torch.float32, card="a test", solver=EULER)
    store = open_cache(tmp_path / "store")
    prompts = {caption: [e for e in store.entries if e["caption"] == caption] for caption in CAPTIONS[:2]}
    ends = {c: torch.stack([store.path_to(e["id"], (0.0,))[0].float() for e in some]) for c, some in prompts.items()}
    followed = here.made_by(str(tmp_path / "same"), store, prompts)
    assert list(followed) == [""]
    noisy = here.made_by(str(family / "student"), store, prompts)  # the same weights, fresh noise between steps
    assert list(noisy) == ["", ", first step alone"]
    for caption, end in ends.items():
        torch.testing.assert_close(followed[""][caption], end, atol=4e-3, rtol=0)  # as the store rounds
        assert all(here.rms(a, b) > 0.3 for a, b in zip(noisy[""][caption], end, strict=True))
    store.entries[0]["seed"] += 1
    with pytest.raises(AssertionError, match="other noise"):
        here.made_by(str(tmp_path / "same"), store, prompts)


def test_distance_from_the_teacher_is_0_of_its_own_clips_and_known_of_shifted_ones():
    here, rng = tool("accvideo_follow"), np.random.default_rng(0)
    latents, paths = torch.from_numpy(rng.normal(size=(3, 4, 5, 8, 8))), rng.uniform(0, 64, (3, 17, 2))
    teacher = here.Clips(latents, np.zeros(0), paths)
    own, others, nearest, path, path_others, found = here.followed(teacher, teacher).T
    assert not own.any()
    assert not path.any()
    assert others.mean() == pytest.approx(1)
    assert path_others.min() > 10
    assert (nearest == 1).all()
    assert (found == 1).all()
    shifted, lost = paths + np.array([3.0, 4.0]), np.arange(17) >= 9
    shifted[0, ~lost] = np.nan  # found in 8 frames of 17: too few to say
    shifted[1, lost] = np.nan
    made = here.Clips(latents.mean(0, keepdim=True).expand_as(latents), np.zeros(0), shifted)
    own, others, _, path, _, found = here.followed(made, teacher).T
    np.testing.assert_allclose(path, [np.nan, 5, 5])
    np.testing.assert_allclose(found, [8 / 17, 9 / 17, 1])
    np.testing.assert_allclose([own.mean(), others.mean()], 3**-0.5, rtol=0.02)  # a mean of three, near to all alike


# ------------------------------------------------------------------------------------------------ variety


def moved(scene: Scene, degrees: float, speed: float, x: float) -> np.ndarray:
    """The scene's clip with its thing at ``(x, 30)`` at half time, in constant motion."""
    way = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]) * speed
    centres = np.array([x, 30.0]) + (np.arange(scene.frames) - scene.frames // 2)[:, None] * way
    return render(replace(scene, sprites=(replace(scene.sprites[0], centres_F2=centres, radius=7.0),)))


def test_variety_is_0_of_equal_clips_and_the_deviation_of_those_that_differ_by_a_known_one():
    here = tool("variety")
    scenes = (make_scene(31, number, motion="rich") for number in range(99))
    scene = next(scene for scene in scenes if scene.kind == "linear" and len(scene.sprites) == 1)
    one, two = (here.seen(moved(scene, *how), scene.caption) for how in ((170, 0.8, 28), (-170, 1.2, 36)))
    unit = np.ones(40)
    assert here.varied([one, one, one], unit) == [0, 0, 0, 0, 1]
    place, direction, speed, look, found = here.varied([one, two], unit)
    assert place == pytest.approx(8 / 2**0.5, abs=0.2)
    assert direction == pytest.approx(20 / 2**0.5, abs=1)  # the short way round
    assert speed == pytest.approx(0.4 / 2**0.5, abs=0.02)
    assert look > 0
    assert found == 1
    gone = one | {"place": np.full(2, np.nan), "angle": np.full(1, np.nan), "speed": np.full(1, np.nan)}
    with_gone = here.varied([one, two, gone], unit)
    assert with_gone[:3] == [place, direction, speed]
    assert with_gone[4] == pytest.approx(2 / 3)
    assert np.isnan(here.varied([one, gone], unit)[:3]).all()
    spinning = scene.caption.split(" moving")[0] + " spinning"
    assert np.isnan(here.seen(moved(scene, 0, 1, 30), spinning)["angle"])


def test_the_deviation_of_directions_drawn_at_random_is_that_of_the_docstring():
    here = tool("variety")
    angles = np.random.default_rng(0).uniform(-np.pi, np.pi, (400, 1))
    assert np.degrees(here.deviation(list(angles), here.turned)) == pytest.approx(73.5, abs=1)
    numbers = np.random.default_rng(0).normal(size=(50, 1))
    assert here.deviation(list(numbers)) == pytest.approx(numbers.std(ddof=1))


# ------------------------------------------------------------------------------------------------------------- curves


def test_curves_show_columns_or_how_they_differ_from_others(tmp_path, monkeypatch, capsys):
    value = lambda mean: {"lab_net": {"mean": mean, "ci95": [mean - 0.25, mean + 0.25], "n": 8}}  # noqa: E731
    systems = {"base": {"metrics": value(1.0)}}
    for name, mean in {"a": 1.5, "b": 2.0}.items():
        systems[name] = {"metrics": value(mean), "minus_base": value(mean - 1)}
    (tmp_path / "r.json").write_text(json.dumps({"systems": systems}))
    given = ["curves.py", str(tmp_path / "r.json"), "--at", "1", "2", "--metrics", "lab_net"]
    for more, rows in {
        ("--line", "one=a,b", "--line", "other=base"): [
            "| one | 1 | 1.500 [1.250, 1.750] |", "| one | 2 | 2.000 [1.750, 2.250] |", "| other |  | 1.000 [0.750, 1.250] |",
        ],
        ("--line", "one=a,b", "--minus", "base", "--figure", str(tmp_path / "f.png")): [
            "| one | 1 | +0.500 [+0.250, +0.750] |", "| one | 2 | +1.000 [+0.750, +1.250] |",
        ],
    }.items():  # fmt: skip
        monkeypatch.setattr("sys.argv", [*given, *more])
        tool("curves").main()
        assert capsys.readouterr().out.splitlines()[2:] == rows
    assert (tmp_path / "f.png").stat().st_size > 1000
