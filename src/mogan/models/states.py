"""States that a student can be told: a row of text learnt for each, after the prompt's rows (the class labels of LLIA, 2506.05806).

The network stays stock, and so do its files: rows lie in ``states.safetensors`` beside them, and without that file nothing is
told. Which state a text has travels in further columns of it, one per state and 1 in the last row, so that whatever pads,
doubles or moves a text does so with its state; before the text is embedded the columns become the row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mogan.errors import UserError
from mogan.models.attention import TEXT_LENGTH

FILE = "states.safetensors"


def attach_states(transformer: Any, rows: Mapping[str, Float[Tensor, " d"]]) -> Any:
    """Let a Wan transformer read states, in place: its rows are a weight of it like any other. Names are in sorted order."""
    embedder = transformer.condition_embedder.text_embedder
    if not hasattr(embedder, "states"):
        embedder.register_forward_pre_hook(_read)
    embedder.state_names = tuple(sorted(rows))
    embedder.states = nn.Parameter(torch.stack([rows[name].float() for name in sorted(rows)]))
    return transformer


def _read(embedder: Any, args: tuple) -> tuple | None:
    text, width = args[0], embedder.linear_1.in_features
    if text.shape[-1] == width:
        return None
    return (text[..., :width] + (text[..., width:, None] * embedder.states).sum(-2), *args[1:])


def state_names(transformer: Any) -> tuple[str, ...]:
    """The states that a transformer reads, in the order of their columns."""
    return getattr(transformer.condition_embedder.text_embedder, "state_names", ())


def state_rows(transformer: Any) -> dict[str, Tensor]:
    """The row ``(D,)`` of every state."""
    embedder = transformer.condition_embedder.text_embedder
    return (
        dict(zip(embedder.state_names, embedder.states.detach().cpu(), strict=True)) if state_names(transformer) else {}
    )


def detach_states(transformer: Any) -> dict[str, Tensor]:
    """The rows, taken out: what is left is stock."""
    rows, embedder = state_rows(transformer), transformer.condition_embedder.text_embedder
    if rows:
        embedder.state_names = ()
        del embedder.states
    return rows


def known(state: object, states: tuple[str, ...], where: str) -> str | None:
    """A state that a student knows, or none. Raises UserError."""
    if state is not None and state not in states:
        has = f"knows {', '.join(states)}" if states else "knows no states: train one with states, such as llia_lab"
        raise UserError(f"{where} asks for the state {state!r}, and the student {has}")
    return state if isinstance(state, str) else None


def told(text_LD: Float[Tensor, "l d"], state: str | None, names: tuple[str, ...]) -> Float[Tensor, "l2 d2"]:
    """A text and its state, or none, for a network that reads ``names``: ``(L + 1, D + K)``, or ``(L, D + K)``."""
    if not names:
        return text_LD
    if state is None:
        return F.pad(text_LD, (0, len(names)))
    found = F.pad(text_LD[: TEXT_LENGTH - 1], (0, len(names), 0, 1))
    found[-1, text_LD.shape[1] + names.index(state)] = 1.0
    return found


def write_states(folder: Path, rows: Mapping[str, Tensor]) -> None:
    """``states.safetensors`` of a folder: a row ``(D)`` by name."""
    save_file({name: row.float().contiguous() for name, row in rows.items()}, folder / FILE)


def read_states(folder: Path, width: int | None = None) -> dict[str, Tensor]:
    """The inverse; empty where there is no such file.

    Raises:
        UserError: it is damaged, or of another text encoder than one of this width.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        rows = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): get it again, or remove it to do without states") from error
    if any(row.ndim != 1 or len(row) != (width or len(row)) or not row.isfinite().all() for row in rows.values()):
        raise UserError(
            f"{path} holds no rows of {width} numbers: it is another model's, remove it to do without states"
        )
    return rows
