"""The page of a question as programs use it: the numbers, their rows, columns and sentences, and how they look."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lib.tasks.finqa.numbers import PageNumbers, Span
from lib.tasks.finqa.program import Argument, Step
from lib.tasks.finqa.record import Record

_TOTAL = re.compile(r"\b(total|totals|net|ending|end|balance|aggregate)\b")
_NEXT_WORD = re.compile(r"[ )]*(%|percent|million|billion|thousand|shares|years|employees|per)?")


class Page(PageNumbers):
    """The numbers of a page and how each looks. A template uses this to find numbers that look alike."""

    def __init__(self, record: Record):
        super().__init__(record)
        self._found: dict[str, list[Span]] = {}
        self._located: dict[tuple[str, ...], dict[str, Span | None]] = {}
        self.labels: dict[Span, list[str]] = {}  # cache of `features.label_of`

    def find(self, argument: str) -> list[Span]:
        if argument not in self._found:
            self._found[argument] = super().find(argument)
        return self._found[argument]

    def locate(self, numbers: Sequence[str]) -> dict[str, Span | None]:
        """The span of each number of one program, None where the page lacks it.

        Of several spans, the one that shares a row, column or sentence with most of the other numbers.
        """
        key = tuple(numbers)
        if key not in self._located:
            self._located[key] = self._locate(key)
        return self._located[key]

    def _locate(self, numbers: Sequence[str]) -> dict[str, Span | None]:
        found = {number: self.find(number) for number in numbers}
        chosen: dict[str, Span | None] = {}
        for number, spans in found.items():
            if len(spans) < 2:
                chosen[number] = spans[0] if spans else None
                continue
            others = [p for other, ps in found.items() if other != number for p in ps]
            chosen[number] = max(spans, key=lambda span: self._merit(span, number, others))
        return chosen

    def _merit(self, span: Span, number: str, others: list[Span]) -> tuple:
        shared = sum(in_line(span, other) for other in others)
        return shared, span.in_table, span.in_table and span.row * span.column > 0, span.text == number

    @cached_property
    def cells(self) -> list[Span]:
        """The numbers of the table, without those in the header and in row names."""
        return [p for p in self.spans if p.row > 0 and p.column > 0]

    @cached_property
    def headers(self) -> list[Span]:
        return [p for p in self.spans if p.in_table and p.row * p.column == 0]

    @cached_property
    def in_text(self) -> list[Span]:
        return [p for p in self.spans if not p.in_table]

    @cached_property
    def by_sentence(self) -> dict[int, list[Span]]:
        sentences: dict[int, list[Span]] = {}
        for span in self.in_text:
            sentences.setdefault(span.sentence, []).append(span)
        return sentences

    @cached_property
    def at(self) -> dict[tuple[int, int], Span]:
        """The first number of each cell."""
        return {(p.row, p.column): p for p in reversed(self.cells)}

    @cached_property
    def total_rows(self) -> frozenset[int]:
        return frozenset(r for r in range(1, len(self.table)) if _TOTAL.search(self.row_name(r).lower()))

    def look(self, span: Span) -> tuple:
        """How a number looks: like a year, a percentage, an amount in dollars, millions, shares."""
        if span.in_table:
            return span.year_like, span.percent
        sentence = self.sentences[span.sentence]
        word = _NEXT_WORD.match(sentence, span.end)
        dollars = sentence[: span.start].rstrip().endswith("$")
        return span.year_like, span.percent, dollars, word[1] if word else None

    @cached_property
    def by_look(self) -> dict[tuple, list[Span]]:
        """The numbers by kind ("cell", "header", "text") and look."""
        looks: dict[tuple, list[Span]] = {}
        for span in self.spans:
            looks.setdefault((kind_of(span), *self.look(span)), []).append(span)
        return looks


@dataclass(frozen=True)
class PageQuestions:
    """All questions of one page of one split.

    Attributes:
        records: the questions.
        group: pages of one group (a page or a report) stay in one fold.
    """

    records: Sequence[Record]
    page: Page
    group: str


def kind_of(span: Span) -> str:
    """Where a number is: "text", "cell" or "header" (the header row or a row name)."""
    if not span.in_table:
        return "text"
    return "cell" if span.row * span.column else "header"


def in_line(span: Span, other: Span) -> bool:
    """Whether two numbers share a row, a column or a sentence."""
    if span.in_table:
        return other.in_table and (span.row == other.row or span.column == other.column)
    return span.sentence == other.sentence


def numbers_of(steps: Iterable[Step]) -> list[str]:
    """The numbers of a program as written, each once, without constants, references and row names."""
    found = {}
    for step in steps:
        if not step.reads_table:
            for argument in (step.first, step.second):
                if is_number(argument):
                    found[argument.text] = None
    return list(found)


def is_number(argument: Argument) -> bool:
    """Whether an argument is a number, and no constant."""
    return argument.value is not None and not argument.text.startswith("const_")


def skeleton(steps: Sequence[Step]) -> str:
    """The operations, references and constants of a program, with N for each number and R for each row."""
    parts = []
    for step in steps:
        row = "R" if step.reads_table else None
        first, second = (row or ("N" if is_number(a) else a.text) for a in (step.first, step.second))
        parts.append(f"{step.operation}({first},{second})")
    return " ".join(parts)
