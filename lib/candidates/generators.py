"""The masked LMs that generate synthetic text in stage 02: given by the user, or trained on the run's train split."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadConfig
from lib.log import say
from lib.sections.models import ModelSpec
from lib.shards import generator_names
from lib.tasks import cross_fit_fold
from lib.token_store import TokenStore
from lib.training.stage_inputs import SELECTION, StageInputs, open_text
from lib.training.train_model import train_model


def masked_language_models(stage: Stage, config: Config, runtime, tokenizer) -> list[Path]:
    """Folders of the masked LMs that generate synthetic text. They are trained here if generator.checkpoint is null."""
    rewrites = config.finqa.pools.corruption_rate * config.finqa.pools.changes.masked_lm > 0
    if config.candidates.source != "masked_lm" and not (config.candidates.source == "programs" and rewrites):
        if config.generator.checkpoint:
            say(
                f"generator.checkpoint has no effect: candidates.source {config.candidates.source} loads no generator"
            )
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
    texts = {split: open_text(stage, split) for split in ("train", SELECTION, "held_out")}
    folders = []
    for fold, name in enumerate(generator_names(config)):
        kept = texts["train"] if folds == 1 else without_fold(texts["train"], config.seed, fold, folds)
        stage_inputs = StageInputs(
            config, tokenizer, runtime, _no_table, _no_table, open_text=(texts | {"train": kept}).__getitem__
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


def without_fold(text: TokenStore, seed: int, fold: int, folds: int) -> TokenStore:
    """The text without the groups of a fold. A document is cut where a group is left out."""
    in_fold = (cross_fit_fold(seed, group, folds) == fold for group in text.group_names())
    return text.without(np.fromiter(in_fold, bool))


def _no_table(split: str) -> pa.Table:
    raise AssertionError(f"a generator reads no table, but asked for split '{split}'")
