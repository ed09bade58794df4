"""The producer of the stream: it makes the next shard that stage 04 needs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lib import durable, schema
from lib.candidates.rewards import reward_table
from lib.config import Config
from lib.runs import load_manifest
from lib.runtime import Runtime
from lib.shards import ShardStore, cut_of
from lib.stage.table_files import TableFiles
from lib.synthetic import load_engines
from lib.tasks import CandidateContext, get_task
from lib.tokenization import load_tokenizer
from lib.training.data import Rows, select_split
from lib.training.model_plans import STAGE, unit_of


def at_epoch(config: Config, epoch: int) -> Config:
    """The config with the mask ratios of an epoch: from `stream.initial_mask_ratio` they rise to candidates.mask_ratio."""
    first, last = config.stream.initial_mask_ratio, config.candidates.mask_ratio
    if first is None:
        return config
    share = min(1.0, epoch / config.stream.ramp_epochs)
    ratios = tuple(a + (b - a) * share for a, b in zip(first, last, strict=True))
    return config.model_copy(
        update={"candidates": config.candidates.model_copy(update={"mask_ratio": ratios})}
    )


class Producer:
    """Makes the shards that the trainer will want next.

    Args:
        examples: the training examples, a table of schema.EXAMPLES.
        context_of: (config of an epoch, draw) -> the context in which the task makes candidates.
    """

    def __init__(
        self, store: ShardStore, config: Config, examples: pa.Table, context_of: Callable[[Config, int], CandidateContext]
    ):  # fmt: skip
        self.store, self.config, self.examples, self.context_of = store, config, examples, context_of
        self.task = get_task(config.task)
        self.cut = cut_of(config, examples.num_rows)
        self._order = Rows(config.seed, "stream order", examples.num_rows)

    def step(self) -> int | None:
        """Make the next wanted shard and return its number; None if all wanted shards exist."""
        missing = next(iter(self.store.missing()), None)
        if missing is not None:
            self.make(missing)
        return missing

    def make(self, number: int) -> None:
        """Write shard `number`."""
        epoch, positions = self.cut.of_shard(number)
        order = self._order.samples(epoch * self.cut.examples + positions)
        examples = self.examples.take(pa.array(order))
        draw = epoch + 1  # draw 0 is the table of stage 02
        candidates = self.task.candidates(examples, self.context_of(at_epoch(self.config, epoch), draw))
        reward, terms = self.task.rewards(self.config, candidates)
        reward = np.asarray(reward, np.float64)
        facts = {"epoch": epoch, "examples": len(positions), "mean_reward": float(reward.mean())}
        self.store.write(number, candidates, reward_table(candidates, reward, terms), facts)


@dataclass(frozen=True)
class ShardWork:
    """Makes shards in the workers of an executor.

    Attributes:
        examples: of all splits.
        tokenizer, generators: folders that each worker loads.
    """

    config: Config
    store: ShardStore
    examples: TableFiles
    tokenizer: Path
    generators: list[Path]

    only_here = False

    @property
    def uses_device(self) -> bool:
        return bool(self.generators)

    def open(self, threads: int | None) -> Callable[[int], None]:
        """Load the train examples and the masked LMs. Returns a function that makes the shard of a number."""
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        runtime, tokenizer = Runtime.detect(self.config), load_tokenizer(self.tokenizer)
        engines = load_engines(self.generators, self.config.candidates, runtime, tokenizer)
        examples = select_split(self.examples.batches(schema.EXAMPLES), "train")
        return Producer(
            self.store,
            self.config,
            examples,
            lambda at, draw: CandidateContext(at, tokenizer, engines, draw=draw),
        ).make


def has_streamed(run_dir: Path, config: Config) -> bool:
    """Whether all models that learn from shards are trained. False while --overwrite makes one of them again."""
    names = [name for name, spec in config.models.items() if spec.learns_from_shards]
    return not durable.beside(run_dir / STAGE, durable.NEW).exists() and all(
        _has_streamed(run_dir / unit_of(name)) for name in names
    )


def _has_streamed(folder: Path) -> bool:
    manifest = load_manifest(folder) if not durable.beside(folder, durable.NEW).exists() else None
    return manifest is not None and manifest["config"].get("stream", {}).get("enabled", False)
