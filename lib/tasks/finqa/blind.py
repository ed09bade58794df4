"""Scorers that never see the question: how likely a program is to be a gold one, alone or within its pool.

The score is a log odds. Fillers drawn with weight exp(score) look to that scorer like gold ones: the score estimates
log p(program | gold) - log p(program | filler), as in density-ratio estimation by classification (Sugiyama, Suzuki
and Kanamori, 2012).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

WORD_COLUMNS = 2**15

Sparse = Any  # a scipy.sparse.csr_matrix, of which type checkers know little


def hashed_words(words: Sequence[str]) -> Sparse:
    """(N, WORD_COLUMNS) of single words and pairs of neighbours, each row of length 1."""
    vectoriser = HashingVectorizer(
        n_features=WORD_COLUMNS, token_pattern=r"\S+", lowercase=False, ngram_range=(1, 2), binary=True,
        alternate_sign=False,
    )  # fmt: skip
    return vectoriser.transform(words).astype(np.float32)


class Words:
    """Logistic regression on hashed words. With programs of one kind only it says nothing."""

    def __init__(self, words: Sparse, gold: np.ndarray, weight: np.ndarray):
        self.model = None
        if gold.any() and not gold.all():
            self.model = LogisticRegression(C=0.3, max_iter=60, tol=1e-3)
            self.model.fit(words, gold, sample_weight=weight)

    def score(self, words: Sparse) -> np.ndarray:
        return np.zeros(words.shape[0]) if self.model is None else self.model.decision_function(words)


class Trees:
    """Gradient-boosted trees on columns of numbers. With programs of one kind only they say nothing."""

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
    """Weights that give gold and other rows half each, so that a score of 0 says nothing."""
    weight = np.ones(len(gold)) if weight is None else weight.astype(np.float64)
    for side in (gold, ~gold):
        if side.any():
            weight[side] *= len(gold) / 2 / weight[side].sum()
    return weight
