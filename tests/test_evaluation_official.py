"""Beside the package vbench, and with networks of look, from folders to results.json: another Python played by a script."""

import json
import sys

import numpy as np
import pytest
import torch

from mogan.data.video import write_video
from mogan.errors import UserError
from mogan.evaluation.cd_fvd import cd_fvd, noise_floor
from mogan.evaluation.evaluate import evaluate
from mogan.evaluation.official import check
from mogan.evaluation.sets import set_metrics
from mogan.evaluation.tools import gather_tools
from test_evaluation_backbones import dino_state, random_blocks  # noqa: F401

VBENCH = """
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "device of cpu" and full_info_dir.endswith("vbench/VBench_full_info.json")
        self.out = output_path
        os.makedirs(output_path)
    def evaluate(self, videos_path, name, dimension_list, mode):
        assert mode == "custom_input"
        files = sorted(os.listdir(videos_path), reverse=True)  # in no order of ours
        assert all(os.path.isfile(os.path.join(videos_path, f)) for f in files)
        print("dimensions", *dimension_list)
        if os.environ.get("FAKE_FAILS"):
            raise RuntimeError("no weights")
        def row(file, value):
            return {"video_path": os.path.join(videos_path, file), "video_results": value}
        values = {
            "dynamic_degree": lambda k: k == 1, "motion_smoothness": lambda k: 0.9 + k / 100,
            "temporal_flickering": lambda k: 0.5, "imaging_quality": lambda k: 70.0, "subject_consistency": lambda k: 1.0,
        }
        found = {d: [0.0, [row(f, values[d](int(f[:-4]))) for f in files]] for d in dimension_list}
        json.dump(found, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
"""


