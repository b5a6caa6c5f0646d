"""Two gloo processes on the CPU stand for many GPUs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

import tiny_recipes
from conftest import TRANSFORMER
from mogan.data.batches import one_ahead
from mogan.data.cache import ensure_text, open_cache
from mogan.distributed import World, join
from mogan.errors import UserError
from mogan.models.wan import load_text
from mogan.runs.checkpoint import held_out_motions, latest_checkpoint, load_checkpoint, save_checkpoint, stored
from mogan.sharding import whole
from mogan.training.assemble import assemble
from mogan.training.load import _check_tokens
from mogan.training.loop import _graceful_stop, run_training
from mogan.training.steps import Position, draw, parts_of, step
from tiny_recipes import dmd, flow_matching, mogan

HERE = Path(__file__).parent
# Rounding differs (sums in another order), and Adam turns the sign of a gradient near zero into a full step.
LOSS = 1e-3  # relative difference of every logged mean, in every step
# A relativistic loss does not see the critic's last bias: its gradient is rounding, of which AdamW makes a whole step.
# Both logits move by it together; their gap, the loss and the penalties do not, and are held to LOSS.
LOGIT = 1e-3
MOVED = 1e-2  # difference of a network's weights, relative to how far they moved


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(ranks, arguments, **environment):
    """Processes as torchrun would start them, without its own."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    common = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"} | environment
    common |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes, seconds=600):
    """Exit codes and what was said, per rank."""
    said = [p.communicate(timeout=seconds) for p in processes]
    return [p.returncode for p in processes], [err for _, err in said]


def command(recipe, family, cache, out, *more):
    words = ["-m", "mogan", "train", f"tiny_recipes:{recipe}", "--model", str(family / "teacher"), "--device", "cpu"]
    words += ["--data", str(cache), "--out", str(out), *more]
    begins = {"redmd": "teacher", "shift": "teacher"} | dict.fromkeys(
        ("mogan", "offloaded", "mogan_i2v", "surrogate", "surrogate_of_four", "mogan_of_four"), "student"
    )
    begins |= dict.fromkeys(("reward_forcing", "mogan_causal"), "causal")
    begins |= {"efficient_vdit_kd": "sparse"}
    begin = begins.get(recipe)  # those that post-train
    return words + (["--student", str(family / begin)] if begin else [])


def train_alone(config, family, cache, out):
    out.mkdir(exist_ok=True)
    student = tiny_recipes.start(config, family)
    parts = assemble(config, open_cache(cache), model=str(family / "teacher"), student=student, run=out, device="cpu")
    before = {name: tensor.clone() for name, tensor in parts.state().items()}
    run_training(parts, out)
    return before


def train_together(ranks, recipe, family, cache, out, *more):
    codes, said = finish(start(ranks, command(recipe, family, cache, out, *more)))
    assert codes == [0] * ranks, said


def final(run):
    path = latest_checkpoint(run)
    state = {name: torch.full(shape, torch.nan) for name, shape in stored(path).items()}
    load_checkpoint(path, state)
    return state


def log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_trajectory(before, one, two):
    for a, b in zip(log(one), log(two), strict=True):
        # "direction" is the root of a mean: the mean of two roots is another number
        names = a.keys() - {"seconds", "core_seconds", "direction", "update"}
        assert a["update"] == b["update"]
        for name in names:
            near = pytest.approx(a[name], rel=LOSS, abs=LOGIT if name.endswith("_logit") else 1e-6)
            assert b[name] == near, (a["iteration"], a["update"], name)
    here, there = final(one), final(two)
    assert here.keys() == there.keys()
    for name in (name for name in here if "_state." in name):  # what objectives keep beside their networks
        torch.testing.assert_close(there[name], here[name], atol=1e-3, rtol=1e-3)
    for network in {name.split(".")[0] for name in before} & {
        "student",
        "fake_score",
        "fake_score_low",
        "discriminator",
        "critic",
        "reward",
        "ema",
    }:
        names = [n for n in before if n.startswith(f"{network}.")]
        moved, apart = (
            torch.cat([(x[n] - y[n]).flatten() for n in names]).norm() for x, y in ((here, before), (here, there))
        )
        assert apart <= MOVED * moved, (network, float(apart / moved))


# ---------------------------------------------------------------------------------------------- the same run


