"""The numbers of a page: how they are written, where they stand, and which of them a program uses.

A number is known by its digits: `$ 1,234`, `1234` and `-1234 ( 1234 )` are one number to find, because programs
write most of them without sign and commas. A percentage is found as `12` and as `0.12`.

Knows records. Not known here: questions, candidates, rewards.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lib.tasks.finqa.pages import plain_cell
from lib.tasks.finqa.program import parse
from lib.tasks.finqa.record import Record

_UNSIGNED = re.compile(r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:\.(?= ?%))?( ?%)?")  # "33.%" occurs
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
    """Every number of a text, without its sign and commas; a percentage as `12` and as `0.12`."""
    found = set()
    for match in _UNSIGNED.finditer(text):
        found.update(_forms(match[0], bool(match[1])))
    found.update(_plain(_WORDS.index(word)) for word in _NUMBER_WORD.findall(text.lower()))
    return found


def _forms(written: str, percent: bool) -> list[str]:
    """The names of an unsigned number: the one that it is written with first."""
    digits = float(written.rstrip("% .").replace(",", ""))
    return [_plain(digits), _plain(digits / 100)] if percent else [_plain(digits)]


def _plain(number: float) -> str:
    return f"{abs(number):.10g}"


def operands(program: str) -> list[str]:
    """The numbers that the program takes from the page, as written; no constants. Raises ProgramError."""
    arguments = [a for step in parse(program) if not step.reads_table for a in (step.first, step.second)]
    return [a.text for a in arguments if a.value is not None and not a.text.startswith("const_")]


@dataclass(frozen=True)
class Place:
    """One number where it stands: in a cell (`row` and `column`, both from 0), or in a sentence.

    `text` is the number as programs write it by default: no `$`, no commas, `-` only where the page has it, and
    `%` only where the page has it. `sentence` counts pre_text and then post_text; `start` and `end` are
    characters in it, or in the cell.
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
        """What `text` is worth: `12%` is 0.12."""
        value = float(self.text.rstrip("%"))
        return value / 100 if self.percent else value

    @property
    def year_like(self) -> bool:
        return self.text.isdigit() and len(self.text) == 4 and self.text[:2] in ("19", "20")


class PageNumbers:
    """Every number of a page, found by how it is written.

    Header cells and row names are searched too: their years can be operands. Numbers written as words are not
    places.
    """

    def __init__(self, record: Record):
        self.table = record.table
        self.sentences = (*record.pre_text, *record.post_text)
        self.places = [*self._in_table(), *self._in_sentences()]

    def _in_table(self) -> Iterator[Place]:
        for row, cells in enumerate(self.table):
            for column, cell in enumerate(cells):
                for match in NUMBER.finditer(plain_cell(cell)):
                    yield _place(match, row=row, column=column)

    def _in_sentences(self) -> Iterator[Place]:
        for number, sentence in enumerate(self.sentences):
            for match in NUMBER.finditer(sentence):
                yield _place(match, sentence=number)

    @cached_property
    def _by_form(self) -> dict[str, list[Place]]:
        index: dict[str, list[Place]] = {}
        for place in self.places:
            for form in _forms(place.text.lstrip("-"), place.percent):
                index.setdefault(form, []).append(place)
        return index

    def find(self, argument: str) -> list[Place]:
        """Where a program's number stands: table first, page order. Empty for constants, `#k` and strangers."""
        match = NUMBER.fullmatch(argument.strip())
        if match is None:
            return []
        found: dict[Place, None] = {}
        for form in _forms(argument.strip().lstrip("- $"), bool(match[2])):
            found.update(dict.fromkeys(self._by_form.get(form, ())))
        return sorted(found, key=lambda p: not p.in_table)

    def row_name(self, row: int) -> str:
        cells = self.table[row]
        return " ".join(cells[0].split()) if cells else ""

    def column_name(self, column: int) -> str:
        header = self.table[0] if self.table else ()
        return " ".join(header[column].split()) if column < len(header) else ""


def _place(match: re.Match, **where: int) -> Place:
    sign, percent = "-" if match[1] else "", bool(match[2])
    digits = match[0].lstrip("- $").rstrip("% .").replace(",", "")
    text = f"{sign}{digits}{'%' if percent else ''}"
    return Place(text, bool(sign), percent, match.start(), match.end(), **where)
