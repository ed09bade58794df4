"""
01: make examples from the documents, assign them to splits, and train the tokenizer.

An example has a prompt (empty for text), a target, a split and a group. A group is never divided between two splits.
Everything that is left out goes to the table dropped, with the reason.

reads   00_check_data: documents
writes  examples/ and dropped/, tables in parts; tokenizer/; tokens/<split>, for language models (lib/token_store.py)

python 01_prepare_dataset.py --quick_test --run_dir outputs/demo
"""

from collections.abc import Iterator
from pathlib import Path

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.log import Progress, say
from lib.runs import RunArgs

BYTES_OF_A_CHARACTER = (
    6  # in the tables and token stores of this stage, at most; tokens have two to four bytes
)


def main(config: Config, args: RunArgs) -> None:
    from lib import durable, outside, schema
    from lib.examples import ExampleCounters, ExampleWork, cut, cut_parts
    from lib.tasks import get_task
    from lib.token_store import TokenStoreWriter
    from lib.tokenization import load_tokenizer, num_ids, train_tokenizer
    from lib.training.lengths import WholeTexts

    uses = (
        "seed",
        "task",
        "data",
        "tokenizer",
        "pretrained",
        "finqa.group",
        "finqa.selection_share",
        "ranker.prompt",
        "ranker.prompt_tokens",
        "ranker.encoder",
    )
    outside.refuse_unnamed_pretrained(config)
    files = outside.of_examples(config)
    with Stage(
        __file__, config, args, uses=uses, reads=("00_check_data",), files=files, restarts=True
    ) as stage:
        if stage.finished:
            return
        task = get_task(config.task)

        # 1. The tokenizer: that of the pretrained model, which is opened once to refuse what no stage could use, or a new one.
        #    Characters come from all splits; BPE learns from a sample of the train split
        def make_tokenizer(folder: Path) -> None:
            if config.pretrained.model is not None:
                run_tokenizer(config).save_pretrained(folder)
                return
            documents = Documents(stage, "tokenizer")
            if config.tokenizer.kind == "character":
                texts = (e.prompt + e.target for e in only_examples(task.prepare(config, documents)))
            else:
                texts = sampled_texts(config, task.prepare(config, documents), documents.num_characters)
            train_tokenizer(config.tokenizer.kind, texts, config.tokenizer.vocab_size).save_pretrained(folder)

        stage.make_once("tokenizer", make_tokenizer)
        tokenizer = load_tokenizer(stage.folder / "tokenizer")
        vocabulary = num_ids(tokenizer)

        # 2. The examples: cut in one pass over the documents, then tokenized part by part
        tables = {"examples": schema.EXAMPLES, "dropped": schema.DROPPED}
        parts = stage.parts(tables, also=stage.output_sha256("tokenizer"))
        with stage.alone("cut texts"):
            count = cut(config, task.prepare(config, Documents(stage, "cutting")), cut_parts(parts))
        work = ExampleWork(config, parts, stage.folder / "tokenizer")
        room = BYTES_OF_A_CHARACTER * stage.upstream_stats("00_check_data")["characters"]
        made = stage.make_parts(parts, work, count, "examples", room)
        if made is None:
            return
        stage.add_parts(made)
        counters = ExampleCounters(WholeTexts.of(config))
        for part in made.counters:
            counters.merge(part)
        counters.check(config)

        # 3. The same tokens as one token store per split
        with (
            durable.replacing_folder(stage.folder / "tokens") as folder,
            TokenStoreWriter(folder, vocabulary, stage.output_sha256("tokenizer")) as writer,
            Progress("tokens", made.count) as progress,
        ):
            columns = ["target", "split", "group", "continues", "token_ids"]
            for number in range(made.count):
                for table in made.table("examples", number).tables(schema.EXAMPLES, columns):
                    writer.add(table)
                progress.update(number + 1)
        for split in writer.splits:
            stage.add_folder(f"tokens/{split}", stage.folder / "tokens" / split)
        durable.remove(cut_parts(parts).folder)
        stage.stats |= counters.summary(vocabulary)
        say(counters.line(vocabulary))


class Documents:
    """The documents of stage 00. They are read from the disk again each time they are iterated over, with progress."""

    def __init__(self, stage: Stage, label: str) -> None:
        self.stage, self.label = stage, label

    @property
    def num_characters(self) -> int:
        return self.stage.upstream_stats("00_check_data")["characters"]

    def __iter__(self) -> Iterator:
        from lib import schema
        from lib.tasks import Document

        done = 0
        with Progress(self.label, self.stage.rows("00_check_data", "documents")) as progress:
            for batch in self.stage.batches("00_check_data", "documents", schema.DOCUMENTS, rows=None):
                # One at a time, so that only one document is in memory as Python text
                for i in range(batch.num_rows):
                    yield Document(**batch.slice(i, 1).to_pylist()[0])
                done += batch.num_rows
                progress.update(done)


def run_tokenizer(config: Config):
    """The tokenizer of the pretrained model. Raises BadData or BadConfig if a model of the config could not use the two."""
    from lib.models.pretrained import check_pretrained

    owners = {"generator": config.generator, **config.models}
    contexts = {
        name: owner.architecture.context
        for name, owner in owners.items()
        if owner.architecture.family == "pretrained"
    }
    return check_pretrained(config.pretrained, contexts).tokenizer


def only_examples(items) -> Iterator:
    from lib.tasks import Example

    return (item for item in items if isinstance(item, Example))


def sampled_texts(config: Config, items, num_characters: int) -> Iterator[str]:
    """Prompts and targets of train: all, or a sample if the documents have more than `tokenizer.sample_characters`.

    A hash of its name decides whether an example is in the sample. So the sample does not depend on the order.
    """
    from lib.randomness import hash_fraction

    share = config.tokenizer.sample_characters / max(num_characters, 1)
    if share < 1:
        say(
            f"the tokenizer learns from {share:.1%} of the train examples, because the documents have "
            f"{num_characters:,} characters; see tokenizer.sample_characters"
        )
    for item in only_examples(items):
        name = item.example_id
        if item.split == "train" and (
            share >= 1 or hash_fraction(config.seed, "tokenizer sample", name) < share
        ):
            yield item.prompt + item.target


if __name__ == "__main__":
    run_stage(main, __doc__, with_parts=True)
