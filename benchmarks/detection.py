"""
Detection of rewritten passages with labels beside the text: the judge beside TF-IDF and other detectors, and on new text.

A masked LM of the project rewrites passages of Python's documentation: half of them whole, half from a random place on. Originals
and rewritten passages become a CSV file with labels and spans. Stages 00 to 06 learn from it with configs/your_labels.yaml. Then
`--score` reads passages that no stage has seen, and their rewritten versions by another generator. How many of the originals does
the judge flag, at the thresholds that the selection split chose? An interrupted benchmark continues where it stopped.

With --pretrained, judge and inspector start from a pretrained model (configs/your_labels_pretrained.yaml). The passages and their
splits are the same. An encoder without an output layer for masked tokens gets a new one, which judge and inspector do not read.

python -m benchmarks.detection
python -m benchmarks.detection --pretrained /path/to/all-MiniLM-L6-v2
python -m benchmarks.detection --quick      # a few steps, for trying out
"""

import argparse
import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.prepared import RESULTS
from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib import durable, randomness
from lib.config import Config, load_config
from lib.report.detection import detection_tables
from lib.runs import STAGES, RunArgs, load_manifest, score_stage

MAKING = [  # of the passages: originals, and one rewritten version of each
    "data.passage_characters=192", "data.fractions={train: 0.88, held_out: 0.12}", "architecture.context=192",
    "training.batch_size=16", "generator.training.steps=300", "candidates.per_example=2", "candidates.mask_ratio=[0.15, 0.45]",
    "candidates.fill_passes=4", "models.reference_lm=null",
]  # fmt: skip
OTHER = ["seed=7", "generator.architecture.hidden_size=96", "generator.architecture.num_attention_heads=3",
         "generator.training.steps=450", "candidates.masking={type: span, num_spans: 8}", "candidates.temperature=0.8"]  # fmt: skip
QUICK = [
    "architecture.num_hidden_layers=1",
    "architecture.hidden_size=32",
    "architecture.num_attention_heads=2",
]
LEARNERS = ("inspector", "judge", "generator", "reference_lm", "ar_baseline")
LEARNING = [  # from the passages
    "data.id_key=id", "data.group_key=source", "data.selection_fraction=0.4",
    "data.fractions={train: 0.63, held_out: 0.27, reference: 0.1}", "data.passage_characters=192", "architecture.context=192",
    "training.compile=off",
]  # fmt: skip
FROM_SCRATCH = [
    "architecture.num_hidden_layers=3", "architecture.hidden_size=96", "models.generator.training.steps=200",
    "models.inspector.training.steps=160", "models.judge.training.steps=90", "models.reference_lm.training.steps=100",
    "models.ar_baseline.training.steps=120",
]  # fmt: skip
SHARE_OF_NEW = 0.2  # of the passages: those of the new text
MIN_CHARACTERS = 150
SEED = 1337


def run(folder: Path, config: Config, stages: tuple[str, ...], score: Path | None = None) -> None:
    """Run the named stages in a folder; finished ones are skipped."""
    for name in stages:
        importlib.import_module(name).main(config, RunArgs(run_dir=folder, score=score))


def passages(folder: Path) -> list[tuple[str, str, str]]:
    """(id, original, rewritten text) of the passages of a run."""
    found: dict[str, dict[str, str]] = {}
    for row in pq.read_table(
        folder / STAGES[2] / "candidates", columns=["example_id", "kind", "text"]
    ).to_pylist():
        found.setdefault(row["example_id"], {})[row["kind"]] = row["text"]
    return [
        (n, t["original"], t["masked_lm"]) for n, t in found.items() if len(t["original"]) >= MIN_CHARACTERS
    ]


def rows_of(name: str, original: str, rewritten: str) -> list[dict[str, Any]]:
    """The rows of the file: the original, and the rewritten passage, which in half of the cases begins like the original."""
    start = 0
    if randomness.hash_fraction(SEED, "turns", name) < 0.5:
        start = int(len(original) * (0.2 + 0.6 * randomness.hash_fraction(SEED, "place of the turn", name)))
    made = original[:start] + rewritten[start:]
    kinds = [("human", original, "[]"), ("machine", made, f'[[{start}, {len(made)}, "machine"]]')]
    return [
        {"id": f"{name} {label}", "source": name, "text": text, "label": label, "spans": spans}
        for label, text, spans in kinds
        if label == "human"
        or made.split() != original.split()  # a rewritten passage may by chance equal the original
    ]


