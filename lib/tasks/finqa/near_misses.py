"""Near misses: wrong programs that differ from the gold program by one or two edits, as the programs of real systems do.

They are for training only. A pool of near misses reveals its gold program without the question, because all others are close
to it. Pools that are reported contain none of them (`pools`).
"""

import random
from collections.abc import Collection, Iterator, Sequence

from lib import randomness
from lib.tasks.finqa.bank import value_of
from lib.tasks.finqa.changes import edit
from lib.tasks.finqa.page import Page
from lib.tasks.finqa.pools import Candidate, Pool
from lib.tasks.finqa.program import DECIMALS
from lib.tasks.finqa.record import Record

# How often each edit is drawn. Systems that write programs confuse rows, columns and sentences most often, then operators and the
# number of steps; a wrong sign and a wrong power of ten are rare.
EDITS = {
    "column": 26, "row": 22, "sentence": 10, "number": 8, "order": 5, "operation": 9, "drop": 8, "extend": 6, "scale": 3, "sign": 3,
}  # fmt: skip
SECOND = 0.2  # share of the near misses with two edits
_TRIALS = 12  # for each near miss


def near_misses(
    record: Record, page: Page, count: int, draw: random.Random, also_right: Collection[str] = ()
) -> Iterator[tuple[str, float]]:
    """Up to `count` near misses of the record's gold program with their values, no two of the same value.

    The gold program must run. All values differ from those of the gold program and of the programs in `also_right`.
    """
    gold = record.program or ""
    values = {_rounded(value_of(program, record)) for program in (gold, *also_right)}
    found = 0
    for _ in range(count * _TRIALS):
        if found == count:
            return
        program, value = _edited(gold, record, page, draw)
        if value is None or _rounded(value) in values:
            continue
        values.add(_rounded(value))
        found += 1
        yield program, value


def with_near_misses(
    pools: Sequence[Pool],
    record: Record,
    page: Page,
    share: float,
    seed: int,
    also_right: Collection[str] = (),
) -> list[Pool]:
    """The pools of a question, with near misses in the place of a share of the programs from templates.

    A near miss that has the value of another candidate of the pool does not replace anything. `also_right`: the gold programs
    of other records of the same question.
    """
    mixed = []
    for number, pool in enumerate(pools):
        draw = random.Random(randomness.key(seed, f"finqa near misses {record.id}", number))
        places = [i for i, c in enumerate(pool) if c.kind == "template" and draw.random() < share]
        pool = list(pool)
        for place, (program, value) in zip(
            places, near_misses(record, page, len(places), draw, also_right), strict=False
        ):
            if all(c.value != value for c in pool):
                pool[place] = Candidate(program, value, "near_miss")
        mixed.append(pool)
    return mixed


def _edited(program: str, record: Record, page: Page, draw: random.Random) -> tuple[str, float | None]:
    """The program after one or two edits, and its value; None where an edit is impossible or its result cannot run."""
    value = None
    for kind in draw.choices(list(EDITS), list(EDITS.values()), k=2 if draw.random() < SECOND else 1):
        changed = edit(program, kind, page, draw)
        value = None if changed is None else value_of(changed, record)
        if changed is None or value is None:
            return program, None
        program = changed
    return program, value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DECIMALS)
