"""Programs as text that describes their numbers by the words of the page, for a ranker to read:

    divide(24800 [flight attendants, total], 15400 [pilots, total]) = 1.61039

The text of a candidate does not depend on the question.
"""

import functools
import re
from collections.abc import Sequence

from lib.tasks.finqa.examples import format_value
from lib.tasks.finqa.numbers import PageNumbers, Span
from lib.tasks.finqa.program import Argument, Step, as_argument, parse
from lib.tasks.finqa.sentence import CHARACTER_CODE, year_of

WORDS = 10  # describe one number
TOTAL_WORDS = 30  # describe all numbers of a program together; each has at least MIN_WORDS
MIN_WORDS = 5
_BEFORE = 6  # of WORDS around a number in a sentence, the number of words before it

_WORD = re.compile(r"[^\W_](?:[\w.,%&'/-]*[\w%])?")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}")
_FOOTNOTE = re.compile(r"\(\s*(?:[a-z]|[0-9]{1,2})\s*\)")
_GLUED = re.compile(
    r"(?<=[a-z])(?=(?:19|20)[0-9]{2}\b)|(?<=\b[0-9])(?=(?:19|20)[0-9]{2}\b)|(?<=\b[0-9]{2})(?=(?:19|20)[0-9]{2}\b)"
)
_NEXT = re.compile(r"(?<![\w.])(?!(?:19|20)[0-9]{2}\b)[0-9]")  # the next number, years excluded
_QUANTITY = re.compile(r"[0-9][0-9,.]*%?")
_STOP_WORDS = frozenset((  # words of a sentence that do not describe its numbers
    "a", "an", "and", "are", "as", "at", "be", "been", "by", "for", "from", "had", "has", "have", "in",
    "into", "is", "it", "its", "of", "on", "or", "our", "s", "such", "than", "that", "the", "their",
    "there", "these", "this", "to", "was", "we", "were", "which", "with", "would", "approximately",
    "respectively", "million", "millions", "billion", "thousand", "thousands", "percent", "december",
    "year", "ended",
))  # fmt: skip


