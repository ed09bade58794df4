"""Pages as text that fits a budget.

`serialise` puts a page before a model: table rows as sentences among the sentences of the text, those that the
question asks about first when not all fit. It reads the page and the question and nothing else: FinQA's
evidence labels would be a gift that no user can make.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lib.tasks.finqa.record import Record

# Chosen on FinQA's train.json, as the share of the programs' numbers that survive at 256 words
TERM_SATURATION = 1.2  # BM25's k1
LENGTH_PENALTY = 0.3  # BM25's b
ROW_NAME_WEIGHT = 2  # a word of a row's name counts as so many
ROW_PRIOR = 3.0  # two of three numbers that a program needs stand in the table
NO_NUMBER_FACTOR = 0.1  # a sentence without a digit explains, but no program can use it

_TOKEN = re.compile(r"[a-z]+|[0-9][0-9,.]*[0-9]|[0-9]")
_DIGIT = re.compile(r"[0-9]")
_TWICE = re.compile(r"\s*\([^()]*\)\s*$")
_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "by",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "how",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "much",
        "many",
        "of",
        "on",
        "or",
        "s",
        "than",
        "that",
        "the",
        "their",
        "there",
        "this",
        "to",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "will",
        "with",
        "would",
    ]
)


@dataclass(frozen=True)
class Line:
    """A sentence of the page, or a row of its table as one. `name` is the row's, "" for a sentence."""

    text: str
    name: str = ""
    is_row: bool = False


def page_lines(record: Record) -> list[Line]:
    """The page in its order: text before the table, rows, text after it."""
    rows = [Line(text, name, True) for name, text in _row_sentences(record.table)]
    before, after = (
        [Line(" ".join(s.split())) for s in text] for text in (record.pre_text, record.post_text)
    )
    return [line for line in (*before, *rows, *after) if line.text]


def _row_sentences(table: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(name, sentence) of each row: `the pilots of american is 7900 ; of us airways is 4100`."""
    header = table[0] if table else ()
    for row in table[1:] if len(table) > 1 else table:
        name = " ".join(row[0].split()) if row else ""
        parts = []
        for column, cell in enumerate(row[1:], 1):
            value = plain_cell(cell)
            title = " ".join(header[column].split()) if column < len(header) and row is not header else ""
            if value:
                parts.append(f"of {title} is {value}" if title else f"is {value}")
        start = f"the {name}" if name else "the table"
        yield name, f"{start} {' ; '.join(parts)}".strip() if parts else name


def plain_cell(cell: str) -> str:
    """A cell without what FinQA says twice: `-32 ( 32 )` is `-32`, `$ 5,829` is `$5,829`."""
    text = " ".join(cell.split())
    short = _TWICE.sub("", text)
    if short and "".join(_DIGIT.findall(short)) == "".join(_DIGIT.findall(text[len(short) :])):
        text = short
    return text.replace("$ ", "$")


def whole_page(record: Record) -> str:
    """All lines of the page in their order."""
    return "\n".join(line.text for line in page_lines(record))


def serialise(record: Record, question: str, budget: int, count_tokens: Callable[[str], int]) -> str:
    """The page as lines of text of at most `budget` tokens together, in page order.

    When not all of it fits, lines are taken by their score for the question as long as there is room; a line
    that is too long is passed over for shorter ones, and cut only when nothing else could be taken.

    Args:
        count_tokens: how many tokens a text has for the model that will read it.
    """
    lines, whole = page_lines(record), whole_page(record)
    if budget < 1 or not whole:
        return ""
    if count_tokens(whole) <= budget:
        return whole
    scores = score_lines(lines, question)
    order = sorted(range(len(lines)), key=lambda i: (-scores[i], i))
    chosen: list[int] = []
    room = budget
    for i in order:
        cost = count_tokens(lines[i].text + "\n")
        if cost <= room:
            chosen.append(i)
            room -= cost

    def joined() -> str:
        return "\n".join(lines[i].text for i in sorted(chosen))

    # Tokens of a whole can be more than those of its parts
    while chosen and count_tokens(joined()) > budget:
        chosen.pop()
    return joined() if chosen else _cut(lines[order[0]].text, budget, count_tokens)


def _cut(text: str, budget: int, count_tokens: Callable[[str], int]) -> str:
    """The first words that fit."""
    words = text.split()
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens(" ".join(words[:middle])) <= budget else (low, middle - 1)
    return " ".join(words[:low])


def score_lines(lines: Sequence[Line], question: str) -> list[float]:
    """How much each line has to do with the question: BM25 over the lines of this page, and a few habits.

    BM25: Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009.
    """
    bags = [Counter(_terms(line.text)) for line in lines]
    for bag, line in zip(bags, lines, strict=True):
        for term in _terms(line.name):
            bag[term] += ROW_NAME_WEIGHT - 1
    lengths = [sum(bag.values()) for bag in bags]
    average = sum(lengths) / len(lengths) if lengths else 0
    asked = Counter(_terms(question))
    weights = {}
    for term in asked:
        holding = sum(term in bag for bag in bags)
        weights[term] = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))

    scores = []
    for bag, length, line in zip(bags, lengths, lines, strict=True):
        score = ROW_PRIOR if line.is_row else 0.0
        damping = TERM_SATURATION * (1 - LENGTH_PENALTY + LENGTH_PENALTY * length / max(average, 1))
        for term, weight in weights.items():
            if count := bag.get(term):
                score += weight * count * (TERM_SATURATION + 1) / (count + damping)
        scores.append(score if _DIGIT.search(line.text) else score * NO_NUMBER_FACTOR)
    return scores


def _terms(text: str) -> list[str]:
    return [_stem(word) for word in _TOKEN.findall(text.lower()) if word not in _STOP]


def _stem(word: str) -> str:
    """A word without the commonest English endings; numbers without commas."""
    if word[0].isdigit():
        return word.replace(",", "").rstrip(".")
    for ending in ("ments", "ment", "ings", "ing", "ies", "es", "ed", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
