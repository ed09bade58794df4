"""Trainings so small that a test can run many, and break off any of them."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lib.config import load_config
from lib.models.build import save_model
from lib.runtime import Runtime
from lib.sections.models import TrainingConfig
from lib.tokenization import train_tokenizer
from lib.training.data import Windows
from lib.training.loop import Result, train

CPU = Runtime(torch.device("cpu"), "fp32")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it, nothing is saved on its way."""


TOKENIZER = train_tokenizer("character", ["abcdefghij"], 0)  # of the ids 4 to 13


def windows(width: int = 16) -> Windows:
    """A language in which each token tells the next: easy to learn, so that a few steps show."""
    ids = np.tile(np.arange(4, 14), 200).astype(np.int32)
    lists = pa.chunked_array([pa.array(ids.reshape(-1, 50).tolist(), pa.list_(pa.int32()))])
    return Windows(pa.table({"token_ids": lists, "continues": [i % 4 > 0 for i in range(40)]}), width, 0)


@functools.cache
def _quick_training() -> dict[str, Any]:
    return load_config(quick_test=True).training.model_dump()


def splits(data: Windows | None = None) -> dict[str, Any]:
    """The splits that a language objective asks for, all of this text or of that language; each example is a group."""
    data = windows() if data is None else data
    tiles = data.tiled()
    return {"train": data, "selection": tiles, "held_out": tiles, "groups": tiles.owner}


def settings(**changes) -> TrainingConfig:
    base = _quick_training()
    return TrainingConfig.model_validate(
        base | {"steps": 12, "evaluate_every": 4, "checkpoint_every": 3, "batch_size": 8} | changes
    )


def train_tiny(
    model: Any, objective: Any, settings: TrainingConfig, folder: Path, fault: Callable[[int], None] | int | None = None
) -> Result:  # fmt: skip
    """`train` from the folder's checkpoint or from the start.

    Args:
        fault: called with every step before it happens and may raise; a number is a step that raises Killed.
    """
    if fault is not None:
        plain = objective.loss

        def loss(model, step, rows):
            if callable(fault):
                fault(step)
            elif step == fault:
                raise Killed
            return plain(model, step, rows)

        objective.loss = loss
    return train(model, objective, settings, CPU, folder, seed=3, label="tiny",
                 save=lambda m, path: save_model(m, path, TOKENIZER))  # fmt: skip


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of all that must come out the same."""
    files = ("metrics.jsonl", "best_model/model.safetensors", "final_model/model.safetensors")
    return {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files}
