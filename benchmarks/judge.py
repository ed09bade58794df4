"""
How well judge and inspector do on tinyshakespeare: on the generator they learned from, and on one they never saw.

Stages 00 to 04 with configs/judge.yaml; then stages 00 to 03 with another seed and a narrower generator, whose held-out
candidates the same two models are measured on. Beside them the confidence of the generator that wrote. Resumable.

python -m benchmarks.judge
python -m benchmarks.judge --quick      # a few steps, for trying out
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.prepared import RESULTS, shakespeare
from benchmarks.provenance import say_provenance
from lib.artifacts import Stage
from lib.config import Config, load_config
from lib.models.build import load_model
from lib.report.table import aligned
from lib.runs import STAGES, RunArgs
from lib.runtime import Runtime
from lib.training.stage_inputs import read_stage_inputs
from lib.training.train_model import context_of, make_objective

OTHER = [
    "seed=7",
    "generator.architecture.hidden_size=96",
    "generator.architecture.num_attention_heads=3",
    "generator.training.steps=700",
]
NAMES = ("inspector", "judge")
QUICK = [f"{owner}.training.steps=8" for owner in ("generator", "models.inspector", "models.judge")]
QUICK += [
    "architecture.num_hidden_layers=1",
    "architecture.hidden_size=32",
    "architecture.num_attention_heads=2",
    "architecture.context=64",
]
QUICK += ["data.passage_characters=64", "data.block_characters=1024", "training.evaluation_examples=32"]


def run(folder: Path, config: Config, stages: tuple[str, ...]) -> None:
    for name in stages:
        importlib.import_module(name).main(config, RunArgs(run_dir=folder))


def measured_elsewhere(own: Path, other: Path, config: Config) -> dict[str, dict[str, Any]]:
    """Held-out figures of the models of run `own` on the candidates of run `other`."""
    reads = STAGES[1:4]
    with Stage(
        "04_train.py", config, RunArgs(run_dir=other), uses=("seed",), reads=reads, restarts=True
    ) as stage:
        stage_inputs = read_stage_inputs(stage, config, Runtime.detect(config))
        found = {}
        for name in NAMES:
            model: Any = load_model(own / "04_train" / name / "best_model").eval()
            spec = config.models[name]
            context = context_of(name, spec, stage_inputs)
            objective: Any = make_objective(context, spec, stage_inputs, config.architecture.context)
            with torch.no_grad():
                found[name] = objective.report(model)[0]
        stage.leave_incomplete("measured with the models of another run")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="a few steps of small models, for trying out")
    options = parser.parse_args()
    say_provenance()
    given = [f"data.path={shakespeare()}", *(QUICK if options.quick else ()), *options.overrides]
    kind = "judge_quick" if options.quick else "judge"
    own, other = RESULTS / kind, RESULTS / f"{kind}_other_generator"
    config = load_config(["configs/judge.yaml"], overrides=given)
    run(own, config, STAGES[:5])
    elsewhere = load_config(["configs/judge.yaml"], overrides=[*OTHER, *given])
    run(other, elsewhere, STAGES[:4])

    records = {
        name: json.loads((own / "04_train" / name / "training_manifest.json").read_text(encoding="utf-8"))[
            "held_out"
        ]
        for name in NAMES
    }
    head = ("held-out candidates of", "judge R2", "of the rewritten", "mean confidence", "best possible", "Spearman",
            "of confidence", "AUROC untouched", "inspector AUROC", "confidence")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for what, found in (
        ("its own generator", records),
        ("another", measured_elsewhere(own, other, elsewhere)),
    ):
        judge, inspector = found["judge"], found["inspector"]
        figures = (
            judge["r2"], judge["rewritten"]["r2"], judge["confidence"]["r2"], judge["best_r2"], judge["spearman"],
            judge["confidence"]["spearman"], judge["auroc_untouched"],
            inspector["auroc_changed"], inspector["auroc_changed_of_confidence"],
        )  # fmt: skip
        rows.append((what, *(f"{value:.3f}" for value in figures)))
    print(aligned(rows))


if __name__ == "__main__":
    main()
