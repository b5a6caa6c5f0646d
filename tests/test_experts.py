"""Two transformers in one model: each level has its expert, from the folder to the export."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

import tiny_recipes
from conftest import BOUNDARY, CAPTIONS
from mogan.config import EULER, LCM
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.exchange.export import export
from mogan.exchange.schedulers import scheduler_for
from mogan.models import attention, wan
from mogan.models.denoiser import Denoiser
from mogan.models.experts import LOW, boundary_of, experts, stock_boundary
from mogan.runs.checkpoint import latest_checkpoint
from mogan.runs.generator import open_generator
from mogan.runs.identity import of_model
from mogan.sampling.samplers import sample_student
from mogan.schedule import shifted_levels
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, step


class Known(torch.nn.Module):
    """``v = factor x``, and how many samples it saw."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.seen = torch.nn.Parameter(torch.tensor(factor)), []

    def forward(self, x, timestep, text, **rest):
        self.seen.append(len(x))
        return (self.factor * x,)


def pair(**more):
    return Denoiser(Known(2.0), torch.float32, Known(3.0), BOUNDARY, **more)


X, TEXT = torch.randn(3, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 2, 8)


def test_a_sample_meets_the_expert_of_its_level_and_the_boundary_belongs_to_the_first():
    denoiser, sigma = pair(), torch.tensor([0.2, BOUNDARY, 0.9])
    found = denoiser.velocity(X, sigma, TEXT)
    torch.testing.assert_close(found, X * torch.tensor([3.0, 2.0, 2.0]).view(3, 1, 1, 1, 1))
    assert (denoiser.transformer.seen, denoiser.transformer_2.seen) == ([2], [1])
    found[1:].square().sum().backward()
    assert denoiser.transformer.factor.grad != 0
    assert denoiser.transformer_2.factor.grad == 0  # it was called, and nothing of it was looked at
    denoiser = pair()
    denoiser.velocity(X, torch.full((3,), 0.9), TEXT).sum().backward()
    assert denoiser.transformer_2.seen == []
    assert denoiser.transformer_2.factor.grad is None


def test_a_sample_of_several_levels_counts_by_its_highest():
    given = torch.tensor([[0.0, 0.9], [0.0, 0.3], [0.0, 0.8]])
    x = X.expand(3, 1, 2, 2, 2)
    denoiser = pair()
    denoiser.transformer.config = denoiser.transformer_2.config = type("C", (), {"patch_size": (1, 1, 1)})
    found = denoiser.velocity(x, given, TEXT)
    torch.testing.assert_close(found, x * torch.tensor([2.0, 3.0, 2.0]).view(3, 1, 1, 1, 1))


def test_an_expert_that_another_process_needs_is_called_and_changes_nothing():
    alone, together = pair(), pair(anywhere=lambda flag: True)
    sigma = torch.full((3,), 0.9)
    expected, found = alone.velocity(X, sigma, TEXT), together.velocity(X, sigma, TEXT)
    assert torch.equal(found, expected)
    assert together.transformer_2.seen == [1]
    found.square().sum().backward()
    assert together.transformer_2.factor.grad == 0


@pytest.mark.parametrize(
    ("low", "high", "parts"),
    [
        (0.02, 0.98, ("transformer", LOW)),
        (BOUNDARY, 0.98, ("transformer",)),
        (0.02, 0.69, (LOW,)),
        (0.02, BOUNDARY, ("transformer", LOW)),
    ],
)
def test_only_the_experts_of_the_levels_that_are_compared_are_loaded(low, high, parts):
    assert experts(BOUNDARY, low, high) == parts
    assert experts(None, low, high) == ("transformer",)


def spoilt(two, tmp_path, change):
    model = tmp_path / "model"
    shutil.copytree(two, model)
    change(model)
    return model


def no_boundary(model):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))


