"""Batches for the training loop: pure functions of (seed, row number), so that a checkpoint stores one integer.

Row r of a training is sample r % N of epoch r // N, in the order of that epoch. A step takes the B rows from step * B on.

Legend: B rows, T positions, K candidates.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from lib import randomness
from lib.errors import BadData

T = TypeVar("T")


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Data of three splits: to learn from, to choose the best step by, and to report on."""

    train: T
    selection: T
    held_out: T


@dataclass(frozen=True)
class Rows:
    """Order in which a training visits `count` samples: another permutation in every epoch."""

    seed: int
    purpose: str
    count: int

    def epochs(self, rows: np.ndarray) -> np.ndarray:
        """(B,) epoch of each global row."""
        return rows // self.count

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """(B,) sample index of each global row."""
        epochs = self.epochs(rows)
        result = np.empty_like(rows)
        for epoch in np.unique(epochs):  # one or two per batch
            order = _order(self.seed, self.purpose, int(epoch), self.count)
            in_epoch = epochs == epoch
            result[in_epoch] = order[rows[in_epoch] % self.count]
        return result


_orders: dict[tuple, np.ndarray] = {}


def _order(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """The permutation of an epoch. The last few are cached, since every step of an epoch needs the same one."""
    key = (seed, purpose, epoch, count)
    if key not in _orders:
        if len(_orders) > 8:
            _orders.clear()
        _orders[key] = randomness.permutation(seed, purpose, epoch, count)
    return _orders[key]


class Windows:
    """Text cut into windows of at most `width` tokens, for language models.

    A document is a run of examples that continue each other. One of at most `width` tokens is one window. A longer one is
    cut into a fixed number of windows, at other positions in every epoch. A keyed draw decides the length of the first
    window; the following ones are full, and the last one holds the rest. So every token is visited exactly once per epoch,
    and no window holds tokens of two documents.

    Args:
        table: columns `token_ids` and `continues` (bool: the row continues the document of the row before).
        width: tokens of a full window.
        pad_id: fills the rest of a shorter window.

    Attributes:
        count: windows per epoch.
        document: (count,) document of each window; `documents` is their number.
    """

    def __init__(self, table: pa.Table, width: int, pad_id: int):
        ids, lengths = _flatten(table["token_ids"])
        if not len(ids):
            raise BadData("a split that this model needs has no text; check data.fractions")
        self.ids, self.width, self.pad_id = ids, width, pad_id
        self._example_starts = np.cumsum(lengths) - lengths
        first = ~table["continues"].to_numpy(zero_copy_only=False)
        first[0] = True
        starts = self._example_starts[first]
        sizes = np.diff(np.append(starts, len(ids)))
        starts, sizes = starts[sizes > 0], sizes[sizes > 0]
        windows, self._shortest, self._longest = first_lengths(sizes, width)
        self._starts, self._ends = starts, starts + sizes  # of documents
        self.documents, self.count = len(sizes), int(windows.sum())
        self.document = np.repeat(np.arange(self.documents), windows)
        self._number = np.arange(self.count) - np.repeat(np.cumsum(windows) - windows, windows)

    def tiled(self) -> "Windows":
        """The same text, always cut at multiples of `width` from the start of each document: for evaluation.

        The result has an attribute `owner` (count,): the example in which each window starts. A window may extend into the
        next example of its document, even if that belongs to another group.
        """
        result = copy.copy(self)
        sizes = self._ends - self._starts
        windows = -(-sizes // self.width)
        result._shortest = result._longest = np.minimum(sizes, self.width)
        result.count = int(windows.sum())
        result.document = np.repeat(np.arange(self.documents), windows)
        result._number = np.arange(result.count) - np.repeat(np.cumsum(windows) - windows, windows)
        start, _ = result.spans(np.arange(result.count), np.zeros(result.count))
        result.owner = np.searchsorted(self._example_starts, start, side="right") - 1
        return result

    def spans(self, windows: np.ndarray, cut_position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B,) first token, (B,) end) of windows in the text `ids`; arguments as in `batch`."""
        document, number = self.document[windows], self._number[windows]
        shortest, longest = self._shortest[document], self._longest[document]
        length = shortest + np.floor(cut_position * (longest - shortest + 1)).astype(np.int64)  # of the first
        cut = self._starts[document] + length
        start = np.where(number == 0, self._starts[document], cut + (number - 1) * self.width)
        return start, np.where(number == 0, cut, np.minimum(start + self.width, self._ends[document]))

    def batch(self, windows: np.ndarray, cut_position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B, T) int64 ids, (B, T) bool valid) of windows by their index.

        Args:
            cut_position: (B,) in [0, 1), position of the first cut in each window's document. It is the same for all
                windows of a document in an epoch, see `cut_positions`.
        """
        start, end = self.spans(windows, cut_position)
        index = start[:, None] + np.arange(self.width)
        valid = index < end[:, None]
        ids = np.where(valid, self.ids[np.minimum(index, len(self.ids) - 1)], self.pad_id)
        return ids.astype(np.int64), valid

    def cut_positions(self, seed: int, purpose: str, windows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """(B,) in [0, 1): position of the first cut of each window's document in an epoch, a keyed draw."""
        rows = epochs * self.documents + self.document[windows]
        return randomness.uniform(randomness.key(seed, purpose), rows, 1)[:, 0]


MANY_WINDOWS = 32  # in a document of this many windows, one more costs little


def first_lengths(sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How documents of `sizes` (D,) tokens are cut.

    The cuts can move by as many tokens as the last window lacks. A document of many windows gets an extra one if its cuts
    can then move further. Otherwise they would fall on nearly the same tokens in every epoch.

    Returns:
        (D,) number of windows, (D,) shortest and (D,) longest first window.
    """
    windows = -(-sizes // width)
    rest = sizes - (windows - 1) * width  # tokens of the last window if the others are full, 1 to width
    more = (windows >= MANY_WINDOWS) & (rest - 1 > width - rest + 1)
    shortest = np.where(more, 1, rest)
    longest = np.where(more, rest - 1, np.where(windows == 1, rest, width))
    return windows + more, shortest, longest


class Sequences:
    """Whole token sequences (candidates), padded to `width`.

    Raises:
        BadData: a sequence is longer than `width`. `lib.training.lengths` reports this earlier, with the example's name.
    """

    def __init__(self, token_ids: pa.ChunkedArray, width: int, pad_id: int):
        self.ids, self._lengths = _flatten(token_ids)
        if (self._lengths > width).any():
            row = int(np.argmax(self._lengths > width))
            raise BadData(f"sequence {row} has {self._lengths[row]} tokens, but the model reads {width}")
        self._starts = (
            np.concatenate([[0], np.cumsum(self._lengths)[:-1]]) if len(self._lengths) else self._lengths
        )
        self.width, self.pad_id, self.count = width, pad_id, len(self._lengths)

    def batch(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((..., T) int64 ids, (..., T) bool valid) of sample indices of any shape; -1 gives an empty row."""
        length = np.where(samples >= 0, self._lengths[samples], 0)
        offset = np.arange(self.width)
        valid = offset < length[..., None]
        index = np.where(valid, self._starts[samples][..., None] + offset, 0)
        return np.where(valid, self.ids[index], self.pad_id).astype(np.int64), valid


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(all values, lengths) of a list column."""
    column = column.combine_chunks()
    array = column if isinstance(column, pa.ListArray) else column.chunk(0) if column.num_chunks else None
    if array is None:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    lengths = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return array.flatten().to_numpy(zero_copy_only=False), lengths


def select_split(batches: Iterable[pa.RecordBatch], split: str) -> pa.Table:
    """The rows of one split, in order."""
    import pyarrow.compute as pc

    kept = [batch.filter(pc.equal(batch["split"], split)) for batch in batches]
    if not kept:
        raise BadData(f"split '{split}' is empty")
    return pa.Table.from_batches(kept)


def pools(example_ids: np.ndarray) -> np.ndarray:
    """(N, K) row index of each example's candidates, -1 where it has fewer than the largest pool.

    The rows of one example must be consecutive, as stage 02 writes them.
    """
    first = np.append(True, example_ids[1:] != example_ids[:-1])
    starts = np.flatnonzero(first)
    sizes = np.diff(np.append(starts, len(example_ids)))
    if len(np.unique(example_ids[starts])) != len(starts):
        raise BadData("the candidates of one example are not consecutive in candidates.parquet")
    column = np.arange(sizes.max())
    return np.where(column < sizes[:, None], starts[:, None] + column, -1)
