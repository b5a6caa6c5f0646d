import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mogan import __version__
from mogan.cli import COMMANDS, main, run
from mogan.completion import completion
from mogan.errors import UserError
from mogan.recipes import ABLATIONS, dmd2_wan_1_3b, find_recipe, mogan_wan_1_3b
from mogan.runs.watch import Watch
from mogan.study.columns import one_moments


def test_without_arguments_it_lists_its_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"mogan {name}" in shown for name in COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["study", "--help"]])
def test_a_reader_that_leaves_early_gets_no_traceback(words):
    process = subprocess.Popen([sys.executable, "-m", "mogan", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "CUDA out of memory"),
        (MemoryError(), "not enough memory: take fewer"),
        (RuntimeError("could not create a primitive"), "not enough memory (could not create a primitive): take fewer"),
        (None, "can't allocate memory: you tried to allocate 4000000000000000 bytes"),
    ],
)
def test_too_little_memory_is_a_sentence(error, said, monkeypatch, capsys):
    def greedy() -> None:
        if error is None:
            torch.empty(10**15)
        raise error

    monkeypatch.setitem(COMMANDS, "demo", (f"{__name__}:greedy", "asks for too much"))
    monkeypatch.setattr(f"{__name__}.greedy", greedy, raising=False)
    assert main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "`mogan estimate` says what a recipe takes" in shown


def test_a_closed_or_full_output_is_no_traceback_and_no_file_gets_its_number():
    def of(words, **how):
        done = subprocess.run([sys.executable, "-m", "mogan", *words], stderr=subprocess.PIPE, text=True, **how)
        return done.returncode, done.stderr

    assert of(["--help"], preexec_fn=lambda: os.close(1)) == (0, "")
    with open("/dev/full", "w") as full:
        assert of(["--help"], stdout=full) == (2, "mogan: its output could not be written (No space left on device)\n")


@pytest.mark.parametrize("error", [OSError(errno.ENXIO, "No such device", "/x"), OSError("of a library")])
def test_an_error_of_a_file_is_not_told_as_one_of_the_output(error, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr("mogan.cli.main", fails)
    with pytest.raises(OSError, match=r"No such device|of a library"):
        run()


def test_help_is_set_in_the_narrowest_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    monkeypatch.setattr(sys, "argv", ["mogan", "vbench", "--help"])
    with pytest.raises(SystemExit, match="0"):
        run()
    assert len(capsys.readouterr().out.splitlines()[-1]) == 40


def test_unknown_command_is_one_clear_error(capsys):
    assert main(["tarin"]) == 2
    assert "no command 'tarin'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian", "mogan_lab"], "train"),
        (["surve"], "survey"),
        (["survey", "bild", "x"], "survey build"),
        (["--verson"], "--version"),
        (["-v"], "--version"),
        (["help"], "--help"),
        (["train", "dmd", "--data", "x", "--out", "y"], "dmd_lab"),
        (["train", "mogan_lab", "--data", "x", "-out", "y"], "--out"),
        (["train", "moagn_lab", "--data", "x", "--out", "y"], "mogan_lab"),
        (["train", "mogan_lab", "--dta", "x", "--out", "y"], "--data"),
        (["train", "mogan_lab", "--data", "x", "--out", "y", "--save_evry=3"], "--save-every"),
        (["estimate", "mogan_lab", "--jsn"], "--json"),
        (["estimate", "mogan_lab", "--gpu", "h10"], "h100"),
        (["estimate", "mogan_lab", "--gpu", "a100"], "a100-80"),
        (["estimate", "mogan_lab", "--gpu", "H100-80GB"], "h100"),
        (["estimate", "mogan_lab", "--model", "wan2.1-t2v-13b"], "wan2.1-t2v-1.3b"),
        (["study", "methdos"], "methods"),
        (["export", "x", "--to=lra"], "lora"),
        (["sample", "--precision", "bf61"], "bf16"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_word_that_was_meant(words, meant, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"did you mean {meant!r}?" in said
    assert "dmd2_wan" not in said


@pytest.mark.parametrize("word", ["--compile", "--save_every=3", "--iterations=7"])
def test_options_are_taken_in_every_spelling_there_is(word, capsys):
    assert main(["train", "mogan_lab", "--data", "x", "--out", "y", "--dry-run", word]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "mogan_lab"


@pytest.fixture(scope="module")
def completions():
    return {shell: completion(shell, COMMANDS) for shell in ("bash", "zsh", "fish")}


def completed(shell, script, words):
    """What a shell offers for the last of some words."""
    if shell == "fish":
        asked = f"{script}\ncomplete --do-complete '{' '.join(words)}'"
        return {
            line.split("\t")[0]
            for line in subprocess.check_output(["fish", "--no-config", "-c", asked], text=True).splitlines()
        }
    before = "setopt ksharrays\n" if shell == "zsh" else ""
    listed = " ".join(f"'{word}'" for word in words)
    asked = f"{script}\n{before}COMP_WORDS=({listed})\nCOMP_CWORD={len(words) - 1}\n_mogan\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    bare = ["--norc"] if shell == "bash" else ["-f"]
    shown = subprocess.check_output([shell, *bare, "-c", asked], text=True).split()
    return (
        {word for word in shown if word.startswith(words[-1])} if shell == "zsh" else set(shown)
    )  # zsh's compadd chooses


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["mogan", "tra"], {"train", "trajectories"}),
        (["mogan", "survey", "b"], {"build"}),
        (["mogan", "train", "mogan_wan_1_3b_no"], {"mogan_wan_1_3b_no_dmd", "mogan_wan_1_3b_no_r1r2"}),
        (["mogan", "train", "x", "--prec"], {"--precision"}),
        (["mogan", "train", "x", "--precision", ""], {"auto", "bf16", "fp32"}),
        (["mogan", "survey", "build", "--comp"], {"--completion-code"}),
        (["mogan", "lab", "render", "--motion", "r"], {"rich"}),
        (["mogan", "export", "x", "--to", "l"], {"lora"}),
        (["mogan", "--print-completion", "f"], {"fish"}),
    ],
)
def test_a_shell_completes_commands_recipes_options_and_their_values(shell, words, offered, completions):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    assert completed(shell, completions[shell], words) == offered


