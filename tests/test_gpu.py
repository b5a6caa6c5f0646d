"""What can only go wrong on a GPU: the numbers of the CPU from the same seeds, and the same bits again.

``pytest -m gpu -n 6 tests``. Noise is drawn on the CPU and moved, so both devices see the same. Where they are compared,
convolutions are in fp32 (PyTorch's default is TF32). ``MOGAN_TEST_DEVICE=cpu`` runs all of it without a GPU, to test the tests;
``MOGAN_TEST_LOG`` names a file that gets a line for every comparison: how large the largest difference was.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file

import test_trajectories
import tiny_recipes
from conftest import CAPTIONS, TRANSFORMER
from mogan.data.cache import open_cache
from mogan.devices import choose_device
from mogan.evaluation.likelihood import motion_log_likelihood
from mogan.evaluation.pairs import flow_of_pairs, neighbours
from mogan.lab.clips import HELD_OUT_SEED, rendered_clips, to_video
from mogan.models import host, wan
from mogan.models.attention import set_attention, stack_text
from mogan.models.autoencoder import decode_video, encode_video
from mogan.models.denoiser import Denoiser
from mogan.motion.estimators import load_flow
from mogan.motion.flow import load_raft
from mogan.motion.pixel_flux import PixelFlux, net_motion
from mogan.runs.generator import open_generator
from mogan.sampling.sample import encode_each
from mogan.sampling.samplers import pictures, sample_student, sample_teacher
from mogan.sampling.trajectories import trajectories
from mogan.training.assemble import assemble
from mogan.training.held_out import Gain
from mogan.training.loop import _Clock, run_training
from mogan.training.steps import Position, complete, draw, step
from test_train import final

NAME = os.environ.get("MOGAN_TEST_DEVICE", "cuda")
HERE = torch.device("cuda", 0) if NAME == "cuda" else torch.device(NAME)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: products with the same bits
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NAME == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_av = pytest.mark.skipif(getattr(sys.modules.get("av"), "missing", False), reason="needs PyAV")

RECIPES = test_trajectories.RECIPES
FIRST, LATER = (
    3e-3,
    5e-2,
)  # relative; a first gradient is divided by itself, which carries rounding into the second step
SMALL = 0.05  # losses near 0 are differences of larger numbers: they differ relative to this


@pytest.fixture(autouse=True)
def _set_up(family, monkeypatch):
    """fp32 convolutions, the test family's flow network; what is not deterministic stays so unless a test asks."""
    monkeypatch.setenv("MOGAN_TEST_RAFT", str(family / "raft"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert choose_device(NAME) == HERE
    yield
    torch.use_deterministic_algorithms(False)


def note(what, **found):
    """One line of the log."""
    if path := os.environ.get("MOGAN_TEST_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps({"what": what, **found}) + "\n")


def difference(found, expected):
    """Root mean square of what differs, over that of what is expected; both on the CPU."""
    found, expected = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    assert found.shape == expected.shape
    off = torch.where(found == expected, 0.0, found - expected)  # infinite, too
    return float(off.square().mean().sqrt() / expected[expected.isfinite()].square().mean().sqrt().clamp(min=1e-8))


def assert_near(what, found, expected, most):
    off = difference(found, expected)
    note(what, off=off, allowed=most)
    assert off <= most, f"{what}: differs by {off:.2g} of its size"


def build(config, family, data, run=None, device=NAME):
    student = tiny_recipes.start(config, family)
    return assemble(config, open_cache(data), model=str(family / "teacher"), student=student, run=run, device=device)


def train(config, family, data, run, device=NAME):
    """The records of a run."""
    run.mkdir(exist_ok=True)
    run_training(build(config, family, data, run, device), run)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_as_on_the_cpu(recipe, family, cache, paths, tmp_path):
    config = replace(RECIPES[recipe](), iterations=2)
    data = tiny_recipes.data(config, cache, paths)
    ours = train(config, family, data, tmp_path / "here")
    theirs = train(config, family, data, tmp_path / "cpu", "cpu")
    assert [r["update"] for r in ours] == [r["update"] for r in theirs]
    numbers = [[r["loss"], r["grad_norm"]] for r in ours]
    assert np.isfinite(numbers).all()
    assert not any(v.isnan().any() for v in final(tmp_path / "here").values())
    expected = [[r["loss"], r["grad_norm"]] for r in theirs]
    off = [
        max(abs(a[0] - b[0]) / max(abs(b[0]), SMALL), abs(a[1] - b[1]) / max(b[1], 1e-6))
        for a, b in zip(numbers, expected, strict=True)
    ]
    note(f"train {recipe}", off=off, updates=[r["update"] for r in ours], numbers=numbers, expected=expected)
    assert off[0] <= FIRST, f"first step, {ours[0]['update']}: {numbers[0]} here, {expected[0]} on the CPU"
    for number, found in enumerate(off):
        assert found <= LATER, f"step {number}, {ours[number]['update']}: {numbers[number]}, not {expected[number]}"


def test_two_experts_train_as_on_the_cpu(two, family, cache, tmp_path):
    config = replace(tiny_recipes.dmd(), iterations=1)
    found = []
    for device in (NAME, "cpu"):
        parts = assemble(config, open_cache(cache), model=str(two), run=None, device=device)
        found.append([step(parts, Position(0, 0, i, 0))["loss"] for i in range(len(config.plan))])
    assert found[0] == pytest.approx(found[1], rel=LATER, abs=LATER * SMALL)


REPEATED = ["dmd_lab", "mogan_lab", "mogan_surrogate_lab", "accvideo_lab", "shift_lab", "redmd_lab", "dmd_lab lora"]


@pytest.mark.parametrize(
    ("recipe", "deterministic"), [(r, True) for r in REPEATED] + [(r, False) for r in ("dmd_lab", "mogan_lab")]
)
def test_a_run_that_was_stopped_is_the_run_that_was_not(recipe, deterministic, family, cache, paths, tmp_path):
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    config = replace(RECIPES[recipe](), iterations=3)
    data = tiny_recipes.data(config, cache, paths)
    runs = [tmp_path / name for name in ("whole", "again", "stopped")]
    for run in runs[:2]:
        train(config, family, data, run)
    train(replace(config, iterations=1), family, data, runs[2])
    train(config, family, data, runs[2])
    whole, again, stopped = map(final, runs)
    steady = same(whole, again)
    off = {
        k: max(difference(other[k], whole[k]) for k in whole) for k, other in (("again", again), ("stopped", stopped))
    }
    note(f"resume {recipe}", deterministic=deterministic, steady=steady, stopped=same(whole, stopped), off=off)
    if steady:  # the device gives the same bits twice, so a stopped run has no excuse
        assert same(whole, stopped)
    else:
        assert recipe not in ("dmd_lab", "dmd_lab lora") or not deterministic, "a run is not repeated to the bit"
        assert off["stopped"] <= max(10 * off["again"], 1e-3)


@pytest.mark.parametrize("recipe", ["mogan_lab", "accvideo_lab", "mogan_lab lora"])
@pytest.mark.parametrize("first", ["here", "cpu"])
def test_a_checkpoint_goes_on_on_another_device(first, recipe, family, cache, paths, tmp_path):
    devices = (NAME, "cpu") if first == "here" else ("cpu", NAME)
    config = RECIPES[recipe]()
    data = tiny_recipes.data(config, cache, paths)
    train(replace(config, iterations=1), family, data, tmp_path / "moved", devices[0])
    moved = train(replace(config, iterations=2), family, data, tmp_path / "moved", devices[1])
    stayed = train(replace(config, iterations=2), family, data, tmp_path / "stayed", devices[0])
    assert [r["update"] for r in moved] == [r["update"] for r in stayed]
    found, expected = ([r["loss"] for r in records] for records in (moved, stayed))
    note(f"moved from {first} {recipe}", found=found, expected=expected)
    assert found == pytest.approx(expected, rel=LATER, abs=LATER * SMALL)


@pytest.mark.parametrize("lora", [None, 3])
def test_what_waits_in_the_hosts_memory_changes_nothing(lora, family, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "LEAST", 0)
    config = replace(RECIPES["mogan_lab"](), iterations=2, checkpointing=True, lora=lora)
    plain = train(config, family, cache, tmp_path / "plain")
    found = train(replace(config, offload=True), family, cache, tmp_path / "offloaded")
    note(f"offload, lora {lora}", found=[r["loss"] for r in found], expected=[r["loss"] for r in plain])
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in plain], rel=LATER, abs=LATER * SMALL)


@pytest.mark.parametrize("recipe", ["mogan_lab", "shift_lab", "mogan_lab lora"])
def test_bf16_trains(recipe, family, cache, tmp_path):
    config = replace(RECIPES[recipe](), iterations=2, precision="auto" if HERE.type == "cuda" else "bf16")
    parts = build(config, family, cache, tmp_path)
    assert parts.student.dtype == torch.bfloat16
    run_training(parts, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([[r["loss"], r["grad_norm"]] for r in records]).all()
    exact = train(replace(config, precision="fp32"), family, cache, tmp_path / "fp32")
    note(f"bf16 {recipe}", found=[r["loss"] for r in records], expected=[r["loss"] for r in exact])
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in exact], rel=0.1, abs=0.1 * SMALL)


