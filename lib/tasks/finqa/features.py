"""What can be said of a program without its question: numbers and words that describe it, alone and within its pool.

`Described.of` describes one program: its operations, its value, its numbers, and where on the page they stand.
`in_pool` adds how it compares with the others of its pool: ranks, sums, numbers in common. None of this knows which
program is the gold one, so whatever finds gold ones by it has found a shortcut.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.tasks.finqa.numbers import Place
from lib.tasks.finqa.places import Page, is_number, numbers_of, skeleton
from lib.tasks.finqa.program import OPERATIONS, Step, parse

MAX_NUMBERS = 8  # of one program that are compared with others'
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
class Described:
    """One program: `row` (F,) of NAMES, `words` of it and of the names of its numbers, `numbers` as hashes."""

    row: np.ndarray
    words: str
    numbers: tuple[int, ...]

    @staticmethod
    def of(program: str, value: float, page: Page) -> "Described":
        steps = parse(program)
        written = numbers_of(steps)
        places = page.locate(written)
        row = {
            **_of_steps(program, steps),
            **_of_value(value),
            **_of_numbers(written, places),
            **_of_places([places[n] for n in written], page),
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
        words = _words(steps, [places[n] for n in written], names, page)
        array = np.fromiter((row.get(name, 0.0) for name in NAMES), np.float32, len(NAMES))
        return Described(array, words, tuple(_hash(n) for n in (*written, *names)))


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


def _of_numbers(written: list[str], places: dict[str, Place | None]) -> dict[str, float]:
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
            p is not None and p.negative and a > 0 for p, a in zip(places.values(), amounts, strict=True)
        ),
        "percent dropped": sum(p is not None and p.percent and "%" not in n for n, p in places.items()),
    }
    if len(amounts) > 1:
        row["first over second"] = logs[0] - logs[1]
        row["first above second"] = amounts[0] > amounts[1]
    return row


def _of_places(places: list[Place | None], page: Page) -> dict[str, float]:
    known = [p for p in places if p is not None]
    cells = [p for p in known if p.row > 0 and p.column > 0]
    text = [p for p in known if not p.in_table]
    width = max((len(r) for r in page.table), default=0)
    row: dict[str, float] = {
        "cells": len(cells),
        "headers": len(known) - len(cells) - len(text),
        "in text": len(text),
        "nowhere": len(places) - len(known),
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
    if len(places) > 1:
        row.update(_of_first_two(places[0], places[1], page))
    return row


def _of_first_two(first: Place | None, second: Place | None, page: Page) -> dict[str, float]:
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


def _year(place: Place, page: Page) -> int | None:
    """The year in the name of the number's column, else of its row."""
    if not place.in_table:
        return None
    for name in (page.column_name(place.column), page.row_name(place.row)):
        if found := _YEAR.search(name):
            return int(found[0])
    return None


def _words(steps: list[Step], places: list[Place | None], names: list[str], page: Page) -> str:
    """The skeleton, and for each number its place in the program before each word of its names."""
    words = [skeleton(steps).replace(" ", ";")]
    for number, place in enumerate(places):
        if place is None:
            continue
        mark = "abc"[min(number, 2)]
        words += [f"{mark}:{word}" for word in label_of(place, page)]
    words += [f"r:{word}" for name in names for word in _WORD.findall(name.lower())]
    return " ".join(words)


def label_of(place: Place, page: Page) -> list[str]:
    """Words that say what a number is: those of its row and column, or those around it in its sentence."""
    if place not in page.labels:
        page.labels[place] = _label_of(place, page)
    return page.labels[place]


def _label_of(place: Place, page: Page) -> list[str]:
    if place.in_table:
        row, column = (
            _WORD.findall(name.lower()) for name in (page.row_name(place.row), page.column_name(place.column))
        )
        return [*row[:8], *(f"c.{word}" for word in column[:5])]
    sentence = page.sentences[place.sentence].lower()
    before, after = _WORD.findall(sentence[: place.start])[-6:], _WORD.findall(sentence[place.end :])[:4]
    return [*(f"s.{word}" for word in before), *(f"t.{word}" for word in after)]


# Within a pool

COMPARED = tuple(
    COLUMN[name]
    for name in (
        "add", "subtract", "multiply", "divide", "steps", "constants", "characters", "references", "log value",
        "value sign", "value whole", "log distance from 1", "log mean", "log spread", "log least", "log most",
        "most decimals", "numbers", "same number twice", "cells", "in text", "nowhere", "places of the rarest",
        "one row", "one column", "years new minus old", "first over second", "totals", "last rows", "last columns",
        "row height", "column height", "sentence height", "row name words", "year numbers", "negatives", "percents",
    )
)  # fmt: skip


def number_table(described: Sequence[Described]) -> np.ndarray:
    """(N, MAX_NUMBERS) int64: the hashes of each program's numbers, -1 where there are fewer."""
    table = np.full((len(described), MAX_NUMBERS), -1, np.int64)
    for i, one in enumerate(described):
        table[i, : len(one.numbers)] = one.numbers[:MAX_NUMBERS]
    return table


def in_pool(rows: np.ndarray, numbers: np.ndarray, extra: np.ndarray | None = None) -> np.ndarray:
    """How each candidate compares with the others of its pool, (P, K, G).

    Args:
        rows: (P, K, F), columns as NAMES.
        numbers: (P, K, MAX_NUMBERS) of `number_table`.
        extra: (P, K, E) more columns to compare, such as scores.
    """
    compared = rows[..., COMPARED]  # (P, K, C)
    if extra is not None:
        compared = np.concatenate([compared, extra.astype(np.float32)], -1)
    below = compared[:, :, None] > compared[:, None]  # (P, K, K, C)
    equal = compared[:, :, None] == compared[:, None]
    ranks = below.mean(2, dtype=np.float32) + equal.mean(2, dtype=np.float32) / 2
    shares = equal.mean(2, dtype=np.float32)
    real = numbers >= 0
    common = (numbers[:, :, None, :, None] == numbers[:, None, :, None, :]) & real[:, :, None, :, None]
    shared = common.any(-1).sum(-1).astype(np.float32)  # (P, K, K) numbers of k that l has too
    alone = ~np.eye(rows.shape[1], dtype=bool)
    others = shared * alone
    count = np.maximum(real.sum(-1), 1)[..., None]
    signature = rows[..., : len(OPERATIONS)]
    same = (signature[:, :, None] == signature[:, None]).all(-1) & alone  # (P, K, K) the same operations
    value = rows[..., COLUMN["log value"]]
    apart = np.where(alone, np.abs(value[:, :, None] - value[:, None]), np.inf)
    near = np.sort(apart, -1)
    central = np.stack(
        [
            others.sum(-1),
            others.max(-1),
            (others / count).sum(-1),
            (others > 0).sum(-1),
            (others == count).sum(-1),
            (others.swapaxes(1, 2) > 0).sum(-1),
            same.sum(-1),
            (same & (others > 0)).sum(-1),
            (same & (others == count)).sum(-1),
            near[..., 0],
            near[..., 1],
            near[..., :-1].mean(-1),
        ],
        -1,
    ).astype(np.float32)
    finite = np.where(np.isfinite(central), central, 9.0)
    mean = finite.mean(1, keepdims=True)
    return np.concatenate([ranks, shares, finite, finite - mean], -1)
