"""What a stranger must know to use an export: how to call it, where it came from, how it was measured, whose licence holds."""

import json
import re
from pathlib import Path

from mogan import __version__
from mogan.config import LCM
from mogan.data.cache import open_cache
from mogan.disk.files import read_json
from mogan.errors import UserError
from mogan.evaluation.results import read_results
from mogan.evaluation.table import cell
from mogan.models import wan
from mogan.models.causal_cache import Causal
from mogan.models.defaults import Defaults
from mogan.models.frame_sparse import FILE, Mask
from mogan.runs.checkpoint import student_checkpoint
from mogan.runs.identity import read_config, read_facts

AGAIN = """To get a clip again, call `torch.manual_seed` before it. `pipe(generator=...)` is not enough: it gives the first noise, but
the pipeline does not hand it to the scheduler, which draws new noise at every step from torch's global generator."""


def model_card(
    title: str,
    base: Path,
    sigmas: tuple[float, ...] | None,
    notes: list[str],
    load: list[str],
    solver: str = LCM,
    causal: Causal | None = None,
    origin: Path | None = None,
    use: str | None = None,
) -> str:
    """The card as Markdown with the front matter that the Hugging Face Hub reads.

    Args:
        title: heading.
        base: folder of the base model, or of the student on top of it, for its geometry.
        sigmas: levels the student samples at; of a teacher None.
        notes: list entries and tables about where it came from; see :func:`run_notes` and :func:`metrics_table`.
        load: lines of Python that make ``pipe``.
        solver: between the student's steps.
        causal: of a student that sees the past alone; ``load`` is then the command that samples it.
        origin: folder of the base model where that is not ``base``, for its name and its licence.
        use: how it is called, as Markdown, where it is not by ``load``.
    """
    origin = origin or base
    usual, name, licence = wan.defaults(base), model_name(origin), licence_of(origin) or licence_of(base)
    size = usual.size
    task, library = "image-to-video" if _animates(load) else "text-to-video", "diffusers" if causal is None else "mogan"
    front = [f"library_name: {library}", f"pipeline_tag: {task}", f"tags: [{task}, distillation, mogan]"]
    front += [f"license: {licence}"] if licence else []
    front += [f"base_model: {name}"] if "/" in name else []
    head = "\n".join(front)
    said = f" ({licence})" if licence else "; its folder does not say which that is"
    entries = [
        *notes,
        f"- base: `{name}`; its licence holds for these weights{said}",
        f"- frames: {size.frames} at {size.fps} fps, {size.height} x {size.width}",
    ]
    if causal is not None:
        entries.append(
            f"- causal: a first chunk of {causal.first} latent frames, then {' or '.join(map(str, causal.sizes or (causal.rest,)))} at "
            "a time, each of which sees the past by "
            f"{causal.policy}, noised to {causal.context_sigma:g}"
            + (f"; the first always at noise levels {_said(causal.first_sigmas)}" if causal.first_sigmas else "")
        )
    facts = "\n".join(sorted(entries, key=lambda line: line.startswith("\n")))  # tables after the list
    use = use or _use(load if sigmas else [*load, *_shifted(base, usual)], usual, sigmas, solver, causal)
    return f"---\n{head}\n---\n\n# {title}\n\n{use}\n\n{facts}\n"


def _use(load: list[str], usual: Defaults, sigmas: tuple[float, ...] | None, solver: str, causal: Causal | None) -> str:
    """How a folder is called."""
    code, size, steps = "\n".join(load), usual.size, len(sigmas or ()) or usual.steps
    levels = _said(sigmas or ())
    guidance = "1.0" if sigmas else f"{usual.guidance:g}"
    negative = more = ""
    if usual.negative_prompt and not sigmas:
        negative = f"negative = {json.dumps(usual.negative_prompt, ensure_ascii=False)}\n"
        more = "negative_prompt=negative, "
    if causal is not None:
        return f"""```bash
{code}
```

It makes clips chunk by chunk, each chunk at noise levels {levels} and without guidance. `WanPipeline`
makes whole clips: with these weights they would look plausible and be wrong, so this folder does not open there.
Programs round differently in bf16, and the difference grows from chunk to chunk: compare in fp32."""
    animates = _animates(load)
    picture = (
        "\nfrom diffusers.utils import load_image\n"
        f'picture = load_image("first_frame.png").resize(({size.width}, {size.height}))'
    )
    return f"""```python
import torch
{code}{picture if animates else ""}
{negative}torch.manual_seed(0)  # the clip's seed
video = pipe({"picture, " if animates else ""}"a prompt", height={size.height}, width={size.width}, num_frames={size.frames},
             {more}num_inference_steps={steps}, guidance_scale={guidance}).frames[0]
```

{_visited(levels, steps) if sigmas else "It is sampled as its base model is, in many guided steps."}

{AGAIN if sigmas and solver == LCM else "Its steps draw no noise: the first noise, so `pipe(generator=...)`, gives a clip again."}"""


