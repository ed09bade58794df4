"""
02: make K candidates for every example. Examples of the split "reference" get none.

Task text: one candidate is the original text. A masked language model rewrites the others, each with its own share of
masked tokens. If generator.checkpoint is null, this stage first trains that model on the train split.

Task pools: the candidates of your files. The stage measures how many right ones simple scorers find.

Task finqa: one candidate is the correct program. The others are wrong programs that look equally plausible without the
question. The stage measures how well this holds and fails if it does not.

reads   01_prepare_dataset: examples, tokenizer
writes  candidates/, a table in parts, and dropped/, the examples without candidates; generator/ if a model was
        trained here; baselines.parquet if the task scores candidates by simple methods

With --stream the stage then makes shards of new candidates in 02_stream/ until stage 04 is complete.

python 02_generate_candidates.py --quick_test --run_dir outputs/demo
python 02_generate_candidates.py --quick_test --run_dir outputs/demo --set stream.enabled=true --stream
"""

from dataclasses import replace

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import UsageError
from lib.log import say
from lib.runs import OUTPUTS, RunArgs, find_run, load_manifest

POLL_SECONDS = 0.2  # time between two looks at which shard stage 04 needs next


def main(config: Config, args: RunArgs) -> None:
    if args.stream and not config.stream.enabled:
        raise UsageError(
            "--stream makes shards for stage 04, which does not read them while stream.enabled is false; "
            "add --set stream.enabled=true to the commands of both stages"
        )
    if not args.stream or args.overwrite or not table_exists(config, args):
        make_table(config, args)
    if args.stream:
        # Never --overwrite: a shard is made again only when one of its inputs changes
        make_shards(config, replace(args, overwrite=False))


def table_exists(config: Config, args: RunArgs) -> bool:
    """Whether stage 02 is complete. No lock is taken: stage 04 may hold it, since it may be reading the table."""
    run_dir = find_run("02_generate_candidates", config, args, OUTPUTS)
    return load_manifest(run_dir / "02_generate_candidates") is not None


def make_table(config: Config, args: RunArgs) -> None:
    """Make the table of candidates."""
    from lib import outside, schema
    from lib.candidates.generators import masked_language_models
    from lib.candidates.table import CandidateWork, ExampleGroups, merged_counters, plan
    from lib.runtime import Runtime
    from lib.tasks import CandidateContext, get_task
    from lib.tokenization import load_tokenizer

    files = outside.of_candidates(config)
    own = ("pools", "ranker.encoder", "ranker.prompt_tokens", "ranker.candidate_tokens")
    uses = (
        "seed",
        "task",
        "device",
        "precision",
        "diffusion",
        "generator",
        "candidates",
        "finqa.pools",
        "pretrained",
    )
    uses += own if config.task == "pools" else ()
    with Stage(__file__, config, args, uses=uses, reads=("01_prepare_dataset",), files=files) as stage:
        if stage.finished:
            return

        # 1. Load the tokenizer and find the masked language models, training them first if none is given
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        tokenizer_folder = stage.folder_of("01_prepare_dataset", "tokenizer")
        tokenizer = load_tokenizer(tokenizer_folder)
        with stage.alone("generator"):
            generators = masked_language_models(stage, config, runtime, tokenizer)

        # 2. Say what the parts depend on. Token ids mean nothing without their tokenizer: the table names it
        metadata = {
            "tokenizer_sha256": stage.sha256_of("01_prepare_dataset", "tokenizer"),
            "per_example": str(config.candidates.per_example),
        }
        tables = {"candidates": schema.CANDIDATES, "dropped": schema.DROPPED}
        parts = stage.parts(tables, metadata, also=stage.trained(generators))
        groups = ExampleGroups.of(stage, config)
        work = CandidateWork(config, parts, groups, tokenizer_folder, generators)

        # 3. Make the parts that are absent; some tasks plan over all examples before the first candidate
        context = plan(config, work)
        # A candidate takes about twice the room of an example: it has its own text, tokens and marks
        room = 2 * config.candidates.per_example * stage.bytes_of("01_prepare_dataset", "examples")
        made = stage.make_parts(parts, replace(work, planned=context), len(groups), "candidates", room)
        if made is None:
            return
        stage.add_parts(made)

        # 4. Record the counts of all parts
        counters, lengths, task_counts = merged_counters(config, made.counters)
        stage.stats |= counters.summary()
        stage.stats["source"] = config.candidates.source
        say(counters.line())
        # A generator with another tokenizer can write candidates of more tokens than the examples have
        if lengths is not None and (problem := lengths.problem()):
            stage.stats["longer_than_context"] = lengths.longer
            say(f"WARNING: stage 04 will refuse these candidates: {problem}")

        # 5. Let the task review the candidates; it raises BadData if they must not be used
        task = get_task(config.task)
        if hasattr(task, "review_candidates"):
            context = context or CandidateContext(config, tokenizer, [])
            context.counts, context.examples = task_counts, groups
            figures, baselines = task.review_candidates(context)
            stage.stats |= figures
            if baselines is not None:
                stage.write("baselines", baselines, schema.BASELINES)


def make_shards(config: Config, args: RunArgs) -> None:
    """Keep shards of new candidates ready until stage 04 has trained all models that learn from them."""
    import time

    from lib.candidates.generators import generator_folders
    from lib.candidates.producer import ShardWork, has_streamed
    from lib.executors import open_executor
    from lib.shards import SCRIPT, cut_of, open_store

    uses = ("seed", "task", "device", "precision", "candidates", "rewards", "stream")
    reads = ("01_prepare_dataset", "02_generate_candidates")
    with Stage("02_stream.py", config, args, uses=uses, reads=reads, restarts=True) as stage:
        # 1. What makes a shard: the train examples, and the masked language models that made the table
        store, examples = open_store(stage, config), stage.table("01_prepare_dataset", "examples")
        tokenizer = stage.folder_of("01_prepare_dataset", "tokenizer")
        work = ShardWork(config, store, examples, tokenizer, generator_folders(stage, config))
        cut = cut_of(config, stage.upstream_stats("01_prepare_dataset")["examples"]["train"])

        # 2. Make the next shards that stage 04 needs; wait while all of them are ready
        workers = 1 if config.executor.type == "local" else config.executor.workers
        num_shards, trainer_is_alive = 0, True
        with store.alive("producer"), open_executor(config.executor, work) as executor:
            while not has_streamed(stage.run_dir, config):
                if missing := store.missing()[:workers]:
                    for number in executor.make(missing):
                        num_shards += 1
                        epoch, positions = cut.of_shard(number)
                        say(
                            f"shard {number}: {positions.size} examples, epoch {epoch}; stage 04 reads shard {store.cursor}"
                        )
                    continue
                if trainer_is_alive != store.is_alive("trainer"):
                    trainer_is_alive = not trainer_is_alive
                    say(
                        "stage 04 is running"
                        if trainer_is_alive
                        else "shards are ready, but stage 04 is not running: run 04_train.py with the same settings"
                    )
                time.sleep(POLL_SECONDS)
        stage.leave_incomplete(
            f"all models that learn from shards are trained; `python {SCRIPT}` made {num_shards} shards"
        )


if __name__ == "__main__":
    run_stage(main, __doc__, with_stream=True, with_parts=True)
