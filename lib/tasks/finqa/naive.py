"""Pools of single edits of the gold program, the common method. A benchmark measures how much they leak."""

import random
from collections.abc import Iterator, Sequence

from lib import randomness
from lib.tasks.finqa.bank import value_of
from lib.tasks.finqa.changes import EDITS, edit
from lib.tasks.finqa.page import Page
from lib.tasks.finqa.pools import Candidate
from lib.tasks.finqa.record import Record

_TRIALS = 60


def naive_pools(records: Sequence[Record], size: int, seed: int) -> list[tuple[Record, list[Candidate], int]]:
    """(question, pool, index of the gold program): pools of the gold program and `size` - 1 single edits, shuffled.

    The kinds of edits alternate. Questions with a yes or no answer, and those with too few edits of different value, are
    left out.
    """
    pages: dict[str, Page] = {}
    pools = []
    for record in records:
        gold = value_of(record.program or "", record)
        if gold is None or record.program is None:
            continue
        page = pages.setdefault(record.filename, Page(record))
        draw = random.Random(randomness.key(seed, f"finqa naive {record.id}"))
        pool = [Candidate(record.program, gold, "gold")]
        for program, value in _edits(record, page, draw):
            if value not in [c.value for c in pool]:
                pool.append(Candidate(program, value, "edit"))
            if len(pool) == size:
                break
        if len(pool) == size:
            draw.shuffle(pool)
            pools.append((record, pool, [c.kind for c in pool].index("gold")))
    return pools


def _edits(record: Record, page: Page, draw: random.Random) -> Iterator[tuple[str, float]]:
    """Single edits that run, with their values."""
    order: list[str] = []
    for trial in range(_TRIALS):
        if trial % len(EDITS) == 0:
            order = draw.sample(EDITS, len(EDITS))
        program = edit(record.program or "", order[trial % len(EDITS)], page, draw)
        value = None if program is None else value_of(program, record)
        if program is not None and value is not None:
            yield program, value
