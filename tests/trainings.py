"""Trainings so small that a test can run many, and interrupt any of them."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lib.config import load_config
from lib.engine.parts import Part
from lib.models.build import save_model
from lib.runtime import Runtime
from lib.sections.models import TrainingConfig
from lib.tokenization import train_tokenizer
from lib.training.data import Windows
from lib.training.loop import Result, train
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskingTokens, WindowSplits

CPU = Runtime(torch.device("cpu"), "fp32")


class Killed(BaseException):
    """Stands for SIGKILL: the loop neither catches it nor saves anything."""


TOKENIZER = train_tokenizer("character", ["abcdefghij"], 0)  # of the ids 4 to 13
TOKENS = MaskingTokens(mask_id=1, text_ids=np.arange(4, 14))


def windows(width: int = 16) -> Windows:
    """A language in which each token determines the next: a few steps are enough to learn something."""
    ids = np.tile(np.arange(4, 14), 200).astype(np.int32)
    lists = pa.chunked_array([pa.array(ids.reshape(-1, 50).tolist(), pa.list_(pa.int32()))])
    return Windows(pa.table({"token_ids": lists, "continues": [i % 4 > 0 for i in range(40)]}), width, 0)


@functools.cache
def _quick_training() -> dict[str, Any]:
    return load_config(quick_test=True).training.model_dump()


def splits(data: Windows | None = None) -> WindowSplits:
    """The splits of a language objective, all of `data` or of that language; each example is a group."""
    data = windows() if data is None else data
    tiles = data.tiled()
    return WindowSplits(data, tiles, tiles, tiles.owner)


def settings(**changes) -> TrainingConfig:
    base = _quick_training()
    return TrainingConfig.model_validate(
        base | {"steps": 12, "evaluate_every": 4, "checkpoint_every": 3, "batch_size": 8} | changes
    )


def context(label: str = "tiny", seed: int = 3, **changes) -> TrainingContext:
    """On the CPU, with the `settings` that `changes` gives."""
    return TrainingContext(label, seed, settings(**changes), CPU)


def critic_losses(critic: Any, model: Any, filled: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of (error, origin) of a batch of fills that is one part."""
    part = critic._critic_part(model, filled, rows, "critic")
    terms = part.losses(part.weights)
    return terms["critic_loss"], terms["origin_loss"]


class MeanOfRows:
    """The part of an objective whose `loss(model, step, rows)` gives means over these rows."""

    def part(self, model, step, rows):
        def losses(totals):
            share = len(rows) / totals["rows"]
            return {name: mean * share for name, mean in self.loss(model, step, rows).items()}  # type: ignore[attr-defined]

        return Part({"rows": len(rows)}, losses)


def train_tiny(
    model: Any, objective: Any, settings: TrainingConfig, folder: Path, fault: Callable[[int], None] | int | None = None
) -> Result:  # fmt: skip
    """`train` from the folder's checkpoint or from the start.

    Args:
        fault: called with every step before it happens and may raise; a number is a step that raises Killed.
    """
    if fault is not None:
        plain = objective.part

        def part(model, step, rows):
            if callable(fault):
                fault(step)
            elif step == fault:
                raise Killed
            return plain(model, step, rows)

        objective.part = part
    return train(model, objective, TrainingContext("tiny", 3, settings, CPU), folder,
                 lambda m, path: save_model(m, path, TOKENIZER))  # fmt: skip


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of all that must come out the same."""
    files = ("metrics.jsonl", "best_model/model.safetensors", "final_model/model.safetensors")
    return {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files}
