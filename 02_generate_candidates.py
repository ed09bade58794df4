"""
02: make K candidates for every example of all splits but the reference one.

For text, one candidate is the original and the others are rewritten by a masked language model, each with its own
share of masked tokens. If the config names no checkpoint, that model is trained here first, on the train split.

For FinQA, one is the gold program and the others are wrong programs that look as good as long as nobody reads the
question; the stage measures how well that holds, and fails where it does not.

reads   01_prepare_dataset: examples, tokenizer
writes  candidates.parquet, a row per (example_id, candidate_id); dropped.parquet, examples without candidates;
        generator/ if one was trained here; baselines.parquet if the task scores candidates by simple methods

With --stream it then goes on: for as long as stage 04 trains, it keeps shards of fresh candidates ready in 02_stream/.

python 02_generate_candidates.py --quick_test --run_dir outputs/demo
python 02_generate_candidates.py --quick_test --run_dir outputs/demo --set stream.enabled=true --stream
"""

from dataclasses import replace
from pathlib import Path

from lib import durable
from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadConfig, UsageError
from lib.log import Progress, say
from lib.runs import OUTPUTS, RunArgs, find_run, load_manifest

IDLE = 0.2  # seconds between looks at what stage 04 wants next


def main(config: Config, args: RunArgs) -> None:
    if args.stream and not config.stream.enabled:
        raise UsageError(
            "--stream makes shards for stage 04, which reads none: add --set stream.enabled=true to both"
        )
    if not args.stream or args.overwrite or not is_complete(config, args):
        make_table(config, args)
    if args.stream:
        make_shards(
            config, replace(args, overwrite=False)
        )  # a shard is made again when what it is made of changes


def is_complete(config: Config, args: RunArgs) -> bool:
    """Whether there is a table already. Stage 04 may be reading it: then its lock is not to be had."""
    return (
        load_manifest(find_run("02_generate_candidates", config, args, OUTPUTS) / "02_generate_candidates")
        is not None
    )


