"""Pools of single edits of the gold program, as they are commonly made: kept to show how much they give away."""

import random
from collections.abc import Sequence

from lib import randomness
from lib.tasks.finqa.bank import value_of
from lib.tasks.finqa.changes import EDITS, edit
from lib.tasks.finqa.places import Page
from lib.tasks.finqa.pools import Candidate
from lib.tasks.finqa.record import Record

_TRIALS = 60


def naive_pools(records: Sequence[Record], size: int, seed: int) -> list[tuple[Record, list[Candidate], int]]:
    """The question, its gold program among `size` - 1 single edits of it in a random order, and its place.

    The kinds of edits take turns. Questions whose answer is yes or no, and those with too few edits of different
    value, are left out.
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


def _edits(record: Record, page: Page, draw: random.Random):
    for trial in range(_TRIALS):
        if trial % len(EDITS) == 0:
            order = draw.sample(EDITS, len(EDITS))
        program = edit(record.program or "", order[trial % len(EDITS)], page, draw)
        value = None if program is None else value_of(program, record)
        if program is not None and value is not None:
            yield program, value
