"""A student that is told where its steps end: the stock class it lies on disk as, what it is told, how it is sampled."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler, WanPipeline

import tiny_recipes
from conftest import CAPTIONS
from mogan.cli import main
from mogan.costs.calls import network_parameters
from mogan.costs.shapes import PUBLISHED, read_shapes
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.data.video import read_video
from mogan.disk.files import write_atomically
from mogan.errors import UserError
from mogan.exchange.export import export, flow_map_scheduler, save_student
from mogan.models import attention, autoencoder, wan
from mogan.models.denoiser import Denoiser
from mogan.models.step_condition import from_stock, is_told, tell_steps, to_stock
from mogan.runs.generator import open_generator
from mogan.sampling.rollout import Intervals, follow, normal
from mogan.sampling.samplers import sample_student
from mogan.schedule import levels_of, shifted_levels
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, step
from tiny_recipes import dmd, tdm


def latents(seed=0, batch=2):
    return torch.randn(batch, 4, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


TEXT = F.pad(torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(5)), (0, 0, 0, 1))  # the last row is padding
LEVELS = torch.tensor([0.9, 0.3])


@pytest.fixture
def told(family):
    """A network that is told, whose second embedder is no longer the copy that it began as."""
    network = Denoiser(tell_steps(wan.load_transformer(family / "teacher")).eval())
    torch.manual_seed(2)
    with torch.no_grad():
        for p in network.transformer.condition_embedder.delta_embedder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def stock_velocity(stock, x, sigma, text, to):
    """Of the stock class: frames before channels, a level per frame, text padded to 512 rows."""
    sigma = sigma if sigma.ndim == 2 else sigma[:, None].expand(-1, x.shape[2])
    full = F.pad(text, (0, 0, 0, 512 - text.shape[1]))
    swapped = x.transpose(1, 2)
    return stock(swapped, 1000 * sigma, 1000 * torch.full_like(sigma, to), full, return_dict=False)[0].transpose(1, 2)


# ------------------------------------------------------------------------------------------------ the container


@torch.no_grad()
def test_a_network_just_told_is_its_base_model_where_steps_end_where_they_begin(family):
    base = Denoiser(wan.load_transformer(family / "teacher").eval())
    told = Denoiser(tell_steps(wan.load_transformer(family / "teacher")).eval())
    assert (base.told, told.told) == (False, True)
    x = latents()
    plain = base.velocity(x, LEVELS, TEXT)
    torch.testing.assert_close(told.velocity(x, LEVELS, TEXT), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(told.velocity(x, torch.full((2,), 0.3), TEXT, 0.3), base.velocity(x, torch.full((2,), 0.3), TEXT), atol=1e-5, rtol=0)  # fmt: skip
    per_frame = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(told.velocity(x, per_frame, TEXT), base.velocity(x, per_frame, TEXT), atol=1e-5, rtol=0)
    assert (told.velocity(x, LEVELS, TEXT, 0.0) - plain).abs().max() > 1e-3
    assert torch.equal(base.velocity(x, LEVELS, TEXT, 0.0), plain)  # who is not told does not hear it


@torch.no_grad()
def test_the_output_changes_only_with_where_the_step_ends(told):
    x = latents()
    one, again, other = (told.velocity(x, LEVELS, TEXT, to) for to in (0.3, 0.3, 0.6))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(told(x, LEVELS, TEXT, 0.3), x - LEVELS.view(-1, 1, 1, 1, 1) * one)


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
def test_the_stock_class_computes_what_we_do(told, per_frame, tmp_path):
    to_stock(told.transformer).save_pretrained(tmp_path / "transformer")
    stock = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "transformer").eval()
    assert (stock.config.gate_value, stock.config.deltatime_type) == (0.25, "r")
    x, sigma = latents(), torch.rand(2, 4, generator=torch.Generator().manual_seed(1)) if per_frame else LEVELS
    expected = stock_velocity(stock, x, sigma, TEXT, 0.25)
    torch.testing.assert_close(told.velocity(x, sigma, TEXT, 0.25), expected, atol=2e-5, rtol=0)
    back = Denoiser(attention.set_attention(from_stock(stock, tmp_path)))
    assert torch.equal(back.velocity(x, sigma, TEXT, 0.25), told.velocity(x, sigma, TEXT, 0.25))
    assert back.transformer.state_dict().keys() == told.transformer.state_dict().keys() == stock.state_dict().keys()


def test_a_stock_network_of_another_gate_keeps_it_and_one_told_lengths_is_refused(told, tmp_path):
    stock = to_stock(told.transformer)
    stock.register_to_config(gate_value=0.5)
    assert from_stock(stock, tmp_path).condition_embedder.gate == 0.5
    stock.register_to_config(deltatime_type="t-r")
    with pytest.raises(UserError, match="told the length of its step"):
        from_stock(stock, tmp_path)


def test_recomputed_blocks_give_the_same_gradients(told):
    x, gradients = latents(), []
    for checkpointing in (False, True):
        (told.transformer.enable_gradient_checkpointing if checkpointing else lambda: None)()
        told.train().zero_grad()
        told.velocity(x, LEVELS, TEXT, 0.2).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in told.named_parameters()})
    assert "transformer.condition_embedder.delta_embedder.linear_1.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# ------------------------------------------------------------------------------------------------ in training


def build(config, family, cache, run=None, student=None):
    return assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=run, device="cpu")


def test_student_and_fake_score_are_told_and_the_teacher_is_not(family, cache):
    parts = build(tdm(), family, cache)
    judge = parts.objectives["dmd"].judge
    assert (parts.student.told, judge.fake_score.told, judge.teacher.told) == (True, True, False)
    quiet = build(replace(tdm(), rollout=Intervals(counts=(1, 2, 4), told=False)), family, cache)
    assert not quiet.student.told
    assert not quiet.objectives["dmd"].judge.fake_score.told


def test_the_student_hears_where_its_step_ends_and_the_fake_score_which_number_of_steps_it_is(family, cache):
    parts, heard = build(tdm(), family, cache), {"student": [], "fake_score": []}
    for name, network in (("student", parts.student), ("fake_score", parts.networks["fake_score"])):
        network.transformer.register_forward_pre_hook(
            lambda m, args, name=name: heard[name].append((args[1].chunk(2)[1] / 1000).unique().tolist())
        )
    for stage, ends, number in (
        (0, [0.0], 0.0),
        (1, [0.75], 0.75),
        (2, [0.75, 0.0], 0.75),
        (4, [0.9, 0.75], 0.9),
        (6, [0.9, 0.75, 0.5, 0.0], 0.9),
    ):
        made = parts.rollout(parts.config.plan[0]).make(
            parts.student, latents(), TEXT, parts.config.sigmas, None, stage, False
        )
        losses = parts.objectives["dmd"].losses
        losses["fake_score"](made, None, torch.Generator())
        with torch.no_grad():
            losses["student"](made, Batch([], [], []), torch.Generator())
        assert [level for call in heard["student"] for level in call] == pytest.approx(ends)
        assert heard["fake_score"] == 2 * [[pytest.approx(number)]]  # when it learns, and when it judges
        heard["student"].clear()
        heard["fake_score"].clear()


@pytest.mark.parametrize("lora", [None, 3])
def test_what_tells_the_networks_learns_too(lora, family, cache):
    parts = build(replace(tdm(), lora=lora), family, cache)
    for name, number in (("student", 0), ("fake_score", 1)):
        network = parts.networks[name]
        before = {k: v.clone() for k, v in network.state_dict().items()}
        for iteration in range(2):  # adapters begin at nothing: their first factor learns from the second update on
            step(parts, Position(seed=0, iteration=iteration, update=number, repeat=0))
        moved = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
        assert any("delta_embedder" in k for k in moved)
        assert all(".lora_" in k for k in moved) == (lora is not None)


def test_a_teacher_or_the_student_of_another_recipe_cannot_be_told(family, cache, exported):
    folder = str(exported / "export")
    with pytest.raises(UserError, match="which a teacher is not"):
        assemble(tdm(), open_cache(cache), model=folder, run=None, device="cpu")
    with pytest.raises(UserError, match="dmd_lab tells nothing"):
        build(replace(dmd(), sigmas=shifted_levels(4, 3.0), post_trains=True), family, cache, student=folder)
    parts = build(replace(tdm(), post_trains=True), family, cache, student=folder)
    assert parts.student.told
    torch.testing.assert_close(
        parts.student.transformer.state_dict()["condition_embedder.delta_embedder.linear_2.bias"],
        wan.load_transformer(exported / "export").state_dict()["condition_embedder.delta_embedder.linear_2.bias"],
    )


# ------------------------------------------------------------------------------------------------ sampled and exported


def trained(config, family, cache, run):
    run.mkdir()
    write_atomically(run / "config.json", json.dumps(config.as_json()))
    write_atomically(run / "run.json", tiny_recipes.places(config, family, cache))
    run_training(build(config, family, cache, run), run)
    return run


@pytest.fixture(scope="module")
def exported(family, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    trained(tdm(), family, cache, folder / "run")
    export(folder / "run", out=folder / "export", fake_score=True)
    return folder


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_stock_pipeline_samples_an_export_as_we_do_in_every_number_of_steps(count, exported):
    pipe = AnyFlowPipeline.from_pretrained(exported / "export")
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": count}
    stock = pipe(CAPTIONS[0], **size, generator=torch.Generator().manual_seed(3), output_type="latent").frames
    source = open_generator(str(exported / "export"))
    assert (source.counts, source.solver) == ((1, 2, 4), "euler")
    text = attention.stack_text(wan.load_text(exported / "export")([CAPTIONS[0]]))
    for generator in (source, open_generator(str(exported / "run"))):
        student, levels = generator.load().eval(), generator.in_steps(count).sigmas
        ours = sample_student(student, text, (4, 2, 4, 4), levels, [3], "euler")
        torch.testing.assert_close(ours, stock, atol=2e-4, rtol=0)
        assert torch.equal(sample_student(student, text, (4, 2, 4, 4), levels, [3], "euler"), ours)
        unheard = follow(
            student, normal((1, 4, 2, 4, 4), [torch.Generator().manual_seed(3)], "cpu"), text, (*levels, 0.0)
        )
        assert (unheard[0] - ours).abs().max() > 1e-3  # as if its steps ended where they begin


@pytest.mark.slow
def test_an_export_opens_in_stock_diffusers_without_us(exported):
    code = """
