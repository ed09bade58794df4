"""The numbers of a page: how they are written, where they are, and which of them a program uses.

A number is found by its digits: `$ 1,234`, `1234` and `-1234 ( 1234 )` are the same number, because programs
write most numbers without sign and commas. A percentage is found as `12` and as `0.12`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lib.tasks.finqa.page_text import plain_cell
from lib.tasks.finqa.program import parse
from lib.tasks.finqa.record import Record

_UNSIGNED = re.compile(r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:\.(?= ?%))?( ?%)?")  # FinQA has "33.%" too
NUMBER = re.compile(rf"(-[ $]*)?{_UNSIGNED.pattern}")  # groups: the minus, the percent sign
_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
_NUMBER_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b")


def numbers_in(text: str) -> set[str]:
    """Every number of a text, without sign and commas. A percentage has two forms, `12` and `0.12`."""
    found = set()
    for match in _UNSIGNED.finditer(text):
        found.update(_forms(match[0], bool(match[1])))
    found.update(_plain(_WORDS.index(word)) for word in _NUMBER_WORD.findall(text.lower()))
    return found


def _forms(written: str, percent: bool) -> list[str]:
    """The forms of an unsigned number. The first is the form in which it is written."""
    digits = float(written.rstrip("% .").replace(",", ""))
    return [_plain(digits), _plain(digits / 100)] if percent else [_plain(digits)]


def _plain(number: float) -> str:
    return f"{abs(number):.10g}"


def operands(program: str) -> list[str]:
    """The numbers of a program as written, without constants. Raises ProgramError."""
    arguments = [a for step in parse(program) if not step.reads_table for a in (step.first, step.second)]
    return [a.text for a in arguments if a.value is not None and not a.text.startswith("const_")]


@dataclass(frozen=True)
class Span:
    """One occurrence of a number on a page, in a cell or in a sentence.

    Attributes:
        text: the number as programs write it by default: without `$` and commas, with `-` and `%` where the page has them.
        start, end: characters of the sentence or of the cell.
        row, column: of the cell, counted from 0; -1 in a sentence.
        sentence: index of the sentence, pre_text before post_text; -1 in a cell.
    """

    text: str
    negative: bool
    percent: bool
    start: int
    end: int
    row: int = -1
    column: int = -1
    sentence: int = -1

    @property
    def in_table(self) -> bool:
        return self.row >= 0

    @property
    def value(self) -> float:
        """The value of `text`: `12%` is 0.12."""
        value = float(self.text.rstrip("%"))
        return value / 100 if self.percent else value

    @property
    def year_like(self) -> bool:
        return self.text.isdigit() and len(self.text) == 4 and self.text[:2] in ("19", "20")


class PageNumbers:
    """Every number of a page, with an index by form.

    Header cells and row names are searched too, because their years can be operands. Numbers written as words have no
    span.
    """

    def __init__(self, record: Record):
        self.table = record.table
        self.sentences = (*record.pre_text, *record.post_text)
        self.spans = [*self._in_table(), *self._in_sentences()]

    def _in_table(self) -> Iterator[Span]:
        for row, cells in enumerate(self.table):
            for column, cell in enumerate(cells):
                for match in NUMBER.finditer(plain_cell(cell)):
                    yield _span(match, row=row, column=column)

    def _in_sentences(self) -> Iterator[Span]:
        for number, sentence in enumerate(self.sentences):
            for match in NUMBER.finditer(sentence):
                yield _span(match, sentence=number)

    @cached_property
    def _by_form(self) -> dict[str, list[Span]]:
        index: dict[str, list[Span]] = {}
        for span in self.spans:
            for form in _forms(span.text.lstrip("-"), span.percent):
                index.setdefault(form, []).append(span)
        return index

    def find(self, argument: str) -> list[Span]:
        """The spans of a program's number, those of the table first, then in page order.

        Empty for constants, for `#k`, and for numbers that the page lacks.
        """
        match = NUMBER.fullmatch(argument.strip())
        if match is None:
            return []
        found: dict[Span, None] = {}
        for form in _forms(argument.strip().lstrip("- $"), bool(match[2])):
            found.update(dict.fromkeys(self._by_form.get(form, ())))
        return sorted(found, key=lambda p: not p.in_table)

    def row_name(self, row: int) -> str:
        cells = self.table[row]
        return " ".join(cells[0].split()) if cells else ""

    def column_name(self, column: int) -> str:
        header = self.table[0] if self.table else ()
        return " ".join(header[column].split()) if column < len(header) else ""


def _span(match: re.Match, **where: int) -> Span:
    sign, percent = "-" if match[1] else "", bool(match[2])
    digits = match[0].lstrip("- $").rstrip("% .").replace(",", "")
    text = f"{sign}{digits}{'%' if percent else ''}"
    return Span(text, bool(sign), percent, match.start(), match.end(), **where)
