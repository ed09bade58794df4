"""Read single labels of a user: a score, a class, or spans of characters. A fault says what was found and what was expected."""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_END = 2**31 - 1  # characters of a text
MAX_CLASS = 127  # the tables store int8
_WHOLE = re.compile(r"-?\d+\.0+")
_NUMBER = re.compile(r"-?\d+(\.\d*)?")
Span = tuple[int, int, int]  # first character, end, class


class InvalidLabel(Exception):
    """A label, or the key of one, that cannot be used."""

    def __init__(self, kind: str, found: object, expected: str):
        super().__init__(kind)
        self.kind, self.found, self.expected = kind, str(found)[:80], expected


def from_cell(cell: str | None, read: Callable[[str], Any]) -> Any:
    """The value in a cell of delimited text: None if it is empty, the text itself if it cannot be read."""
    cell = (cell or "").strip()
    if not cell:
        return None
    try:
        return cell if read is float and "_" in cell else read(cell)  # Python would read 1_0 as a number
    except (ValueError, RecursionError):
        return cell


def score_of(value: Any) -> float:
    """A score in [0, 1]. Raises InvalidLabel."""
    expected = "a number in [0, 1]"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidLabel("label not a number", repr(value), expected)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidLabel("label not finite", value, expected)
    if not 0 <= value <= 1:
        raise InvalidLabel("label out of range", value, expected)
    return float(value)


def plain(value: Any) -> str:
    """A value as every format of file has it: 1, 1.0, "1" and "1.0" are "1"; True and "True" are "true".

    Tables turn whole numbers into fractions where a value is missing, and write truth values with a capital.
    """
    text = str(value).strip()
    if text in ("True", "False"):
        return text.lower()
    return text.partition(".")[0] if _WHOLE.fullmatch(text) else text


def class_of(value: Any, names: Sequence[str]) -> int:
    """The number of a class, from 0. Raises InvalidLabel for any other value.

    Args:
        value: the name of a class. If no name is a number, also the number of a class.
    """
    if str(value).strip() in names:
        return names.index(str(value).strip())
    text, plain_names = plain(value), [plain(name) for name in names]
    if text in plain_names:
        return plain_names.index(text)
    expected = f"one of {', '.join(names)}"
    if not any(_NUMBER.fullmatch(name) for name in names):
        if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(names):
            return int(text)
        expected += f", or a number from 0 to {len(names) - 1}"
    raise InvalidLabel("unknown class", repr(value), expected)


def spans_of(value: Any, names: Sequence[str] | None = None) -> tuple[Span, ...]:
    """Sorted spans that do not overlap.

    Args:
        value: a list of spans: [start, end, class], or a map with start, end and class (or label). [start, end] if there is
            only one class.
        names: of the classes from 1 on. None: classes are numbers.

    Raises:
        InvalidLabel: for anything else, with the first span that is wrong.
    """
    triples = [_as_triple(span, names) for span in value] if isinstance(value, list | tuple) else value
    if problem := _problem_of_spans(triples, names):
        raise InvalidLabel("malformed span", *problem)
    return tuple(sorted(tuple(span) for span in triples))


def _as_triple(span: Any, names: Sequence[str] | None) -> Any:
    """A span of any form as [start, end, class number]; anything else as it is."""
    if isinstance(span, dict) and set(span) in ({"start", "end", "class"}, {"start", "end", "label"}):
        span = [span["start"], span["end"], span.get("class", span.get("label"))]
    if names is not None and len(names) == 1 and isinstance(span, list | tuple) and len(span) == 2:
        span = [*span, 1]
    if names is not None and isinstance(span, list | tuple) and len(span) == 3 and isinstance(span[2], str):
        try:
            span = [span[0], span[1], 1 + list(names).index(span[2])]
        except ValueError:
            raise InvalidLabel("unknown class", repr(span[2]), f"one of {', '.join(names)}") from None
    return span


def _problem_of_spans(spans: Any, names: Sequence[str] | None) -> tuple[str, str] | None:
    """(found, expected) of the first invalid span."""
    if not isinstance(spans, list):
        return repr(spans), "a list of [start, end, class]"
    highest = MAX_CLASS if names is None else len(names)
    for span in spans:
        is_triple = isinstance(span, list | tuple) and len(span) == 3
        if not is_triple or not all(isinstance(v, int) and not isinstance(v, bool) for v in span):
            return repr(span), "[start, end, class], three whole numbers" + (
                " or a class by name" if names else ""
            )
        start, end, class_id = span
        if not 0 <= start < end <= MAX_END:
            return repr(span), f"0 <= start < end <= {MAX_END:,}"
        if not 1 <= class_id <= highest:
            return repr(span), f"a class from 1 to {highest}"
    for span, following in itertools.pairwise(sorted(list(span) for span in spans)):
        if following[0] < span[1]:
            return f"{span} and {following}", "spans that do not overlap"
    return None


def spans_in_json(value: Any) -> Any:
    """Spans that stand as JSON in a cell or a string; other values, and text that is not JSON, as they are."""
    return from_cell(value, json.loads) if isinstance(value, str) else value