def test_two_processes_follow_the_trajectory_of_one_and_each_resumes_the_other(family, cache, tmp_path):
    config = replace(flow_matching(), iterations=2)
    before = train_alone(config, family, cache, tmp_path / "one")
    train_together(2, "flow_matching", family, cache, tmp_path / "two", "--iterations", "2")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "two")
    longer = replace(config, iterations=3)
    train_alone(longer, family, cache, tmp_path / "one")
    train_alone(longer, family, cache, tmp_path / "two")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ranks", "more"),
    [
        ("mogan", 2, ()),
        ("offloaded", 2, ()),
        ("mogan", 2, ("--context-parallel", "2")),
        ("redmd", 2, ()),
        ("vdot", 2, ()),
        ("vdot", 2, ("--context-parallel", "2")),
        ("shift", 2, ()),
        ("shift", 2, ("--context-parallel", "2")),
        ("dmd", 4, ("--hsdp", "2", "--context-parallel", "2")),
        ("dmd", 2, ("--hsdp", "2")),
        ("phased", 2, ()),
        ("phased_alternating", 2, ()),
        ("tdm", 2, ()),
        ("self_forcing_windowed", 2, ()),
        ("asd", 2, ()),
        ("reward_forcing", 2, ()),
        ("mogan_causal", 2, ()),
        ("msm_causal", 2, ()),
        ("surrogate", 2, ()),
        ("surrogate", 2, ("--context-parallel", "2")),
        ("surrogate_of_four", 4, ()),
        ("mogan_i2v", 2, ()),
        ("mogan_i2v", 2, ("--context-parallel", "2")),
        ("causal_teacher", 2, ()),
        ("causal_cd", 2, ()),
        ("causal_ode", 2, ()),
        ("llia", 2, ()),
        ("efficient_vdit_mcd", 2, ()),
        ("efficient_vdit_kd", 2, ()),
        ("tdm", 2, ("--context-parallel", "2")),
        ("accvideo", 2, ()),
        ("accvideo", 2, ("--context-parallel", "2")),
    ],
)
def test_sharded_run_follows_the_trajectory_of_one(recipe, ranks, more, family, cache, paths, tmp_path):
    config = getattr(tiny_recipes, recipe)()
    data = tiny_recipes.data(config, cache, paths)
    before = train_alone(config, family, data, tmp_path / "one")
    train_together(ranks, recipe, family, data, tmp_path / "many", *more)
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ranks", "more"),
    [
        ("mogan", 2, ()),
        ("mogan_of_four", 4, ()),
        ("vdot", 2, ("--context-parallel", "2")),
        ("phased", 2, ()),
        ("tdm", 2, ("--context-parallel", "2")),
        ("llia", 2, ()),
        ("accvideo", 2, ()),
        ("asd", 2, ()),
        ("reward_forcing", 2, ()),
    ],
)
def test_adapters_on_processes_follow_the_run_of_one_and_are_resumed_by_one(
    recipe, ranks, more, family, cache, paths, tmp_path
):
    """Every process holds all of the frozen weights and all adapters, whose gradients are averaged."""
    config = replace(getattr(tiny_recipes, recipe)(), lora=3, iterations=2)
    more, data = ("--lora", "3", *more), tiny_recipes.data(config, cache, paths)
    before = train_alone(config, family, data, tmp_path / "one")
    train_together(ranks, recipe, family, data, tmp_path / "two", *more, "--iterations", "2")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "two")
    for run in ("one", "two"):
        train_alone(replace(config, iterations=3), family, data, tmp_path / run)
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["flow_matching", "dmd"])
def test_processes_whose_samples_meet_other_experts_do_not_wait_for_each_other(recipe, two, cache, tmp_path):
    """Levels are drawn per sample: a pass over sharded weights takes all processes all the same."""
    config = {"flow_matching": flow_matching, "dmd": dmd}[recipe]()
    before = train_alone(config, two.parent, cache, tmp_path / "one")
    train_together(2, recipe, two.parent, cache, tmp_path / "many")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_two_processes_judge_held_out_motion_together_and_stop_together(family, cache, tmp_path):
    prompts = tmp_path / "prompts"
    shutil.copytree(cache, prompts)
    moons = ["a moon at rest", "two moons", "three moons"]
    (prompts / "index.jsonl").write_text("".join(json.dumps({"id": m, "caption": m}) + "\n" for m in moons))
    facts = json.loads((prompts / "cache.json").read_text())
    (prompts / "cache.json").write_text(json.dumps(facts | {"contents": "prompts"}))
    ensure_text(prompts, ["", *moons], load_text(family / "teacher"))
    more = ("--held-out", str(prompts), "--patience", "1", "--lr", "1e-30")  # nothing learns: motion never rises
    for ranks in (1, 2):
        train_together(ranks, "mogan", family, cache, tmp_path / str(ranks), *more)
    one, two = (held_out_motions(tmp_path / ranks) for ranks in "12")
    assert list(one) == list(two) == [1, 2]
    assert two[1] == pytest.approx(one[1], rel=1e-3)  # one of them judges two, the other one and again the first


