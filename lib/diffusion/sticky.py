"""`sticky` masks: runs that grow round by round.

In every round, an unmasked token is masked with probability p2 if a direct neighbour is masked, and with p1 otherwise. This goes
on until the row has its count.

Simulating the rounds would need a draw per token and round. But the probabilities are constant, so waiting times are geometric
and have no memory. A token without a masked neighbour waits a geometric time of p1. From the round in which a neighbour is
masked, it waits a geometric time of p2, however long it has waited before. So two draws per token give the round in which it is
masked. The row then keeps the first `count` tokens.

Legend: B rows, T positions, N tokens of the last round.
"""

import numpy as np

from lib import randomness
from lib.diffusion.top_k import kth_lowest

_NEVER = 2.0**28  # rounds: far more than growth needs; sums of it over a row are exact in float64
_WALL = 2.0**34  # rounds to cross a token that may not be masked
_NEAR_ZERO = 1e-7  # a smaller p1 has no effect before round _NEVER
_SPLITMIX = np.uint64(0xBF58476D1CE4E5B9)  # a multiplier of splitmix64, to mix bits
_BLOCK = 1 << 13  # tokens whose masks are drawn at once, so that the arrays stay in the cache


def sticky_mask(
    p1: float, p2: float, eligible: np.ndarray, counts: np.ndarray, draw_key: int, rows: np.ndarray
) -> np.ndarray:
    """(B, T) bool with exactly `counts[b]` true per row; see `lib.diffusion.masking.draw_mask` for the arguments."""
    at_once = max(1, _BLOCK // max(1, eligible.shape[1]))
    mask = np.empty_like(eligible)
    for block in (slice(i, i + at_once) for i in range(0, len(mask), at_once)):
        mask[block] = _block(p1, p2, eligible[block], counts[block], draw_key, rows[block])
    return mask


def _block(p1, p2, eligible, counts, draw_key, rows) -> np.ndarray:
    # 1. Two waiting times per token: without a masked neighbour, and beside one
    columns = eligible.shape[1]
    noise = randomness.bits(draw_key, rows, columns)
    alone, beside = noise >> np.uint64(32), noise & np.uint64(0xFFFFFFFF)
    # 2. The round in which each token would be masked
    if p2 < p1:
        rounds = _rounds_of_repelling(_waits(alone, p1), _waits(beside, p2), eligible)
    else:
        # Beside a mask, a token is masked by p1 or by the neighbour; together their probability is p2.
        push = (p2 - p1) / (1 - p1) if p1 < 1 else 0.0
        steps = _finite(_waits(beside, push), eligible)
        if p1 < _NEAR_ZERO:
            rounds = _rounds_from_seeds(alone.astype(np.int64), steps, eligible)
        else:
            rounds = _spread(_finite(_waits(alone, p1), eligible), steps)
            rounds[~eligible] = np.inf
    # 3. The round in which the count is reached, and the mask after it
    last = kth_lowest(rounds, counts)  # (B, 1)
    if np.isinf(last).any():
        # With p2 = 0, growth ends at about 45 % masked. The rest follows in random order, as for a p2 just above 0.
        rounds = np.where(np.isinf(rounds) & eligible, _WALL + beside, rounds)
        last = kth_lowest(rounds, counts)
    mask = (rounds <= last) & eligible & (counts > 0)[:, None]
    # 4. Tokens of the last round that exceed the count are unmasked again
    excess = mask.sum(1) - counts
    if excess.any():
        mask &= ~_excess_tokens(mask, mask & (rounds == last), excess, noise)
    return mask


def _waits(noise: np.ndarray, chance: float) -> np.ndarray:
    """Geometric waiting times in rounds, at least 1, from 32 random bits each; inf if the probability is 0."""
    if chance <= 0:
        return np.full(noise.shape, np.inf)
    if chance >= 1:
        return np.ones(noise.shape)
    waits = noise * 2.0**-32
    waits += 2.0**-33  # in (0, 1)
    np.log(waits, out=waits)
    waits *= 1 / np.log1p(-chance)
    return np.ceil(waits, out=waits)


def _finite(waits: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """The waits, in place: at most _NEVER, and _WALL for tokens that may not be masked."""
    np.minimum(waits, _NEVER, out=waits)
    waits[~eligible] = _WALL
    return waits


def _spread(starts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Earliest arrival: token i at the minimum over j of starts[j] + the steps from j to i (i's included, j's not).

    On a line, the shortest path comes straight from the left or from the right. From the left its length is
    sum(i) + min over j <= i of (starts[j] - sum(j)), where sum(i) adds the steps up to i. That is a cumulative minimum.
    """
    sums = np.cumsum(steps, axis=1)
    left = starts - sums
    np.fmin.accumulate(left, axis=1, out=left)  # equals np.minimum without NaN, and is faster
    left += sums
    sums -= steps  # from the right: the steps from i to j - 1 are now sums(j) - sums(i)
    right = starts + sums
    np.fmin.accumulate(right[:, ::-1], axis=1, out=right[:, ::-1])
    right -= sums
    return np.minimum(left, right, out=left)


def _rounds_from_seeds(noise: np.ndarray, steps: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Rounds for p1 = 0, as the limit of a small p1; with exactly 0 no run would begin.

    One random token is masked and its run grows. Tokens that may not be masked bound it. If the count is not reached by
    then, the next run begins in another stretch.
    """
    # The token with the lowest noise of each stretch is the seed: cumulative minima that restart after each wall.
    wall = (~eligible).astype(np.int64) << 33
    before = np.cumsum(wall, axis=1)
    after = before[:, -1:] - before + wall
    noise = np.where(eligible, noise, 1 << 32)
    lowest_here = np.minimum(
        np.minimum.accumulate(noise - before, axis=1) + before,
        np.minimum.accumulate((noise - after)[:, ::-1], axis=1)[:, ::-1] + after,
    )
    rounds = _spread(np.where((noise == lowest_here) & eligible, 1.0, _WALL), steps)
    longest = np.where(eligible, rounds, 0).max(axis=1, keepdims=True)
    return np.where(eligible, rounds + (lowest_here >> 8) * (longest + 1), np.inf)


def _rounds_of_repelling(alone: np.ndarray, beside: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Rounds for p2 < p1, where a masked neighbour delays a token.

    A token's round depends only on neighbours with earlier rounds. So fixed-point iteration settles the rounds in the order
    of time. Such chains are short, and only tokens beside a changed one are computed again.
    """
    may = _flat(eligible, False)  # float32 is faster, and exact up to 16 million rounds
    alone = _flat(np.where(eligible, alone, np.inf).astype(np.float32), np.inf)
    beside = _flat(beside.astype(np.float32), np.inf)
    rounds = alone.copy()
    again = may.copy()
    again[1:-1] &= np.minimum(alone[:-2], alone[2:]) < alone[1:-1]  # nothing delays the others
    while True:
        index = np.flatnonzero(again)
        if not len(index):
            return rounds.reshape(len(eligible), -1)[:, 1:-1]
        undelayed, neighbour = alone[index], np.minimum(rounds[index - 1], rounds[index + 1])
        new = np.where(undelayed <= neighbour, undelayed, neighbour + beside[index])
        changed = index[new != rounds[index]]
        rounds[index] = new
        again[:] = False
        again[changed - 1] = again[changed + 1] = True
        again &= may


def _excess_tokens(mask, new, excess, noise) -> np.ndarray:
    """(B, T) bool: `excess[b]` of the last round's tokens, from the ends of runs inward, in random order per layer.

    If these are too few, tokens follow with which the last round joined two runs. Tokens of earlier rounds are never chosen.
    """
    masked = _flat(mask, False)
    position = np.flatnonzero(_flat(new, False))  # (N,) flat positions of the last round's tokens
    # Adjacent ones form stretches. Each lies at the end of a run, between two runs, or is a run.
    begins = np.flatnonzero(np.diff(position, prepend=-1) != 1)
    lengths = np.diff(begins, append=len(position))
    first = position[begins]
    last = first + lengths - 1
    far = mask.shape[1] + 1
    left = position - np.repeat(first - np.where(masked[first - 1], far, 0), lengths)
    right = np.repeat(last + np.where(masked[last + 1], far, 0), lengths) - position
    # The waits have used the leading bits of both halves. The leading bits of a product depend on all bits.
    order = ((noise[new] * _SPLITMIX) >> np.uint64(11)) * 2.0**-53
    scores = np.full(mask.shape, np.inf)
    scores[new] = np.minimum(np.minimum(left, right), far) + order
    return (scores <= kth_lowest(scores, excess)) & (excess > 0)[:, None]


def _flat(array: np.ndarray, outside) -> np.ndarray:
    """All rows in one flat array, with `outside` at both ends of each row, so that rows are not adjacent."""
    wide = np.full((len(array), array.shape[1] + 2), outside, array.dtype)
    wide[:, 1:-1] = array
    return wide.reshape(-1)
