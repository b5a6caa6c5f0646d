"""Efficient-vDiT's training: multi-step consistency in segments, and what a run of it is."""

import json
from dataclasses import replace

import pytest
import torch

import tiny_recipes
from mogan.cli import main
from mogan.costs.calls import Tracer
from mogan.costs.shapes import read_shapes
from mogan.costs.shapes import sparse as made_sparse
from mogan.data.batches import Batch
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.models.frame_sparse import kept_share, mask_of, set_frame_sparse
from mogan.objectives.block_distillation import BlockDistillation, BlockDistillationConfig
from mogan.objectives.mcd import MCD, MCDConfig
from mogan.recipes import efficient_vdit_mcd_lab
from mogan.runs.checkpoint import latest_checkpoint, load_part
from mogan.runs.generator import open_generator
from mogan.sampling.rollout import Euler, FewStep, follow
from mogan.schedule import shifted_levels
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from test_causal import loaded
from test_tiles import run

CLIPS = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
TEXT = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
NULL = torch.zeros(1, 2, 64)
BATCH = Batch(["a", "b"], ["a", "b"], TEXT, CLIPS)
SETTINGS = MCDConfig(steps=12, shift=3.0, guidance=1.0, decay=0.5)
GRID = (*shifted_levels(12, 3.0), 0.0)


class Line:
    """An ODE whose paths are straight, each to a clip of its own: ``v = (x - mean) / s`` leads to ``mean``."""

    def __init__(self, mean=0.7, wrong=0.0):
        self.mean, self.wrong, self.told = mean, wrong, []

    def velocity(self, x, sigma, text):
        self.told.append(sigma)
        return (x - self.mean) / sigma.view(-1, 1, 1, 1, 1).clamp(min=1e-9) + self.wrong


MANY = Batch(
    ["a"] * 64, ["a"] * 64, [TEXT[0]] * 64, torch.randn(64, 1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
)


def loss_of(objective, seed=0, batch=BATCH):
    loss, _ = objective.student_loss(None, batch, torch.Generator().manual_seed(seed))
    return float(loss.detach())


@pytest.mark.parametrize("segments", [1, 3, 12])
def test_where_a_step_is_exact_every_number_of_segments_is_consistent(segments):
    ends = (*shifted_levels(segments, 3.0)[1:], 0.0)
    exact, other = Line(), Line(wrong=0.1)
    assert loss_of(MCD(exact, exact, exact, NULL, SETTINGS, ends)) < 1e-9
    assert loss_of(MCD(other, exact, exact, NULL, SETTINGS, ends)) > 1e-5


class Curved:
    """The exact flow of ``N(0, 1/4)``, and the jump that ends where it does: ``v`` of a student of segments."""

    def __init__(self, ends=None):
        self.ends = ends

    @staticmethod
    def spread(s):
        return ((1 - s) ** 2 / 4 + s**2).sqrt()

    def velocity(self, x, sigma, text):
        s = sigma.view(-1, 1, 1, 1, 1)
        if self.ends is None:
            return x * (s - (1 - s) / 4) / self.spread(s) ** 2
        end = torch.tensor([max([e for e in self.ends if e < float(level) - 1e-6], default=0.0) for level in sigma])
        end = end.view(-1, 1, 1, 1, 1)
        return x * (self.spread(end) / self.spread(s) - 1) / (end - s - 1e-9)


def test_the_flow_from_end_to_end_is_consistent_but_for_the_teachers_step():
    sigmas = shifted_levels(3, 3.0)
    ends, found = (*sigmas[1:], 0.0), {}
    for steps in (12, 24, 48):
        settings = replace(SETTINGS, steps=steps)
        student = Curved(ends)
        found[steps] = loss_of(MCD(student, student, Curved(), NULL, settings, ends), batch=MANY)
        to_zero = loss_of(MCD(student, student, Curved(), NULL, settings, (0.0,)), batch=MANY)
        assert to_zero > 3 * found[steps], steps  # who means its segment's end does not mean the clip
    assert 8 < found[12] / found[24] < 32  # a square of the step's error, which falls with the square of the grid
    assert 8 < found[24] / found[48] < 32


def test_a_segment_a_step_is_regression_on_the_teachers_steps(family):
    student, teacher, other = (Denoiser(loaded(family)) for _ in range(3))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    objective = MCD(student, other, teacher, NULL, SETTINGS, GRID[1:])
    assert loss_of(objective) == 0.0  # an Euler step is one's own, whatever the target is
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.02)
    generator = torch.Generator().manual_seed(3)
    step = (torch.rand(2, generator=generator) * 12).long()
    noise = torch.randn(CLIPS.shape, generator=generator)
    here, there = (torch.tensor(GRID)[step + ahead] for ahead in (0, 1))
    x = (1 - here).view(2, 1, 1, 1, 1) * CLIPS + here.view(2, 1, 1, 1, 1) * noise
    text = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 6 - len(t))) for t in TEXT])
    gap = (there - here).view(2, 1, 1, 1, 1) * (student.velocity(x, here, text) - teacher.velocity(x, here, text))
    assert loss_of(objective, 3) == pytest.approx(float(gap.square().mean().detach()), rel=1e-5)


