"""Every default comes from the model: the lab's from its ``mogan.json``, stock Wan's for a folder that says nothing."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.optical_flow import raft_large

import tiny_recipes
from conftest import CAPTIONS
from mogan.cli import main
from mogan.data.cache import open_cache
from mogan.data.prepare import prepare
from mogan.data.video import write_video
from mogan.errors import UserError
from mogan.estimate.random_wan import random_wan
from mogan.evaluation.clips import read_folder
from mogan.evaluation.evaluate import evaluate
from mogan.exchange.export import save_student
from mogan.models import wan
from mogan.models.causal_cache import Causal, Policy
from mogan.models.defaults import (
    ANIMATING,
    ANIMATING_22,
    TWO_EXPERTS,
    WAN_NEGATIVE_PROMPT,
    Defaults,
    Geometry,
    read_defaults,
)
from mogan.models.weights import MANIFEST
from mogan.motion import estimators
from mogan.motion.classical_flow import dis, farneback
from mogan.recipes import RECIPES
from mogan.report.page import report
from mogan.sampling.sample import encode_each, sample
from mogan.sampling.samples import UNSAID
from mogan.training.assemble import assemble

NARROW = {
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 64, "freq_dim": 64},
    "vae": {"base_dim": 8},
    "text_encoder": {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16},
}
# of sample_neg_prompt in wan/configs/shared_config.py of Wan2.1
PUBLISHED = "ce96e0324e4b54ce"
STOCK = {
    "steps": 50,
    "guidance": 5.0,
    "shift": 5.0,
    "negative_prompt": WAN_NEGATIVE_PROMPT,
    "first_frame_guidance": 5.0,
    "flow": None,
    "sigmas": None,
    "solver": "lcm",
    "counts": (),
    "causal": None,
}
LABS = {
    "size": Geometry(16, 64, 64, 17),
    "steps": 50,
    "guidance": 3.0,
    "shift": 3.0,
    "negative_prompt": "",
    "first_frame_guidance": 1.0,
    "flow": "lab",
    "sigmas": None,
    "solver": "lcm",
    "counts": (),
    "causal": None,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, by name."""
    at = tmp_path_factory.mktemp("models")
    made = {"lab-teacher": wan.resolve_model("lab-teacher"), "lab": wan.resolve_model("lab")}
    for name in ("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"):
        narrow = NARROW | {"vae": {"base_dim": 8, "decoder_base_dim": 8}}
        made[name] = random_wan(at / name, name, layers=1, text_layers=1, changes=narrow)
        (made[name] / "mogan.json").unlink()  # as it is published
    made["said"] = random_wan(at / "said", layers=1, text_layers=1, clip=(5, 32, 32), changes=NARROW)
    facts = json.loads((made["said"] / "mogan.json").read_text()) | {"guidance": 6, "shift": 8.0}
    (made["said"] / "mogan.json").write_text(json.dumps(facts))
    return made


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lab-teacher", LABS),
        ("lab", LABS | {"sigmas": (1.0, 0.8571428571428571, 0.6)}),
        ("wan2.1-t2v-1.3b", STOCK | {"size": Geometry(16, 480, 832, 81)}),
        ("wan2.2-ti2v-5b", STOCK | {"size": Geometry(24, 704, 1280, 121)}),
        ("said", STOCK | {"size": Geometry(16, 32, 32, 5), "guidance": 6, "shift": 8.0}),
    ],
)
def test_every_default_is_the_models_own(folders, name, expected):
    assert vars(wan.defaults(folders[name])) == expected
    assert wan.geometry(folders[name]) == expected["size"]


def test_the_negative_prompt_is_wans_to_the_letter_and_the_one_that_recipes_train_with():
    assert hashlib.sha256(WAN_NEGATIVE_PROMPT.encode()).hexdigest()[:16] == PUBLISHED
    used = {name: recipe().negative_prompt for name, recipe in RECIPES.items()}
    assert set(used.values()) == {"", WAN_NEGATIVE_PROMPT}
    assert not [name for name, prompt in used.items() if prompt and name.endswith("_lab")]


def test_an_export_hands_its_models_defaults_on(folders, tmp_path):
    for name in ("lab-teacher", "said"):
        out = tmp_path / name
        student = wan.load_transformer(folders[name])
        save_student(student, folders[name], out, (1.0, 0.5), torch.float32, card="a test")
        assert wan.defaults(out) == replace(wan.defaults(folders[name]), sigmas=(1.0, 0.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fps", 0),
        ("frames", 17.5),
        ("steps", True),
        ("guidance", "5"),
        ("guidance", float("nan")),
        ("shift", 0),
        ("shift", 1e12),
        ("negative_prompt", None),
        ("sigmas", [1.0, 1.0]),
        ("sigmas", "1, 0.5"),
        ("flow", 3),
    ],
)
def test_a_default_that_cannot_be_meant_is_refused_by_name(folders, tmp_path, name, value):
    (tmp_path / "mogan.json").write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=rf"mogan\.json: {name} must be"):
        wan.defaults(tmp_path)


