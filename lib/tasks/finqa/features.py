"""Question-blind features of a program.

`ProgramFeatures.of` describes one program: its operations, its value, its numbers, and where on the page they are.
`pool_comparison.in_pool` compares it with the others of its pool. A scorer that finds gold programs from these features
uses a shortcut, since they do not depend on the question.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.tasks.finqa.numbers import Span
from lib.tasks.finqa.page import Page, is_number, numbers_of, skeleton
from lib.tasks.finqa.program import OPERATIONS, Step, parse

_CONSTANTS = ("const_1", "const_2", "const_3", "const_100", "const_1000", "const_1000000")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}")
_WORD = re.compile(r"[a-z]{2,}|[0-9]+")

NAMES = (
    *OPERATIONS, *(f"last {o}" for o in OPERATIONS), *_CONSTANTS, "constants", "steps", "references", "characters",
    "fresh steps", "last step reads two", "first number again", "second number again", "numbers", "uses",
    "log value", "value below 1", "value sign", "value whole", "value near 1", "value above 1000", "log distance from 1",
    "log mean", "log spread", "log least", "log most", "most decimals", "least decimals", "decimals differ", "round numbers",
    "digits", "negatives", "minus dropped", "percents", "percent dropped", "year numbers", "same number twice",
    "cells", "headers", "in text", "nowhere", "places of the rarest", "places of the commonest",
    "one row", "one column", "one sentence", "adjacent columns", "adjacent rows", "columns apart", "rows apart",
    "years new minus old", "first over second", "first above second", "totals", "first total", "second total",
    "last rows", "last columns", "first columns", "row height", "column height", "sentence height", "sentence numbers",
    "order in sentence", "dollars", "units differ", "row name words", "rows", "page columns",
)  # fmt: skip
COLUMN = {name: i for i, name in enumerate(NAMES)}


@dataclass(frozen=True)
class ProgramFeatures:
    """Features of one program.

    Attributes:
        row: (F,) one column for each of NAMES.
        words: the skeleton of the program and the labels of its numbers.
        numbers: hashes of its numbers and row names.
    """

    row: np.ndarray
    words: str
    numbers: tuple[int, ...]

    @staticmethod
    def of(program: str, value: float, page: Page) -> "ProgramFeatures":
        steps = parse(program)
        written = numbers_of(steps)
        spans = page.locate(written)
        row = {
            **_of_steps(program, steps),
            **_of_value(value),
            **_of_numbers(written, spans),
            **_of_spans([spans[n] for n in written], page),
        }
        uses = [a.text for s in steps if not s.reads_table for a in (s.first, s.second) if is_number(a)]
        row["uses"] = len(uses)
        row["same number twice"] = len(uses) - len(set(uses))
        row["first number again"] = len(written) > 0 and uses.count(written[0]) > 1
        row["second number again"] = len(written) > 1 and uses.count(written[1]) > 1
        found = [len(page.find(n)) for n in written]
        row["places of the rarest"], row["places of the commonest"] = (
            min(found, default=0),
            max(found, default=0),
        )
        names = [s.first.text for s in steps if s.reads_table]
        words = _words(steps, [spans[n] for n in written], names, page)
        array = np.fromiter((row.get(name, 0.0) for name in NAMES), np.float32, len(NAMES))
        return ProgramFeatures(array, words, tuple(_hash(n) for n in (*written, *names)))


def _hash(text: str) -> int:
    return randomness.key(0, text) >> 2  # positive as int64


def _of_steps(program: str, steps: list[Step]) -> dict[str, float]:
    row: dict[str, float] = {"steps": len(steps), "characters": len(program)}
    for step in steps:
        row[step.operation] = row.get(step.operation, 0) + 1
        references = (step.first.reference is not None) + (step.second.reference is not None)
        row["references"] = row.get("references", 0) + references
        row["fresh steps"] = row.get("fresh steps", 0) + (references == 0)
        for argument in (step.first, step.second):
            if argument.text.startswith("const_"):
                row["constants"] = row.get("constants", 0) + 1
                if argument.text in _CONSTANTS:
                    row[argument.text] = row.get(argument.text, 0) + 1
    row[f"last {steps[-1].operation}"] = 1
    last = steps[-1]
    row["last step reads two"] = last.first.reference is not None and last.second.reference is not None
    return row


def _log(value: float) -> float:
    return math.log10(abs(value) + 1e-6)


def _of_value(value: float) -> dict[str, float]:
    size = abs(value)
    return {
        "log value": _log(value),
        "value below 1": size < 1,
        "value sign": (value > 0) - (value < 0),
        "value whole": value == round(value),
        "value near 1": 0.8 < size < 1.25,
        "value above 1000": size > 1000,
        "log distance from 1": _log(size - 1),
    }


def _amount(number: str) -> float:
    return float(number.rstrip("% ").replace(",", ""))


def _of_numbers(written: list[str], spans: dict[str, Span | None]) -> dict[str, float]:
    if not written:
        return {}
    amounts = [_amount(n) for n in written]
    logs = [_log(a) for a in amounts]
    decimals = [len(n.rstrip("% ").partition(".")[2]) for n in written]
    row = {
        "numbers": len(written),
        "log mean": sum(logs) / len(logs),
        "log spread": max(logs) - min(logs),
        "log least": min(logs),
        "log most": max(logs),
        "most decimals": max(decimals),
        "least decimals": min(decimals),
        "decimals differ": max(decimals) - min(decimals),
        "round numbers": sum(a % 10 == 0 for a in amounts),
        "digits": max(len(n) for n in written),
        "negatives": sum(a < 0 for a in amounts),
        "percents": sum(n.endswith("%") for n in written),
        "year numbers": sum(_YEAR.fullmatch(n) is not None for n in written),
        "minus dropped": sum(
            p is not None and p.negative and a > 0 for p, a in zip(spans.values(), amounts, strict=True)
        ),
        "percent dropped": sum(p is not None and p.percent and "%" not in n for n, p in spans.items()),
    }
    if len(amounts) > 1:
        row["first over second"] = logs[0] - logs[1]
        row["first above second"] = amounts[0] > amounts[1]
    return row


def _of_spans(spans: list[Span | None], page: Page) -> dict[str, float]:
    known = [p for p in spans if p is not None]
    cells = [p for p in known if p.row > 0 and p.column > 0]
    text = [p for p in known if not p.in_table]
    width = max((len(r) for r in page.table), default=0)
    row: dict[str, float] = {
        "cells": len(cells),
        "headers": len(known) - len(cells) - len(text),
        "in text": len(text),
        "nowhere": len(spans) - len(known),
        "rows": len(page.table),
        "page columns": width,
    }
    if cells:
        rows, columns = [p.row for p in cells], [p.column for p in cells]
        row["totals"] = sum(r in page.total_rows for r in rows)
        row["last rows"] = sum(r == len(page.table) - 1 for r in rows)
        row["last columns"] = sum(c == width - 1 for c in columns)
        row["first columns"] = sum(c == 1 for c in columns)
        row["row height"] = sum(rows) / len(rows) / len(page.table)
        row["column height"] = sum(columns) / len(columns) / width
        row["row name words"] = sum(len(page.row_name(r)) for r in rows) / len(rows)
        if len(cells) > 1:
            row["one row"], row["one column"] = len(set(rows)) == 1, len(set(columns)) == 1
    if text:
        row["sentence height"] = sum(p.sentence for p in text) / len(text) / len(page.sentences)
        inside = [page.by_sentence[p.sentence] for p in text]
        row["sentence numbers"] = sum(map(len, inside)) / len(inside)
        row["order in sentence"] = sum(i.index(p) / len(i) for i, p in zip(inside, text, strict=True)) / len(
            text
        )
        looks = [page.look(p) for p in text]
        row["dollars"] = sum(look[2] for look in looks)
        row["units differ"] = len(set(looks)) - 1
        row["one sentence"] = len(text) > 1 and len({p.sentence for p in text}) == 1
    if len(spans) > 1:
        row.update(_of_first_two(spans[0], spans[1], page))
    return row


def _of_first_two(first: Span | None, second: Span | None, page: Page) -> dict[str, float]:
    if first is None or second is None:
        return {}
    ages = _year(first, page), _year(second, page)
    row: dict[str, float] = {
        "years new minus old": 0 if None in ages else ages[0] - ages[1],  # type: ignore[operator]
        "first total": first.row in page.total_rows,
        "second total": second.row in page.total_rows,
    }
    if first.in_table and second.in_table:
        row["columns apart"], row["rows apart"] = second.column - first.column, second.row - first.row
        row["adjacent columns"] = first.row == second.row and abs(second.column - first.column) == 1
        row["adjacent rows"] = first.column == second.column and abs(second.row - first.row) == 1
    elif not first.in_table and not second.in_table:
        row["columns apart"], row["rows apart"] = second.start - first.start, second.sentence - first.sentence
    return row


def _year(span: Span, page: Page) -> int | None:
    """The year in the name of the number's column, or else of its row."""
    if not span.in_table:
        return None
    for name in (page.column_name(span.column), page.row_name(span.row)):
        if found := _YEAR.search(name):
            return int(found[0])
    return None


