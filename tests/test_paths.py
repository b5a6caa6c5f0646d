"""A teacher's paths: kept as they were sampled, at the levels that were told, and given to the students they are for."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CAPTIONS, SIGMAS
from mogan.cli import main
from mogan.data.batches import draw_batch
from mogan.data.cache import open_cache
from mogan.errors import UserError
from mogan.models import wan
from mogan.models.attention import stack_text
from mogan.models.denoiser import Denoiser, guided_velocity
from mogan.objectives import Objective
from mogan.runs.identity import of_cache
from mogan.sampling.samplers import sample_teacher
from mogan.sampling.trajectories import kept_of, trajectories
from mogan.schedule import shift as shifted
from mogan.terms import LATENT, PATH, Lesson, Terms
from mogan.training.assemble import assemble
from mogan.training.loop import run_training
from mogan.training.steps import Position, draw, split
from tiny_recipes import flow_matching

STEPS, GUIDANCE, SHIFT = 6, 2.0, 3.0
LEVELS = [shifted(1 - i / STEPS, SHIFT) for i in range(STEPS)] + [0.0]  # exact: 1, .857, .6 are the student's own
ROUNDED = 2**-10  # of a number kept in fp16


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(CAPTIONS))
    return path


@pytest.fixture(scope="module")
def make(family, prompts):
    def make(out: Path, **options) -> Path:
        usual = {"keep": "all", "steps": STEPS, "guidance": GUIDANCE, "shift": SHIFT, "negative_prompt": ""}
        usual |= {"model": str(family / "teacher"), "precision": "fp32", "device": "cpu", "first_seed": 5, "batch": 3}
        trajectories(**{"prompts": prompts, "out": out, **usual, **options})
        return out

    return make


@pytest.fixture(scope="module")
def store(make, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("stores") / "all")


@pytest.fixture(scope="module")
def teacher(family) -> Denoiser:
    return Denoiser(wan.load_transformer(family / "teacher").eval())


def path_of(store: Path, number: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Latents, text and entry of one path."""
    opened = open_cache(store)
    entry = opened.entries[number]
    latents = load_file(store / "paths" / f"{entry['id']}.safetensors")["latents"]
    assert latents.dtype == torch.float16
    return latents.float(), opened.text(entry["caption"]), entry


def test_euler_between_kept_neighbours_gives_the_next_latent_at_the_level_that_is_told(store, teacher):
    null = stack_text([open_cache(store).text("")])
    for number in range(4):
        latents, text, _ = path_of(store, number)
        assert len(latents) == STEPS + 1

        def step(i, told, latents=latents, text=text):
            with torch.no_grad():
                level = torch.tensor([told])
                velocity = guided_velocity(teacher, latents[i, None], level, stack_text([text]), null, GUIDANCE)
            return latents[i] + (LEVELS[i + 1] - LEVELS[i]) * velocity[0]

        off, elsewhere = [], []
        for i in range(STEPS):
            off.append((step(i, LEVELS[i]) - latents[i + 1]).abs().max())
            elsewhere.append((step(i, LEVELS[i] - 0.15) - latents[i + 1]).abs().max())
        assert max(off) < 2 * ROUNDED * latents.abs().max()
        assert max(elsewhere) > 3 * max(off)  # told another level, the network says another velocity


def test_the_last_latent_is_what_sample_teacher_makes_from_the_same_seed_alone(store, teacher):
    null = stack_text([open_cache(store).text("")])
    seeds = set()
    for number in range(4):
        latents, text, entry = path_of(store, number)
        made = sample_teacher(
            teacher, stack_text([text]), null, latents.shape[1:], [entry["seed"]], steps=STEPS, guidance=GUIDANCE,
            shift=SHIFT, solver="euler",
        )  # fmt: skip
        torch.testing.assert_close(latents[-1, None], made, atol=1e-5, rtol=ROUNDED)
        noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(entry["seed"]))
        torch.testing.assert_close(latents[0, None], noise, atol=1e-5, rtol=ROUNDED)
        seeds.add(entry["seed"])
    assert seeds == {5, 6, 7, 8}  # no two paths begin with the same noise


@pytest.mark.parametrize(("steps", "shift"), [(50, 8.0), (48, 8.0), (7, 1.0)])
def test_the_network_is_told_the_level_at_which_its_input_lies(steps, shift):
    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = []

        def forward(self, x, timestep, text, return_dict=False):
            self.levels.append(float(timestep[0]) / 1000)
            return (torch.zeros_like(x),)

    told, seen = Told(), []
    sample_teacher(
        Denoiser(told), torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), (1, 2, 2, 2), [0], steps=steps, guidance=1.0,
        shift=shift, solver="euler", see=lambda i, x: seen.append(i),
    )  # fmt: skip
    exact = [shift * (1 - i / steps) / (1 + (shift - 1) * (1 - i / steps)) for i in range(steps)]
    assert told.levels == pytest.approx(exact, abs=1e-6)
    assert seen == list(range(steps + 1))


