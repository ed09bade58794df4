"""
00: look at the raw data and list every problem of it at once, before any compute is spent.

Documents that are fit go on to the next stage; those that are not are named in problems.parquet with the place, what
was found, what was expected and what to do. Problems that would make training wrong end the run with exit code 65.

reads   data.path: .txt, .jsonl, .parquet or a folder of them; by default the text that every CPython carries
writes  documents.parquet, problems.parquet

python 00_check_data.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import RunArgs, Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadData
from lib.log import say

WORST_SHOWN = 5
ROWS_PER_GROUP = 256


def main(config: Config, args: RunArgs) -> None:
    from lib import schema
    from lib.tasks import Document, get_task

    task = get_task(config.task)
    uses = ("seed", "task", "data")
    with Stage(__file__, config, args, uses=uses, files=task.sources(config), restarts=True) as stage:
        if stage.finished:
            return

        # Read everything once: documents to one table, problems to the other
        problems, counts = [], {"documents": 0, "characters": 0}
        with stage.writer("documents", schema.DOCUMENTS) as writer:
            waiting: list[Document] = []
            for item in task.check(config):
                if not isinstance(item, Document):
                    problems.append(item)
                    continue
                counts["documents"] += 1
                counts["characters"] += len(item.content)
                waiting.append(item)
                if len(waiting) >= ROWS_PER_GROUP or sum(len(d.content) for d in waiting) > 2**24:
                    writer.write(as_table(waiting, schema.DOCUMENTS))
                    waiting = []
            if waiting:
                writer.write(as_table(waiting, schema.DOCUMENTS))
        stage.write("problems", as_table(problems, schema.PROBLEMS), schema.PROBLEMS)

        # Say what was found; stop here if training on it would be wrong
        stage.stats |= counts | {"problems": count_by_kind(problems)}
        say(f"{counts['documents']} documents, {counts['characters']:,} characters")
        for line in summary(problems):
            say(line)
        errors = sum(p.severity == "error" for p in problems)
        if errors:
            where = stage.shown(stage.folder / "problems.parquet")
            raise BadData(f"{errors} problems in the data must be mended first; all of them are in {where}")


def as_table(items: list, table_schema):
    import pyarrow as pa

    return pa.Table.from_pylist([vars(item) for item in items], table_schema.arrow)


def count_by_kind(problems: list) -> dict[str, int]:
    counts: dict[str, int] = {}
    for p in problems:
        counts[p.kind] = counts.get(p.kind, 0) + 1
    return counts


def summary(problems: list) -> list[str]:
    """A line per kind with its count, and the first few of each."""
    lines = []
    for severity in ("error", "warning"):
        these = [p for p in problems if p.severity == severity]
        for kind, count in count_by_kind(these).items():
            lines.append(f"{severity}: {kind} ({count})")
            shown = [p for p in these if p.kind == kind][:WORST_SHOWN]
            for p in shown:
                place = f"{p.source} {p.location}".strip()
                lines.append(f"    {place}: {p.found}; expected {p.expected}; {p.advice}")
            if count > len(shown):
                lines.append(f"    ... and {count - len(shown)} more")
    return lines


if __name__ == "__main__":
    run_stage(main, __doc__)
