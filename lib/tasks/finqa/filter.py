"""Draws pools from banks so that scorers without the question cannot tell gold programs from others.

First, rounds over single programs: a scorer learns to tell gold programs from fillers as the rounds before draw them,
and its log odds are added to the log weights that fillers are drawn with. Then rounds over whole pools: of several
pools drawn for a question one is taken, with a weight of one over the chance that a scorer of pools gives its gold
program. Were that chance exact, none of the programs in a pool taken would be likelier than another to be gold: it is
one step of iterative proportional fitting.

Every scorer is fitted on the other folds, so what it says of a page was not learned there. The fillers of later rounds
were chosen on those folds by scorers that did see the page, though: what it says about other pages' gold programs
is then in their fillers. How far to trust a scorer can be measured on pages that it did not see in the first
round only; later ones count half.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from lib import randomness
from lib.sections.finqa import PoolsConfig
from lib.tasks.finqa.bank import Bank
from lib.tasks.finqa.blind import Trees, Words, balanced, hashed_words
from lib.tasks.finqa.features import in_pool

PROPOSALS = 24  # pools drawn for each question, to take one of
FILLERS = 16  # of each gold program that a scorer of single programs learns from
SINGLE_TREES = 150
WHOLE_TREES = 60
LATER = 0.5  # what the scores of later rounds count


@dataclass
class Pools:
    """P pools of one bank: `questions` (P,) and `members` (P, K), the gold program first."""

    questions: np.ndarray
    members: np.ndarray


class Filter:
    """Scorers of each round, one for each fold.

    Args:
        size: candidates of a pool, K.
    """

    def __init__(self, settings: PoolsConfig, size: int, seed: int):
        self.settings = settings
        self.size = size
        self.seed = seed
        self.single: list[list[Words | Trees]] = []
        self.trust: list[float] = []  # what the scores of each round over single programs are multiplied by
        self.whole: list[list[Trees]] = []

    def fit(self, banks: Sequence[Bank]) -> list[dict[int, np.ndarray]]:
        """Learn from the banks of the train split, and draw their pools (see `draw`): `train_draws` for each question."""
        folds = np.array([self.fold(bank.group) for bank in banks])
        log_weights = self._fit_single(banks, folds)
        return self._fit_whole(banks, folds, log_weights)

    def draw(self, bank: Bank) -> dict[int, np.ndarray]:
        """Question -> (1, K) programs of the bank, the gold one first. Questions without a pool are left out."""
        log_weight = np.zeros(len(bank.programs))
        fold = self.fold(bank.group)
        if len(bank.programs):
            words = hashed_words(bank.words)
            for scorers, trust in zip(self.single, self.trust, strict=True):
                log_weight = log_weight + trust * _score_single(scorers[fold], words, bank.rows, log_weight)
        pools = self._propose(bank, log_weight)
        log_choice = np.zeros(len(pools.questions))
        if len(log_choice):
            described = _describe(bank, pools, log_weight)
            for scorers in self.whole:
                log_choice -= _log_chance_of_gold(LATER * _score_whole(scorers[fold], described))
        return {
            question: pools.members[rows] for question, rows in self._take(bank, pools, log_choice, 1).items()
        }

    def fold(self, group: str) -> int:
        return int(randomness.hash_fraction(self.seed, "finqa fold", group) * self.settings.folds)

    # Rounds over single programs

    def _fit_single(self, banks: Sequence[Bank], folds: np.ndarray) -> list[np.ndarray]:
        """Fit the scorers of single programs, words and trees by turns; the log weights of each bank's programs."""
        words = hashed_words([w for bank in banks for w in bank.words])
        rows = np.concatenate([bank.rows for bank in banks])
        sizes = [len(bank.programs) for bank in banks]
        gold, fold = np.concatenate([bank.is_gold for bank in banks]), np.repeat(folds, sizes)
        log_weight = np.zeros(len(rows))
        for number in range(2 * self.settings.rounds):
            times = self._fillers(banks, np.split(log_weight, np.cumsum(sizes)[:-1]), number)
            weight = np.where(gold, 1.0, times)
            known = weight > 0
            scorers, scores = [], np.zeros(len(rows))
            for left_out in range(self.settings.folds):
                learn, apply = known & (fold != left_out), fold == left_out
                balance = balanced(gold[learn], weight[learn])
                if number % 2 == 0:
                    scorer = Words(words[learn], gold[learn], balance)
                else:
                    columns = np.column_stack([rows[learn], log_weight[learn]])
                    scorer = Trees(columns, gold[learn], balance, self.seed + number, SINGLE_TREES)
                scorers.append(scorer)
                scores[apply] = _score_single(scorer, words[apply], rows[apply], log_weight[apply])
            self.single.append(scorers)
            self.trust.append(_slope(scores[known], gold[known], weight[known]) if number < 2 else LATER)
            log_weight = log_weight + self.trust[-1] * scores
        return np.split(log_weight, np.cumsum(sizes)[:-1])

    def _fillers(self, banks: Sequence[Bank], log_weights: Sequence[np.ndarray], number: int) -> np.ndarray:
        """(all programs,) how often each template program is drawn as a filler by the weights so far."""
        all_times = []
        for bank, log_weight in zip(banks, log_weights, strict=True):
            times = np.zeros(len(log_weight))
            template = np.array([kind == "template" for kind in bank.kinds])
            draw = _generator(self.seed, f"finqa fillers {bank.key}", number)
            for gold in np.flatnonzero(bank.is_gold):
                alike = template & (bank.operators == bank.operators[gold])
                matched = alike.any() and draw.random() < self.settings.same_operators
                free = np.flatnonzero(alike if matched else template)
                if len(free):
                    chance = np.exp(log_weight[free] - log_weight[free].max())
                    times[free] += draw.multinomial(FILLERS, chance / chance.sum())
            all_times.append(times)
        return np.concatenate(all_times)

    # Rounds over whole pools

    def _fit_whole(
        self, banks: Sequence[Bank], folds: np.ndarray, log_weights: list[np.ndarray]
    ) -> list[dict[int, np.ndarray]]:
        """Fit the scorers of whole pools; the pools taken from each bank."""
        proposals = [self._propose(bank, weight) for bank, weight in zip(banks, log_weights, strict=True)]
        described = np.concatenate(
            [_describe(*item) for item in zip(banks, proposals, log_weights, strict=True)]
        )  # (P, K, G)
        sizes = [len(pools.questions) for pools in proposals]
        starts, fold = np.cumsum([0, *sizes[:-1]]), np.repeat(folds, sizes)
        log_choice = np.zeros(len(described))

        def taken(count: int) -> list[dict[int, np.ndarray]]:
            parts = zip(banks, proposals, starts, sizes, strict=True)
            return [
                self._take(bank, pools, log_choice[at : at + size], count) for bank, pools, at, size in parts
            ]

        for number in range(self.settings.rounds):
            known = np.zeros(len(described), bool)
            for at, questions in zip(starts, taken(1), strict=True):
                known[at + np.concatenate([*questions.values(), np.empty(0, int)])] = True
            scorers, scores = [], np.zeros(described.shape[:2])
            for left_out in range(self.settings.folds):
                apply = fold == left_out
                scorers.append(_fit_pools(described[known & ~apply], self.seed + number))
                scores[apply] = _score_whole(scorers[-1], described[apply])
            self.whole.append(scorers)
            log_choice = log_choice - _log_chance_of_gold(LATER * scores)
        return [
            {question: pools.members[rows] for question, rows in questions.items()}
            for pools, questions in zip(proposals, taken(self.settings.train_draws), strict=True)
        ]

    def _take(self, bank: Bank, pools: Pools, log_choice: np.ndarray, count: int) -> dict[int, np.ndarray]:
        """Question -> (count,) rows of its pools, the first drawn with weight exp(log_choice), the next without those.

        Where there are fewer they come again.
        """
        found = {}
        for question in np.unique(pools.questions):
            own = np.flatnonzero(pools.questions == question)
            draw = _generator(self.seed, f"finqa choice {bank.records[question].id}", 0)
            order = own[np.argsort(-(log_choice[own] + draw.gumbel(size=len(own))), kind="stable")]
            found[int(question)] = np.resize(order[:count], count)
        return found

    # Proposals

    def _propose(self, bank: Bank, log_weight: np.ndarray) -> Pools:
        questions, members = [], []
        for question, gold in enumerate(bank.golds):
            if gold < 0:
                continue
            draw = _generator(self.seed, f"finqa pool {bank.records[question].id}", 0)
            for _ in range(PROPOSALS):
                pool = self._one(bank, question, log_weight, draw)
                if pool is not None:
                    questions.append(question)
                    members.append(pool)
        return Pools(np.array(questions, int), np.array(members, int).reshape(-1, self.size))

    def _one(
        self, bank: Bank, question: int, log_weight: np.ndarray, draw: np.random.Generator
    ) -> list[int] | None:
        """One pool, the gold program first: golds of the page, then changed golds, then the rest by weight.

        The rest take turns to have the operators of the golds: those of the question's own are no more frequent.
        """
        pool = [bank.golds[question]]
        barred = bank.near[pool[0]]

        def add(numbers: np.ndarray, count: int) -> None:
            nonlocal barred
            wanted = min(len(pool) + count, self.size)
            for number in numbers:
                if len(pool) == wanted:
                    return
                if not barred >> int(number) & 1:
                    pool.append(int(number))
                    barred |= bank.near[number]

        noise = draw.gumbel(size=len(log_weight))  # the largest of noise + log weight is a draw by weight
        golds = np.flatnonzero(bank.is_gold)
        add(golds[np.argsort(-noise[golds])], self.settings.page_golds)
        chosen = list(pool)
        if self.settings.corruption_rate > 0:
            add(*self._changed(bank, question, self.size - len(pool), draw))
        shared = np.flatnonzero(bank.owner < 0)
        shared = shared[np.argsort(-(noise + log_weight)[shared])]
        for gold in itertools.islice(itertools.cycle(draw.permutation(chosen)), self.size - len(pool)):
            if draw.random() < self.settings.same_operators:
                add(shared[bank.operators[shared] == bank.operators[gold]], 1)
        add(shared, self.size)
        return pool if len(pool) == self.size else None

    def _changed(
        self, bank: Bank, question: int, room: int, draw: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        """Programs next to the gold one on its walk, which stands at a uniform place among them, and how many."""
        count = int(draw.binomial(room, self.settings.corruption_rate))
        before = int(draw.integers(count + 1))
        mine = (bank.owner == question) & (bank.step >= -before) & (bank.step <= count - before)
        return np.flatnonzero(mine), count


def _generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(randomness.key(seed, purpose, number)))


