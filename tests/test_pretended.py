"""Nothing is on the wrong device: recipes and samplers on a pretended GPU (:mod:`pretended`), which any machine has."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

import test_trajectories
import tiny_recipes
from conftest import CAPTIONS
from mogan.data.cache import open_cache
from mogan.evaluation.likelihood import motion_log_likelihood
from mogan.evaluation.pairs import flow_of_pairs, neighbours
from mogan.lab.clips import HELD_OUT_SEED, rendered_clips
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser
from mogan.motion.estimators import load_flow
from mogan.motion.pixel_flux import PixelFlux, net_motion
from mogan.runs.generator import open_generator
from mogan.sampling.motion_score import steer
from mogan.sampling.sample import encode_each
from mogan.sampling.samplers import pictures, sample_student, sample_teacher
from mogan.sampling.trajectories import trajectories
from mogan.training.assemble import assemble
from mogan.training.held_out import Gain
from mogan.training.loop import resume, run_training
from mogan.training.steps import complete, draw, learn, positions
from pretended import WrongDevice, a_pretended_gpu

RECIPES = test_trajectories.RECIPES
QUICK = ("dmd_lab", "flow_matching_lab")


def two():
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    return here, there, torch.nn.Linear(3, 3).to("cuda")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda here, there, network: here + there,
        lambda here, there, network: network(here),
        lambda here, there, network: there.numpy(),
        lambda here, there, network: torch.cat([here, there]),
        lambda here, there, network: torch.stack([here.sum(), there.sum()]),
        lambda here, there, network: here.add_(there.sum()),
        lambda here, there, network: here[torch.tensor([0], device="cuda")],
        lambda here, there, network: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda here, there, network: there.normal_(generator=torch.Generator()),
    ],
)
def test_what_a_gpu_refuses_is_refused(wrong):
    with a_pretended_gpu(), pytest.raises(WrongDevice):
        wrong(*two())


def test_what_a_gpu_does_is_done():
    with a_pretended_gpu():
        here, there, network = two()
        assert {p.device for p in network.parameters()} == {torch.device("cuda", 0)}
        network(there).sum().backward()
        made = (
            there + 1,
            there * here.sum(),
            here.to(there),
            there.new_zeros(2),
            network.weight.grad,
            there[torch.tensor([0])],
        )
        assert {x.device.type for x in made} == {"cuda"}
        assert {x.device.type for x in (here, there.cpu(), here.new_zeros(2), torch.zeros(3))} == {"cpu"}
        assert (there.cpu().numpy() == 1).all()


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in RECIPES])
def test_a_recipe_trains_saves_and_resumes(recipe, family, cache, paths, tmp_path):
    config = RECIPES[recipe]()
    config = replace(config, iterations=2 if any(u.start for u in config.plan) else 1)
    data, student = tiny_recipes.data(config, cache, paths), tiny_recipes.start(config, family)

    def build():
        return assemble(
            config, open_cache(data), model=str(family / "teacher"), student=student, run=tmp_path, device="cuda"
        )

    with a_pretended_gpu() as places:
        parts = build()
        run_training(parts, tmp_path)
        again = build()
        assert resume(again, tmp_path) == config.iterations
        own, read = parts.state(), again.state()
        assert all(torch.equal(own[name], value) and own[name].device == value.device for name, value in read.items())
        assert own.keys() == read.keys()
        assert {x.device.type for x in parts.average.weights.values()} == {"cuda"}
        assert all("dropout" in name or "attention" in name for name in places.undetermined), places.undetermined


DUE = {  # where a step chooses by what the device knows, and how
    "denoiser.velocity": "samples are given to the expert of their level",
    "redmd._measure": "once, before the first update",
    "samplers.sample_teacher": "then, too",
    "surrogate._trusted": "an update is exact or predicted",
    "surrogate.prepare": "it learns from what is remembered, if anything is",
}


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in RECIPES])
def test_no_step_waits_for_the_device(recipe, family, cache, paths):
    config = RECIPES[recipe]()
    data, student = tiny_recipes.data(config, cache, paths), tiny_recipes.start(config, family)
    with a_pretended_gpu() as places:
        parts = assemble(
            config, open_cache(data), model=str(family / "teacher"), student=student, run=None, device="cuda"
        )
        made = []
        for where in islice(positions(config, 0), 40):
            update = config.plan[where.update]
            batch = complete(parts, update, draw(parts, where))
            places.waits.clear()
            found = learn(parts, where, batch, made)
            made = found.rollouts if update.learns == "student" else made
            assert places.waits <= DUE.keys(), update.label


def test_clips_are_sampled_and_measured(family, cache, tmp_path):
    gpu, teacher, student = torch.device("cuda", 0), family / "teacher", str(family / "student")
    with a_pretended_gpu():
        texts = encode_each([*CAPTIONS[:2], ""], teacher, gpu)
        words, null = stack_text([texts[c] for c in CAPTIONS[:2]], gpu), stack_text([texts[""]], gpu)
        shape = wan.latent_shape(teacher, wan.geometry(teacher))
        source = open_generator(student)
        made = sample_student(source.load().to(gpu), words, shape, source.sigmas, [1, 2])
        assert made.device == gpu
        network = Denoiser(wan.load_transformer(teacher)).to(gpu).eval()
        for solver, flowmo in (("unipc", False), ("euler", True)):
            sample_teacher(
                network, words, null, shape, [1, 2], steps=2, guidance=2.0, shift=3.0, solver=solver, flowmo=flowmo
            )
        options = {"motion": network, "text_BLD": words, "null_1LD": null, "guidance": 2.0, "ratio": 0.5, "given": 1}
        steer(made, made, torch.full((2,), 0.5, device=gpu), **options)
        motion_log_likelihood(network, made, words, generator=torch.Generator(), steps=1, probes=2)
        vae, flow = wan.load_vae(teacher, torch.float32).to(gpu), load_flow(str(family / "raft"), 1, gpu)
        assert len(list(pictures(vae, made[:1]))) == 13
        flux = PixelFlux(vae, flow)(made, torch.rand(2, 5, 2).to(gpu))
        assert net_motion([flux.flow_BCFHW]).device == gpu
        frames = rendered_clips(1, HELD_OUT_SEED)[0, :, :3].permute(1, 2, 3, 0).numpy()
        assert len(list(flow_of_pairs(neighbours(list(frames)), flow))) == 2
        (tmp_path / "p.txt").write_text(CAPTIONS[0])
        trajectories(
            prompts=tmp_path / "p.txt", out=tmp_path / "store", model=str(teacher), keep="0,2", steps=2, guidance=2.0,
            shift=3.0, negative_prompt="", precision="fp32", device="cuda",
        )  # fmt: skip


@pytest.mark.slow
def test_held_out_motion_and_bf16(family, cache, tmp_path):
    with a_pretended_gpu():
        config = replace(tiny_recipes.mogan(), iterations=1, precision="auto")
        student = tiny_recipes.start(config, family)
        parts = assemble(
            config, open_cache(cache), model=str(family / "teacher"), student=student, run=tmp_path, device="auto"
        )
        assert (parts.student.dtype, parts.device.type) == (torch.bfloat16, "cuda")
        gain = object.__new__(Gain)
        gain.cache, gain.prompts = open_cache(cache), CAPTIONS[:2]
        assert gain.measure(parts) > 0
