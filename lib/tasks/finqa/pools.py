"""Pools without a shortcut: the gold program of a question, and wrong programs that only the question rules out.

A pool holds gold programs of other questions of the page, and programs from the bank of the page. They are drawn so that
question-blind scorers cannot find the gold program (`AdversarialFilter`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.log import with_progress
from lib.sections.finqa import PoolsConfig
from lib.tasks.finqa.adversarial_filter import AdversarialFilter
from lib.tasks.finqa.bank import Bank, make_bank, value_of
from lib.tasks.finqa.changes import walks
from lib.tasks.finqa.page import Page, PageQuestions
from lib.tasks.finqa.program import ProgramError, execute
from lib.tasks.finqa.record import Record
from lib.tasks.finqa.templates import Templates, learn_template


@dataclass(frozen=True)
class Candidate:
    """A program of a pool. `kind` is "gold", "page_gold" (of another question), "template", "chain", "masked_lm" or "near_miss"."""

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
    """Makes the pools of a page: a function of the seed, the settings, the page and the train split.

    Args:
        size: number of candidates of a pool, K.
        rewrite: see `fit`.
    """

    def __init__(
        self, templates: Templates, settings: PoolsConfig, size: int, seed: int, rewrite: Rewrite | None
    ):
        self.templates = templates
        self.settings = settings
        self.size = size
        self.seed = seed
        self.rewrite = rewrite
        self.filter = AdversarialFilter(settings, size, seed)
        # Ids of the questions of a train page -> their pools
        self._train_pools: dict[tuple[str, ...], list[list[Pool] | Unfilled]] = {}

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
        """Learn templates and scorers from the questions of the train split, in any order.

        Args:
            groups: the group of each question. A group (a page or a report) is never in two folds.
            size: number of candidates of a pool, K.
            rewrite: replaces the numbers of each program. A result may be no valid program.
        """
        pages: dict[str, list[int]] = {}  # page -> its questions by id
        for number in sorted(range(len(train)), key=lambda i: train[i].id):
            pages.setdefault(train[number].filename, []).append(number)
        views = {name: Page(train[members[0]]) for name, members in pages.items()}
        templates = [
            learn_template(train[i], views[name], groups[i])
            for name, members in sorted(pages.items())
            for i in members
            if value_of(train[i].program or "", train[i]) is not None
        ]
        maker = cls(Templates(templates), settings, size, seed, rewrite)
        if not templates:
            return maker
        banks = [
            maker._bank(PageQuestions([train[i] for i in members], views[name], groups[members[0]]))
            for name, members in with_progress("programs of each page", sorted(pages.items()))
        ]
        banks = [bank for bank in banks if bank.programs]
        for bank, drawn in zip(banks, maker.filter.fit(banks), strict=True):
            maker._train_pools[_ids(bank.records)] = maker._pools(bank, drawn)
        return maker

    def pools(self, page: Sequence[Record], group: str) -> list[list[Pool] | Unfilled]:
        """For each question its pools, or why it has none. Questions that `fit` learned from have `train_draws` pools.

        Args:
            page: all questions of one page of one split.
        """
        if not self.templates.usable:
            return [Unfilled("the train split has no programs to learn templates from") for _ in page]
        order = sorted(range(len(page)), key=lambda i: page[i].id)
        records = [page[i] for i in order]
        found = self._train_pools.get(_ids(records))
        if found is None:
            bank = self._bank(PageQuestions(records, Page(records[0]), group))
            found = self._pools(bank, self.filter.draw(bank))
        return [found[order.index(i)] for i in range(len(page))]

    def _bank(self, questions: PageQuestions) -> Bank:
        settings = self.settings
        changed = []
        if settings.corruption_rate > 0 and (settings.changes.chain or settings.changes.masked_lm):
            changed = walks(questions, self.size - 1, settings.changes, _runs, self.rewrite, self.seed)
        return make_bank(questions, self.templates, settings, self.seed, changed)

    def _pools(self, bank: Bank, drawn: dict[int, np.ndarray]) -> list[list[Pool] | Unfilled]:
        return [self._of_question(bank, drawn, question) for question in range(len(bank.records))]

    def _of_question(self, bank: Bank, drawn: dict[int, np.ndarray], question: int) -> list[Pool] | Unfilled:
        gold, record = bank.golds[question], bank.records[question]
        if gold < 0:
            return Unfilled(_why_no_gold(record))
        if question not in drawn:
            return Unfilled(
                f"fewer than {self.size} programs of different value could be made from the page's numbers"
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
    return f'a yes/no question, answered "{value}": only two values are possible'
