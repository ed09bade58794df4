"""Properties of samples that likelihood does not show: repetition, distance from real text, copying.

All functions take arrays of token ids.

Legend: B texts, T positions, n length of the n-grams.
"""

import numpy as np

LONGEST_NGRAM = 4  # longest n-gram of the divergence


def repeated(code: np.ndarray, n: int) -> float:
    """Share of a text's n-grams that occurred earlier in it."""
    if len(code) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(code, n)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def divergence(ids: np.ndarray, real: np.ndarray) -> float:
    """Jensen-Shannon divergence of the pooled n-grams in nats; mean over n = 1..LONGEST_NGRAM."""
    values = []
    for n in range(1, LONGEST_NGRAM + 1):
        grams = [np.lib.stride_tricks.sliding_window_view(a, n, axis=1).reshape(-1, n) for a in (ids, real)]
        _, kind = np.unique(np.concatenate(grams), axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        size, first = kind.max() + 1, len(grams[0])
        shares = [np.bincount(k, minlength=size) / len(k) for k in (kind[:first], kind[first:])]
        mean = (shares[0] + shares[1]) / 2
        parts = [(s[s > 0] * np.log(s[s > 0] / mean[s > 0])).sum() for s in shares]
        values.append(sum(parts) / 2)
    return float(np.mean(values))


def longest_copy(ids: np.ndarray, train: np.ndarray) -> int:
    """Length in tokens of the longest part of any sample that occurs in the training text; bisects over the length."""
    low, high = 0, min(ids.shape[1], len(train))
    texts, known = ids.astype(np.uint64), train[None].astype(np.uint64)
    while low < high:
        length = (low + high + 1) // 2
        stretches, there = _hashes(texts, length), np.sort(_hashes(known, length))
        index = np.minimum(np.searchsorted(there, stretches), len(there) - 1)
        if (there[index] == stretches).any():
            low = length
        else:
            high = length - 1
    return low


def _hashes(rows: np.ndarray, length: int) -> np.ndarray:
    """Hash of every run of `length` tokens. The hash of 2^k tokens combines those of its halves."""
    result, covered = np.zeros(rows.shape, np.uint64), 0
    power, block = np.uint64(0x9E3779B97F4A7C15), (rows + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
    size, last = 1, rows.shape[1] - length + 1
    while covered < length:
        if length & size:
            result = result[:, :last] * power + block[:, covered : covered + last]
            covered += size
        step = block[:, :-size] * power
        block = (step ^ (step >> np.uint64(29))) + block[:, size:] * np.uint64(0xBF58476D1CE4E5B9)
        size *= 2
    return result[:, :last].reshape(-1)