@pytest.mark.slow
def test_run_of_one_resumes_on_two_and_two_resume_bit_for_bit(family, cache, tmp_path):
    config = replace(dmd(), iterations=3)
    before = train_alone(config, family, cache, tmp_path / "one")
    train_together(1, "dmd", family, cache, tmp_path / "grown", "--iterations", "2")
    train_together(2, "dmd", family, cache, tmp_path / "grown", "--iterations", "3")
    assert_same_trajectory(before, tmp_path / "one", tmp_path / "grown")
    train_together(2, "dmd", family, cache, tmp_path / "through", "--iterations", "3")
    train_together(2, "dmd", family, cache, tmp_path / "stopped", "--iterations", "2")
    train_together(2, "dmd", family, cache, tmp_path / "stopped", "--iterations", "3")
    through, stopped = final(tmp_path / "through"), final(tmp_path / "stopped")
    assert all(torch.equal(through[name], stopped[name]) for name in through)


@pytest.mark.slow
def test_bf16_blocks_stay_near_the_run_of_one(family, cache, tmp_path):
    config = replace(flow_matching(), precision="bf16")
    train_alone(config, family, cache, tmp_path / "one")
    train_together(2, "flow_matching", family, cache, tmp_path / "two", "--precision", "bf16")
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)


@pytest.fixture(scope="module")
def apart(family, tmp_path_factory):
    """A student and a fake score unlike the teacher: what tells them apart is far above bf16's rounding."""
    folder = tmp_path_factory.mktemp("apart") / "student"
    shutil.copytree(family / "student", folder)
    for seed, part in enumerate(("transformer", "fake_score")):
        torch.manual_seed(seed)
        WanTransformer3DModel(**TRANSFORMER).save_pretrained(folder / part)
    return folder


def gradients(config, family, student, cache, world=None):
    """What every update of a plan would do at the start of a run: its logs, and the gradients it hands to the optimiser."""
    parts = assemble(
        config,
        open_cache(cache),
        model=str(family / "teacher"),
        student=str(student),
        run=None,
        device="cpu",
        world=world,
    )
    if world is None:  # the blocks' weights as sharding gathers them: of a penalised discriminator as they are
        rounded = [
            n for name, n in parts.networks.items() if name != "discriminator" or not config.objectives["gan"].r1
        ]
        called = [*rounded, parts.objectives["dmd"].judge.teacher]
        for p in (p for network in called for p in network.transformer.blocks.parameters()):
            p.data = p.data.bfloat16().float()
    learnable = {n: [p.requires_grad for p in network.parameters()] for n, network in parts.networks.items()}
    found: dict = {"dtypes": {}}
    for name, module in parts.student.transformer.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            module.register_forward_hook(
                lambda m, _, out, name=name: found["dtypes"].update({name: (m.weight.dtype, out.dtype)})
            )
    for index, update in enumerate(config.plan):
        network, optimizer, handed = parts.networks[update.learns], parts.optimizers[update.optimizer_name], {}
        optimizer.step = lambda network=network, handed=handed: handed.update(
            {name: whole(p.grad).clone() for name, p in network.named_parameters() if p.grad is not None}
        )
        logs = step(parts, Position(0, 0, index, 0))
        found[update.label] = logs, handed
        for name, other in parts.networks.items():  # what judged is frozen no longer, and was handed nothing
            assert [p.requires_grad for p in other.parameters()] == learnable[name]
            assert all(p.grad is None for p in other.parameters())
    return found


def gradients_of_one_process(rank, port, context, out, *arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join("cpu", context=context) as world:
        found = gradients(*arguments, world)
        if world.main:
            torch.save(found, out)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "context", "penalty"), [(False, 1, 0.3), (True, 1, 0.0), (True, 2, 0.3)])
