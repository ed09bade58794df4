"""Make the candidates of stage 02's table group by group, in one process or in several.

Memory holds one group of examples and its candidates, whatever the size of the data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib import schema
from lib.artifacts import Stage
from lib.candidates.parallel import made_by_processes
from lib.config import Config
from lib.errors import BadConfig
from lib.runtime import Runtime
from lib.synthetic import MaskedLMEngine
from lib.tasks import CandidateContext, get_task

WITHOUT_CANDIDATES = "reference"  # the split of the independent reference model


class ExampleGroups:
    """The examples that get candidates, as tables of schema.EXAMPLES. They can be iterated over several times.

    A group has as many examples as give `candidates.rows_per_group` candidates.
    """

    def __init__(self, stage: Stage, config: Config) -> None:
        self.stage = stage
        self.num_examples = max(1, config.candidates.rows_per_group // config.candidates.per_example)

    def __iter__(self) -> Iterator[pa.Table]:
        for group in self.stage.tables(
            "01_prepare_dataset", "examples", schema.EXAMPLES, rows=self.num_examples
        ):
            kept = group.filter(pc.not_equal(group["split"], WITHOUT_CANDIDATES))
            if kept.num_rows:
                yield kept


def candidate_context(
    config: Config, tokenizer: Any, generators: list[Path], runtime: Runtime, examples: ExampleGroups
) -> CandidateContext:
    """What the task needs to make candidates. Some tasks look at all examples here before any candidate is made.

    Args:
        generators: folders of the masked language models. Worker processes load their own.

    Raises:
        BadConfig: the task needs all examples at once, but the config asks for several processes.
    """
    processes, task = config.candidates.processes, get_task(config.task)
    here = generators if processes == 1 else []
    engines = [MaskedLMEngine.load(folder, runtime, int8=config.candidates.int8) for folder in here]
    context = CandidateContext(config, tokenizer, engines)
    if hasattr(task, "plan_candidates"):
        if processes > 1:
            raise BadConfig(
                f"candidates.processes must be 1: task {config.task} makes candidates of all examples at once"
            )
        task.plan_candidates(examples, context)
    return context


def candidate_groups(
    context: CandidateContext, examples: ExampleGroups, generators: list[Path], tokenizer: Path
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number of examples, their candidates as a table of schema.CANDIDATES) group by group.

    `context.dropped` and `context.counts` are complete when all groups have been made.

    Args:
        generators, tokenizer: folders that worker processes load.
    """
    config = context.config
    if config.candidates.processes == 1:
        task = get_task(config.task)
        for group in examples:
            yield group.num_rows, task.candidates(group, context)
        return
    groups = made_by_processes(config, tokenizer, generators, examples, config.candidates.processes)
    for num_examples, table, dropped, counts in groups:
        context.dropped += dropped
        context.counts.update(counts)
        yield num_examples, table
