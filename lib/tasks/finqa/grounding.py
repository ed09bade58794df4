"""Programs written with what their numbers are called on the page, so that a ranker can judge them from words:

    divide(24800 [flight attendants, total], 15400 [pilots, total]) = 1.61039

Knows pages and programs, and nothing of questions: a candidate reads the same whatever is asked of its page.
"""

import re
from collections.abc import Sequence

from lib.tasks.finqa.examples import written
from lib.tasks.finqa.numbers import PageNumbers, Place
from lib.tasks.finqa.program import Argument, Step, parse
from lib.tasks.finqa.sentence import MARK, year_of

WORDS = 10  # that describe one number
ALL_WORDS = 30  # of all numbers of a program together, as long as each has LEAST_WORDS
LEAST_WORDS = 5
_BEFORE = 6  # of the words around a number in a sentence so many stand before it, if there are enough

_WORD = re.compile(r"[^\W_](?:[\w.,%&'/-]*[\w%])?")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}")
_FOOTNOTE = re.compile(r"\(\s*(?:[a-z]|[0-9]{1,2})\s*\)")
_GLUED = re.compile(
    r"(?<=[a-z])(?=(?:19|20)[0-9]{2}\b)|(?<=\b[0-9])(?=(?:19|20)[0-9]{2}\b)|(?<=\b[0-9]{2})(?=(?:19|20)[0-9]{2}\b)"
)
_NEXT = re.compile(r"(?<![\w.])(?!(?:19|20)[0-9]{2}\b)[0-9]")  # the next number that is no year
_QUANTITY = re.compile(r"[0-9][0-9,.]*%?")
_DULL = frozenset((  # words of a sentence that say little about its numbers
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
    elsewhere: PageNumbers | None = None,
    *,
    words: int = WORDS,
) -> str:
    """The program with a few words on each of its numbers, and what it comes to.

    A number of the table has its row's and its column's name, one in the text some words of its sentence. What
    stands nowhere on the page has none, nor has a number that was described before. Where a number stands several
    times, the place that most of the program's other numbers share a row, column or sentence with is taken.

    Args:
        value: what the program comes to.
        elsewhere: take the words from the corresponding places of this page instead; they then say nothing true.
        words: at most so many for a number; fewer when the program has many numbers.

    Raises:
        ProgramError: the program is malformed.
    """
    steps = parse(program)
    places = _places(steps, page)
    described = len(places) + sum(step.reads_table for step in steps)
    budget = min(words, max(LEAST_WORDS, ALL_WORDS // max(described, 1)))
    todo = dict(places)

    def number(argument: Argument) -> str:
        place = todo.pop(argument.text, None)
        shown = _plain(argument)
        if place is None:
            return shown
        return _with_words(shown, _describe(*_moved(place, page, elsewhere), budget))

    parts = []
    for step in steps:
        if step.reads_table:
            name, columns = _row_words(step.first.text, page, elsewhere, budget)
            parts.append(f"{step.operation}({_with_words(name, columns)})")
        else:
            parts.append(f"{step.operation}({number(step.first)}, {number(step.second)})")
    return f"{', '.join(parts)} = {written(value)}"


def _with_words(shown: str, words: str) -> str:
    return f"{shown} [{words}]" if words else shown


def _plain(argument: Argument) -> str:
    """Constants as numbers: one word instead of four."""
    return "-1" if argument.text == "const_m1" else argument.text.removeprefix("const_")


# Which place a number is taken from


def _places(steps: Sequence[Step], page: PageNumbers) -> dict[str, Place]:
    """Where each number of the program is taken from; those on the page only."""
    found: dict[str, list[Place]] = {}
    for step in steps:
        for argument in (step.first, step.second):
            if argument.value is None or argument.text in found:
                continue
            if here := [p for p in page.find(argument.text) if not _in_name(p, page)]:
                found[argument.text] = here
    lines = {text: {line for place in here for line in _lines(place)} for text, here in found.items()}
    return {text: _best(text, here, lines) for text, here in found.items()}


def _in_name(place: Place, page: PageNumbers) -> bool:
    """Whether it is a small part of a header or row name, such as the mark of a footnote or the day of a date."""
    if (
        not place.in_table
        or (place.row > 0 and place.column > 0)
        or place.percent
        or not place.text.isdigit()
    ):
        return False
    return len(place.text) < 3 and re.search("[a-z]", page.table[place.row][place.column], re.I) is not None


def _lines(place: Place) -> tuple[tuple[str, int], ...]:
    """What a place shares with others: its row and column, or its sentence."""
    return (
        (("row", place.row), ("column", place.column)) if place.in_table else (("sentence", place.sentence),)
    )


def _best(text: str, here: list[Place], lines: dict[str, set]) -> Place:
    """The place in line with most of the other numbers; of equals that in the table, written alike, first."""
    if len(here) == 1:
        return here[0]
    others = [taken for other, taken in lines.items() if other != text]

    def merit(place: Place) -> tuple[int, bool, bool]:
        shared = sum(any(line in taken for line in _lines(place)) for taken in others)
        return shared, place.in_table, place.percent == text.endswith("%")

    return max(here, key=merit)


def _moved(place: Place, page: PageNumbers, elsewhere: PageNumbers | None) -> tuple[Place, PageNumbers]:
    """The place, or the one that corresponds to it on another page: rows and columns stay together."""
    if elsewhere is None or not elsewhere.places:
        return place, page
    if place.in_table and len(elsewhere.table) > 1:
        row = _wrapped(place.row, len(elsewhere.table))
        column = _wrapped(place.column, len(elsewhere.table[row]))
        return Place(place.text, place.negative, place.percent, 0, 0, row=row, column=column), elsewhere
    others = [p for p in elsewhere.places if not p.in_table] or elsewhere.places
    number = [p for p in page.places if p.in_table == place.in_table].index(place)
    return others[number % len(others)], elsewhere


def _wrapped(index: int, size: int) -> int:
    """The index within a table of another size; 0, the header, only where it was."""
    return 0 if index == 0 or size < 2 else (index - 1) % (size - 1) + 1


# Its words


def _describe(place: Place, page: PageNumbers, budget: int) -> str:
    if not place.in_table:
        return _around(page.sentences[place.sentence], place, budget)
    if place.row == 0 or place.column == 0:
        return _describe_header(place, page, budget)
    row, column = _share(_header_words(page.row_name(place.row)), _column_words(page, place.column), budget)
    return ", ".join(" ".join(part) for part in (row, column) if part)


def _describe_header(place: Place, page: PageNumbers, budget: int) -> str:
    """What else is in the cell; if nothing, that it is a year, or the other name of its row or column."""
    name = page.column_name(place.column) if place.row == 0 else page.row_name(place.row)
    words = [word for word in _header_words(name) if word != place.text]
    if not words and place.year_like:
        return "year"
    across = page.row_name(0) if place.row == 0 else page.column_name(0)
    return " ".join(_clip(words or _header_words(across), budget))


def _share(row: list[str], column: list[str], budget: int) -> tuple[list[str], list[str]]:
    """The two names cut to the budget: of what is short nothing is lost."""
    for_column = min(len(column), max(budget // 3, budget - len(row)))
    return _clip(row, budget - for_column), _clip(column, for_column, from_end=True)


def _clip(words: list[str], budget: int, from_end: bool = False) -> list[str]:
    """At most `budget` words: years, and then the first ones or the last."""
    if len(words) <= budget:
        return words
    order = sorted(range(len(words)), reverse=from_end)
    order.sort(key=lambda i: not _YEAR.fullmatch(words[i]))
    return [words[i] for i in sorted(order[:budget])]


def _header_words(name: str) -> list[str]:
    return _WORD.findall(_FOOTNOTE.sub(" ", _GLUED.sub(" ", MARK.sub(" ", name))))


def _column_words(page: PageNumbers, column: int) -> list[str]:
    """The column's name; none when the first row is no header but holds a number there."""
    words = _header_words(page.column_name(column)) if column > 0 else []
    return [] if all(_QUANTITY.fullmatch(w) and not _YEAR.fullmatch(w) for w in words) else words


def _row_words(name: str, page: PageNumbers, elsewhere: PageNumbers | None, budget: int) -> tuple[str, str]:
    """(name of the row that a table operation reads, names of its columns if they are short)."""
    row = max((i for i in range(len(page.table)) if page.table[i][:1] == (name,)), default=-1)
    if elsewhere is not None and row >= 0 and len(elsewhere.table) > 1:
        page, row = elsewhere, _wrapped(row, len(elsewhere.table))
        name = page.row_name(row)
    if row < 0:
        return name, ""
    names = [_column_words(page, column) for column in range(1, len(page.table[row]))]
    short = sum(map(len, names)) <= budget
    return " ".join(name.split()), ", ".join(" ".join(n) for n in names if n) if short else ""


def _around(sentence: str, place: Place, budget: int) -> str:
    """Words that say something, those nearest to the number, in the order of the sentence; then the number's year.

    Once that year is known, other years would only mislead.
    """
    year = year_of(sentence, place.start)
    before = _telling(sentence[: place.start], year is None)
    clause, *_ = _NEXT.split(sentence[place.end :], maxsplit=1)
    after = [w for w in _telling(clause, year is None) if w not in before]
    if len(before) + len(after) < budget // 2:
        after = [w for w in _telling(sentence[place.end :], year is None) if w not in before]
    most = max(budget * _BEFORE // WORDS, budget - len(after))
    before = before[-most:]
    words = " ".join([*before, *after[: budget - len(before)]])
    return ", ".join(part for part in (words, year) if part)


def _telling(text: str, years: bool) -> list[str]:
    """The words that say something, each once: where it stands last."""
    words = [w for w in _header_words(text) if _tells(w, years)]
    return list(dict.fromkeys(reversed(words)))[::-1]


def _tells(word: str, years: bool) -> bool:
    if _YEAR.fullmatch(word):
        return years
    return word.lower() not in _DULL and re.search(r"[^\W\d_]{2}", word) is not None
