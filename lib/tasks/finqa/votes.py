"""Choosing among the answers of several systems: by a ranker's scores, by votes, and by both.

The programs of a question are grouped by their value, its *answer*. The score of an answer is the highest score of its programs,
and its votes are the number of systems with one of its programs.

Legend: N questions, A answers of a question, S systems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from lib.metrics import SHARE, Estimate, ratio, sum_by
from lib.ranking.metrics import paired_difference
from lib.tasks.finqa.programs_of_systems import Written

RANKER, MAJORITY, BOTH, RANDOM, ORACLE = (
    "ranker", "majority vote", "ranker with votes", "random answer", "oracle"
)  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """The answers of one question. `values`, `scores`, `votes`, `right`: (A,); A is 0 where no program runs.

    Attributes:
        programs: for each answer the program that has its score, the highest one of all with this value.
        systems: system -> whether its answer is right.
    """

    written: Written
    values: list[float | str]
    scores: np.ndarray
    votes: np.ndarray
    right: np.ndarray
    systems: dict[str, bool]
    programs: list[str]

    @property
    def differ(self) -> bool:
        """Whether there is something to choose: a right and a wrong answer."""
        return bool(self.right.any() and not self.right.all())


def answers_of(written: Written, scores: Sequence[float] | np.ndarray) -> Answers:
    """The answers of a question with the scores of its distinct programs, in the order of `written.votes()`."""
    votes, values, gold = written.votes(), written.values(), written.gold
    of_program = dict(zip(votes, values, strict=True))
    distinct = list(dict.fromkeys(values))
    index = np.array([distinct.index(value) for value in values], int)
    best, count = np.full(len(distinct), -np.inf), np.zeros(len(distinct))
    np.maximum.at(best, index, np.asarray(scores, float))
    np.add.at(count, index, np.array(list(votes.values()), float))
    right = np.array([value == gold for value in distinct], bool)
    systems = {s: p is not None and of_program[p] == gold for s, p in written.systems.items()}
    each = zip(index, scores, votes, strict=True)
    programs = {place: program for place, score, program in sorted(each, key=lambda one: one[1])}
    return Answers(
        written, distinct, best, count, right, systems, [programs[n] for n in range(len(distinct))]
    )


@dataclass(frozen=True)
class VoteWeights:
    """The utility of an answer is `score` times its score plus `votes` times the logarithm of its share of the votes."""

    score: float
    votes: float

    def utilities(self, answers: Answers) -> np.ndarray:
        """(A,) utilities; the answer with the highest one is chosen."""
        return self.score * answers.scores + self.votes * _log_share(answers)

    @classmethod
    def fit(cls, answers: Sequence[Answers]) -> "VoteWeights":
        """The weights of highest likelihood in a conditional logit model (McFadden, 1974), with a weak ridge penalty.

        Questions without a right and a wrong answer say nothing. Without any other, the votes have no weight.
        """
        known = [a for a in answers if a.differ]
        if not known:
            return cls(1.0, 0.0)
        features = [np.stack([a.scores - a.scores.max(), _log_share(a)], 1) for a in known]

        def loss(weights: np.ndarray) -> float:
            total = 0.01 * float((weights**2).sum())
            for x, a in zip(features, known, strict=True):
                utility = x @ weights
                total += float(np.logaddexp.reduce(utility) - np.logaddexp.reduce(utility[a.right]))
            return total

        found = minimize(loss, np.array([1.0, 1.0]), method="L-BFGS-B", bounds=[(1e-3, None), (0.0, None)])
        return cls(float(found.x[0]), float(found.x[1]))


def _log_share(answers: Answers) -> np.ndarray:
    return np.log(answers.votes / answers.votes.sum())


def measure_choices(answers: Sequence[Answers], weights: VoteWeights, seed: int) -> dict[str, Any]:
    """How often each method has the right answer, over all questions and where the answers differ.

    A tie counts as the expectation of a random draw. Intervals resample pages.

    Returns:
        questions, differ: numbers of questions.
        rows: {method, all, differ}, both estimates as {value, low, high}; `differ` is None where no answers differ.
        over_majority: the accuracy of the ranker, with and without votes, less that of the majority vote; the same keys.
    """
    utilities = {
        RANKER: lambda a: a.scores,
        BOTH: weights.utilities,
        MAJORITY: lambda a: a.votes,
        RANDOM: lambda a: np.zeros(len(a.scores)),
        ORACLE: lambda a: a.right.astype(float),
    }
    right = {name: np.array([_right(a, of(a)) for a in answers]) for name, of in utilities.items()}
    for system in dict.fromkeys(system for a in answers for system in a.systems):
        right[f"system {system}"] = np.array([float(a.systems.get(system, False)) for a in answers])
    pages = np.array([a.written.record.filename for a in answers], object)
    differ = np.array([a.differ for a in answers])
    everywhere = np.ones(len(answers), bool)

    def both(value_of) -> dict[str, Any]:
        return {
            key: value_of(rows) if rows.any() else None
            for key, rows in (("all", everywhere), ("differ", differ))
        }

    def lead(name: str) -> dict[str, Any]:
        return both(
            lambda rows: paired_difference(right[name][rows], right[MAJORITY][rows], pages[rows], seed)
        )

    return {
        "questions": len(answers),
        "differ": int(differ.sum()),
        "weights": {"score": weights.score, "votes": weights.votes},
        "rows": [
            {"method": name} | both(lambda rows, values=values: _share(values[rows], pages[rows])._asdict())
            for name, values in right.items()
        ],
        "over_majority": {name: lead(name) for name in (RANKER, BOTH)},
    }


def _right(answers: Answers, utility: np.ndarray) -> float:
    """The probability of a right choice: equal utilities share it. 0 without answers."""
    if not len(utility):
        return 0.0
    best = utility == utility.max()
    return float((best & answers.right).sum() / best.sum())


def _share(values: np.ndarray, pages: np.ndarray) -> Estimate:
    hits, count = sum_by(pages, values, np.ones(len(values)))
    return ratio(hits, count, limits=SHARE)
