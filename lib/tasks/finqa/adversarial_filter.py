"""Draw pools from banks so that question-blind scorers cannot tell gold programs from others.

This is adversarial filtering (Zellers et al., 2018) with weights instead of hard selection:

1. Rounds over single programs. A scorer learns to tell gold programs from fillers, drawn as the earlier rounds say. Its
   log odds are added to the log weights that fillers are drawn with.
2. Rounds over whole pools. Several pools are proposed for each question, and one of them is chosen. Its weight is
   1 / p, where p is the probability that a scorer of pools gives the gold program. With exact p, every program of a
   chosen pool is equally likely to be gold. This is one step of iterative proportional fitting.

Every scorer is fitted on the other folds, so it did not learn from the page that it scores. In later rounds, however, the
fillers of those folds were chosen by scorers that did see the page. The reliability of a scorer can therefore be
measured in the first round only. Scores of later rounds count half.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from lib import randomness
from lib.log import Progress
from lib.sections.finqa import PoolsConfig
from lib.tasks.finqa.bank import Bank
from lib.tasks.finqa.blind import TreeScorer, WordScorer, balanced, hashed_words
from lib.tasks.finqa.pool_comparison import in_pool

PROPOSALS = 24  # pools proposed for each question
FILLERS = 16  # per gold program, for scorers of single programs
SINGLE_TREES = 150
WHOLE_TREES = 60
LATER = 0.5  # weight of the scores of later rounds


@dataclass
class Pools:
    """P pools of one bank: `questions` (P,), and `members` (P, K) with the gold program first."""

    questions: np.ndarray
    members: np.ndarray


class AdversarialFilter:
    """The scorers of each round, one for each fold.

    Args:
        size: number of candidates of a pool, K.
    """

    def __init__(self, settings: PoolsConfig, size: int, seed: int):
        self.settings = settings
        self.size = size
        self.seed = seed
        self.single: list[list[WordScorer | TreeScorer]] = []
        # The scores of each round over single programs are multiplied by these
        self.factors: list[float] = []
        self.whole: list[list[TreeScorer]] = []

    def fit(self, banks: Sequence[Bank]) -> list[dict[int, np.ndarray]]:
        """Fit the scorers on the banks of the train split. Returns their pools (see `draw`), `train_draws` per question."""
        folds = np.array([self.fold(bank.group) for bank in banks])
        rounds = 2 * self.settings.rounds + self.settings.rounds  # over single programs, and over whole pools
        with Progress("scorers without the question", rounds * self.settings.folds) as progress:
            log_weights = self._fit_single(banks, folds, progress)
            return self._fit_whole(banks, folds, log_weights, progress)

    def draw(self, bank: Bank) -> dict[int, np.ndarray]:
        """Question -> (1, K) programs of the bank, the gold program first. Questions without a pool are missing."""
        log_weight = np.zeros(len(bank.programs))
        fold = self.fold(bank.group)
        if len(bank.programs):
            words = hashed_words(bank.words)
            for scorers, factor in zip(self.single, self.factors, strict=True):
                log_weight = log_weight + factor * _score_single(scorers[fold], words, bank.rows, log_weight)
        pools = self._propose(bank, log_weight)
        log_choice = np.zeros(len(pools.questions))
        if len(log_choice):
            described = _describe(bank, pools, log_weight)
            for scorers in self.whole:
                log_choice -= _log_probability_of_gold(LATER * _score_whole(scorers[fold], described))
        return {
            question: pools.members[rows]
            for question, rows in self._choose(bank, pools, log_choice, 1).items()
        }

    def fold(self, group: str) -> int:
        """The fold of a group, by a keyed hash."""
        return int(randomness.hash_fraction(self.seed, "finqa fold", group) * self.settings.folds)

    # Rounds over single programs

    def _fit_single(self, banks: Sequence[Bank], folds: np.ndarray, progress: Progress) -> list[np.ndarray]:
        """Fit the scorers of single programs, words and trees in turn. Returns the log weights of each bank."""
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
                    scorer = WordScorer(words[learn], gold[learn], balance)
                else:
                    columns = np.column_stack([rows[learn], log_weight[learn]])
                    scorer = TreeScorer(columns, gold[learn], balance, self.seed + number, SINGLE_TREES)
                scorers.append(scorer)
                scores[apply] = _score_single(scorer, words[apply], rows[apply], log_weight[apply])
                progress.update(progress.step + 1)
            self.single.append(scorers)
            self.factors.append(_slope(scores[known], gold[known], weight[known]) if number < 2 else LATER)
            log_weight = log_weight + self.factors[-1] * scores
        return np.split(log_weight, np.cumsum(sizes)[:-1])

    def _fillers(self, banks: Sequence[Bank], log_weights: Sequence[np.ndarray], number: int) -> np.ndarray:
        """(all programs,) how often each template program is drawn as a filler with the current weights."""
        all_times = []
        for bank, log_weight in zip(banks, log_weights, strict=True):
            times = np.zeros(len(log_weight))
            template = np.array([kind == "template" for kind in bank.kinds])
            draw = _generator(self.seed, f"finqa fillers {bank.key}", number)
            for gold in np.flatnonzero(bank.is_gold):
                alike = template & (bank.operators == bank.operators[gold])
                matched = alike.any() and draw.random() < self.settings.same_operators
                eligible = np.flatnonzero(alike if matched else template)
                if len(eligible):
                    weight = np.exp(log_weight[eligible] - log_weight[eligible].max())
                    times[eligible] += draw.multinomial(FILLERS, weight / weight.sum())
            all_times.append(times)
        return np.concatenate(all_times)

    # Rounds over whole pools

    def _fit_whole(
        self, banks: Sequence[Bank], folds: np.ndarray, log_weights: list[np.ndarray], progress: Progress
    ) -> list[dict[int, np.ndarray]]:
        """Fit the scorers of whole pools. Returns the pools chosen from each bank."""
        proposals = [self._propose(bank, weight) for bank, weight in zip(banks, log_weights, strict=True)]
        described = np.concatenate(
            [_describe(*item) for item in zip(banks, proposals, log_weights, strict=True)]
        )  # (P, K, G)
        sizes = [len(pools.questions) for pools in proposals]
        starts, fold = np.cumsum([0, *sizes[:-1]]), np.repeat(folds, sizes)
        log_choice = np.zeros(len(described))

        def chosen(count: int) -> list[dict[int, np.ndarray]]:
            parts = zip(banks, proposals, starts, sizes, strict=True)
            return [
                self._choose(bank, pools, log_choice[start : start + size], count)
                for bank, pools, start, size in parts
            ]

        for number in range(self.settings.rounds):
            known = np.zeros(len(described), bool)
            for start, questions in zip(starts, chosen(1), strict=True):
                known[start + np.concatenate([*questions.values(), np.empty(0, int)])] = True
            scorers, scores = [], np.zeros(described.shape[:2])
            for left_out in range(self.settings.folds):
                apply = fold == left_out
                scorers.append(_fit_pools(described[known & ~apply], self.seed + number))
                scores[apply] = _score_whole(scorers[-1], described[apply])
                progress.update(progress.step + 1)
            self.whole.append(scorers)
            log_choice = log_choice - _log_probability_of_gold(LATER * scores)
        return [
            {question: pools.members[rows] for question, rows in questions.items()}
            for pools, questions in zip(proposals, chosen(self.settings.train_draws), strict=True)
        ]

    def _choose(self, bank: Bank, pools: Pools, log_choice: np.ndarray, count: int) -> dict[int, np.ndarray]:
        """Question -> (count,) indices of its pools, drawn with weight exp(log_choice) without replacement.

        A question with fewer pools repeats them.
        """
        found = {}
        for question in np.unique(pools.questions):
            proposals = np.flatnonzero(pools.questions == question)
            draw = _generator(self.seed, f"finqa choice {bank.records[question].id}", 0)
            keys = log_choice[proposals] + draw.gumbel(size=len(proposals))
            order = proposals[np.argsort(-keys, kind="stable")]
            found[int(question)] = np.resize(order[:count], count)
        return found

    # Proposals

    def _propose(self, bank: Bank, log_weight: np.ndarray) -> Pools:
        """Up to PROPOSALS pools for each question of the bank."""
        questions, members = [], []
        for question, gold in enumerate(bank.golds):
            if gold < 0:
                continue
            draw = _generator(self.seed, f"finqa pool {bank.records[question].id}", 0)
            for _ in range(PROPOSALS):
                pool = self._propose_one(bank, question, log_weight, draw)
                if pool is not None:
                    questions.append(question)
                    members.append(pool)
        return Pools(np.array(questions, int), np.array(members, int).reshape(-1, self.size))

    def _propose_one(
        self, bank: Bank, question: int, log_weight: np.ndarray, draw: np.random.Generator
    ) -> list[int] | None:
        """One pool, or None when the bank has too few programs that differ in value.

        The order is: the gold program, gold programs of the page, changed gold programs, other programs by weight. The
        last take turns to have the operators of the gold programs in the pool. So the operators of the question's gold
        program are not more frequent than others.
        """
        pool = [bank.golds[question]]
        excluded = bank.near[pool[0]] | bank.rivals[question]

        def add(programs: np.ndarray, count: int) -> None:
            nonlocal excluded
            target = min(len(pool) + count, self.size)
            for program in programs:
                if len(pool) == target:
                    return
                if not excluded >> int(program) & 1:
                    pool.append(int(program))
                    excluded |= bank.near[program]

        # Gumbel-max: the largest noise + log weight is a draw with probability proportional to the weight
        noise = draw.gumbel(size=len(log_weight))
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
        """(programs next to the gold program on its walk, how many to add).

        The gold program is at a uniformly drawn position among them.
        """
        count = int(draw.binomial(room, self.settings.corruption_rate))
        before = int(draw.integers(count + 1))
        nearby = (bank.owner == question) & (bank.step >= -before) & (bank.step <= count - before)
        return np.flatnonzero(nearby), count


def _generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(randomness.key(seed, purpose, number)))


def _score_single(
    scorer: WordScorer | TreeScorer, words, rows: np.ndarray, log_weight: np.ndarray
) -> np.ndarray:
    if isinstance(scorer, WordScorer):
        return scorer.score(words)
    return scorer.score(np.column_stack([rows, log_weight]))


def _slope(scores: np.ndarray, gold: np.ndarray, weight: np.ndarray) -> float:
    """The factor that turns scores into log odds on programs that the scorer did not see, by logistic calibration."""
    if gold.all() or not gold.any():
        return 0.0
    model = LogisticRegression(C=1e3).fit(scores[:, None], gold, sample_weight=balanced(gold, weight))
    return float(np.clip(model.coef_[0, 0], 0, 1.5))


def _describe(bank: Bank, pools: Pools, log_weight: np.ndarray) -> np.ndarray:
    """(P, K, G) features of each candidate, alone and compared with its pool."""
    members = pools.members
    rows, extra = bank.rows[members], log_weight[members][..., None].astype(np.float32)
    return np.concatenate([rows, extra, in_pool(rows, bank.numbers[members], extra)], -1)


def _fit_pools(described: np.ndarray, seed: int) -> TreeScorer:
    gold = np.zeros(described.shape[:2], bool)
    gold[:, 0] = True
    flat = described.reshape(-1, described.shape[-1])
    return TreeScorer(flat, gold.ravel(), balanced(gold.ravel()), seed, WHOLE_TREES)


def _score_whole(scorer: TreeScorer, described: np.ndarray) -> np.ndarray:
    """(P, K) scores."""
    return scorer.score(described.reshape(-1, described.shape[-1])).reshape(described.shape[:2])


def _log_probability_of_gold(scores: np.ndarray) -> np.ndarray:
    """(P,) log probability of the first candidate of each pool, by softmax of scores (P, K)."""
    return scores[:, 0] - np.logaddexp.reduce(scores, axis=1)
