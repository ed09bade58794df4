"""The log files of a training: metrics.jsonl, speed.jsonl and, if configured, TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends one line per evaluation.

    metrics.jsonl has the same bytes however often a training was interrupted: a resume truncates it to the length that
    the checkpoint remembers. speed.jsonl holds timings, which differ from run to run.
    """

    def __init__(self, folder: Path, tensorboard: bool):
        self.folder, self.tensorboard = folder, tensorboard
        self.file = folder / "metrics.jsonl"

    def write(self, metrics: dict[str, Any], seconds: float, tokens_per_second: float) -> None:
        """Append `{"step", "train", "selection"}`, and the timings of the steps so far in this process."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        speed = {"step": metrics["step"], "seconds": seconds, "tokens_per_second": tokens_per_second}
        with open(self.folder / "speed.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(speed) + "\n")
        if self.tensorboard:
            self._write_tensorboard(metrics)

    def sync(self) -> int:
        """Flush metrics.jsonl to the disk. Returns its length in bytes, which a checkpoint keeps."""
        if not self.file.exists():
            return 0
        with open(self.file, "rb+") as file:
            os.fsync(file.fileno())
        return self.file.stat().st_size

    def truncate(self, size: int) -> None:
        """Remove what was written after a checkpoint, of which metrics.jsonl had `size` bytes."""
        if self.file.exists():
            os.truncate(self.file, size)

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)

    def _write_tensorboard(self, metrics: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / "tensorboard")) as writer:
            for split in ("train", "selection"):
                for name, value in metrics[split].items():
                    writer.add_scalar(f"{split}/{name}", value, metrics["step"])