@pytest.mark.parametrize(
    ("words", "said"), [(["tcsh"], "give bash, zsh or fish"), ([], "no shell"), (["bsh"], "'bash'")]
)
def test_a_shell_without_completion_is_one_sentence(words, said, capsys):
    assert main(["--print-completion", *words]) == 2
    assert said in capsys.readouterr().err


def test_its_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mogan {__version__}\n"


CTRL_C = """
import os, signal, sys
from importlib.abc import MetaPathFinder

wanted = sys.argv[1]
class Interrupting(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from mogan import cli
def late() -> None:
    import antigravity
late.__module__ = "late"
sys.modules["late"] = sys.modules["__main__"]
cli.COMMANDS["demo"] = ("late:late", "imports a module while it runs")
sys.argv[1:] = sys.argv[2:]
cli.run()
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("tyro", ["vbench", "x"]),
        ("mogan.evaluation.vbench", ["vbench", "x"]),
        ("antigravity", ["demo"]),
    ],
)
def test_ctrl_c_is_130_and_a_sentence_while_modules_are_imported_and_afterwards(module, words):
    def heed() -> None:  # a shell's background jobs, and what they start, are deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words_of = [sys.executable, "-c", CTRL_C, module, *words]
    done = subprocess.run(words_of, capture_output=True, text=True, preexec_fn=heed)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"mogan {words[0]}: interrupted; give the same command again to finish\n"


@pytest.mark.parametrize("words", [["--out=~/runs/a"], ["--out", "~/runs/a"]])
def test_a_home_that_the_shell_has_not_written_out_makes_no_folder_of_that_name(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "dmd_lab", "--data", "c", *words]) == 2
    assert "begins with a ~ that the shell has left as it is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["sample", "–prompts", "p.txt", "--out", "s"],
            "–prompts begins with a dash that is no hyphen: write --prompts",
        ),
        (["sample", "--prompts", "p.txt", "—out", "s"], "write --out"),
        (["sample", "--prompts", "p.txt", "--out", "s", "--first-seed", "−1"], "write -1"),
        (["sample", "--prompts", "“p.txt”", "--out", "s"], "“p.txt” begins with a quotation mark that no shell knows"),
        (["sample", "--prompts=“p", "x.txt”", "--out", "s"], "“p begins with a quotation mark"),
        (["stream", "--model", "lab", "--prompt", "“a", "red", "circle”", "--out", "x.mp4"], "“a begins with"),
        (
            ["sample", "--prompts", "p.txt", "--out", "s\r"],
            "s is followed by a carriage return: the script has Windows",
        ),
        (["sample", "--prompts=", "--out", "s"], "an empty word stands after --prompts, where a name should be"),
    ],
)
def test_words_that_came_through_a_text_document_are_named(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("caption", ["“Go!” she says, he says “No”", "– a dash first", "a “red” circle"])
def test_texts_may_hold_every_dash_and_quotation_mark(caption, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "nowhere", "--out", "c", "--caption", caption]) == 2
    assert "nowhere is not there" in capsys.readouterr().err


def test_a_ctrl_c_that_a_library_tells_as_an_error_of_its_own_is_still_one(monkeypatch, capsys):
    def told_otherwise() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise UserError("weights are damaged") from None  # as safetensors' reader does

    monkeypatch.setitem(COMMANDS, "demo", ("late:late", "is interrupted"))
    monkeypatch.setitem(sys.modules, "late", SimpleNamespace(late=told_otherwise))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["demo"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "mogan demo: interrupted; give the same command again to finish\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    done = subprocess.run([sys.executable, "-m", "mogan", *name.split(), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mogan_lap", "--data", "x", "--out", "y"], "mogan_lab"),
        (["train", "mogan_lab", "--data", "no/such", "--out", "y"], "no/such is not a cache"),
        (["train", "mogan_lab_no_dm", "--data", "x", "--out", "y"], "did you mean 'mogan_lab_no_dmd'"),
        (["sample", "--prompts", "no.txt", "--out", "y"], "one prompt per line"),
        (["sample", "--prompts", "pyproject.toml", "--model", "./nowhere", "--out", "y"], "not a diffusers folder"),
        (["export", "no/run", "--out", "y"], "not a training run"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_dry_run_prints_the_resolved_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", "mogan_lab", "--data", "x", "--out", "y", "--iterations", "7", "--seed", "3", "--dry-run"]) == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert (shown["iterations"], shown["seed"], shown["recipe"]) == (7, 3, "mogan_lab")
    assert not (tmp_path / "y").exists()


def test_mogan_has_the_papers_values():
    config = mogan_wan_1_3b()
    gan = config.objectives["gan"]
    assert [(u.label, u.times, u.batch) for u in config.plan] == [
        ("student<dmd", 1, 16),
        ("fake_score<dmd", 4, 64),
        ("student<gan", 1, 16),
        ("discriminator<gan", 1, 64),
    ]
    assert (gan.student_weight, gan.judge_weight, gan.r1, gan.r2, gan.noise) == (0.5, 0.5, 0.3, 0.3, 0.01)
    assert (gan.blocks, gan.taps, gan.window, gan.sigma) == (16, (7, 13, 15), 12, 0.0)
    assert gan.prompt == "a video with good motion"
    assert config.iterations == 800
    assert config.optimizers["student_motion"].lr == 0.5 * 1e-5  # lambda_1
    assert {o.lr for name, o in config.optimizers.items() if name != "student_motion"} == {1e-5}
    assert max(gan.starts) + gan.window == 21
    warm = dmd2_wan_1_3b()
    assert warm.sigmas == (1.0, 0.757, 0.522)
    assert warm.objectives["dmd"].guidance == 3.5 + 1  # CausVid writes cond + w (cond - uncond)


@pytest.mark.parametrize("recipe", ["mogan_lab", "mogan_msm_lab", "mogan_surrogate_lab", "mogan_wan_1_3b"])
def test_motion_updates_have_moments_of_their_own_and_lambda_1_of_the_learning_rate(recipe):
    config = find_recipe(recipe)
    used = {u.by: u.optimizer_name for u in config.plan if u.learns == "student"}
    assert used.pop("dmd") == "student"
    assert set(used.values()) == {"student_motion"}
    motion, dmd = config.optimizers["student_motion"], config.optimizers["student"]
    assert motion == replace(dmd, lr=config.objectives["gan"].student_weight * dmd.lr)


def test_a_learning_rate_is_the_students_and_keeps_its_ratio_to_that_of_the_motion_update(capsys):
    assert main(["train", "mogan_lab", "--data", "x", "--out", "y", "--lr", "2e-4", "--dry-run"]) == 0
    optimizers = json.loads(capsys.readouterr().out)["optimizers"]
    assert {k: o["lr"] for k, o in optimizers.items()} == {
        "student": 2e-4,
        "student_motion": 1e-4,
        "fake_score": 2e-4,
        "discriminator": 2e-4,
    }


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_changes_one_thing(ablation):
    config, whole = find_recipe(f"mogan_lab_{ablation.replace('-', '_')}"), find_recipe("mogan_lab")
    assert config.recipe == f"mogan_lab_{ablation.replace('-', '_')}"
    changed = {f for f in vars(config) if f != "recipe" and getattr(config, f) != getattr(whole, f)}
    assert changed == {"objectives"} | ({"plan"} if ablation == "no-dmd" else set())
    there = {name: block for name, block in whole.objectives.items() if config.objectives.get(name) != block}
    assert list(there) == ["dmd" if ablation == "no-dmd" else "gan"]


MINE = """
from mogan.recipes import mogan_lab
def gentler():
    return mogan_lab().with_budget(3)
