"""Pages as text within a token budget.

`serialise` turns a page into lines: the sentences of the text, and a sentence for each table row. When the budget is too
small, lines that match the question are selected. FinQA's evidence labels are not used, because they do not exist for
new questions.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lib.tasks.finqa.record import Record

# Tuned on FinQA's train.json. The criterion: the share of the programs' numbers that are kept at 256 words
TERM_SATURATION = 1.2  # BM25's k1
LENGTH_PENALTY = 0.3  # BM25's b
ROW_NAME_WEIGHT = 2  # a word in a row name counts this often
ROW_PRIOR = 3.0  # two of three numbers that programs use are in the table
NO_NUMBER_FACTOR = 0.1  # no program can use a sentence without a digit

_TOKEN = re.compile(r"[a-z]+|[0-9][0-9,.]*[0-9]|[0-9]")
_DIGIT = re.compile(r"[0-9]")
_TWICE = re.compile(r"\s*\([^()]*\)\s*$")
_STOP_WORDS = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "been", "by", "did", "do", "does", "for", "from", "had",
    "has", "have", "how", "if", "in", "into", "is", "it", "its", "much", "many", "of", "on", "or", "s",
    "than", "that", "the", "their", "there", "this", "to", "was", "we", "were", "what", "when", "where",
    "which", "while", "who", "why", "will", "with", "would",
))  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A sentence of the page, or a table row as a sentence. `name` is the row name, "" for a sentence."""

    text: str
    name: str = ""
    is_row: bool = False


def page_lines(record: Record) -> list[Line]:
    """The lines of the page in order: text before the table, rows, text after it."""
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
    """A cell without FinQA's repetition of the number: `-32 ( 32 )` is `-32`, `$ 5,829` is `$5,829`."""
    text = " ".join(cell.split())
    short = _TWICE.sub("", text)
    if short and "".join(_DIGIT.findall(short)) == "".join(_DIGIT.findall(text[len(short) :])):
        text = short
    return text.replace("$ ", "$")


def whole_page(record: Record) -> str:
    """All lines of the page in order."""
    return "\n".join(line.text for line in page_lines(record))


def serialise(record: Record, question: str, budget: int, count_tokens: Callable[[str], int]) -> str:
    """The page as lines of text in page order, of at most `budget` tokens in total.

    When the page exceeds the budget, lines are selected by their score for the question. A line that does not fit is
    skipped, and shorter ones follow. If no line fits, the best one is shortened.

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

    # A joined text can have more tokens than its parts
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
    """The relevance of each line to the question: BM25 over the lines of the page, with the weights above.

    BM25: Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009.
    """
    bags = [Counter(_terms(line.text)) for line in lines]
    for bag, line in zip(bags, lines, strict=True):
        for term in _terms(line.name):
            bag[term] += ROW_NAME_WEIGHT - 1
    lengths = [sum(bag.values()) for bag in bags]
    average = sum(lengths) / len(lengths) if lengths else 0
    weights = {}
    for term in Counter(_terms(question)):
        document_frequency = sum(term in bag for bag in bags)
        weights[term] = math.log(1 + (len(bags) - document_frequency + 0.5) / (document_frequency + 0.5))

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
    return [_stem(word) for word in _TOKEN.findall(text.lower()) if word not in _STOP_WORDS]


def _stem(word: str) -> str:
    """A word without common English endings. A number without commas."""
    if word[0].isdigit():
        return word.replace(",", "").rstrip(".")
    for ending in ("ments", "ment", "ings", "ing", "ies", "es", "ed", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
