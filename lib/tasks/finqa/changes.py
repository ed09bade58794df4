"""Wrong programs made by changing a right one: single edits, and walks of repeated edits.

A pool of single edits reveals its gold program, because all others are close to it; `naive.naive_pools` measures this.
On a walk, the gold program is one program among others, with as many before it as after it.
"""

import random
from collections.abc import Callable

from lib import randomness
from lib.sections.finqa import ChangesConfig
from lib.tasks.finqa.numbers import Span
from lib.tasks.finqa.page import Page, PageQuestions, is_number
from lib.tasks.finqa.program import TABLE_OPERATIONS, ProgramError, parse
from lib.tasks.finqa.record import Record

EDITS = ("operation", "order", "row", "column", "number", "drop", "scale", "sign")
# Drawn uniformly, so "number" is twice as frequent as the others
WALK_EDITS = ("operation", "order", "row", "column", "number", "number", "drop", "extend")
_ARITHMETIC = ("add", "subtract", "multiply", "divide")
_TRIALS = 12  # edits tried for each step of a walk

Steps = list[list[str]]  # operation and two arguments of each step
Change = tuple[int, str, str]  # number of changes before (-) or after the gold program, the program, its kind


def edit(program: str, kind: str, page: Page, draw: random.Random) -> str | None:
    """The program with one edit, or None where it allows no edit of this kind. The result may fail to run.

    Args:
        kind: one of EDITS, "extend" or "sentence".
    """
    steps = [[step.operation, step.first.text, step.second.text] for step in parse(program)]
    if kind in ("row", "column", "sentence", "number"):
        done = _edit_number(steps, kind, page, draw)
    else:
        done = _EDIT[kind](steps, page, draw)
    return ", ".join(f"{o}({a}, {b})" for o, a, b in steps) if done else None


def _edit_operation(steps: Steps, page: Page, draw: random.Random) -> bool:
    step = draw.choice(steps)
    names = TABLE_OPERATIONS if step[0] in TABLE_OPERATIONS else _ARITHMETIC
    step[0] = draw.choice([name for name in names if name != step[0]])
    return True


def _edit_order(steps: Steps, page: Page, draw: random.Random) -> bool:
    ordered = [s for s in steps if s[0] in ("subtract", "divide", "exp")]
    if ordered:
        step = draw.choice(ordered)
        step[1:] = step[:0:-1]
    return bool(ordered)


def _edit_number(steps: Steps, kind: str, page: Page, draw: random.Random) -> bool:
    """Replace one number of the program everywhere.

    The new number is in the same column (kind "row"), row (kind "column") or sentence, or anywhere (kind "number").
    """
    parsed = parse(", ".join(f"{o}({a}, {b})" for o, a, b in steps))
    numbers = {a.text for s in parsed if not s.reads_table for a in (s.first, s.second) if is_number(a)}
    tables = [s for s in steps if s[0] in TABLE_OPERATIONS]
    rows = [row for row in page.table if row]  # a row without cells has no name
    if tables and rows and kind in ("row", "number") and (not numbers or draw.random() < 0.5):
        draw.choice(tables)[1] = draw.choice(rows)[0] or "none"
        return True
    if not numbers:
        return False
    old = draw.choice(sorted(numbers))
    span = page.locate(sorted(numbers))[old]
    others = [p for p in _alternatives(span, kind, page) if _unsigned(p) not in numbers]
    if not others:
        return False
    new = _unsigned(draw.choice(others))
    for step in steps:
        if step[0] not in TABLE_OPERATIONS:
            step[1:] = [new if argument == old else argument for argument in step[1:]]
    return True


def _alternatives(span: Span | None, kind: str, page: Page) -> list[Span]:
    if kind == "number":
        return [p for p in page.spans if not p.year_like]
    if span is None or span.in_table == (kind == "sentence"):
        return []
    if kind == "sentence":
        return [p for p in page.by_sentence[span.sentence] if p.year_like == span.year_like]
    if kind == "row":
        return [p for p in page.cells if p.column == span.column and p.row != span.row]
    return [p for p in page.cells if p.row == span.row and p.column != span.column]


