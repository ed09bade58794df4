"""
00: look at the raw data and list every problem of it at once, before any compute is spent.

Documents that are fit go on to the next stage; those that are not are named in problems.parquet with the place, what
was found, what was expected and what to do. Problems that would make training wrong end the run with exit code 65.

reads   data.path: .txt, .jsonl, .json, .csv, .tsv, .parquet or a folder of them; by default the text that every CPython
        carries;
        labels.path, if it is set
writes  documents.parquet, problems.parquet

python 00_check_data.py --quick_test --run_dir outputs/demo
"""

import itertools
from collections.abc import Iterator

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadData
from lib.labels import files_of, read_labels
from lib.log import say
from lib.runs import RunArgs, display_path

SHOWN_PER_KIND = 5
ROWS_PER_GROUP = 256
CHARACTERS_PER_GROUP = 2**24


def main(config: Config, args: RunArgs) -> None:
    from lib import schema
    from lib.tasks import Document, get_task

    task = get_task(config.task)
    uses = ("seed", "task", "data", "finqa.drop", "labels")
    files = [*task.sources(config), *(files_of(config.labels.path) if config.labels.path else ())]
    with Stage(__file__, config, args, uses=uses, files=files, restarts=True) as stage:
        if stage.finished:
            return

        # Read everything once: documents to one table, problems to the other
        documents = characters = 0
        counters = LabelCounters()
        with (
            stage.writer("documents", schema.DOCUMENTS) as kept,
            stage.writer("problems", schema.PROBLEMS) as problems,
        ):
            for items in groups(itertools.chain(task.check(config), label_problems(config))):
                fit = [item for item in items if isinstance(item, Document)]
                faults = [item for item in items if not isinstance(item, Document)]
                documents, characters = documents + len(fit), characters + sum(len(d.content) for d in fit)
                if fit:
                    kept.write(as_table(fit, schema.DOCUMENTS))
                if faults:
                    counters.add(faults)
                    problems.write(as_table(faults, schema.PROBLEMS))

        # Say what was found; stop here if training on it would be wrong
        stage.stats |= {"documents": documents, "characters": characters, "problems": counters.by_kind()}
        say(f"{documents:,} documents, {characters:,} characters")
        for line in counters.lines():
            say(line)
        errors = counters.count("error")
        if errors:
            where = display_path(stage.folder / "problems.parquet")
            what = "1 problem" if errors == 1 else f"{errors:,} problems"
            raise BadData(f"{what} in the data must be mended first; see {where} for all that was found")


def label_problems(config: Config) -> Iterator:
    """What is wrong with the user's own labels. Whether every example has one shows in stage 03."""
    from lib.tasks import Problem

    if config.labels.path is None:
        return
    labels = read_labels(config.labels.path)
    say(f"{len(labels.by_key):,} labels of your own")
    for fault in labels.faults:
        advice = "mend it in the file, and run this stage again"
        yield Problem("error", fault.kind, fault.source, fault.example, fault.found, fault.expected, advice)


def groups(items: Iterator) -> Iterator[list]:
    """Lists of items, short enough to hold in memory."""
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

    return pa.Table.from_pylist([vars(item) for item in items], table_schema.arrow)


class LabelCounters:
    """How many problems of each kind there are, and the first few of them."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}  # (severity, kind)
        self.first: dict[tuple[str, str], list] = {}

    def add(self, problems: list) -> None:
        for p in problems:
            kind = (p.severity, p.kind)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            shown = self.first.setdefault(kind, [])
            if len(shown) < SHOWN_PER_KIND:
                shown.append(p)

    def count(self, severity: str) -> int:
        return sum(n for kind, n in self.counts.items() if kind[0] == severity)

    def by_kind(self) -> dict[str, int]:
        return {kind: n for (_, kind), n in sorted(self.counts.items())}

    def lines(self) -> Iterator[str]:
        """Errors before warnings; a line per kind, its first few below."""
        for (severity, kind), count in sorted(self.counts.items()):
            yield f"{severity}: {kind} ({count:,})"
            shown = self.first[severity, kind]
            for p in shown:
                place = f"{p.source} {p.location}".strip()
                yield f"    {place}: {p.found}; expected {p.expected}; {p.advice}"
            if count > len(shown):
                yield f"    ... and {count - len(shown):,} more"


if __name__ == "__main__":
    run_stage(main, __doc__)