def other_width(model):
    config = json.loads((model / LOW / "config.json").read_text())
    (model / LOW / "config.json").write_text(json.dumps(config | {"ffn_dim": 64}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_boundary, "needs boundary_ratio"),
        (other_width, "differ in ffn_dim"),
        (lambda model: shutil.rmtree(model / LOW), "one of them is not there"),
    ],
)
def test_a_folder_of_two_that_cannot_be_right_is_a_sentence(change, message, two, tmp_path):
    with pytest.raises(UserError, match=message):
        wan.resolve_model(spoilt(two, tmp_path, change))


def test_a_folder_of_two_is_known_by_both(two, family, tmp_path):
    assert boundary_of(wan.resolve_model(two)) == BOUNDARY
    assert boundary_of(family / "teacher") is None
    other = spoilt(two, tmp_path, lambda model: shutil.copytree(model / "transformer", model / LOW, dirs_exist_ok=True))
    assert of_model(other) != of_model(two)
    assert open_generator(str(other)).mark() != open_generator(str(two)).mark()


def trained(config, model, cache, run):
    run.mkdir(exist_ok=True)
    parts = assemble(config, open_cache(cache), model=str(model), run=run, device="cpu")
    run_training(parts, run)
    (run / "config.json").write_text(json.dumps(config.as_json()))
    (run / "run.json").write_text(json.dumps({"model": str(model), "student": str(model), "data": str(cache)}))
    return parts


def test_flow_matching_teaches_both_experts_of_a_model(two, cache, tmp_path):
    parts = assemble(tiny_recipes.flow_matching(), open_cache(cache), model=str(two), run=tmp_path, device="cpu")
    before = {k: v.clone() for k, v in parts.student.state_dict().items()}
    for iteration in range(4):
        step(parts, Position(0, iteration, 0, 0))
    moved = {k.split(".")[0] for k, v in parts.student.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"transformer", LOW}


def stock_clip(folder, steps, solver):
    """Latents of the stock pipeline, and which transformer it called at which timestep."""
    pipe, seen = WanPipeline.from_pretrained(folder), []
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", LOW):
        pipe.components[name].register_forward_pre_hook(
            lambda module, args, given, name=name: seen.append((name, given["timestep"][0].item())), with_kwargs=True
        )
    size = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": steps, "guidance_scale": 1.0}
    torch.manual_seed(3)
    draw = {"generator": torch.Generator().manual_seed(3)} if solver == EULER else {}
    return pipe(CAPTIONS[0], **size, output_type="latent", **draw).frames, seen


@pytest.mark.parametrize("recipe", [tiny_recipes.dmd, tiny_recipes.phased], ids=["dmd", "phased"])
def test_the_stock_pipeline_samples_the_export_with_the_same_experts_and_latents(recipe, two, family, cache, tmp_path):
    config = recipe()
    model = two if config.boundary is None else family / "teacher"
    run = tmp_path / "run"
    trained(config, model, cache, run)
    export(run, out=tmp_path / "out")
    stock, seen = stock_clip(tmp_path / "out", len(config.sigmas), config.solver)
    boundary = config.boundary or BOUNDARY
    levels = pytest.approx([1000 * s for s in config.sigmas], abs=0.1)
    assert [t for _, t in seen] == levels
    assert [name for name, _ in seen] == ["transformer" if s >= boundary else LOW for s in config.sigmas]
    for name in (str(run), str(tmp_path / "out")):  # the run itself, and what it was exported to
        source = open_generator(name)
        assert (source.boundary, source.solver) == (boundary, config.solver)
        text = attention.stack_text(wan.load_text(source.folder)([CAPTIONS[0]]))
        ours = sample_student(source.load().eval(), text, (4, 4, 4, 4), config.sigmas, [3], config.solver)
        torch.testing.assert_close(ours, stock, atol=1e-3, rtol=0)


