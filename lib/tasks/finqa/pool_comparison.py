"""Question-blind features of a program within its pool: ranks, equal values, numbers in common with the others.

Legend: P pools, K candidates, F columns of `features.NAMES`.
"""

from collections.abc import Sequence

import numpy as np

from lib.tasks.finqa.features import COLUMN, ProgramFeatures
from lib.tasks.finqa.program import OPERATIONS

MAX_NUMBERS = 8  # of each program are compared with those of others
COMPARED = tuple(
    COLUMN[name]
    for name in (
        "add", "subtract", "multiply", "divide", "steps", "constants", "characters", "references", "log value",
        "value sign", "value whole", "log distance from 1", "log mean", "log spread", "log least", "log most",
        "most decimals", "numbers", "same number twice", "cells", "in text", "nowhere", "places of the rarest",
        "one row", "one column", "years new minus old", "first over second", "totals", "last rows", "last columns",
        "row height", "column height", "sentence height", "row name words", "year numbers", "negatives", "percents",
    )
)  # fmt: skip


def number_table(described: Sequence[ProgramFeatures]) -> np.ndarray:
    """(N, MAX_NUMBERS) int64 hashes of each program's numbers, padded with -1."""
    table = np.full((len(described), MAX_NUMBERS), -1, np.int64)
    for i, program in enumerate(described):
        table[i, : len(program.numbers)] = program.numbers[:MAX_NUMBERS]
    return table


def in_pool(rows: np.ndarray, numbers: np.ndarray, extra: np.ndarray | None = None) -> np.ndarray:
    """(P, K, G) features that compare each candidate with the others of its pool.

    Args:
        rows: (P, K, F), columns as in NAMES.
        numbers: (P, K, MAX_NUMBERS) from `number_table`.
        extra: (P, K, E) more columns to compare, such as scores.
    """
    compared = rows[..., COMPARED]  # (P, K, C)
    if extra is not None:
        compared = np.concatenate([compared, extra.astype(np.float32)], -1)
    below = compared[:, :, None] > compared[:, None]  # (P, K, K, C)
    equal = compared[:, :, None] == compared[:, None]
    ranks = below.mean(2, dtype=np.float32) + equal.mean(2, dtype=np.float32) / 2
    shares = equal.mean(2, dtype=np.float32)
    real = numbers >= 0
    common = (numbers[:, :, None, :, None] == numbers[:, None, :, None, :]) & real[:, :, None, :, None]
    shared = common.any(-1).sum(-1).astype(np.float32)  # (P, K, K) numbers that both candidates have
    is_other = ~np.eye(rows.shape[1], dtype=bool)
    others = shared * is_other
    count = np.maximum(real.sum(-1), 1)[..., None]
    signature = rows[..., : len(OPERATIONS)]
    same = (signature[:, :, None] == signature[:, None]).all(-1) & is_other  # (P, K, K) the same operations
    value = rows[..., COLUMN["log value"]]
    distance = np.where(is_other, np.abs(value[:, :, None] - value[:, None]), np.inf)
    near = np.sort(distance, -1)
    central = np.stack(
        [
            others.sum(-1),
            others.max(-1),
            (others / count).sum(-1),
            (others > 0).sum(-1),
            (others == count).sum(-1),
            (others.swapaxes(1, 2) > 0).sum(-1),
            same.sum(-1),
            (same & (others > 0)).sum(-1),
            (same & (others == count)).sum(-1),
            near[..., 0],
            near[..., 1],
            near[..., :-1].mean(-1),
        ],
        -1,
    ).astype(np.float32)
    finite = np.where(np.isfinite(central), central, 9.0)
    mean = finite.mean(1, keepdims=True)
    return np.concatenate([ranks, shares, finite, finite - mean], -1)
