"""Programs that four simulated systems write: a development set of realistic errors.

A system is a model that scores programs, gradient-boosted trees on features of the question and of the program. It is trained on
the pages of the train split, and writes the program with the highest score among

- near misses of the gold program (`near_misses`), and
- other programs of the page, such as those of the question's pool.

So its errors are errors of a model: they are frequent on hard questions, and look right. Other systems repeat many of them, since
all learn from the same data. Three adjustments make the systems like four published ones, whose figures are the constants below:

1. The gold program gets a bonus in each system, so that the system is as often right.
2. Each kind of error gets a bonus, so that it is as frequent.
3. Noise makes the systems differ as often.
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
from lib.tasks.finqa.features import ProgramFeatures
from lib.tasks.finqa.leak import question_features
from lib.tasks.finqa.near_misses import near_misses
from lib.tasks.finqa.page import Page
from lib.tasks.finqa.pools import Candidate
from lib.tasks.finqa.program import DECIMALS
from lib.tasks.finqa.record import Record

# Measured on four published systems
ACCURACY = {"A": 0.69, "B": 0.68, "C": 0.67, "D": 0.65}
ERRORS = {ARGUMENT: 0.43, SAME_OPERATORS: 0.06, OPERATORS: 0.085, SIGN: 0.023, SCALE: 0.019, OTHER: 0.383}

# In log odds. With these, all systems are right, or none is, as often as of the published ones (54 % and 20 %)
APART = 0.3  # share of the difference of a system's scores from the mean of all systems that is kept
SHARED_NOISE, OWN_NOISE = 1.0, 0.5  # standard deviations
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
    """Four models, each trained on half of the pages of the train split."""

    def __init__(self, models: Sequence[HistGradientBoostingClassifier], seed: int):
        self.models, self.seed = models, seed

    @classmethod
    def fit(cls, train: Sequence[Record], others: Others, seed: int) -> "SimulatedSystems":
        """Learn from the questions of the train split, and from other programs of their pages."""
        choices = list(_choices(train, others, TO_LEARN, seed, "learning from each page"))
        rows = np.concatenate([c.rows for c in choices])
        gold = np.concatenate([c.kinds < 0 for c in choices])
        pages = np.concatenate([np.full(len(c.kinds), c.record.filename, object) for c in choices])
        models = []
        for system in ACCURACY:
            drawn = {
                page
                for page in set(pages)
                if randomness.hash_fraction(seed, f"finqa system {system}", page) < 0.5
            }
            known = np.array([page in drawn for page in pages])
            model = HistGradientBoostingClassifier(
                max_iter=200, learning_rate=0.06, max_leaf_nodes=23, min_samples_leaf=25, early_stopping=False,  # type: ignore[arg-type]
                random_state=randomness.key(seed, f"finqa system {system}") % 2**31,
            )  # fmt: skip
            models.append(model.fit(rows[known], gold[known], sample_weight=balanced(gold[known])))
        return cls(models, seed)

    def write(self, records: Sequence[Record], others: Others) -> dict[str, dict[str, str]]:
        """Question id -> system -> its program, for the questions whose gold program has a number as value."""
        choices = list(_choices(records, others, TO_WRITE, self.seed, "writing for each page"))
        if not choices:
            return {}
        shape = len(choices), max(len(c.programs) for c in choices)
        kinds = np.full(shape, -2)  # (N, C), -2 where there is no program
        for row, c in zip(kinds, choices, strict=True):
            row[: len(c.kinds)] = c.kinds
        utilities = np.zeros((len(self.models), *shape))  # (S, N, C)
        flat = np.concatenate([c.rows for c in choices])
        for number, model in enumerate(self.models):
            utilities[number][kinds > -2] = model.decision_function(flat)
        written = _adjusted(self._correlated(utilities), kinds)
        return {
            c.record.id: {s: c.programs[written[i, n]] for i, s in enumerate(ACCURACY)}
            for n, c in enumerate(choices)
        }

    def _correlated(self, utilities: np.ndarray) -> np.ndarray:
        """(S, N, C) utilities of systems that err together, as those of systems that learned from the same data do."""
        mean = utilities.mean(0)
        draw = _generator(self.seed, "finqa noise of systems")
        shared, own = draw.normal(0, SHARED_NOISE, mean.shape), draw.normal(0, OWN_NOISE, utilities.shape)
        return mean + APART * (utilities - mean) + shared + own


def _adjusted(utilities: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(S, N) the program with the highest utility after the adjustments to ACCURACY and ERRORS.

    Args:
        utilities: (S, N, C).
        kinds: (N, C) as in `write`.
    """
    target = np.array(list(ACCURACY.values()))
    shares = np.array([ERRORS[kind] for kind in KINDS])
    bonus = np.zeros(len(KINDS))
    for _ in range(_ROUNDS):
        wrong = np.where(kinds >= 0, utilities + bonus[np.maximum(kinds, 0)], -np.inf)
        best_wrong = wrong.max(-1)  # (S, N)
        lead = best_wrong - utilities[:, :, 0]
        gold_bonus = np.array([np.quantile(row, share) for row, share in zip(lead, target, strict=True)])
        is_wrong = lead > gold_bonus[:, None]
        written = np.where(is_wrong, wrong.argmax(-1), 0)
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


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(randomness.key(seed, purpose, 0)))
