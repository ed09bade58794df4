"""The masked LMs that generate synthetic text in stage 02: given by the user, or trained on the run's train split."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from lib import schema
from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadConfig
from lib.sections.models import ModelSpec
from lib.shards import generator_names
from lib.tasks import cross_fit_fold
from lib.training.data import select_split
from lib.training.stage_inputs import SELECTION, StageInputs
from lib.training.train_model import train_model


def masked_language_models(stage: Stage, config: Config, runtime, tokenizer) -> list[Path]:
    """Folders of the masked LMs that generate synthetic text. They are trained here if generator.checkpoint is null."""
    rewrites = config.finqa.pools.corruption_rate * config.finqa.pools.changes.masked_lm > 0
    if config.candidates.source != "masked_lm" and not (config.candidates.source == "programs" and rewrites):
        return []
    if config.generator.checkpoint:
        if config.candidates.cross_fit_folds > 1:
            raise BadConfig(
                "candidates.cross_fit_folds > 1 trains one generator per fold; set generator.checkpoint to null"
            )
        return [Path(config.generator.checkpoint)]
    return train_generators(stage, config, runtime, tokenizer)


def generator_folders(stage: Stage, config: Config) -> list[Path]:
    """Folders of the masked LMs that generated the candidates of stage 02."""
    if config.candidates.source != "masked_lm":
        return []
    if config.generator.checkpoint:
        return [Path(config.generator.checkpoint)]
    return [stage.folder_of("02_generate_candidates", name) for name in generator_names(config)]


def train_generators(stage: Stage, config: Config, runtime, tokenizer) -> list[Path]:
    """Train one generator on the train split or, when cross-fitting, one per fold on all other folds."""
    spec = ModelSpec(
        mode="language_model", architecture=config.generator.architecture, training=config.generator.training
    )
    folds = config.candidates.cross_fit_folds
    table = {
        split: select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), split)
        for split in ("train", SELECTION, "held_out")
    }
    fold_of = [cross_fit_fold(config.seed, g, folds) for g in table["train"]["group"].to_pylist()]
    folders = []
    for fold, name in enumerate(generator_names(config)):
        kept = without_fold(table["train"], [folds > 1 and f == fold for f in fold_of])
        examples = table | {"train": kept}
        stage_inputs = StageInputs(
            config, tokenizer, runtime, examples.__getitem__, lambda split: table[split].slice(0, 0)
        )
        record = train_model(name, spec, stage_inputs, stage.folder / name, start=None)
        folder = stage.folder / name / "best_model"
        stage.add_folder(name, folder)
        stage.add_file(f"{name}_metrics", stage.folder / name / "metrics.jsonl")
        stage.stats[name] = {
            "parameters": record["parameters"],
            "best_step": record["best_step"],
            **record["held_out"],
        }
        folders.append(folder)
    return folders


def without_fold(table, left_out: list[bool]):
    """The rows that are not left out. A row whose predecessor is removed no longer continues it."""
    keep = ~np.asarray(left_out)
    continues = table["continues"].to_numpy(zero_copy_only=False) & np.append(False, keep[:-1])
    index = table.column_names.index("continues")
    return table.set_column(index, table.schema.field(index), pa.array(continues)).filter(pa.array(keep))
