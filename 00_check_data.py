"""
00: check the raw data. All problems are listed at once, before any compute is spent.

Valid documents go on to the next stage. Every problem becomes a row of problems.parquet: where it is, what was found,
what was expected and what to do about it. Problems that would make training wrong are errors: the stage then ends with
exit code 65. All others are warnings.

reads   data.path: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, or a folder of such files. The default is the
        documentation that every CPython installation includes;
        labels.path, if it is set; data.label_key and data.spans_key name labels that stand beside the text
writes  documents.parquet, problems.parquet

python 00_check_data.py --quick_test --run_dir outputs/demo
"""

import itertools
from collections.abc import Iterator

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadData
from lib.label_files import files_of, read_labels
from lib.labels import LabelCounts
from lib.log import Progress, say
from lib.room import say_room
from lib.runs import RunArgs, display_path

MAX_LISTED = 5  # problems of each kind that are printed
ROWS_PER_GROUP = 256
BYTES_OF_EMPTY_TABLES = 10_000
CHARACTERS_PER_GROUP = 2**22


def main(config: Config, args: RunArgs) -> None:
    from lib import schema
    from lib.tasks import Document, get_task

    task = get_task(config.task)
    own = ("pools",) if config.task == "pools" else ()
    uses = ("seed", "task", "data", "finqa.drop", "labels", *own)
    files = [*task.sources(config), *(files_of(config.labels.path) if config.labels.path else ())]
    with Stage(__file__, config, args, uses=uses, files=files, restarts=True) as stage:
        if stage.finished:
            return

        # Read everything once: documents go to one table, problems to the other
        num_documents = num_characters = 0
        num_bytes = sum(file.stat().st_size for file in files)
        if num_bytes:
            say_room(stage.folder, num_bytes + BYTES_OF_EMPTY_TABLES, "documents")
        counters, labels = ProblemCounters(), LabelCounts(config.data.label_classes, config.data.span_classes)
        with (
            stage.writer("documents", schema.DOCUMENTS) as documents,
            stage.writer("problems", schema.PROBLEMS) as problems,
            Progress("characters", num_bytes) as progress,
        ):
            for items in groups(itertools.chain(task.check(config), label_problems(config))):
                valid = [item for item in items if isinstance(item, Document)]
                invalid = [item for item in items if not isinstance(item, Document)]
                num_documents += sum(not document.piece for document in valid)
                num_characters += sum(len(document.content) for document in valid)
                for document in valid:
                    if not document.piece:
                        labels.add(document.label, document.spans)
                progress.update(min(num_characters, num_bytes))  # of compressed files, it is an estimate
                if valid:
                    documents.write(as_table(valid, schema.DOCUMENTS))
                if invalid:
                    counters.add(invalid)
                    problems.write(as_table(invalid, schema.PROBLEMS))

        # Report what was found; stop here if training on it would be wrong
        stage.stats |= {
            "documents": num_documents,
            "characters": num_characters,
            "problems": counters.by_kind(),
        }
        if config.data.has_labels:
            stage.stats["labels"] = labels.summary()
        say(f"{num_documents:,} documents, {num_characters:,} characters")
        if line := labels.line():
            say(line)
        for line in counters.lines():
            say(line)
        errors = counters.count("error")
        if errors:
            where = display_path(stage.folder / "problems.parquet")
            what = "1 error" if errors == 1 else f"{errors:,} errors"
            raise BadData(
                f"the data has {what}. Fix the data and run this stage again; {where} lists all problems"
            )


def label_problems(config: Config) -> Iterator:
    """The faults of the user's labels. Stage 03 checks that every example has a label."""
    from lib.tasks import Problem

    if config.labels.path is None:
        return
    labels = read_labels(config.labels.path)
    say(f"{len(labels.by_key):,} valid labels in labels.path")
    for fault in labels.faults:
        advice = "fix it in the file, and run this stage again"
        yield Problem("error", fault.kind, fault.source, fault.example, fault.found, fault.expected, advice)


def groups(items: Iterator) -> Iterator[list]:
    """Lists of items that are small enough to hold in memory."""
    group, characters = [], 0
    for item in items:
        group.append(item)
        characters += len(getattr(item, "content", ""))
        if len(group) >= ROWS_PER_GROUP or characters >= CHARACTERS_PER_GROUP:
            yield group
            group, characters = [], 0
    yield group


def as_table(items: list, table_schema):
    import pyarrow as pa

    def stored(value):
        """A lone surrogate, which no table can hold, as an escape."""
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value

    rows = [{name: stored(value) for name, value in vars(item).items()} for item in items]
    return pa.Table.from_pylist(rows, table_schema.arrow)


class ProblemCounters:
    """The number of problems of each kind, and the first few of them."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}  # (severity, kind) -> problems
        self.first: dict[tuple[str, str], list] = {}

    def add(self, problems: list) -> None:
        for problem in problems:
            kind = (problem.severity, problem.kind)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            first = self.first.setdefault(kind, [])
            if len(first) < MAX_LISTED:
                first.append(problem)

    def count(self, severity: str) -> int:
        return sum(count for kind, count in self.counts.items() if kind[0] == severity)

    def by_kind(self) -> dict[str, int]:
        return {kind: count for (_, kind), count in sorted(self.counts.items())}

    def lines(self) -> Iterator[str]:
        """One line per kind with its first problems below it; errors before warnings."""
        for (severity, kind), count in sorted(self.counts.items()):
            yield f"{severity}: {kind} ({count:,})"
            first = self.first[severity, kind]
            for problem in first:
                where = f"{problem.source} {problem.location}".strip()
                yield f"    {where}: {problem.found}; expected {problem.expected}; {problem.advice}"
            if count > len(first):
                yield f"    ... and {count - len(first):,} more"


if __name__ == "__main__":
    run_stage(main, __doc__)
