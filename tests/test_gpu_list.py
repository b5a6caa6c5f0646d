"""`make gpu`'s list of parts: one that fails, hangs or comes too late takes nothing from the others. On a CPU, with parts of our own."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GOOD = """
import json, pathlib, sys
row = {"what": "student<dmd", "recipe": "r", "clip": [5, 8, 8], "lora": None, "compiled": False, "loss": 1.0, "seconds": 2.0,
       "peak": 3e9, "time": 2}
found = {"device": "a card", "torch": "2", "rows": [row]}
pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
"""
PARTS = {
    "good": GOOD,
    "fails": GOOD + "\nraise ValueError('no such kernel')",
    "hangs": GOOD + "\nimport time\ntime.sleep(60)",
    "dies": "import os\nos.abort()",
    "late": "raise SystemExit('should not run')",
    "last": GOOD,
}


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def found(gpu, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    least = {"late": 1e9}
    parts = [gpu.Part(name, 1.0, least.get(name, 0.0), 2.0 if name == "hangs" else 30.0) for name in PARTS]

    def command(name, repeat):
        return [sys.executable, "-c", PARTS[name], str(work / "results" / f"{name}.json")]

    run = gpu.Run(parts, work, work / "out.json", 600.0, command)
    run.all()
    return json.loads((work / "out.json").read_text())


def test_what_a_part_measured_is_kept_however_it_ends(found):
    assert [name for name, part in found["parts"].items() if part["rows"]] == ["good", "fails", "hangs", "last"]


def test_reasons_are_one_line(found):
    failed = {name: part["failed"] for name, part in found["parts"].items() if "failed" in part}
    assert failed["fails"] == "ValueError: no such kernel"
    assert failed["hangs"] == "stopped after 2 s"
    assert failed["dies"]
    assert len(failed) == 3


def test_a_part_without_time_is_skipped_and_said(gpu, found):
    assert found["skipped"] == ["late"]
    assert "No time was left for `late`." in gpu.tables(found)


def test_the_tables_show_rows_and_reasons(gpu, found):
    text = "\n".join(gpu.tables(found))
    assert text.count("| `r` | 5 x 8 x 8 | student<dmd | 2.00 | - | 3.0 | - | - |") == 4
    assert "`fails`: ValueError: no such kernel" in text


def test_an_estimate_stands_beside_what_was_measured(gpu, found):
    step = {"label": "student<dmd", "seconds": 1.5, "peak": 2.5e9, "model_flops": 1e12}
    predicted = {"bf16": 1e12, "r 5x8x8 lora 0": {"steps": [step]}}
    text = "\n".join(gpu.tables(found | {"predicted": predicted}))
    assert "| 2.00 | 1.50 | 3.0 | 2.5 | 50% |" in text


def test_parts_of_an_earlier_run_stay_where_this_one_has_none(gpu, tmp_path, found):
    file = tmp_path / "results" / "good.json"
    file.parent.mkdir()
    file.write_text('{"rows": []}')
    merged = gpu.Run((), tmp_path, tmp_path / "out.json", 1.0, lambda name, repeat: [], found).merge()
    assert merged["parts"] == found["parts"]  # of parts that are not ours nothing is read
    file.rename(file.with_name("card.json"))
    merged = gpu.Run((), tmp_path, tmp_path / "out.json", 1.0, lambda name, repeat: [], found).merge()
    assert list(merged["parts"]) == ["card", *found["parts"]]


def test_the_page_changes_between_the_markers_alone(gpu, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- make gpu writes below -->\nold\n<!-- make gpu wrote above -->\nafter\n")
    gpu.write_tables(page, ["new"])
    assert page.read_text() == "before\n<!-- make gpu writes below -->\nnew\n<!-- make gpu wrote above -->\nafter\n"


def test_parts_are_chosen_by_name_in_their_own_order(gpu):
    assert [part.name for part in gpu.chosen("networks,card")] == ["card", "networks"]
    with pytest.raises(SystemExit, match="no part nets"):
        gpu.chosen("nets")


@pytest.mark.slow
def test_make_gpu_runs_dry_without_a_gpu(gpu, tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: `make gpu` measures it")
    page, work = tmp_path / "page.md", tmp_path / "work"
    page.write_text("<!-- make gpu writes below -->\nold\n<!-- make gpu wrote above -->\n")
    asked = ["--parts", "mogan,accvideo,penalty", "--work", str(work), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *asked])
    gpu.main()
    shown = capsys.readouterr().out
    for label in ("student<dmd", "fake_score<dmd", "student<gan", "discriminator<gan", "student<key_levels", "R1 at"):
        assert label in shown
    assert "Failed" not in shown
    assert "old" in page.read_text()  # a CPU writes no GPU table
    found = json.loads((work / "dry" / "gpu.json").read_text())
    assert all(part["done"] for part in found["parts"].values())
    said = found["predicted"]["mogan_wan_1_3b 49x64x64 lora 0"]["steps"]
    assert [s["label"] for s in said] == ["student<dmd", "fake_score<dmd", "student<gan", "discriminator<gan"]
