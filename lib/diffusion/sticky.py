"""Masks of runs that grow, `sticky`: in every round an unmasked token is masked with chance p2 when a direct neighbour was
masked before and p1 otherwise, until the row has its count.

Playing the rounds costs a draw per token and round. But chances that stay the same from round to round have no memory: a
token far from any mask waits a geometric time G1 of chance p1, and whatever it has waited by then, from the round in which
a neighbour is masked it waits a geometric time of chance p2. Two draws per token say in which round each would be masked;
then the row is cut at the wanted count.

Legend: B rows, T positions.
"""

import numpy as np

from lib import randomness
from lib.diffusion.top_k import kth_lowest

_NEVER = 2.0**28  # rounds: far more than growth ever takes; sums of it over a row stay exact in float64
_WALL = 2.0**34  # rounds to cross a token that may not be masked
_RARE = 1e-7  # a smaller p1 cannot be told from 0 before _NEVER
_ODD = np.uint64(0xBF58476D1CE4E5B9)  # a multiplier of splitmix64, to mix bits with
_BLOCK = 1 << 13  # tokens whose masks are drawn at once: what the arrays of a round need stays in the cache


def sticky_mask(
    p1: float, p2: float, eligible: np.ndarray, counts: np.ndarray, draw_key: int, rows: np.ndarray
) -> np.ndarray:
    """(B, T) bool with exactly `counts[b]` true per row; arguments as of `lib.diffusion.masking.draw_mask`."""
    at_once = max(1, _BLOCK // max(1, eligible.shape[1]))
    mask = np.empty_like(eligible)
    for block in (slice(i, i + at_once) for i in range(0, len(mask), at_once)):
        mask[block] = _block(p1, p2, eligible[block], counts[block], draw_key, rows[block])
    return mask


def _block(p1, p2, eligible, counts, draw_key, rows) -> np.ndarray:
    columns = eligible.shape[1]
    noise = randomness.bits(draw_key, rows, columns)
    alone, beside = noise >> np.uint64(32), noise & np.uint64(0xFFFFFFFF)
    if p2 < p1:
        rounds = _rounds_of_shy(_waits(alone, p1), _waits(beside, p2), eligible)
    else:
        # Beside a mask a token waits for p1 or for the neighbour's push; together they come with chance p2.
        push = (p2 - p1) / (1 - p1) if p1 < 1 else 0.0
        steps = _finite(_waits(beside, push), eligible)
        if p1 < _RARE:
            rounds = _rounds_from_seeds(alone.astype(np.int64), steps, eligible)
        else:
            rounds = _spread(_finite(_waits(alone, p1), eligible), steps)
            rounds[~eligible] = np.inf
    last = kth_lowest(rounds, counts)  # (B, 1) the round in which the count is reached
    if np.isinf(last).any():
        # p2 = 0 jams at about 45 % masked. What is left follows in random order, as it does for p2 just above 0.
        rounds = np.where(np.isinf(rounds) & eligible, _WALL + beside, rounds)
        last = kth_lowest(rounds, counts)
    mask = (rounds <= last) & eligible & (counts > 0)[:, None]
    excess = mask.sum(1) - counts
    if excess.any():
        mask &= ~_given_back(mask, mask & (rounds == last), excess, noise)
    return mask


def _waits(noise: np.ndarray, chance: float) -> np.ndarray:
    """Geometric waiting times in rounds, at least 1, from 32 random bits each; inf where the chance is 0."""
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
    """The waits, changed in place: at most _NEVER, and _WALL for tokens that may not be masked."""
    np.minimum(waits, _NEVER, out=waits)
    waits[~eligible] = _WALL
    return waits


def _spread(starts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Earliest arrival: token i at min over j of starts[j] + the steps from j to i (i's included, j's not).

    On a line the best way comes straight from the left or from the right. From the left it takes
    sum(i) + min over j <= i of (starts[j] - sum(j)), where sum(i) adds the steps up to i: a running minimum.
    """
    sums = np.cumsum(steps, axis=1)
    left = starts - sums
    np.fmin.accumulate(left, axis=1, out=left)  # as np.minimum without NaN, in two thirds of its time
    left += sums
    sums -= steps  # from the right: the steps from i to j - 1 are sums(j) - sums(i) now
    right = starts + sums
    np.fmin.accumulate(right[:, ::-1], axis=1, out=right[:, ::-1])
    right -= sums
    return np.minimum(left, right, out=left)


def _rounds_from_seeds(noise: np.ndarray, steps: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Rounds for p1 = 0, where nothing would ever begin, as the limit of a small p1.

    One random token is masked and its run grows; where it meets tokens that may not be masked, and the count is
    not reached, the next run begins in another stretch.
    """
    # The lowest noise of each stretch, whose token is the seed: running minima that begin anew behind each wall.
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


def _rounds_of_shy(alone: np.ndarray, beside: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Rounds for p2 < p1, where masked neighbours hold a token back.

    A token's round follows from neighbours with earlier ones, so replacing guesses by what follows from them
    settles them in the order of time. Such chains are short, and only tokens beside a new guess are looked at
    again.
    """
    may = _flat(eligible, False)  # float32 is quicker, and exact up to 16 million rounds
    alone = _flat(np.where(eligible, alone, np.inf).astype(np.float32), np.inf)
    beside = _flat(beside.astype(np.float32), np.inf)
    rounds = alone.copy()
    again = may.copy()
    again[1:-1] &= np.minimum(alone[:-2], alone[2:]) < alone[1:-1]  # nothing holds the others back
    while True:
        at = np.flatnonzero(again)
        if not len(at):
            return rounds.reshape(len(eligible), -1)[:, 1:-1]
        own, neighbour = alone[at], np.minimum(rounds[at - 1], rounds[at + 1])
        new = np.where(own <= neighbour, own, neighbour + beside[at])
        changed = at[new != rounds[at]]
        rounds[at] = new
        again[:] = False
        again[changed - 1] = again[changed + 1] = True
        again &= may


def _given_back(mask, new, excess, noise) -> np.ndarray:
    """`excess[b]` of the last round's tokens: layer by layer from the ends of runs, each layer in random order.

    Where that is not enough, tokens with which the last round joined two runs; never tokens of earlier rounds.
    """
    masked = _flat(mask, False)
    place = np.flatnonzero(_flat(new, False))  # (N,) the last round's tokens
    begins = np.flatnonzero(np.diff(place, prepend=-1) != 1)
    # Neighbouring ones form stretches, each at the end of a run, between two runs, or a run of its own.
    lengths = np.diff(begins, append=len(place))
    first = place[begins]
    last = first + lengths - 1
    far = mask.shape[1] + 1
    left = place - np.repeat(first - np.where(masked[first - 1], far, 0), lengths)
    right = np.repeat(last + np.where(masked[last + 1], far, 0), lengths) - place
    # The waits have used the leading bits of the halves; a product's leading bits depend on all the others too.
    order = ((noise[new] * _ODD) >> np.uint64(11)) * 2.0**-53
    scores = np.full(mask.shape, np.inf)
    scores[new] = np.minimum(np.minimum(left, right), far) + order
    return (scores <= kth_lowest(scores, excess)) & (excess > 0)[:, None]


def _flat(array: np.ndarray, outside) -> np.ndarray:
    """Row after row, with `outside` at both ends of each: neighbours are one place away, rows never touch."""
    wide = np.full((len(array), array.shape[1] + 2), outside, array.dtype)
    wide[:, 1:-1] = array
    return wide.reshape(-1)
