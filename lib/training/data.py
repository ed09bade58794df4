"""Batches for the training loop: pure functions of (seed, row number), so the cursor is one integer.

Row r of a training run is sample r % N of epoch r // N, in that epoch's own order. A step takes the rows
step * B .. step * B + B - 1; ranks of a distributed run take slices of them.

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

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """(B,) sample numbers of the given global rows."""
        epochs = rows // self.count
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
    """Crops of `width` tokens out of running text, for language models.

    Each example is visited once per epoch; its window starts at a keyed random place inside it and runs on into
    the examples that continue it. A text shorter than `width` gives a shorter, padded window.
    """

    def __init__(self, table: pa.Table, width: int, pad_id: int):
        ids, lengths = _flatten(table["token_ids"])
        if not len(ids):
            raise BadData("there is no text in the split that this model trains on; check data.fractions")
        self.ids, self.width, self.pad_id = ids, width, pad_id
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self._lengths = lengths
        # A run is a stretch of examples that continue each other; windows stay inside it.
        run_first = ~table["continues"].to_numpy(zero_copy_only=False)
        run_first[0] = True
        run = np.cumsum(run_first) - 1
        self._run_start = self._starts[run_first][run]
        ends = self._starts + lengths
        self._run_end = np.append(ends[:-1][run_first[1:]], ends[-1])[run]
        self.count = len(lengths)
        self.owner = np.arange(self.count)  # the example that a window belongs to

    def tiled(self) -> "Windows":
        """The same text as windows side by side, each token in exactly one: for evaluation.

        A tile starts where the one before it in its run ended; the last of a run may be shorter.
        """
        first = np.flatnonzero(np.append(True, self._run_start[1:] != self._run_start[:-1]))
        sizes = self._run_end[first] - self._run_start[first]
        tiles = -(-sizes // self.width)
        run = np.repeat(np.arange(len(first)), tiles)
        number = np.arange(len(run)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        result = copy.copy(self)
        result._starts = self._run_start[first][run] + number * self.width
        result._run_end = np.minimum(result._starts + self.width, self._run_end[first][run])
        result._run_start = result._starts
        result._lengths = result._run_end - result._starts
        result.count = len(run)
        result.owner = np.searchsorted(self._starts, result._starts, side="right") - 1
        return result

    def batch(self, examples: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B, T) int64 ids, (B, T) bool valid). `place` in [0, 1) is where in its example a window starts."""
        start = self._starts[examples] + np.floor(place * self._lengths[examples]).astype(np.int64)
        last = np.maximum(self._run_start[examples], self._run_end[examples] - self.width)
        start = np.minimum(start, last)
        index = start[:, None] + np.arange(self.width)
        valid = index < self._run_end[examples][:, None]
        ids = np.where(valid, self.ids[np.minimum(index, len(self.ids) - 1)], self.pad_id)
        return ids.astype(np.int64), valid


class Sequences:
    """Whole token sequences (candidates), padded to `width` and cut there."""

    def __init__(self, token_ids: pa.ChunkedArray, width: int, pad_id: int):
        self.ids, self._lengths = _flatten(token_ids)
        self._starts = (
            np.concatenate([[0], np.cumsum(self._lengths)[:-1]]) if len(self._lengths) else self._lengths
        )
        self.width, self.pad_id, self.count = width, pad_id, len(self._lengths)

    def batch(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((..., T) int64 ids, (..., T) bool valid) for sample numbers of any shape; -1 is an empty row."""
        length = np.where(samples >= 0, np.minimum(self._lengths[samples], self.width), 0)
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
