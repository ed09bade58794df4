"""Texts with gaps: what the sampler fills, and a user's file of such texts.

Every row of the file is checked before the first one is filled. Rows of equal length are filled together, so that no
padding is needed.

Legend: B samples, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.errors import BadData
from lib.tokenization import encode_batch, encode_with_masks
from lib.user_files.decoding import clean_text

MAX_LISTED = 20  # problems in one message
UNKNOWN = -1  # stands for the target's token in rows without a target


@dataclass(frozen=True)
class Start:
    """Texts of one length from which samples start.

    Attributes:
        ids: (B, T), [MASK] where a token is to be generated.
        free: (B, T) bool, the tokens to generate; the others stay as they are.
        number: (B,) numbers of the samples, which key their noise.
        names: ids of the rows in the user's file; None for other starts.
        truth: (B, T) the target's tokens, UNKNOWN in rows without a target; None if no row has a target.
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
    """Read a .parquet file with the columns id, text and, optionally, target. The shortest texts come first.

    Args:
        context: tokens that the generator reads, without [CLS].

    Raises:
        BadData: the file cannot be read, or rows cannot be filled; the message names the rows.
    """
    names, texts, targets = _columns(path)
    rows = [row.astype(np.int64) for row in encode_with_masks(tokenizer, texts, "unk")]
    target_ids: list[np.ndarray | None] = [None] * len(rows)
    known = [i for i, target in enumerate(targets) if target is not None]
    for i, ids in zip(known, encode_batch(tokenizer, [str(targets[i]) for i in known], "unk"), strict=True):
        target_ids[i] = ids
    problems = []
    for i, (row, target) in enumerate(zip(rows, target_ids, strict=True)):
        problems += [f"row {i} (id {names[i]!r}): {p}" for p in _problems(row, target, tokenizer, context)]
    first_row: dict[str, int] = {}
    for i, name in enumerate(names):
        if first_row.setdefault(name, i) != i:
            problems.append(f"row {i} (id {name!r}): row {first_row[name]} has this id already")
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        listed = "\n  ".join(problems[:MAX_LISTED])
        raise BadData(f"sampler.infill_file: {path} has rows that cannot be filled:\n  {listed}{more}")
    return _starts(rows, target_ids, names, tokenizer.mask_token_id)


def _columns(path: Path) -> tuple[list[str], list[str], list[str | None]]:
    """(ids, texts, targets) of the file's rows."""
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
        if name != "id":  # as in the data: line ends become line feeds, other white space becomes spaces
            columns[name] = [None if value is None else clean_text(value)[0] for value in columns[name]]
        if name != "target" and None in columns[name]:
            raise BadData(
                f"sampler.infill_file: {path}, column {name}: row {columns[name].index(None)} is empty"
            )
    return columns["id"], columns["text"], columns["target"]


def _problems(row: np.ndarray, target: np.ndarray | None, tokenizer: Any, context: int) -> list[str]:
    """Why a row cannot be filled; empty if it can."""
    masked = row == tokenizer.mask_token_id
    found = []
    if not masked.any():
        found.append("text has no [MASK] to fill")
    if len(row) > context:
        found.append(f"text has {len(row)} tokens, but the generator reads at most {context}")
    unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    if (row == unknown).any():
        found.append("text has characters outside the vocabulary")
    if target is None:
        return found
    if (target == unknown).any():
        found.append("target has characters outside the vocabulary, which the generator cannot generate")
    if len(target) != len(row):
        found.append(
            f"target has {len(target)} tokens, text has {len(row)}: the target is the whole text with its gaps filled"
        )
    elif (differs := np.flatnonzero((target != row) & ~masked)).size:
        found.append(f"target differs from text at token {differs[0]}, which is given")
    return found


def _starts(
    rows: list[np.ndarray], target_ids: list[np.ndarray | None], names: list[str], mask_id: int
) -> list[Start]:
    """One `Start` per text length."""
    lengths = np.array([len(row) for row in rows])
    starts = []
    for length in np.unique(lengths):
        here = np.flatnonzero(lengths == length)
        ids = np.stack([rows[i] for i in here])
        blank = np.full(length, UNKNOWN)
        targets = [blank if (target := target_ids[i]) is None else target for i in here]
        truth = np.stack(targets).astype(np.int64)
        starts.append(Start(ids, ids == mask_id, here, [names[i] for i in here], truth))
    return starts
