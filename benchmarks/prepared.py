"""Shared by the benchmarks: stages 00, 01 and 04 in a folder of benchmarks/results/, and tinyshakespeare."""

import contextlib
import importlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lib.artifacts import Stage
from lib.config import ROOT, Config, load_config
from lib.errors import BadConfig
from lib.runs import RunArgs
from lib.runtime import Runtime
from lib.training.loop import Result, train
from lib.training.objectives.base import TrainingContext
from lib.training.stage_inputs import StageInputs, read_stage_inputs
from lib.training.train_model import RECORD

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


def prepare(name: str, configs: list[str], overrides: list[str]) -> tuple[Config, Path]:
    """Run stages 00 and 01 in benchmarks/results/<name>. Returns the config and the folder."""
    config, folder = load_config(configs, overrides=overrides), RESULTS / name
    for script in ("00_check_data", "01_prepare_dataset"):
        run_stage(script, config, RunArgs(run_dir=folder))
    return config, folder


def train_one(model: str, config: Config, folder: Path, *, again: bool = False) -> dict[str, Any]:
    """Run `04_train.py --only MODEL` in a folder of `prepare`. Returns the model's training manifest.

    `again`: train it also when it is complete.
    """
    run_stage("04_train", config, RunArgs(run_dir=folder, only=(model,), overwrite=again))
    return json.loads((folder / "04_train" / model / RECORD).read_text(encoding="utf-8"))


def run_stage(script: str, config: Config, args: RunArgs) -> None:
    """Run a stage; make it again if the folder holds what other settings made."""
    main = importlib.import_module(script).main
    try:
        main(config, args)
    except BadConfig:
        main(config, replace(args, overwrite=True))


def train_in_memory(model: Any, objective: Any, context: TrainingContext) -> Result:
    """Train a model that stage 04 cannot train. It has the evaluated weights afterwards: the EMA, where the recipe has one."""
    kept: dict[str, Tensor] = {}

    def keep(trained: nn.Module, folder: Path) -> None:
        kept.update({name: value.clone() for name, value in trained.state_dict().items()})
        (folder / "none").touch()

    with tempfile.TemporaryDirectory() as folder:
        result = train(model, objective, context, Path(folder), save=keep)
    model.load_state_dict(kept)
    return result


@contextlib.contextmanager
def stage_inputs_of(config: Config, folder: Path) -> Iterator[StageInputs]:
    """What a language model learns from, in a folder of `prepare`, for models that stage 04 cannot train."""
    args, reads = RunArgs(run_dir=folder), ("01_prepare_dataset",)
    with Stage("04_benchmark.py", config, args, uses=("seed",), reads=reads, restarts=True) as stage:
        yield read_stage_inputs(stage, config, Runtime.detect(config, stage.code))
        stage.leave_incomplete("the models of the benchmark are measured")
