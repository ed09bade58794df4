"""
02: make K candidates for every example of the train and held-out splits.

For text, one candidate is the original and the others are rewritten by a masked language model, each with its own
share of masked tokens. If the config names no checkpoint, that model is trained here first, on the train split.

reads   01_prepare_dataset: examples, tokenizer
writes  candidates.parquet, a row per (example_id, candidate_id); generator/ if one was trained here

python 02_generate_candidates.py --quick_test --run_dir outputs/demo
"""

from pathlib import Path

from lib.artifacts import RunArgs, Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadConfig
from lib.log import Progress, say


def main(config: Config, args: RunArgs) -> None:
    from lib import schema
    from lib.runtime import Runtime
    from lib.tasks import CandidateContext, get_task
    from lib.tokenization import load_tokenizer

    checkpoint = [Path(config.generator.checkpoint)] if config.generator.checkpoint else []
    uses = ("seed", "task", "device", "precision", "diffusion", "generator", "candidates")
    with Stage(__file__, config, args, uses=uses, reads=("01_prepare_dataset",), files=checkpoint) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config)
        stage.environment |= runtime.fence()
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        engines = masked_language_models(stage, config, runtime, tokenizer)

        # Rewrite group by group: memory holds one group of rows, whatever the size of the data
        task = get_task(config.task)
        context = CandidateContext(config, tokenizer, engines)
        tally = Tally()
        total = stage.rows("01_prepare_dataset", "examples")
        # Token ids mean nothing without their tokenizer
        metadata = {"tokenizer_sha256": stage.sha256_of("01_prepare_dataset", "tokenizer")}
        with (
            stage.writer("candidates", schema.CANDIDATES, metadata) as writer,
            Progress("candidates", total) as progress,
        ):
            done = 0
            size = max(1, config.candidates.rows_per_group // config.candidates.per_example)
            for batch in stage.tables("01_prepare_dataset", "examples", schema.EXAMPLES, rows=size):
                done += batch.num_rows
                examples = without_split(batch, "reference")
                if examples.num_rows:
                    table = task.candidates(examples, context)
                    writer.write(table)
                    tally.add(table)
                progress.update(done)
        stage.stats |= tally.summary()
        stage.stats["source"] = config.candidates.source
        say(tally.line())


def masked_language_models(stage: Stage, config: Config, runtime, tokenizer) -> list:
    """The engines that write synthetic text: loaded, or trained here and kept; none for other sources."""
    from lib.synthetic import MaskedLMEngine

    if config.candidates.source != "masked_lm":
        return []
    if config.generator.checkpoint:
        if config.candidates.cross_fit_folds > 1:
            raise BadConfig(
                "candidates.cross_fit_folds > 1 trains its generators itself; set generator.checkpoint to null"
            )
        return [MaskedLMEngine.load(Path(config.generator.checkpoint), runtime)]
    folders = train_generators(stage, config, runtime, tokenizer)
    return [MaskedLMEngine.load(folder, runtime) for folder in folders]


def train_generators(stage: Stage, config: Config, runtime, tokenizer) -> list[Path]:
    """One generator on the whole train split; when cross-fitting, one per fold that leaves that fold out."""
    from lib import schema
    from lib.sections import ModelSpec
    from lib.tasks import cross_fit_fold
    from lib.training.data import select_split
    from lib.training.named import Materials, train_named

    spec = ModelSpec(
        mode="language_model", architecture=config.generator.architecture, training=config.generator.training
    )
    folds = config.candidates.cross_fit_folds
    table = {
        split: select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), split)
        for split in ("train", "held_out")
    }
    fold_of = [cross_fit_fold(config.seed, g, folds) for g in table["train"]["group"].to_pylist()]
    folders = []
    for fold in range(folds):
        name = "generator" if folds == 1 else f"generator_fold_{fold}"
        kept = without_fold(table["train"], [folds > 1 and f == fold for f in fold_of])
        examples = {"train": kept, "held_out": table["held_out"]}
        materials = Materials(
            config, tokenizer, runtime, examples.__getitem__, lambda split: table[split].slice(0, 0)
        )
        record = train_named(name, spec, materials, stage.folder / name, start=None)
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


def without_fold(table, left_out: list[bool]):
    """The other rows; one whose predecessor is gone no longer continues it."""
    import numpy as np
    import pyarrow as pa

    keep = ~np.asarray(left_out)
    continues = table["continues"].to_numpy(zero_copy_only=False) & np.append(False, keep[:-1])
    index = table.column_names.index("continues")
    return table.set_column(index, table.schema.field(index), pa.array(continues)).filter(pa.array(keep))


class Tally:
    """Counts over all candidates: what a person asks of synthetic text."""

    def __init__(self) -> None:
        self.candidates = self.rewritten = self.unchanged = 0
        self.fractions: list = []
        self.predicted: dict[str, int] = {}
        self.right: dict[str, int] = {}

    def add(self, table) -> None:
        import numpy as np

        fraction = table["synthetic_fraction"].to_numpy()
        original = np.asarray(table["kind"].to_pylist()) == "original"
        self.candidates += table.num_rows
        self.rewritten += int((~original).sum())
        self.fractions.append(np.histogram(fraction[~original], bins=20, range=(0, 1))[0])
        if not table["token_labels"].null_count and not table["token_ids"].null_count:
            self._compare(table, original)

    def _compare(self, table, original) -> None:
        """How many predicted tokens equal the original's, per split, where the two have the same tokens' places."""
        ids, labels = table["token_ids"].to_pylist(), table["token_labels"].to_pylist()
        examples, splits = table["example_id"].to_pylist(), table["split"].to_pylist()
        truth = {examples[i]: ids[i] for i in range(len(ids)) if original[i]}
        import numpy as np

        for i in np.flatnonzero(~original):
            clean = truth.get(examples[i])
            self.unchanged += int(clean == ids[i])
            if clean is None or len(clean) != len(ids[i]):
                continue
            predicted = np.asarray(labels[i]) == 2
            hits = (np.asarray(clean) == np.asarray(ids[i])) & predicted
            self.predicted[splits[i]] = self.predicted.get(splits[i], 0) + int(predicted.sum())
            self.right[splits[i]] = self.right.get(splits[i], 0) + int(hits.sum())

    def summary(self) -> dict:
        import numpy as np

        histogram = np.sum(self.fractions, axis=0) if self.fractions else np.zeros(20)
        middle = (np.arange(20) + 0.5) / 20
        accuracy = {s: self.right[s] / n for s, n in self.predicted.items() if n}
        return {
            "candidates": self.candidates,
            "rewritten": self.rewritten,
            "unchanged": self.unchanged,
            "mean_synthetic_fraction": float((histogram * middle).sum() / max(histogram.sum(), 1)),
            "synthetic_fraction_histogram": histogram,
            "generator_accuracy": accuracy,
        }

    def line(self) -> str:
        accuracy = {s: f"{self.right[s] / n:.1%}" for s, n in self.predicted.items() if n}
        return (
            f"{self.candidates} candidates, {self.rewritten} of them rewritten, {self.unchanged} of those came out as "
            f"the original; predicted tokens that equal the original's: {accuracy or 'not compared'}"
        )


def without_split(table, split: str):
    import pyarrow.compute as pc

    return table.filter(pc.not_equal(table["split"], split))


if __name__ == "__main__":
    run_stage(main, __doc__)
