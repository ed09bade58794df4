"""
02: make K candidates for every example of all splits but the reference one.

For text, one candidate is the original and the others are rewritten by a masked language model, each with its own
share of masked tokens. If the config names no checkpoint, that model is trained here first, on the train split.

For FinQA, one is the gold program and the others are wrong programs that look as good as long as nobody reads the
question; the stage measures how well that holds, and fails where it does not.

reads   01_prepare_dataset: examples, tokenizer
writes  candidates.parquet, a row per (example_id, candidate_id); dropped.parquet, examples without candidates;
        generator/ if one was trained here; baselines.parquet if the task scores candidates by simple methods

python 02_generate_candidates.py --quick_test --run_dir outputs/demo
"""

from pathlib import Path

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadConfig
from lib.log import Progress, say
from lib.runs import RunArgs


def main(config: Config, args: RunArgs) -> None:
    import pyarrow as pa

    from lib import schema
    from lib.runtime import Runtime
    from lib.tasks import CandidateContext, get_task
    from lib.tokenization import load_tokenizer

    checkpoint = [Path(config.generator.checkpoint)] if config.generator.checkpoint else []
    uses = ("seed", "task", "device", "precision", "diffusion", "generator", "candidates", "finqa.pools")
    with Stage(__file__, config, args, uses=uses, reads=("01_prepare_dataset",), files=checkpoint) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config)
        stage.environment |= runtime.fence()
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        engines = masked_language_models(stage, config, runtime, tokenizer)

        # Make them group by group: memory holds one group of rows, whatever the size of the data
        task = get_task(config.task)
        context = CandidateContext(config, tokenizer, engines)
        size = max(1, config.candidates.rows_per_group // config.candidates.per_example)
        examples = Examples(stage, size)
        if hasattr(task, "plan_candidates"):
            task.plan_candidates(examples, context)
        tally = Tally()
        # Token ids mean nothing without their tokenizer
        metadata = {
            "tokenizer_sha256": stage.sha256_of("01_prepare_dataset", "tokenizer"),
            "per_example": str(config.candidates.per_example),
        }
        with (
            stage.writer("candidates", schema.CANDIDATES, metadata) as writer,
            Progress("candidates", stage.rows("01_prepare_dataset", "examples")) as progress,
        ):
            done = 0
            for batch in examples:
                table = task.candidates(batch, context)
                if table.num_rows:
                    writer.write(table)
                    tally.add(table)
                done += batch.num_rows
                progress.update(done)
        tally.drop(context.dropped)
        dropped = [vars(d) for d in context.dropped]
        stage.write("dropped", pa.Table.from_pylist(dropped, schema.DROPPED.arrow), schema.DROPPED)
        stage.stats |= tally.summary()
        stage.stats["source"] = config.candidates.source
        say(tally.line())
        if hasattr(task, "review_candidates"):
            figures, baselines = task.review_candidates(context)
            stage.stats |= figures
            if baselines is not None:
                stage.write("baselines", baselines, schema.BASELINES)


class Examples:
    """The examples of stage 01 that get candidates, in tables, as often as they are asked for."""

    def __init__(self, stage: Stage, size: int) -> None:
        self.stage, self.size = stage, size

    def __iter__(self):
        from lib import schema

        for batch in self.stage.tables("01_prepare_dataset", "examples", schema.EXAMPLES, rows=self.size):
            kept = without_split(batch, "reference")
            if kept.num_rows:
                yield kept


def masked_language_models(stage: Stage, config: Config, runtime, tokenizer) -> list:
    """The engines that write synthetic text: loaded, or trained here and kept; none for other sources."""
    from lib.synthetic import MaskedLMEngine

    rewrites = config.finqa.pools.corruption_rate * config.finqa.pools.changes.masked_lm > 0
    if config.candidates.source != "masked_lm" and not (config.candidates.source == "programs" and rewrites):
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
    from lib.sections.models import ModelSpec
    from lib.tasks import cross_fit_fold
    from lib.training.data import select_split
    from lib.training.named import train_named
    from lib.training.tables import Materials

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
        self.kinds: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.predicted: dict[str, int] = {}
        self.right: dict[str, int] = {}

    def add(self, table) -> None:
        import numpy as np
        import pyarrow.compute as pc

        self.candidates += table.num_rows
        for count in pc.value_counts(table["kind"]).to_pylist():
            self.kinds[count["values"]] = self.kinds.get(count["values"], 0) + count["counts"]
        if "synthetic_fraction" not in table.column_names:
            return
        fraction = table["synthetic_fraction"].to_numpy()
        original = np.asarray(table["kind"].to_pylist()) == "original"
        self.rewritten += int((~original).sum())
        self.fractions.append(np.histogram(fraction[~original], bins=20, range=(0, 1))[0])
        if not table["token_labels"].null_count and not table["token_ids"].null_count:
            self._compare(table, original)

    def drop(self, items: list) -> None:
        for item in items:
            self.dropped[item.reason] = self.dropped.get(item.reason, 0) + 1

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

        counts = {"candidates": self.candidates, "kinds": self.kinds, "dropped": self.dropped}
        if not self.fractions:
            return counts
        histogram = np.sum(self.fractions, axis=0)
        middle = (np.arange(20) + 0.5) / 20
        accuracy = {s: self.right[s] / n for s, n in self.predicted.items() if n}
        return counts | {
            "rewritten": self.rewritten,
            "unchanged": self.unchanged,
            "mean_synthetic_fraction": float((histogram * middle).sum() / max(histogram.sum(), 1)),
            "synthetic_fraction_histogram": histogram,
            "generator_accuracy": accuracy,
        }

    def line(self) -> str:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.kinds.items()))
        line = f"{self.candidates:,} candidates ({kinds})"
        if self.fractions:
            accuracy = {s: f"{self.right[s] / n:.1%}" for s, n in self.predicted.items() if n}
            line += (
                f", {self.unchanged:,} of the rewritten ones came out as the original; predicted tokens that equal the "
                f"original's: {accuracy or 'not compared'}"
            )
        left = ", ".join(f"{n:,} x {reason}" for reason, n in self.dropped.items())
        return line + (f"; without candidates: {left}" if left else "")


def without_split(table, split: str):
    import pyarrow.compute as pc

    return table.filter(pc.not_equal(table["split"], split))


if __name__ == "__main__":
    run_stage(main, __doc__)