def test_levels_go_with_their_own_grid(make, tmp_path):
    """CausVid's trap: index 36 of 50 steps and of 48 are .7568 and .7273."""
    facts = {}
    for steps in (50, 48):
        out = make(tmp_path / str(steps), steps=steps, shift=8.0, keep=f"0,36,{steps}", guidance=1.0)
        facts[steps] = json.loads((out / "trajectories.json").read_text())
    assert facts[50]["levels"] == pytest.approx([1, 0.75676, 0], abs=1e-5)
    assert facts[48]["levels"] == pytest.approx([1, 0.72727, 0], abs=1e-5)
    assert (
        open_cache(tmp_path / "48").path_to(open_cache(tmp_path / "48").entries[0]["id"], (1.0, 8 / 11)).shape[0] == 2
    )
    with pytest.raises(UserError, match=r"keeps the levels 1, 0.7568, 0, and the student's are 1, 0.7273"):
        open_cache(tmp_path / "50").path_to(open_cache(tmp_path / "50").entries[0]["id"], (1.0, 8 / 11))


def test_some_levels_kept_are_the_same_as_all_kept_and_some_read(store, make, tmp_path):
    some = open_cache(make(tmp_path / "some", keep="0,2,4,6"))
    every = open_cache(store)
    assert [e["id"] for e in some.entries] == [e["id"] for e in every.entries]
    for entry in some.entries:
        read = every.path_to(entry["id"], (1.0, 6 / 7, 0.6, 0.0))
        assert torch.equal(read, some.path_to(entry["id"], (1.0, 6 / 7, 0.6, 0.0)))
        assert torch.equal(read[1:3], load_file(store / "paths" / f"{entry['id']}.safetensors")["latents"][[2, 4]])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_store_goes_on_where_it_stopped_and_shards_make_the_same_one(store, make, prompts, tmp_path, capsys):
    for shard in ("0/2", "1/2"):
        make(tmp_path / "shards", shard=shard, batch=1)
        finished = (tmp_path / "shards" / "index.jsonl").is_file()
        assert finished == (shard == "1/2")
        if not finished:
            with pytest.raises(UserError, match="again, without --shard"):
                open_cache(tmp_path / "shards")
    one, two = bytes_of(store), bytes_of(tmp_path / "shards")
    assert one.keys() == two.keys()
    apart = [name for name in one if one[name] != two[name] and "paths/" not in name]
    assert not apart
    for name in (name for name in one if "paths/" in name):  # another batch: rounding
        a, b = (load_file(folder / name)["latents"].float() for folder in (store, tmp_path / "shards"))
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    lost = sorted((tmp_path / "shards" / "paths").iterdir())[1]
    lost.unlink()
    (tmp_path / "shards" / "index.jsonl").unlink()  # as after a kill
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards" / "paths").iterdir()}
    make(tmp_path / "shards", batch=1)
    assert bytes_of(tmp_path / "shards") == two
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    backwards = tmp_path / "backwards.txt"
    backwards.write_text("\n".join(reversed(CAPTIONS)))
    make(tmp_path / "shards", prompts=backwards, batch=1)
    assert bytes_of(tmp_path / "shards") == two
    assert "4 paths in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 5}, "steps 6, not 5"),
        ({"guidance": 1.0}, "guidance 2.0, not 1.0"),
        ({"shift": 5.0}, "shift 3.0, not 5.0"),
        ({"keep": "0,6"}, "kept"),
        ({"negative_prompt": "a blue square falling"}, "negative_prompt"),
    ],
)
def test_paths_made_otherwise_do_not_go_into_the_same_store(store, make, options, said):
    before = bytes_of(store)
    with pytest.raises(UserError, match=said):
        make(store, **options)
    assert bytes_of(store) == before


@pytest.mark.parametrize("keep", ["0,7", "1,6", "6,0", "0,3", "0,2,2,6", "0,x,6", "", "-1,6", "0," + "9" * 5000])
def test_what_is_no_path_from_noise_to_clip_is_refused(keep):
    with pytest.raises(UserError, match="rise from 0 to 6"):
        kept_of(keep, 6)
    assert kept_of("0, 2,6", 6) == [0, 2, 6]


# ---------------------------------------------------------------------------------------------- what they are for


@dataclass(frozen=True, kw_only=True)
class Follow:
    """The student's velocity at the noise, regressed on the way to the clip."""

    clips: tuple[str, ...] = (PATH,)

    def terms(self, config):
        return Terms(lessons={"student": Lesson(rollout=False, clips=self.clips, captions=True)})

    def build(self, base, others):
        def loss(rollout, batch, generator):
            path = batch.path_BKCFHW.float()
            ones = torch.ones(len(path))
            velocity = base.student.velocity(path[:, 0], ones, stack_text(batch.text))
            return (velocity - (path[:, 0] - path[:, -1])).square().mean(), {}

        return Objective(None, {"student": loss})


