"""
04: train the models that the config names, in its order: generator, judge, inspector, ranker and their baselines.

Each has a mode, an attention type, a split it learns from and a start. A model that is complete is not trained
again; one that was cut off goes on from its last checkpoint. With `stream.enabled` inspector and judge learn from fresh
candidates, which `02_generate_candidates.py --stream` makes beside it.

reads   01_prepare_dataset: examples, tokenizer; 02_generate_candidates: candidates, generator; 03_build_rewards
writes  <name>/best_model, <name>/final_model, <name>/metrics.jsonl, <name>/training_manifest.json; <name>/shards.json,
        the shards it used

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
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        stage_inputs = read_stage_inputs(stage, config, runtime)

        # Train what is asked for; models of other modes keep what they have
        wanted = {n: s for n, s in config.models.items() if args.only_mode in (None, s.mode)}
        if not wanted:
            say(f"no model of the config has mode {args.only_mode}")
        refuse_longer_candidates(config, wanted, stage_inputs)
        with streaming(stage, config, stage_inputs):
            for name, spec in wanted.items():
                train_model(name, spec, stage_inputs, stage.folder / name, start_folder(stage, config, spec))

        # The stage is complete when every model of the config is
        records = {name: record_of(stage.folder / name) for name in config.models}
        left = [name for name, record in records.items() if record is None]
        if left:
            stage.leave_incomplete(f"still to train: {', '.join(left)}; run without --mode for all of them")
            return
        rows = []
        for name, record in records.items():
            assert record is not None
            for part in ("best_model", "final_model"):
                stage.add_folder(f"{name}/{part}", stage.folder / name / part)
            for part in ("metrics.jsonl", "training_manifest.json", SHARDS_USED):
                if part == SHARDS_USED and not (stage.folder / name / part).exists():
                    continue
                stage.add_file(f"{name}/{part}", stage.folder / name / part)
            told = (
                "mode",
                "parameters",
                "best_step",
                "transfer",
                "held_out",
                "skipped_pools",
                "shortened",
                "packs",
            )
            stage.stats[name] = {k: record[k] for k in told if k in record}
            rows += record["table"]
        stage.stats["table"] = rows
        say(results_table(rows))


def start_folder(stage: Stage, config: Config, spec: ModelSpec) -> Path | None:
    """The folder a model starts from; None for scratch."""
    if spec.start == "scratch":
        return None
    if spec.start == "02_generate_candidates":
        name = "generator" if config.candidates.cross_fit_folds == 1 else "generator_fold_0"
        if config.candidates.source != "masked_lm" or config.generator.checkpoint:
            raise MissingInput(
                "stage 02 trained no generator (candidates.source or generator.checkpoint says so), so no model can "
                "start from it; set its start to scratch or to a folder"
            )
        return stage.folder_of("02_generate_candidates", name)
    if spec.start in config.models:
        folder = stage.folder / spec.start / "best_model"
        if record_of(stage.folder / spec.start) is None:
            raise MissingInput(
                f"a model starts from '{spec.start}', which is not trained yet; run without --mode first"
            )
        return folder
    return Path(spec.start)


def record_of(folder: Path) -> dict | None:
    """The training manifest of a model's folder, None while it is not complete."""
    import json

    from lib.training.train_model import RECORD

    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


if __name__ == "__main__":
    run_stage(main, __doc__, with_mode=True)