def broken():
    return gentler().learning_rate
def nonsense():
    from dataclasses import replace
    return replace(gentler(), sigmas=(0.5,))
def needs(argument):
    return argument
def nothing():
    return None
A_CONFIG = mogan_lab()
"""


@pytest.fixture
def own_recipes(tmp_path, monkeypatch):
    """A folder that only its being the current one puts on Python's way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    (tmp_path / "my_recipes_here.py").write_text(MINE)
    (tmp_path / "my_typo.py").write_text("import torhc\n")
    (tmp_path / "my_slip.py").write_text("def f(:\n")
    yield tmp_path
    for name in ("my_recipes_here", "my_typo", "my_slip"):
        sys.modules.pop(name, None)


def test_recipes_may_live_elsewhere(own_recipes):
    assert find_recipe("mogan.recipes:mogan_lab") == find_recipe("mogan_lab")
    assert find_recipe("my_recipes_here:gentler").iterations == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_recipes_here:broken", r"failed\n.*my_recipes_here.py\", line 6, in broken\n.*\nAttributeError: .*learning_rate"),
        ("my_recipes_here:nonsense", r"my_recipes_here.py\", line 9, in nonsense\n.*\nValueError: sigmas must fall"),
        ("my_recipes_here:needs", "TypeError: needs.. missing 1 required positional argument"),
        ("my_recipes_here:nothing", "returns a NoneType, not a mogan Config"),
        ("my_recipes_here:A_CONFIG", "has no function 'A_CONFIG' that returns a Config"),
        ("my_recipes_here:gentlr", "my_recipes_here.py has no function 'gentlr': did you mean 'gentler'"),
        ("my_typo:f", r"my_typo cannot be imported\n.*my_typo.py\", line 1, in .*\nModuleNotFoundError: .*torhc"),
        ("my_slip:f", r"my_slip.py\", line 1\n.*SyntaxError"),
        ("my_recipe_here:gentler", "no module 'my_recipe_here' in this folder or on PYTHONPATH"),
        ("./my_recipes_here.py:gentler", "did you mean my_recipes_here:gentler"),
    ],
)  # fmt: skip
def test_an_error_in_ones_own_recipe_is_told_as_ones_own(name, said, own_recipes):
    with pytest.raises(UserError) as error:
        find_recipe(name)
    assert re.search(said, str(error.value), re.DOTALL), str(error.value)
    assert "recipes/__init__" not in str(error.value)
    assert "importlib" not in str(error.value)


