"""Batches for the training loop: pure functions of (seed, row number), so that a checkpoint stores one integer.

Row r of a training is sample r % N of epoch r // N, in the order of that epoch. Step s takes the rows from s * B on.

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
from lib.token_store import SCAN, TokenStore, flatten, of_table

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


_orders: dict[tuple, randomness.Permutation] = {}


def _order(seed: int, purpose: str, epoch: int, count: int) -> randomness.Permutation:
    """The permutation of an epoch. The last few are cached, since every step of an epoch needs the same one."""
    key = (seed, purpose, epoch, count)
    if key not in _orders:
        if len(_orders) > 8:
            _orders.clear()
        _orders[key] = randomness.Permutation(seed, purpose, epoch, count)
    return _orders[key]


BLOCK = 256  # documents between two entries of the index of windows


class Windows:
    """Text cut into windows of at most `width` tokens, for language models.

    A document is a run of examples that continue each other. One of at most `width` tokens is one window. A longer
    one is cut into a fixed number of windows, at other positions in every epoch. A keyed draw decides the length of
    the first window; the following ones are full, and the last one holds the rest. So every token is visited exactly
    once per epoch, and no window holds tokens of two documents.

    Memory holds one number per `BLOCK` documents. The rest is computed from the token store for each batch.

    Args:
        text: a token store, or a small table with the columns `token_ids` and `continues` (see `token_store.of_table`).
        width: tokens of a full window.
        pad_id: fills the rest of a shorter window.

    Attributes:
        count: windows per epoch.
        documents: their number.
    """

    def __init__(self, text: TokenStore | pa.Table, width: int, pad_id: int):
        self.text = text if isinstance(text, TokenStore) else of_table(text)
        if not len(self.text.document_starts):
            raise BadData("a split that this model needs has no text; check data.fractions")
        self.width, self.pad_id, self._tiled = width, pad_id, False
        self.documents = len(self.text.document_starts)
        self._index_windows()

    def _index_windows(self) -> None:
        """Sets `count`, and `_before`: windows before each block of documents, and all windows at the end."""
        before = [0]
        for first in range(0, self.documents, SCAN):
            sizes = self.text.document_sizes(first, min(first + SCAN, self.documents))
            windows, _, _ = self._cut(sizes)
            before += (
                before[-1] + np.cumsum(np.add.reduceat(windows, np.arange(0, len(sizes), BLOCK)))
            ).tolist()
        self._before = np.array(before)
        self.count = int(self._before[-1])

    def _cut(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `first_lengths`. Tiled documents have a first window of fixed length."""
        if not self._tiled:
            return first_lengths(sizes, self.width)
        first = np.minimum(sizes, self.width)
        return -(-sizes // self.width), first, first

    def tiled(self) -> "Windows":
        """The same text, always cut at multiples of `width` from the start of each document: for evaluation."""
        result = copy.copy(self)
        result._tiled = True
        result._index_windows()
        return result

    @property
    def ids(self) -> np.ndarray:
        """All tokens of the text, as a memory map for a token store."""
        return self.text.tokens

    @property
    def document(self) -> np.ndarray:
        """(count,) document of each window. Only for small texts."""
        return self._locate(np.arange(self.count)).document

    @property
    def owner(self) -> np.ndarray:
        """(count,) example in which each window of `tiled` starts. Only for small texts.

        A window may extend into the next example of its document, even if that belongs to another group.
        """
        start, _ = self.spans(np.arange(self.count), np.zeros(self.count))
        return np.searchsorted(self.text.examples, start, side="right") - 1

    def groups(self, windows: np.ndarray) -> np.ndarray:
        """(B,) number of the group in which each window of `tiled` starts, in the order of the groups' names."""
        start, _ = self.spans(windows, np.zeros(len(windows)))
        return self.text.groups_at(start)

    def _locate(self, windows: np.ndarray) -> "_Places":
        """Where windows are, by their index. (B,) each."""
        # 1. The blocks of documents in which they are
        block = np.searchsorted(self._before, windows, side="right") - 1
        blocks, row = np.unique(block, return_inverse=True)

        # 2. The documents of these blocks, and the windows before the end of each: (blocks, BLOCK)
        index = blocks[:, None] * BLOCK + np.arange(BLOCK)
        exists = index < self.documents
        index = np.minimum(index, self.documents - 1)
        starts, ends = self.text.document_starts[index], self.text.document_ends[index]
        counts, shortest, longest = self._cut(ends - starts)
        after = self._before[blocks, None] + np.cumsum(np.where(exists, counts, 0), 1)

        # 3. The document of each window
        column = (after[row] <= windows[:, None]).sum(1)
        at = (row, column)
        number = windows - (after[at] - counts[at])
        return _Places(index[at], number, starts[at], ends[at], shortest[at], longest[at])

    def spans(self, windows: np.ndarray, cut_position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B,) first token, (B,) end) of windows in the text; arguments as in `batch`."""
        parts = [
            self._locate(windows[at : at + SPAN_ROWS]).spans(cut_position[at : at + SPAN_ROWS], self.width)
            for at in range(0, max(len(windows), 1), SPAN_ROWS)
        ]
        return np.concatenate([start for start, _ in parts]), np.concatenate([end for _, end in parts])

    def batch(self, windows: np.ndarray, cut_position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B, T) int64 ids, (B, T) bool valid) of windows by their index.

        Args:
            cut_position: (B,) in [0, 1), position of the first cut in each window's document. It is the same for all
                windows of a document in an epoch, see `cut_positions`.
        """
        start, end = self.spans(windows, cut_position)
        ids = np.full((len(windows), self.width), self.pad_id, np.int64)
        for row, first, last in zip(ids, start.tolist(), end.tolist(), strict=True):
            row[: last - first] = self.text.read(first, last)
        return ids, np.arange(self.width) < (end - start)[:, None]

    def cut_positions(self, seed: int, purpose: str, windows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """(B,) in [0, 1): position of the first cut of each window's document in an epoch, a keyed draw."""
        rows = epochs * self.documents + self._locate(windows).document
        return randomness.uniform(randomness.key(seed, purpose), rows, 1)[:, 0]


SPAN_ROWS = 4096  # windows that `spans` locates at a time


@dataclass(frozen=True)
class _Places:
    """Where windows are: everything is (B,).

    Attributes:
        document: number of the document.
        number: of the window in its document.
        start, end: first token of the document, and its end.
        shortest, longest: limits of the length of its first window.
    """

    document: np.ndarray
    number: np.ndarray
    start: np.ndarray
    end: np.ndarray
    shortest: np.ndarray
    longest: np.ndarray

    def spans(self, cut_position: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """((B,) first token, (B,) end) of the windows."""
        length = self.shortest + np.floor(cut_position * (self.longest - self.shortest + 1)).astype(np.int64)
        cut = self.start + length  # the end of the first window
        start = np.where(self.number == 0, self.start, cut + (self.number - 1) * width)
        return start, np.where(self.number == 0, cut, np.minimum(start + width, self.end))


MANY_WINDOWS = 32  # in a document of this many windows, one more costs little


def first_lengths(sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How documents of `sizes` (D,) tokens are cut.

    The cuts can move by as many tokens as the last window lacks. A document of many windows gets an extra one if its
    cuts can then move further. Otherwise they would fall on nearly the same tokens in every epoch.

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
        BadData: a sequence is longer than `width`. `lib.training.lengths` reports this earlier.
    """

    def __init__(self, token_ids: pa.ChunkedArray, width: int, pad_id: int):
        self.ids, self._lengths = flatten(token_ids)
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


def select_split(batches: Iterable[pa.RecordBatch], split: str) -> pa.Table:
    """The rows of one split, in order."""
    import pyarrow.compute as pc

    kept = [batch.filter(pc.equal(batch["split"], split)) for batch in batches]
    if not kept:
        raise BadData(f"split '{split}' is empty")
    return pa.Table.from_batches(kept)


def select_rows(batches: Iterable[pa.RecordBatch], column: str, values: pa.ChunkedArray) -> pa.Table:
    """The rows whose value in a column is one of some values, in order."""
    import pyarrow.compute as pc

    wanted = pc.unique(values)
    kept = [batch.filter(pc.is_in(batch[column], value_set=wanted)) for batch in batches]
    if not kept:
        raise BadData(f"a table with the column {column} has no rows; run the stage that writes it again")
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
