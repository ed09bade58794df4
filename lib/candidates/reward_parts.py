"""The parts of stage 03's table of rewards: each part has the rewards of one part of the candidates."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import schema
from lib.candidates.rewards import reward_table
from lib.config import Config
from lib.label_files import read_labels
from lib.labels import LabelledExamples
from lib.stage.parts import Parts
from lib.stage.table_files import TableFiles
from lib.tasks import get_task

BINS = 20


@dataclass(frozen=True)
class RewardWork:
    """Makes the parts of the table of rewards.

    Attributes:
        tokenizer: its folder; used for the user's labels only.
    """

    config: Config
    parts: Parts
    candidates: TableFiles
    tokenizer: Path

    uses_device = False
    only_here = False

    def open(self, threads: int | None):
        """Read the user's labels, if there are some. Returns a function that makes the part of a number."""
        labels = user_labels(self.config, self.candidates, self.tokenizer)
        return lambda number: self._make(number, labels)

    def _make(self, number: int, labels: LabelledExamples | None) -> None:
        """Compute the rewards pool by pool: stage 02 writes the candidates of one example together."""
        statistics, task = RewardStatistics(), get_task(self.config.task)
        if labels is not None:
            labels.counts.clear()
        with self.parts.writing(number) as part:
            for batch in whole_pools(self.candidates.part(number).tables(schema.CANDIDATES)):
                if labels is not None:
                    reward, terms, classes = labels.rewards(batch.to_pylist())
                else:
                    (reward, terms), classes = task.rewards(self.config, batch), None
                table = reward_table(batch, np.asarray(reward, np.float64), terms)
                if classes is not None:
                    table = table.append_column("token_labels", pa.array(classes, pa.list_(pa.int8())))
                part.write("rewards", table)
                statistics.add(table, terms)
            part.counters = {"rewards": statistics.state()}
            if labels is not None:
                part.counters["classes"] = {str(k): n for k, n in labels.counts.items()}


def user_labels(config: Config, candidates: TableFiles, tokenizer: Path) -> LabelledExamples | None:
    """The user's labels of the run's examples; None without labels.path.

    Raises BadData for invalid labels and for examples without a label.
    """
    from lib.tokenization import load_tokenizer

    if config.labels.path is None:
        return None
    labels = read_labels(config.labels.path)
    labels.refuse_faults()
    batches = list(candidates.tables(schema.CANDIDATES, ["example_id", "split"]))
    table = pa.concat_tables(batches) if batches else schema.CANDIDATES.arrow.empty_table()
    ids, splits = table["example_id"].to_pylist(), table["split"].to_pylist()
    return LabelledExamples(labels, ids, splits, load_tokenizer(tokenizer))


def whole_pools(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in other batches: all candidates of one example are in the same batch."""
    rest = None
    for batch in batches:
        batch = pa.concat_tables([rest, batch]) if rest is not None else batch
        last = pc.equal(batch["example_id"], batch["example_id"][-1]).to_numpy(zero_copy_only=False)
        cut = int(last.argmax())
        rest = batch.slice(cut)
        if cut:
            yield batch.slice(0, cut)
    if rest is not None and rest.num_rows:
        yield rest


class RewardStatistics:
    """Mean, standard deviation and histogram of rewards, table by table and part by part."""

    def __init__(self) -> None:
        self.count = self.best = self.tied = 0
        self.mean = self.squares = 0.0  # squares: sum of the squared differences from the mean
        self.histogram = np.zeros(BINS, np.int64)
        self.terms: dict[str, tuple[float, int]] = {}  # term -> sum and number of its known values

    def add(self, table: pa.Table, terms: dict[str, np.ndarray]) -> None:
        """Count a table of schema.REWARDS; `terms` as the task gave them."""
        reward = table["reward"].to_numpy()
        self.merge({
            "count": len(reward),
            "best": pc.sum(table["best"]).as_py() or 0,
            "tied": pc.sum(table["tied"]).as_py() or 0,
            "mean": float(reward.mean()),
            "squares": float(np.square(reward - reward.mean()).sum()),
            "histogram": np.histogram(reward, bins=BINS, range=(0, 1))[0].tolist(),
            "terms": {name: [float(np.nansum(v)), int((~np.isnan(v)).sum())] for name, v in terms.items()},
        })  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What `merge` takes, as JSON can hold it."""
        return vars(self) | {"histogram": self.histogram.tolist()}

    def merge(self, other: dict[str, Any]) -> None:
        """Add the statistics of other rewards (Chan, Golub and LeVeque, 1983)."""
        total = self.count + other["count"]
        if not other["count"]:
            return
        shift = other["mean"] - self.mean
        self.squares += other["squares"] + shift * shift * self.count * other["count"] / total
        self.mean += shift * other["count"] / total
        self.count, self.best, self.tied = total, self.best + other["best"], self.tied + other["tied"]
        self.histogram = self.histogram + np.asarray(other["histogram"])
        for name, (value, count) in other["terms"].items():
            sum_of, number = self.terms.get(name, (0.0, 0))
            self.terms[name] = (sum_of + value, number + count)

    def summary(self) -> dict[str, Any]:
        """Figures for the manifest."""
        return {
            "rewards": self.count,
            "mean": self.mean,
            "standard_deviation": (self.squares / self.count) ** 0.5 if self.count else 0.0,
            "best": self.best,
            "tied": self.tied,
            "histogram": self.histogram,
            "terms": {name: value / count for name, (value, count) in self.terms.items() if count},
        }


def merged_statistics(parts: Iterable[dict[str, Any]]) -> tuple[RewardStatistics, Counter[int]]:
    """The statistics of all parts together, and the number of tokens of each class of the user's labels."""
    statistics, classes = RewardStatistics(), Counter()
    for part in parts:
        statistics.merge(part["rewards"])
        classes.update({int(name): count for name, count in part.get("classes", {}).items()})
    return statistics, classes
