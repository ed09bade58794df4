"""Wrong programs made by changing a right one: single edits, and walks of edit upon edit.

A pool of single edits gives its gold program away: it is what all others are near to (`naive_pools` is kept to show
that). On a walk the gold program is one step among others, with as many before it as after it.
"""

import random
from collections.abc import Callable, Sequence

from lib import randomness
from lib.sections.finqa import ChangesConfig
from lib.tasks.finqa.numbers import Place
from lib.tasks.finqa.places import Page, is_number
from lib.tasks.finqa.program import TABLE_OPERATIONS, ProgramError, parse
from lib.tasks.finqa.record import Record

EDITS = ("operation", "order", "row", "column", "number", "drop", "scale", "sign")
WALK_EDITS = (
    "operation",
    "order",
    "row",
    "column",
    "number",
    "number",
    "drop",
    "extend",
)  # as often as listed
_SWAPPED = ("add", "subtract", "multiply", "divide")
_TRIALS = 12  # edits tried for one step of a walk

Steps = list[list[str]]  # operation and two arguments, each
Change = tuple[int, str, str]  # how many changes before (-) or after the gold program, the program, its kind


def edit(program: str, kind: str, page: Page, draw: random.Random) -> str | None:
    """The program with one edit of a kind of EDITS or "extend", or None when it allows none. May not run."""
    steps = [[step.operation, step.first.text, step.second.text] for step in parse(program)]
    if kind in ("row", "column", "number"):
        done = _edit_number(steps, kind, page, draw)
    else:
        done = _EDIT[kind](steps, page, draw)
    return ", ".join(f"{o}({a}, {b})" for o, a, b in steps) if done else None


def _edit_operation(steps: Steps, page: Page, draw: random.Random) -> bool:
    step = draw.choice(steps)
    names = TABLE_OPERATIONS if step[0] in TABLE_OPERATIONS else _SWAPPED
    step[0] = draw.choice([name for name in names if name != step[0]])
    return True


def _edit_order(steps: Steps, page: Page, draw: random.Random) -> bool:
    able = [s for s in steps if s[0] in ("subtract", "divide", "exp")]
    if able:
        step = draw.choice(able)
        step[1:] = step[:0:-1]
    return bool(able)


def _edit_number(steps: Steps, kind: str, page: Page, draw: random.Random) -> bool:
    """Another number for one of the program's, everywhere: of its column (kind "row"), of its row, or any."""
    parsed = parse(", ".join(f"{o}({a}, {b})" for o, a, b in steps))
    numbers = {a.text for s in parsed if not s.reads_table for a in (s.first, s.second) if is_number(a)}
    tables = [s for s in steps if s[0] in TABLE_OPERATIONS]
    if tables and kind != "column" and (not numbers or draw.random() < 0.5):
        draw.choice(tables)[1] = draw.choice(page.table)[0] or "none"
        return True
    if not numbers:
        return False
    old = draw.choice(sorted(numbers))
    place = page.locate(sorted(numbers))[old]
    others = [p for p in _alternatives(place, kind, page) if _unsigned(p) not in numbers]
    if not others:
        return False
    new = _unsigned(draw.choice(others))
    for step in steps:
        if step[0] not in TABLE_OPERATIONS:
            step[1:] = [new if argument == old else argument for argument in step[1:]]
    return True


def _alternatives(place: Place | None, kind: str, page: Page) -> list[Place]:
    if kind == "number" or place is None or not place.in_table:
        return [] if kind in ("row", "column") else [p for p in page.places if not p.year_like]
    if kind == "row":
        return [p for p in page.cells if p.column == place.column and p.row != place.row]
    return [p for p in page.cells if p.row == place.row and p.column != place.column]


def _unsigned(place: Place) -> str:
    return place.text.lstrip("-")  # as most gold programs write losses


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
    """One more step, with a number of the page or one that the program has: what "drop" takes away."""
    own = [a for s in steps if s[0] not in TABLE_OPERATIONS for a in s[1:] if not a.startswith("#")]
    pick = draw.choice(own) if own and draw.random() < 0.6 else None
    if pick is None:
        if not page.cells:
            return False
        pick = _unsigned(draw.choice(page.cells))
    steps.append([draw.choice(_SWAPPED), f"#{len(steps) - 1}", pick])
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
    records: Sequence[Record],
    page: Page,
    length: int,
    weights: ChangesConfig,
    runs: Callable[[str, Record], bool],
    rewrite: Callable[[list[str]], list[str]] | None,
    seed: int,
) -> list[list[Change]]:
    """For each question of a page `length` changes before and after its gold program, each made from the one nearer to it.

    Args:
        runs: whether a program has a value of use on the page of the record; a walk goes on only over those.
        rewrite: gives programs other numbers. Without it all changes are edits.
    """
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
                if text is None or text == ends[i] or not _sound(text, records[i], runs):
                    text, kind = _edited(ends[i], records[i], page, runs, draws[i]), "chain"
                if text is not None:
                    ends[i] = text
                    found[i].append((direction * distance, text, kind))
    return found


def _sound(program: str, record: Record, runs: Callable[[str, Record], bool]) -> bool:
    """Whether it runs and is written as programs of FinQA are."""
    try:
        steps = parse(program)
    except ProgramError:
        return False
    return program == ", ".join(f"{s.operation}({s.first.text}, {s.second.text})" for s in steps) and runs(
        program, record
    )


def _edited(program: str, record: Record, page: Page, runs, draw: random.Random) -> str | None:
    for _ in range(_TRIALS):
        text = edit(program, draw.choice(WALK_EDITS), page, draw)
        if text is not None and text != program and runs(text, record):
            return text
    return None