def write_files(
    found: list[tuple[str, str, str]], new: list[tuple[str, str, str]], folder: Path
) -> tuple[Path, Path]:
    """(the file that the run learns from, the file of new text). A passage is in one of them only."""
    files = folder / "labelled.csv", folder / "new.csv"
    for file, chosen, is_new in ((files[0], found, False), (files[1], new, True)):
        kept = [
            p for p in chosen if (randomness.hash_fraction(SEED, "new text", p[0]) < SHARE_OF_NEW) == is_new
        ]
        if file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, ["id", "source", "text", "label", "spans"])
            writer.writeheader()
            writer.writerows(row for passage in kept for row in rows_of(*passage) if row["text"].strip())
    return files


def as_masked_lm(model: Path, folder: Path) -> Path:
    """The model with an output layer for masked tokens, a new one if it has none, saved in a folder."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    if not folder.exists():
        torch.manual_seed(SEED)
        with durable.replacing_folder(folder) as temporary:
            AutoModelForMaskedLM.from_pretrained(model, local_files_only=True).save_pretrained(temporary)
            AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(temporary)
    return folder


def on_new_text(folder: Path, file: Path) -> list[dict[str, Any]]:
    """The rates of the judge on the new text at each threshold, as `--score` measured them."""
    manifest, judge = load_manifest(folder / score_stage(file)), load_manifest(folder / STAGES[4])
    assert manifest is not None and judge is not None
    thresholds = judge["stats"]["judge"]["held_out"]["detection"]["thresholds"]
    return [
        rates | {"held_out_fpr": held_out["fpr"]}
        for rates, held_out in zip(manifest["stats"]["by_labels"], thresholds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="a few steps of small models, for trying out")
    parser.add_argument(
        "--pretrained",
        type=Path,
        metavar="FOLDER",
        help="masked LM or encoder from which judge and inspector start",
    )
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    folder = RESULTS / ("detection_quick" if options.quick else "detection")
    few = [*QUICK, "generator.training.steps=8"] if options.quick else []
    short = [f"models.{name}.training.steps=8" for name in LEARNERS] if options.quick else []

    # 1. Passages, rewritten by two generators that differ in size, seed, masking and temperature
    run(folder / "making", load_config(overrides=[*MAKING, *few]), STAGES[:3])
    run(
        folder / "making_other",
        load_config(overrides=[*MAKING, *OTHER, *few[:1], *few[3:]]),
        STAGES[:3],
    )
    labelled, new = write_files(passages(folder / "making"), passages(folder / "making_other"), folder)

    # 2. All stages, with labels beside the text
    given, configs = [f"data.path={labelled}", *LEARNING], ["configs/your_labels.yaml"]
    if options.pretrained is None:
        name, given = "run", [*given, *FROM_SCRATCH, *few, *short]
    else:
        digest = durable.sha256_folder(options.pretrained)[:8]
        name, configs = f"run_{digest}", [*configs, "configs/your_labels_pretrained.yaml"]
        model = as_masked_lm(options.pretrained, folder / f"masked_lm_{digest}")
        given += [f"pretrained.model={model}", *short[:2]]
    config = load_config(configs, overrides=[*given, *options.overrides])
    run(folder / name, config, STAGES)
    results = json.loads((folder / name / STAGES[6] / "metrics.json").read_text(encoding="utf-8"))

    # 3. The judge on new text
    run(folder / name, config, STAGES[6:], score=new)
    figures = {"detection": results["detection"], "new_text": on_new_text(folder / name, new)}
    print("\n" + detection_tables(figures["detection"]))
    for line in figures["new_text"]:
        print(f"new text, target {line['target']:.0%}: FPR {line['fpr']['value']:.1%} of {line['originals']:,} originals, "
              f"TPR {line['tpr']['value']:.1%}")  # fmt: skip
    write(options.out, "detection" if options.pretrained is None else "detection_pretrained", figures)


if __name__ == "__main__":
    main()
