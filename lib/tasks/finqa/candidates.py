"""Stage 02 for FinQA: a pool of programs for every question, and how often its gold program is found blindly.

All questions of a page are planned together, since the gold programs of one are wrong programs of another. A ranker
reads the program with words that describe its numbers (`grounding`).
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from lib import randomness
from lib.errors import BadData
from lib.log import say, with_progress
from lib.tasks import CandidateContext, Dropped
from lib.tasks.finqa.examples import format_value
from lib.tasks.finqa.grounding import ground
from lib.tasks.finqa.leak import label_overlap, measure_leak, question_trees
from lib.tasks.finqa.near_misses import with_near_misses
from lib.tasks.finqa.numbers import PageNumbers
from lib.tasks.finqa.page import Page
from lib.tasks.finqa.pools import Candidate, Pool, PoolMaker, Unfilled
from lib.tasks.finqa.record import Record

LabelledPools = list[tuple[Record, list[Candidate], int]]  # question, its pool, index of the gold program


@dataclass
class Plan:
    """All questions with their pools.

    Attributes:
        pools: example id -> its pools (several for training), or why it has none.
        training: example id -> its pools with near misses, where a ranker learns from these instead.
        records: example id -> its record.
        splits: example id -> its split.
        off_page: example id -> a record of another page of the same split, for the off-page control.
    """

    pools: dict[str, list[Pool] | Unfilled] = field(default_factory=dict)
    training: dict[str, list[Pool]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    off_page: dict[str, Record] = field(default_factory=dict)
    _numbers: dict[str, PageNumbers] = field(default_factory=dict)

    def numbers(self, record: Record) -> PageNumbers:
        """The numbers of a page. The last few pages are cached, since questions of one page follow each other."""
        if record.filename not in self._numbers:
            if len(self._numbers) >= 64:
                self._numbers.clear()
            self._numbers[record.filename] = PageNumbers(record)
        return self._numbers[record.filename]

    def first_pools(self, split: str) -> LabelledPools:
        """The first pool of every question of a split that has one. It has no near misses."""
        found = []
        for name, pools in self.pools.items():
            if self.splits[name] == split and not isinstance(pools, Unfilled):
                pool = pools[0]
                gold = next(i for i, candidate in enumerate(pool) if candidate.kind == "gold")
                found.append((self.records[name], pool, gold))
        return found


def plan_candidates(tables: Iterable[pa.Table], context: CandidateContext) -> None:
    """Read all questions, fit a `PoolMaker` on those of the train split, and make all pools."""
    plan, groups = Plan(), {}
    for table in tables:
        columns = (table[name].to_pylist() for name in ("example_id", "record", "split", "group"))
        for name, content, split, group in zip(*columns, strict=True):
            plan.records[name], plan.splits[name] = Record.from_json(content), split
            groups[name] = group
    train_ids = [name for name, split in plan.splits.items() if split == "train"]
    maker = PoolMaker.fit(
        [plan.records[name] for name in train_ids],
        [groups[name] for name in train_ids],
        context.config.finqa.pools,
        context.config.candidates.per_example,
        context.seed,
        rewriter(context) if context.engines else None,
    )
    pages: dict[tuple[str, str], list[str]] = {}
    golds: dict[tuple[str, str], list[str]] = {}  # of records with the same question about the same page
    for name, record in plan.records.items():
        pages.setdefault((plan.splits[name], record.filename), []).append(name)
        if record.program:
            golds.setdefault((record.filename, record.question_key), []).append(record.program)
    for names in with_progress("pools of each page", list(pages.values())):
        found = maker.pools([plan.records[name] for name in names], groups[names[0]])
        plan.pools.update(zip(names, found, strict=True))
        if plan.splits[names[0]] == "train":
            _add_near_misses(plan, names, golds, context)
    for split in set(plan.splits.values()):
        plan.off_page.update(
            _off_page_records(plan, [page for page in pages if page[0] == split], pages, context)
        )
    context.plan = plan


def _add_near_misses(
    plan: Plan, names: list[str], golds: dict[tuple[str, str], list[str]], context: CandidateContext
) -> None:
    """Training pools with near misses for the questions of one page, if the config asks for them."""
    share = context.config.finqa.pools.near_misses
    page = Page(plan.records[names[0]])
    for name in names if share > 0 else ():
        pools = plan.pools[name]
        if not isinstance(pools, Unfilled):
            record = plan.records[name]
            also_right = golds.get((record.filename, record.question_key), ())
            plan.training[name] = with_near_misses(pools, record, page, share, context.seed, also_right)


def _off_page_records(
    plan: Plan, split_pages: list, pages: dict, context: CandidateContext
) -> dict[str, Record]:
    """Question -> a record of another page: of a keyed permutation of the pages, the next page."""
    order = randomness.permutation(context.seed, "finqa elsewhere", 0, len(split_pages))
    found = {}
    for index, number in enumerate(order):
        other = split_pages[order[(index + 1) % len(split_pages)]]
        for name in pages[split_pages[number]]:
            found[name] = plan.records[pages[other][0]]
    return found


def candidates(examples: pa.Table, context: CandidateContext) -> pa.Table:
    """The pools of these examples as rows of schema.CANDIDATES. Examples without a pool go to `context.dropped`."""
    plan: Plan = context.plan
    rows = []
    columns = (examples[name].to_pylist() for name in ("example_id", "split"))
    for name, split in zip(*columns, strict=True):
        pools, record = plan.pools[name], plan.records[name]
        if isinstance(pools, Unfilled):
            context.dropped.append(Dropped(name, pools.reason, record.program or ""))
            continue
        page, other = plan.numbers(record), plan.numbers(plan.off_page[name])
        pools = plan.training.get(name, pools)
        for number, candidate in enumerate(itertools.chain.from_iterable(pools)):
            rows.append(
                {
                    "example_id": name,
                    "candidate_id": number,
                    "split": split,
                    "kind": candidate.kind,
                    "text": ground(candidate.program, candidate.value, page),
                    "program": candidate.program,
                    "value": format_value(candidate.value),
                    "control": ground(candidate.program, candidate.value, page, other),
                }
            )
    return pa.Table.from_pylist(rows, _COLUMNS)


_COLUMNS = pa.schema(
    [("example_id", pa.string()), ("candidate_id", pa.int32())]
    + [(name, pa.string()) for name in ("split", "kind", "text", "program", "value", "control")]
)


def review_candidates(context: CandidateContext) -> tuple[dict, pa.Table | None]:
    """(figures of the leak, table of schema.BASELINES).

    The leak is how often question-blind scorers find the gold program. The baselines are simple methods that see it.

    Raises:
        BadData: the leak is above `finqa.pools.leak_limit`.
    """
    plan: Plan = context.plan
    train, held_out = plan.first_pools("train"), plan.first_pools("held_out")
    figures: dict = {"pools": {s: len(plan.first_pools(s)) for s in sorted(set(plan.splits.values()))}}
    if not train or not held_out:
        return figures, None
    limit = context.config.finqa.pools.leak_limit
    figures["leak"] = leak = measure_leak(train, held_out, context.seed, limit)
    say(f"gold programs found without the question (chance {1 / len(held_out[0][1]):.1%}):")
    for row in leak["rows"]:
        say(
            f"  {row['scorer']}, {row['sees']}: {row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        )
    if leak["worst_upper_bound"] > limit:
        raise BadData(
            f"a question-blind scorer finds up to {leak['worst_upper_bound']:.1%} of the gold programs, more than "
            f"finqa.pools.leak_limit ({limit:.1%}). A ranker could learn this shortcut instead of reading the question. "
            "Use more training pages, more finqa.pools.rounds or a larger finqa.pools.bank, or raise the limit"
        )
    tested = [item for split in ("selection", "held_out", "test") for item in plan.first_pools(split)]
    return figures, _baselines(train, tested, context)


def _baselines(train: LabelledPools, tested: LabelledPools, context: CandidateContext) -> pa.Table:
    """Scores (schema.BASELINES) of methods that see the question but do not learn words."""
    trees = question_trees(train, tested, context.seed)
    overlap = label_overlap(tested)
    return pa.table(
        {
            "example_id": [record.id for record, pool, _ in tested for _ in pool],
            "candidate_id": pa.array([i for _, pool, _ in tested for i in range(len(pool))], pa.int32()),
            "score_overlap": np.concatenate(overlap),
            "score_trees": np.concatenate(trees),
        }
    )


def rewriter(context: CandidateContext) -> Callable[[list[str]], list[str]]:
    """A function that replaces the arguments of programs by samples of the masked LM."""
    from lib.tasks.finqa.rewriting import rewrite_arguments

    return lambda programs: rewrite_arguments(programs, context)
