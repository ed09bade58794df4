"""What the objectives share: tensors from arrays, one forward call, result rows.

Legend: B rows, T positions, V vocabulary.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lib.metrics import Estimate
from lib.runtime import Runtime


@dataclass(frozen=True)
class ResultRow:
    """A line of the results table: one model, one metric, its interval, and what doing nothing clever gives."""

    model: str
    metric: str
    value: float
    low: float
    high: float
    baseline: str
    baseline_value: float
    lower_is_better: bool

    @property
    def beats_baseline(self) -> bool:
        """The whole interval lies on the good side of the baseline."""
        return self.high < self.baseline_value if self.lower_is_better else self.low > self.baseline_value

    def as_dict(self) -> dict:
        return asdict(self) | {"beats_baseline": self.beats_baseline}


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
    return torch.from_numpy(np.ascontiguousarray(array)).to(runtime.device, non_blocking=True)


def forward(model: nn.Module, runtime: Runtime, ids: np.ndarray, valid: np.ndarray, **arguments):
    """The model's output for (B, T) ids. Without padding no mask is passed, which is faster."""
    mask = None if valid.all() else tensor(valid, runtime)
    with runtime.autocast():
        return model(input_ids=tensor(ids, runtime), attention_mask=mask, **arguments)


def chunks(count: int, size: int):
    """Consecutive index arrays of at most `size`."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def with_cls(ids: np.ndarray, valid: np.ndarray, cls_id: int) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] before every row: (..., T) -> (..., T + 1)."""
    front = np.full_like(ids[..., :1], cls_id)
    return np.concatenate([front, ids], -1), np.concatenate([np.ones_like(valid[..., :1]), valid], -1)
