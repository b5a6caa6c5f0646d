"""Early warnings in words: what a person would see in the curves, said while there is time to stop."""

from collections import defaultdict, deque

from mogan.config import Config

FIRST, RECENT = 5, 10  # records that make "the start" and "now"
SETTLED = 50  # iterations a fake score that starts from the teacher needs to find the student at all
EARLY, DROWNED = 20, 0.05  # iterations in which gradients are compared, and steps that are too short to count


class Watch:
    """Reads the records of a run and says when something goes wrong, each thing at most once in ``every`` iterations.

    The records of a resumed run must be replayed into it, so that "the start" is still the run's start. With the run's
    config, it also says once if one of the updates that share an optimiser is drowned by the others.
    """

    def __init__(self, config: Config | None = None, every: int = 50):
        self.config, self.every = config, every
        self.norms: dict[str, list[float]] = defaultdict(list)  # of the first iterations, by update
        self.weighed = config is None
        self.start: dict[str, list[float]] = defaultdict(list)
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self.said: dict[str, int] = {}

    def read(self, record: dict) -> list[str]:
        """Take in one line of ``metrics.jsonl``; return new warnings."""
        update = record["update"]
        for key in ("motion", "saturation", "gap", "surrogate_error"):
            if key in record:
                self._note(key, record[key])
        if update.startswith("fake_score") and record["iteration"] >= SETTLED:
            self._note("fake_loss", record["loss"])
        by_shift = update == "student<shift"
        livelier = (
            "raise shift.beta" if by_shift else "lower the guidance of dmd or raise the motion update's learning rate"
        )
        checks = (
            ("motion", self._ratio("motion") < 0.7, "the student is stiller than at its start: its clips move {now:.2f} "
             "px/frame, at first {first:.2f}; stop here, or {livelier}"),
            ("saturation", self._difference("saturation") > 0.1, "colours are saturating: {now:.2f}, at first {first:.2f}; "
             "lower the learning rate of the student or the guidance of dmd"),
            ("fake_loss", self._ratio("fake_loss") > 1.3, "the fake score lags behind the student: its loss is {now:.3f}, at "
             "first {first:.3f}; give it more updates per iteration or a higher learning rate"),
            ("gap", self._now("gap") > 6.0, "the discriminator wins outright: real and generated logits are {now:.1f} apart; "
             "raise r1 and r2, or lower its learning rate"),
            ("surrogate_error", self._now("surrogate_error") > 1.0, "the surrogate foretells the motion no better than its "
             "mean would: its relative error is {now:.2f}; make more updates exact, or set surrogate.limit"),
        )  # fmt: skip
        warnings = []
        for key, wrong, text in checks:
            iteration = record["iteration"]
            if wrong and iteration - self.said.get(key, -self.every) >= self.every:
                self.said[key] = iteration
                warnings.append(text.format(now=self._now(key), first=self._first(key), livelier=livelier))
        return warnings + self._drowned(record)

    def _drowned(self, record: dict) -> list[str]:
        """After the first iterations: which updates hardly step, by moments that they share with greater gradients.

        Adam divides a gradient by the root of the mean square of all that it was given, so of two updates that share
        it the one with a 20th of the gradient takes a 14th of the step that it takes alone.
        """
        if self.weighed or self.config is None:
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

    def _note(self, key: str, value: float) -> None:
        if len(self.start[key]) < FIRST:
            self.start[key].append(value)
        self.recent[key].append(value)

    def _ready(self, key: str) -> bool:
        return len(self.recent[key]) == RECENT

    def _first(self, key: str) -> float:
        return sum(self.start[key]) / max(len(self.start[key]), 1)

    def _now(self, key: str) -> float:
        return sum(self.recent[key]) / RECENT if self._ready(key) else 0.0

    def _ratio(self, key: str) -> float:
        return self._now(key) / max(self._first(key), 1e-8) if self._ready(key) else 1.0

    def _difference(self, key: str) -> float:
        return self._now(key) - self._first(key) if self._ready(key) else 0.0


def _rms(values: list[float]) -> float:
    return (sum(v * v for v in values) / max(len(values), 1)) ** 0.5
