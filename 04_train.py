"""
04: train the models of the config: generator, reference models, inspector, judge, ranker.

Each model has a mode, an attention type, a split to learn from and a start: random weights or another model. It is a unit
of its own, with a manifest: the stage skips a model that is complete, and continues an interrupted one from its last
checkpoint. A model is trained after the model that it starts from. Language models need stage 01 alone. With
stream.enabled the inspector and the judge learn from new candidates that `02_generate_candidates.py --stream` makes.

reads   01_prepare_dataset: examples, tokenizer; inspector, judge and ranker also 02_generate_candidates: candidates,
        generator; 03_build_rewards
writes  <name>/best_model, <name>/final_model, <name>/metrics.jsonl, <name>/training_manifest.json; with stream.enabled
        also <name>/shards.json, the shards that the model learned from

python 04_train.py --quick_test --run_dir outputs/demo
python 04_train.py --quick_test --run_dir outputs/demo --mode sequence_scorer
python 04_train.py --quick_test --run_dir outputs/demo --only judge --overwrite
"""

from pathlib import Path
from typing import Any

from lib.cli import run_stage
from lib.config import Config
from lib.errors import MissingInput
from lib.log import say
from lib.runs import RunArgs
from lib.sections.models import ModelSpec
from lib.training.model_plans import choose_models, plan_models, unit_of
from lib.units import StageOfUnits, Unit

# Fields of a model's training manifest that go into the manifest of its unit
RECORDED = (
    "mode",
    "parameters",
    "best_step",
    "transfer",
    "held_out",
    "skipped_pools",
    "shortened",
    "packs",
    "table",
)


def main(config: Config, args: RunArgs) -> None:
    chosen = choose_models(config, args)
    if not chosen:
        say(f"no model of the config has mode {args.only_mode}")
    tables: dict[tuple[str, str], Any] = {}  # that one model has read, for the others
    with StageOfUnits(__file__, config, args, plans=plan_models(config), chosen=chosen) as stage:
        # 1. Refuse candidates that a model cannot read, before the first model is trained
        if unmade := stage.unmade():
            from lib.runtime import Runtime
            from lib.training.stage_inputs import read_stage_inputs, refuse_longer_candidates

            runtime = Runtime.detect(config, stage.code)
            refuse_longer_candidates(config, unmade, read_stage_inputs(stage, config, runtime, tables))

        # 2. Train each model, after the one that it starts from
        made = []
        for name in chosen:
            with stage.unit(name) as unit:
                if not unit.finished:
                    train(unit, config, tables)
                    made += unit.stats["table"]

        # 3. The stage is complete when every model of the config is complete
        from lib.report.table import results_table

        summary = stage.summarise()
        if rows := summary["stats"]["table"] if summary else made:
            say("\n" + results_table(rows) + "\n")


def train(unit: Unit, config: Config, tables: dict[tuple[str, str], Any]) -> None:
    """Train the model of a unit, and record its outputs and results."""
    from lib.runtime import Runtime
    from lib.training.stage_inputs import read_stage_inputs, streaming
    from lib.training.streaming_dataset import RECORD as SHARDS_USED
    from lib.training.train_model import RECORD, train_model

    name = unit.unit
    spec, runtime = config.models[name], Runtime.detect(config, unit.code)
    unit.environment |= runtime.fingerprint()
    stage_inputs = read_stage_inputs(unit, config, runtime, tables)
    with streaming(unit, config, stage_inputs):
        record = train_model(name, spec, stage_inputs, unit.folder, start_folder(unit, config, spec))
    for part in ("best_model", "final_model"):
        unit.add_folder(part, unit.folder / part)
    for file in ("metrics.jsonl", RECORD, SHARDS_USED):
        if file != SHARDS_USED or (unit.folder / file).exists():
            unit.add_file(file, unit.folder / file)
    unit.stats |= {key: record[key] for key in RECORDED if key in record}


def start_folder(unit: Unit, config: Config, spec: ModelSpec) -> Path | None:
    """The folder of the model that a model starts from; None for random weights.

    Raises MissingInput if stage 02 should have trained that model, and trained none.
    """
    if spec.start == "scratch":
        return None
    if spec.start == "02_generate_candidates":
        name = "generator" if config.candidates.cross_fit_folds == 1 else "generator_fold_0"
        if config.candidates.source != "masked_lm" or config.generator.checkpoint:
            raise MissingInput(
                "a model starts from 02_generate_candidates, but that stage trained no generator (candidates.source is "
                f"{config.candidates.source}, generator.checkpoint is {config.generator.checkpoint}); set the model's "
                "start to scratch or to a folder"
            )
        return unit.folder_of("02_generate_candidates", name)
    if spec.start in config.models:
        return unit.folder_of(unit_of(spec.start), "best_model")
    return Path(spec.start)


if __name__ == "__main__":
    run_stage(main, __doc__, with_mode=True, with_processes=True)
