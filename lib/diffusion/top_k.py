"""Select the k positions with the lowest scores in each row. numpy only. B rows, T positions."""

import numpy as np


def lowest_k(scores: np.ndarray, eligible: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, T) bool: the `counts[b]` eligible positions of row b that have the lowest scores (without ties)."""
    limit = kth_lowest(np.where(eligible, scores, np.inf), counts)
    return (scores <= limit) & eligible & (counts > 0)[:, None]


def kth_lowest(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, 1) the score of rank `counts[b]`, counted from 1, in each row."""
    return np.take_along_axis(np.sort(scores, axis=1), np.maximum(counts - 1, 0)[:, None], axis=1)
