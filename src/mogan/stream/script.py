"""What happens when in a stream: a script of states, prompts and pictures, or the states that a recording chooses."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mogan.data.lists import read_text, whole
from mogan.disk.files import from_json
from mogan.errors import UserError
from mogan.models.states import known
from mogan.stream.engine import Studio, checked
from mogan.stream.sound import RATE, STATES, read_sound, state_of_sound, voiced


class Said(NamedTuple):
    """What is told of a stretch of seconds. ``None``: the stream's own prompt and first latent, no state."""

    prompt: str | None = None
    state: str | None = None
    given: Tensor | None = None


When = Callable[[float, float], Said]
Pictures = Callable[[Path, str], Tensor]  # a picture as a latent, of a line of that name


def read_script(path: Path, states: tuple[str, ...], pictures: Pictures, end: float = math.inf) -> When:
    """A line of JSON for each change: ``{"at": seconds, "state": name}``, a ``prompt`` or a ``picture`` too or alone; in order of time.

    ``null`` is no state. A picture is a file, looked for from the script's folder. Says which changes come after the ``end`` of a
    clip, in seconds.

    Raises:
        UserError: a line is none of these, names a state that the student does not know or a picture that cannot be used; there
            is no line.
    """
    times, found, read = [0.0], [Said()], {}  # type: list[float], list[Said], dict[str, Tensor]
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            said = from_json(line)
            at = float(said["at"]) if type(said["at"]) in (int, float) else math.nan
            good = set(said) <= {"at", "state", "prompt", "picture"} and len(said) > 1 and times[-1] <= at < 1e9
            good = good and isinstance(said.get("prompt", ""), str | None) and isinstance(said.get("picture", ""), str)
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            good = False
        if not good:
            raise UserError(
                f'{where} is no change: write {{"at": seconds, "state": name}}, with a prompt or a picture or one alone, in order of time'
            )
        prompt, state, given = said.get("prompt", found[-1].prompt), said.get("state", found[-1].state), found[-1].given
        if (name := said.get("picture")) is not None:
            if name not in read:
                read[name] = pictures(path.parent / name, where)
            given = read[name]
        words = None if prompt is None else checked(whole(prompt, where), where)
        times.append(at)
        found.append(Said(words, known(state, states, where), given))
    if len(times) == 1:
        raise UserError(f'{path} holds no change: write lines such as {{"at": 0, "prompt": ...}}')
    if late := [at for at in times if at >= end]:
        print(f"{path}: {len(late)} changes, the first at {late[0]:g} s, come after the clip's end at {end:g} s")
    return lambda start, stop: found[bisect_right(times, start + 1e-6) - 1]


def follow_sound(path: Path, states: tuple[str, ...]) -> tuple[When, float]:
    """States by a recording (:func:`mogan.stream.sound.state_of_sound`), and its length in seconds."""
    for state in STATES:
        known(state, states, "--audio")
    sound = read_sound(path)
    heard = [voiced(channel) for channel in sound]
    return (lambda start, stop: Said(state=state_of_sound(sound, start, stop, heard))), sound.shape[1] / RATE


@dataclass(frozen=True)
class Following:
    """A text that changes by itself: of each chunk what a script or a recording says of its seconds.

    A change takes effect with the first chunk that begins at or after it; of a recording a chunk hears what will sound while
    it is shown.
    """

    studio: Studio
    prompt: str
    when: When
    texts: dict[tuple[str, str | None], Tensor] = field(default_factory=dict)

    def __call__(self, latent: int) -> Tensor:
        """The text ``(1, L, D)`` of the chunk that begins with a latent; the same tensor for the same words, so nothing is recomputed."""
        said = self._said(latent)
        key = (said.prompt or self.prompt, said.state)
        if key not in self.texts:
            self.texts[key] = self.studio.text(*key)
        return self.texts[key]

    def state(self, latent: int) -> str | None:
        """The state that a latent was made in."""
        return self._said(latent).state

    def given(self, latent: int) -> Tensor | None:
        """The first latent ``(1, C, 1, h, w)``, if a picture is given, as the chunk that begins with a latent is to see it."""
        given = self._said(latent).given
        return self.studio.given if given is None else given

    def _said(self, latent: int) -> Said:
        each, fps = self.studio.frames_per_latent, self.studio.source.geometry.fps
        begin, end = ((max(0, n - 1) * each + (n > 0)) / fps for n in self.studio.chunk_of(latent))
        return self.when(begin, end)
