"""The tables of a run's earlier stages, as stages 04 to 06 read them: by split, and joined by their keys."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib import schema
from lib.artifacts import Stage
from lib.config import WITH_PROMPTS, Config
from lib.errors import BadConfig, BadData, MissingInput
from lib.log import say
from lib.runtime import Runtime
from lib.shards import cut_of
from lib.shards import open_store as open_shards
from lib.token_store import TokenStore, of_table, open_store
from lib.tokenization import load_tokenizer
from lib.training.data import Splits, select_rows, select_split
from lib.training.lengths import WHOLE_READERS, WholeTexts, contexts_of
from lib.training.pool_table import PoolTable
from lib.training.reward_join import with_rewards
from lib.training.streaming_dataset import StreamingDataset
from lib.units import Unit

SELECTION = "selection"  # the split that chooses the best step of every model, and nothing else
EXAMPLE_COLUMNS = ["example_id", "prompt", "split", "group", "tags"]
TOKEN_COLUMNS = [  # of candidates, for models that read tokens and no texts
    "example_id",
    "candidate_id",
    "split",
    "changed_fraction",
    "token_confidence",
    "token_ids",
    "token_labels",
]


@dataclass
class StageInputs:
    """What models learn from. Tables are read when they are first needed.

    Attributes:
        read_examples: split -> table of schema.EXAMPLES, with the `EXAMPLE_COLUMNS` at least.
        read_candidates: split -> candidates joined with their rewards and with the group of their example; with the
            `TOKEN_COLUMNS` at least, and all columns if examples have prompts.
        read_baselines: table of schema.BASELINES; None if stage 02 wrote none.
        pool_size: candidates per pool as stage 02 made them; None if it is not known.
        open_stream: name of a model -> its training rows from shards; None if it learns from the table.
        tables: (kind, split) -> a table that was read. Models that are trained in one process share it.
        open_text: split -> its token store; None: the tokens of the examples are held in memory, for small data.
    """

    config: Config
    tokenizer: Any
    runtime: Runtime
    read_examples: Callable[[str], pa.Table]
    read_candidates: Callable[[str], pa.Table]
    read_baselines: Callable[[], pa.Table | None] = lambda: None
    pool_size: int | None = None
    open_stream: Callable[[str], StreamingDataset | None] = lambda name: None
    open_text: Callable[[str], TokenStore] | None = None
    tables: dict[tuple[str, str], pa.Table] = field(default_factory=dict)

    def examples(self, split: str) -> pa.Table:
        return self._get("examples", split, self.read_examples)

    def candidates(self, split: str) -> pa.Table:
        return self._get("candidates", split, self.read_candidates)

    def text(self, split: str) -> TokenStore:
        """The tokens of a split, for language models. Raises BadData if it has none."""
        return of_table(self.examples(split)) if self.open_text is None else self.open_text(split)

    def text_splits(self, train: str) -> Splits[TokenStore]:
        """The tokens of the split `train`, of the selection split and of the held-out split."""
        return Splits(self.text(train), self.text(SELECTION), self.text("held_out"))

    def candidate_splits(self, train: str) -> Splits[pa.Table]:
        """The candidates of the split `train`, of the selection split and of the held-out split."""
        return Splits(self.candidates(train), self.candidates(SELECTION), self.candidates("held_out"))

    @cached_property
    def have_prompts(self) -> bool:
        """Whether examples have prompts, which rankers read as texts."""
        if self.config.candidates.source in WITH_PROMPTS:
            return True
        lengths = pc.binary_length(self.examples("held_out")["prompt"])
        return bool(pc.any(pc.greater(lengths, 0)).as_py())

    def pools(self, split: str) -> PoolTable:
        """The candidates of a split as pools; the first draw of them, if there are several.

        Raises BadData if no pool has candidates of different reward, BadConfig if stage 02 made pools of another size.
        """
        return self.draws(split)[0]

    def draws(self, split: str, with_equal: bool = False) -> list[PoolTable]:
        """All draws of pools of a split, for training: the same examples with other wrong candidates in each draw.

        `with_equal`: with pools whose rewards are equal, where the candidates are of the user's own.
        """
        size = self.config.candidates.per_example
        if self.config.candidates.source == "file":  # pools of any size
            tables = self.candidates(split), self.examples(split), self.read_baselines()
            return [PoolTable.of(*tables, with_equal=with_equal, relevant=self.config.pools.relevant)]
        if self.pool_size not in (None, size):
            raise BadConfig(
                f"candidates.per_example is {size}, but stage 02 made pools of {self.pool_size}; set it to "
                f"{self.pool_size}, or run 02_generate_candidates.py --overwrite and the stages after it"
            )
        table = PoolTable.of(self.candidates(split), self.examples(split), self.read_baselines())
        return table.draws(size)

    def pools_for_selection(self) -> PoolTable:
        """The pools of the split `selection`. No other split may choose anything.

        Raises BadData if the split is missing, or if none of its pools has candidates of different reward.
        """
        with explained(SELECTION):
            return self.pools(SELECTION)

    def _get(self, kind: str, split: str, read: Callable[[str], pa.Table]) -> pa.Table:
        if (kind, split) not in self.tables:
            self.tables[kind, split] = read(split)
            if not self.tables[kind, split].num_rows:
                raise _empty(kind, split)
        return self.tables[kind, split]


def open_text(stage: Stage, split: str) -> TokenStore:
    """The token store of a split of stage 01. Raises BadData if the split has no examples, or the store is damaged."""
    if stage.has_output("01_prepare_dataset", f"tokens/{split}"):
        return open_store(stage.folder_of("01_prepare_dataset", f"tokens/{split}"))
    if split in stage.upstream_stats("01_prepare_dataset")["examples"]:
        raise MissingInput(
            f"01_prepare_dataset has no token store of split '{split}', because an earlier version of this project made "
            "it; run `python 01_prepare_dataset.py --overwrite`, and the stages after it"
        )
    raise _empty("examples", split)


def _empty(kind: str, split: str) -> BadData:
    return BadData(f"there are no {kind} in split '{split}'; {_ADVICE.get(split, 'check data.fractions')}")


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


def read_stage_inputs(
    stage: Stage, config: Config, runtime: Runtime, tables: dict[tuple[str, str], pa.Table] | None = None
) -> StageInputs:
    """The inputs of a stage that trains or measures models. A stage that does not read stage 02 has no candidates.

    `tables`: those that an earlier call for the same run has read.
    """

    def examples(split: str) -> pa.Table:
        return select_split(
            stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES, EXAMPLE_COLUMNS), split
        )

    with_candidates = stage.reads_stage("02_generate_candidates")
    metadata = stage.table_metadata("02_generate_candidates", "candidates") if with_candidates else {}

    def candidates(split: str) -> pa.Table:
        if metadata.get("tokenizer_sha256") != stage.sha256_of("01_prepare_dataset", "tokenizer"):
            raise BadData(
                "the table candidates was written with another tokenizer than this run's, so its token ids mean other "
                "text; run 02_generate_candidates.py --overwrite"
            )
        columns = None if stage_inputs.have_prompts else TOKEN_COLUMNS
        table = select_split(
            stage.batches("02_generate_candidates", "candidates", schema.CANDIDATES, columns), split
        )
        batches = stage.batches("03_build_rewards", "rewards", schema.REWARDS)
        if config.labels.path is None:
            rewards = select_rows(batches, "example_id", table["example_id"])
        else:  # whether any candidate has token labels decides for all of them
            rewards = pa.Table.from_batches(list(batches))
        columns = ["example_id", "group", "split"]
        groups = select_split(
            stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES, columns), split
        )
        return with_rewards(table, rewards, groups)

    def baselines() -> pa.Table | None:
        if not stage.has_output("02_generate_candidates", "baselines"):
            return None
        return stage.read("02_generate_candidates", "baselines", schema.BASELINES)

    tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
    size = metadata.get("per_example")
    stage_inputs = StageInputs(
        config,
        tokenizer,
        runtime,
        examples,
        candidates,
        baselines,
        None if size is None else int(size),
        open_text=lambda split: open_text(stage, split),
        tables={} if tables is None else tables,
    )
    return stage_inputs


def refuse_longer_candidates(config: Config, names: Iterable[str], stage_inputs: StageInputs) -> None:
    """Raises BadData if a model cannot read a candidate as a whole. Called before the first model is trained."""
    contexts = contexts_of(config)
    for name in names:
        spec = config.models[name]
        with_prompts = spec.mode == "ranker" and stage_inputs.have_prompts
        if spec.mode not in WHOLE_READERS or with_prompts or contexts[name] is None:
            continue
        texts = WholeTexts(name, contexts[name] or 0, config)
        for split in (spec.split, SELECTION, "held_out"):
            texts.add(stage_inputs.candidates(split))
        texts.refuse()


@contextlib.contextmanager
def streaming(stage: Unit, config: Config, stage_inputs: StageInputs) -> Iterator[None]:
    """While active, the model of a unit learns from shards if `stream.enabled` is set and its mode can.

    Waiting times go to the statistics of the unit. Raises Busy if another process trains on the shards of this run.
    """
    if not (config.models[stage.unit].learns_from_shards and config.stream.enabled):
        yield
        return
    if stage.processes.size > 1:
        raise BadConfig(
            f"stream.enabled is true, and a training from a stream runs in one process, not in {stage.processes.size}; start "
            "04_train.py without torchrun, or set stream.enabled=false"
        )
    stage.lock_alone(
        "02_stream.trainer", "the shards of 02_stream, from which one model at a time can learn,"
    )
    store, datasets = open_shards(stage, config), []
    cut = cut_of(config, stage.upstream_stats("01_prepare_dataset")["examples"]["train"])

    def open_stream(name: str) -> StreamingDataset:
        timeout = config.stream.timeout_seconds
        datasets.append(StreamingDataset(store, cut, config.seed, name, stage.folder, timeout))
        return datasets[-1]

    stage_inputs.open_stream = open_stream
    with store.alive("trainer"):
        yield
    stage.stats["stream"] = {
        dataset.label: {
            "shards_read": dataset.shards_read,
            "seconds": dataset.seconds,
            "seconds_waited": dataset.seconds_waited,
        }
        for dataset in datasets
    }
    for dataset in datasets:
        share = dataset.seconds_waited / max(dataset.seconds, 1e-9)
        say(
            f"{dataset.label}: read {dataset.shards_read} shards; waiting for them took {dataset.seconds_waited:.1f} s, "
            f"{share:.1%} of its time"
        )
