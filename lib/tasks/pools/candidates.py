"""Stages 02 and 03 for pools: the candidates of the files as they are, and their rewards in [0, 1]."""

import json

import numpy as np
import pyarrow as pa
from scipy.stats import rankdata

from lib import randomness, schema
from lib.config import Config
from lib.sections.pools import PoolFilesConfig
from lib.tasks import CandidateContext

KIND = "given"  # of candidates whose file does not say who wrote them


def candidates(examples: pa.Table, context: CandidateContext) -> pa.Table:
    """The candidates of these examples. The number of a candidate is its place in the file.

    The rows of a pool are in an order that depends on their texts alone, so that equal scores favour no place in the file.
    """
    rows = []
    columns = (examples[name].to_pylist() for name in ("example_id", "split", "record"))
    for name, split, record in zip(*columns, strict=True):
        pool = json.loads(record)
        texts = pool["candidates"]
        kinds = pool.get("kinds") or [None] * len(texts)
        # Either all records have a teacher's scores, or none. Null would be no column, and NaN is an unknown score
        teacher = (
            [np.nan if v is None else v for v in pool["teacher"]]
            if "teacher" in pool
            else [None] * len(texts)
        )
        order = sorted(range(len(texts)), key=lambda k: randomness.key(context.seed, f"place of {texts[k]}"))
        rows += [
            {
                "example_id": name,
                "candidate_id": k,
                "split": split,
                "kind": kinds[k] or KIND,
                "text": texts[k],
                "given_reward": pool["rewards"][k],
                "teacher_score": teacher[k],
            }
            for k in order
        ]
    return pa.Table.from_pylist(rows, _COLUMNS)


_NAMES = ("example_id", "candidate_id", "split", "kind", "text", "given_reward", "teacher_score")
_COLUMNS = pa.schema([schema.CANDIDATES.arrow.field(name) for name in _NAMES])


def rewards(config: Config, table: pa.Table) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(rows,) rewards of whole pools by `pools.reward_rule`, and their terms: the reward and the teacher's score as given.

    All tables of a run have the term of the teacher, or none has it. It is NaN in splits without a teacher.
    """
    given = table["given_reward"].to_numpy().astype(np.float64)
    reward = mapped(given, np.asarray(table["example_id"].to_pylist(), dtype=object), config.pools)
    terms = {"given": given}
    if "teacher_score" in table.column_names and table["teacher_score"].null_count == 0:
        terms["teacher"] = table["teacher_score"].to_numpy().astype(np.float64)
    return reward, terms


def mapped(given: np.ndarray, pool: np.ndarray, settings: PoolFilesConfig) -> np.ndarray:
    """(rows,) rewards in [0, 1]. The rows of a pool are adjacent.

    linear: pools.reward_range becomes [0, 1]. rank: the mean rank in the pool, 1 for the best and 0 for the worst.
    """
    low, high = settings.reward_range
    if settings.reward_rule == "linear":
        return np.clip((given - low) / (high - low), 0.0, 1.0)
    result = np.empty_like(given)
    starts = np.flatnonzero(np.append(True, pool[1:] != pool[:-1])) if len(pool) else np.zeros(0, int)
    for start, end in zip(starts, np.append(starts[1:], len(pool)), strict=True):
        ranks = rankdata(given[start:end], method="average") - 1
        result[start:end] = ranks / max(end - start - 1, 1)
    return result
