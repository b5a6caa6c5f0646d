"""The whole job, shortened: what `make demo` promises must be there and must fit together."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from mogan.data.video import read_video
from mogan.lab.demo import _forget_older_student


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-W", "ignore", "-m", "mogan", "demo", "--out", str(out)]
    command += ["--clips", "16", "--iterations", "1", "--prompts", "2", "--seeds", "1"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


@pytest.mark.parametrize(("of_run", "kept"), [(50, True), (150, False)])
def test_an_export_that_is_older_than_its_run_is_made_again(tmp_path, monkeypatch, of_run, kept):
    for folder, when in (("run", of_run), ("export", 100), ("samples/mogan", 100), ("samples/dmd", 100)):
        (tmp_path / folder).mkdir(parents=True)
        os.utime(tmp_path / folder, (when, when))
    monkeypatch.setattr("mogan.lab.demo.student_checkpoint", lambda run: run)
    _forget_older_student(tmp_path)
    assert (tmp_path / "export").exists() == (tmp_path / "samples" / "mogan").exists() == kept
    assert (tmp_path / "samples" / "dmd").exists()


@pytest.mark.slow
def test_it_leaves_report_results_and_export(demo):
    out, said = demo
    assert str(out / "report.html") in said
    systems = json.loads((out / "results.json").read_text())["systems"]
    assert {"teacher", "dmd", "mogan"} <= systems.keys()
    for name in ("teacher", "dmd", "mogan"):
        degree = systems[name]["metrics"]["dynamic_degree"]
        assert 0 <= degree["ci95"][0] <= degree["mean"] <= degree["ci95"][1] <= 1
        assert degree["n"] == 2
    page = (out / "report.html").read_text()
    assert "<video" in page


@pytest.mark.slow
def test_its_export_gives_the_sampled_frames_in_the_stock_pipeline(demo):
    out, _ = demo
    line = json.loads((out / "samples" / "mogan" / "samples.jsonl").read_text().splitlines()[0])
    pipe = WanPipeline.from_pretrained(out / "export")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(line["seed"])
    stock = pipe(
        line["prompt"],
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="np",
    ).frames[0]
    frames, fps = read_video(out / "samples" / "mogan" / line["file"])
    assert fps == 16
    assert np.abs(frames / 255.0 - stock).mean() < 0.02  # H.264 lies between them