def watched(key, values, update="student<gan"):
    recipe = "shift_lab" if update.endswith("shift") else "mogan_surrogate_lab"
    watch, said = Watch(find_recipe(recipe)), []
    for iteration, value in enumerate(values):
        said += watch.read({"iteration": iteration, "update": update, "loss": value, key: value})
    return said


@pytest.mark.parametrize(
    ("key", "values", "update", "word"),
    [
        ("motion", [1.0] * 5 + [0.5] * 15, "student<gan", "or raise the motion update's learning rate"),
        ("motion", [1.0] * 5 + [0.5] * 15, "student<shift", "stop here, or raise shift.beta"),
        ("saturation", [0.4] * 5 + [0.55] * 15, "student<gan", "saturating"),
        ("loss", [0.1] * 50 + [0.3] * 5 + [0.5] * 15, "fake_score<dmd", "lags"),
        ("gap", [1.0] * 5 + [9.0] * 15, "discriminator<gan", "wins outright"),
        ("surrogate_error", [0.6] * 5 + [1.2] * 15, "surrogate<surrogate", "no better than its mean"),
    ],
)
def test_warnings_come_in_words_and_once(key, values, update, word):
    said = watched(key, values, update)
    assert len(said) == 1
    assert word in said[0]
    assert watched(key, [values[0]] * 30, update) == []


