"""Which tokens are masked: exact counts, one row per sequence, no loop over rows or tokens.

`random` masks uniformly; `sticky` grows runs: in every round an unmasked token is masked with chance p2 when a
direct neighbour is masked and p1 otherwise, until the row has its count. What a last round masks too much is
given back at the ends of runs, never inside them, so that the runs stay whole.

Works on numpy arrays and keyed noise; knows no tokens. Legend: B rows, T positions.
"""

import numpy as np

from lib import randomness
from lib.config import Masking, StickyMasking


def masked_counts(ratios: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) numbers of tokens to mask: the nearest to ratio x length, at least 1 where there is a token."""
    return np.clip(np.rint(ratios * lengths), np.minimum(1, lengths), lengths).astype(np.int64)


def draw_mask(
    masking: Masking, eligible: np.ndarray, counts: np.ndarray, draw_key: int, rows: np.ndarray
) -> np.ndarray:
    """(B, T) bool with exactly `counts[b]` true per row, all of them where `eligible` is.

    Args:
        eligible: (B, T) bool, tokens that may be masked (not padding, not given).
        counts: (B,) at most the eligible tokens of the row.
        draw_key, rows: row b's mask is a function of `draw_key` and `rows[b]` only.
    """
    if (counts > eligible.sum(1)).any():
        raise ValueError("a row is to have more masks than it has eligible tokens")
    if isinstance(masking, StickyMasking):
        return _sticky(masking.p1, masking.p2, eligible, counts, draw_key, rows)
    return lowest(randomness.uniform(draw_key, rows, eligible.shape[1]), eligible, counts)


def lowest(scores: np.ndarray, eligible: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, T) bool: the `counts[b]` eligible positions of lowest score in each row (scores without ties)."""
    scores = np.where(eligible, scores, np.inf)
    ordered = np.sort(scores, axis=1)
    limit = np.take_along_axis(ordered, np.maximum(counts - 1, 0)[:, None], axis=1)  # (B, 1)
    return (scores <= limit) & eligible & (counts > 0)[:, None]


def _sticky(p1, p2, eligible, counts, draw_key, rows) -> np.ndarray:
    columns = eligible.shape[1]
    mask = np.zeros_like(eligible)
    number = 0
    while True:
        short = mask.sum(1) < counts
        if not short.any():
            return mask
        beside = _beside(mask)
        open_ = eligible & ~mask & short[:, None]
        chance = np.where(beside, p2, p1) * open_
        jammed = short & (chance.max(1) == 0)  # p1 = 0 and nothing masked yet, or p2 = 0 and no room left
        noise = randomness.uniform(draw_key + number, rows, columns)
        if jammed.any():
            mask |= lowest(noise, open_, np.where(jammed, counts - mask.sum(1), 0)) & jammed[:, None]
        new = noise < chance
        mask |= new
        # Noise already used to be below its chance is uniform below it: rescaled, it picks whom to give back.
        order = np.divide(noise, chance, out=np.ones_like(noise), where=chance > 0)
        mask = _give_back(mask, new, np.maximum(mask.sum(1) - counts, 0), order)
        number += 1


def _give_back(mask, new, excess, order) -> np.ndarray:
    """Unmask `excess[b]` of this round's tokens, from the ends of runs inwards."""
    while excess.any():
        ends = new & mask & ~_inside(mask)
        give = np.minimum(excess, ends.sum(1))
        stuck = (excess > 0) & (give == 0)  # only inner tokens are new: take those rather than older ones
        chosen = lowest(order, np.where(stuck[:, None], new & mask, ends), np.where(stuck, excess, give))
        mask = mask & ~chosen
        excess = excess - chosen.sum(1)
    return mask


def _beside(mask: np.ndarray) -> np.ndarray:
    """Positions with a masked direct neighbour."""
    beside = np.zeros_like(mask)
    beside[:, 1:] |= mask[:, :-1]
    beside[:, :-1] |= mask[:, 1:]
    return beside


def _inside(mask: np.ndarray) -> np.ndarray:
    """Positions whose two neighbours are masked; the border of the row counts as masked."""
    inside = np.ones_like(mask)
    inside[:, 1:] &= mask[:, :-1]
    inside[:, :-1] &= mask[:, 1:]
    return inside


def mean_run_length(mask: np.ndarray) -> float:
    """Masked tokens per run of neighbouring masks: 1 / (1 - ratio) for independent masks, more for sticky."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    return float(mask.sum() / max(starts.sum(), 1))
