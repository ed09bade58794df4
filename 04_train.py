"""
04: train the models of the config in their order: generator, reference models, inspector, judge, ranker.

Each model has a mode, an attention type, a split to learn from and a start: random weights or another model. The stage
skips a model that is complete, and continues an interrupted one from its last checkpoint. With stream.enabled the
inspector and the judge learn from new candidates that `02_generate_candidates.py --stream` makes at the same time.

reads   01_prepare_dataset: examples, tokenizer; 02_generate_candidates: candidates, generator; 03_build_rewards
writes  <name>/best_model, <name>/final_model, <name>/metrics.jsonl, <name>/training_manifest.json; with stream.enabled
        also <name>/shards.json, the shards that the model learned from

python 04_train.py --quick_test --run_dir outputs/demo
python 04_train.py --quick_test --run_dir outputs/demo --mode sequence_scorer
"""

from pathlib import Path

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import MissingInput
from lib.log import say
from lib.runs import RunArgs
from lib.sections.models import ModelSpec

# Fields of a model's training manifest that go into the manifest of the stage
RECORDED = ("mode", "parameters", "best_step", "transfer", "held_out", "skipped_pools", "shortened", "packs")


def main(config: Config, args: RunArgs) -> None:
    from lib import outside
    from lib.report.table import results_table
    from lib.runtime import Runtime
    from lib.training.stage_inputs import read_stage_inputs, refuse_longer_candidates, streaming
    from lib.training.streaming_dataset import RECORD as SHARDS_USED
    from lib.training.train_model import train_model

    reads = ("01_prepare_dataset", "02_generate_candidates", "03_build_rewards")
    uses = ("seed", "device", "precision", "diffusion", "ranker", "models", "stream")
    with Stage(__file__, config, args, uses=uses, reads=reads, files=outside.of_models(config)) as stage:
        if stage.finished:
            return

        # 1. Read the examples, candidates and rewards
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        stage_inputs = read_stage_inputs(stage, config, runtime)

        # 2. Train the models that --mode selects, by default all; the others keep what they have
        selected = {n: s for n, s in config.models.items() if args.only_mode in (None, s.mode)}
        if not selected:
            say(f"no model of the config has mode {args.only_mode}")
        refuse_longer_candidates(config, selected, stage_inputs)
        with streaming(stage, config, stage_inputs):
            for name, spec in selected.items():
                train_model(name, spec, stage_inputs, stage.folder / name, start_folder(stage, config, spec))

        # 3. The stage is complete when every model of the config is complete
        manifests = {name: training_manifest(stage.folder / name) for name in config.models}
        missing = [name for name, manifest in manifests.items() if manifest is None]
        if missing:
            stage.leave_incomplete(
                f"not trained yet: {', '.join(missing)}; run without --mode to train all models"
            )
            return

        # 4. Record the outputs and the results
        rows = []
        for name, manifest in manifests.items():
            assert manifest is not None
            for part in ("best_model", "final_model"):
                stage.add_folder(f"{name}/{part}", stage.folder / name / part)
            for part in ("metrics.jsonl", "training_manifest.json", SHARDS_USED):
                if part == SHARDS_USED and not (stage.folder / name / part).exists():
                    continue
                stage.add_file(f"{name}/{part}", stage.folder / name / part)
            stage.stats[name] = {key: manifest[key] for key in RECORDED if key in manifest}
            rows += manifest["table"]
        stage.stats["table"] = rows
        say("\n" + results_table(rows) + "\n")


def start_folder(stage: Stage, config: Config, spec: ModelSpec) -> Path | None:
    """The folder of the model that a model starts from; None for random weights.

    Raises MissingInput if that model has not been trained.
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
        return stage.folder_of("02_generate_candidates", name)
    if spec.start in config.models:
        if training_manifest(stage.folder / spec.start) is None:
            raise MissingInput(
                f"a model starts from '{spec.start}', which is not trained yet; run without --mode first"
            )
        return stage.folder / spec.start / "best_model"
    return Path(spec.start)


def training_manifest(folder: Path) -> dict | None:
    """The training manifest in a model's folder; None while the model is not complete."""
    import json

    from lib.training.train_model import RECORD

    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


if __name__ == "__main__":
    run_stage(main, __doc__, with_mode=True, with_processes=True)