def test_sharded_blocks_in_bf16_give_the_gradients_of_one_process(
    checkpointing, context, penalty, family, apart, cache, tmp_path
):
    """Of DMD's updates and the motion loss's, through taps, frozen networks, recomputed blocks and accumulation."""
    plan = tuple(replace(u, batch=4, accumulate=2, times=1) for u in mogan().plan)
    config = replace(mogan(), plan=plan, precision="bf16", checkpointing=checkpointing)
    config = config.changed("gan", r1=penalty, r2=penalty)
    one, port, out = gradients(config, family, apart, cache), free_port(), tmp_path / "gradients"
    arguments = (port, context, out, config, family, apart, cache)
    processes = [get_context("fork").Process(target=gradients_of_one_process, args=(r, *arguments)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [p.exitcode for p in processes] == [0, 0]
    two = torch.load(out)
    assert one.keys() == two.keys()
    wide, narrow = torch.float32, torch.bfloat16
    assert set(one.pop("dtypes").values()) == {(wide, narrow)}
    assert {(".blocks." in f".{n}", *d) for n, d in two.pop("dtypes").items()} == {
        (True, narrow, narrow),
        (False, wide, narrow),  # kept in fp32, and its products computed in bf16 all the same
    }
    for label, (logs, expected) in one.items():
        seen, handed = two[label]
        assert handed.keys() == expected.keys(), label
        assert seen["loss"] == pytest.approx(logs["loss"], rel=1e-4), label
        for part in ("blocks", "embedder", "embedding", "proj_out", "heads", "final"):
            if names := [n for n in expected if part in n]:
                a, b = (torch.cat([g[n].flatten().double() for n in names]) for g in (expected, handed))
                assert a @ b > 0.999 * a.norm() * b.norm(), (label, part)
                assert b.norm() == pytest.approx(float(a.norm()), rel=0.02), (label, part)


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_share_is_cut_into_the_fewest_equal_parts_that_fit(size, most):
    count = parts_of(size, most)
    assert size % count == 0
    assert size // count <= most
    assert all(size % n or size // n > most for n in range(1, count))


@pytest.mark.parametrize("recipe", [flow_matching, mogan])
def test_neither_accumulation_nor_sharing_changes_what_a_sample_sees(recipe, family, cache):
    config = recipe()
    student, update = tiny_recipes.start(config, family), replace(config.plan[0], batch=4)

    def build(update):
        changed = replace(config, plan=(update, *config.plan[1:]))
        return assemble(
            changed, open_cache(cache), model=str(family / "teacher"), student=student, run=None, device="cpu"
        )

    whole, parted, where = build(update), build(replace(update, accumulate=2)), Position(3, 1, 0, 0)
    one, two = step(whole, where), step(parted, where)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    shares = []
    for rank in range(2):
        parted.world = World(torch.device("cpu"), rank, 2)
        shares.append(draw(parted, where))
    batch = draw(whole, where)
    assert [i for s in shares for i in s.ids] == batch.ids
    drawn = [torch.rand(3, generator=g).tolist() for s in shares for g in where.generators(2, s)]
    assert drawn == [torch.rand(3, generator=g).tolist() for g in where.generators(2, batch)]
    assert len({tuple(d) for d in drawn}) == 4


def test_batch_that_does_not_split_is_refused_before_anything_is_loaded(family, cache):
    with pytest.raises(UserError, match="batch of 2 does not split over 3 processes; give --batch a multiple of 3"):
        assemble(flow_matching(), open_cache(cache), model="nowhere", run=None, world=World(torch.device("cpu"), 0, 3))


# ---------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_comes_back_whole_or_in_part_and_holds_no_pickle(tmp_path):
    state = {"net.w": torch.randn(3, 4), "net_optimizer.0.step": torch.tensor(7.0), "ema.w": torch.randn(3, 4)}
    path = save_checkpoint(tmp_path, 5, state, dmd())
    assert {f.suffix for f in path.iterdir()} == {".safetensors", ".json"}
    assert stored(path) == {name: tensor.shape for name, tensor in state.items()}
    again = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}
    load_checkpoint(path, again)
    assert all(torch.equal(again[name], state[name]) for name in state)
    part = {"ema.w": torch.zeros(3, 4)}
    load_checkpoint(path, part)
    assert torch.equal(part["ema.w"], state["ema.w"])


def test_checkpoint_that_was_cut_short_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"net.w": torch.randn(64)}, dmd())
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"000005 cannot be read .*delete that folder"):
        stored(path)
    with pytest.raises(UserError, match=r"000005 cannot be read .*delete that folder"):
        load_checkpoint(path, {"net.w": torch.zeros(64)})


