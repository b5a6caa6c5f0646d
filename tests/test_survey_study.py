"""A whole study by script, and the helpers that the other tests of the survey share."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `survey`")

from starlette.testclient import TestClient

from mogan.data.video import write_video
from mogan.survey.analyze import analyze
from mogan.survey.app import make_app
from mogan.survey.build import build
from mogan.survey.folder import read_survey
from mogan.survey.store import Store

NAMES = ("zebrafish", "quagga")
PROMPTS = ("a red ball bounces", "snow falls over mountains", "two dogs run along the beach")
DEVICE = {
    "screen_width": 1280,
    "screen_height": 800,
    "window_width": 1280,
    "window_height": 700,
    "pixel_ratio": 2,
    "refresh_hz": 60,
    "colour_bits": 24,
    "touch": 0,
}
WATCH = {
    "total_ms": 30_000,
    "locked_ms": 1000,
    "plays": 3,
    "replays": 0,
    "pauses": 0,
    "half_speed": 0,
    "steps": 2,
    "hidden": 0,
    "changed": 0,
}


def make_clip(path: Path, seed: int, size: int = 64, frames: int = 12, fps: float = 16.0) -> None:
    """A texture that slides: it moves enough for frozen and shuffled checks."""
    texture = np.random.default_rng(seed).integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    write_video(path, np.stack([np.roll(texture, 3 * k, axis=1) for k in range(frames)]), fps)


def make_folders(root: Path, names: tuple[str, ...] = NAMES, prompts: tuple[str, ...] = PROMPTS, **clip) -> list[str]:
    """One folder of clips per system, VBench names; returns NAME=FOLDER."""
    for n, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for p, prompt in enumerate(prompts):
            make_clip(root / name / f"{prompt}-0.mp4", 10 * p + n, **clip)
    return [f"{name}={root / name}" for name in names]


def make_survey(root: Path, names: tuple[str, ...] = NAMES, **options) -> Path:
    """A built survey folder."""
    build(tuple(make_folders(root, names)), out=root / "survey", **options)
    return root / "survey"


def enter(client: TestClient, **platform: str) -> dict:
    """A new visit; later calls of this client carry its token."""
    reply = client.post("/api/visit", json={"consent": True, "platform": platform, "device": DEVICE})
    assert reply.status_code == 200, reply.text
    client.headers["authorization"] = f"Bearer {reply.json()['token']}"
    return reply.json()


def ballot(slot: int, motion: str = "left", quality: str = "tie", text: str = "right", **watch: float) -> dict:
    """The body of a vote."""
    return {"slot": slot, "answers": {"motion": motion, "quality": quality, "text": text}, "watch": {**WATCH, **watch}}


def knowing(folder: Path, visit: dict, k: int, prefer: str, generator: Random) -> dict:
    """What somebody would press who sees which system is which: prefers one, passes every check, ties quality."""
    screen = visit["screens"][k]
    left, right = (screen[side].removeprefix("/clips/") for side in ("left", "right"))
    survey = read_survey(folder)
    for item in survey.items:
        if {item.first, item.second} == {left, right} and (item.kind == "practice") == screen["practice"]:
            break
    swapped = item.second == left
    if item.systems:
        better = (
            "tie" if prefer not in item.systems else ("left" if (item.systems[0] == prefer) != swapped else "right")
        )
        return ballot(k, better, "tie", generator.choice(("left", "tie", "right")))
    known = {q: {"first": "right" if swapped else "left", "tie": "tie"}[a] for q, a in item.expect.items()}
    return ballot(k, **{"motion": "tie", "quality": "tie", "text": "tie", **known})


def test_a_whole_study_by_script_finds_the_system_that_raters_prefer(tmp_path, monkeypatch):
    folder = make_survey(tmp_path, ("quagga", "zebrafish", "okapi"), raters=4, completion_code="DONE-1")
    clock = iter(range(0, 10_000_000, 20))
    monkeypatch.setattr("mogan.survey.app.time.time", lambda: float(next(clock)))
    generator = Random(0)
    for k in range(4):
        with TestClient(make_app(folder)) as client:
            visit = enter(client, PROLIFIC_PID=f"p{k}", STUDY_ID="s", SESSION_ID="x")
            pairs = [screen for screen in visit["screens"] if not screen["practice"]]
            assert len(pairs) == 9 + 2
            for slot in range(len(visit["screens"])):
                reply = client.post("/api/vote", json=knowing(folder, visit, slot, "zebrafish", generator))
                assert reply.json()["done"] == slot + 1
            assert reply.json()["code"] == "DONE-1"
            assert reply.json()["back"] == "https://app.prolific.com/submissions/complete?cc=DONE-1"
    results = analyze(folder)
    part = results["kept"]
    assert (part["raters"], part["votes"]) == (4, 36)
    assert results["raters"] == {"came": 4, "finished": 4, "excluded": {}}
    motion = {(c["first"], c["second"]): c for c in part["comparisons"] if c["question"] == "motion"}
    assert motion["quagga", "zebrafish"]["lose"]["value"] == 1
    assert motion["zebrafish", "okapi"]["net"] == {"value": 1, "ci95": [1, 1]}
    assert motion["quagga", "okapi"]["tie"]["value"] == 1
    assert part["agreement"]["motion"]["alpha_nominal"] == 1
    assert part["ranking"]["motion"]["systems"][0]["system"] == "zebrafish"
    assert [one["rank"] for one in part["ranking"]["motion"]["systems"]] == [1, 2, 2]
    written = {path.name for path in (folder / "results").iterdir()}
    assert written == {"results.json", "table.md", "votes.csv", "raters.csv", "figure.png"}
    assert json.loads((folder / "results" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (folder / "results" / "raters.csv").stat().st_mode & 0o077 == 0
    assert "p3" not in (folder / "results" / "votes.csv").read_text()
    assert "p3" in (folder / "results" / "raters.csv").read_text()


def test_every_item_gets_equally_many_raters_and_both_sides(tmp_path):
    folder = make_survey(tmp_path, ("quagga", "zebrafish", "okapi"), per_rater=3, raters=2)
    survey = read_survey(folder)
    store = Store(folder, survey)
    shown: dict[str, list[bool]] = {}
    for _ in range(12):
        for slot in store.open(None, {}, DEVICE, 0.0).slots:
            if slot.kind == "pair":
                shown.setdefault(slot.item, []).append(slot.swapped)
    store.close()
    assert {len(sides) for sides in shown.values()} == {4}
    assert {sum(sides) for sides in shown.values()} == {2}


def test_what_left_visits_took_is_given_out_again(tmp_path):
    folder = make_survey(tmp_path, per_rater=1)
    store = Store(folder, read_survey(folder))
    first = [slot.item for slot in store.open(None, {}, DEVICE, 0.0).slots if slot.kind == "pair"]
    later = 3 * 3600.0
    again = [slot.item for _ in range(3) for slot in store.open(None, {}, DEVICE, later).slots if slot.kind == "pair"]
    store.close()
    assert sorted(again) == sorted({item.id for item in read_survey(folder).of_kind("pair")})
    assert first[0] in again
