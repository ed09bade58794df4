"""The bank of a page: all programs that its pools are drawn from. Each is executed and described once.

A bank holds the gold programs of all questions of the page, then programs made from templates. The pools of a page
share these: a program that is gold for one question is wrong for another. Programs made by changing the gold program of
one question come last; only that question uses them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.sections.finqa import PoolsConfig
from lib.tasks.finqa.changes import Change
from lib.tasks.finqa.features import NAMES, ProgramFeatures
from lib.tasks.finqa.page import PageQuestions
from lib.tasks.finqa.pool_comparison import number_table
from lib.tasks.finqa.program import DECIMALS, ProgramError, execute
from lib.tasks.finqa.record import Record
from lib.tasks.finqa.templates import Templates, operators_of

TRIALS = 5  # templates tried for each program needed


@dataclass
class Bank:
    """N programs of one page.

    Attributes:
        golds: for each question of the page the index of its gold program, -1 where its value is yes, no or an error.
        rivals: for each question a bit set of the programs that are near a gold program of the same question in another
            record. They may be right, so the pools of the question have none of them.
        owner: (N,) the only question that may use the program, -1 for all questions.
        step: (N,) for programs made by changing a gold program: the number of changes before (-) or after it.
        operators: (N,) operations of each program, as `templates.operators_of` gives them.
        near: for each program a bit set of the programs that must not share a pool with it, itself included.
        rows, words, numbers: see `features.ProgramFeatures`.
    """

    records: Sequence[Record]
    group: str
    programs: list[str]
    values: np.ndarray
    kinds: list[str]
    golds: list[int]
    rivals: list[int]
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
    """The value of a program on the page of the record. None when it fails, or when its value is yes or no."""
    try:
        value = execute(program, record.table)
    except ProgramError:
        return None
    return None if isinstance(value, str) else value


def make_bank(
    questions: PageQuestions,
    templates: Templates,
    settings: PoolsConfig,
    seed: int,
    changed: Sequence[Sequence[Change]] = (),
) -> Bank:
    """The bank of a page with up to `settings.bank` programs from templates.

    The share `settings.same_operators` of these has the operators of the page's gold programs, in turn.

    Args:
        changed: for each question the programs made from its gold program.
    """
    records, page = questions.records, questions.page
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
        size = settings.bank
        operators = sorted({operators_of(program) for program in programs})
        turns: list[str | None] = [
            operators[i % len(operators)] for i in range(round(settings.same_operators * size))
        ]
        turns = (turns + [None] * size)[:size]
        made = _from_templates(questions, templates, turns, {_rounded(v) for v in values}, seed)
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
    described = [
        ProgramFeatures.of(program, value, page) for program, value in zip(programs, values, strict=True)
    ]
    array = np.array(values)
    near = _near(array, settings.min_difference)
    return Bank(
        records=records,
        group=questions.group,
        programs=programs,
        values=array,
        kinds=kinds,
        golds=golds,
        rivals=_rivals(records, golds, near),
        owner=np.array(owner),
        step=np.array(step),
        operators=np.array([operators_of(program) for program in programs], object),
        near=near,
        rows=np.array([d.row for d in described], np.float32).reshape(-1, len(NAMES)),
        words=[d.words for d in described],
        numbers=number_table(described),
    )


def _from_templates(
    questions: PageQuestions,
    templates: Templates,
    turns: Sequence[str | None],
    known_values: set[float],
    seed: int,
) -> list[tuple[str, float]]:
    """Programs and their values, no two of the same value.

    Each turn gives one program with its operators. Where too few exist, programs with any operators replace them.
    """
    record = questions.records[0]
    draw = random.Random(randomness.key(seed, f"finqa bank {record.split}/{record.filename}"))
    found = []
    for operators in [*dict.fromkeys(turn for turn in turns if turn), None]:
        missing = turns.count(operators) if operators else len(turns) - len(found)
        for program in templates.make(questions.page, questions.group, draw, missing * TRIALS, operators):
            if not missing:
                break
            value = value_of(program, record)
            if value is None or _rounded(value) in known_values:
                continue
            known_values.add(_rounded(value))
            found.append((program, value))
            missing -= 1
    return found


def _rivals(records: Sequence[Record], golds: Sequence[int], near: Sequence[int]) -> list[int]:
    """For each question the bit set of the programs near a gold program of any record with the same question."""
    of_question: dict[str, int] = {}
    for record, gold in zip(records, golds, strict=True):
        if gold >= 0:
            of_question[record.question_key] = of_question.get(record.question_key, 0) | near[gold]
    return [of_question.get(record.question_key, 0) for record in records]


def _rounded(value: float) -> float:
    return round(value, DECIMALS)


def _near(values: np.ndarray, min_difference: float) -> list[int]:
    """For each value the bit set of those that equal it, its negative, 100 times it or a hundredth of it."""
    first, second = values[:, None], values[None]
    near = np.round(first, DECIMALS) == np.round(second, DECIMALS)
    for factor in (1, -1, 100, -100, 0.01, -0.01):
        near |= np.abs(first - factor * second) <= min_difference * np.abs(factor * second)
    near |= near.T
    packed = np.packbits(near, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]