# ---------------------------------------------------------------------------------------------- failures


def fail(how, rank, port, folder):
    """What a forked process does; its standard error goes to a file."""
    os.dup2(os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with join("cpu") as world:
            world.barrier()
            if how == "all" or (how == "one" and rank == 1):
                raise UserError("the disk is full")
            if how == "bug" and rank == 1:
                raise KeyError("a bug")
            if how == "killed" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            assert world.mean([torch.tensor(float(rank))]) == [0.5]
            assert world.from_main(lambda: f"said by {rank}") == "said by 0"
    except UserError as error:
        print(f"mogan: {error}", file=sys.stderr)
        sys.exit(2)


@pytest.mark.parametrize(
    ("how", "codes", "words"),
    [
        ("none", [0, 0], []),
        ("all", [2, 2], ["mogan: the disk is full"]),
        ("one", [2, 2], ["mogan: the disk is full"]),
        ("bug", [2, 1], ["KeyError: 'a bug'"]),
        ("killed", [2, -9], ["process 0 of 2 lost another one"]),
    ],
)
def test_the_first_error_is_said_once_and_ends_all(how, codes, words, tmp_path):
    port = free_port()
    processes = [get_context("fork").Process(target=fail, args=(how, rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert [p.exitcode for p in processes] == codes, said
    errors = [line for text in said for line in text.splitlines() if line.startswith(("mogan:", "KeyError"))]
    assert len(errors) == len(words), said
    assert all(word in error for word, error in zip(words, errors, strict=True))


def test_processes_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr("mogan.distributed.PATIENCE", timedelta(seconds=1))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="the 2 processes did not find each other"), join("cpu"):
        pass


def test_a_mesh_of_two_axes_has_copies():
    of_eight = SimpleNamespace(ndim=2, size=lambda axis: (8, 4)[axis])
    assert World(torch.device("cpu"), 0, 32, of_eight).copies == 8
    assert World(torch.device("cpu"), 0, 32, SimpleNamespace(ndim=1)).copies == World(torch.device("cpu")).copies == 1


def test_one_gpu_is_no_place_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="give --device cuda"), join("cuda:0"):
        pass


def test_tokens_that_processes_cannot_share_are_refused(family):
    world = SimpleNamespace(sequence=SimpleNamespace(size=lambda: 3))
    with pytest.raises(UserError, match="--context-parallel 3 does not divide the 16 tokens"):
        _check_tokens(world, family / "teacher", (4, 4, 4, 4))
    _check_tokens(world, family / "teacher", (4, 3, 4, 4))


def test_srun_without_a_meeting_place_is_told_how(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"export MASTER_ADDR=\$\(scontrol"), join("cpu"):
        pass


def test_a_process_alone_needs_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as world:
        assert (world.rank, world.ranks, world.main, world.mesh) == (0, 1, True, None)
        assert world.any(True)
        assert world.from_main(lambda: 3) == 3
    with (
        pytest.raises(UserError, match="--hsdp and --context-parallel need several processes"),
        join("cpu", replicas=2),
    ):
        pass


def test_a_signal_that_torchrun_repeats_is_one_request_to_stop(capsys):
    with _graceful_stop(True) as stop:
        assert not stop
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert capsys.readouterr().err.count("stopping after this iteration") == 1
        stop.asked -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_torchrun_ends_promptly_when_a_process_is_killed(family, cache, tmp_path):
    words = command("dmd", family, cache, tmp_path, "--iterations", "500", "--save-every", "1")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *words],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while latest_checkpoint(tmp_path) is None:
        assert torchrun.poll() is None, torchrun.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    victim = next(c for c in map(int, children) if b"RANK=1" in Path(f"/proc/{c}/environ").read_bytes().split(b"\0"))
    os.kill(victim, signal.SIGKILL)
    _, said = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    # on a busy machine torchrun ends process 0 before that can say what it lost; the test of first errors has its sentence
    assert "Signal 9 (SIGKILL)" in said


# ---------------------------------------------------------------------------------------------- batches ahead


def test_the_next_batch_is_read_during_a_step_and_errors_arrive_in_their_place():
    asked = []

    def compute(item):
        asked.append(item)
        if item == 3:
            raise UserError("gone")
        return item

    batches = one_ahead(compute, range(5))
    assert next(batches) == 0
    end = time.monotonic() + 5
    while len(asked) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    assert asked == [0, 1]  # one ahead, not more
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(UserError, match="gone"):
        next(batches)
