"""What a run writes down while it trains: ``metrics.jsonl``, TensorBoard, warnings in words."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mogan.config import Config, Update
from mogan.disk.files import write_atomically, writing
from mogan.runs.watch import Watch, read_records


class Journal:
    """The records of a run, from iteration ``start`` on; of what was written before, later iterations are dropped."""

    def __init__(self, run: Path, start: int, config: Config):
        self.run, self.watch = run, Watch(config)
        for record in _keep_before(run / "metrics.jsonl", start):
            self.watch.read(record)
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)
        self.file = (run / "metrics.jsonl").open("a")

    def write(self, iteration: int, update: Update, repeat: int, record: dict[str, float]) -> None:
        """Note one step; of an update that repeats within an iteration, TensorBoard shows the last step."""
        line = {"iteration": iteration, "update": update.label, "repeat": repeat} | record
        with writing(self.run / "metrics.jsonl"):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if repeat == update.times - 1:
            for key, value in record.items():
                self.writer.add_scalar(f"{update.label.replace('<', '_by_')}/{key}", value, iteration)
        for warning in self.watch.read(line):
            tqdm.write(f"iteration {iteration}: {warning}")
            with writing(log := self.run / "warnings.log"), log.open("a") as file:
                file.write(f"iteration {iteration}: {warning}\n")

    def close(self) -> None:
        """Flush and close."""
        with writing(self.run / "metrics.jsonl"):  # what did not fit is tried once more
            self.file.close()
        with writing(self.run / "tensorboard"):
            self.writer.close()


def _keep_before(path: Path, iteration: int) -> list[dict]:
    """Drop log lines of iterations that will be done again; returns the others."""
    if not path.is_file():
        return []
    records = [record for record in read_records(path) if record["iteration"] < iteration]
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in records))
    return records
