"""The tables of a run's earlier stages, as stages 04 to 06 want them: by split, and joined by their keys."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadConfig, BadData
from lib.runtime import Runtime
from lib.tokenization import load_tokenizer
from lib.training.data import select_split
from lib.training.pool_table import PoolTable
from lib.training.reward_join import with_rewards
from lib.training.streaming_dataset import StreamingDataset

SELECTION = "selection"  # the split that chooses the best step of every model, and nothing else


@dataclass
class StageInputs:
    """What models learn from, read when first asked for.

    Attributes:
        read_examples: split -> table of schema.EXAMPLES.
        read_candidates: split -> candidates joined with their rewards and their example's group.
        read_baselines: table of schema.BASELINES, None where stage 02 wrote none.
        pool_size: candidates of a pool as stage 02 made them, if that is known.
        fresh_rows: name of a model -> its training rows out of shards, None where it learns from the table.
    """

    config: Config
    tokenizer: Any
    runtime: Runtime
    read_examples: Callable[[str], pa.Table]
    read_candidates: Callable[[str], pa.Table]
    read_baselines: Callable[[], pa.Table | None] = lambda: None
    pool_size: int | None = None
    fresh_rows: Callable[[str], StreamingDataset | None] = lambda name: None
    _kept: dict[tuple[str, str], pa.Table] = field(default_factory=dict)

    def examples(self, split: str) -> pa.Table:
        return self._get("examples", split, self.read_examples)

    def candidates(self, split: str) -> pa.Table:
        return self._get("candidates", split, self.read_candidates)

    @cached_property
    def have_prompts(self) -> bool:
        """Whether there is something to read before the candidates."""
        return any(self.examples("held_out")["prompt"].to_pylist())

    def pools(self, split: str) -> PoolTable:
        """The candidates of a split as pools, where there are several the first ones.

        Raises BadData when there are none to choose between, BadConfig when stage 02 made them of another size.
        """
        return self.draws(split)[0]

    def draws(self, split: str) -> list[PoolTable]:
        """All pools of a split, for training: the same examples with other wrong candidates in each."""
        size = self.config.candidates.per_example
        if self.pool_size not in (None, size):
            raise BadConfig(
                f"candidates.per_example is {size}, but stage 02 made pools of {self.pool_size}; set it to "
                f"{self.pool_size}, or run 02_generate_candidates.py --overwrite and the stages after it"
            )
        table = PoolTable.of(self.candidates(split), self.examples(split), self.read_baselines())
        return table.draws(size)

    def pools_for_selection(self) -> PoolTable:
        """Those of the split `selection`, and of no other: nothing is chosen on what is reported.

        Raises BadData when the split is missing, or when none of its pools has candidates to choose between.
        """
        with explained(SELECTION):
            return self.pools(SELECTION)

    def _get(self, kind: str, split: str, read: Callable[[str], pa.Table]) -> pa.Table:
        if (kind, split) not in self._kept:
            self._kept[kind, split] = read(split)
            if not self._kept[kind, split].num_rows:
                raise BadData(
                    f"there are no {kind} in split '{split}'; {_ADVICE.get(split, 'check data.fractions')}"
                )
        return self._kept[kind, split]


_ADVICE = {
    SELECTION: (
        "it chooses the best step of every model: set a larger data.selection_fraction (task finqa: "
        "finqa.selection_share) or give more data, then run 01_prepare_dataset.py --overwrite and the stages after it"
    )
}


@contextlib.contextmanager
def explained(split: str) -> Iterator[None]:
    """Adds to a BadData which split it is about and, for the selection split, what to do."""
    try:
        yield
    except BadData as error:
        advice = _ADVICE.get(split, "")
        if advice and advice in str(error):
            raise
        raise BadData(f"split '{split}': {error}" + (f"; {advice}" if advice else "")) from None


def read_stage_inputs(stage: Stage, config: Config, runtime: Runtime) -> StageInputs:
    """Readers of the stages before, for models to learn from and to be measured on."""

    def examples(split: str) -> pa.Table:
        return select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), split)

    metadata = stage.table_metadata("02_generate_candidates", "candidates")

    def candidates(split: str) -> pa.Table:
        if metadata.get("tokenizer_sha256") != stage.sha256_of("01_prepare_dataset", "tokenizer"):
            raise BadData(
                "candidates.parquet was written with another tokenizer than this run's: its token ids mean other "
                "characters; run 02_generate_candidates.py --overwrite again"
            )
        table = select_split(stage.batches("02_generate_candidates", "candidates", schema.CANDIDATES), split)
        rewards = stage.read("03_build_rewards", "rewards", schema.REWARDS)
        columns = ["example_id", "group"]
        groups = stage.read("01_prepare_dataset", "examples", schema.EXAMPLES, columns)
        return with_rewards(table, rewards, groups)

    def baselines() -> pa.Table | None:
        if not stage.has_output("02_generate_candidates", "baselines"):
            return None
        return stage.read("02_generate_candidates", "baselines", schema.BASELINES)

    tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
    size = metadata.get("per_example")
    return StageInputs(
        config, tokenizer, runtime, examples, candidates, baselines, None if size is None else int(size)
    )