def follow(**settings):
    config = flow_matching()
    plan = (replace(config.plan[0], by="follow", accumulate=2),)
    return replace(config, plan=plan, objectives={"follow": Follow(**settings)}, sigmas=SIGMAS, iterations=2)


def test_a_store_is_the_data_of_a_run_whose_batches_hold_the_students_levels(store, family, tmp_path):
    config = follow()
    parts = assemble(config, open_cache(store), model=str(family / "teacher"), run=tmp_path, device="cpu")
    assert parts.latent_shape == (4, 4, 4, 4)
    batch = draw(parts, Position(0, 0, 0, 0))
    assert batch.path_BKCFHW.shape == (2, 4, *parts.latent_shape)
    for clip, caption, path in zip(batch.ids, batch.prompts, batch.path_BKCFHW, strict=True):
        assert torch.equal(path, load_file(store / "paths" / f"{clip}.safetensors")["latents"][[0, 2, 4, 6]])
        assert {e["id"]: e["caption"] for e in parts.cache.entries}[clip] == caption
    halves = split(batch, 2)
    assert torch.equal(torch.cat([half.path_BKCFHW for half in halves]), batch.path_BKCFHW)
    run_training(parts, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2


def test_a_store_of_another_teacher_is_refused_even_where_only_the_middle_of_its_weights_differs(
    store, family, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(family / "teacher", other)
    file = next((other / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["blocks.2.attn1.to_q.weight"][0, 0] += 0.01
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"was made with teacher .*: make it again for this model"):
        assemble(follow(), open_cache(store), model=str(other), run=None, device="cpu")


def test_a_store_without_the_students_levels_and_data_without_paths_are_refused(store, cache, family, make, tmp_path):
    model = str(family / "teacher")
    other = replace(follow(), sigmas=(1.0, 0.8, 0.6))
    with pytest.raises(UserError, match=r"student's are 1, 0\.8, 0\.6, 0"):
        assemble(other, open_cache(store), model=model, run=None, device="cpu")
    with pytest.raises(UserError, match=r"holds no paths of a teacher.*mogan trajectories"):
        assemble(follow(), open_cache(cache), model=model, run=None, device="cpu")
    with pytest.raises(UserError, match=r"holds a teacher's paths; this recipe needs videos"):
        assemble(flow_matching(), open_cache(store), model=model, run=None, device="cpu")
    with pytest.raises(UserError, match="this recipe needs videos"):
        assemble(follow(clips=(PATH, LATENT)), open_cache(store), model=model, run=None, device="cpu")


@pytest.mark.parametrize("harm", ["cut", "shape", "nan", "gone"])
def test_a_damaged_path_is_named_with_what_to_do(harm, store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    file = sorted((copy / "paths").iterdir())[0]
    latents = load_file(file)["latents"]
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "shape":
        save_file({"latents": latents[:3]}, file)
    elif harm == "nan":
        save_file({"latents": latents * torch.nan}, file)
    else:
        file.unlink()
    ask = {"seed": 0, "iteration": 0, "update": 0, "size": 4, "want": (PATH,), "levels": (1.0, 0.6, 0.0)}
    with pytest.raises(UserError, match=rf"{file.stem}.*`mogan trajectories`"):
        draw_batch(open_cache(copy), **ask)


def test_a_guidance_that_no_number_bears_is_blamed_and_not_the_model(make, tmp_path):
    with pytest.raises(UserError, match="take a guidance and a shift nearer to the model's own"):
        make(tmp_path / "s", guidance=1e38)
    assert not (tmp_path / "s" / "paths").exists()


def test_a_run_knows_its_store_by_how_it_was_made_and_not_by_its_place(store, make, tmp_path):
    moved, again = tmp_path / "moved", make(tmp_path / "again", guidance=1.0)
    shutil.copytree(store, moved)
    assert of_cache(open_cache(moved)) == of_cache(open_cache(store)) != of_cache(open_cache(again))


def test_the_command_says_in_a_sentence_what_it_cannot_do(family, prompts, tmp_path, capsys):
    model = ["--model", str(family / "teacher")]
    ask = ["trajectories", "--prompts", str(prompts), "--out", str(tmp_path / "s")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for words, said in (
        ([*model, "--steps", "0"], "--steps takes a number from 1"),
        ([*model, "--steps", "4", "--keep", "0,3"], "rise from 0 to 4"),
        ([*model, "--shard", "2/2"], "--shard takes i/n"),
        (["--model", str(tmp_path / "run")], "give its export"),
    ):
        assert main([*ask, *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists() or not list((tmp_path / "s").iterdir())
