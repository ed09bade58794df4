"""Programs that four simulated systems write: a development set of realistic errors.

The systems score the near misses of the gold program (`near_misses`) and other programs of the page, such as those of the
question's pool. Each writes the program with the highest score. The score has four parts:

    question  log odds of trees that see the question. They learned from pools without shortcuts
    prior     log odds of trees that do not see it: how much a program looks like a gold program. They learned from near misses
    shared    noise that all systems have in common, since they learned from the same data
    own       noise of one system, and more of it between two wrong programs

So errors are frequent on hard questions, look right, and repeat. The weights of the parts were chosen on the selection split, so that
these figures come close to those of four published systems:

| figure | published | simulated |
|---|---|---|
| all systems are right | 54 % | 54 % |
| none is right | 20 % | 21 % |
| elsewhere, majority vote | 68 % | 69 % |
| elsewhere, a ranker that learned from pools without shortcuts | 58 % | 62 % |
| pairs in which a scorer without the question, trained on near misses, prefers the right program | 60 % | 67 % |

Two adjustments do the rest:

1. The gold program gets a bonus in each system, so that the system is right as often as a published one.
2. Each kind of error gets a bonus, so that it is as frequent.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from lib import randomness
from lib.log import with_progress
from lib.tasks.finqa.bank import value_of
from lib.tasks.finqa.blind import balanced
from lib.tasks.finqa.error_kinds import (
    ARGUMENT,
    KINDS,
    OPERATORS,
    OTHER,
    SAME_OPERATORS,
    SCALE,
    SIGN,
    error_kind,
)
from lib.tasks.finqa.features import NAMES, ProgramFeatures
from lib.tasks.finqa.leak import question_features
from lib.tasks.finqa.near_misses import near_misses
from lib.tasks.finqa.page import Page
from lib.tasks.finqa.pools import Candidate
from lib.tasks.finqa.program import DECIMALS
from lib.tasks.finqa.record import Record

# Measured on four published systems
ACCURACY = {"A": 0.69, "B": 0.68, "C": 0.67, "D": 0.65}
ERRORS = {ARGUMENT: 0.43, SAME_OPERATORS: 0.06, OPERATORS: 0.085, SIGN: 0.023, SCALE: 0.019, OTHER: 0.383}

QUESTION, PRIOR = 3.0, 0.5  # weights
SHARED_NOISE, OWN_NOISE, WRONG_NOISE = 0.6, 0.9, 0.8  # standard deviations, in log odds
TO_LEARN, TO_WRITE = 12, 40  # near misses of each question
_ROUNDS = 30  # of the adjustments

Others = Mapping[str, Sequence[str]]  # question id -> programs of the page that are wrong for it


@dataclass(frozen=True)
class _Choices:
    """The programs that systems may write for one question, the gold program first."""

    record: Record
    programs: list[str]
    kinds: np.ndarray  # (C,) index in KINDS; -1 for the gold program
    rows: np.ndarray  # (C, F)


class SimulatedSystems:
    """Four systems with the scores of two models: `question` sees all features, `prior` those of the program alone."""

    def __init__(
        self, question: HistGradientBoostingClassifier, prior: HistGradientBoostingClassifier, seed: int
    ):
        self.question, self.prior, self.seed = question, prior, seed

    @classmethod
    def fit(cls, train: Sequence[Record], others: Others, seed: int) -> "SimulatedSystems":
        """Learn from the questions of the train split, with the programs of their pools."""
        pools = list(_choices(train, others, 0, seed, "pools without shortcuts"))
        near = list(_choices(train, {}, TO_LEARN, seed, "near misses"))
        return cls(_fitted(pools, None, seed), _fitted(near, len(NAMES), seed), seed)

    def write(
        self, records: Sequence[Record], others: Others, draws: int = 1
    ) -> list[dict[str, dict[str, str]]]:
        """For each draw of the noise: question id -> system -> its program.

        Questions whose gold program has no number as value are left out.
        """
        choices = list(_choices(records, others, TO_WRITE, self.seed, "programs of simulated systems"))
        if not choices:
            return [{}] * draws
        shape = len(choices), max(len(c.programs) for c in choices)
        kinds = np.full(shape, -2)  # (N, C), -2 where there is no program
        for row, c in zip(kinds, choices, strict=True):
            row[: len(c.kinds)] = c.kinds
        flat = np.concatenate([c.rows for c in choices])
        scores = np.zeros(shape)
        scores[kinds > -2] = QUESTION * self.question.decision_function(flat)
        scores[kinds > -2] += PRIOR * self.prior.decision_function(flat[:, : len(NAMES)])
        return [self._written(choices, kinds, scores, number) for number in range(draws)]

    def _written(
        self, choices: Sequence[_Choices], kinds: np.ndarray, scores: np.ndarray, number: int
    ) -> dict[str, dict[str, str]]:
        draw = np.random.Generator(
            np.random.Philox(randomness.key(self.seed, "finqa noise of systems", number))
        )
        shared = draw.normal(0, SHARED_NOISE, scores.shape)
        own, of_wrong = draw.normal(0, 1, (2, len(ACCURACY), *scores.shape))
        written = _adjusted(scores + shared + OWN_NOISE * own, WRONG_NOISE * of_wrong, kinds)
        return {
            c.record.id: {s: c.programs[written[i, n]] for i, s in enumerate(ACCURACY)}
            for n, c in enumerate(choices)
        }


def _fitted(choices: Sequence[_Choices], columns: int | None, seed: int) -> HistGradientBoostingClassifier:
    """Trees that tell gold programs from others by the first `columns` features."""
    rows = np.concatenate([c.rows for c in choices])[:, :columns]
    gold = np.concatenate([c.kinds < 0 for c in choices])
    model = HistGradientBoostingClassifier(
        max_iter=200, learning_rate=0.06, max_leaf_nodes=23, min_samples_leaf=25, early_stopping=False,  # type: ignore[arg-type]
        random_state=randomness.key(seed, "finqa systems") % 2**31,
    )  # fmt: skip
    return model.fit(rows, gold, sample_weight=balanced(gold))


def _adjusted(utilities: np.ndarray, of_wrong: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(S, N) the program with the highest utility after the adjustments to ACCURACY and ERRORS.

    Args:
        utilities: (S, N, C).
        of_wrong: (S, N, C) noise between the wrong programs, where a system is wrong.
        kinds: (N, C) as in `write`.
    """
    target = np.array(list(ACCURACY.values()))
    shares = np.array([ERRORS[kind] for kind in KINDS])
    bonus = np.zeros(len(KINDS))
    for _ in range(_ROUNDS):
        wrong = np.where(kinds >= 0, utilities + bonus[np.maximum(kinds, 0)], -np.inf)
        lead = wrong.max(-1) - utilities[:, :, 0]  # (S, N)
        gold_bonus = np.array([np.quantile(row, share) for row, share in zip(lead, target, strict=True)])
        is_wrong = lead > gold_bonus[:, None]
        written = np.where(is_wrong, (wrong + of_wrong).argmax(-1), 0)
        made = kinds[np.nonzero(is_wrong)[1], written[is_wrong]]
        found = np.bincount(made, minlength=len(KINDS)) / max(len(made), 1)
        bonus += 0.5 * np.log((shares + 0.003) / (found + 0.003))
    return written