def test_everything_that_is_recomputed_gives_the_same_losses(family, cache, tmp_path):
    config = replace(tiny_recipes.mogan(), iterations=1)
    plain = train(replace(config, checkpointing=False), family, cache, tmp_path / "plain")
    recomputed = train(replace(config, checkpointing=True), family, cache, tmp_path / "recomputed")
    for a, b in zip(plain, recomputed, strict=True):
        assert [b["loss"], b["grad_norm"]] == pytest.approx([a["loss"], a["grad_norm"]], rel=5e-3)


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}], ids=["fp32", "bf16"])
def test_a_compiled_run_is_the_eager_run(change, family, cache, tmp_path):
    if HERE.type == "cpu" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler (g++)")
    config = replace(tiny_recipes.dmd(), iterations=1, **change)
    torch._dynamo.reset()
    eager = train(config, family, cache, tmp_path / "eager")
    compiled = train(replace(config, compile=True), family, cache, tmp_path / "compiled")
    found, expected = ([r["loss"] for r in records] for records in (compiled, eager))
    note(f"compile {change}", found=found, expected=expected)
    most = 0.05 if change.get("precision") else 5e-3
    assert found == pytest.approx(expected, rel=most, abs=most * SMALL)


def test_everything_that_is_trained_or_called_lies_on_the_device(family, cache, paths, tmp_path):
    for recipe in RECIPES:
        config = RECIPES[recipe]()
        parts = build(config, family, tiny_recipes.data(config, cache, paths))
        networks = [*parts.networks.values(), parts.vae, *(f for o in parts.objectives.values() for f in o.frozen)]
        tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
        assert {t.device.type for t in tensors} == {HERE.type}, recipe
        assert {t.device.type for t in parts.average.weights.values()} == {HERE.type}, recipe