import sys, torch
from diffusers import AnyFlowPipeline
pipe = AnyFlowPipeline.from_pretrained(sys.argv[1])
frames = pipe(sys.argv[2], height=32, width=32, num_frames=13, num_inference_steps=2, generator=torch.Generator().manual_seed(3)).frames[0]
assert "mogan" not in sys.modules
torch.save(torch.from_numpy(frames), sys.argv[3])
"""
    out = exported / "stock.pt"
    command = [sys.executable, "-W", "ignore", "-c", code, str(exported / "export"), CAPTIONS[0], str(out)]
    subprocess.run(command, check=True)
    student = Denoiser(wan.load_transformer(exported / "export").eval())
    text = attention.stack_text(wan.load_text(exported / "export")([CAPTIONS[0]]))
    latent = sample_student(student, text, (4, 4, 4, 4), levels_of(shifted_levels(4, 3.0), 2), [3], "euler")
    video = autoencoder.decode_video(wan.load_vae(exported / "export", torch.float32), latent)
    ours = (video[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(ours, torch.load(out, weights_only=True), atol=2e-4)


def test_the_export_says_what_it_is(exported):
    folder = exported / "export"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "AnyFlowPipeline"
    assert index["transformer"] == ["diffusers", "AnyFlowTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    facts = json.loads((folder / "mogan.json").read_text())
    assert (facts["counts"], facts["solver"]) == ([1, 2, 4], "euler")
    assert is_told(wan.load_transformer(folder, "fake_score"))
    card = (folder / "README.md").read_text()
    assert "AnyFlowPipeline.from_pretrained" in card
    assert "`num_inference_steps` may be 1, 2, 4" in card
    with pytest.raises(UserError, match="no LoRA of a stock Wan"):
        export(exported / "run", out=exported / "lora.safetensors", to="lora")


def test_a_run_with_adapters_is_exported_merged(family, cache, tmp_path):
    run = trained(replace(tdm(), lora=3), family, cache, tmp_path / "run")
    export(run, out=tmp_path / "export", fake_score=True)
    of_run, of_export = (open_generator(str(tmp_path / n)).load().transformer.state_dict() for n in ("run", "export"))
    start = tell_steps(wan.load_transformer(family / "teacher")).state_dict()
    assert of_run.keys() == of_export.keys() == start.keys()
    for name, tensor in of_run.items():
        torch.testing.assert_close(of_export[name], tensor)
    told = "condition_embedder.delta_embedder.linear_1.weight"
    assert not torch.equal(of_run[told], start[told])


def test_a_student_told_nothing_is_an_ordinary_pipeline_whose_card_has_a_scheduler_for_each_number(
    family, cache, tmp_path
):
    config = replace(tdm(), rollout=Intervals(counts=(1, 2, 4), told=False), iterations=1)
    run = trained(config, family, cache, tmp_path / "run")
    export(run, out=tmp_path / "export")
    pipe = WanPipeline.from_pretrained(tmp_path / "export")
    pipe.set_progress_bar_config(disable=True)
    line = next(x for x in (tmp_path / "export" / "README.md").read_text().splitlines() if x.startswith("- in 2 steps"))
    scheduler = line.split("`")[1].removeprefix("pipe.scheduler = ")
    import diffusers

    pipe.scheduler = eval(scheduler, vars(diffusers))  # what a reader of the card does
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    stock = pipe(CAPTIONS[0], **size, generator=torch.Generator().manual_seed(3), output_type="latent").frames
    source = open_generator(str(tmp_path / "export")).in_steps(2)
    text = attention.stack_text(wan.load_text(tmp_path / "export")([CAPTIONS[0]]))
    ours = sample_student(source.load().eval(), text, (4, 2, 4, 4), source.sigmas, [3], source.solver)
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=0)


def test_the_command_samples_in_the_numbers_of_steps_that_were_trained(exported, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(CAPTIONS[0] + "\n")
    for number, model in ((1, "export"), (2, "run"), (None, "run")):
        out = tmp_path / str(number)
        given = [] if number is None else ["--steps", str(number)]
        command = ["sample", "--model", str(exported / model), "--prompts", str(prompts), "--out", str(out)]
        assert main([*command, *given]) == 0
        row = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
        assert row["sigmas"] == list(levels_of(shifted_levels(4, 3.0), number or 4))
        assert row["solver"] == "euler"
        assert read_video(out / row["file"])[1] == 16
    assert main(["sample", "--model", str(exported / "run"), "--prompts", str(prompts), "--out", str(tmp_path / "3"), "--steps", "3"]) == 2  # fmt: skip
    assert "trained for 1, 2, 4 steps, not for 3" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "k"), [(1, 3.0), (2, 3.0), (4, 1.0), (4, 5.0), (8, 8.0)])
def test_the_stock_scheduler_visits_the_levels_of_every_number_of_steps(steps, k, tmp_path):
    sigmas = shifted_levels(steps, k)
    flow_map_scheduler(sigmas).save_pretrained(tmp_path)
    stock = FlowMapEulerDiscreteScheduler.from_pretrained(tmp_path)
    for count in (n for n in (1, 2, 4, 8) if steps % n == 0):
        stock.set_timesteps(count)
        np.testing.assert_allclose(stock.sigmas, [*levels_of(sigmas, count), 0.0], atol=1e-6)


def test_levels_that_are_no_shifted_grid_cannot_be_exported(told, family, tmp_path):
    with pytest.raises(UserError, match="shifted uniform grids"):
        save_student(told.transformer, family / "teacher", tmp_path / "x", (1.0, 0.757, 0.522), torch.float32, "a test")


# ------------------------------------------------------------------------------------------------ at full size


def test_the_parameters_that_tell_are_counted():
    shapes = PUBLISHED["wan2.1-t2v-1.3b"]
    with torch.device("meta"):
        from mogan.costs.calls import build_transformer

        plain, told = build_transformer(shapes, 1), tell_steps(build_transformer(shapes, 1))
    counted = network_parameters(shapes)
    assert sum(p.numel() for p in told.parameters()) - sum(p.numel() for p in plain.parameters()) == counted["told"]
    assert counted["told"] == 256 * 1536 + 1536 + 1536 * 1536 + 1536
    assert counted["told_adapters"] == 256 + 1536 + 1536 + 1536


def test_an_export_has_the_shapes_of_its_base(exported, family):
    assert network_parameters(read_shapes(str(exported / "export"))) == network_parameters(
        read_shapes(str(family / "teacher"))
    )