# ---------------------------------------------------------------------------------------------- sampling


@pytest.fixture
def asked(monkeypatch):
    """What the sampler of teachers is called with, in place of sampling."""
    calls = []

    def told(teacher, text, null, shape, seeds, **options):
        calls.append({"null": null, **options})
        return torch.zeros(len(seeds), *shape)

    monkeypatch.setattr("mogan.sampling.sample.sample_teacher", told)
    return calls


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lab-teacher", {}, (50, 3.0, 3.0, "")),
        ("lab", {"mode": "teacher"}, (50, 3.0, 3.0, "")),
        ("said", {}, (50, 6, 8.0, WAN_NEGATIVE_PROMPT)),
        ("said", {"steps": 4, "guidance": 5.5, "shift": 3.0, "negative_prompt": ""}, (4, 5.5, 3.0, "")),
        ("said", {"negative_prompt": "blurred", "flowmo": True}, (50, 6, 8.0, "blurred")),
    ],
)
def test_a_teacher_is_sampled_with_its_own_defaults_and_the_list_says_so(
    folders, asked, tmp_path, name, options, expected
):
    (tmp_path / "p.txt").write_text(CAPTIONS[0])
    sample(prompts=tmp_path / "p.txt", out=tmp_path / "s", model=str(folders[name]), device="cpu", **options)
    (call,) = asked
    (line,) = [json.loads(line) for line in (tmp_path / "s" / "samples.jsonl").read_text().splitlines()]
    assert (call["steps"], call["guidance"], call["shift"]) == expected[:3]
    (null,) = wan.load_text(folders[name])([expected[3]])
    torch.testing.assert_close(call["null"][0, : len(null)], null)
    assert not call["null"][0, len(null) :].any()
    assert (line["steps"], line["guidance"], line["shift"], line["negative_prompt"]) == expected
    (way,) = read_folder(tmp_path / "s", "s").sampling
    assert (way["steps"], way["guidance"], way["shift"], way["negative_prompt"]) == expected


def test_stock_wan_is_sampled_as_wans_own_code_does(folders, asked, tmp_path):
    """The published folder at a size a CPU can decode: nothing but the size is said."""
    facts = folders["wan2.1-t2v-1.3b"] / "mogan.json"
    facts.write_text('{"height": 32, "width": 32, "frames": 5}')
    try:
        (tmp_path / "p.txt").write_text(CAPTIONS[0])
        sample(prompts=tmp_path / "p.txt", out=tmp_path / "s", model=str(folders["wan2.1-t2v-1.3b"]), device="cpu")
    finally:
        facts.unlink()
    assert (asked[0]["steps"], asked[0]["guidance"], asked[0]["shift"]) == (50, 5.0, 5.0)


def test_options_of_a_teacher_are_refused_for_a_student(family, tmp_path, capsys):
    (tmp_path / "p.txt").write_text(CAPTIONS[0])
    command = ["sample", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "s")]
    options = ["--model", str(family / "student"), "--guidance", "5", "--negative-prompt", "blurred"]
    assert main([*command, *options]) == 2
    assert "leave out --guidance, --negative-prompt, or name a teacher by --model" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_folder_of_another_negative_prompt_is_refused_and_an_old_list_means_none(folders, asked, tmp_path):
    (tmp_path / "p.txt").write_text(CAPTIONS[0])
    common = {"prompts": tmp_path / "p.txt", "model": "lab-teacher", "device": "cpu"}
    sample(**common, out=tmp_path / "s")
    listing = tmp_path / "s" / "samples.jsonl"
    row = json.loads(listing.read_text())
    assert row.pop("negative_prompt") == UNSAID["negative_prompt"]
    listing.write_text(json.dumps(row) + "\n")
    sample(**common, out=tmp_path / "s")
    with pytest.raises(UserError, match=r"negative_prompt '', not 'blurred'"):
        sample(**common, out=tmp_path / "s", negative_prompt="blurred")


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_each_prompt_is_encoded_once_by_itself_and_on_the_device_asked_for(family, tmp_path, monkeypatch, model):
    asked, devices, real = [], [], wan.load_text
    here = torch.device("cpu", 0)

    def load(folder, device="cpu"):
        devices.append(device)
        encode = real(folder, device)
        return lambda prompts: asked.append(prompts) or encode(prompts)

    monkeypatch.setattr(wan, "load_text", load)
    monkeypatch.setattr("mogan.sampling.sample.choose_device", lambda name: here)
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS[:2]))
    options = {"steps": 2, "negative_prompt": CAPTIONS[1]} if model == "teacher" else {}
    sample(prompts=tmp_path / "p.txt", out=tmp_path / "s", model=str(family / model), seeds=3, batch=4, **options)
    assert asked == [[CAPTIONS[0]], [CAPTIONS[1]]]
    assert devices == [here]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prompts_are_encoded_on_a_gpu(family):
    used = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: (
            used.append(next(module.parameters()).device.type) if type(module).__name__ == "UMT5EncoderModel" else None
        )
    )
    try:
        encode_each(CAPTIONS[:1], family / "teacher", torch.device("cuda"))
    finally:
        hook.remove()
    assert used == ["cuda"]


