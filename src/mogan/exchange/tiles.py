"""From what ``mogan attention`` measured to a model whose blocks see few frames: Efficient-vDiT's layer-wise search, kept."""

import shutil
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from mogan.disk.files import link_or_copy, new_folder, read_json, writable_folder, write_atomically
from mogan.errors import UserError
from mogan.exchange.card import mask_notes
from mogan.models import wan
from mogan.models.experts import LOW
from mogan.models.frame_sparse import Mask, search, write_mask
from mogan.ranges import at_least
from mogan.runs.generator import Generator, open_generator


def tiles(
    measured: tyro.conf.Positional[Path],
    *,
    out: Path,
    threshold: float | None = None,
    references: int | None = None,
) -> None:
    """Make a model frame-sparse: its folder again, with a note beside the weights of how many frames each block sees.

    The weights are the same files. `mogan sample`, `train` (as the student), `export` and `estimate` compute its attention so;
    stock pipelines open the folder too and attend densely.

    Args:
        measured: the --out of `mogan attention --thresholds`.
        out: the new folder; must not exist yet.
        threshold: error that a block may make at any level that was measured, a share of what it adds, such as 0.05: each block
            gets the fewest references that keep to it.
        references: the same number for every block in place of a search.
    """
    at_least(0, threshold=threshold)
    at_least(1, references=references)
    if (threshold is None) == (references is None):
        raise UserError("give --threshold, an error that a block may make, or --references for all blocks alike")
    if out.exists():
        raise UserError(f"{out} exists already: give another --out or remove it")
    writable_folder(out.parent)
    facts = _read(measured)
    source = open_generator(wan.base_named(facts["model"]))
    if source.run is not None:
        raise UserError(
            f"{facts['model']} is a training run: export it (`mogan export`) and measure the export's attention"
        )
    if source.mark() != facts["weights"]:
        raise UserError(f"{facts['model']} has other weights than {measured} was measured of: measure it again")
    masks = dict(_masks(source, facts, measured, threshold, references))
    with new_folder(out) as new:
        shutil.copytree(source.folder, new, copy_function=link_or_copy, dirs_exist_ok=True)
        card = new / "README.md"
        said = card.read_text(errors="replace") if card.is_file() else f"# {source.folder.resolve().name}\n"
        notes = "\n".join(note for mask in masks.values() for note in mask_notes(mask))
        write_atomically(card, f"{said.rstrip()}\n\n{notes}\n")
        for part, mask in masks.items():
            write_mask(new / part, mask)
    for mask in masks.values():
        print(f"{mask.kept:.0%} of pairs of frames kept; references {' '.join(map(str, mask.references))}")
    print(f"made {out}; use it as --model of `mogan sample`, and as --student of `mogan train`")


def _read(measured: Path) -> dict[str, Any]:
    path = measured / "attention.json" if measured.is_dir() else measured
    if not path.is_file():
        raise UserError(f"{measured} has no attention.json: give the --out of `mogan attention`")
    facts = read_json(path)
    if lacking := [name for name in ("model", "weights", "frames", "blocks") if name not in facts]:
        raise UserError(f"{path} does not say {lacking[0]}: measure again (`mogan attention`)")
    try:
        _check(**facts)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} was changed by something else ({error}): measure again (`mogan attention`)") from error
    return facts


def _check(model: Any, weights: Any, frames: Any, blocks: Any, sparse: Any = None, **_: Any) -> None:
    """Raise where it is not as `mogan attention` writes it."""
    if not isinstance(model, str) or not isinstance(weights, str) or type(frames) is not int or frames < 1:
        raise ValueError("its model, weights or frames")
    for level, found in blocks.items():
        if not 0 < float(level) <= 1 or not isinstance(found, list) or not found:
            raise ValueError(f"level {level}")
        errors = torch.tensor(sparse[level]["errors"]) if sparse is not None else torch.zeros(len(found), frames)
        if errors.shape != (len(found), frames) or not (errors.isfinite() & (errors >= 0)).all():
            raise ValueError(f"the errors of level {level}")


def _masks(source: Generator, facts: dict, measured: Path, threshold: float | None, references: int | None):
    """The mask of each transformer by the name of its part; of two experts each by the levels that are its own."""
    frames, boundary = facts["frames"], source.boundary
    for part in ["transformer"] if boundary is None else ["transformer", LOW]:
        mine = [level for level in facts["blocks"] if boundary is None or (float(level) >= boundary) == (part != LOW)]
        if not mine:
            raise UserError(f"{measured} was measured at no level of {part} (boundary {boundary}): add one to --levels")
        chosen = {"model": facts["model"], "levels": list(map(float, mine))}
        if references is not None:
            if references > frames:
                raise UserError(f"--references is at most the {frames} latent frames of a clip, not {references}")
            yield part, Mask(frames, (references,) * len(facts["blocks"][mine[0]]), chosen)
            continue
        if "sparse" not in facts:
            raise UserError(f"{measured} says no errors: measure it with --thresholds, or give --references")
        worst: Tensor = torch.tensor([facts["sparse"][level]["errors"] for level in mine]).amax(0)
        counts = search(worst, threshold or 0.0)
        own = [worst[block, count - 1].item() for block, count in enumerate(counts)]
        yield part, Mask(frames, tuple(counts), {**chosen, "threshold": threshold, "errors": own})
