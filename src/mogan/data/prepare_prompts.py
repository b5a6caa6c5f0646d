"""A list of prompts to a cache, for recipes that need no videos."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mogan.data import cache as data
from mogan.data.folder import claim, tell, write_lines
from mogan.data.lists import read_prompts
from mogan.data.tokens import Tokens, about_tokens


def prepare_prompts(
    source: str | Path,
    out: str | Path,
    fingerprints: dict[str, str],
    encode_text: Callable[[list[str]], list[Tensor]],
    extra_prompts: Sequence[str] = (),
    tokens: Tokens | None = None,
) -> int:
    """Cache prompts alone, those of :func:`mogan.data.lists.read_prompts`. Returns how many.

    ``encode_text`` maps prompts to embeddings ``(L, D)``.
    """
    source, out = Path(source), Path(out)
    notes: list[str] = []
    prompts = read_prompts(source, notes.append)
    claim(out, {"contents": "prompts"} | fingerprints)
    data.ensure_text(out, [*prompts, "", *extra_prompts], encode_text)
    write_lines(out / "index.jsonl", [{"id": data.text_path(out, p).stem, "caption": p} for p in prompts])
    tell(out, notes + (about_tokens({p: p for p in prompts}, tokens) if tokens else []))
    return len(prompts)