# ---------------------------------------------------------------------------------------------- what measures


@pytest.fixture
def nothing_fetched(tmp_path, monkeypatch):
    """An empty folder of weights, where :func:`fetch` puts a RAFT of torchvision's layout."""
    monkeypatch.setenv("MOGAN_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def fetch(folder, name):
    torch.save(raft_large().state_dict(), folder / MANIFEST[name].file)


def clips_of(folder, size, prompt):
    folder.mkdir()
    frames = np.full((5, *size, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:24, 2 + number : 18 + number] = 200
    write_video(folder / "a.mp4", frames, 16)
    (folder / "samples.jsonl").write_text(json.dumps({"file": "a.mp4", "prompt": prompt}) + "\n")
    return folder


OURS, OTHER = "a red circle falling", "a cat on a roof"


@pytest.mark.parametrize(
    ("size", "prompt", "here", "expected", "words"),
    [
        ((64, 64), OURS, (), "lab", None),
        ((64, 64), OURS, ("raft_large_C_T_V1",), "lab", None),
        ((128, 128), OURS, (), "dis", "run `mogan weights fetch raft_large_C_T_V1`"),
        ((64, 64), OTHER, (), "dis", "run `mogan weights fetch raft_large_C_T_V1`"),
        (
            (128, 128),
            OTHER,
            ("raft_large_C_T_SKHT_V2",),
            "dis",
            "not VBench's number",
        ),  # which trains must not judge alone
        ((128, 128), OTHER, ("raft_large_C_T_V1",), "raft_large_C_T_V1", None),
    ],
)
def test_evaluate_measures_with_what_fits_the_clips_and_says_what_is_lacking(
    tmp_path, nothing_fetched, monkeypatch, capsys, size, prompt, here, expected, words
):
    for name in here:
        (nothing_fetched / MANIFEST[name].file).touch()
    loaded = []
    monkeypatch.setattr(estimators, "load_flow", lambda name, *rest: loaded.append(name) or farneback)
    found = evaluate((clips_of(tmp_path / "s", size, prompt),), out=tmp_path / "r.json", quick=True)["systems"]["s"]
    assert loaded == [expected]
    assert found["how"]["flow"]["name"] == expected
    said = " ".join(found["how"]["warnings"])
    assert (words in said and words in capsys.readouterr().err) if words else "flow" not in said


def test_the_labs_network_asked_for_on_other_clips_is_warned_of_by_name(tmp_path, nothing_fetched, capsys):
    folder = clips_of(tmp_path / "s", (96, 64), OTHER)
    found = evaluate((folder,), out=tmp_path / "r.json", flow="lab", quick=True)["systems"]["s"]
    assert found["how"]["flow"]["name"] == "lab"
    assert any("s: not the lab's 64 x 64 clips" in text for text in found["how"]["warnings"])
    assert "leave --flow out" in capsys.readouterr().err
    report((tmp_path / "r.json",), out=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "name lab" in page
    assert "not the lab" in page


def test_one_folder_of_strangers_decides_for_all(tmp_path, nothing_fetched):
    ours, other = clips_of(tmp_path / "a", (64, 64), OURS), clips_of(tmp_path / "b", (96, 64), OURS)
    found = evaluate((ours, other), out=tmp_path / "r.json", quick=True)["systems"]
    assert {system["how"]["flow"]["name"] for system in found.values()} == {"dis"}


def test_the_report_names_how_clips_were_sampled(tmp_path, nothing_fetched):
    folder = clips_of(tmp_path / "s", (64, 64), OURS)
    row = {"file": "a.mp4", "prompt": OURS, "steps": 50, "guidance": 5.0, "shift": 5.0, "negative_prompt": "静止"}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    evaluate((folder,), out=tmp_path / "r.json", quick=True)
    report((tmp_path / "r.json",), out=tmp_path / "r.html")
    assert "steps 50, guidance 5.0, shift 5.0, negative prompt 静止" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("model", "flow", "here", "expected", "words"),
    [
        ("lab", None, ("raft_large_C_T_SKHT_V2",), "lab", None),
        ("lab-teacher", "farneback", (), "farneback", None),
        ("said", None, (), "dis", "mogan weights fetch raft_large_C_T_SKHT_V2"),
        ("said", None, ("raft_large_C_T_V1",), "raft_large_C_T_V1", "measured by raft_large_C_T_V1"),
        ("said", None, ("raft_large_C_T_V1", "raft_large_C_T_SKHT_V2"), "raft_large_C_T_SKHT_V2", "measured by raft"),
        ("said", "lab", (), "lab", "the lab's flow network knows nothing but the lab's world"),
    ],
)
def test_prepare_measures_with_what_fits_the_model(
    folders, tmp_path, nothing_fetched, monkeypatch, capsys, model, flow, here, expected, words
):
    for name in here:
        (nothing_fetched / MANIFEST[name].file).touch()
    loaded = []
    monkeypatch.setattr(estimators, "load_flow", lambda name, **rest: loaded.append(name) or farneback)
    clips = clips_of(tmp_path / "v", (64, 64), OURS)
    (clips / "samples.jsonl").unlink()
    size = {"frames": 5}
    prepare(clips, out=tmp_path / "c", model=str(folders[model]), flow=flow, caption=OTHER, device="cpu", **size)
    facts = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert loaded == [facts["flow_name"]] == [expected]
    said = capsys.readouterr().err
    assert words in said if words else "flow" not in said


def test_a_cache_keeps_its_estimator_when_weights_arrive(folders, tmp_path, nothing_fetched, capsys):
    clips = clips_of(tmp_path / "v", (64, 64), OURS)
    (clips / "samples.jsonl").unlink()
    common = {"out": tmp_path / "c", "model": str(folders["said"]), "caption": OTHER, "device": "cpu"}
    prepare(clips, **common)
    fetch(nothing_fetched, "raft_large_C_T_SKHT_V2")
    prepare(clips, **common)
    assert "nothing to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["flow_name"] == "dis"
    with pytest.raises(UserError, match="was made with flow dis"):
        prepare(clips, **common, flow="raft_large_C_T_SKHT_V2")


def test_a_lab_recipe_on_another_model_is_warned_of_by_name(family, cache, monkeypatch, capsys):
    monkeypatch.setenv("MOGAN_TEST_RAFT", "lab")
    models = {"model": str(family / "teacher"), "student": str(family / "student")}
    assemble(tiny_recipes.mogan(), open_cache(cache), **models, run=None, device="cpu")
    assert "the lab's flow network" in capsys.readouterr().err


def test_dis_is_nearer_to_fast_motion_than_farneback():
    """A textured patch moves 20 pixels a frame: why the classical default is DIS."""
    rng = np.random.default_rng(0)
    grains = (
        cv2.resize(rng.random((320 // s, 480 // s), np.float32), (480, 320), interpolation=cv2.INTER_CUBIC)
        for s in (4, 8, 16, 32)
    )
    ground = cv2.normalize(sum(grains), None, 0, 255, cv2.NORM_MINMAX)
    frames = np.stack([np.roll(ground, 20 * i, 1)[32:288, 64:416] for i in range(3)])
    video = torch.from_numpy(frames)[None, None].expand(1, 3, -1, -1, -1).float() / 127.5 - 1
    truth = torch.tensor([20.0, 0.0]).view(1, 2, 1, 1, 1)
    error = {f.__name__: float((f(video) - truth).norm(dim=1)[..., 32:-32, 32:-32].mean()) for f in (dis, farneback)}
    assert error["dis"] < 0.5 * error["farneback"]


def test_a_window_that_no_chunk_fits_into_is_named_with_its_file():
    facts = Defaults(causal=Causal(3, 3, Policy(window=4))).facts()
    facts["causal"] = facts["causal"] | {"window": 2}
    with pytest.raises(UserError, match=r"mogan.json: clips of 81 frames cannot be made as causal says"):
        read_defaults(facts, Geometry(), Path("mogan.json"))


@pytest.mark.parametrize("stock", [{}, ANIMATING, ANIMATING_22, TWO_EXPERTS])
@given(
    steps=st.integers(1, 100), guidance=st.sampled_from([1.0, 3.5, 4.0, 5.0]), shift=st.sampled_from([3.0, 5.0, 12.0])
)
def test_a_folder_says_its_steps_guidance_and_shift_whatever_stock_models_have(stock, steps, guidance, shift):
    own = Defaults(steps=steps, guidance=guidance, shift=shift)
    assert read_defaults(stock | own.facts(), Geometry(), Path("mogan.json")) == own


def test_a_text_to_video_model_of_two_experts_has_its_own(two):
    facts = json.loads((two / "mogan.json").read_text())
    (two / "mogan.json").write_text(json.dumps({k: facts[k] for k in ("fps", "height", "width", "frames")}))
    found = wan.defaults(two)
    (two / "mogan.json").write_text(json.dumps(facts))
    assert (found.steps, found.guidance, found.shift) == (40, 4.0, 12.0)
