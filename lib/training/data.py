"""Batches for the training loop: pure functions of (seed, row number), so the cursor is one integer.

Row r of a training run is sample r % N of epoch r // N, in that epoch's own order. A step takes the rows
step * B .. step * B + B - 1.

Knows token ids and labels, and neither files nor models. Legend: B rows, T positions, K candidates.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lib import randomness
from lib.errors import BadData


@dataclass(frozen=True)
class Rows:
    """Training order over `count` samples."""

    seed: int
    purpose: str
    count: int

    def epochs(self, rows: np.ndarray) -> np.ndarray:
        """(B,) epochs of the given global rows."""
        return rows // self.count

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """(B,) sample numbers of the given global rows."""
        epochs = self.epochs(rows)
        result = np.empty_like(rows)
        for epoch in np.unique(epochs):  # one or two per batch
            order = _order(self.seed, self.purpose, int(epoch), self.count)
            here = epochs == epoch
            result[here] = order[rows[here] % self.count]
        return result


_orders: dict[tuple, np.ndarray] = {}


def _order(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """The epoch's permutation; the last few are kept, since a step asks for the same one again and again."""
    name = (seed, purpose, epoch, count)
    if name not in _orders:
        if len(_orders) > 8:
            _orders.clear()
        _orders[name] = randomness.permutation(seed, purpose, epoch, count)
    return _orders[name]


class Windows:
    """Running text cut into windows of at most `width` tokens, for language models.

    A document (a run of examples that continue each other) of at most `width` tokens is one window. A longer one is cut
    into a fixed number of windows, anew in every epoch: a keyed place says how long the first one is, the others are
    full, the last one holds what is left. So every token is visited exactly once per epoch, the first and the last of a
    document like any other, and no window holds tokens of two documents.

    Attributes:
        count: windows per epoch.
        document: (count,) the document of each window; `documents` is their number.
    """

    def __init__(self, table: pa.Table, width: int, pad_id: int):
        ids, lengths = _flatten(table["token_ids"])
        if not len(ids):
            raise BadData("there is no text in the split that this model trains on; check data.fractions")
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
        """The same text cut at multiples of `width` from the start of each document, always: for evaluation.

        Its `owner` (count,) is the example that each window starts in. Where the next example continues that one, the
        window may go on into it, though the next one be of another group.
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

    def spans(self, windows: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B,) first token, (B,) end) of windows in the text `ids`; see `batch`."""
        document, number = self.document[windows], self._number[windows]
        shortest, longest = self._shortest[document], self._longest[document]
        cut = self._starts[document] + shortest + np.floor(place * (longest - shortest + 1)).astype(np.int64)
        start = np.where(number == 0, self._starts[document], cut + (number - 1) * self.width)
        return start, np.where(number == 0, cut, np.minimum(start + self.width, self._ends[document]))

    def batch(self, windows: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B, T) int64 ids, (B, T) bool valid) of windows by their numbers.

        Args:
            place: (B,) in [0, 1), where the first cut of each window's document lies; the same for all windows of a
                document in an epoch, see `places`.
        """
        start, end = self.spans(windows, place)
        index = start[:, None] + np.arange(self.width)
        valid = index < end[:, None]
        ids = np.where(valid, self.ids[np.minimum(index, len(self.ids) - 1)], self.pad_id)
        return ids.astype(np.int64), valid

    def places(self, seed: int, purpose: str, windows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """(B,) the keyed place of the first cut of each window's document in an epoch."""
        rows = epochs * self.documents + self.document[windows]
        return randomness.uniform(randomness.key(seed, purpose), rows, 1)[:, 0]


MANY = 32  # windows of a document from which one more is cheap


def first_lengths(sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How documents of `sizes` (D,) tokens are cut: (D,) number of windows, shortest and longest first window.

    With the least number of windows, what the last one would lack is how far the cuts can move. A document of many
    windows gets one more where that lets them move further, so that its cuts do not fall on the same tokens in every
    epoch.
    """
    windows = -(-sizes // width)
    rest = sizes - (windows - 1) * width  # tokens of a last window behind full ones, 1 to width
    more = (windows >= MANY) & (rest - 1 > width - rest + 1)
    shortest = np.where(more, 1, rest)
    longest = np.where(more, rest - 1, np.where(windows == 1, rest, width))
    return windows + more, shortest, longest


class Sequences:
    """Whole token sequences (candidates), padded to `width`.

    Raises:
        BadData: a sequence is longer. `lib.training.lengths` refuses it earlier, by its name.
    """

    def __init__(self, token_ids: pa.ChunkedArray, width: int, pad_id: int):
        self.ids, self._lengths = _flatten(token_ids)
        if (self._lengths > width).any():
            row = int(np.argmax(self._lengths > width))
            raise BadData(f"sequence {row} has {self._lengths[row]} tokens, and the model reads {width}")
        self._starts = (
            np.concatenate([[0], np.cumsum(self._lengths)[:-1]]) if len(self._lengths) else self._lengths
        )
        self.width, self.pad_id, self.count = width, pad_id, len(self._lengths)

    def batch(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((..., T) int64 ids, (..., T) bool valid) for sample numbers of any shape; -1 is an empty row."""
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
    """(N, K) row numbers of each example's candidates, -1 where it has fewer than the largest pool.

    Rows of one example stand together, as stage 02 writes them.
    """
    first = np.append(True, example_ids[1:] != example_ids[:-1])
    starts = np.flatnonzero(first)
    sizes = np.diff(np.append(starts, len(example_ids)))
    if len(np.unique(example_ids[starts])) != len(starts):
        raise BadData("the candidates of one example do not stand together in candidates.parquet")
    column = np.arange(sizes.max())
    return np.where(column < sizes[:, None], starts[:, None] + column, -1)
