"""
Judge and inspector on tinyshakespeare: on text by the generator they learned from, and by a generator they never saw.

Runs stages 00 to 04 with configs/judge.yaml. Then it runs stages 00 to 03 with another seed and a narrower generator, and
evaluates the same two models on its held-out candidates. The baseline is the confidence of the generator that made the
candidates. An interrupted benchmark continues where it stopped.

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
from benchmarks.result_files import add_out, full, write
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


OWN, ANOTHER = "own generator", "another generator"


def run(folder: Path, config: Config, stages: tuple[str, ...]) -> None:
    """Run the named stages in a folder; finished ones are skipped."""
    for name in stages:
        importlib.import_module(name).main(config, RunArgs(run_dir=folder))


def on_other_run(own: Path, other: Path, config: Config) -> dict[str, dict[str, Any]]:
    """Figures of the models of run `own` on the held-out candidates of run `other`: held-out figures and table rows."""
    reads = STAGES[1:4]
    with Stage(
        "04_benchmark.py", config, RunArgs(run_dir=other), uses=("seed",), reads=reads, restarts=True
    ) as stage:
        stage_inputs = read_stage_inputs(stage, config, Runtime.detect(config))
        found = {}
        for name in NAMES:
            model: Any = load_model(own / "04_train" / name / "best_model").eval()
            spec = config.models[name]
            context = context_of(name, spec, stage_inputs)
            objective: Any = make_objective(context, spec, stage_inputs, config.architecture.context)
            with torch.no_grad():
                held_out, rows = objective.report(model)
            found[name] = {"held_out": held_out, "table": [row.as_dict() for row in rows]}
        stage.leave_incomplete("measured with the models of another run")
    return found


def figures_of(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the results page: R² and AUROC with intervals, beside the confidence of the generator."""
    judge, inspector = (records[name]["held_out"] for name in ("judge", "inspector"))
    return {
        "r2": _estimate(records["judge"], "R2"),
        "rewritten_r2": judge["rewritten"]["r2"],
        "confidence_r2": judge["confidence"]["r2"],
        "best_r2": judge["best_r2"],
        "spearman": judge["spearman"],
        "confidence_spearman": judge["confidence"]["spearman"],
        "auroc_untouched": judge["auroc_untouched"],
        "auroc_changed": _estimate(records["inspector"], "AUROC"),
        "auroc_changed_of_confidence": inspector["auroc_changed_of_confidence"],
    }


def _estimate(record: dict[str, Any], metric: str) -> dict[str, Any]:
    """A row of the results table by the beginning of its metric."""
    row = next(row for row in record["table"] if row["metric"].startswith(metric))
    return {key: row[key] for key in ("value", "low", "high")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="a few steps of small models, for trying out")
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    given = [f"data.path={shakespeare()}", *(QUICK if options.quick else ()), *options.overrides]
    kind = "judge_quick" if options.quick else "judge"
    own, other = RESULTS / kind, RESULTS / f"{kind}_other_generator"
    config = load_config(["configs/judge.yaml"], overrides=given)
    run(own, config, STAGES[:5])
    other_config = load_config(["configs/judge.yaml"], overrides=[*OTHER, *given])
    run(other, other_config, STAGES[:4])

    records = {
        name: json.loads((own / "04_train" / name / "training_manifest.json").read_text(encoding="utf-8"))
        for name in NAMES
    }
    rows = {OWN: figures_of(records), ANOTHER: figures_of(on_other_run(own, other, other_config))}
    say(rows)
    write(options.out, "judge", {"rows": rows})


def say(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    head = ("held-out candidates of", "judge R2", "rewritten alone", "mean confidence", "oracle", "Spearman",
            "of confidence", "AUROC untouched", "inspector AUROC", "confidence")  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for name, found in rows.items():
        lines.append((name, *(full(v) if isinstance(v, dict) else f"{v:.3f}" for v in found.values())))
    print(aligned(lines))


if __name__ == "__main__":
    main()
