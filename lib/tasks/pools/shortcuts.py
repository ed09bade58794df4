"""Stage 02 for pools: how many right candidates simple scorers choose, and the scores of these scorers as baselines.

| scorer               | sees                                                                    |
|----------------------|-------------------------------------------------------------------------|
| first                | the place in the file                                                   |
| length               | the number of characters; train pools decide whether long or short wins |
| kind                 | who wrote the candidate, as the file says: the mean reward of each kind  |
| recognised_kind      | the words alone: a classifier of kinds, and the mean reward of its kinds |
| candidate_linear     | the words of the candidate: TF-IDF with logistic regression             |
| candidate_trees      | its length, digits, punctuation and so on, alone and against its pool   |
| overlap              | the share of the prompt's words that the candidate has                  |
| bm25                 | the words of prompt and candidate                                       |

All but the last two do not read the prompt. What they find is a shortcut: a ranker may learn it instead of the task. They learn
from train pools, and are measured on held-out ones. The interval resamples groups of prompts.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from lib import randomness
from lib.metrics import SHARE, ratio, sum_by
from lib.ranking.bm25 import bm25_scores
from lib.ranking.metrics import winner_accuracy
from lib.ranking.words import words_of

MOST_CANDIDATES = 40_000  # of the train split that scorers learn from
COLUMNS = 2**18
MOST_KINDS = 20  # that are recognised by their words; all others count as one
FIRST, OVERLAP, BM25 = "first", "overlap", "bm25"
_SURFACE = tuple(
    re.compile(p) for p in (r"\d", r"[A-Z]", r"[.!?]", r"[,;:]", r"[^\w\s]", r"\s", r"\n", r"\w+")
)

Sparse = Any  # scipy.sparse.csr_matrix, whose types checkers do not know


@dataclass(frozen=True)
class SomePools:
    """N pools of up to K candidates. An absent candidate is "" or 0, and False in `present`.

    Attributes:
        ids, prompts: N texts. groups: (N,).
        texts, kinds: (N, K) texts. places: (N, K) in the file. rewards: (N, K).
    """

    ids: list[str]
    prompts: list[str]
    groups: np.ndarray
    texts: np.ndarray
    kinds: np.ndarray
    places: np.ndarray
    rewards: np.ndarray
    present: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def best(self) -> np.ndarray:
        """(N, K) bool."""
        known = np.where(self.present, self.rewards, -np.inf)
        return self.present & (known == known.max(1, keepdims=True))

    @property
    def are_decided(self) -> np.ndarray:
        """(N,) bool: the candidates have different rewards."""
        return self.best.sum(1) < self.present.sum(1)

    def decided(self) -> "SomePools":
        """The pools with candidates of different reward."""
        kept = self.are_decided.nonzero()[0]
        arrays = {
            name: getattr(self, name)[kept]
            for name in ("groups", "texts", "kinds", "places", "rewards", "present")
        }
        return SomePools([self.ids[i] for i in kept], [self.prompts[i] for i in kept], **arrays)


def pools_of(records: list[dict[str, Any]], rewards: list[np.ndarray]) -> SomePools:
    """Pools of records as stage 00 writes them."""
    width = max((len(r["candidates"]) for r in records), default=0)
    shape = (len(records), width)
    texts, kinds = np.full(shape, "", object), np.full(shape, "", object)
    places, reward, present = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, bool)
    for n, record in enumerate(records):
        size = len(record["candidates"])
        texts[n, :size], places[n, :size] = record["candidates"], np.arange(size)
        kinds[n, :size] = [kind or "" for kind in record.get("kinds", [""] * size)]
        reward[n, :size], present[n, :size] = rewards[n], True
    return SomePools(
        [r["id"] for r in records], [r["prompt"] for r in records],
        np.array([r["group"] for r in records], object), texts, kinds, places, reward, present,
    )  # fmt: skip


class SimpleScorers:
    """Scorers that are fitted on train pools. `scores` gives those of any pools.

    Attributes:
        names: of the scorers, in the order of the module's table. Those of kinds exist only where the file states kinds.
    """

    def __init__(self, train: SomePools, seed: int):
        train = _some(train.decided(), seed)
        known, best = train.present, train.best[train.present]
        self._scorers: dict[str, Callable[[SomePools], np.ndarray]] = {
            FIRST: lambda p: -p.places.astype(float)
        }
        usable = len(train) > 0 and best.any() and not best.all()
        if usable:
            self._scorers["length"] = self._length(train)
            if len(set(train.kinds[known])) > 1:
                self._add_kinds(train)
            words = Words(train.texts[known].tolist())
            linear = LogisticRegression(C=1.0, max_iter=100, class_weight="balanced").fit(words.train, best)
            self._scorers["candidate_linear"] = _by_candidate(
                lambda texts: linear.decision_function(words.of(texts))
            )
            never: Any = False
            trees = HistGradientBoostingClassifier(
                max_iter=120, learning_rate=0.08, max_leaf_nodes=15, min_samples_leaf=20, early_stopping=never,
                random_state=randomness.key(seed, "pools trees") % 2**31,
            ).fit(surface(train)[known], best)  # fmt: skip
            self._scorers["candidate_trees"] = lambda p: _spread(
                trees.decision_function(surface(p)[p.present]), p.present
            )
        self._scorers[OVERLAP] = overlap
        self._scorers[BM25] = lambda p: bm25_scores(p.prompts, p.texts, p.present)
        self.names = list(self._scorers)

    def scores(self, pools: SomePools) -> dict[str, np.ndarray]:
        """name -> (N, K) scores."""
        return {name: scorer(pools) for name, scorer in self._scorers.items()}

    def _length(self, train: SomePools) -> Callable[[SomePools], np.ndarray]:
        def lengths(pools: SomePools) -> np.ndarray:
            return np.vectorize(len, otypes=[float])(pools.texts)

        known, found = lengths(train), []
        for scores in (known, -known):
            found.append(winner_accuracy(scores, train.rewards, train.present).mean())
        sign = 1.0 if found[0] >= found[1] else -1.0
        return lambda pools: sign * lengths(pools)

    def _add_kinds(self, train: SomePools) -> None:
        """The scorers of the stated kinds, and of kinds that are recognised by the words."""
        known = train.present
        kinds, texts = train.kinds[known], train.texts[known].tolist()
        reward = train.rewards[known]
        mean = {kind: float(reward[kinds == kind].mean()) for kind in set(kinds)}
        middle = float(reward.mean())
        self._scorers["kind"] = lambda p: np.vectorize(lambda k: mean.get(k, middle), otypes=[float])(p.kinds)
        words, label = Words(texts), frequent(kinds)
        # A classifier for each kind alone: a single one of all kinds would need their number times its memory
        model = OneVsRestClassifier(LogisticRegression(C=1.0, max_iter=100)).fit(words.train, label)
        value = np.bincount(label, reward) / np.bincount(label)
        self._scorers["recognised_kind"] = _by_candidate(lambda t: model.predict_proba(words.of(t)) @ value)


def frequent(kinds: np.ndarray) -> np.ndarray:
    """(R,) the number of each kind by its frequency, the most frequent is 0. All beyond `MOST_KINDS` share a number."""
    _, index, count = np.unique(kinds.astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(np.argsort(-count, kind="stable"))
    return np.minimum(order[index], MOST_KINDS)


class Words:
    """TF-IDF of words, pairs of words and character n-grams, fitted on some texts. Other features are left out."""

    def __init__(self, texts: list[str]):
        self._makers = [
            HashingVectorizer(
                n_features=COLUMNS, ngram_range=(1, 2), alternate_sign=False, token_pattern=r"\S+"
            ),
            HashingVectorizer(
                n_features=COLUMNS, analyzer="char_wb", ngram_range=(2, 4), alternate_sign=False
            ),
        ]
        self._weights = TfidfTransformer(sublinear_tf=True)
        train: Sparse = self._weights.fit_transform(self._count(texts))
        self._used = np.flatnonzero(train.getnnz(0))
        self.train: Sparse = train[:, self._used]

    def of(self, texts: list[str]) -> Sparse:
        found: Sparse = self._weights.transform(self._count(texts))
        return found[:, self._used]

    def _count(self, texts: list[str]) -> Sparse:
        return sparse.hstack([maker.transform(texts) for maker in self._makers], "csr")


def surface(pools: SomePools) -> np.ndarray:
    """(N, K, F) numbers that describe how a candidate looks, alone and less the mean of its pool."""
    rows = np.array(
        [[len(text), *(len(p.findall(text)) for p in _SURFACE)] for text in pools.texts[pools.present]],
        np.float32,
    ).reshape(-1, 1 + len(_SURFACE))
    alone = np.zeros((*pools.present.shape, rows.shape[1]), np.float32)
    alone[pools.present] = np.concatenate([rows[:, :1], rows[:, 1:] / np.maximum(rows[:, :1], 1)], 1)
    count = np.maximum(pools.present.sum(1), 1)[:, None, None]
    return np.concatenate([alone, alone - alone.sum(1, keepdims=True) / count], -1)


def overlap(pools: SomePools) -> np.ndarray:
    """(N, K) the share of the prompt's words that a candidate has."""
    scores = np.zeros(pools.present.shape)
    for n, prompt in enumerate(pools.prompts):
        asked = set(words_of(prompt))
        for k in np.flatnonzero(pools.present[n]):
            scores[n, k] = len(asked & set(words_of(pools.texts[n, k]))) / max(len(asked), 1)
    return scores