def test_a_level_on_the_boundary_has_the_same_expert_in_a_stock_pipeline():
    """In single precision the fourth level, 0.75, comes out as timestep 749.99994."""
    for steps in range(2, 13):
        for shift in (3.0, 5.0, 7.0, 12.0):
            sigmas = shifted_levels(steps, shift)
            scheduler = scheduler_for(sigmas, LCM)
            scheduler.set_timesteps(steps)
            levels = torch.tensor(sigmas)
            for boundary in (*sigmas[1:], 0.875, 0.75):
                ratio = stock_boundary(boundary, sigmas)
                assert [bool(t >= 1000 * ratio) for t in scheduler.timesteps] == (levels >= boundary).tolist()
    scheduler = scheduler_for(shifted_levels(6, 3.0), LCM)
    scheduler.set_timesteps(6)
    assert [bool(t >= 1000 * 0.75) for t in scheduler.timesteps] == [True] * 3 + [False] * 3
    assert stock_boundary(0.825, shifted_levels(6, 3.0)) == 0.825


def test_two_experts_are_exported_as_two_lora_files_that_stock_diffusers_loads(family, cache, tmp_path):
    config = replace(tiny_recipes.phased(), lora=3)
    trained(config, family / "teacher", cache, tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "a.safetensors", to="lora")
    assert sorted(p.name for p in tmp_path.glob("a*")) == ["a-high.safetensors", "a-low.safetensors", "a.md"]
    before = (tmp_path / "a-low.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"a-high.safetensors exists already"):
        export(tmp_path / "run", out=tmp_path / "a.safetensors", to="lora")
    assert (tmp_path / "a-low.safetensors").read_bytes() == before
    low = WanTransformer3DModel.from_pretrained(family / "teacher" / "transformer")
    pipe = WanPipeline.from_pretrained(family / "teacher", transformer_2=low, boundary_ratio=config.boundary)
    pipe.load_lora_weights(str(tmp_path / "a-high.safetensors"))
    pipe.load_lora_weights(str(tmp_path / "a-low.safetensors"), load_into_transformer_2=True)
    ours = open_generator(str(tmp_path / "run")).load().eval()
    x, words = torch.randn(1, 4, 4, 4, 4), torch.randn(3, 64)
    text, padded = attention.stack_text([words]), torch.nn.functional.pad(words, (0, 0, 0, 509))[None]
    for sigma, network in ((0.9, pipe.transformer), (0.5, pipe.transformer_2)):
        stock = network.eval()(x, torch.tensor([1000 * sigma]), padded, return_dict=False)[0]
        torch.testing.assert_close(ours.velocity(x, torch.tensor([sigma]), text), stock, atol=1e-5, rtol=1e-4)
    card = (tmp_path / "a.md").read_text()
    assert 'load_lora_weights("a-low.safetensors", load_into_transformer_2=True)' in card
    assert f"boundary_ratio={config.boundary}" in card


def test_a_run_of_two_experts_goes_on_bit_for_bit(two, cache, tmp_path):
    config = replace(tiny_recipes.dmd(), iterations=2)
    whole = trained(config, two, cache, tmp_path / "whole")
    trained(replace(config, iterations=1), two, cache, tmp_path / "parts")
    resumed = trained(config, two, cache, tmp_path / "parts")
    assert latest_checkpoint(tmp_path / "parts").name == "000002"
    assert all(torch.equal(v, resumed.state()[k]) for k, v in whole.state().items())


def test_a_fake_score_of_two_experts_is_not_exported(two, cache, tmp_path):
    trained(replace(tiny_recipes.dmd(), iterations=1), two, cache, tmp_path / "run")
    with pytest.raises(UserError, match="leave --fake-score out"):
        export(tmp_path / "run", out=tmp_path / "out", fake_score=True)


def test_a_student_conditioned_on_its_steps_is_not_of_two_experts(two, cache):
    with pytest.raises(UserError, match="no pipeline of two experts"):
        assemble(tiny_recipes.tdm(), open_cache(cache), model=str(two), run=None, device="cpu")