def _words(steps: list[Step], spans: list[Span | None], names: list[str], page: Page) -> str:
    """The skeleton, and the labels of each number. Each word has a prefix for the number's position in the program."""
    words = [skeleton(steps).replace(" ", ";")]
    for number, span in enumerate(spans):
        if span is None:
            continue
        prefix = "abc"[min(number, 2)]
        words += [f"{prefix}:{word}" for word in label_of(span, page)]
    words += [f"r:{word}" for name in names for word in _WORD.findall(name.lower())]
    return " ".join(words)


def label_of(span: Span, page: Page) -> list[str]:
    """Words that describe a number: those of its row and column names, or those around it in its sentence."""
    if span not in page.labels:
        page.labels[span] = _label_of(span, page)
    return page.labels[span]


def _label_of(span: Span, page: Page) -> list[str]:
    if span.in_table:
        row, column = (
            _WORD.findall(name.lower()) for name in (page.row_name(span.row), page.column_name(span.column))
        )
        return [*row[:8], *(f"c.{word}" for word in column[:5])]
    sentence = page.sentences[span.sentence].lower()
    before, after = _WORD.findall(sentence[: span.start])[-6:], _WORD.findall(sentence[span.end :])[:4]
    return [*(f"s.{word}" for word in before), *(f"t.{word}" for word in after)]
