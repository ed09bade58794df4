"""What the training loop and the objectives agree on, and the helpers that the objectives share.

A step learns from a global batch of rows, which is divided into parts (`lib/engine/parts.py`). The loss of the batch
is a sum over its rows, divided by a sum of weights, such as the number of tokens. So it is computed in two stages:

    1. `Objective.part` draws the data of a part's rows, and says what they weigh
    2. the weights are summed over all parts, also those of other processes
    3. `Part.losses` computes the part's share of the loss; the shares of all parts add up to the loss of the batch

Legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.devices import to_device
from lib.engine.parts import Part
from lib.log import say
from lib.metrics import Estimate
from lib.runtime import Runtime
from lib.sections.models import TrainingConfig

EVALUATION_TOKENS = 64 * 513  # of a forward pass of an evaluation: 64 texts of 512 tokens behind [CLS]


@dataclass(frozen=True)
class TrainingContext:
    """What every part of one training needs.

    Attributes:
        label: name of the model. It is part of messages, of the results table, and of the keys of random draws.
        seed: the run's seed.
        settings: steps, batch size, optimizer and evaluation of this training.
        runtime: device and precision.
    """

    label: str
    seed: int
    settings: TrainingConfig
    runtime: Runtime


class Objective(Protocol):
    """What a model learns: batches, loss and metrics. The loop needs nothing else about the data.

    An objective whose `part` depends on step and rows only, and not on the model, says so with `draws_ahead = True`. Its
    data may then be drawn while the step before is computed.

    An objective that puts [CLS] in front of its inputs also has the attribute `cls_id`, see `freezing.Freezing`.

    Attributes:
        selection: name of the metric of `evaluate` that chooses the best model; the lowest value wins.
        tokens_per_row: tokens of one row, for the logged speed.
    """

    selection: str
    tokens_per_row: int

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The data of some rows of a step's global batch. No gradient flows through the model here."""
        ...

    def evaluate(self, model: nn.Module, /) -> dict[str, float]:
        """Metrics on the selection split."""
        ...


@dataclass(frozen=True)
class ResultRow:
    """A line of the results table: a metric of a model, its 95 % interval, and the baseline.

    Attributes:
        difference_low, difference_high: ends of the 95 % interval of `value - baseline_value`, where the items are the
            same and model and baseline are resampled together. None for a baseline that is a number, such as chance.
    """

    model: str
    metric: str
    value: float
    low: float
    high: float
    baseline: str
    baseline_value: float
    lower_is_better: bool
    difference_low: float | None = None
    difference_high: float | None = None

    @property
    def beats_baseline(self) -> bool:
        """Whether the whole interval of the difference, or else of the value, is on the better side of the baseline."""
        low, high, limit = self.low, self.high, self.baseline_value
        if self.difference_low is not None and self.difference_high is not None:
            low, high, limit = self.difference_low, self.difference_high, 0.0
        return high < limit if self.lower_is_better else low > limit

    def with_difference(self, difference: Estimate | None) -> "ResultRow":
        """The row with `value - baseline_value`, estimated on the same items. None: the baseline is a number."""
        low, high = (None, None) if difference is None else (difference.low, difference.high)
        return replace(self, difference_low=low, difference_high=high)

    def as_dict(self) -> dict:
        return asdict(self) | {"beats_baseline": self.beats_baseline}


class ReportingObjective(Objective, Protocol):
    """An objective that also measures the best model on the held-out split."""

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """(metrics for the training manifest, rows of the results table)."""
        ...


@runtime_checkable
class ScaledObjective(Protocol):
    """An objective whose loss is divided by a number that is known after the forward passes only.

    One that is not divided with its present settings says so with `scales = False`.
    """

    def finish(self, terms: dict[str, float]) -> tuple[dict[str, float], float]:
        """(the terms to log, the factor of the gradients) from the summed shares of a batch."""
        ...


@runtime_checkable
class StatefulObjective(Protocol):
    """An objective with state of its own, which must be part of a checkpoint."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


def batch_losses(objective: Objective, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
    """The named scalars of a global batch that is one part: what the training loop computes with `parts: 1`."""
    part = objective.part(model, step, rows)
    terms = part.losses(part.weights)
    if isinstance(objective, ScaledObjective):
        logged, factor = objective.finish({name: float(term.detach()) for name, term in terms.items()})
        others = {name: torch.tensor(value) for name, value in logged.items() if name != "loss"}
        return {"loss": terms["loss"] * factor} | others
    return terms


def result_row(
    model: str,
    metric: str,
    estimate: Estimate,
    baseline: str,
    baseline_value: float,
    *,
    lower_is_better: bool,
) -> ResultRow:
    return ResultRow(model, metric, *estimate, baseline, float(baseline_value), lower_is_better)


def tensor(array: np.ndarray, runtime: Runtime) -> Tensor:
    """The array as a tensor on the device."""
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), runtime.device)


def forward(model: nn.Module, runtime: Runtime, ids: np.ndarray, valid: np.ndarray, **arguments):
    """The model's output for (B, T) ids. Without padding no mask is passed, which is faster."""
    mask = None if valid.all() else tensor(valid, runtime)
    with runtime.autocast():
        return model(input_ids=tensor(ids, runtime), attention_mask=mask, **arguments)


def evaluation_rows(most: int, tokens_per_row: int) -> int:
    """Rows of a forward pass of an evaluation: `most` for short rows, fewer for long ones, at least one.

    So the memory of an evaluation does not grow with the context. The rows of a pass do not change any result except
    by rounding.
    """
    return max(1, min(most, EVALUATION_TOKENS // max(tokens_per_row, 1)))


def chunks(count: int, size: int) -> Iterator[np.ndarray]:
    """Consecutive index arrays of at most `size`, from 0 to `count`."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def some_of(seed: int, label: str, what: str, count: int, limit: int) -> np.ndarray:
    """Sorted indices of all or, if there are more than `limit`, of a random sample of that size. A line says so.

    Args:
        label: of the model.
        what: the things that a report reads, such as `held-out windows`.
    """
    if count <= limit:
        return np.arange(count)
    say(f"{label}: the report reads a random sample of {limit:,} of {count:,} {what}")
    return randomness.sample(seed, f"reported {what}", count, limit)


def with_cls(ids: np.ndarray, valid: np.ndarray, cls_id: int) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] in front of every row: (..., T) -> (..., T + 1), for ids and validity."""
    front = np.full_like(ids[..., :1], cls_id)
    return np.concatenate([front, ids], -1), np.concatenate([np.ones_like(valid[..., :1]), valid], -1)
