"""Masks with keyed rows and exact counts, without a loop over rows or tokens.

- `random` masks tokens uniformly.
- `span` masks a given number of runs.
- `sticky` grows runs; see lib/diffusion/sticky.py.
- `line` masks whole lines, so it meets the count only as closely as whole lines allow.

Row b of a mask is a function of the key and `rows[b]`. It does not depend on the other rows or on the padding. Works on numpy
arrays; the caller says where lines end. Legend: B rows, T positions, L lines of the row that has most.
"""

from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.diffusion.sticky import sticky_mask
from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig
from lib.sections.masking import LineMasking, Masking, RandomMasking, SpanMasking, StickyMasking

_LINE_ORDERS = 8  # random orders of a row's lines that are tried at most
_TOLERANCE = 0.01  # of the count, as a share of the row's tokens


@dataclass(frozen=True)
class BatchDraw:
    """Keys of a batch's random draws: row b's draws depend on `seed`, `purpose` and `rows[b]` alone.

    Attributes:
        rows: (B,) keys of the rows.
        period: rows per step, over which ratios are spread evenly; see `nelbo.stratified`.
    """

    seed: int
    purpose: str
    rows: np.ndarray
    period: int = 1

    def key(self, what: str) -> int:
        """The key of one draw."""
        return randomness.key(self.seed, f"{self.purpose} {what}")


