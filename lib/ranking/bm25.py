"""BM25 of prompts and candidates: how well the words match, without a model.

The index is that of the library bm25s (Lù, 2024), in the variant of Lucene. Frequencies of words are counted over all given
candidates; rewards are not used.
"""

import itertools
from typing import Any

import numpy as np
from scipy import sparse

from lib.ranking.words import words_of

POOLS = 1024  # scored at a time


def bm25_scores(prompts: list[str], texts: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(N, K) scores of the (N, K) texts of N pools; 0 where there is no candidate."""
    import bm25s

    scores = np.zeros(present.shape)
    options: Any = {"stopwords": None, "show_progress": False, "token_pattern": r"\S+"}
    spaced = [[" ".join(words_of(text)) for text in some] for some in (texts[present].tolist(), prompts)]
    documents, queries = (bm25s.tokenize(some, **options) for some in spaced)
    if not any(documents.ids):  # no candidate has a word, and the library refuses an empty index
        return scores
    index = bm25s.BM25(backend="numpy")
    index.index(documents, show_progress=False)
    stored: Any = index.scores
    vocabulary = len(stored["indptr"]) - 1
    matrix = sparse.csc_matrix(
        (stored["data"], stored["indices"], stored["indptr"]), shape=(int(present.sum()), vocabulary)
    ).tocsr()  # (candidates, words)
    asked = _counts(queries, documents.vocab, vocabulary)  # (N, words)
    pool = np.nonzero(present)[0]
    found = np.zeros(len(pool))
    ends = np.append(np.searchsorted(pool, np.arange(0, len(prompts), POOLS)), len(pool))
    for start, end in itertools.pairwise(ends):
        product = matrix[start:end].multiply(asked[pool[start:end]])
        found[start:end] = np.asarray(product.sum(1)).ravel()
    scores[present] = found
    return scores


def _counts(queries: Any, known: dict[str, int], vocabulary: int) -> sparse.csr_matrix:
    """(N, words) how often each prompt has each word of the candidates."""
    names = {number: known.get(word, -1) for word, number in queries.vocab.items()}
    rows = np.repeat(np.arange(len(queries.ids)), [len(ids) for ids in queries.ids])
    columns = np.array([names[i] for ids in queries.ids for i in ids], np.int64)
    kept = columns >= 0
    ones = np.ones(int(kept.sum()))
    return sparse.csr_matrix((ones, (rows[kept], columns[kept])), shape=(len(queries.ids), vocabulary))