def ground(
    program: str,
    value: float | str,
    page: PageNumbers,
    off_page: PageNumbers | None = None,
    *,
    words: int = WORDS,
) -> str:
    """The program with a description of each of its numbers, and its value.

    A number of the table is described by its row and column names, a number of the text by words of its sentence.
    Numbers that the page lacks have no description. A repeated number is described once. Where a number occurs
    several times, the occurrence that shares a row, column or sentence with most of the other numbers counts.

    Args:
        value: the value of the program.
        off_page: another page. The words come from its corresponding cells and sentences, so they are wrong (a control).
        words: the limit for one number; lower when the program has many numbers.

    Raises:
        ProgramError: the program is malformed.
    """
    steps = parse(program)
    spans = _spans(steps, page)
    described = len(spans) + sum(step.reads_table for step in steps)
    budget = min(words, max(MIN_WORDS, TOTAL_WORDS // max(described, 1)))
    undescribed = dict(spans)

    def number(argument: Argument) -> str:
        span = undescribed.pop(argument.text, None)
        text = _plain(argument)
        if span is None:
            return text
        return _with_words(text, _describe(*_off_page_span(span, page, off_page), budget))

    parts = []
    for step in steps:
        if step.reads_table:
            name, columns = _row_words(step.first.text, page, off_page, budget)
            parts.append(f"{step.operation}({_with_words(name, columns)})")
        else:
            parts.append(f"{step.operation}({number(step.first)}, {number(step.second)})")
    return f"{', '.join(parts)} = {format_value(value)}"


def _with_words(text: str, words: str) -> str:
    return f"{text} [{words}]" if words else text


def _plain(argument: Argument) -> str:
    """The argument as text, constants as numbers: one token instead of four."""
    return "-1" if argument.text == "const_m1" else argument.text.removeprefix("const_")


# ----------------------------------------------------------------------------------------- choice of occurrences


def _spans(steps: Sequence[Step], page: PageNumbers) -> dict[str, Span]:
    """The chosen span of each number of the program that the page has."""
    found: dict[str, list[Span]] = {}
    for step in steps:
        for argument in (step.first, step.second):
            if argument.value is None or argument.text in found:
                continue
            if spans := [span for span in page.find(argument.text) if not _is_part_of_name(span, page)]:
                found[argument.text] = spans
    lines = {text: {line for span in spans for line in _lines(span)} for text, spans in found.items()}
    return {text: _best(text, spans, lines) for text, spans in found.items()}


def _is_part_of_name(span: Span, page: PageNumbers) -> bool:
    """Whether the number is a small part of a header or row name, such as a footnote mark or the day of a date."""
    if not span.in_table or (span.row > 0 and span.column > 0) or span.percent or not span.text.isdigit():
        return False
    return len(span.text) < 3 and re.search("[a-z]", page.table[span.row][span.column], re.I) is not None


def _lines(span: Span) -> tuple[tuple[str, int], ...]:
    """What a span can share with others: its row and column, or its sentence."""
    return (("row", span.row), ("column", span.column)) if span.in_table else (("sentence", span.sentence),)


def _best(text: str, spans: list[Span], lines: dict[str, set]) -> Span:
    """The span that shares a line with most of the other numbers.

    Of equal ones, spans in the table come first, then those with the same percent sign.
    """
    if len(spans) == 1:
        return spans[0]
    others = [other_lines for other, other_lines in lines.items() if other != text]

    def merit(span: Span) -> tuple[int, bool, bool]:
        shared = sum(any(line in other_lines for line in _lines(span)) for other_lines in others)
        return shared, span.in_table, span.percent == text.endswith("%")

    return max(spans, key=merit)


def _off_page_span(span: Span, page: PageNumbers, off_page: PageNumbers | None) -> tuple[Span, PageNumbers]:
    """The span and its page, or the corresponding span of another page. Rows and columns stay together."""
    if off_page is None or not off_page.spans:
        return span, page
    if span.in_table and len(off_page.table) > 1:
        row = _wrapped(span.row, len(off_page.table))
        column = _wrapped(span.column, len(off_page.table[row]))
        return Span(span.text, span.negative, span.percent, 0, 0, row=row, column=column), off_page
    others = [p for p in off_page.spans if not p.in_table] or off_page.spans
    number = [p for p in page.spans if p.in_table == span.in_table].index(span)
    return others[number % len(others)], off_page


def _wrapped(index: int, size: int) -> int:
    """The index within a table of another size. Only the header is mapped to the header, 0."""
    return 0 if index == 0 or size < 2 else (index - 1) % (size - 1) + 1


# ----------------------------------------------------------------------------------------- descriptions


def _describe(span: Span, page: PageNumbers, budget: int) -> str:
    if not span.in_table:
        return _around(page.sentences[span.sentence], span, budget)
    if span.row == 0 or span.column == 0:
        return _describe_header(span, page, budget)
    row, column = _split_budget(
        _header_words(page.row_name(span.row)), _column_words(page, span.column), budget
    )
    return ", ".join(" ".join(part) for part in (row, column) if part)


def _describe_header(span: Span, page: PageNumbers, budget: int) -> str:
    """The other words of the cell. If there are none, "year" for a year, or the other name of its row or column."""
    name = page.column_name(span.column) if span.row == 0 else page.row_name(span.row)
    words = [word for word in _header_words(name) if word != span.text]
    if not words and span.year_like:
        return "year"
    other_name = page.row_name(0) if span.row == 0 else page.column_name(0)
    return " ".join(_clip(words or _header_words(other_name), budget))


def _split_budget(row: list[str], column: list[str], budget: int) -> tuple[list[str], list[str]]:
    """The row name and the column name, shortened to the budget together. A short name is kept whole."""
    for_column = min(len(column), max(budget // 3, budget - len(row)))
    return _clip(row, budget - for_column), _clip(column, for_column, from_end=True)


def _clip(words: list[str], budget: int, from_end: bool = False) -> list[str]:
    """At most `budget` words: years first, then the first words or the last."""
    if len(words) <= budget:
        return words
    order = sorted(range(len(words)), reverse=from_end)
    order.sort(key=lambda i: not _YEAR.fullmatch(words[i]))
    return [words[i] for i in sorted(order[:budget])]


def _header_words(name: str) -> list[str]:
    return list(_words_of(name))


@functools.lru_cache(maxsize=4096)
def _words_of(name: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(_FOOTNOTE.sub(" ", _GLUED.sub(" ", CHARACTER_CODE.sub(" ", name)))))


def _column_words(page: PageNumbers, column: int) -> list[str]:
    """The words of the column's name. None where the first row has a number there and is no header."""
    words = _header_words(page.column_name(column)) if column > 0 else []
    return [] if all(_QUANTITY.fullmatch(w) and not _YEAR.fullmatch(w) for w in words) else words


def _row_words(name: str, page: PageNumbers, off_page: PageNumbers | None, budget: int) -> tuple[str, str]:
    """(name of the row that a table operation reads, names of its columns if they fit the budget)."""
    named = [i for i, row in enumerate(page.table) if row and as_argument(row[0]) == name]
    row = named[-1] if named else -1
    if off_page is not None and row >= 0 and len(off_page.table) > 1:
        page, row = off_page, _wrapped(row, len(off_page.table))
        name = page.row_name(row)
    if row < 0:
        return name, ""
    names = [_column_words(page, column) for column in range(1, len(page.table[row]))]
    short = sum(map(len, names)) <= budget
    return " ".join(name.split()), ", ".join(" ".join(n) for n in names if n) if short else ""


# The programs of a pool describe the same numbers again and again
@functools.lru_cache(maxsize=4096)
def _around(sentence: str, span: Span, budget: int) -> str:
    """Informative words close to the number, in the order of the sentence, then the year of the number.

    Other years are left out when this year is known.
    """
    year = year_of(sentence, span.start)
    before = _informative_words(sentence[: span.start], year is None)
    clause, *_ = _NEXT.split(sentence[span.end :], maxsplit=1)
    after = [w for w in _informative_words(clause, year is None) if w not in before]
    if len(before) + len(after) < budget // 2:
        after = [w for w in _informative_words(sentence[span.end :], year is None) if w not in before]
    limit = max(budget * _BEFORE // WORDS, budget - len(after))
    before = before[-limit:]
    words = " ".join([*before, *after[: budget - len(before)]])
    return ", ".join(part for part in (words, year) if part)


def _informative_words(text: str, years: bool) -> list[str]:
    """The informative words of a text. A repeated word is kept at its last position."""
    words = [w for w in _header_words(text) if _is_informative(w, years)]
    return list(dict.fromkeys(reversed(words)))[::-1]


def _is_informative(word: str, years: bool) -> bool:
    if _YEAR.fullmatch(word):
        return years
    return word.lower() not in _STOP_WORDS and re.search(r"[^\W\d_]{2}", word) is not None