def test_the_clock_tells_the_seconds_that_pass():
    clock = _Clock(HERE)
    a = torch.rand(2048, 2048, device=HERE)
    finish = torch.cuda.synchronize if HERE.type == "cuda" else lambda: None
    (a @ a).sum().item()
    began = time.perf_counter()
    for times in (1, 8):
        with clock:
            for _ in range(10 * times if HERE.type == "cuda" else times):
                b = a @ a
            float(b.sum())
    finish()
    passed = time.perf_counter() - began
    one, eight = [s["seconds"] for s in clock.read()]
    note("clock", one=one, eight=eight, passed=passed)
    assert 0 < one < eight
    assert 0.5 * passed <= one + eight <= 1.05 * passed
    assert clock.read() == []


# ---------------------------------------------------------------------------------------------- precision


def test_products_are_fp32_whatever_the_environment_says(tmp_path):
    script = (
        "import sys, torch; from mogan.devices import choose_device; d = choose_device(sys.argv[1])\n"
        "g = torch.Generator().manual_seed(0); a, b = (torch.randn(512, 512, generator=g) for _ in range(2))\n"
        "exact = a.double() @ b.double(); found = (a.to(d) @ b.to(d)).double().cpu()\n"
        "print(float((found - exact).norm() / exact.norm()))"
    )
    for allowed in ("0", "1"):
        environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": allowed}
        command = [sys.executable, "-W", "ignore", "-c", script, NAME]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        off = float(done.stdout.split()[-1])
        note(f"product, TF32 allowed {allowed}", off=off)
        assert off < 1e-6


def test_a_discriminator_that_is_penalised_computes_in_fp32(family, cache, tmp_path):
    config = replace(tiny_recipes.mogan(), precision="bf16")
    seen = {}
    for device in (NAME, "cpu"):
        network = build(config, family, cache, device=device).objectives["gan"].judge.discriminator
        shown = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(
            next(network.parameters()).device
        )
        with torch.no_grad():
            seen[device] = [network(shown, dtype=dtype).cpu() for dtype in (torch.float32, None)]
    assert_near("discriminator fp32", seen[NAME][0], seen["cpu"][0], 1e-5)
    assert_near("discriminator bf16", seen[NAME][1], seen["cpu"][0], 0.1)
    assert difference(seen[NAME][1], seen["cpu"][0]) > 1e-5  # its own dtype is bf16


