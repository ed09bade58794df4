"""Candidates of the three splits, for objectives that read each candidate as a whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa

from lib.training.data import Sequences, Splits
from lib.training.lengths import WholeTexts
from lib.training.stage_inputs import StageInputs

T = TypeVar("T")

# Global rows of a training -> ((B, T) ids, (B, T) validity, (B, T) labels or (B,) targets), in place of the train split
Stream = Callable[[range], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class CandidateSplits(Splits[T]):
    """Candidates with labels or targets.

    Attributes:
        groups: (held-out candidates,) group of each. Intervals resample whole groups.
        confidence: log-probabilities of each held-out candidate's tokens, from the masked LM that generated them;
            None if they are not known. They are a baseline.
    """

    groups: np.ndarray
    confidence: list[np.ndarray] | None = None

    @classmethod
    def of(cls, tables: Splits[pa.Table], read: Callable[[pa.Table], T]) -> "CandidateSplits[T]":
        held_out = tables.held_out
        return cls(
            read(tables.train),
            read(tables.selection),
            read(held_out),
            groups=np.asarray(held_out["group"].to_pylist()),
            confidence=confidence_of(held_out["token_confidence"]),
        )


def whole_sequences(
    name: str, context_length: int, stage_inputs: StageInputs
) -> Callable[[pa.Table], Sequences]:
    """Table of candidates -> their sequences. Raises BadData if model `name` cannot read one as a whole."""

    def sequences(table: pa.Table) -> Sequences:
        WholeTexts(name, context_length, stage_inputs.config).add(table).refuse()
        return Sequences(table["token_ids"], context_length, stage_inputs.tokenizer.pad_token_id)

    return sequences


def confidence_of(column: pa.ChunkedArray) -> list[np.ndarray] | None:
    """The log-probabilities of each candidate's tokens; None if they are not known of all candidates."""
    if column.null_count or not len(column):
        return None
    return [np.asarray(row, np.float32) for row in column.to_pylist()]