def test_the_sampler_visits_the_ends_and_jumps_between_them():
    config = efficient_vdit_mcd_lab()
    block, student = config.objectives["mcd"], Line()
    ends = block.ends(config)
    objective = MCD(student, student, student, NULL, block, ends)
    follow(student, torch.randn(1, 1, 1, 1, 1), NULL, (*config.sigmas, 0.0))
    told = [float(level) for level in student.told]
    assert told == pytest.approx([1.0, *ends[:-1]])
    assert set(objective.ends) == set(ends)
    assert all(end < level for level, end in zip(objective.levels, objective.ends, strict=False))
    with pytest.raises(ValueError, match="makes whole clips by Euler steps"):
        replace(config, rollout=FewStep())
    with pytest.raises(ValueError, match="must lie on the teacher's grid of 24 steps"):
        replace(config, sigmas=shifted_levels(5, 3.0), rollout=Euler(stop=5))


def test_guidance_and_gradient_are_where_they_belong(family):
    student, target, teacher = (Denoiser(loaded(family)) for _ in range(3))
    settings = replace(SETTINGS, guidance=2.5)
    objective = MCD(student, target, teacher, NULL, settings, GRID[4:])
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.05)
    objective.student_loss(None, BATCH, torch.Generator().manual_seed(0))[0].backward()
    assert all(p.grad is None for network in (teacher, target) for p in network.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    x, level = CLIPS, torch.tensor([0.5, 0.9])
    plain, guided = (guided_velocity(teacher, x, level, torch.zeros(2, 6, 64) + 1, NULL, g) for g in (1.0, 2.5))
    assert not torch.allclose(plain, guided)


def test_the_target_is_the_student_until_averaging_begins_and_then_follows(family):
    student, target = Denoiser(loaded(family)), Denoiser(loaded(family))
    objective = MCD(student, target, target, NULL, replace(SETTINGS, since=3, decay=0.75), (0.0,))

    def learnt():
        """The student after an update; how far behind it the target is then, as part of the update."""
        with torch.no_grad():
            for p in student.parameters():
                p.add_(1.0)
        return lambda: float((next(student.parameters()) - next(target.parameters())).detach().mean())

    for iteration, behind in ((2, 0.0), (3, 0.0), (4, 0.75), (5, 1.3125)):
        gap = learnt()
        objective.prepare(BATCH, iteration=iteration, generator=[], most=2)
        assert gap() == pytest.approx(behind, abs=1e-5)


def trained(config, model, start, cache, folder):
    folder.mkdir(exist_ok=True)
    parts = assemble(config, open_cache(cache), model=str(model), student=str(start), run=folder, device="cpu")
    run_training(parts, folder)
    return parts


@pytest.mark.parametrize("lora", [None, 3])
def test_a_sparse_student_is_distilled_from_the_dense_model(lora, sparse, family, cache, tmp_path):
    config = replace(tiny_recipes.efficient_vdit_mcd(), lora=lora, iterations=2)
    start, made = sparse / "teacher", tmp_path / "run"
    parts = trained(config, family / "teacher", start, cache, made)
    judge = parts.objectives["mcd"].judge
    masks = [mask_of(network.transformer) for network in (judge.student, judge.target, judge.teacher)]
    assert masks[0] == masks[1] == open_generator(str(start)).mask
    assert masks[2] is None
    (made / "config.json").write_text(json.dumps(config.as_json()))
    (made / "run.json").write_text(tiny_recipes.places(config, family, cache, str(start)))
    assert run("export", made, "--out", tmp_path / "out") == 0
    found = open_generator(str(tmp_path / "out"))
    assert (found.mask, found.solver) == (masks[0], "euler")
    if lora is None:
        part = tmp_path / "part"
        trained(replace(config, iterations=1), family / "teacher", start, cache, part)
        trained(config, family / "teacher", start, cache, part)
        for name in ("ema", "mcd_state"):
            whole, again = (load_part(latest_checkpoint(folder), name) for folder in (made, part))
            assert all(torch.equal(whole[k], again[k]) for k in whole)


# ---------------------------------------------------------------------------------------------- distilled by blocks


SIGMAS = (1.0, 0.6)


def distillation(family, counts, **settings):
    """Of a student with so many references in each block."""
    student, teacher = (Denoiser(loaded(family)) for _ in range(2))
    set_frame_sparse(student.transformer, 4, counts)
    teacher.requires_grad_(False)
    own = BlockDistillationConfig(**{"weight": 0.5} | settings)
    return BlockDistillation(student, teacher, NULL[0], SIGMAS, own)


def test_the_dense_student_has_nothing_to_learn_from_blocks(family):
    loss, numbers = distillation(family, (4,) * 4).student_loss(None, BATCH, torch.Generator().manual_seed(0))
    assert float(loss.detach()) == float(numbers["blocks"]) == 0.0
    loss, numbers = distillation(family, (4,) * 4, shift=3.0).student_loss(
        None, BATCH, torch.Generator().manual_seed(0)
    )
    assert float(numbers["blocks"]) == 0.0
    assert float(loss.detach()) > 0.1  # flow matching is still there
    loss, numbers = distillation(family, (1,) * 4).student_loss(None, BATCH, torch.Generator().manual_seed(0))
    assert min(float(loss.detach()), float(numbers["blocks"])) > 1e-5


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_loss_is_the_one_that_is_written_out(shift, family):
    objective = distillation(family, (4, 1, 2, 4), shift=shift)
    generator = torch.Generator().manual_seed(7)
    drawn = torch.rand(2, generator=generator)
    sigma = torch.tensor(SIGMAS)[(2 * drawn).long()] if shift is None else 3 * drawn / (1 + 2 * drawn)
    if shift is not None:
        torch.rand(2, generator=generator)  # no text is dropped
    noise, s = torch.randn(CLIPS.shape, generator=generator), sigma.view(2, 1, 1, 1, 1)
    text = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 6 - len(t))) for t in TEXT])
    seen: list[list[torch.Tensor]] = []
    for network in (objective.student, objective.teacher):
        kept: list[torch.Tensor] = []
        for block in network.transformer.blocks:
            for part in (block.attn1, block.ffn):
                part.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        with torch.no_grad():
            kept.append(network.velocity((1 - s) * CLIPS + s * noise, sigma, text))
        seen.append(kept)
    *ours, velocity = seen[0]
    *theirs, dense = seen[1]
    assert torch.equal(ours[0], theirs[0])  # the first block sees all
    assert len(ours) == 8
    parts = [((a - b) ** 2).sum((1, 2)) / (b**2).sum((1, 2)) for a, b in zip(ours, theirs, strict=True)]
    blocks = sum(float(part.mean()) for part in parts) / 4  # attention and MLP, over blocks
    target = dense if shift is None else noise - CLIPS
    want = float((velocity - target).square().mean()) + 0.5 * blocks
    loss, _ = objective.student_loss(None, BATCH, torch.Generator().manual_seed(7))
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert all(p.grad is not None for p in objective.student.transformer.blocks.parameters())


