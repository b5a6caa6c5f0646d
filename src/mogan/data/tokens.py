"""What the text encoder makes of captions: which it cuts, which it cannot tell apart."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mogan.data.lists import printable
from mogan.models.attention import TEXT_LENGTH

Tokens = Callable[[list[str]], list[list[int]]]


def load_tokens(model: Path) -> Tokens:
    """``prompts -> token numbers``, cleaned as in ``WanPipeline`` and uncut; the last one marks the end."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    from mogan.models.wan import load_tokenizer

    tokenizer = load_tokenizer(model)
    return lambda prompts: tokenizer([prompt_clean(p) for p in prompts], verbose=False).input_ids if prompts else []


def about_tokens(captions: Mapping[str, str], tokens: Tokens) -> list[str]:
    """Sentences on captions that are longer than the text encoder reads, and on different ones that become the same.

    Args:
        captions: by the name of what they belong to.
        tokens: see :func:`load_tokens`.
    """
    length = TEXT_LENGTH
    different = list(dict.fromkeys(captions.values()))
    numbers = dict(zip(different, tokens(different), strict=True))
    notes = []
    long = [name for name, caption in captions.items() if len(numbers[caption]) > length]
    if long:
        notes.append(
            f"{len(long)} captions have more than {length} tokens (first {_short(long[0])}, "
            f"{len(numbers[captions[long[0]]])}): what comes after is cut, as Wan's own pipeline does"
        )
    first: dict[tuple[int, ...], str] = {}
    alike = []
    for name, caption in captions.items():
        read = numbers[caption]
        read = [*read[: length - 1], read[-1]] if len(read) > length else read
        other = first.setdefault(tuple(read), name)
        if captions[other] != caption:
            alike.append((name, other))
    if alike:
        name, other = map(_short, alike[0])
        notes.append(
            f"{len(alike)} captions are the same to the text encoder as a different one (first {name} as {other}): what tells "
            "them apart is cut, or no word it knows"
        )
    return notes


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 80 else f"{name[:77]}..."
