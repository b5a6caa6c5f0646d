"""Early warnings in words: what a person would see in the curves, said while there is time to stop."""

from collections import defaultdict, deque

FIRST, RECENT = 5, 10  # records that make "the start" and "now"
SETTLED = 50  # iterations a fake score that starts from the teacher needs to find the student at all


class Watch:
    """Reads the records of a run and says when one of four things goes wrong, each at most once in ``every`` iterations.

    The records of a resumed run must be replayed into it, so that "the start" is still the run's start.
    """

    def __init__(self, every: int = 50):
        self.every = every
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
        livelier = "raise shift.beta" if by_shift else "lower the guidance of dmd or raise gan.student_weight"
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
        return warnings

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
