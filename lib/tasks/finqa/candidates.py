"""Stage 02 for FinQA: a pool of programs for every question, and how well it can be guessed without the question.

All questions of a page are planned together, since the wrong programs of one are the gold ones of another. What a
ranker reads is the program with the words that belong to its numbers (`grounding`).
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from lib import randomness
from lib.errors import BadData
from lib.log import say
from lib.tasks import CandidateContext, Dropped
from lib.tasks.finqa.examples import written
from lib.tasks.finqa.grounding import ground
from lib.tasks.finqa.leak import label_overlap, measure_leak, question_trees
from lib.tasks.finqa.numbers import PageNumbers
from lib.tasks.finqa.pools import Candidate, Pool, PoolMaker, Unfilled
from lib.tasks.finqa.record import Record

Measured = list[tuple[Record, list[Candidate], int]]  # question, its pool, place of the gold one


@dataclass
class Plan:
    """All questions with their pools.

    Attributes:
        pools: example id -> its pools, several for training, or why there are none.
        records: example id -> its record.
        splits: example id -> its split.
        elsewhere: example id -> another page of the same split, where its numbers mean nothing.
    """

    pools: dict[str, list[Pool] | Unfilled] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, Record] = field(default_factory=dict)
    _numbers: dict[str, PageNumbers] = field(default_factory=dict)

    def numbers(self, record: Record) -> PageNumbers:
        """The page's numbers; the last few are kept, since questions of one page follow each other."""
        if record.filename not in self._numbers:
            if len(self._numbers) >= 64:
                self._numbers.clear()
            self._numbers[record.filename] = PageNumbers(record)
        return self._numbers[record.filename]

    def measured(self, split: str) -> Measured:
        """The first pool of every question of a split that has one."""
        found = []
        for name, pools in self.pools.items():
            if self.splits[name] == split and not isinstance(pools, Unfilled):
                pool = pools[0]
                gold = next(i for i, candidate in enumerate(pool) if candidate.kind == "gold")
                found.append((self.records[name], pool, gold))
        return found


def plan_candidates(tables: Iterable[pa.Table], context: CandidateContext) -> None:
    """Read all questions, learn from those of the train split what wrong programs look like, and make every pool."""
    plan, groups = Plan(), {}
    for table in tables:
        columns = (table[name].to_pylist() for name in ("example_id", "record", "split", "group"))
        for name, content, split, group in zip(*columns, strict=True):
            plan.records[name], plan.splits[name] = Record.from_json(content), split
            groups[name] = group
    taught = [name for name, split in plan.splits.items() if split == "train"]
    maker = PoolMaker.fit(
        [plan.records[name] for name in taught],
        [groups[name] for name in taught],
        context.config.finqa.pools,
        context.config.candidates.per_example,
        context.seed,
        rewriter(context) if context.engines else None,
    )
    pages: dict[tuple[str, str], list[str]] = {}
    for name, record in plan.records.items():
        pages.setdefault((plan.splits[name], record.filename), []).append(name)
    for names in pages.values():
        found = maker.pools([plan.records[name] for name in names], groups[names[0]])
        plan.pools.update(zip(names, found, strict=True))
    for split in set(plan.splits.values()):
        plan.elsewhere.update(_elsewhere(plan, [page for page in pages if page[0] == split], pages, context))
    context.plan = plan


def _elsewhere(plan: Plan, here: list, pages: dict, context: CandidateContext) -> dict[str, Record]:
    """Every question's other page: the pages in a keyed order, each followed by the next."""
    order = randomness.permutation(context.seed, "finqa elsewhere", 0, len(here))
    found = {}
    for place, number in enumerate(order):
        other = here[order[(place + 1) % len(here)]]
        for name in pages[here[number]]:
            found[name] = plan.records[pages[other][0]]
    return found


def candidates(examples: pa.Table, context: CandidateContext) -> pa.Table:
    """The pools of these examples as rows of schema.CANDIDATES; those without a pool go to `context.dropped`."""
    plan: Plan = context.plan
    rows = []
    columns = (examples[name].to_pylist() for name in ("example_id", "split"))
    for name, split in zip(*columns, strict=True):
        pools, record = plan.pools[name], plan.records[name]
        if isinstance(pools, Unfilled):
            context.dropped.append(Dropped(name, pools.reason, record.program or ""))
            continue
        page, other = plan.numbers(record), plan.numbers(plan.elsewhere[name])
        for number, candidate in enumerate(itertools.chain.from_iterable(pools)):
            rows.append(
                {
                    "example_id": name,
                    "candidate_id": number,
                    "split": split,
                    "kind": candidate.kind,
                    "text": ground(candidate.program, candidate.value, page),
                    "program": candidate.program,
                    "value": written(candidate.value),
                    "control": ground(candidate.program, candidate.value, page, other),
                }
            )
    return pa.Table.from_pylist(rows, _COLUMNS)


_COLUMNS = pa.schema(
    [("example_id", pa.string()), ("candidate_id", pa.int32())]
    + [(name, pa.string()) for name in ("split", "kind", "text", "program", "value", "control")]
)


def review_candidates(context: CandidateContext) -> tuple[dict, pa.Table | None]:
    """How often scorers that never see the question find the gold program, and what simple ones that do see it score.

    Raises BadData when the leak is above `finqa.pools.leak_limit`.
    """
    plan: Plan = context.plan
    train, held_out = plan.measured("train"), plan.measured("held_out")
    figures: dict = {"pools": {s: len(plan.measured(s)) for s in sorted(set(plan.splits.values()))}}
    if not train or not held_out:
        return figures, None
    limit = context.config.finqa.pools.leak_limit
    figures["leak"] = leak = measure_leak(train, held_out, context.seed, limit)
    say(f"found without the question (chance {1 / len(held_out[0][1]):.1%}):")
    for row in leak["rows"]:
        say(
            f"  {row['scorer']}, {row['sees']}: {row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        )
    if leak["worst_upper_bound"] > limit:
        raise BadData(
            f"a scorer that never sees the question finds up to {leak['worst_upper_bound']:.1%} of the gold programs, "
            f"above finqa.pools.leak_limit ({limit:.1%}): a ranker could learn that instead of reading. Give more "
            "training pages, more finqa.pools.rounds or a larger finqa.pools.bank; or raise the limit knowingly"
        )
    tested = [item for split in ("selection", "held_out", "test") for item in plan.measured(split)]
    return figures, _baselines(train, tested, context)


def _baselines(train: Measured, tested: Measured, context: CandidateContext) -> pa.Table:
    """Scores (schema.BASELINES) of methods that see the question but learn no words."""
    trees = question_trees(train, tested, context.seed)
    overlap = label_overlap(tested)
    names = [record.id for record, _, _ in tested]
    return pa.table(
        {
            "example_id": np.repeat(
                np.asarray(names, dtype=object), [len(pool) for _, pool, _ in tested]
            ).tolist(),
            "candidate_id": pa.array([i for _, pool, _ in tested for i in range(len(pool))], pa.int32()),
            "score_overlap": np.concatenate(overlap),
            "score_trees": np.concatenate(trees),
        }
    )


def rewriter(context: CandidateContext) -> Callable[[list[str]], list[str]]:
    """A function that has the masked LM write the arguments of programs anew."""
    from lib.tasks.finqa.rewriting import rewrite_arguments

    return lambda programs: rewrite_arguments(programs, context)