def _shifted(base: Path, usual: Defaults) -> list[str]:
    """The line that gives a pipeline the shift of levels that a teacher is sampled with here, where its folder has another."""
    path = base / "scheduler" / "scheduler_config.json"
    own = read_json(path) if path.is_file() else {}
    if own.get("flow_shift", usual.shift) == usual.shift:
        return []
    return [f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, flow_shift={usual.shift:g})"]


def _visited(levels: str, steps: int) -> str:
    return f"""It samples at noise levels {levels}; this scheduler visits exactly these with
`num_inference_steps={steps}`. Use no guidance."""


def _animates(load: list[str]) -> bool:
    """Whether what these lines open begins with a picture."""
    return any("WanImageToVideoPipeline" in line for line in load)


def _said(sigmas: tuple[float, ...]) -> str:
    return ", ".join(f"{s:.4g}" for s in sigmas)


def states_notes(states: tuple[str, ...]) -> list[str]:
    """Of a student that is told states what another program needs to tell it."""
    if not states:
        return []
    return [
        f"- states: {', '.join(states)}; of each `states.safetensors` has a row to append to the prompt's embedding, `(L + 1, D)`; "
        "without one it is in none"
    ]


def origin_of(run: Path) -> Path | None:
    """The base model of a run, where it still lies there."""
    folder = Path(read_facts(run).get("model", ""))
    return folder if (folder / "model_index.json").is_file() else None


def run_notes(run: Path) -> list[str]:
    """Recipe, seed and length of a training run, what it started from and what it was trained on; no place on this machine."""
    config = read_config(run)
    how = f"adapters of rank {config['lora']}" if config.get("lora") else "all weights"
    updates = ", ".join(f"{u['learns']} by {u['by']} (batch {u['batch']})" for u in config["plan"])
    return [
        f"- recipe: `{config['recipe']}`, seed {config['seed']}, iteration {int(student_checkpoint(run).name)}; {how}",
        f"- each iteration: {updates}",
        *_origin_notes(read_facts(run)),
        f"- made with mogan {__version__}",
    ]


def _origin_notes(facts: dict) -> list[str]:
    """Of what ``run.json`` names: the student's start, and how much data of what kind; less where the data is gone."""
    notes = []
    if facts.get("student", facts.get("model")) != facts.get("model"):
        notes.append(f"- the student started from: `{model_name(Path(facts['student']))}`")
    for what in ("data", "prompts"):
        if what not in facts:
            continue
        try:
            cache = open_cache(facts[what])
        except UserError:
            notes.append(f"- {what}: `{Path(facts[what]).name}`")
            continue
        facts_of, kind = cache.facts, cache.facts["contents"]
        sized = kind != "prompts" and {"frames", "fps", "height", "width"} <= facts_of.keys()
        size = " of {frames} frames at {fps} fps, {height} x {width}".format_map(facts_of) if sized else ""
        notes.append(f"- {what}: {len(cache.entries)} {kind}{size}")
    return notes


def mask_notes(mask: Mask | None) -> list[str]:
    """What a frame-sparse student is elsewhere, as an entry of a list; nothing of a dense one."""
    if mask is None:
        return []
    counts = " ".join(map(str, mask.references))
    return [
        f"- frame-sparse attention: of {mask.frames} latent frames each sees itself and so many reference frames, by block: {counts}; "
        f"{mask.kept:.0%} of all pairs (`{FILE}` beside the weights). `mogan` computes it so; stock pipelines attend densely, "
        "which is slower and not what was trained"
    ]


def metrics_table(results: Path | None) -> list[str]:
    """The metrics of a ``results.json``, systems as columns, with 95 % intervals; nothing without a file."""
    if results is None:
        return []
    systems = read_results(results)
    rows = {metric: None for system in systems.values() for metric in system["metrics"]}
    lines = ["| metric | " + " | ".join(map(_cell, systems)) + " |", "|---" * (1 + len(systems)) + "|"]
    for metric in rows:
        found = [system["metrics"].get(metric) for system in systems.values()]
        lines.append(f"| {_cell(metric)} | " + " | ".join(map(cell, found)) + " |")
    return ["\nMeasured with `mogan evaluate` (mean, 95 % interval):\n\n" + "\n".join(lines)]


def _cell(text: str) -> str:
    """A name as a cell of a table in Markdown takes it."""
    return " ".join(text.replace("|", "\\|").split())


def model_name(folder: Path) -> str:
    """A hub id where the folder is a hub snapshot (``.../models--A--B/snapshots/hash``), else the folder's name; of the lab's
    family the one that it has here.
    """
    if folder.resolve().parent == wan.lab_folder().resolve():
        return f"lab-{folder.resolve().name}"
    found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", f"{folder}/")
    return f"{found[1]}/{found[2]}" if found else folder.resolve().name


def licence_of(folder: Path) -> str | None:
    """The licence that a model's own card names in its front matter."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)\s*$", card.read_text(errors="replace"), re.M) if card.is_file() else None
    return found[1] if found else None