def test_blocks_that_are_recomputed_give_the_same_gradients(family):
    found = []
    for recompute in (False, True):
        objective = distillation(family, (1,) * 4)
        if recompute:
            objective.student.transformer.enable_gradient_checkpointing()
            objective.student.train()
        objective.student_loss(None, BATCH, torch.Generator().manual_seed(1))[0].backward()
        found.append([p.grad for p in objective.student.transformer.blocks.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("lora", [None, 3])
def test_a_distilled_run_learns_from_its_own_weights_and_goes_on(lora, family, cache, tmp_path):
    config = replace(tiny_recipes.efficient_vdit_kd(), lora=lora, iterations=2)
    start, made, part = family / "sparse", tmp_path / "run", tmp_path / "part"
    parts = trained(config, family / "teacher", start, cache, made)
    judge = parts.objectives["kd"].judge
    assert mask_of(judge.student.transformer) == open_generator(str(start)).mask
    assert mask_of(judge.teacher.transformer) is None
    records = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert all(record["blocks"] > 0 for record in records)
    trained(replace(config, iterations=1), family / "teacher", start, cache, part)
    trained(config, family / "teacher", start, cache, part)
    whole, again = (load_part(latest_checkpoint(folder), "ema") for folder in (made, part))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_what_cannot_be_distilled_is_a_sentence(family, sparse, cache):
    def build(start, **changes):
        config = replace(tiny_recipes.efficient_vdit_kd(), **changes)
        return assemble(config, open_cache(cache), model=str(family / "teacher"), student=start, run=None, device="cpu")

    for start, changes, said in (
        (str(family / "teacher"), {}, "attends densely"),
        (str(family / "sparse"), {"compile": True}, "looks into blocks"),
        (
            str(sparse / "student"),
            {},
            "samples by lcm and efficient_vdit_kd_lab trains a student that samples by euler",
        ),
    ):
        with pytest.raises(UserError, match=said):
            build(start, **changes)
    assert build(str(sparse / "student"), rollout=None).config.solver == "lcm"  # a DMD student, as it is sampled


# ---------------------------------------------------------------------------------------------- what it costs


@pytest.mark.slow
def test_attentions_share_of_the_price_falls_with_the_pairs_that_are_kept():
    shapes = read_shapes("lab")
    _, frames, height, width = shapes.latent
    layers, heads = shapes.transformer["num_layers"], shapes.transformer["num_attention_heads"]
    tokens = frames * height * width // 4
    of_attention = layers * 4 * tokens**2 * heads * shapes.transformer["attention_head_dim"]
    found = Tracer(made_sparse(shapes, (1, 1, 3, 3, 3, 3)), True, torch.bfloat16)
    dense = found.forward.work.flops  # as teachers are
    kept = (kept_share(frames, 1) + 2 * kept_share(frames, 3)) / 3
    assert dense - found.student[0].work.flops == pytest.approx(of_attention * (1 - kept), rel=1e-6)


def test_a_sparse_folder_is_priced_as_it_is_and_a_mistake_is_a_sentence(sparse, capsys):
    assert read_shapes(str(sparse / "teacher")).references == (1,) * 4
    for words, said in ((["--references", "9"], "from 1 to the 5"), (["--references", "1", "2"], "each of 6 blocks")):
        assert main(["estimate", "efficient_vdit_mcd_lab", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["estimate", "self_forcing_lab", "--references", "1"]) == 2
    assert "a causal student's chunks" in capsys.readouterr().err
