"""What the benchmarks share: data through the project's own stages 00 and 01, and one training run by name."""

import importlib
from pathlib import Path
from typing import Any

from lib import schema
from lib.config import ROOT, Config, load_config
from lib.runs import RunArgs, load_manifest
from lib.runtime import Runtime
from lib.sections.models import ModelSpec
from lib.tokenization import load_tokenizer
from lib.training.named import train_named
from lib.training.tables import Materials

RESULTS = ROOT / "benchmarks" / "results"


def shakespeare() -> Path:
    """tinyshakespeare's input.txt: $REMASK_DATA/tinyshakespeare, or ../shared/data beside the project."""
    import os

    roots = [Path(os.environ["REMASK_DATA"])] if "REMASK_DATA" in os.environ else []
    for root in [*roots, ROOT.parent / "shared" / "data"]:
        if (root / "tinyshakespeare" / "input.txt").exists():
            return root / "tinyshakespeare" / "input.txt"
    raise SystemExit(
        "tinyshakespeare/input.txt is not there; set REMASK_DATA to the folder that holds tinyshakespeare/"
    )


def prepare(name: str, configs: list[str], overrides: list[str]) -> tuple[Config, Materials, Path]:
    """Stages 00 and 01 in benchmarks/results/<name>; returns the config, its materials and the folder."""
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

    return config, Materials(config, tokenizer, Runtime.detect(config), examples, examples), folder


def _matches(folder: Path, script: str, config: Config) -> bool:
    manifest = load_manifest(folder / script)
    return manifest is not None and manifest["config"] == config.slice(manifest["config"])


def train_one(name: str, spec: ModelSpec, materials: Materials, folder: Path) -> dict[str, Any]:
    """Train from scratch in an empty folder."""
    import shutil

    shutil.rmtree(folder / name, ignore_errors=True)
    return train_named(name, spec, materials, folder / name, start=None)
