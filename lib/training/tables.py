"""The tables of a run's earlier stages, as stages 04 to 06 want them: by split, and joined by their keys."""

import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadData
from lib.runtime import Runtime
from lib.tokenization import load_tokenizer
from lib.training.data import select_split
from lib.training.joins import with_rewards
from lib.training.named import Materials


def materials_of(stage: Stage, config: Config, runtime: Runtime) -> Materials:
    """Readers of the stages before, for models to learn from and to be measured on."""

    def examples(split: str) -> pa.Table:
        return select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), split)

    def candidates(split: str) -> pa.Table:
        written = stage.table_metadata("02_generate_candidates", "candidates").get("tokenizer_sha256")
        if written != stage.sha256_of("01_prepare_dataset", "tokenizer"):
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
    return Materials(config, tokenizer, runtime, examples, candidates, baselines)
