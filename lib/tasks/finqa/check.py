"""Stage 00 for FinQA: every problem of the records, and the records that are fit to learn from.

| kind                    | what it says                                                                    |
|-------------------------|---------------------------------------------------------------------------------|
| unreadable file, not JSON, malformed record | there is no record to keep                                  |
| missing program         | the question has no gold program                                                |
| program cannot run      | it is malformed, divides by zero, reads a row that the table lacks              |
| wrong exe_ans           | the value of the program is not the one that the record gives                   |
| missing exe_ans         | the record gives no value; that of the program is taken                         |
| missing question        | nothing is asked                                                                |
| missing answer          | nobody wrote an answer; it is not used                                          |
| answer rounding         | the written answer is near the value, but not it rounded to these places        |
| answer sign             | it is the value with the other sign                                             |
| answer times 100        | it is the value times or divided by 100: a lost or a wrong percent sign         |
| answer times 1000       | it is the value times or divided by a power of 1000: thousands for units        |
| answer differs          | it is another number, or yes for no                                             |
| answer unreadable       | it holds no number where the value is one, or a whole paragraph of them         |
| operand in question     | a number of the program stands in the question alone, not on the page           |
| operand not on page     | it stands in neither, also not as a percentage, with commas or as a word        |
| repeated id             | two records of one name                                                         |
| repeated question       | the same question on the same page, with the same value                         |
| contradicting questions | the same question on the same page, with different values                       |
| page in two splits      | a page, by name or by content, that another split has too                       |
| table in two splits     | the same table on different pages of two splits                                 |
| differing page          | records of one file name whose page is not the same                             |
| empty table, one-row table, ragged table | a degenerate table                                             |
| repeated row name       | a table operation reads one of several rows of that name: the last counts       |
| no numbers              | a page without any number                                                       |

The gold value is that of the program. The written `answer` is compared because its faults show how FinQA was
made, and is used for nothing else: in half the records it is the value times 100 with a percent sign, which is
no problem, and in one of sixteen it is another number.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.tasks import Document, Problem
from lib.tasks.finqa import builtin
from lib.tasks.finqa.builtin import BUILTIN, PLACE, builtin_records
from lib.tasks.finqa.cross_record_checks import CrossRecordChecks, Found, page_text
from lib.tasks.finqa.numbers import NUMBER, numbers_in, operands
from lib.tasks.finqa.program import ProgramError, execute, parse
from lib.tasks.finqa.record import MALFORMED, NOT_JSON, UNREADABLE, Record, find_files, read_records

# Kept, these would make training or its evaluation wrong: each is an error unless finqa.drop names it
HARMFUL = frozenset(
    {
        UNREADABLE,
        NOT_JSON,
        MALFORMED,
        "missing program",
        "program cannot run",
        "wrong exe_ans",
        "missing question",
        "repeated id",
        "page in two splits",
        "no records",
    }
)
HARMLESS = frozenset(
    {
        "missing exe_ans",
        "missing answer",
        "answer rounding",
        "answer sign",
        "answer times 100",
        "answer times 1000",
        "answer differs",
        "answer unreadable",
        "operand in question",
        "operand not on page",
        "repeated question",
        "contradicting questions",
        "table in two splits",
        "differing page",
        "empty table",
        "one-row table",
        "ragged table",
        "repeated row name",
        "no numbers",
    }
)
DROPPABLE = (HARMFUL | HARMLESS) - {"no records"}

_YES_NO = re.compile(r"\b(yes|no)\b")
MOST_NUMBERS = 3  # in a written answer; a longer one is a paragraph, and some number of it fits by chance


def sources(config: Config) -> list[Path]:
    """The files to be read. Raises MissingInput when there are none. Unreadable ones are left to `check`."""
    if config.data.path in BUILTIN:
        return [Path(builtin.__file__)]
    return [path for path in find_files(config.data.path) if os.access(path, os.R_OK)]


def check(config: Config) -> Iterator[Document | Problem]:
    """The records that are fit, and every problem.

    A record is left out for a problem whose kind is in `finqa.drop`, which is then a warning, and for errors. Errors
    are what would make training wrong; see HARMFUL. Of a page in two splits it is the training side that has
    the problem: dropping it leaves the evaluation as it was published.

    Raises BadConfig for an unknown kind, MissingInput when there are no files.
    """
    if config.data.drop:
        raise BadConfig(
            "data.drop is for task text; for task finqa, finqa.drop names the problems to leave out"
        )
    drop = frozenset(config.finqa.drop)
    for kind in sorted(drop - DROPPABLE):
        raise BadConfig(f"finqa.drop: '{kind}' is no kind of problem{did_you_mean(kind, DROPPABLE)}")
    items = list(_read(config))
    records = [item for item in items if isinstance(item, Record)]
    across = CrossRecordChecks(records)
    kept = errors = 0
    for item in items:
        if isinstance(item, Problem):
            problems = [item]
        else:
            source = _place(config, item)
            problems = [
                Problem("", kind, source, item.id, *(_shown(w) for w in words))
                for kind, *words in (*_faults(item), *across.faults(item))
            ]
        problems = [_judged(problem, drop) for problem in problems]
        yield from problems
        errors += sum(problem.severity == "error" for problem in problems)
        fit = not any(problem.severity == "error" or problem.kind in drop for problem in problems)
        if fit and isinstance(item, Record):
            kept += 1
            yield Document(item.id, item.to_json(), _place(config, item))
    if not kept and not errors:
        found = f"{len(records)} records, none of them fit"
        advice = "see the problems above; fewer kinds in finqa.drop leave more"
        yield Problem("error", "no records", config.data.path, "", found, "some to learn from", advice)


def _read(config: Config) -> Iterable[Record | Problem]:
    if config.data.path in BUILTIN:
        return builtin_records(config.data.path, config.seed)
    return read_records(config.data.path)


def _place(config: Config, record: Record) -> str:
    if config.data.path in BUILTIN:
        return PLACE
    return f"{config.data.path.rstrip('/')}/{record.split}.json"


def _judged(problem: Problem, drop: frozenset[str]) -> Problem:
    """The problem with its severity, and in its advice what became of the record."""
    if problem.kind in drop:
        fate = "left out, as finqa.drop says"
        return replace(problem, severity="warning", advice=_joined(problem.advice, fate))
    if problem.kind in HARMFUL:
        return replace(
            problem,
            severity="error",
            advice=_joined(problem.advice, "mend it, or add the kind to finqa.drop"),
        )
    return replace(problem, severity="warning", advice=_joined(problem.advice, "kept"))


def _joined(*words: str) -> str:
    return "; ".join(w for w in words if w)


def _shown(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


# One record


def _faults(record: Record) -> Iterator[Found]:
    """What can be said of one record alone."""
    if not record.question.strip():
        yield "missing question", "nothing", "a question", ""
    if not record.answer.strip():
        yield "missing answer", "nothing", "an answer", "it is not used"
    if record.program is None:
        yield "missing program", "nothing", "a program", "without one there is no gold candidate"
        return
    try:
        value = execute(record.program, record.table)
    except ProgramError as error:
        yield "program cannot run", record.program, "a program with a value", str(error)
        return
    if record.exe_ans is None:
        yield "missing exe_ans", "nothing", _written(value), "the value of the program is taken"
    elif not _same_value(value, record.exe_ans):
        words = f"{_written(value)} from {record.program}"
        yield "wrong exe_ans", _written(record.exe_ans), words, "one of the two is wrong"
    if record.answer.strip():
        yield from compare_answer(record.answer, value)
    yield from _operand_faults(record)
    yield from _row_faults(record)


def _same_value(value: float | str, other: float | str) -> bool:
    if isinstance(value, str) or isinstance(other, str):
        return value == other
    return math.isclose(value, other, rel_tol=1e-5, abs_tol=1.01e-5)


def _written(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"


def compare_answer(answer: str, value: float | str) -> Iterator[Found]:
    """How the written answer departs from the value of the program; nothing when it is that value rounded."""
    words = (answer, _written(value), "the value of the program is gold")
    if isinstance(value, str):
        said = _YES_NO.findall(answer.lower())
        if said != [value]:
            yield ("answer differs" if len(said) == 1 else "answer unreadable", *words)
        return
    # An answer such as "$ 386797190 or $ 386.8 million" is as good as the best of its numbers
    numbers = list(NUMBER.finditer(answer.replace("\\n", " ")))
    if not 1 <= len(numbers) <= MOST_NUMBERS:
        yield ("answer unreadable", *words)
        return
    kind = min((_departure(match, value) for match in numbers), key=_DEPARTURES.index)
    if kind:
        yield (kind, *words)


_DEPARTURES = (
    "",
    "answer rounding",
    "answer sign",
    "answer times 100",
    "answer times 1000",
    "answer differs",
)


def _departure(match: re.Match, value: float) -> str:
    """How one number of the answer departs from the value: a kind, or "" when it does not."""
    digits = match[0].replace(",", "").replace("%", "").replace("$", "").replace(" ", "").rstrip(".")
    places = len(digits.partition(".")[2])
    written, half = float(digits), 0.5 * 10.0**-places
    percent = match[2] is not None
    wanted = value * 100 if percent else value

    def rounds(to: float) -> bool:
        return abs(written - to) <= half * 1.0001 + 1e-5

    def near(to: float) -> bool:
        return math.isclose(written, to, rel_tol=0.01) or abs(written - to) <= 2 * half * 1.0001

    def is_scaled(to: float) -> bool:
        # Other scales reach many numbers, so rounding to a single digit is not enough here
        return math.isclose(written, to, rel_tol=0.01) or (
            rounds(to) and math.isclose(written, to, rel_tol=0.05)
        )

    if rounds(wanted):
        return ""
    if near(wanted):
        return "answer rounding"
    if near(-wanted):
        return "answer sign"
    for kind, factors in (("answer times 100", (1e2, 1e-2)), ("answer times 1000", (1e3, 1e-3, 1e6, 1e-6))):
        if any(is_scaled(sign * wanted * factor) for factor in factors for sign in (1, -1)):
            return kind
    return "answer differs"


# Numbers of the program, and where they are found


def _operand_faults(record: Record) -> Iterator[Found]:
    assert record.program is not None
    page, question = numbers_in(page_text(record)), numbers_in(record.question)
    for operand in dict.fromkeys(operands(record.program)):
        forms = numbers_in(operand)
        if forms & page:
            continue
        kind = "operand in question" if forms & question else "operand not on page"
        yield kind, f"{operand} in {record.program}", "a number of the table or text", ""


def _row_faults(record: Record) -> Iterator[Found]:
    assert record.program is not None
    names = [row[0] for row in record.table if row]
    for name in dict.fromkeys(s.first.text for s in parse(record.program) if s.reads_table):
        if names.count(name) > 1:
            found = f"{names.count(name)} rows called {name!r}"
            yield "repeated row name", found, "one row of the name", "the last counts, as FinQA has it"
