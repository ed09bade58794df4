"""Realistic wrong programs: gold programs of the train split with numbers of another page.

A template keeps the operations, references and constants of a gold program, and the layout of its numbers on the page:

- which of them shared a row, a column or a sentence, and at what distance;
- which were in a row of totals;
- which had a minus or a percent sign on the page that the program left out.

Numbers of another page with the same layout give a new program. It may fail to run.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib.tasks.finqa.numbers import Span
from lib.tasks.finqa.page import Page, in_line, is_number, kind_of, numbers_of
from lib.tasks.finqa.program import parse
from lib.tasks.finqa.record import Record

_OPERATION = re.compile(r"([a-z_]+)\(")
LOOSENED = 0.35  # share of the numbers that keep the line (row, column or sentence), but not the distance


@dataclass(frozen=True)
class Slot:
    """The layout of one number of a program on its page.

    Attributes:
        kind: "cell", "header" (the header row or a row name), "text" or "literal" (not on the page).
        link: the earlier slot that shares a line (row, column or sentence) with it, or -1.
        rows, columns: the distance to the linked slot. In a sentence, `columns` counts numbers.
        total: whether it is in a row of totals.
        look: see Page.look.
        form: what the program left out of the page's notation: "", "minus", "percent", or "as share" (0.12 for 12%).
        text: the number itself, for literals.
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
    """A gold program without its numbers. `pattern` has {0} for slot 0, and {r0}, {r1} ... for its `rows` row names."""

    pattern: str
    slots: tuple[Slot, ...]
    rows: int
    group: str


def operators_of(program: str) -> str:
    """The operations of a program or pattern, in order: "subtract divide"."""
    return " ".join(_OPERATION.findall(program))


def learn_template(record: Record, page: Page, group: str) -> Template:
    """The template of the record's gold program. Raises ProgramError."""
    steps = parse(record.program or "")
    numbers = numbers_of(steps)
    located = page.locate(numbers)
    slots: list[Slot] = []
    spans: list[Span | None] = []
    for number in numbers:
        slots.append(_slot(number, located[number], spans, page))
        spans.append(located[number])
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


def _slot(number: str, span: Span | None, earlier: list[Span | None], page: Page) -> Slot:
    if span is None:
        return Slot("literal", text=number)
    kind = kind_of(span)
    form, look = _form(number, span), page.look(span)
    link = next((i for i, p in reversed(list(enumerate(earlier))) if p is not None and in_line(span, p)), -1)
    if link < 0:
        return Slot(kind, total=span.row in page.total_rows, look=look, form=form)
    other = earlier[link]
    assert other is not None
    if kind == "text":
        order = page.by_sentence[span.sentence]
        return Slot(kind, link, columns=order.index(span) - order.index(other), look=look, form=form)
    away = span.row - other.row, span.column - other.column
    return Slot(kind, link, *away, total=span.row in page.total_rows, look=look, form=form)


def _form(number: str, span: Span) -> str:
    if span.negative and not number.startswith("-"):
        return "minus"
    if span.percent and not number.endswith("%"):
        return (
            "percent"
            if abs(float(number.replace(",", ""))) == abs(float(span.text.rstrip("%")))
            else "as share"
        )
    return ""


def _as_written(span: Span, form: str) -> str:
    """The number of a span in the form that the template's program uses."""
    text = span.text
    if form == "minus":
        text = text.lstrip("-")
    if form == "percent":
        text = text.rstrip("%")
    if form == "as share" and span.percent:
        text = f"{span.value:.10g}"
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
        """Programs with the page's numbers, possibly repeated: one for each of `trials` drawn templates that fits.

        Templates of pages of the same `group` are not used, so that train pages are treated like other pages.

        Args:
            operators: use only templates with exactly these operations, as `operators_of` writes them.
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
    """The template with numbers of the page, or None when they do not fit."""
    chosen: list[Span | None] = []
    texts: list[str] = []
    for slot in template.slots:
        if slot.kind == "literal":
            chosen.append(None)
            texts.append(slot.text)
            continue
        linked = chosen[slot.link] if slot.link >= 0 else None
        span = _span_for(slot, linked, page, draw, [p for p in chosen if p is not None])
        if span is None or (text := _as_written(span, slot.form)) in texts:
            return None
        chosen.append(span)
        texts.append(text)
    names = {}
    rows = [row for row in page.table[1:] if row]  # a row without cells has no name
    for number in range(template.rows):
        if not rows:
            return None
        name = rows[draw.randrange(len(rows))][0]
        if not name or any(c in name for c in "()#") or ", " in name or name in names.values():
            return None
        names[f"r{number}"] = name
    program = template.pattern
    for number, text in enumerate(texts):
        program = program.replace(f"{{{number}}}", text)
    for key, name in names.items():
        program = program.replace(f"{{{key}}}", name)
    return program


def _span_for(
    slot: Slot, linked: Span | None, page: Page, draw: random.Random, used: list[Span]
) -> Span | None:
    if (
        linked is None
        or (linked.in_table and slot.kind == "text")
        or (not linked.in_table and slot.kind != "text")
    ):
        return _first_span(slot, page, draw, used)
    if slot.kind == "text":
        return _in_sentence(slot, linked, page, draw, used)
    if slot.kind == "header":
        fitting = [
            p for p in page.headers if in_line(p, linked) and p.year_like == slot.look[0] and p not in used
        ]
        return draw.choice(fitting) if fitting else None
    exact = page.at.get((linked.row + slot.rows, linked.column + slot.columns))
    free = exact is not None and exact not in used and draw.random() > LOOSENED
    if exact is not None and free and (not slot.total or exact.row in page.total_rows or slot.rows == 0):
        return exact
    line = [p for p in page.cells if p not in used and _same_line(slot, p, linked)]
    if slot.total and slot.rows:
        line = [p for p in line if p.row in page.total_rows] or line
    return draw.choice(line) if line else None


def _same_line(slot: Slot, span: Span, linked: Span) -> bool:
    """Whether a span shares the row or column with the linked span, on the same side as the slot."""
    if slot.rows == 0:
        return span.row == linked.row and (span.column - linked.column) * slot.columns > 0
    return span.column == linked.column and (span.row - linked.row) * slot.rows > 0


def _first_span(slot: Slot, page: Page, draw: random.Random, used: list[Span]) -> Span | None:
    alike = page.by_look.get((slot.kind, *slot.look), [])
    if slot.kind == "text" and not alike:
        alike = [p for p in page.in_text if (p.year_like, p.percent) == slot.look[:2]]
    if slot.total:
        alike = [p for p in alike if p.row in page.total_rows] or alike
    alike = [p for p in alike if p not in used]
    return draw.choice(alike) if alike else None


def _in_sentence(slot: Slot, linked: Span, page: Page, draw: random.Random, used: list[Span]) -> Span | None:
    order = page.by_sentence[linked.sentence]
    at = order.index(linked) + slot.columns
    free = 0 <= at < len(order) and order[at] not in used and draw.random() > LOOSENED
    if free and order[at].year_like == slot.look[0]:
        return order[at]
    alike = [p for p in order if p not in used and p.year_like == slot.look[0]]
    return draw.choice(alike) if alike else None
