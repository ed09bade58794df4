"""Which tokens are masked: keyed rows and exact counts, without a loop over rows or tokens.

`random` masks uniformly. `span` masks a given number of runs. `sticky` grows runs, see lib/diffusion/sticky.py. `line`
masks whole lines, and so meets the count only as nearly as whole lines allow.

Row b of a mask is a function of the key and `rows[b]`: neither the other rows nor the width of the padding
matters. Works on numpy arrays; knows no tokens, so the caller says where lines end. Legend: B rows, T positions,
L lines of the row that has most.
"""

import numpy as np

from lib import randomness
from lib.diffusion.sticky import sticky_mask
from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig
from lib.sections.masking import LineMasking, Masking, RandomMasking, SpanMasking, StickyMasking

_LINE_ORDERS = 8  # orders of a row's lines that are tried until one comes near enough
_NEAR_ENOUGH = 0.01  # of the row's tokens


def masked_counts(ratios: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) numbers of tokens to mask: the nearest to ratio x length, at least 1 where there is a token."""
    return np.clip(np.rint(ratios * lengths), np.minimum(1, lengths), lengths).astype(np.int64)


def draw_mask(
    masking: Masking,
    eligible: np.ndarray,
    counts: np.ndarray,
    draw_key: int,
    rows: np.ndarray,
    lines: np.ndarray | None = None,
) -> np.ndarray:
    """(B, T) bool with exactly `counts[b]` true per row (`line`: nearly), all of them where `eligible` is.

    Args:
        eligible: (B, T) bool, tokens that may be masked (not padding, not given).
        counts: (B,) at most the eligible tokens of the row.
        draw_key, rows: row b's mask is a function of `draw_key` and `rows[b]` only.
        lines: (B, T) the number of each token's line, see `line_numbers`; for `line` masking only.
    """
    if (counts > eligible.sum(1)).any():
        raise ValueError("a row is to have more masks than it has eligible tokens")
    match masking:
        case RandomMasking():
            return lowest_k(randomness.uniform(draw_key, rows, eligible.shape[1]), eligible, counts)
        case StickyMasking():
            return sticky_mask(masking.p1, masking.p2, eligible, counts, draw_key, rows)
        case SpanMasking():
            return _spans(masking.num_spans, eligible, counts, draw_key, rows)
        case LineMasking():
            if lines is None:
                raise BadConfig("masking of type line needs to know where lines end, which is not known here")
            return _whole_lines(masking, eligible, counts, draw_key, rows, lines)


def _spans(num_spans, eligible, counts, draw_key, rows) -> np.ndarray:
    """Spans of random lengths at random places, with unmasked tokens between them.

    All ways to cut the count into so many lengths are equally likely, and so are all ways to place them. There
    are fewer spans where fewer tokens are masked, or where too few stay unmasked to hold them apart.
    """
    columns = eligible.shape[1]
    place = np.arange(columns)
    free = eligible.sum(1) - counts
    spans = np.minimum(np.minimum(num_spans, counts), free + 1)  # (B,)
    lengths_key, places_key = (randomness.key(draw_key, f"span {what}") for what in ("lengths", "places"))
    # Of the masked tokens, counted along the row, which begin a span: the first, and others at random.
    begins = lowest_k(
        randomness.uniform(lengths_key, rows, columns),
        (place > 0) & (place < counts[:, None]),
        np.maximum(spans - 1, 0),
    )
    # A span goes before the first unmasked token, behind the first, ...; no two to the same place.
    slots = lowest_k(
        randomness.uniform(places_key, rows, columns + 1),
        np.arange(columns + 1) <= free[:, None],
        spans,
    )
    slot = np.nonzero(slots)[1]  # every row's slots in order, row after row
    inside = place < counts[:, None]
    span = np.cumsum(begins, axis=1) + (np.cumsum(spans) - spans)[:, None]  # index into slot
    row, number = np.nonzero(inside)
    mask = np.zeros_like(eligible)
    mask[row, number + slot[span[inside]]] = True  # places among the eligible tokens
    if (eligible[:, 1:] <= eligible[:, :-1]).all():  # they come first in every row: nothing to move
        return mask
    return np.take_along_axis(mask, np.maximum(np.cumsum(eligible, axis=1) - 1, 0), axis=1) & eligible


def line_numbers(ends: np.ndarray) -> np.ndarray:
    """(B, T) number of each token's line, from 0, where `ends` marks the last token of each line (the newline)."""
    return np.cumsum(ends, axis=1) - ends