def _score_single(scorer: Words | Trees, words, rows: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
    if isinstance(scorer, Words):
        return scorer.score(words)
    return scorer.score(np.column_stack([rows, log_weight]))


def _slope(scores: np.ndarray, gold: np.ndarray, weight: np.ndarray) -> float:
    """What to multiply scores by for them to be log odds on programs that the scorer did not see."""
    if gold.all() or not gold.any():
        return 0.0
    model = LogisticRegression(C=1e3).fit(scores[:, None], gold, sample_weight=balanced(gold, weight))
    return float(np.clip(model.coef_[0, 0], 0, 1.5))


def _describe(bank: Bank, pools: Pools, log_weight: np.ndarray) -> np.ndarray:
    """(P, K, G) of each candidate, alone and among the others."""
    members = pools.members
    rows, extra = bank.rows[members], log_weight[members][..., None].astype(np.float32)
    return np.concatenate([rows, extra, in_pool(rows, bank.numbers[members], extra)], -1)


def _fit_pools(described: np.ndarray, seed: int) -> Trees:
    gold = np.zeros(described.shape[:2], bool)
    gold[:, 0] = True
    flat = described.reshape(gold.size, -1)
    return Trees(flat, gold.ravel(), balanced(gold.ravel()), seed, WHOLE_TREES)


def _score_whole(scorer: Trees, described: np.ndarray) -> np.ndarray:
    """(P, K)"""
    return scorer.score(described.reshape(-1, described.shape[-1])).reshape(described.shape[:2])


def _log_chance_of_gold(scores: np.ndarray) -> np.ndarray:
    """(P,) the log chance that scores (P, K) give the first candidate of each pool."""
    return scores[:, 0] - np.logaddexp.reduce(scores, axis=1)
