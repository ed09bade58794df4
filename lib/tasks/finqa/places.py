"""A page as its programs see it: where their numbers stand, and how these look.

Knows pages and the numbers of programs; no questions, no templates.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from lib.tasks.finqa.numbers import PageNumbers, Place
from lib.tasks.finqa.program import Argument, Step
from lib.tasks.finqa.record import Record

_TOTAL = re.compile(r"\b(total|totals|net|ending|end|balance|aggregate)\b")
_NEXT_WORD = re.compile(r"[ )]*(%|percent|million|billion|thousand|shares|years|employees|per)?")


class Page(PageNumbers):
    """A page's numbers, and how each looks: what a template needs to find one that looks alike."""

    def __init__(self, record: Record):
        super().__init__(record)
        self._found: dict[str, list[Place]] = {}
        self._located: dict[tuple[str, ...], dict[str, Place | None]] = {}
        self.labels: dict[Place, list[str]] = {}  # kept by `features`

    def find(self, argument: str) -> list[Place]:
        if argument not in self._found:
            self._found[argument] = super().find(argument)
        return self._found[argument]

    def locate(self, numbers: Sequence[str]) -> dict[str, Place | None]:
        """The place of each number of one program: of several the one in line with most of the others."""
        key = tuple(numbers)
        if key not in self._located:
            self._located[key] = self._locate(key)
        return self._located[key]

    def _locate(self, numbers: Sequence[str]) -> dict[str, Place | None]:
        found = {number: self.find(number) for number in numbers}
        chosen: dict[str, Place | None] = {}
        for number, places in found.items():
            if len(places) < 2:
                chosen[number] = places[0] if places else None
                continue
            others = [p for other, ps in found.items() if other != number for p in ps]
            chosen[number] = max(places, key=lambda place: self._merit(place, number, others))
        return chosen

    def _merit(self, place: Place, number: str, others: list[Place]) -> tuple:
        shared = sum(in_line(place, other) for other in others)
        return shared, place.in_table, place.in_table and place.row * place.column > 0, place.text == number

    @cached_property
    def cells(self) -> list[Place]:
        """The numbers of the table without its header and row names."""
        return [p for p in self.places if p.row > 0 and p.column > 0]

    @cached_property
    def headers(self) -> list[Place]:
        return [p for p in self.places if p.in_table and p.row * p.column == 0]

    @cached_property
    def in_text(self) -> list[Place]:
        return [p for p in self.places if not p.in_table]

    @cached_property
    def by_sentence(self) -> dict[int, list[Place]]:
        sentences: dict[int, list[Place]] = {}
        for place in self.in_text:
            sentences.setdefault(place.sentence, []).append(place)
        return sentences

    @cached_property
    def at(self) -> dict[tuple[int, int], Place]:
        """The first number of each cell."""
        return {(p.row, p.column): p for p in reversed(self.cells)}

    @cached_property
    def total_rows(self) -> frozenset[int]:
        return frozenset(r for r in range(1, len(self.table)) if _TOTAL.search(self.row_name(r).lower()))

    def look(self, place: Place) -> tuple:
        """What kind of number it is: a year, a share, dollars, millions, shares."""
        if place.in_table:
            return place.year_like, place.percent
        sentence = self.sentences[place.sentence]
        word = _NEXT_WORD.match(sentence, place.end)
        dollars = sentence[: place.start].rstrip().endswith("$")
        return place.year_like, place.percent, dollars, word[1] if word else None

    @cached_property
    def by_look(self) -> dict[tuple, list[Place]]:
        """Numbers by kind ("cell", "header", "text") and look."""
        looks: dict[tuple, list[Place]] = {}
        for place in self.places:
            looks.setdefault((kind_of(place), *self.look(place)), []).append(place)
        return looks


def kind_of(place: Place) -> str:
    if not place.in_table:
        return "text"
    return "cell" if place.row * place.column else "header"


def in_line(place: Place, other: Place) -> bool:
    if place.in_table:
        return other.in_table and (place.row == other.row or place.column == other.column)
    return place.sentence == other.sentence


def numbers_of(steps: Iterable[Step]) -> list[str]:
    """The numbers of a program as written, each once; no constants, references or row names."""
    found = {}
    for step in steps:
        if not step.reads_table:
            for argument in (step.first, step.second):
                if is_number(argument):
                    found[argument.text] = None
    return list(found)


def is_number(argument: Argument) -> bool:
    return argument.value is not None and not argument.text.startswith("const_")


def skeleton(steps: Sequence[Step]) -> str:
    """The program with N for numbers and R for rows: its operations, references and constants."""
    parts = []
    for step in steps:
        named = "R" if step.reads_table else None
        first, second = (named or ("N" if is_number(a) else a.text) for a in (step.first, step.second))
        parts.append(f"{step.operation}({first},{second})")
    return " ".join(parts)