@pytest.fixture
def python(tmp_path):
    """A Python that has a vbench, and a torch that starts at once."""
    packages = tmp_path / "packages"
    (packages / "vbench").mkdir(parents=True)
    (packages / "vbench" / "__init__.py").write_text(VBENCH)
    (packages / "vbench-0.1.5.dist-info").mkdir()
    (packages / "vbench-0.1.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n"
    )
    (packages / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: False)\ndevice = 'device of {}'.format\n"
    )
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def write_clips(folder, count=3, frames=17, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        frame = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        write_video(folder / f"prompt {k}-0.mp4", np.repeat(frame[None], frames, 0), 8)
    return folder


def test_vbench_is_asked_about_the_same_clips_and_the_differences_are_kept(tmp_path, python, capsys):
    clips = write_clips(tmp_path / "still")
    out = tmp_path / "r.json"
    system = evaluate((clips,), out=out, flow="farneback", quick=True, lab=False, compare_vbench=python)["systems"][
        "still"
    ]
    assert json.loads(out.read_text())["systems"]["still"] == json.loads(json.dumps(system))
    about = system["vbench"]
    assert about["version"] == "0.1.5"
    assert set(about["dimensions"]) == {"dynamic_degree", "motion_smoothness", "temporal_flickering"}
    degree = about["dimensions"]["dynamic_degree"]
    assert (degree["n"], degree["ours"], degree["vbench"], degree["differ"]) == (3, 0.0, pytest.approx(1 / 3), 1)
    for k, clip in enumerate(system["clips"]):
        found = clip["vbench"]["motion_smoothness"]
        assert found["value"] == pytest.approx(0.9 + k / 100)
        assert found["difference"] == pytest.approx(clip["values"]["motion_smoothness"] - found["value"])
        assert clip["vbench"]["dynamic_degree"]["value"] == float(k == 1)
    assert about["dimensions"]["motion_smoothness"]["largest_difference"] == pytest.approx(
        max(abs(clip["vbench"]["motion_smoothness"]["difference"]) for clip in system["clips"])
    )
    assert (
        "Dynamic degree: ours 0, vbench 0.333333, n 3, largest difference 1, 1 clips beyond 0"
        in capsys.readouterr().out
    )
    assert (
        "dimensions temporal_flickering motion_smoothness dynamic_degree"
        in (tmp_path / "r.still.vbench.log").read_text()
    )


def test_a_python_without_vbench_is_refused_before_anything_is_measured(tmp_path, python, monkeypatch):
    monkeypatch.setattr("mogan.evaluation.records.measure", lambda *_, **__: pytest.fail("measured"))
    clips = write_clips(tmp_path / "still", count=1)
    with pytest.raises(UserError, match=r"cannot import vbench \(ModuleNotFoundError.*pip install vbench"):
        evaluate((clips,), out=tmp_path / "r.json", flow="farneback", compare_vbench=sys.executable)
    with pytest.raises(UserError, match="does not run"):
        check(str(tmp_path / "nowhere"))
    assert check(python) == "0.1.5"


def test_a_vbench_that_fails_is_quoted_and_its_output_kept(tmp_path, python, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "1")
    clips = write_clips(tmp_path / "still", count=1)
    with pytest.raises(UserError, match=r"vbench failed \(RuntimeError: no weights\): see .*r\.still\.vbench\.log"):
        evaluate((clips,), out=tmp_path / "r.json", flow="farneback", quick=True, compare_vbench=python)
    assert json.loads((tmp_path / "r.json").read_text())["systems"]["still"]["metrics"]  # ours are not lost
    assert "no weights" in (tmp_path / "r.still.vbench.log").read_text()


def test_networks_in_a_folder_are_measured_and_named_in_how(tmp_path, dino_state, capsys):  # noqa: F811
    networks = tmp_path / "networks"
    networks.mkdir()
    torch.save(dino_state, networks / "dino_vitbase16_pretrain.pth")
    clips = write_clips(tmp_path / "still", count=1)
    system = evaluate(
        (clips,), out=tmp_path / "r.json", flow="farneback", quick=True, lab=False, networks=networks, device="cpu"
    )["systems"]["still"]
    assert system["metrics"]["subject_consistency"]["mean"] > 0.99
    assert len(system["how"]["networks"]["subject_consistency"]) == 64
    told = capsys.readouterr()
    assert "imaging_quality is not measured: put musiq_spaq_ckpt-358bb6af.pth into" in told.err
    assert "Subject consistency" in told.out


def test_cd_fvd_needs_a_reference_and_comes_with_its_noise(tmp_path):
    width = 88
    state = {
        "patch_embed.proj.weight": 0.02 * torch.randn(width, 3, 2, 112, 112),
        "patch_embed.proj.bias": torch.zeros(width),
        "fc_norm.weight": torch.ones(width),
        "fc_norm.bias": torch.zeros(width),
        "head.weight": torch.zeros(1, width),
        "head.bias": torch.zeros(1),
        **random_blocks(width, 1, biases=False),
    }
    networks = tmp_path / "networks"
    networks.mkdir()
    torch.save({"module": state}, networks / "vit_g_hybrid_pt_1200e_ssv2_ft.pth")
    one, two = write_clips(tmp_path / "one", 4), write_clips(tmp_path / "two", 4, seed=1)
    options = {"flow": "farneback", "quick": True, "lab": False, "networks": networks, "device": "cpu"}
    system = evaluate((one,), out=tmp_path / "r.json", reference=two, **options)["systems"]["one"]
    assert system["metrics"]["cd_fvd"]["n"] == 4
    assert system["metrics"]["cd_fvd"]["mean"] > 0
    assert system["metrics"]["cd_fvd_floor"]["n"] == 2
    assert "video_features" not in system["clips"][0]
    assert any("CD-FVD of 4 clips" in warning for warning in system["how"]["warnings"])
    same = evaluate((one,), out=tmp_path / "r.json", reference=one, **options)["systems"][
        "one"
    ]  # nothing measured again
    assert same["metrics"]["cd_fvd"]["mean"] == pytest.approx(0, abs=1e-4)
    tools = gather_tools("farneback", "blend", networks, "cpu", quick=True, lab=False, video=False)
    assert tools.video is None
    assert tools.looks == {}


def test_cd_fvd_of_records_is_the_distance_of_their_features():
    rng = np.random.default_rng(0)

    def records(shift):
        return [
            {"prompt": str(k), "values": {}, "features": [0.0], "video_features": (rng.normal(size=3) + shift).tolist()}
            for k in range(30)
        ]

    one, two = records(0), records(2)
    found = set_metrics(one, two)["cd_fvd"]
    features = [np.array([r["video_features"] for r in some]) for some in (one, two)]
    assert found.mean == cd_fvd(*features)
    assert (found.ci95, found.n) == (None, 30)
    floor = set_metrics(one, two[:20])["cd_fvd_floor"]
    assert (floor.mean, floor.n) == (noise_floor(features[1][:20]), 10)  # the reference's own