def make_table(config: Config, args: RunArgs) -> None:
    import pyarrow as pa

    from lib import outside, schema
    from lib.candidates.counters import CandidateCounters
    from lib.candidates.generators import masked_language_models
    from lib.candidates.parallel import made_by_processes
    from lib.runtime import Runtime
    from lib.synthetic import MaskedLMEngine
    from lib.tasks import CandidateContext, get_task
    from lib.tokenization import load_tokenizer
    from lib.training.lengths import WholeTexts

    files = outside.of_candidates(config)
    uses = ("seed", "task", "device", "precision", "diffusion", "generator", "candidates", "finqa.pools")
    with Stage(__file__, config, args, uses=uses, reads=("01_prepare_dataset",), files=files) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        folders = masked_language_models(stage, config, runtime, tokenizer)

        # Make them group by group: memory holds one group of rows, whatever the size of the data
        task = get_task(config.task)
        processes = config.candidates.processes
        here = folders if processes == 1 else []
        engines = [MaskedLMEngine.load(folder, runtime, int8=config.candidates.int8) for folder in here]
        context = CandidateContext(config, tokenizer, engines)
        size = max(1, config.candidates.rows_per_group // config.candidates.per_example)
        examples = Examples(stage, size)
        if hasattr(task, "plan_candidates"):
            if processes > 1:
                raise BadConfig(
                    f"candidates.processes must be 1: task {config.task} makes candidates of all examples at once"
                )
            task.plan_candidates(examples, context)
        counters, whole = CandidateCounters(config.candidates.label_rule == "origin"), WholeTexts.of(config)
        # Token ids mean nothing without their tokenizer
        metadata = {
            "tokenizer_sha256": stage.sha256_of("01_prepare_dataset", "tokenizer"),
            "per_example": str(config.candidates.per_example),
        }
        if processes > 1:
            words = stage.folder_of("01_prepare_dataset", "tokenizer")
            tables = made_by_processes(config, words, folders, examples, processes)
        else:
            tables = ((group.num_rows, task.candidates(group, context), [], {}) for group in examples)
        with (
            stage.writer("candidates", schema.CANDIDATES, metadata) as writer,
            Progress("candidates", stage.rows("01_prepare_dataset", "examples")) as progress,
        ):
            done = 0
            for count, table, dropped, counts in tables:
                context.dropped += dropped
                context.counts.update(counts)
                if table.num_rows:
                    writer.write(table)
                    counters.add(table)
                    if whole is not None:
                        whole.add(table)
                done += count
                progress.update(done)
        counters.drop(context.dropped)
        dropped = [vars(d) for d in context.dropped]
        stage.write("dropped", pa.Table.from_pylist(dropped, schema.DROPPED.arrow), schema.DROPPED)
        stage.stats |= counters.summary()
        stage.stats["source"] = config.candidates.source
        say(counters.line())
        if whole is not None and (problem := whole.problem()):  # written by a tokenizer that is not the run's
            stage.stats["longer_than_context"] = whole.longer
            say(f"WARNING: stage 04 will refuse these candidates: {problem}")
        if hasattr(task, "review_candidates"):
            figures, baselines = task.review_candidates(context)
            stage.stats |= figures
            if baselines is not None:
                stage.write("baselines", baselines, schema.BASELINES)


def make_shards(config: Config, args: RunArgs) -> None:
    """Keep shards ready until stage 04 is complete."""
    import time

    from lib import schema
    from lib.candidates.generators import generator_folders
    from lib.candidates.producer import Producer
    from lib.runtime import Runtime
    from lib.shards import SCRIPT, open_store
    from lib.synthetic import MaskedLMEngine
    from lib.tasks import CandidateContext
    from lib.tokenization import load_tokenizer
    from lib.training.data import select_split

    uses = ("seed", "task", "device", "precision", "candidates", "rewards", "stream")
    reads = ("01_prepare_dataset", "02_generate_candidates")
    with Stage("02_stream.py", config, args, uses=uses, reads=reads, restarts=True) as stage:
        runtime = Runtime.detect(config, stage.code)
        store = open_store(stage, config)
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        examples = select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), "train")
        folders = generator_folders(stage, config)
        engines = [MaskedLMEngine.load(folder, runtime, int8=config.candidates.int8) for folder in folders]
        producer = Producer(
            store, config, examples, lambda at, draw: CandidateContext(at, tokenizer, engines, draw=draw)
        )
        made, trainer_seen = 0, True
        with store.alive("producer"):
            while not has_streamed(stage.run_dir):
                if (number := producer.step()) is not None:
                    made += 1
                    say(f"shard {number}: {producer.cut.of_shard(number)[1].size} examples, epoch "
                        f"{producer.cut.of_shard(number)[0]}; stage 04 is at shard {store.cursor}")  # fmt: skip
                    continue
                if trainer_seen != store.is_alive("trainer"):
                    trainer_seen = not trainer_seen
                    say("stage 04 is at work" if trainer_seen else
                        "stage 04 is not at work; shards are ready for it: run 04_train.py with the same settings")  # fmt: skip
                time.sleep(IDLE)
        stage.leave_incomplete(f"stage 04 is complete; {made} shards were made by `python {SCRIPT}`")


def has_streamed(run_dir: Path) -> bool:
    """Whether stage 04 is complete, and learned from shards; not while --overwrite makes it again."""
    folder = run_dir / "04_train"
    manifest = load_manifest(folder) if not durable.beside(folder, durable.NEW).exists() else None
    return manifest is not None and manifest["config"].get("stream", {}).get("enabled", False)


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


def without_split(table, split: str):
    import pyarrow.compute as pc

    return table.filter(pc.not_equal(table["split"], split))


if __name__ == "__main__":
    run_stage(main, __doc__, with_stream=True)
