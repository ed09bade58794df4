"""Shared by the benchmarks: data from stages 00 and 01, and the training of one model by name."""

import importlib
from pathlib import Path
from typing import Any

from lib import schema
from lib.config import ROOT, Config, load_config
from lib.runs import RunArgs, load_manifest
from lib.runtime import Runtime
from lib.sections.models import ModelSpec
from lib.token_store import open_store
from lib.tokenization import load_tokenizer
from lib.training.stage_inputs import StageInputs
from lib.training.train_model import train_model

RESULTS = ROOT / "benchmarks" / "results"


def shakespeare() -> Path:
    """tinyshakespeare's input.txt: $REMASK_DATA/tinyshakespeare, or ../shared/data beside the project."""
    import os

    roots = [Path(os.environ["REMASK_DATA"])] if "REMASK_DATA" in os.environ else []
    for root in [*roots, ROOT.parent / "shared" / "data"]:
        if (root / "tinyshakespeare" / "input.txt").exists():
            return root / "tinyshakespeare" / "input.txt"
    raise SystemExit(
        "tinyshakespeare/input.txt was not found; set REMASK_DATA to the folder that holds tinyshakespeare/"
    )


def prepare(name: str, configs: list[str], overrides: list[str]) -> tuple[Config, StageInputs, Path]:
    """Run stages 00 and 01 in benchmarks/results/<name>. Returns the config, the inputs of training and the folder."""
    import pyarrow.parquet as pq

    config = load_config(configs, overrides=overrides)
    folder = RESULTS / name
    for script in ("00_check_data", "01_prepare_dataset"):
        importlib.import_module(script).main(
            config, RunArgs(run_dir=folder, overwrite=not _matches(folder, script, config))
        )
    table = pq.read_table(folder / "01_prepare_dataset" / "examples.parquet", schema=schema.EXAMPLES.arrow)
    tokenizer = load_tokenizer(folder / "01_prepare_dataset" / "tokenizer")

    def examples(split: str):
        import pyarrow.compute as pc

        return table.filter(pc.equal(table["split"], split))

    def text(split: str):
        return open_store(folder / "01_prepare_dataset" / "tokens" / split)

    stage_inputs = StageInputs(config, tokenizer, Runtime.detect(config), examples, examples, open_text=text)
    return config, stage_inputs, folder


def _matches(folder: Path, script: str, config: Config) -> bool:
    """Whether a stage in the folder was made with the same settings."""
    manifest = load_manifest(folder / script)
    return manifest is not None and manifest["config"] == config.slice(manifest["config"])


def train_one(name: str, spec: ModelSpec, stage_inputs: StageInputs, folder: Path) -> dict[str, Any]:
    """Train a model from scratch in an empty folder; returns its training manifest."""
    import shutil

    shutil.rmtree(folder / name, ignore_errors=True)
    return train_model(name, spec, stage_inputs, folder / name, start=None)