# ---------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [4, 77, 511])
def test_folded_padding_is_stock_attention_at_the_width_of_wan(tokens, dtype):
    """Heads of 128 numbers, text of odd lengths: what decides which kernel of attention is taken."""
    torch.manual_seed(0)
    stock = WanTransformer3DModel(**TRANSFORMER | {"attention_head_dim": 128, "num_layers": 2}).to(HERE)
    ours = set_attention(WanTransformer3DModel.from_config(stock.config)).to(HERE)
    ours.load_state_dict(stock.state_dict())
    assert type(stock.blocks[0].attn2.processor) is WanAttnProcessor
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 5, 16, 16, generator=generator), torch.randn(tokens, 64, generator=generator)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - tokens)).expand(2, -1, -1)
    folded = stack_text([text, text])
    results = []
    for network, words in ((stock, padded), (ours, folded)):
        point = x.to(HERE).requires_grad_()
        with torch.autocast(HERE.type, dtype, enabled=dtype != torch.float32):
            out = network(point, torch.full((2,), 500.0, device=HERE), words.to(HERE), return_dict=False)[0]
        out.float().square().mean().backward()
        results.append((out.detach(), point.grad, stock.blocks[0].attn1.to_q.weight.grad))
    most = 1e-4 if dtype == torch.float32 else 0.05
    assert_near(f"folded {tokens} {dtype}", results[1][0].float(), results[0][0].float(), most)
    assert_near(f"folded gradient {tokens} {dtype}", results[1][1], results[0][1], 2 * most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", ["family", "lab"])
def test_the_autoencoder_encodes_and_decodes_as_on_the_cpu(which, dtype, family):
    folder = family / "teacher" if which == "family" else wan.resolve_model("lab-teacher")
    size = wan.geometry(folder)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 5, size.height, size.width, generator=generator) * 2 - 1
    if which == "lab":
        video = to_video(rendered_clips(1, HELD_OUT_SEED))[:, :, :5]
    exact, here = wan.load_vae(folder, torch.float32), wan.load_vae(folder, dtype).to(HERE)
    latents, pictures_, slopes = [], [], []
    for vae, device in ((here, HERE), (exact, torch.device("cpu"))):
        point = video.to(device).requires_grad_()
        latent = encode_video(vae, point)
        latent.square().mean().backward()
        latents.append(latent.detach())
        slopes.append(point.grad)
    for vae, device in ((here, HERE), (exact, torch.device("cpu"))):
        with torch.no_grad():
            pictures_.append(decode_video(vae, latents[1].to(device)))
    most = 1e-4 if dtype == torch.float32 else 0.05
    assert_near(f"encode {which} {dtype}", *latents, most)
    assert_near(f"decode {which} {dtype}", *pictures_, most)
    assert_near(f"gradient of encoding {which} {dtype}", *slopes, 10 * most)


