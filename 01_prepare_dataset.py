"""
01: make examples from the documents, assign them to splits, and train the tokenizer.

An example has a prompt (empty for text), a target, a split and a group. A group is never divided between two splits.
Everything that is left out goes to dropped.parquet, with the reason.

reads   00_check_data: documents
writes  examples.parquet, dropped.parquet, tokenizer/; tokens/<split>, the tokens for language models (lib/token_store.py)

python 01_prepare_dataset.py --quick_test --run_dir outputs/demo
"""

from collections.abc import Iterator

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadData
from lib.log import Progress, say
from lib.runs import RunArgs

ROWS_PER_GROUP = 8192


def main(config: Config, args: RunArgs) -> None:
    from lib import durable, outside, schema
    from lib.tasks import get_task
    from lib.token_store import TokenStoreWriter
    from lib.tokenization import train_tokenizer
    from lib.training.lengths import WholeTexts

    uses = (
        "seed",
        "task",
        "data",
        "tokenizer",
        "finqa.group",
        "finqa.selection_share",
        "ranker.prompt",
        "ranker.prompt_tokens",
        "ranker.encoder",
    )
    files = outside.of_examples(config)
    with Stage(
        __file__, config, args, uses=uses, reads=("00_check_data",), files=files, restarts=True
    ) as stage:
        if stage.finished:
            return
        task = get_task(config.task)

        # First pass: the tokenizer. Characters come from all splits; BPE learns from a sample of the train split
        documents = Documents(stage, "tokenizer")
        if config.tokenizer.kind == "character":
            texts = (e.prompt + e.target for e in only_examples(task.prepare(config, documents)))
        else:
            texts = sampled_texts(config, task.prepare(config, documents), documents.num_characters)
        tokenizer = train_tokenizer(config.tokenizer.kind, texts, config.tokenizer.vocab_size)
        with durable.replacing_folder(stage.folder / "tokenizer") as folder:
            tokenizer.save_pretrained(folder)
        stage.add_folder("tokenizer", stage.folder / "tokenizer")

        # Second pass: the examples, as a table and as one token store per split
        counters = ExampleCounters(WholeTexts.of(config))
        with (
            stage.writer("examples", schema.EXAMPLES) as examples_writer,
            stage.writer("dropped", schema.DROPPED) as dropped_writer,
            durable.replacing_folder(stage.folder / "tokens") as tokens_folder,
            TokenStoreWriter(
                tokens_folder, len(tokenizer), stage.output_sha256("tokenizer")
            ) as tokens_writer,
        ):
            items = groups(task.prepare(config, Documents(stage, "examples")), ROWS_PER_GROUP)
            for (examples, dropped), ids in encoded(items, config, tokenizer, stage.folder / "tokenizer"):
                if examples:
                    table = as_table(examples, ids)
                    examples_writer.write(counters.add(table))
                    tokens_writer.add(table)
                if dropped:
                    dropped_writer.write(counters.drop(dropped))
        for split in tokens_writer.splits:
            stage.add_folder(f"tokens/{split}", stage.folder / "tokens" / split)
        counters.check(config)
        if counters.whole is not None:
            counters.whole.refuse()
        stage.stats |= counters.summary(len(tokenizer))
        say(counters.line(len(tokenizer)))


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


def groups(items, size: int):
    """(examples, dropped) in lists of `size` items together."""
    from lib.tasks import Example

    examples, dropped = [], []
    for item in items:
        (examples if isinstance(item, Example) else dropped).append(item)
        if len(examples) + len(dropped) >= size:
            yield examples, dropped
            examples, dropped = [], []
    yield examples, dropped


def encoded(items, config: Config, tokenizer, folder) -> Iterator[tuple]:
    """((examples, dropped), token ids of each example) for all items, in order. `folder` has the tokenizer."""
    from lib.tokenization import encode_batch, encode_by_processes

    processes, unknown = config.tokenizer.processes, config.tokenizer.unknown
    if processes > 1:
        yield from encode_by_processes(folder, unknown, items, targets, processes)
        return
    for group in items:
        yield group, encode_batch(tokenizer, targets(group), unknown)


def targets(group: tuple) -> list[str]:
    examples, _ = group
    return [example.target for example in examples]


def as_table(examples: list, ids: list):
    """A table of schema.EXAMPLES, with the token ids of each target."""
    import pyarrow as pa

    from lib import schema

    rows = [vars(e) | {"token_ids": i} for e, i in zip(examples, ids, strict=True)]
    return pa.Table.from_pylist(rows, schema.EXAMPLES.arrow)


class ExampleCounters:
    """Counts examples per split, and dropped ones per reason.

    `whole`: checks that the models of the config can read the examples from their first to their last token.
    """

    def __init__(self, whole) -> None:
        self.whole = whole
        self.examples: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.characters = self.unknown = self.shortened = 0

    def add(self, table):
        import pyarrow.compute as pc

        from lib.tasks import SHORTENED
        from lib.tokenization import UNK

        for split in pc.unique(table["split"]).to_pylist():
            part = table.filter(pc.equal(table["split"], split))
            self.examples[split] = self.examples.get(split, 0) + part.num_rows
            count = pc.sum(pc.list_value_length(part["token_ids"])).as_py() or 0
            self.tokens[split] = self.tokens.get(split, 0) + count
            if self.whole is not None and split != "reference":
                self.whole.add(part)
        self.shortened += sum(SHORTENED in (tags or ()) for tags in table["tags"].to_pylist())
        self.characters += pc.sum(pc.utf8_length(table["target"])).as_py()
        self.unknown += pc.sum(pc.equal(pc.list_flatten(table["token_ids"]), UNK)).as_py() or 0
        return table

    def drop(self, items: list):
        import pyarrow as pa

        from lib import schema

        for item in items:
            self.dropped[item.reason] = self.dropped.get(item.reason, 0) + 1
        return pa.Table.from_pylist([vars(i) for i in items], schema.DROPPED.arrow)

    def check(self, config: Config) -> None:
        """Raises BadData if a split with a share has no examples. `selection` must have some if train has."""
        shares = config.data.fractions | ({"selection": 1.0} if self.examples.get("train") else {})
        empty = [s for s, share in shares.items() if share > 0 and not self.examples.get(s)]
        if empty:
            raise BadData(
                f"no examples in split {', '.join(empty)} (examples per split: {self.examples}; left out: "
                f"{self.left_out()}); {_advice(config)}, or give more data"
            )

    def summary(self, vocabulary: int) -> dict:
        total = sum(self.tokens.values())
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "dropped": self.dropped,
            "shortened_prompts": self.shortened,
            "vocabulary": vocabulary,
            "unknown_share": self.unknown / max(total, 1),
            "characters_per_token": self.characters / max(total, 1),
        }

    def line(self, vocabulary: int) -> str:
        splits = ", ".join(f"{s} {n:,} ({self.tokens[s]:,} tokens)" for s, n in self.examples.items())
        line = f"examples: {splits}; vocabulary {vocabulary}; left out: {self.left_out()}"
        if self.shortened:
            line += f"; {self.shortened:,} prompts were shortened to ranker.prompt_tokens"
        return line

    def left_out(self) -> str:
        return ", ".join(f"{n:,} x {reason}" for reason, n in self.dropped.items()) or "nothing"


def _advice(config: Config) -> str:
    """Settings that give more splits an example."""
    if config.task == "finqa":
        return "set a larger finqa.selection_share or another seed"
    unit = "data.split_unit=block and " if config.data.split_unit == "document" else ""
    return f"set {unit}a smaller data.block_characters, another seed"


if __name__ == "__main__":
    run_stage(main, __doc__)
