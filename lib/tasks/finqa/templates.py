"""Programs as people write them: the gold programs of the train split, with the numbers of another page put in.

A template keeps the operations, references and constants of a gold program, and how its numbers stood on the page:
which stood in one row, one column or one sentence and how far apart, which was in a row of totals, which had a minus
or a percent sign that the program left out. Numbers on other pages that stand alike make a new program.

Knows pages and programs. Knows no questions and does not judge what it makes; a program may fail to run.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib.tasks.finqa.numbers import Place
from lib.tasks.finqa.places import Page, in_line, is_number, kind_of, numbers_of
from lib.tasks.finqa.program import parse
from lib.tasks.finqa.record import Record

_OPERATION = re.compile(r"([a-z_]+)\(")
LOOSENED = 0.35  # share of the numbers that keep their row, column or sentence, but not their distance in it


@dataclass(frozen=True)
class Slot:
    """How one number of a program stood on its page.

    `kind` is "cell", "header" (a number in the header or in a row name), "text" or "literal" (nowhere on the page:
    `text` is kept). `link` is the earlier slot that it stood in line with, or -1; `rows` and `columns` its distance
    to that, for text `columns` is the distance in numbers. `look` is Page.look. `form` says what the program left
    out of what the page says: "", "minus", "percent", or "as share" (0.12 for 12%).
    """

    kind: str
    link: int = -1
    rows: int = 0
    columns: int = 0
    total: bool = False
    look: tuple = ()
    form: str = ""
    text: str = ""


@dataclass(frozen=True)
class Template:
    """A gold program without its numbers: `pattern` has {0} for slot 0; `rows` row names are {r0}, {r1} ..."""

    pattern: str
    slots: tuple[Slot, ...]
    rows: int
    group: str


def operators_of(program: str) -> str:
    """The operations of a program or pattern, in order: "subtract divide"."""
    return " ".join(_OPERATION.findall(program))


def learn(record: Record, page: Page, group: str) -> Template:
    """The template of the record's gold program. Raises ProgramError."""
    steps = parse(record.program or "")
    numbers = numbers_of(steps)
    located = page.locate(numbers)
    slots: list[Slot] = []
    places: list[Place | None] = []
    for number in numbers:
        slots.append(_slot(number, located[number], places, page))
        places.append(located[number])
    names = list(dict.fromkeys(step.first.text for step in steps if step.reads_table))
    parts = []
    for step in steps:
        if step.reads_table:
            first, second = f"{{r{names.index(step.first.text)}}}", step.second.text
        else:
            first, second = (
                f"{{{numbers.index(a.text)}}}" if is_number(a) else a.text for a in (step.first, step.second)
            )
        parts.append(f"{step.operation}({first}, {second})")
    return Template(", ".join(parts), tuple(slots), len(names), group)


def _slot(number: str, place: Place | None, earlier: list[Place | None], page: Page) -> Slot:
    if place is None:
        return Slot("literal", text=number)
    kind = kind_of(place)
    form, look = _form(number, place), page.look(place)
    link = next((i for i, p in reversed(list(enumerate(earlier))) if p is not None and in_line(place, p)), -1)
    if link < 0:
        return Slot(kind, total=place.row in page.total_rows, look=look, form=form)
    other = earlier[link]
    assert other is not None
    if kind == "text":
        order = page.by_sentence[place.sentence]
        return Slot(kind, link, columns=order.index(place) - order.index(other), look=look, form=form)
    away = place.row - other.row, place.column - other.column
    return Slot(kind, link, *away, total=place.row in page.total_rows, look=look, form=form)


def _form(number: str, place: Place) -> str:
    if place.negative and not number.startswith("-"):
        return "minus"
    if place.percent and not number.endswith("%"):
        return (
            "percent"
            if abs(float(number.replace(",", ""))) == abs(float(place.text.rstrip("%")))
            else "as share"
        )
    return ""


def _written(place: Place, form: str) -> str:
    """The number of the place as a program of this habit writes it."""
    text = place.text
    if form == "minus":
        text = text.lstrip("-")
    if form == "percent":
        text = text.rstrip("%")
    if form == "as share" and place.percent:
        text = f"{place.value:.10g}"
    return text


