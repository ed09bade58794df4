"""The log of a training: metrics.jsonl, speed.jsonl and, if configured, a tracker."""

import json
import os
from pathlib import Path
from typing import Any

from lib.errors import BadData
from lib.training.trackers import Tracker


class MetricsLog:
    """Appends one line per evaluation.

    metrics.jsonl has the same bytes however often a training was interrupted. A resume truncates it to the length
    that the checkpoint stores. speed.jsonl holds timings, which differ from run to run.
    """

    def __init__(self, folder: Path, tracker: Tracker | None = None):
        self.folder, self.tracker = folder, tracker
        self.file = folder / "metrics.jsonl"

    def write(self, metrics: dict[str, Any], speed: dict[str, float]) -> None:
        """Append `{"step", "train", "selection"}`, and the `speed` of the steps so far in this process."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        with open(self.folder / "speed.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": metrics["step"], **speed}) + "\n")
        if self.tracker is not None:
            groups = {"train": metrics["train"], "selection": metrics["selection"], "speed": speed}
            values = {f"{group}/{name}": value for group, of in groups.items() for name, value in of.items()}
            self.tracker.log(metrics["step"], values)

    def close(self) -> None:
        """End the tracker's run."""
        if self.tracker is not None:
            self.tracker.close()

    def sync(self) -> int:
        """Flush metrics.jsonl to the disk. Returns its length in bytes, which a checkpoint keeps."""
        if not self.file.exists():
            return 0
        with open(self.file, "rb+") as file:
            os.fsync(file.fileno())
        return self.file.stat().st_size

    def truncate(self, size: int) -> None:
        """Remove what was written after a checkpoint, of which metrics.jsonl had `size` bytes."""
        found = self.file.stat().st_size if self.file.exists() else 0
        if found < size:
            raise BadData(
                f"{self.file} has {found:,} bytes, but had {size:,} at the checkpoint: lines are lost. Remove the checkpoint "
                "folder to train this model from the beginning"
            )
        if self.file.exists():
            os.truncate(self.file, size)

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)
