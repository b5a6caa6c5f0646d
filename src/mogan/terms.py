"""What an objective asks of a run: what its networks learn from, what to watch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

LATENT, OBSERVATION = "latent", "observation"  # what an update may need of real clips
PATH = "path"  # or of a teacher's: its trajectory from noise to a clip, at the student's levels
KINDS = (LATENT, OBSERVATION, PATH)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a network needs in order to learn by an objective.

    Attributes:
        rollout: it needs the student's samples for the batch's prompts.
        clips: real clips' ``latent``, ``observation`` or both; or ``path``, a teacher's trajectories. Batches have them as
            ``latent_BCFHW``, ``observation_BCFHW`` and ``path_BKCFHW``.
        captions: it reads the captions of those clips; else the batch's text may come from another set of prompts.
        starts: latent frames at one of which a window begins; one is drawn per update.
        least: smallest number of clips in a batch.
    """

    rollout: bool = True
    clips: tuple[str, ...] = ()
    captions: bool = False
    starts: tuple[int, ...] = ()
    least: int = 1

    def __post_init__(self):
        several("a lesson's clips", self.clips, str)
        several("a lesson's starts", self.starts, int)
        if unknown := set(self.clips) - {*KINDS}:
            raise ValueError(f"a lesson has clips of kind {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Alarm:
    """A warning in words about one number of a run's records.

    Attributes:
        key: the number.
        wrong: maps its mean at the start and its mean now to whether to warn.
        text: the sentence; ``{first}`` and ``{now}`` are those means.
        learns: only records of updates of this network count; ``None``: all.
        since: records of earlier iterations do not count.
    """

    key: str
    wrong: Callable[[float, float], bool]
    text: str
    learns: str | None = None
    since: int = 0

    def __post_init__(self):
        try:
            self.text.format(first=0.0, now=0.0)
        except (LookupError, ValueError) as error:
            raise ValueError(f"an alarm's text may hold {{first}} and {{now}}, not {error}: {self.text}") from error


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an objective asks of a run, known before anything is loaded.

    Attributes:
        lessons: by the network that learns: ``student``, or one of the objective's own.
        alarms: what to watch in the records.
        alone: why it must train in one process; empty if it need not.
        fill: the settings, with what they leave to the run's data filled in; refuses data that do not fit.
        smaller: settings that need less and less memory, each with a word for what is smaller.
        controls: it also trains models with controls and references beside the text (:mod:`mogan.models.conditions`): it calls
            networks only under the conditions of the batch or the rollout, and uses only latents.
        first_frames: it also trains image-to-video models: it calls networks as above, and needs clips without references.
        forces: where it makes no clips, it calls a causal student on all chunks of a given clip, each with its past.
    """

    lessons: Mapping[str, Lesson]
    alarms: tuple[Alarm, ...] = ()
    alone: str = ""
    fill: Callable[[Any], Any] | None = None
    smaller: tuple[tuple[str, Any], ...] = ()
    controls: bool = False
    first_frames: bool = False
    forces: bool = False

    def __post_init__(self):
        several("alarms", self.alarms, Alarm)
        if not isinstance(self.lessons, Mapping) or not all(isinstance(v, Lesson) for v in self.lessons.values()):
            raise ValueError(f"lessons are a Lesson by the name of each network that learns, not {self.lessons!r}")
        if unknown := {alarm.learns for alarm in self.alarms} - {None, *self.lessons}:
            raise ValueError(
                f"an alarm looks at updates of {unknown.pop()!r}, which has no lesson: {', '.join(self.lessons)} have"
            )


def several(what: str, values: Any, *kinds: type) -> None:
    """Refuse what is no tuple or list of these kinds: one value in brackets without a comma is that value alone. Raises ValueError."""
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, kinds) for value in values):
        raise ValueError(
            f"{what}: a tuple of {kinds[0].__name__}, of one with a comma behind it as in (one,), and not {values!r}"
        )


def whole_numbers(of: Any, least: Mapping[str, int], where: str = "") -> None:
    """Refuse attributes that are no whole numbers of at least so much; ``None`` is none given. Raises ValueError."""
    for name, low in least.items():
        value = getattr(of, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
            raise ValueError(f"{where}{name} must be a whole number of at least {low}, not {value!r}")


def require_kept(name: str, value: Any) -> None:
    """Refuse a setting that ``config.json`` cannot hold, or that would not equal itself when it is read again. Raises ValueError."""
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            require_kept(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, one in value.items():
            require_kept(f"{name}.{key}", one)
    elif isinstance(value, (list, tuple)):
        for place, one in enumerate(value):
            require_kept(f"{name}[{place}]", one)
    elif not (value is None or isinstance(value, (int, float, str))) or value != value:
        kind = "NaN" if isinstance(value, float) else f"a {type(value).__name__}"
        raise ValueError(
            f"{name} is {kind}: settings are numbers, text, lists, and names with values, as JSON holds them, since a run keeps them"
        )


def joined(lessons: Iterable[Lesson]) -> Lesson:
    """What objectives that judge together need: all that any of them does. Raises ValueError if they cannot."""
    several = list(lessons)
    starts = {lesson.starts for lesson in several if lesson.starts}
    if len(starts) > 1:
        raise ValueError(f"objectives that judge together must draw their windows from the same starts, not {starts}")
    return Lesson(
        rollout=any(lesson.rollout for lesson in several),
        clips=tuple(kind for kind in KINDS if any(kind in lesson.clips for lesson in several)),
        captions=any(lesson.captions for lesson in several),
        starts=next(iter(starts), ()),
        least=max(lesson.least for lesson in several),
    )