def _unsigned(span: Span) -> str:
    return span.text.lstrip("-")  # most gold programs write losses without the sign


def _edit_drop(steps: Steps, page: Page, draw: random.Random) -> bool:
    if len(steps) > 1:
        steps.pop()
        return True
    return False


def _edit_scale(steps: Steps, page: Page, draw: random.Random) -> bool:
    operation, factor = draw.choice(
        (("multiply", "const_100"), ("divide", "const_100"), ("divide", "const_1000"))
    )
    steps.append([operation, f"#{len(steps) - 1}", factor])
    return True


def _edit_sign(steps: Steps, page: Page, draw: random.Random) -> bool:
    steps.append(["multiply", f"#{len(steps) - 1}", "const_m1"])
    return True


def _edit_extend(steps: Steps, page: Page, draw: random.Random) -> bool:
    """Append a step with a number of the page or of the program: the inverse of "drop"."""
    used = [a for s in steps if s[0] not in TABLE_OPERATIONS for a in s[1:] if not a.startswith("#")]
    number = draw.choice(used) if used and draw.random() < 0.6 else None
    if number is None:
        if not page.cells:
            return False
        number = _unsigned(draw.choice(page.cells))
    steps.append([draw.choice(_ARITHMETIC), f"#{len(steps) - 1}", number])
    return True


_EDIT = {
    "operation": _edit_operation,
    "order": _edit_order,
    "drop": _edit_drop,
    "scale": _edit_scale,
    "sign": _edit_sign,
    "extend": _edit_extend,
}


def walks(
    questions: PageQuestions,
    length: int,
    weights: ChangesConfig,
    runs: Callable[[str, Record], bool],
    rewrite: Callable[[list[str]], list[str]] | None,
    seed: int,
) -> list[list[Change]]:
    """For each question of a page `length` programs before and `length` after its gold program.

    Each is made by changing the previous one, starting at the gold program.

    Args:
        runs: whether a program has a numeric value on the page of the record. A walk contains only such programs.
        rewrite: replaces the numbers of programs. Without it all changes are edits.
    """
    records, page = questions.records, questions.page
    found: list[list[Change]] = [[] for _ in records]
    share = weights.masked_lm / ((weights.chain + weights.masked_lm) or 1.0) if rewrite else 0.0
    draws = [random.Random(randomness.key(seed, f"finqa walk {record.id}")) for record in records]
    for direction in (-1, 1):
        ends = {i: r.program for i, r in enumerate(records) if r.program and runs(r.program, r)}
        for distance in range(1, length + 1):
            rewritten = sorted(i for i in ends if draws[i].random() < share)
            texts = rewrite([ends[i] for i in rewritten]) if rewrite and rewritten else []
            made = {i: (text, "masked_lm") for i, text in zip(rewritten, texts, strict=True)}
            for i in ends:
                text, kind = made.get(i, (None, "chain"))
                if text is None or text == ends[i] or not _is_well_formed(text, records[i], runs):
                    text, kind = _edited(ends[i], records[i], page, runs, draws[i]), "chain"
                if text is not None:
                    ends[i] = text
                    found[i].append((direction * distance, text, kind))
    return found


def _is_well_formed(program: str, record: Record, runs: Callable[[str, Record], bool]) -> bool:
    """Whether the program runs and is formatted like FinQA's programs."""
    try:
        steps = parse(program)
    except ProgramError:
        return False
    return program == ", ".join(f"{s.operation}({s.first.text}, {s.second.text})" for s in steps) and runs(
        program, record
    )


def _edited(
    program: str, record: Record, page: Page, runs: Callable[[str, Record], bool], draw: random.Random
) -> str | None:
    """The program after one edit of WALK_EDITS, or None when no edit of _TRIALS runs."""
    for _ in range(_TRIALS):
        text = edit(program, draw.choice(WALK_EDITS), page, draw)
        if text is not None and text != program and runs(text, record):
            return text
    return None
