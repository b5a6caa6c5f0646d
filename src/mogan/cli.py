"""``mogan``: names of commands -> functions. Modules are imported only when their command is used."""

import atexit
import importlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from threading import current_thread, main_thread
from typing import NoReturn, get_args, get_origin

from mogan.completion import completion, options_of, values_of
from mogan.disk.files import none_left_empty, refusal
from mogan.errors import UserError, closest, too_little_memory

INTERRUPTED = 130  # as a shell counts a process that Ctrl-C ended
NARROWEST = 40  # columns in which help can be set; in one tyro never ends
DASHES, QUOTES = "–—―−", "“”„‟‘’‚«»"  # what word processors and chats make of hyphens and quotes
NO_COMMAND = ("--help", "--version", "--print-completion")

COMMANDS = {
    "demo": ("mogan.lab.demo:demo", "post-train the lab's student, evaluate it, write a report"),
    "prepare": ("mogan.data.prepare:prepare", "video files or prompts -> a cache to train on"),
    "train": ("mogan.training.train:train", "train a recipe on a cache; the same command resumes"),
    "sample": ("mogan.sampling.sample:sample", "prompts and seeds -> folders of mp4"),
    "stream": (
        "mogan.stream.command:stream",
        "stream a causal student's frames to a page or a file",
    ),
    "trajectories": (
        "mogan.sampling.trajectories:trajectories",
        "prompts -> a teacher's sampling trajectories, to train on",
    ),
    "attention": (
        "mogan.sampling.frame_attention:attention",
        "measure attention between frames, and the error of a sparse one",
    ),
    "tiles": (
        "mogan.exchange.tiles:tiles",
        "what mogan attention measured -> a model with frame-sparse attention",
    ),
    "vace": (
        "mogan.exchange.vace:vace",
        "a text-to-video model -> a VACE, to be fine-tuned on controls",
    ),
    "evaluate": ("mogan.evaluation.evaluate:evaluate", "folders of clips -> results.json"),
    "vbench": ("mogan.evaluation.vbench:vbench", "check that a folder holds every clip VBench wants, by name"),
    "report": ("mogan.report.page:report", "results and runs -> one HTML page"),
    "export": ("mogan.exchange.export:export", "a run's student -> a diffusers folder or a LoRA file"),
    "import": ("mogan.exchange.imports:import_student", "a student or LoRA made elsewhere -> a diffusers folder"),
    "estimate": ("mogan.estimate.command:estimate", "memory, time and cost of a recipe on a machine, without one"),
    "study": (
        "mogan.study.study:study",
        "the paper's tables, and the methods compared, at lab scale with training seeds",
    ),
    "survey build": ("mogan.survey.build:build", "pair the clips of two or more systems for human voting"),
    "survey serve": ("mogan.survey.serve:serve", "serve a survey on this machine"),
    "survey analyze": ("mogan.survey.analyze:analyze", "votes -> win / tie / lose with intervals"),
    "weights list": ("mogan.models.weights:show", "third-party weights: licence, purpose, whether they are here"),
    "weights fetch": ("mogan.models.weights:fetch", "download third-party weights, checked"),
    "lab render": ("mogan.world.render:render", "render captioned clips of the laboratory's world"),
    "lab build": ("mogan.lab.build:build", "train the laboratory's tiny family from nothing"),
}


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  mogan {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "Post-train few-step video generators so that they move well.\n\n"
        + "\n".join(lines)
        + "\n\n`mogan COMMAND --help` explains a command. Start with `mogan demo`."
        + "\n`mogan --version`; `mogan --print-completion bash` (zsh, fish) prints what a shell completes words by."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 2 a mistake the user can fix (one sentence on standard error), 130 Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] == "--version":
        from mogan import __version__

        print(f"mogan {__version__}")
        return 0
    if words and words[0].partition("=")[0] == "--print-completion":
        return _print_completion(words)
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    if name not in COMMANDS:
        return _list_commands(words)
    asked: list[int] = []

    def leave(*_: object) -> None:
        os.write(2, f"{_interrupted(name)}\n".encode())
        os._exit(INTERRUPTED)

    def stop(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    try:
        # C++ may not expect the exception (torch's then aborts), or it is taken for a missing module
        with _on_ctrl_c(leave):
            import tyro

            from mogan.arguments import SWITCHES, shown

            module, function = COMMANDS[name][0].split(":")
            command = getattr(importlib.import_module(module), function)
        options = words[len(name.split()) :]
        _check_options(command, options)
        with _on_ctrl_c(stop), none_left_empty():
            tyro.cli(shown(command), prog=f"mogan {name}", args=options, config=SWITCHES)
    except (Exception, KeyboardInterrupt) as error:
        if asked or isinstance(error, KeyboardInterrupt):  # readers of files tell of it as an error of their own
            print(_interrupted(name), file=sys.stderr)
            return INTERRUPTED
        sentence = str(error) if isinstance(error, UserError) else refusal(error) or too_little_memory(error)
        if sentence is None:
            raise
        print(f"mogan {name}: {sentence}", file=sys.stderr)
        return 2
    return 0


def _interrupted(name: str) -> str:
    return f"mogan {name}: interrupted; give the same command again to finish"


def _print_completion(words: list[str]) -> int:
    """The script by which a shell completes commands, options and their values."""
    shell = words[0].partition("=")[2] or "".join(words[1:2])
    try:
        print(completion(shell, COMMANDS), end="")
    except UserError as error:
        print(f"mogan: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _on_ctrl_c(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle Ctrl-C so meanwhile, unless whoever calls us has a way of their own."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _list_commands(words: list[str]) -> int:
    """What there is, for whoever asked or named none of it."""
    groups = {n.split()[0] for n in COMMANDS}
    asked = not words or words[-1] in ("-h", "--help")
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] in groups:  # survey, weights, lab
        if not asked and len(words) > 1:
            hint = closest(" ".join(words[:2]), [n for n in COMMANDS if n.split()[0] == words[0]])
            print(f"mogan: no command '{words[0]} {words[1]}'{hint}", file=sys.stderr)
        print("\n".join(f"  mogan {n}  {text}" for n, (_, text) in COMMANDS.items() if n.split()[0] == words[0]))
    else:
        hint = closest(words[0], sorted(groups)) or closest(f"--{words[0].strip('-')}", NO_COMMAND)
        print(f"mogan: no command {words[0]!r}{hint or chr(10) * 2 + usage()}", file=sys.stderr)
        return 2
    return 0 if asked else 2


def _check_options(command: Callable[..., None], words: list[str]) -> None:
    """Name an option that was misspelt: tyro does so only where no other one is missing."""
    known = {"--help": (), **options_of(command)}
    places = [p.annotation for p in signature(command).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        option = next((w for w in reversed(words[:number]) if w.startswith("--")), "")  # may take several words
        name, joined, value = word.partition("=") if word.startswith("--") else (before, "", word)
        text = _takes_text(name, command) or (not joined and _takes_text(option, command, several=True))
        if not value and (joined or not word) and not text:
            raise UserError(f"an empty word stands {f'after {name}' if name else 'first'}, where a name should be")
        if value.startswith("~/"):
            raise UserError(
                f"{word} begins with a ~ that the shell has left as it is: leave a space before it, or write $HOME"
            )
        _check_pasted(word, value, text)
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--no-") and (switch := option.replace("--no-", "--", 1)) in known and option not in known:
            raise UserError(f"no option {option}: leave out {switch} instead")
        if option.startswith("--") and option not in known and (hint := closest(option, sorted(known))):
            raise UserError(f"no option {option}{hint}")
        if value and (joined or not word.startswith("-")):
            first = number == 0 and not joined
            words_of = values_of(places[0]) if first and places else known.get(name, ())
            _check_choice("the first word" if first else name, value, words_of)
        if f"-{option}" in known:
            raise UserError(f"no option {option}: did you mean '-{option}'?")


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse what is none of an argument's few words, by one sentence as all else."""
    if choices and value not in choices:
        raise UserError(f"{name} is {value!r}, and not one of {', '.join(choices)}{closest(value, choices)}")


def _check_pasted(word: str, value: str, text: bool) -> None:
    """Name characters that a command got on its way through a text document, and that no shell takes as they were meant.

    Args:
        word: as the shell gave it.
        value: of it what is not the option's name.
        text: whether it may be any text, such as a prompt.
    """
    if word.endswith("\r"):
        raise UserError(
            f"{word[:-1]} is followed by a carriage return: the script has Windows line ends; take them away with "
            "`sed -i 's/\\r$//' SCRIPT`"
        )
    plain = word.lstrip(DASHES + "-")
    if word[:1] in DASHES and plain and " " not in word:
        raise UserError(
            f"{word} begins with a dash that is no hyphen: write {'-' if plain[0].isdigit() else '--'}{plain}"
        )
    if value and value[0] in QUOTES and not (text and value[-1] in QUOTES):
        raise UserError(f"{value} begins with a quotation mark that no shell knows: write ' or \" in its place")


def _takes_text(word: str, command: Callable[..., None], several: bool = False) -> bool:
    """Whether a word is an option whose value may be empty, or each of several: an empty path would be the current folder."""
    found = (
        signature(command).parameters.get(word.removeprefix("--").replace("-", "_")) if word.startswith("--") else None
    )
    if found is None or (several and get_origin(found.annotation) is not tuple):
        return False
    return Path not in (found.annotation, *get_args(found.annotation))


def run() -> NoReturn:
    """:func:`main` as a process of its own."""
    code: int | str | None
    for name in ("stdin", "stdout", "stderr"):  # closed by whoever started us: the next file would get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  to the end
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    if not sys.stderr.isatty():  # a log: a line of progress every ten seconds; tqdm reads this as it is imported
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text that a terminal can show
    try:
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            code = INTERRUPTED
        sys.stdout.flush()
    except OSError as error:  # nothing more can be written there
        if error.errno is None or error.filename is not None:  # of something else than the output
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # whoever read the output has gone, as `head` does
        if not isinstance(error, BrokenPipeError):
            print(f"mogan: its output could not be written ({error.strerror})", file=sys.stderr)
            code = 2
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _leave(code)
    sys.exit(code)


def _leave(code: int | str | None) -> NoReturn:
    """End one of several processes as ``sys.exit`` does, but for taking the interpreter apart.

    Threads of torch (gloo's, autograd's) may still be letting go of a tensor, for which they need the interpreter; if it
    is gone by then they abort a process that had done its work (pytorch/pytorch issue 190489).
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    run()