def masked_counts(ratios: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) numbers of tokens to mask: ratio x length, rounded, and at least 1 in a row with tokens."""
    return np.clip(np.rint(ratios * lengths), np.minimum(1, lengths), lengths).astype(np.int64)


def draw_mask(
    masking: Masking,
    eligible: np.ndarray,
    counts: np.ndarray,
    draw_key: int,
    rows: np.ndarray,
    lines: np.ndarray | None = None,
) -> np.ndarray:
    """(B, T) bool with exactly `counts[b]` eligible tokens of row b masked; with `line`, approximately.

    Args:
        eligible: (B, T) bool, tokens that may be masked: neither padding nor conditioned on.
        counts: (B,) at most the eligible tokens of the row.
        draw_key, rows: row b's mask is a function of `draw_key` and `rows[b]` only.
        lines: (B, T) line number of each token, see `line_numbers`; for `line` masking only.

    Raises:
        ValueError: a count exceeds the row's eligible tokens.
        BadConfig: `line` masking without `lines`.
    """
    if (counts > eligible.sum(1)).any():
        raise ValueError("the mask count of a row exceeds its number of eligible tokens")
    match masking:
        case RandomMasking():
            return lowest_k(randomness.uniform(draw_key, rows, eligible.shape[1]), eligible, counts)
        case StickyMasking():
            return sticky_mask(masking.p1, masking.p2, eligible, counts, draw_key, rows)
        case SpanMasking():
            return _spans(masking.num_spans, eligible, counts, draw_key, rows)
        case LineMasking():
            if lines is None:
                raise BadConfig("masking of type line needs line numbers, and there are none here")
            return _whole_lines(masking, eligible, counts, draw_key, rows, lines)


def _spans(num_spans, eligible, counts, draw_key, rows) -> np.ndarray:
    """Spans of random lengths at random positions, with unmasked tokens between them.

    All partitions of the count into lengths are equally likely, and so are all positions of the spans. There are fewer
    spans where few tokens are masked, or where too few stay unmasked to separate them.
    """
    columns = eligible.shape[1]
    index = np.arange(columns)
    num_unmasked = eligible.sum(1) - counts
    spans = np.minimum(np.minimum(num_spans, counts), num_unmasked + 1)  # (B,)
    lengths_key, slots_key = (randomness.key(draw_key, f"span {what}") for what in ("lengths", "places"))
    # 1. Lengths: which of the masked tokens, counted along the row, begin a span: the first, and others at random
    is_masked = index < counts[:, None]  # (B, T) the first `counts` columns stand for the masked tokens
    begins = lowest_k(
        randomness.uniform(lengths_key, rows, columns), (index > 0) & is_masked, np.maximum(spans - 1, 0)
    )
    # 2. Slots: a span lies before the first unmasked token, after the first, ...; no two in the same slot
    in_slot = lowest_k(
        randomness.uniform(slots_key, rows, columns + 1),
        np.arange(columns + 1) <= num_unmasked[:, None],
        spans,
    )
    slot = np.nonzero(in_slot)[1]  # every row's slots in order, row after row
    # 3. A masked token's position is its number among the masked ones, plus the unmasked tokens before its slot
    span = np.cumsum(begins, axis=1) + (np.cumsum(spans) - spans)[:, None]  # index into slot
    row, number = np.nonzero(is_masked)
    mask = np.zeros_like(eligible)
    mask[row, number + slot[span[is_masked]]] = True  # positions among the eligible tokens
    if (
        eligible[:, 1:] <= eligible[:, :-1]
    ).all():  # eligible tokens come first in every row: nothing to move
        return mask
    return np.take_along_axis(mask, np.maximum(np.cumsum(eligible, axis=1) - 1, 0), axis=1) & eligible


def line_numbers(ends: np.ndarray) -> np.ndarray:
    """(B, T) line number of each token, from 0. `ends` is true at the last token of each line (the newline)."""
    return np.cumsum(ends, axis=1) - ends


def _whole_lines(masking: LineMasking, eligible, counts, draw_key, rows, lines) -> np.ndarray:
    """Mask lines in random order until the count is met as closely as they allow, within the two ratios.

    A line counts with its eligible tokens. If an order misses the count by more than 1 % of the row, or leaves the ratios,
    others are tried and the closest is kept. If all lines of a row are too long, one is masked anyway.
    """
    if lines.shape != eligible.shape or lines.min(initial=0) < 0 or lines.max(initial=0) >= lines.shape[1]:
        raise ValueError(f"lines must number the lines of {eligible.shape} tokens from 0 in each row")
    num_lines = int(lines.max(initial=0)) + 1
    batch_idx = np.arange(len(lines))[:, None]
    sizes = np.bincount((batch_idx * num_lines + lines)[eligible], minlength=len(lines) * num_lines)
    sizes = sizes.reshape(-1, num_lines)  # (B, L)
    total = eligible.sum(1)
    low = np.ceil(masking.min_ratio * total - 1e-9).astype(np.int64)
    high = np.maximum(np.floor(masking.max_ratio * total + 1e-9).astype(np.int64), low)
    wanted = np.clip(counts, low, high)
    chosen = np.zeros(sizes.shape, bool)  # (B, L)
    miss = np.full(len(lines), np.iinfo(np.int64).max)
    todo = np.arange(len(lines))
    for number in range(_LINE_ORDERS):
        noise = randomness.uniform(
            randomness.key(draw_key, "line order", number), np.asarray(rows)[todo], num_lines
        )
        order = np.argsort(noise, axis=1)
        taken = _fill(np.take_along_axis(sizes[todo], order, axis=1), wanted[todo], low[todo], high[todo])
        candidate = np.zeros_like(taken)  # (R, L) in the lines' own order
        np.put_along_axis(candidate, order, taken, axis=1)
        got = (sizes[todo] * candidate).sum(1)
        outside = (got < low[todo]) | (got > high[todo])
        off = np.abs(got - wanted[todo]) + total[todo] * outside
        better = off < miss[todo]
        chosen[todo[better]], miss[todo[better]] = candidate[better], off[better]
        todo = todo[off > _TOLERANCE * total[todo]]
        if not len(todo):
            break
    return chosen[batch_idx, lines] & eligible


def _fill(sizes: np.ndarray, wanted: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(R, L) bool: take sizes in their order, without those that would exceed what is wanted.

    Then one more is taken if the sum comes closer or reaches `low`, and does not exceed `high`.
    """
    taken, room = np.zeros(sizes.shape, bool), wanted.copy()
    while (
        True
    ):  # each iteration stops at the first size that no longer fits, and the next one starts after it
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
    draw: BatchDraw,
    shares: tuple[float, float] = (0.8, 0.1),
) -> np.ndarray:
    """(B, T) inputs as in BERT (Devlin et al. 2019): 80 % of the masked positions are [MASK], 10 % a random id, 10 % stay.

    Every position is drawn independently. A random id can equal the token that was there. The targets are `ids` at all
    masked positions, also at those that stay.

    Args:
        ids: (B, T) clean tokens.
        allowed_ids: (N,) the ids to draw from: no special tokens.
        draw: keys of the rows.
        shares: of [MASK] and of random ids.
    """
    mask_share, random_share = shares
    if min(mask_share, random_share) < 0 or mask_share + random_share > 1 + 1e-9:
        raise ValueError(
            f"the shares of [MASK] {mask_share} and of random ids {random_share} must be positive and add up to at most 1"
        )
    allowed_ids = np.asarray(allowed_ids)
    if random_share > 0 and not len(allowed_ids):
        raise ValueError("random replacements need at least one allowed id")
    fate = randomness.uniform(draw.key("fate"), draw.rows, ids.shape[1])
    inputs = np.where(masked & (fate < mask_share), mask_id, ids).astype(ids.dtype)
    swapped = masked & (fate >= mask_share) & (fate < mask_share + random_share)
    noise = randomness.uniform(draw.key("id"), draw.rows, ids.shape[1])[swapped]
    inputs[swapped] = allowed_ids[np.floor(noise * len(allowed_ids)).astype(np.int64)]
    return inputs


def mean_run_length(masked: np.ndarray, valid: np.ndarray) -> float:
    """Mean number of masked tokens per run of adjacent masks, over all rows. Tokens that are not valid end a run.

    1 / (1 - ratio) for long rows of independent masks, more for sticky masks; 0 without masks.
    """
    masked = masked & valid
    starts = masked.copy()
    starts[:, 1:] &= ~masked[:, :-1]
    return float(masked.sum() / max(starts.sum(), 1))


def expected_run_length(masking: Masking, ratio: float, length: int = 1024, num_rows: int = 64) -> float:
    """Mean run length of `num_rows` masks with this ratio: how sticky a setting is.

    Compare it with `expected_run_length(RandomMasking(type="random"), ratio, length)`, about 1 / (1 - ratio).
    """
    valid = np.ones((num_rows, length), bool)
    counts = masked_counts(np.full(num_rows, ratio), valid.sum(1))
    masked = draw_mask(masking, valid, counts, randomness.key(0, "expected run length"), np.arange(num_rows))
    return mean_run_length(masked, valid)
