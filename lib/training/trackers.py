"""Experiment trackers: metrics of a training also go to TensorBoard, Trackio, Weights & Biases or MLflow.

A tracker's package is imported when `training.tracker` names it. metrics.jsonl is always written, and is the exact record:
after an interruption, a tracker gets the metrics of repeated steps again.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from lib.errors import BadConfig

PROJECT = "remask"
PACKAGES = ("tensorboard", "trackio", "wandb", "mlflow")


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None:
        """Store the values of a step. Names are such as `train/loss`."""
        ...

    def close(self) -> None: ...


def open_tracker(name: str | None, folder: Path, label: str, settings: dict[str, Any]) -> Tracker | None:
    """The tracker `training.tracker`; None if the config names none.

    Args:
        folder: of the model. Its run's name and `label` name the run of the tracker.
        settings: of the training, stored with the run.

    Raises BadConfig if the package is not installed.
    """
    if name is None:
        return None
    if importlib.util.find_spec(name) is None:
        raise BadConfig(
            f"training.tracker is {name}, but {name} is not installed; `pip install {name}`, or set training.tracker=null"
        )
    run = "/".join([*folder.absolute().parts[-3:-1], label])
    kinds = {"tensorboard": _TensorBoard, "trackio": _RunTracker, "wandb": _RunTracker, "mlflow": _MLflow}
    return kinds[name](name, folder, run, settings)


class _TensorBoard:
    def __init__(self, name: str, folder: Path, run: str, settings: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _RunTracker:
    """Weights & Biases, and Trackio, which has the same functions."""

    def __init__(self, name: str, folder: Path, run: str, settings: dict[str, Any]):
        self._package = importlib.import_module(name)
        self._package.init(project=PROJECT, name=run, config=settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._package.log(values, step=step)

    def close(self) -> None:
        self._package.finish()


class _MLflow:
    def __init__(self, name: str, folder: Path, run: str, settings: dict[str, Any]):
        self._package = importlib.import_module(name)
        self._package.set_experiment(PROJECT)
        self._package.start_run(run_name=run)
        self._package.log_params(settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._package.log_metrics(values, step=step)

    def close(self) -> None:
        self._package.end_run()
