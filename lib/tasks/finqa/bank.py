"""The bank of a page: all programs that its pools are drawn from, run and described once.

It holds the gold programs of all its questions and programs that templates make, so that the pools of a page share
them with other labels. Programs that belong to one question only, made by changing its gold one, come after these.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.tasks.finqa.features import NAMES, Described, number_table
from lib.tasks.finqa.places import Page
from lib.tasks.finqa.program import DECIMALS, ProgramError, execute
from lib.tasks.finqa.record import Record
from lib.tasks.finqa.templates import Templates, operators_of

TRIALS = 5  # templates tried for each program that is wanted


@dataclass
class Bank:
    """N programs of one page.

    Attributes:
        golds: for each question of the page the number of its gold program, -1 where that is yes, no or an error.
        owner: (N,) the question that alone may use the program, -1 for all.
        step: (N,) of programs made by changing a gold one: how many changes before (-) or after it.
        operators: (N,) what `templates.operators_of` says of each.
        near: for each program a bit set of those that it must not share a pool with; itself too.
        rows, words, numbers: see `features.Described`.
    """

    records: Sequence[Record]
    group: str
    programs: list[str]
    values: np.ndarray
    kinds: list[str]
    golds: list[int]
    owner: np.ndarray
    step: np.ndarray
    operators: np.ndarray
    near: list[int]
    rows: np.ndarray  # (N, F)
    words: list[str]
    numbers: np.ndarray  # (N, MAX_NUMBERS)

    @property
    def is_gold(self) -> np.ndarray:
        return np.array([kind == "gold" for kind in self.kinds])

    @property
    def key(self) -> str:
        return f"{self.records[0].split}/{self.records[0].filename}"


def value_of(program: str, record: Record) -> float | None:
    """What a program is worth on the page of the record; None when it fails or says yes or no."""
    try:
        value = execute(program, record.table)
    except ProgramError:
        return None
    return None if isinstance(value, str) else value


def make_bank(
    records: Sequence[Record],
    page: Page,
    group: str,
    templates: Templates,
    size: int,
    same_operators: float,
    min_difference: float,
    seed: int,
    changed: Sequence[Sequence[tuple[int, str, str]]] = (),
) -> Bank:
    """The bank of a page with up to `size` programs from templates.

    Args:
        records: all questions of the page.
        same_operators: share of those from templates that take turns to have the operators of the page's gold programs.
        changed: for each question programs made from its gold one: how many changes away, the program, its kind.
    """
    programs: list[str] = []
    values: list[float] = []
    golds = []
    for record in records:
        value = value_of(record.program or "", record)
        if value is None or record.program is None:
            golds.append(-1)
            continue
        if record.program not in programs:
            programs.append(record.program)
            values.append(value)
        golds.append(programs.index(record.program))
    kinds = ["gold"] * len(programs)
    if any(gold >= 0 for gold in golds):
        wanted = sorted({operators_of(program) for program in programs})
        turns = [wanted[i % len(wanted)] for i in range(round(same_operators * size))] + [None] * size
        made = _from_templates(
            records[0], page, group, templates, turns[:size], {_rounded(v) for v in values}, seed
        )
        programs += [program for program, _ in made]
        values += [value for _, value in made]
        kinds += ["template"] * len(made)
    owner, step = [-1] * len(programs), [0] * len(programs)
    for question, changes in enumerate(changed):
        for distance, program, kind in changes:
            value = value_of(program, records[question])
            if value is None or golds[question] < 0:
                continue
            programs.append(program)
            values.append(value)
            kinds.append(kind)
            owner.append(question)
            step.append(distance)
    described = [Described.of(program, value, page) for program, value in zip(programs, values, strict=True)]
    array = np.array(values)
    return Bank(
        records, group, programs, array, kinds, golds, np.array(owner), np.array(step),
        np.array([operators_of(program) for program in programs], object), _near(array, min_difference), np.array([d.row for d in described], np.float32).reshape(-1, len(NAMES)),
        [d.words for d in described], number_table(described),
    )  # fmt: skip


def _from_templates(
    record: Record,
    page: Page,
    group: str,
    templates: Templates,
    turns: Sequence[str | None],
    taken: set[float],
    seed: int,
) -> list[tuple[str, float]]:
    """Programs and their values, no two of the same value: one for each turn with its operators, or with any where these do not go so far."""
    draw = random.Random(randomness.key(seed, f"finqa bank {record.split}/{record.filename}"))
    found = []
    for operators in [*dict.fromkeys(turn for turn in turns if turn), None]:
        missing = turns.count(operators) if operators else len(turns) - len(found)
        for program in templates.make(page, group, draw, missing * TRIALS, operators):
            if not missing:
                break
            value = value_of(program, record)
            if value is None or _rounded(value) in taken:
                continue
            taken.add(_rounded(value))
            found.append((program, value))
            missing -= 1
    return found


def _rounded(value: float) -> float:
    return round(value, DECIMALS)


def _near(values: np.ndarray, min_difference: float) -> list[int]:
    """For each value the bit set of those that equal it, its negative, its hundredfold or its hundredth part."""
    ours, theirs = values[:, None], values[None]
    near = np.round(ours, DECIMALS) == np.round(theirs, DECIMALS)
    for factor in (1, -1, 100, -100, 0.01, -0.01):
        near |= np.abs(ours - factor * theirs) <= min_difference * np.abs(factor * theirs)
    near |= near.T
    packed = np.packbits(near, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]