class Shortcuts:
    """How many right candidates scorers choose in decided pools, block by block. Memory holds a number per pool and scorer."""

    def __init__(self) -> None:
        self._groups: list[np.ndarray] = []
        self._chance: list[np.ndarray] = []
        self._accuracy: dict[str, list[np.ndarray]] = {}

    def add(self, pools: SomePools, scores: dict[str, np.ndarray]) -> None:
        """Measure some pools. `scores`: name -> (N, K)."""
        kept = pools.are_decided
        rewards, present = pools.rewards[kept], pools.present[kept]
        if not len(rewards):
            return
        self._groups.append(pools.groups[kept].astype(str))
        self._chance.append(pools.best[kept].sum(1) / present.sum(1))
        for name, values in scores.items():
            self._accuracy.setdefault(name, []).append(winner_accuracy(values[kept], rewards, present))

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row per scorer: its accuracy on all pools, beside chance. The interval resamples groups."""
        for name, parts in self._accuracy.items():
            per_pool = np.concatenate(parts)
            hits, count = sum_by(np.concatenate(self._groups), per_pool, np.ones(len(per_pool)))
            found = ratio(hits, count, limits=SHARE)
            yield {
                "scorer": name, "accuracy": found.value, "low": found.low, "high": found.high,
                "chance": float(np.concatenate(self._chance).mean()), "pools": len(per_pool),
                "reads_prompt": name in (OVERLAP, BM25),
            }  # fmt: skip


def _some(pools: SomePools, seed: int) -> SomePools:
    """As many pools, drawn at random, as have `MOST_CANDIDATES` candidates together."""
    order = randomness.permutation(seed, "pools for simple scorers", 0, len(pools))
    sizes = np.cumsum(pools.present.sum(1)[order])
    kept = np.sort(order[: max(1, int((sizes <= MOST_CANDIDATES).sum()))])
    arrays = {
        name: getattr(pools, name)[kept]
        for name in ("groups", "texts", "kinds", "places", "rewards", "present")
    }
    return SomePools([pools.ids[i] for i in kept], [pools.prompts[i] for i in kept], **arrays)


def _by_candidate(score: Callable[[list[str]], np.ndarray]) -> Callable[[SomePools], np.ndarray]:
    """A scorer of pools from one of texts."""
    return lambda pools: _spread(score(pools.texts[pools.present].tolist()), pools.present)


def _spread(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    result = np.zeros(present.shape)
    result[present] = values
    return result
