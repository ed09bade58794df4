"""Question-blind scorers: how likely a program is to be a gold program, alone or within its pool.

A score is a log odds. It estimates log p(program | gold) - log p(program | filler), as in density-ratio estimation by
classification (Sugiyama, Suzuki and Kanamori, 2012). A scorer cannot tell fillers that are drawn with weight exp(score)
from gold programs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

WORD_COLUMNS = 2**15

Sparse = Any  # scipy.sparse.csr_matrix, whose types checkers do not know


def hashed_words(words: Sequence[str]) -> Sparse:
    """(N, WORD_COLUMNS) features of single words and pairs of adjacent words. Each row has L2 norm 1."""
    vectoriser = HashingVectorizer(
        n_features=WORD_COLUMNS, token_pattern=r"\S+", lowercase=False, ngram_range=(1, 2), binary=True,
        alternate_sign=False,
    )  # fmt: skip
    return vectoriser.transform(words).astype(np.float32)


class WordScorer:
    """Logistic regression on hashed words. All scores are 0 when it was fitted on one class only."""

    def __init__(self, words: Sparse, gold: np.ndarray, weight: np.ndarray):
        self.model = None
        if gold.any() and not gold.all():
            self.model = LogisticRegression(C=0.3, max_iter=60, tol=1e-3)
            self.model.fit(words, gold, sample_weight=weight)

    def score(self, words: Sparse) -> np.ndarray:
        if self.model is None or not words.shape[0]:
            return np.zeros(words.shape[0])
        return self.model.decision_function(words)


class TreeScorer:
    """Gradient-boosted trees on numeric columns. All scores are 0 when they were fitted on one class only."""

    def __init__(self, rows: np.ndarray, gold: np.ndarray, weight: np.ndarray, seed: int, trees: int):
        self.model = None
        if gold.any() and not gold.all():
            self.model = HistGradientBoostingClassifier(
                max_iter=trees, learning_rate=0.1, max_leaf_nodes=15, min_samples_leaf=40, l2_regularization=10.0,
                max_bins=64, early_stopping=False,  # type: ignore[arg-type]
                random_state=seed % 2**31,
            )  # fmt: skip
            self.model.fit(rows, gold, sample_weight=weight)

    def score(self, rows: np.ndarray) -> np.ndarray:
        if self.model is None or not len(rows):
            return np.zeros(len(rows))
        return self.model.decision_function(rows)


def balanced(gold: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Weights that give gold and other rows the same total, so that a score of 0 favours neither."""
    weight = np.ones(len(gold)) if weight is None else weight.astype(np.float64)
    for side in (gold, ~gold):
        if side.any():
            weight[side] *= len(gold) / 2 / weight[side].sum()
    return weight
