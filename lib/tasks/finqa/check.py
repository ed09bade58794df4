"""Stage 00 for FinQA: all problems of the records, and the valid records.

| kind                    | meaning                                                                          |
|-------------------------|----------------------------------------------------------------------------------|
| unreadable file, not JSON, malformed record | there is no record to keep                                   |
| missing program         | the question has no gold program                                                 |
| program cannot run      | it is malformed, divides by zero, or reads a row that the table lacks            |
| wrong exe_ans           | the value of the program differs from the value in the record                    |
| missing exe_ans         | the record has no value; the value of the program is used                        |
| missing question        | the question is empty                                                            |
| missing answer          | the written answer is empty; it is not used                                      |
| answer rounding         | the written answer is near the value, but does not round it to its decimals      |
| answer sign             | it is the value with the other sign                                              |
| answer times 100        | it is the value times or divided by 100: a missing or wrong percent sign         |
| answer times 1000       | it is the value times or divided by a power of 1000: thousands instead of units  |
| answer differs          | it is another number, or yes for no                                              |
| answer unreadable       | it has no number where the value is one, or too many numbers                     |
| operand in question     | a number of the program is in the question only, not on the page                 |
| operand not on page     | it is in neither, also not as a percentage, with commas or as a word             |
| repeated id             | two records have the same id                                                     |
| repeated question       | the same question on the same page, with the same value                          |
| contradicting questions | the same question on the same page, with different values                        |
| page in two splits      | another split has the same page, by name or by content                           |
| table in two splits     | pages of two splits differ but have the same table                               |
| differing page          | records with the same file name have different pages                             |
| empty table, one-row table, ragged table | a degenerate table                                              |
| repeated row name       | a table operation reads one of several rows of that name: the last one counts    |
| no numbers              | the page has no number                                                           |

The gold value is the value of the program. The written `answer` is compared with it to show faults of the data, and is
used for nothing else. In half of the records it is the value times 100 with a percent sign, which is no problem. In one
record of sixteen it is another number.
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
from lib.tasks.finqa.builtin import BUILTIN, SOURCE, builtin_records
from lib.tasks.finqa.cross_record_checks import CrossRecordChecks, Finding, page_text
from lib.tasks.finqa.numbers import NUMBER, numbers_in, operands
from lib.tasks.finqa.program import ProgramError, execute, parse
from lib.tasks.finqa.record import MALFORMED, NOT_JSON, UNREADABLE, Record, find_files, read_records

# These would make training or its evaluation wrong: each is an error unless finqa.drop names it
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
MAX_NUMBERS = 3  # in a written answer; with more, one of them would often match by chance


def sources(config: Config) -> list[Path]:
    """The files to read. Raises MissingInput when there are none. `check` reports unreadable files."""
    if config.data.path in BUILTIN:
        return [Path(builtin.__file__)]
    return [path for path in find_files(config.data.path) if os.access(path, os.R_OK)]


def check(config: Config) -> Iterator[Document | Problem]:
    """The valid records, and all problems.

    A problem of HARMFUL is an error, because it would make training or its evaluation wrong. A kind that `finqa.drop`
    names is a warning, and its record is dropped. Records with errors are dropped too. For a page in two splits, the
    records of the training side have the problem. Dropping them keeps the evaluation as published.

    Raises:
        BadConfig: `finqa.drop` names an unknown kind.
        MissingInput: there are no files.
    """
    if config.data.drop:
        raise BadConfig(
            "data.drop is for task text. For task finqa, set finqa.drop: the kinds of problems to drop"
        )
    drop = frozenset(config.finqa.drop)
    for kind in sorted(drop - DROPPABLE):
        raise BadConfig(f"finqa.drop: '{kind}' is not a kind of problem{did_you_mean(kind, DROPPABLE)}")
    items = list(_read(config))
    records = [item for item in items if isinstance(item, Record)]
    cross_checks = CrossRecordChecks(records)
    kept = errors = 0
    for item in items:
        if isinstance(item, Problem):
            problems = [item]
        else:
            source = _source(config, item)
            problems = [
                Problem("", kind, source, item.id, *(_shortened(w) for w in words))
                for kind, *words in (*_record_problems(item), *cross_checks.problems(item))
            ]
        problems = [_with_severity(problem, drop) for problem in problems]
        yield from problems
        errors += sum(problem.severity == "error" for problem in problems)
        valid = not any(problem.severity == "error" or problem.kind in drop for problem in problems)
        if valid and isinstance(item, Record):
            kept += 1
            yield Document(item.id, item.to_json(), _source(config, item))
    if not kept and not errors:
        found = f"{len(records)} records, none of them valid"
        advice = "see the problems above; with fewer kinds in finqa.drop, more records are kept"
        yield Problem("error", "no records", config.data.path, "", found, "at least one valid record", advice)


def _read(config: Config) -> Iterable[Record | Problem]:
    if config.data.path in BUILTIN:
        return builtin_records(config.data.path, config.seed)
    return read_records(config.data.path)


def _source(config: Config, record: Record) -> str:
    if config.data.path in BUILTIN:
        return SOURCE
    return f"{config.data.path.rstrip('/')}/{record.split}.json"


def _with_severity(problem: Problem, drop: frozenset[str]) -> Problem:
    """The problem with its severity. The advice also says what happens to the record."""
    if problem.kind in drop:
        outcome = "dropped by finqa.drop"
        return replace(problem, severity="warning", advice=_joined(problem.advice, outcome))
    if problem.kind in HARMFUL:
        return replace(
            problem,
            severity="error",
            advice=_joined(problem.advice, "fix it, or add the kind to finqa.drop"),
        )
    return replace(problem, severity="warning", advice=_joined(problem.advice, "kept"))


def _joined(*words: str) -> str:
    return "; ".join(w for w in words if w)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


# ----------------------------------------------------------------------------------------- one record


def _record_problems(record: Record) -> Iterator[Finding]:
    """The problems of one record alone."""
    if not record.question.strip():
        yield "missing question", "nothing", "a question", ""
    if not record.answer.strip():
        yield "missing answer", "nothing", "an answer", "answers are not used"
    if record.program is None:
        yield "missing program", "nothing", "a program", "without it there is no gold candidate"
        return
    try:
        value = execute(record.program, record.table)
    except ProgramError as error:
        yield "program cannot run", record.program, "a program with a value", str(error)
        return
    if record.exe_ans is None:
        yield "missing exe_ans", "nothing", _format(value), "the value of the program is used"
    elif not _same_value(value, record.exe_ans):
        words = f"{_format(value)} from {record.program}"
        yield "wrong exe_ans", _format(record.exe_ans), words, "one of the two is wrong"
    if record.answer.strip():
        yield from compare_answer(record.answer, value)
    yield from _operand_problems(record)
    yield from _row_problems(record)


def _same_value(value: float | str, other: float | str) -> bool:
    if isinstance(value, str) or isinstance(other, str):
        return value == other
    # FinQA compares values rounded to five decimals, however large they are
    return abs(value - other) <= 1.01e-5 + 1e-12 * abs(value)


def _format(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"


def compare_answer(answer: str, value: float | str) -> Iterator[Finding]:
    """How the written answer differs from the value of the program. Nothing when it is the rounded value."""
    words = (answer, _format(value), "the value of the program is gold")
    if isinstance(value, str):
        found = _YES_NO.findall(answer.lower())
        if found != [value]:
            yield ("answer differs" if len(found) == 1 else "answer unreadable", *words)
        return
    # Of an answer such as "$ 386797190 or $ 386.8 million", the number that fits best counts
    numbers = list(NUMBER.finditer(answer.replace("\\n", " ")))
    if not 1 <= len(numbers) <= MAX_NUMBERS:
        yield ("answer unreadable", *words)
        return
    kind = min((_discrepancy(match, value) for match in numbers), key=_DISCREPANCIES.index)
    if kind:
        yield (kind, *words)


_DISCREPANCIES = (
    "",
    "answer rounding",
    "answer sign",
    "answer times 100",
    "answer times 1000",
    "answer differs",
)


def _discrepancy(match: re.Match, value: float) -> str:
    """How one number of the answer differs from the value: a kind, or "" when it does not."""
    digits = match[0].replace(",", "").replace("%", "").replace("$", "").replace(" ", "").rstrip(".")
    decimals = len(digits.partition(".")[2])
    written, half = float(digits), 0.5 * 10.0**-decimals
    percent = match[2] is not None
    expected = value * 100 if percent else value

    def is_rounded(to: float) -> bool:
        return abs(written - to) <= half * 1.0001 + 1e-5

    def is_near(to: float) -> bool:
        return math.isclose(written, to, rel_tol=0.01) or abs(written - to) <= 2 * half * 1.0001

    def is_scaled(to: float) -> bool:
        # Scaling makes chance matches likely, so rounding to a single digit is not enough here
        return math.isclose(written, to, rel_tol=0.01) or (
            is_rounded(to) and math.isclose(written, to, rel_tol=0.05)
        )

    if is_rounded(expected):
        return ""
    if is_near(expected):
        return "answer rounding"
    if is_near(-expected):
        return "answer sign"
    for kind, factors in (("answer times 100", (1e2, 1e-2)), ("answer times 1000", (1e3, 1e-3, 1e6, 1e-6))):
        if any(is_scaled(sign * expected * factor) for factor in factors for sign in (1, -1)):
            return kind
    return "answer differs"


# ----------------------------------------------------------------------------------------- operands and rows


def _operand_problems(record: Record) -> Iterator[Finding]:
    assert record.program is not None
    page, question = numbers_in(page_text(record)), numbers_in(record.question)
    for operand in dict.fromkeys(operands(record.program)):
        forms = numbers_in(operand)
        if forms & page:
            continue
        kind = "operand in question" if forms & question else "operand not on page"
        yield kind, f"{operand} in {record.program}", "a number of the table or text", ""


def _row_problems(record: Record) -> Iterator[Finding]:
    assert record.program is not None
    names = [row[0] for row in record.table if row]
    for name in dict.fromkeys(s.first.text for s in parse(record.program) if s.reads_table):
        if names.count(name) > 1:
            found = f"{names.count(name)} rows named {name!r}"
            yield "repeated row name", found, "one row of the name", "the last one counts, as in FinQA"
