"""Draws pools from banks so that scorers without the question cannot tell gold programs from others.

First, rounds over single programs: a scorer learns to tell gold programs from the fillers of the rounds before, and
its log odds are added to the weights that fillers are drawn with. Then rounds over whole pools: of several pools
drawn for a question one is taken, with a weight of one over the chance that a scorer of pools gives its gold program;
were that chance exact, the pools taken would have none that is better than another (one step of iterative
proportional fitting). Every scorer is fitted on the other folds, so what it says of a page was not learned there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.sections import PoolsConfig
from lib.tasks.finqa.bank import Bank
from lib.tasks.finqa.blind import Trees, Words, balanced, hashed_words
from lib.tasks.finqa.features import in_pool

PROPOSALS = 8  # pools drawn for each question, to take one of
FILLERS = 16  # of each gold program that a scorer of single programs learns from
POINT_TREES = 80
POOL_TREES = 60
AT_ONCE = 2048  # pools described at a time


@dataclass
class Pools:
    """Of one bank: P proposals for questions, gold first. `questions` (P,), `members` (P, K), `taken`: of each
    question the row of its pool."""

    questions: np.ndarray
    members: np.ndarray
    taken: dict[int, int]

    def of(self, question: int) -> np.ndarray | None:
        row = self.taken.get(question)
        return None if row is None else self.members[row]


class Filter:
    def __init__(self, settings: PoolsConfig, size: int, seed: int):
        self.settings = settings
        self.size = size
        self.seed = seed
        self.points: list[list[Words | Trees]] = []  # for each round, of each fold
        self.whole: list[list[Trees]] = []

    # ---- fitting

    @classmethod
    def fit(cls, banks: Sequence[Bank], settings: PoolsConfig, size: int, seed: int) -> "Filter":
        self = cls(settings, size, seed)
        banks = [bank for bank in banks if any(gold >= 0 for gold in bank.golds)]
        folds = np.array([self.fold(bank.group) for bank in banks])
        weights = self._fit_points(banks, folds)
        self._fit_whole(banks, folds, weights)
        return self

    def fold(self, group: str) -> int:
        folds = self.settings.folds
        return int(randomness.hash_fraction(self.seed, "finqa fold", group) * folds)

    def _fit_points(self, banks: Sequence[Bank], folds: np.ndarray) -> list[np.ndarray]:
        """Fit the scorers of single programs; the log weights of each bank's programs."""
        words = hashed_words([w for bank in banks for w in bank.words])
        rows = np.concatenate([bank.rows for bank in banks])
        owner = np.repeat(np.arange(len(banks)), [len(bank.programs) for bank in banks])
        gold = np.concatenate([bank.is_gold for bank in banks])
        fold = folds[owner]
        log_weight = np.zeros(len(rows))
        for number in range(2 * self.settings.rounds):
            chosen = self._fillers(banks, log_weight, number)
            used, weight = gold | (chosen > 0), np.where(gold, 1.0, chosen)
            scorers, change = [], np.zeros(len(rows))
            for left_out in range(self.settings.folds):
                learn, apply = used & (fold != left_out), fold == left_out
                what = words if number % 2 == 0 else np.column_stack([rows, log_weight])
                balance = balanced(gold[learn], weight[learn])
                if number % 2 == 0:
                    scorer = Words(what[learn], gold[learn], balance)
                else:
                    scorer = Trees(what[learn], gold[learn], balance, self.seed + number, POINT_TREES)
                scorers.append(scorer)
                change[apply] = scorer.score(what[apply])
            slope = _calibrated(change[used], gold[used], balanced(gold[used], weight[used])) if CAL else 1.0
            if VERBOSE:
                print("slope", number, slope)
            for scorer in scorers:
                scorer.slope = slope
            self.points.append(scorers)
            log_weight = log_weight + slope * change
        return np.split(log_weight, np.cumsum([len(bank.programs) for bank in banks])[:-1])

    def _fillers(self, banks: Sequence[Bank], log_weight: np.ndarray, number: int) -> np.ndarray:
        """(N,) how often each template program is drawn as a filler, by the weights so far."""
        times = np.zeros(len(log_weight))
        start = 0
        for bank in banks:
            free = np.flatnonzero([kind == "template" for kind in bank.kinds])
            if len(free):
                draw = _generator(self.seed, f"finqa fillers {bank.key}", number)
                logit = log_weight[start + free]
                chance = np.exp(logit - logit.max())
                count = FILLERS * int(bank.is_gold.sum())
                times[start + free] = draw.multinomial(count, chance / chance.sum())
            start += len(bank.programs)
        return times

    def _fit_whole(self, banks: Sequence[Bank], folds: np.ndarray, log_weights: list[np.ndarray]) -> None:
        proposals = [self._propose(bank, weight) for bank, weight in zip(banks, log_weights, strict=True)]
        described = np.concatenate(
            [_describe(*item) for item in zip(banks, proposals, log_weights, strict=True)]
        )  # (P, K, G)
        fold = np.repeat(folds, [len(p.questions) for p in proposals])
        log_choice = [np.zeros(len(p.questions)) for p in proposals]
        for number in range(self.settings.rounds):
            for bank, pools, choice in zip(banks, proposals, log_choice, strict=True):
                self._take(bank, pools, choice)
            taken = np.concatenate([_taken(pools) for pools in proposals])
            self.whole.append([])
            scores = np.zeros(described.shape[:2])
            for left_out in range(self.settings.folds):
                learn, apply = described[taken & (fold != left_out)], fold == left_out
                gold = np.zeros(learn.shape[:2], bool)
                gold[:, 0] = True
                flat = learn.reshape(-1, learn.shape[-1])
                scorer = Trees(flat, gold.ravel(), balanced(gold.ravel()), self.seed + number, POOL_TREES)
                self.whole[-1].append(scorer)
                scores[apply] = _pool_scores(scorer, described[apply])
            slope = _slope_of_pools(scores[taken]) if CALP else 1.0
            if VERBOSE:
                print("pool slope", number, slope)
            for scorer in self.whole[-1]:
                scorer.slope = slope
            change = _log_chance_of_gold(slope * scores)
            ends = np.cumsum([len(p.questions) for p in proposals])[:-1]
            log_choice = [c - d for c, d in zip(log_choice, np.split(change, ends), strict=True)]

    # ---- drawing

    def draw(self, bank: Bank) -> Pools:
        """The pools of one page."""
        if not any(gold >= 0 for gold in bank.golds):
            return Pools(np.zeros(0, int), np.zeros((0, self.size), int), {})
        fold = self.fold(bank.group)
        words, log_weight = hashed_words(bank.words), np.zeros(len(bank.programs))
        for scorers in self.points:
            scorer = scorers[fold]
            what = words if isinstance(scorer, Words) else np.column_stack([bank.rows, log_weight])
            if ENS:
                log_weight = log_weight + scorer.slope * np.mean([s.score(what) for s in scorers], 0)
            else:
                log_weight = log_weight + scorer.slope * scorer.score(what)
        pools = self._propose(bank, log_weight)
        choice = np.zeros(len(pools.questions))
        if len(choice):
            described = _describe(bank, pools, log_weight)
            for scorers in self.whole:
                scorer = scorers[fold]
                if ENS:
                    scores = np.mean([_pool_scores(s, described) for s in scorers], 0)
                else:
                    scores = _pool_scores(scorer, described)
                choice = choice - _log_chance_of_gold(scorer.slope * scores)
        self._take(bank, pools, choice)
        return pools

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
        return Pools(np.array(questions, int), np.array(members, int).reshape(-1, self.size), {})

    def _one(
        self, bank: Bank, question: int, log_weight: np.ndarray, draw: np.random.Generator
    ) -> list[int] | None:
        """One pool, the gold program first: golds of the page, then changed golds, then the rest by weight."""
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

        noise = draw.gumbel(size=len(log_weight))
        golds = np.flatnonzero(bank.is_gold)
        add(golds[np.argsort(-noise[golds])], self.settings.page_golds)
        if self.settings.corruption_rate > 0:
            add(*self._changed(bank, question, self.size - len(pool), draw))
        shared = np.flatnonzero(bank.owner < 0)
        add(shared[np.argsort(-(noise + log_weight)[shared])], self.size)
        return pool if len(pool) == self.size else None

    def _changed(
        self, bank: Bank, question: int, room: int, draw: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        """Programs next to the gold one on its walk, which stands at a uniform place among them, and how many."""
        count = int(draw.binomial(room, self.settings.corruption_rate))
        before = int(draw.integers(count + 1))
        mine = (bank.owner == question) & (bank.step >= -before) & (bank.step <= count - before)
        return np.flatnonzero(mine), count

    def _take(self, bank: Bank, pools: Pools, choice: np.ndarray) -> None:
        """Take one pool for each question, with weight exp(choice)."""
        pools.taken = {}
        for question in np.unique(pools.questions):
            rows = np.flatnonzero(pools.questions == question)
            draw = _generator(self.seed, f"finqa choice {bank.records[question].id}", 0)
            keys = choice[rows] + draw.gumbel(size=PROPOSALS)[: len(rows)]
            pools.taken[int(question)] = int(rows[np.argmax(keys)])


def _generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(randomness.key(seed, purpose, number)))


