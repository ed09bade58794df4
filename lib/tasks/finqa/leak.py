"""The leak: how often question-blind scorers find gold programs. And baselines that do see the question.

These scorers differ from those that made the pools (`adversarial_filter`) in models, settings and seeds, and they read the
text that rankers read. What they find is a shortcut that a ranker could learn too.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib import randomness
from lib.metrics import SHARE, Estimate, ratio, sum_by
from lib.ranking.metrics import ranking_metrics
from lib.tasks.finqa.blind import Sparse
from lib.tasks.finqa.features import ProgramFeatures, label_of
from lib.tasks.finqa.grounding import ground
from lib.tasks.finqa.page import Page, numbers_of
from lib.tasks.finqa.pool_comparison import in_pool, number_table
from lib.tasks.finqa.program import parse
from lib.tasks.finqa.record import Record

# A question, its candidates (program, value), the index of the gold program
Pool = tuple[Record, Sequence, int]
ONE, WHOLE = "one candidate", "whole pool"

_AT_ONCE = 1024  # pools compared in one batch
_WORD = re.compile(r"[a-z]{3,}|[0-9][0-9,.]*")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}")


@dataclass
class PoolFeatures:
    """Features of N pools of K candidates."""

    pages: np.ndarray  # (N,) names
    rows: np.ndarray  # (N, K, F) of each candidate alone
    compared: np.ndarray  # (N, K, G) of each candidate compared with its pool
    texts: list[str]  # N * K, as rankers read them
    gold: np.ndarray  # (N, K) bool

    @staticmethod
    def of(pools: Sequence[Pool]) -> "PoolFeatures":
        views = {record.filename: Page(record) for record, _, _ in pools}
        rows, numbers, texts = [], [], []
        for record, pool, _ in pools:
            page = views[record.filename]
            described = [ProgramFeatures.of(c.program, c.value, page) for c in pool]
            rows.append([d.row for d in described])
            numbers.append(number_table(described))
            texts += [ground(c.program, c.value, page) for c in pool]
        shape = len(pools), len(pools[0][1])
        array = np.array(rows, np.float32).reshape(*shape, -1)
        compared = np.concatenate(
            [
                in_pool(array[i : i + _AT_ONCE], np.array(numbers[i : i + _AT_ONCE]))
                for i in range(0, shape[0], _AT_ONCE)
            ]
        )
        gold = np.arange(shape[1]) == np.array([gold_index for *_, gold_index in pools])[:, None]
        return PoolFeatures(np.array([r.filename for r, *_ in pools]), array, compared, texts, gold)

    def columns(self, sees: str) -> np.ndarray:
        """(N * K, C) features of each candidate alone (`sees` is ONE), or also compared with its pool."""
        parts = [self.rows] if sees == ONE else [self.rows, self.compared]
        return np.concatenate(parts, -1).reshape(self.gold.size, -1)


def measure_leak(
    train_pools: Sequence[Pool], held_out_pools: Sequence[Pool], seed: int, limit: float
) -> dict:
    """How often question-blind scorers, fitted on the train pools, find the gold programs of the held-out pools.

    Returns:
        rows: a dict per scorer with `scorer` ("linear", "trees", "n-gram"), `sees` ("one candidate", "whole pool"),
            `accuracy` with its 95 % interval over pages (`low`, `high`), `chance` and `pools`.
        worst_upper_bound: the largest `high`.
        limit: as given.
    """
    train, held_out = PoolFeatures.of(train_pools), PoolFeatures.of(held_out_pools)
    rows = [_row(name, sees, scores, held_out) for name, sees, scores in _blind_scores(train, held_out, seed)]
    # One page alone has no interval
    bounds = [1.0 if math.isnan(row["high"]) else row["high"] for row in rows]
    return {"rows": rows, "worst_upper_bound": max(bounds), "limit": limit}


def _row(scorer: str, sees: str, scores: np.ndarray, pools: PoolFeatures) -> dict:
    estimate = accuracy(scores, pools.gold, pools.pages)
    count, size = pools.gold.shape
    figures = {"accuracy": estimate.value, "low": estimate.low, "high": estimate.high}
    return {"scorer": scorer, "sees": sees, **figures, "chance": 1 / size, "pools": count}


def accuracy(scores: np.ndarray, gold: np.ndarray, pages: np.ndarray) -> Estimate:
    """Share of pools in which the gold program has the highest score (N, K). The interval resamples pages."""
    found = ranking_metrics(scores, gold.astype(np.float64), np.ones_like(gold))["accuracy"]
    hits, pools = sum_by(pages, found, np.ones(len(found)))
    return ratio(hits, pools, limits=SHARE)


def _blind_scores(train: PoolFeatures, held_out: PoolFeatures, seed: int):
    """(scorer, what it sees, (N, K) scores) of every scorer."""
    gold = train.gold.ravel()
    for sees in (ONE, WHOLE):
        known, asked = train.columns(sees), held_out.columns(sees)
        yield "linear", sees, _linear(known, gold, asked).reshape(held_out.gold.shape)
        yield "trees", sees, _trees(known, gold, asked, seed).reshape(held_out.gold.shape)
    one, other = _grams(train.texts, held_out.texts)
    yield "n-gram", ONE, _logistic(one, gold, other).reshape(held_out.gold.shape)
    one, other = (_beside_pool(m, x.gold.shape[1]) for m, x in ((one, train), (other, held_out)))
    yield "n-gram", WHOLE, _logistic(one, gold, other).reshape(held_out.gold.shape)


def _linear(known: np.ndarray, gold: np.ndarray, asked: np.ndarray) -> np.ndarray:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    return model.fit(known, gold).decision_function(asked)


def _trees(known: np.ndarray, gold: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    model = HistGradientBoostingClassifier(
        max_iter=150, learning_rate=0.06, max_leaf_nodes=23, min_samples_leaf=25, early_stopping=False,  # type: ignore[arg-type]
        random_state=randomness.key(seed, "finqa leak") % 2**31,
    )  # fmt: skip
    return model.fit(known, gold).decision_function(asked)


def _logistic(known, gold: np.ndarray, asked) -> np.ndarray:
    return LogisticRegression(C=2.0, max_iter=100).fit(known, gold).decision_function(asked)


def _grams(train: list[str], held_out: list[str]) -> tuple[Sparse, Sparse]:
    """TF-IDF of words, pairs of words, and character n-grams of length two to four."""
    makers = [
        TfidfVectorizer(token_pattern=r"[^\s\[\](),]+", ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=3, sublinear_tf=True),
    ]
    known = [maker.fit_transform(train) for maker in makers]
    return sparse.hstack(known, "csr"), sparse.hstack([maker.transform(held_out) for maker in makers], "csr")


def _beside_pool(grams: Sparse, size: int) -> Sparse:
    """The n-grams of each candidate, and in further columns those that at least half of its pool have."""
    present = (grams > 0).astype(np.float32)
    count = len(range(0, grams.shape[0], size))
    pool_sum = sparse.kron(sparse.eye(count), np.ones((size, size), np.float32), "csr")
    common = ((pool_sum @ present) >= size / 2).astype(np.float32)
    return sparse.hstack([grams, grams.multiply(common)], "csr")


# ----------------------------------------------------------------------------------------- baselines with the question


def question_trees(train_pools: Sequence[Pool], held_out_pools: Sequence[Pool], seed: int) -> np.ndarray:
    """(N, K) scores of boosted trees on the question-blind features and on `question_features`."""
    train, held_out = (PoolFeatures.of(pools) for pools in (train_pools, held_out_pools))
    known, asked = (_with_question(m, p) for m, p in ((train, train_pools), (held_out, held_out_pools)))
    return _trees(known, train.gold.ravel(), asked, seed).reshape(held_out.gold.shape)


def _with_question(pools: PoolFeatures, questions: Sequence[Pool]) -> np.ndarray:
    """(N * K, C): question-blind features, question features, and these less their maximum in the pool."""
    views = {record.filename: Page(record) for record, _, _ in questions}
    seen = np.array(
        [[question_features(r, c, views[r.filename]) for c in pool] for r, pool, _ in questions], np.float32
    )  # (N, K, Q)
    lead = seen - seen.max(1, keepdims=True)
    return np.concatenate([pools.columns(ONE), *(x.reshape(pools.gold.size, -1) for x in (seen, lead))], 1)


_ASKED = {
    "percent": r"percent|percentage|%|portion|share of|proportion",
    "ratio": r"ratio|times|relative",
    "change": r"change|growth|grow|increase|decrease|decline|rise|fell|difference|more|less|net change",
    "total": r"total|sum|combined|together|all",
    "average": r"average|mean",
    "difference": r"difference|how much more|how much less|exceed",
    "largest": r"highest|largest|maximum|lowest|smallest|minimum",
    "product": r"cost|value of|worth|if|would",
}
_ASKED_PATTERNS = [re.compile(rf"\b(?:{words})") for words in _ASKED.values()]


def question_features(record: Record, candidate, page: Page) -> list[float]:
    """What the question and the program share: names, years, numbers; and words that ask for an operation."""
    question = record.question.lower()
    words, years = set(_WORD.findall(question)), set(_YEAR.findall(question))
    steps = parse(candidate.program)
    numbers = numbers_of(steps)
    spans = [p for p in page.locate(numbers).values() if p is not None]
    labels = [{word[2:] if word[1:2] == "." else word for word in label_of(p, page)} for p in spans]
    labels += [set(_WORD.findall(s.first.text.lower())) for s in steps if s.reads_table]
    shared = [len(label & words) / (1 + len(label)) for label in labels]
    label_years = [{word for word in label if _YEAR.fullmatch(word)} for label in labels]
    named = set().union(*label_years) if label_years else set()
    said = set().union(*labels) if labels else set()
    asked = [float(pattern.search(question) is not None) for pattern in _ASKED_PATTERNS]
    return [
        sum(shared) / max(len(shared), 1), max(shared, default=0.0), min(shared, default=0.0),
        len(said & words) / max(len(words), 1),
        len(named & years), len(named - years), len(years - named), len(years),
        sum(bool(label & years) for label in label_years) / max(len(labels), 1),
        sum(n.rstrip("%") in words for n in numbers), len(words),
        *asked,
    ]  # fmt: skip


def label_overlap(pools: Sequence[Pool]) -> np.ndarray:
    """(N, K) untrained scores: the share of the question's words that the labels of a program's numbers contain."""
    scores = []
    for record, pool, _ in pools:
        page = Page(record)
        words = set(_WORD.findall(record.question.lower()))
        scores.append([_overlap(words, c, page) for c in pool])
    return np.array(scores)


def _overlap(words: set[str], candidate, page: Page) -> float:
    steps = parse(candidate.program)
    numbers = numbers_of(steps)
    said = {n.rstrip("%") for n in numbers}
    for gold_index in page.locate(numbers).values():
        if gold_index is not None:
            said |= {word[2:] if word[1:2] == "." else word for word in label_of(gold_index, page)}
    for step in steps:
        if step.reads_table:
            said |= set(_WORD.findall(step.first.text.lower()))
    return len(said & words) / max(len(words), 1)
