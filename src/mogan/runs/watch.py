"""Early warnings in words: what a person would see in the curves, said while there is time to stop."""

from collections import Counter, defaultdict, deque
from contextlib import suppress
from pathlib import Path

from mogan.config import Config
from mogan.disk.files import from_json
from mogan.errors import closest
from mogan.terms import Alarm

FIRST, RECENT = 5, 10  # records that make "the start" and "now"
# iterations in which gradients are compared or numbers missed; steps that are too short to count
EARLY, DROWNED = (20, 0.05)


class Watch:
    """Reads the records of a run and says when something goes wrong, each thing at most once in ``every`` iterations.

    What can go wrong is said by the objectives of the run's config. The records of a resumed run must be replayed into it,
    so that "the start" is still the run's start. It also says once if one of the updates that share an optimiser is drowned
    by the others.
    """

    def __init__(self, config: Config, every: int = 50):
        self.config, self.every = config, every
        self.norms: dict[str, list[float]] = defaultdict(list)  # of the first iterations, by update
        self.weighed = False
        self.alarms = {alarm: name for name in config.objectives for alarm in config.terms(name).alarms}
        # records without its number
        self.silent: dict[Alarm, Counter[str]] = {alarm: Counter() for alarm in self.alarms}
        self.start: dict[Alarm, list[float]] = defaultdict(list)
        self.recent: dict[Alarm, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self.said: dict[Alarm, int] = {}

    def read(self, record: dict) -> list[str]:
        """Take in one line of ``metrics.jsonl``; return new warnings."""
        warnings, iteration = [], record["iteration"]
        for alarm in self.alarms:
            counts = alarm.learns in (None, record["update"].partition("<")[0]) and iteration >= alarm.since
            if counts and alarm.key in record:
                self._note(alarm, record[alarm.key])
            elif counts and alarm in self.silent:
                warnings += self._missing(alarm, record)
            start, recent = self.start[alarm], self.recent[alarm]
            if len(recent) < RECENT or iteration - self.said.get(alarm, -self.every) < self.every:
                continue
            first, now = sum(start) / len(start), sum(recent) / RECENT
            if alarm.wrong(first, now):
                self.said[alarm] = iteration
                warnings.append(alarm.text.format(first=first, now=now))
        return warnings + self._drowned(record)

    def _drowned(self, record: dict) -> list[str]:
        """After the first iterations: which updates hardly step, by moments that they share with greater gradients.

        Adam divides a gradient by the root of the mean square of all that it was given, so of two updates that share
        it the one with a 20th of the gradient takes a 14th of the step that it takes alone.
        """
        if self.weighed:
            return []
        if record["iteration"] < EARLY:
            self.norms[record["update"]].append(record.get("grad_norm", 0.0))
            return []
        self.weighed, said = True, []
        for name, optimizer in self.config.optimizers.items():
            sharing = list({u.label for u in self.config.plan if u.optimizer_name == name} & self.norms.keys())
            norms = {label: [min(n, optimizer.clip) for n in self.norms[label]] for label in sorted(sharing)}
            whole = _rms([n for of_one in norms.values() for n in of_one])
            for label, of_one in norms.items():
                if len(of_one) >= FIRST and _rms(of_one) < DROWNED * whole:
                    others = " and ".join(other for other in norms if other != label)
                    said.append(
                        f"{label} is drowned by {others}: they share an Adam, whose steps for it are "
                        f"{_rms(of_one) / whole:.1%} of those it would take alone (its gradient norms are about "
                        f"{_rms(of_one):.2g}, all together {whole:.2g}); give it an optimizer of its own in the plan, or "
                        "its loss another weight"
                    )
        return said

    def _missing(self, alarm: Alarm, record: dict) -> list[str]:
        """Once, if no update of the objective logs an alarm's number: nobody would ever hear it."""
        name, count = self.alarms[alarm], self.silent[alarm]
        count[record["update"]] += 1
        could = [u.label for u in self.config.plan if name in u.judges and alarm.learns in (None, u.learns)]
        if not could or min(count[label] for label in could) < EARLY:
            return []
        del self.silent[alarm]
        hint = closest(alarm.key, record) or ": log it, or take the alarm away"
        return [f"an alarm of {name} watches {alarm.key!r}, which no loss of it logs{hint}"]

    def _note(self, alarm: Alarm, value: float) -> None:
        self.silent.pop(alarm, None)
        if len(self.start[alarm]) < FIRST:
            self.start[alarm].append(value)
        self.recent[alarm].append(value)


def read_records(path: Path) -> list[dict]:
    """Lines of a ``metrics.jsonl`` that are records; what a kill tore or something else damaged is left out."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):
            row = from_json(line)
            if isinstance(row, dict) and type(row.get("iteration")) is int and isinstance(row.get("update"), str):
                numbers = [value for key, value in row.items() if key != "update"]
                found += [row] if all(type(value) in (int, float) for value in numbers) else []
    return found


def _rms(values: list[float]) -> float:
    return (sum(v * v for v in values) / max(len(values), 1)) ** 0.5