def _choices(
    records: Sequence[Record], others: Others, count: int, seed: int, label: str
) -> Iterator[_Choices]:
    pages: dict[str, list[Record]] = {}
    for record in records:
        if value_of(record.program or "", record) is not None:
            pages.setdefault(record.filename, []).append(record)
    for questions in with_progress(label, list(pages.values())):
        page = Page(questions[0])
        for record in questions:
            yield _choices_of(record, page, others.get(record.id, ()), count, seed)


def _choices_of(record: Record, page: Page, others: Sequence[str], count: int, seed: int) -> _Choices:
    gold = value_of(record.program or "", record) or 0.0
    draw = random.Random(randomness.key(seed, f"finqa systems {record.id}", count))
    found = {round(gold, DECIMALS): (record.program or "", gold)}
    for program, value in near_misses(record, page, count, draw):
        found.setdefault(round(value, DECIMALS), (program, value))
    for program in others:
        if (value := value_of(program, record)) is not None:
            found.setdefault(round(value, DECIMALS), (program, value))
    kinds = [-1]
    for program, value in list(found.values())[1:]:
        kinds.append(KINDS.index(error_kind(record.program or "", program, gold, value)))
    rows = [
        [
            *ProgramFeatures.of(program, value, page).row,
            *question_features(record, Candidate(program, value, ""), page),
        ]
        for program, value in found.values()
    ]
    programs = [program for program, _ in found.values()]
    return _Choices(record, programs, np.array(kinds), np.array(rows, np.float32))