CAL, CALP, ENS, VERBOSE = True, True, False, False


def _calibrated(score, gold, weight):
    from sklearn.linear_model import LogisticRegression

    return float(
        np.clip(
            LogisticRegression(C=1e3, fit_intercept=True).fit(score[:, None], gold, weight).coef_[0, 0],
            0,
            1.5,
        )
    )


def _describe(bank: Bank, pools: Pools, log_weight: np.ndarray) -> np.ndarray:
    """(P, K, G) of the proposals."""
    members = pools.members
    rows = bank.rows[members]
    extra = log_weight[members][..., None].astype(np.float32)
    return np.concatenate([rows, extra, in_pool(rows, bank.numbers[members], extra)], -1)


def _taken(pools: Pools) -> np.ndarray:
    mask = np.zeros(len(pools.questions), bool)
    mask[list(pools.taken.values())] = True
    return mask


def _pool_scores(scorer: Trees, described: np.ndarray) -> np.ndarray:
    """(P, K)"""
    return scorer.score(described.reshape(-1, described.shape[-1])).reshape(described.shape[:2])


def _log_chance_of_gold(scores: np.ndarray) -> np.ndarray:
    """(P,) the log chance that scores (P, K) give the first candidate of each pool."""
    return scores[:, 0] - np.logaddexp.reduce(scores, axis=1)


def _slope_of_pools(scores: np.ndarray) -> float:
    """What to multiply scores (P, K) by, for the first of each pool to be likeliest."""
    slopes = np.linspace(0, 1.5, 31)
    return float(slopes[np.argmax([_log_chance_of_gold(slope * scores).mean() for slope in slopes])])
