"""The texts that samples start from; among them a user's file of texts with [MASK]s, checked row by row before any is filled.

Knows the file, the tokenizer's words and the generator's context; no model. Rows of equal length are filled together, so
that nothing is ever padded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.errors import BadData
from lib.tokenization import UNK, encode_batch, encode_with_masks
from lib.user_files.decoding import clean_text

SHOWN = 20
UNKNOWN = -1  # in place of the right token where no target is given


@dataclass(frozen=True)
class Start:
    """Texts of one length to be written.

    Attributes:
        ids: (B, T); free: (B, T) bool, what is to be written; the rest is given.
        number: (B,) numbers of the samples, which key their noise.
        names: of the rows in the user's file, if that is where they come from.
        truth: (B, T) the right tokens, UNKNOWN in rows without a target; None if there are no targets at all.
    """

    ids: np.ndarray
    free: np.ndarray
    number: np.ndarray
    names: list[str] | None = None
    truth: np.ndarray | None = None

    def first(self, count: int) -> "Start":
        names = None if self.names is None else self.names[:count]
        truth = None if self.truth is None else self.truth[:count]
        return Start(self.ids[:count], self.free[:count], self.number[:count], names, truth)


def read_infill_file(path: Path, tokenizer: Any, context: int) -> list[Start]:
    """The rows of a .parquet with columns id, text and, if there is one, target; shortest first.

    Raises:
        BadData: the file cannot be read or a row cannot be filled; every such row is named.
    """
    names, texts, targets = _columns(path)
    rows = [row.astype(np.int64) for row in encode_with_masks(tokenizer, texts, "unk")]
    wanted: list[np.ndarray | None] = [None] * len(rows)
    known = [i for i, target in enumerate(targets) if target is not None]
    for i, ids in zip(known, encode_batch(tokenizer, [str(targets[i]) for i in known], "unk"), strict=True):
        wanted[i] = ids
    problems = []
    for i, (row, target) in enumerate(zip(rows, wanted, strict=True)):
        problems += [f"row {i} (id {names[i]!r}): {p}" for p in _problems(row, target, tokenizer, context)]
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if seen.setdefault(name, i) != i:
            problems.append(f"row {i} (id {name!r}): row {seen[name]} has this id already")
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        shown = "\n  ".join(problems[:SHOWN])
        raise BadData(f"sampler.infill_file: {path} has rows that cannot be filled:\n  {shown}{more}")
    return _starts(rows, wanted, names, tokenizer.mask_token_id)


def _columns(path: Path) -> tuple[list[str], list[str], list[str | None]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise BadData(f"sampler.infill_file: {path} cannot be read as Parquet: {error}") from None
    missing = [name for name in ("id", "text") if name not in table.column_names]
    if missing:
        raise BadData(
            f"sampler.infill_file: {path} has no column {' and '.join(missing)}; it has {', '.join(table.column_names)}"
        )
    if not table.num_rows:
        raise BadData(f"sampler.infill_file: {path} has no rows")
    columns = {}
    for name in ("id", "text", "target"):
        if name not in table.column_names:
            columns[name] = [None] * table.num_rows
            continue
        try:
            columns[name] = table[name].cast(pa.string()).to_pylist()
        except pa.ArrowException:
            raise BadData(
                f"sampler.infill_file: {path}, column {name} is {table[name].type}, not text"
            ) from None
        if name != "id":  # as in the data: line ends are line feeds, other white space is white space
            columns[name] = [None if value is None else clean_text(value)[0] for value in columns[name]]
        if name != "target" and None in columns[name]:
            raise BadData(
                f"sampler.infill_file: {path}, column {name}: row {columns[name].index(None)} is empty"
            )
    return columns["id"], columns["text"], columns["target"]


def _problems(row: np.ndarray, target: np.ndarray | None, tokenizer: Any, context: int) -> list[str]:
    masked = row == tokenizer.mask_token_id
    found = []
    if not masked.any():
        found.append("text has no [MASK] to fill")
    if len(row) > context:
        found.append(f"text has {len(row)} tokens, but the generator reads at most {context}")
    if (row == UNK).any():
        found.append("text has characters outside the vocabulary")
    if target is None:
        return found
    if (target == UNK).any():
        found.append("target has characters outside the vocabulary, which are never written")
    if len(target) != len(row):
        found.append(
            f"target has {len(target)} tokens, text has {len(row)}: it must be the whole text, filled"
        )
    elif (differs := np.flatnonzero((target != row) & ~masked)).size:
        found.append(f"target differs from text at token {differs[0]}, which is given")
    return found


def _starts(rows, wanted, names: list[str], mask_id: int) -> list[Start]:
    lengths = np.array([len(row) for row in rows])
    starts = []
    for length in np.unique(lengths):
        here = np.flatnonzero(lengths == length)
        ids = np.stack([rows[i] for i in here])
        blank = np.full(length, UNKNOWN)
        truth = np.stack([blank if wanted[i] is None else wanted[i] for i in here]).astype(np.int64)
        starts.append(Start(ids, ids == mask_id, here, [names[i] for i in here], truth))
    return starts