def _whole_lines(masking: LineMasking, eligible, counts, draw_key, rows, lines) -> np.ndarray:
    """Lines in random order until the count is met as nearly as they allow within the two ratios.

    A line counts with its eligible tokens. Where one order misses the count by more than 1 % of the row, or the
    ratios, others are tried and the nearest is kept. A row all of whose lines are too long has one masked anyway.
    """
    if lines.shape != eligible.shape or lines.min(initial=0) < 0 or lines.max(initial=0) >= lines.shape[1]:
        raise ValueError(f"lines must number the lines of {eligible.shape} tokens from 0 in each row")
    most = int(lines.max(initial=0)) + 1
    batch = np.arange(len(lines))[:, None]
    sizes = np.bincount((batch * most + lines)[eligible], minlength=len(lines) * most).reshape(-1, most)
    total = eligible.sum(1)
    low = np.ceil(masking.min_ratio * total - 1e-9).astype(np.int64)
    high = np.maximum(np.floor(masking.max_ratio * total + 1e-9).astype(np.int64), low)
    wanted = np.clip(counts, low, high)
    chosen = np.zeros(sizes.shape, bool)  # (B, L)
    miss = np.full(len(lines), np.iinfo(np.int64).max)
    todo = np.arange(len(lines))
    for number in range(_LINE_ORDERS):
        noise = randomness.uniform(
            randomness.key(draw_key, "line order", number), np.asarray(rows)[todo], most
        )
        order = np.argsort(noise, axis=1)
        taken = _fill(np.take_along_axis(sizes[todo], order, axis=1), wanted[todo], low[todo], high[todo])
        back = np.zeros_like(taken)
        np.put_along_axis(back, order, taken, axis=1)
        got = (sizes[todo] * back).sum(1)
        outside = (got < low[todo]) | (got > high[todo])
        off = np.abs(got - wanted[todo]) + total[todo] * outside
        better = off < miss[todo]
        chosen[todo[better]], miss[todo[better]] = back[better], off[better]
        todo = todo[off > _NEAR_ENOUGH * total[todo]]
        if not len(todo):
            break
    return chosen[batch, lines] & eligible


def _fill(sizes: np.ndarray, wanted: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(R, L) bool: sizes taken in their order, without those that would pass what is wanted; then one more if
    that comes nearer, or reaches `low`, and stays within `high`."""
    taken, room = np.zeros(sizes.shape, bool), wanted.copy()
    while True:  # each pass goes up to the first size that no longer fits, and the next one on behind it
        fits = ~taken & (sizes > 0) & (sizes <= room[:, None])
        fits &= np.cumsum(sizes * fits, axis=1) <= room[:, None]
        if not fits.any():
            break
        taken |= fits
        room -= (sizes * fits).sum(1)
    got = wanted - room
    may = ~taken & (sizes > 0) & ((got[:, None] + sizes <= high[:, None]) | (got == 0)[:, None])
    off = np.where(may, np.abs(sizes - room[:, None]), np.iinfo(np.int64).max)
    best = np.argmin(off, axis=1)[:, None]
    off = np.take_along_axis(off, best, axis=1)[:, 0]
    more = (wanted > 0) & ((off < room) | (got < low) | (got == 0))
    more &= np.take_along_axis(may, best, axis=1)[:, 0]
    np.put_along_axis(taken, best, np.take_along_axis(taken, best, axis=1) | more[:, None], axis=1)
    return taken


def corrupt_80_10_10(
    ids: np.ndarray,
    masked: np.ndarray,
    mask_id: int,
    allowed_ids: np.ndarray,
    seed: int,
    purpose: str,
    rows: np.ndarray,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> np.ndarray:
    """(B, T) inputs: of the masked positions 80 % hold [MASK], 10 % a random id, 10 % stay (BERT, Devlin et al.,
    2019).

    Every position draws its fate and its replacement on its own. A replacement may happen to be the token that
    was there. The targets are `ids` at all of `masked`, those that stay included.

    Args:
        ids: (B, T) clean tokens.
        allowed_ids: (N,) ids that a replacement may be: no special tokens.
        seed, purpose, rows: the draw's key; row b depends on `rows[b]` alone.
    """
    if min(mask_share, random_share) < 0 or mask_share + random_share > 1 + 1e-9:
        raise ValueError(
            f"mask_share {mask_share} and random_share {random_share} must be shares of one whole"
        )
    allowed_ids = np.asarray(allowed_ids)
    if random_share > 0 and not len(allowed_ids):
        raise ValueError("random replacements need at least one allowed id")
    fate = randomness.uniform(randomness.key(seed, purpose + " fate"), rows, ids.shape[1])
    inputs = np.where(masked & (fate < mask_share), mask_id, ids).astype(ids.dtype)
    swapped = masked & (fate >= mask_share) & (fate < mask_share + random_share)
    noise = randomness.uniform(randomness.key(seed, purpose + " id"), rows, ids.shape[1])[swapped]
    inputs[swapped] = allowed_ids[np.floor(noise * len(allowed_ids)).astype(np.int64)]
    return inputs


def mean_run_length(masked: np.ndarray, valid: np.ndarray) -> float:
    """Masked tokens per run of neighbouring masks, over all rows; tokens that are not valid end a run.

    1 / (1 - ratio) for long rows of independent masks, more for sticky ones; 0 without masks.
    """
    masked = masked & valid
    starts = masked.copy()
    starts[:, 1:] &= ~masked[:, :-1]
    return float(masked.sum() / max(starts.sum(), 1))


def expected_run_length(masking: Masking, ratio: float, length: int = 1024, num_rows: int = 64) -> float:
    """How sticky a setting is: the mean run length of `num_rows` drawn rows with that share masked.

    To be compared with `expected_run_length(RandomMasking(type="random"), ratio, length)`, about 1 / (1 - ratio).
    """
    valid = np.ones((num_rows, length), bool)
    counts = masked_counts(np.full(num_rows, ratio), valid.sum(1))
    masked = draw_mask(masking, valid, counts, randomness.key(0, "expected run length"), np.arange(num_rows))
    return mean_run_length(masked, valid)