class Templates:
    """All templates of the train split."""

    def __init__(self, templates: Sequence[Template]):
        self.templates = [t for t in templates if "greater(" not in t.pattern]
        self.by_operators: dict[str, list[Template]] = {}
        for template in self.templates:
            self.by_operators.setdefault(operators_of(template.pattern), []).append(template)

    @property
    def usable(self) -> bool:
        return bool(self.templates)

    def make(
        self, page: Page, group: str, draw: random.Random, trials: int, operators: str | None = None
    ) -> Iterator[str]:
        """Programs with the page's numbers, some of them perhaps twice: one for each of `trials` templates that fits.

        A template that a page of the same `group` taught is not used, so that train pages get what others get.
        With `operators` only templates with just these.
        """
        choice = self.templates if operators is None else self.by_operators.get(operators, [])
        for _ in range(trials if choice else 0):
            template = choice[int(draw.random() * len(choice))]
            if template.group == group:
                continue
            program = _fill(template, page, draw)
            if program is not None:
                yield program


def _fill(template: Template, page: Page, draw: random.Random) -> str | None:
    """The template with numbers of the page, or None when it has none that fit."""
    chosen: list[Place | None] = []
    texts: list[str] = []
    for slot in template.slots:
        if slot.kind == "literal":
            chosen.append(None)
            texts.append(slot.text)
            continue
        linked = chosen[slot.link] if slot.link >= 0 else None
        place = _place_for(slot, linked, page, draw, [p for p in chosen if p is not None])
        if place is None or (text := _written(place, slot.form)) in texts:
            return None
        chosen.append(place)
        texts.append(text)
    names = {}
    for number in range(template.rows):
        if len(page.table) < 2:
            return None
        name = page.table[draw.randrange(1, len(page.table))][0]
        if not name or any(c in name for c in "()#") or ", " in name or name in names.values():
            return None
        names[f"r{number}"] = name
    program = template.pattern
    for number, text in enumerate(texts):
        program = program.replace(f"{{{number}}}", text)
    for key, name in names.items():
        program = program.replace(f"{{{key}}}", name)
    return program


def _place_for(
    slot: Slot, linked: Place | None, page: Page, draw: random.Random, taken: list[Place]
) -> Place | None:
    if (
        linked is None
        or (linked.in_table and slot.kind == "text")
        or (not linked.in_table and slot.kind != "text")
    ):
        return _first_place(slot, page, draw, taken)
    if slot.kind == "text":
        return _in_sentence(slot, linked, page, draw, taken)
    if slot.kind == "header":
        fitting = [
            p for p in page.headers if in_line(p, linked) and p.year_like == slot.look[0] and p not in taken
        ]
        return draw.choice(fitting) if fitting else None
    exact = page.at.get((linked.row + slot.rows, linked.column + slot.columns))
    free = exact is not None and exact not in taken and draw.random() > LOOSENED
    if exact is not None and free and (not slot.total or exact.row in page.total_rows or slot.rows == 0):
        return exact
    line = [p for p in page.cells if p not in taken and _same_line(slot, p, linked)]
    if slot.total and slot.rows:
        line = [p for p in line if p.row in page.total_rows] or line
    return draw.choice(line) if line else None


def _same_line(slot: Slot, place: Place, linked: Place) -> bool:
    """Whether the place shares the row or column with the linked one, on the side where the slot's did."""
    if slot.rows == 0:
        return place.row == linked.row and (place.column - linked.column) * slot.columns > 0
    return place.column == linked.column and (place.row - linked.row) * slot.rows > 0


def _first_place(slot: Slot, page: Page, draw: random.Random, taken: list[Place]) -> Place | None:
    alike = page.by_look.get((slot.kind, *slot.look), [])
    if slot.kind == "text" and not alike:
        alike = [p for p in page.in_text if (p.year_like, p.percent) == slot.look[:2]]
    if slot.total:
        alike = [p for p in alike if p.row in page.total_rows] or alike
    alike = [p for p in alike if p not in taken]
    return draw.choice(alike) if alike else None


def _in_sentence(
    slot: Slot, linked: Place, page: Page, draw: random.Random, taken: list[Place]
) -> Place | None:
    order = page.by_sentence[linked.sentence]
    at = order.index(linked) + slot.columns
    free = 0 <= at < len(order) and order[at] not in taken and draw.random() > LOOSENED
    if free and order[at].year_like == slot.look[0]:
        return order[at]
    alike = [p for p in order if p not in taken and p.year_like == slot.look[0]]
    return draw.choice(alike) if alike else None
