"""Pools of programs without a shortcut: the gold one of a question and wrong ones that only the question rules out.

Known here: the questions of a page, and what the train split taught. A pool holds golds of other questions of the page
and programs from its bank, drawn so that scorers which never see the question cannot tell the gold one (`Filter`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.sections.finqa import PoolsConfig
from lib.tasks.finqa.bank import Bank, make_bank, value_of
from lib.tasks.finqa.changes import walks
from lib.tasks.finqa.filter import Filter
from lib.tasks.finqa.places import Page
from lib.tasks.finqa.program import ProgramError, execute
from lib.tasks.finqa.record import Record
from lib.tasks.finqa.templates import Templates, learn


@dataclass(frozen=True)
class Candidate:
    """`kind` is "gold", "page_gold" (of another question), "template", "chain" or "masked_lm"."""

    program: str
    value: float | str
    kind: str


@dataclass(frozen=True)
class Unfilled:
    """Why a question has no pool."""

    reason: str


Pool = list[Candidate]
Rewrite = Callable[[list[str]], list[str]]


class PoolMaker:
    """Makes the pools of a page. What it makes is a function of the seed, the settings, the page and the train split."""

    def __init__(
        self, templates: Templates, settings: PoolsConfig, size: int, seed: int, rewrite: Rewrite | None
    ):
        self.templates = templates
        self.settings = settings
        self.size = size
        self.seed = seed
        self.rewrite = rewrite
        self.filter = Filter(settings, size, seed)
        self._taught: dict[
            tuple[str, ...], list[list[Pool] | Unfilled]
        ] = {}  # ids of a train page -> its pools

    @classmethod
    def fit(
        cls,
        train: Sequence[Record],
        groups: Sequence[str],
        settings: PoolsConfig,
        size: int,
        seed: int,
        rewrite: Rewrite | None = None,
    ) -> "PoolMaker":
        """Learn from the train split's questions, in any order.

        Args:
            groups: of each question; those of one group (a page or a report) are never in two folds.
            size: candidates of a pool.
            rewrite: gives each program other numbers; what it gives may be no program.
        """
        pages: dict[str, list[int]] = {}  # page -> its questions by id
        for number in sorted(range(len(train)), key=lambda i: train[i].id):
            pages.setdefault(train[number].filename, []).append(number)
        views = {name: Page(train[members[0]]) for name, members in pages.items()}
        templates = [
            learn(train[i], views[name], groups[i])
            for name, members in sorted(pages.items())
            for i in members
            if value_of(train[i].program or "", train[i]) is not None
        ]
        maker = cls(Templates(templates), settings, size, seed, rewrite)
        if not templates:
            return maker
        banks = [
            maker._bank([train[i] for i in members], groups[members[0]], views[name])
            for name, members in sorted(pages.items())
        ]
        banks = [bank for bank in banks if bank.programs]
        for bank, drawn in zip(banks, maker.filter.fit(banks), strict=True):
            maker._taught[_ids(bank.records)] = maker._pools(bank, drawn)
        return maker

    def pools(self, page: Sequence[Record], group: str) -> list[list[Pool] | Unfilled]:
        """Pools, or why there are none, for each question: `page` has all questions of one page of one split.

        One pool, and `train_draws` of them for the questions that this learned from.
        """
        if not self.templates.usable:
            return [Unfilled("the train split has no programs to learn templates from") for _ in page]
        order = sorted(range(len(page)), key=lambda i: page[i].id)
        records = [page[i] for i in order]
        found = self._taught.get(_ids(records))
        if found is None:
            bank = self._bank(records, group, Page(records[0]))
            found = self._pools(bank, self.filter.draw(bank))
        return [found[order.index(i)] for i in range(len(page))]

    def _bank(self, records: Sequence[Record], group: str, page: Page) -> Bank:
        settings = self.settings
        changed = []
        if settings.corruption_rate > 0 and (settings.changes.chain or settings.changes.masked_lm):
            changed = walks(records, page, self.size - 1, settings.changes, _runs, self.rewrite, self.seed)
        return make_bank(
            records, page, group, self.templates, settings.bank, settings.same_operators,
            settings.min_difference, self.seed, changed,
        )  # fmt: skip

    def _pools(self, bank: Bank, drawn: dict[int, np.ndarray]) -> list[list[Pool] | Unfilled]:
        return [self._of_question(bank, drawn, question) for question in range(len(bank.records))]

    def _of_question(self, bank: Bank, drawn: dict[int, np.ndarray], question: int) -> list[Pool] | Unfilled:
        gold, record = bank.golds[question], bank.records[question]
        if gold < 0:
            return Unfilled(_why_no_gold(record))
        if question not in drawn:
            return Unfilled(
                f"fewer than {self.size} programs of different value could be made of the page's numbers"
            )
        pools = []
        for number, members in enumerate(drawn[question]):
            order = randomness.permutation(self.seed, f"finqa order {record.id}", number, self.size)
            pools.append([self._candidate(bank, int(members[i]), gold) for i in order])
        return pools

    def _candidate(self, bank: Bank, number: int, gold: int) -> Candidate:
        kind = bank.kinds[number]
        if kind == "gold" and number != gold:
            kind = "page_gold"
        return Candidate(bank.programs[number], float(bank.values[number]), kind)


def _ids(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(record.id for record in records)


def _runs(program: str, record: Record) -> bool:
    return value_of(program, record) is not None


def _why_no_gold(record: Record) -> str:
    if record.program is None:
        return "no gold program"
    try:
        value = execute(record.program, record.table)
    except ProgramError as error:
        return f"the gold program cannot run: {error.what}"
    return f'a yes/no question, answered "{value}": there are only two values'
