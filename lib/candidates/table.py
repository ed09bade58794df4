"""The parts of stage 02's table of candidates. One group of examples makes one part.

Memory holds one group and its candidates, whatever the size of the data.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib import schema
from lib.artifacts import Stage
from lib.candidates.counters import CandidateCounters
from lib.config import Config
from lib.stage.parts import Parts
from lib.stage.table_files import TableFiles
from lib.synthetic import load_engines
from lib.tasks import CandidateContext, get_task
from lib.training.lengths import WholeTexts

TYPICAL_POOL = 16  # candidates of an example of the user's own, of which each may have another number
WITHOUT_CANDIDATES = "reference"  # the split of the independent reference model


@dataclass(frozen=True)
class ExampleGroups:
    """The examples that get candidates, in groups. They can be iterated over several times.

    A group has as many examples as give about `candidates.rows_per_group` candidates.
    """

    examples: TableFiles
    num_examples: int  # per group, with those that get no candidates

    @classmethod
    def of(cls, stage: Stage, config: Config) -> "ExampleGroups":
        size = TYPICAL_POOL if config.candidates.source == "file" else config.candidates.per_example
        number = max(1, config.candidates.rows_per_group // size)
        return cls(stage.table("01_prepare_dataset", "examples"), number)

    def __len__(self) -> int:
        return -(-self.examples.rows // self.num_examples)

    def group(self, number: int) -> pa.Table | None:
        """A table of schema.EXAMPLES; None if none of the group gets candidates."""
        start, stop = number * self.num_examples, (number + 1) * self.num_examples
        tables = self.examples.tables(schema.EXAMPLES, None, self.num_examples, start, stop)
        group = pa.concat_tables(tables)
        kept = group.filter(pc.not_equal(group["split"], WITHOUT_CANDIDATES))
        return kept if kept.num_rows else None

    def __iter__(self) -> Iterator[pa.Table]:
        for number in range(len(self)):
            if (group := self.group(number)) is not None:
                yield group


@dataclass(frozen=True)
class CandidateWork:
    """Makes the parts of the table of candidates.

    Attributes:
        tokenizer, generators: folders that each worker loads.
        planned: the context of a task that has planned all candidates at once; its parts are made in this process.
    """

    config: Config
    parts: Parts
    groups: ExampleGroups
    tokenizer: Path
    generators: list[Path]
    planned: CandidateContext | None = field(default=None, compare=False)

    @property
    def uses_device(self) -> bool:
        return bool(self.generators)

    @property
    def only_here(self) -> bool:
        return self.planned is not None

    def open(self, threads: int | None):
        """Load the tokenizer and the masked LMs. Returns a function that makes the part of a number."""
        context = self.planned or self.new_context(threads)
        dropped, counts = list(context.dropped), Counter(context.counts)  # by a plan; they count in part 0

        def make(number: int) -> None:
            context.dropped[:] = [] if number else dropped
            context.counts = Counter() if number else Counter(counts)
            self._make(number, context)

        return make

    def new_context(self, threads: int | None = None) -> CandidateContext:
        """A context with the tokenizer and the masked LMs."""
        import torch

        from lib.runtime import Runtime
        from lib.tokenization import load_tokenizer

        if threads is not None:
            torch.set_num_threads(threads)
        runtime = Runtime.detect(self.config)
        tokenizer = load_tokenizer(self.tokenizer)
        engines = load_engines(self.generators, self.config.candidates, runtime, tokenizer)
        return CandidateContext(self.config, tokenizer, engines)

    def _make(self, number: int, context: CandidateContext) -> None:
        counters = CandidateCounters(self.config.candidates.label_rule == "origin")
        lengths = WholeTexts.of(self.config)
        with self.parts.writing(number) as part:
            group = self.groups.group(number)
            table = None if group is None else get_task(self.config.task).candidates(group, context)
            if table is not None and table.num_rows:
                part.write("candidates", table)
                counters.add(table)
                if lengths is not None:
                    lengths.add(table)
            for engine in context.engines:
                part.environment |= engine.environment()
            counters.drop(context.dropped)
            dropped = [vars(d) for d in context.dropped]
            part.write("dropped", pa.Table.from_pylist(dropped, schema.DROPPED.arrow))
            part.counters = {"candidates": counters.state(), "task": dict(context.counts)}
            if lengths is not None:
                part.counters["lengths"] = lengths.state()


def plan(config: Config, work: CandidateWork) -> CandidateContext | None:
    """The context in which the task has planned the candidates of all examples; None if the task plans none."""
    task = get_task(config.task)
    if not hasattr(task, "plan_candidates"):
        return None
    context = work.new_context()
    task.plan_candidates(work.groups, context)
    return context


def merged_counters(
    config: Config, parts: Iterator[dict[str, Any]]
) -> tuple[CandidateCounters, WholeTexts | None, Counter[str]]:
    """The counters of all parts together: of candidates, of their lengths, and of the task."""
    counters = CandidateCounters(config.candidates.label_rule == "origin")
    lengths, task = WholeTexts.of(config), Counter()
    for part in parts:
        counters.merge(part["candidates"])
        task.update(part["task"])
        if lengths is not None:
            lengths.merge(part["lengths"])
    return counters, lengths, task