def step_of_adam(small, large):
    """How far the 20th small gradient moves a weight, between large ones, where Adam's steps are 1 long."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.0, 0.999), weight_decay=0.0)
    for gradient in [large, small] * 20:
        before, weight.grad = weight.item(), torch.full((1,), gradient)
        optimizer.step()
    return before - weight.item()


@pytest.mark.parametrize(("dmd", "motion", "drowned"), [(0.8, 0.01, "student<gan"), (0.01, 5.0, "student<dmd")])
def test_an_update_whose_gradient_another_drowns_is_named_once(dmd, motion, drowned):
    config = one_moments()
    norms = {"student<dmd": dmd, "student<gan": motion, "discriminator<gan": 1e-6}

    def said_by(watch, norms):
        told = {"loss": 1.0, "motion": 1.0, "saturation": 0.3, "gap": 0.5}  # as every record of such a run
        lines = [{"iteration": i, "update": u, **told, "grad_norm": n} for i in range(30) for u, n in norms.items()]
        return [(line["iteration"], said) for line in lines for said in watch.read(line)]

    (when, said), *more = said_by(Watch(config), norms)
    assert not more
    assert when == 20
    assert said.startswith(f"{drowned} is drowned by student<")
    percent = float(re.search(r"are ([0-9.]+)% of those", said)[1])
    assert percent == pytest.approx(100 * step_of_adam(*sorted((dmd, min(motion, 1.0)))), rel=0.02)  # clipped at 1
    assert "optimizer of its own" in said
    assert said_by(Watch(config), norms | {"student<dmd": 0.8, "student<gan": 0.1}) == []  # as in the lab's runs
    assert said_by(Watch(find_recipe("mogan_lab")), norms) == []  # each has its own


LAST_WORDS = """
import atexit, os, sys
from mogan import cli

class Torn:
    def __del__(self, write=os.write):
        write(1, b"torn ")

torn = Torn()
atexit.register(print, "at exit", end=" ")
command, ending = sys.argv[1:]
def main():
    if ending.startswith("stop:"):
        raise SystemExit(ending[5:])
    return int(ending)
cli.main = main
cli.run()
"""


@pytest.mark.parametrize(
    ("ending", "code", "said"), [("0", 0, ""), ("2", 2, ""), ("stop:saved at 3", 1, "saved at 3\n")]
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_one_of_several_processes_leaves_with_its_code_but_does_not_take_the_interpreter_apart(
    ending, code, said, processes, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    done = subprocess.run([sys.executable, "-c", LAST_WORDS, "train", ending], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout == ("at exit torn " if processes == "1" else "at exit ")


def test_help_says_what_options_take_and_no_none(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for name in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([*name.split(), "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert "{None}|" not in shown, name
        assert not re.search(r"default: (None|False|True|)\)", shown), name
    assert main(["train", "mogan_lab", "--data", "x", "--out", "y", "--dry-run", "--lr", "1e-6"]) == 0


def test_a_switch_that_is_off_needs_no_word_for_it(capsys):
    assert main(["train", "mogan_lab", "--data", "x", "--out", "y", "--no-compile"]) == 2
    assert "leave out --compile instead" in capsys.readouterr().err
