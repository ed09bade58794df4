"""Which pools, rows and steps are used: the first draw, the selection split, the order of a shard, the lowest value."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.config import load_config
from lib.shards import Cut
from lib.training.stage_inputs import StageInputs
from lib.training.streaming_dataset import StreamingDataset
from tests.trainings import CPU, MeanOfRows, settings, train_tiny

K = 4


def candidates(split: str) -> pa.Table:
    """Two examples; those of train have two pools each, with the best candidate at different positions."""
    draws = 2 if split == "train" else 1
    rows = [
        {"example_id": f"{split}{n}", "candidate_id": i, "text": f"{split} {n} {i}", "kind": "x", "value": str(i),
         "control": None, "reward": float(i % K == (i // K + n) % K), "term_a": 0.0, "group": f"{split}{n}"}
        for n in range(2) for i in range(K * draws)
    ]  # fmt: skip
    fields = [pa.field("control", pa.string())]
    table = pa.Table.from_pylist(rows)
    return table.set_column(table.column_names.index("control"), fields[0], pa.nulls(len(rows), pa.string()))


def examples(split: str) -> pa.Table:
    rows = [
        {"example_id": f"{split}{n}", "prompt": "?", "tags": [], "group": f"{split}{n}"} for n in range(2)
    ]
    return pa.Table.from_pylist(rows)


def stage_inputs() -> StageInputs:
    config = load_config(quick_test=True, overrides=[f"candidates.per_example={K}"])
    return StageInputs(config, None, CPU, examples, candidates)


def test_all_draws_teach_and_the_first_is_a_split_s_pool():
    draws = stage_inputs().draws("train")
    assert [table.texts[0, 0] for table in draws] == ["train 0 0", "train 0 4"]
    assert stage_inputs().pools("train").texts.tolist() == draws[0].texts.tolist()


def test_the_best_step_is_chosen_on_the_split_that_is_there_for_it():
    assert stage_inputs().pools_for_selection().example_ids == ["selection0", "selection1"]


class Store:
    """A shard of 50 rows that always exists."""

    folder = SimpleNamespace(parent="run")

    def move_cursor(self, first: int, last: int) -> None: ...

    def read(self, number: int):
        rows = pa.table({"row": [number * 50 + i for i in range(50)]})
        return rows, {"files": {"candidates.parquet": str(number)}}


def test_rows_of_a_shard_come_in_an_order_of_the_training_s_own(tmp_path):
    def order(label: str, seed: int = 0) -> list[int]:
        store: Any = Store()
        fresh = StreamingDataset(store, Cut(20, 10, 5), seed, label, tmp_path / label, 1.0)
        return [
            r for start in range(0, 100, 10) for r in fresh.rows(range(start, start + 10))["row"].to_pylist()
        ]

    judge = order("judge")
    assert sorted(judge[:50]) == list(range(50)) and sorted(judge[50:]) == list(range(50, 100))
    assert judge[:50] != list(range(50)) and [r - 50 for r in judge[50:]] != judge[:50]
    assert order("judge") == judge
    assert order("inspector")[:50] != judge[:50] != order("judge", 1)[:50]


class Scripted(MeanOfRows):
    """An objective whose evaluations are given; the model counts its updates."""

    selection, tokens_per_row = "regret", 1

    def __init__(self, values: list[float]):
        self.values = iter(values)

    def loss(self, model, step, rows) -> dict[str, torch.Tensor]:
        return {"loss": model.weight.sum()}

    def evaluate(self, model) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"regret": next(self.values), "accuracy": 1.0}


@pytest.mark.parametrize(
    ("values", "best"),
    [([3.0, 1.0, 2.0], 2), ([1.0, 2.0, 3.0], 1), ([3.0, 2.0, 1.0], 3), ([1.0, 1.0, 1.0], 1)],
)
def test_the_best_step_is_that_of_the_least_value_and_the_first_of_equal_ones(
    tmp_path, monkeypatch, values, best
):
    saved: list[tuple[str, float]] = []
    monkeypatch.setattr(
        "tests.trainings.save_model",
        lambda model, path, _: saved.append((path.name, model.weight.sum().item())),
    )
    model: Any = torch.nn.Linear(2, 1)
    model.config = SimpleNamespace(model_type="none")
    result = train_tiny(model, Scripted(values), settings(steps=3, evaluate_every=1, ema_decay=0.0), tmp_path)
    assert result.best_step == best and result.metrics["regret"] == min(values)
    kept = [weight for name, weight in saved if "best_model" in name]
    assert len(kept) == sum(v < min(values[:i], default=np.inf) for i, v in enumerate(values))