@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "tf32"])
def test_raft_sees_what_it_sees_on_the_cpu(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    video = to_video(rendered_clips(2, HELD_OUT_SEED))[:, :, :9]
    found, expected = (load_flow("lab", None, d)(video.to(d)).cpu() for d in (HERE, torch.device("cpu")))
    off = (found - expected).norm(dim=1)
    note(
        f"raft tf32={tf32}", mean=float(off.mean()), largest=float(off.max()), speed=float(expected.norm(dim=1).mean())
    )
    assert off.mean() < (0.02 if tf32 else 1e-3)  # px/frame
    assert net_motion([found.to(HERE)]).cpu() == pytest.approx(net_motion([expected]), abs=0.05 if tf32 else 5e-3)


def test_the_gradient_of_flow_is_the_cpus(family):
    video = to_video(rendered_clips(1, HELD_OUT_SEED))[:, :, :5]
    slopes = []
    for device in (HERE, torch.device("cpu")):
        point = video.to(device).requires_grad_()
        load_flow("lab", 2, device)(point).square().mean().backward()
        slopes.append(point.grad.cpu())
    assert_near("gradient of flow", *slopes, 0.02)


def test_flow_of_pairs_and_pixel_flux_are_the_cpus(family):
    frames = list(rendered_clips(1, HELD_OUT_SEED)[0, :, :6].permute(1, 2, 3, 0).numpy())
    fields = [np.stack(list(flow_of_pairs(neighbours(frames), load_flow("lab", None, d)))) for d in (HERE, "cpu")]
    assert np.abs(fields[0] - fields[1]).mean() < 1e-3
    teacher, generator = wan.resolve_model("lab-teacher"), torch.Generator().manual_seed(0)
    latent = torch.randn(1, *wan.latent_shape(teacher, wan.geometry(teacher)), generator=generator)
    queries, seen = torch.rand(1, 9, 2, generator=generator), []
    for device in (HERE, torch.device("cpu")):
        vae = wan.load_vae(teacher, torch.float32).to(device)
        seen.append(PixelFlux(vae, load_flow("lab", None, device))(latent.to(device), queries.to(device)))
    assert_near("flux maps", seen[0].maps_BCFHW, seen[1].maps_BCFHW, 0.05)
    assert_near("flux states", seen[0].states_BND, seen[1].states_BND, 0.3)  # a point seen on one, hidden on the other


def test_a_flow_network_from_a_file_that_a_gpu_wrote(family, tmp_path):
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    torch.save({k: v.to(HERE) for k, v in raft_large().state_dict().items()}, tmp_path / "raft.pth")
    assert {p.device.type for p in load_raft(tmp_path / "raft.pth").parameters()} == {"cpu"}


# ---------------------------------------------------------------------------------------------- texts and samples


def test_prompts_are_encoded_as_on_the_cpu(family):
    for folder in (family / "teacher", wan.resolve_model("lab-teacher")):
        here, there = (encode_each(CAPTIONS, folder, d) for d in (HERE, torch.device("cpu")))
        assert {t.device.type for t in here.values()} == {"cpu"}
        for caption in CAPTIONS:
            assert_near(f"text {folder.parent.name}", here[caption], there[caption], 1e-4)


def student_latents(name, device, dtype=torch.float32):
    source = open_generator(name)
    text = encode_each(CAPTIONS[:2], source.folder, device)
    shape = wan.latent_shape(source.folder, source.geometry)
    student = source.load(dtype).to(device).eval()
    words = stack_text([text[c] for c in CAPTIONS[:2]], device)
    return sample_student(student, words, shape, source.sigmas, [3, 4], source.solver)


@pytest.mark.parametrize("which", ["family", "lab"])
def test_a_student_samples_as_on_the_cpu_and_twice_the_same(which, family):
    name = "lab" if which == "lab" else str(family / "student")
    found, again, expected = (student_latents(name, d) for d in (HERE, HERE, torch.device("cpu")))
    assert torch.equal(found, again)
    assert_near(f"student {which}", found, expected, 5e-3)
    vae = wan.load_vae(open_generator(name).folder, torch.float32)
    theirs = np.stack(list(pictures(vae, expected[:1])))
    vae = vae.to(HERE)
    ours, twice = (np.stack(list(pictures(vae, latents[:1]))) for latents in (found, again))
    assert (ours == twice).all()
    apart = np.abs(ours.astype(int) - theirs)
    note(f"pixels of the student {which}", mean=float(apart.mean()), largest=int(apart.max()))
    assert apart.mean() < 0.5
    assert_near(f"student {which} bf16", student_latents(name, HERE, torch.bfloat16), expected, 0.3)


@pytest.mark.parametrize("how", ["unipc", "euler", "flowmo"])
def test_a_teacher_samples_as_on_the_cpu_and_twice_the_same(how, family):
    folder = wan.resolve_model("lab-teacher")
    source, found = open_generator("lab-teacher"), []
    for device in (HERE, HERE, torch.device("cpu")):
        text = encode_each([CAPTIONS[0], ""], folder, device)
        teacher = source.load().to(device).eval()
        found.append(
            sample_teacher(
                teacher, stack_text([text[CAPTIONS[0]]], device), stack_text([text[""]], device),
                wan.latent_shape(folder, source.geometry), [7], steps=4, guidance=3.0, shift=3.0,
                solver="euler" if how == "euler" else "unipc", flowmo=how == "flowmo",
            )
        )  # fmt: skip
    if how != "flowmo":
        assert torch.equal(found[0], found[1])
    assert_near(f"teacher {how}", found[0], found[2], 5e-2 if how == "flowmo" else 5e-3)


def test_paths_are_the_cpus(family, paths, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    trajectories(
        prompts=tmp_path / "prompts.txt", out=tmp_path / "store", model=str(family / "teacher"), keep="0,2,4,6", seeds=2,
        steps=6, guidance=2.0, shift=3.0, negative_prompt="", precision="fp32", device=NAME,
    )  # fmt: skip
    files = sorted(p.name for p in (paths / "paths").glob("*.safetensors"))
    assert files == sorted(p.name for p in (tmp_path / "store" / "paths").glob("*.safetensors"))
    for name in files:
        found, expected = (load_file(at / "paths" / name)["latents"].float() for at in (tmp_path / "store", paths))
        assert_near("path", found, expected, 5e-3)


def test_the_likelihood_is_the_cpus(family):
    folder, found = family / "teacher", []
    generator = torch.Generator().manual_seed(0)
    latent, words = torch.randn(2, 4, 4, 4, 4, generator=generator), torch.randn(2, 5, 64, generator=generator)
    for device in (HERE, torch.device("cpu")):
        motion = Denoiser(wan.load_transformer(folder).to(device).eval())
        probes = torch.Generator().manual_seed(1)
        found.append(
            motion_log_likelihood(
                motion, latent.to(device), words.to(device), generator=probes, steps=2, probes=2
            ).nats_B
        )
    assert_near("likelihood", *found, 1e-3)


def test_held_out_motion_is_the_cpus(family, cache, tmp_path):
    found = []
    for device in (NAME, "cpu"):
        parts = build(tiny_recipes.mogan(), family, cache, device=device)
        gain = object.__new__(Gain)
        gain.cache, gain.prompts = open_cache(cache), CAPTIONS[:3]
        found.append(gain.measure(parts))
    note("held-out motion", found=found)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_an_observation_of_a_real_clip_is_the_cpus(family, cache, tmp_path):
    seen = []
    for device in (NAME, "cpu"):
        copied = tmp_path / ("here" if device == NAME else "there")
        if copied.exists():
            shutil.rmtree(copied)
        shutil.copytree(cache, copied, ignore=shutil.ignore_patterns("observations"))
        parts = build(tiny_recipes.mogan(), family, copied, device=device)
        index = next(i for i, u in enumerate(parts.config.plan) if u.learns == "discriminator")
        batch = complete(parts, parts.config.plan[index], draw(parts, Position(0, 0, index, 0)))
        seen.append(batch.observation_BCFHW)
    assert {t.device.type for t in seen} == {"cpu"}
    assert_near("observation", seen[0].float(), seen[1].float(), 0.02)


def test_a_run_is_sampled_and_its_adapters_are_merged(family, cache, tmp_path):
    for lora in (None, 3):
        run = tmp_path / str(lora)
        config = replace(tiny_recipes.dmd(), iterations=1, lora=lora)
        train(config, family, cache, run)
        (run / "config.json").write_text(json.dumps(config.as_json()))
        (run / "run.json").write_text(tiny_recipes.places(config, family, cache, tiny_recipes.start(config, family)))
        found, expected = (student_latents(str(run), d) for d in (HERE, torch.device("cpu")))
        assert_near(f"a run's student, lora {lora}", found, expected, 5e-3)


# ---------------------------------------------------------------------------------------------- commands on video files


@needs_av
def test_the_commands_run_on_the_device(family, tmp_path):
    from mogan.cli import main

    given = ["--device", NAME]
    teacher, student = str(family / "teacher"), str(family / "student")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:2]))
    prompts = str(tmp_path / "prompts.txt")
    for name in ("a", "b"):
        assert not main(["sample", "--prompts", prompts, "--out", str(tmp_path / name), "--model", student, *given])
    clips = sorted(p.name for p in (tmp_path / "a").glob("*.mp4"))
    assert len(clips) == 2
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in clips)
    assert not main(["prepare", str(tmp_path / "a"), "--out", str(tmp_path / "cache"), "--model", teacher, *given])
    assert len(open_cache(tmp_path / "cache")) == 2
    config = replace(tiny_recipes.dmd(), iterations=1, sample_prompts=2, sample_every=1)
    train(config, family, tmp_path / "cache", tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "000001" / "sheet.png").is_file()


@needs_av
def test_clips_are_evaluated_as_on_the_cpu(tmp_path):
    from mogan.cli import main
    from mogan.world.render import render_folder

    render_folder(tmp_path / "clips", 2)
    found = []
    for device in (NAME, "cpu"):
        out = tmp_path / f"{device}.json"
        assert not main(["evaluate", str(tmp_path / "clips"), "--flow", "lab", "--device", device, "--out", str(out)])
        found.append(json.loads(out.read_text()))
    note("evaluate", found=[str(f)[:2000] for f in found])
    assert found[0].keys() == found[1].keys()
