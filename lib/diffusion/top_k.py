"""Choosing so many positions of each row by a score. numpy only."""

import numpy as np


def lowest_k(scores: np.ndarray, eligible: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, T) bool: the `counts[b]` eligible positions of lowest score in each row (scores without ties)."""
    limit = kth_lowest(np.where(eligible, scores, np.inf), counts)
    return (scores <= limit) & eligible & (counts > 0)[:, None]


def kth_lowest(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, 1) the score of rank `counts[b]`, counted from 1, in each row."""
    return np.take_along_axis(np.sort(scores, axis=1), np.maximum(counts - 1, 0)[:, None], axis=1)
