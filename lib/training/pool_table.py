"""Pools of candidates with their prompts and rewards, as the rankers of stages 04 to 06 read them.

Knows tables and texts; not how texts become tokens, and no task. Legend: N pools, K candidates (of the largest pool).
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from lib import randomness
from lib.errors import BadData
from lib.training.data import pools


@dataclass(frozen=True)
class PoolTable:
    """The pools of one split; what is not there is "" or 0, and False in `present`.

    Attributes:
        example_ids, prompts, tags: N of each.
        groups: (N,) what is resampled together for intervals.
        candidate_ids: (N, K) int, as in candidates.parquet.
        texts, controls, kinds, values: (N, K) strings. `controls` are the texts as they would be elsewhere.
        rewards: (N, K) in [0, 1]; terms: name -> (N, K).
        present: (N, K) bool.
        baselines: name -> (N, K) scores of simple methods.
        skipped: pools left out because all their rewards are equal.
    """

    example_ids: list[str]
    prompts: list[str]
    tags: list[list[str]]
    groups: np.ndarray
    candidate_ids: np.ndarray
    texts: np.ndarray
    controls: np.ndarray | None
    kinds: np.ndarray
    values: np.ndarray
    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    present: np.ndarray
    baselines: dict[str, np.ndarray]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(cls, candidates: pa.Table, examples: pa.Table, baselines: pa.Table | None = None) -> "PoolTable":
        """From candidates with their rewards, and their examples.

        Raises BadData when there is no pool with rewards to choose between.
        """
        rows, skipped = decided_pools(candidates)
        present = rows >= 0

        def text(name: str) -> np.ndarray:
            return np.where(present, np.asarray(candidates[name].to_pylist(), dtype=object)[rows], "")

        def number(name: str) -> np.ndarray:
            return np.where(present, candidates[name].to_numpy()[rows], 0)

        names = np.asarray(candidates["example_id"].to_pylist(), dtype=object)[rows[:, 0]].tolist()
        place = {name: i for i, name in enumerate(examples["example_id"].to_pylist())}
        here = examples.take(pa.array([place[name] for name in names]))
        return cls(
            example_ids=names,
            prompts=here["prompt"].to_pylist(),
            tags=[tags or [] for tags in here["tags"].to_pylist()],
            groups=np.asarray(here["group"].to_pylist(), dtype=object),
            candidate_ids=number("candidate_id"),
            texts=text("text"),
            controls=None if candidates["control"].null_count else text("control"),
            kinds=text("kind"),
            values=text("value"),
            rewards=number("reward"),
            terms={name: number(f"term_{name}") for name in terms_of(candidates)},
            present=present,
            baselines=_aligned(baselines, names, number("candidate_id"), present),
            skipped=skipped,
        )

    def draws(self, size: int) -> list["PoolTable"]:
        """Candidates `size` at a time: the pools that a pass over them takes in turn.

        Examples with at most `size` candidates each are one draw, as they are. Raises BadData where an example has more,
        and they do not make whole pools.
        """
        count = self.present.shape[1]
        if count <= size:
            return [self]
        counts = self.present.sum(1)
        if count % size or (counts != count).any():
            odd = int(np.argmax((counts % size > 0) | (counts != count)))
            raise BadData(
                f"{self.example_ids[odd]} has {counts[odd]} candidates, another example {count}: they do not make the same "
                f"number of whole pools of candidates.per_example ({size}) for every example. Set candidates.per_example to what "
                "the task makes, or have it make as many for each, and run 02_generate_candidates.py --overwrite"
            )
        wide = {
            f.name: value
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray) and value.ndim == 2
        }
        found = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            columns = {name: value[:, part] for name, value in wide.items()}
            by_name = {
                name: {k: v[:, part] for k, v in getattr(self, name).items()}
                for name in ("terms", "baselines")
            }
            found.append(replace(self, **columns, **by_name))
        return found

    def strangers(self, seed: int) -> np.ndarray:
        """(N,) for each pool one of another group, in a keyed order: whose prompt would be the wrong one."""
        order = randomness.permutation(seed, "stranger's prompt", 0, len(self))
        result = np.empty(len(self), np.int64)
        result[order] = np.roll(order, -1)
        for shift in range(2, len(self)):  # neighbours of the same group look further
            same = self.groups[result] == self.groups
            if not same.any():
                break
            further = np.empty_like(result)
            further[order] = np.roll(order, -shift)
            result = np.where(same, further, result)
        return result


def decided_pools(candidates: pa.Table) -> tuple[np.ndarray, int]:
    """((N, K) row numbers of the candidates of each pool, -1 for none; how many pools have equal rewards and are skipped).

    Raises BadData when all pools have.
    """
    rows = pools(np.asarray(candidates["example_id"].to_pylist(), dtype=object))
    reward = candidates["reward"].to_numpy()[rows]
    present = rows >= 0
    decided = np.where(present, reward, -np.inf).max(1) > np.where(present, reward, np.inf).min(1)
    if not decided.any():
        raise BadData("no pool has candidates of different reward to choose from")
    return rows[decided], int((~decided).sum())


def terms_of(candidates: pa.Table) -> list[str]:
    """Names of the reward's terms that candidates joined with their rewards have as columns."""
    return [c.removeprefix("term_") for c in candidates.column_names if c.startswith("term_")]


def _aligned(
    baselines: pa.Table | None, names: list[str], numbers: np.ndarray, present: np.ndarray
) -> dict[str, np.ndarray]:
    """name -> (N, K) scores of the table's rows, by example and candidate; none where the table has none of the pools.

    Raises BadData when it has some of the pools, but not every candidate of all.
    """
    if baselines is None:
        return {}
    keys = zip(baselines["example_id"].to_pylist(), baselines["candidate_id"].to_pylist(), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    if not {name for name, _ in row_of} & set(names):  # those of the training split are not scored
        return {}
    rows = np.zeros(numbers.shape, np.int64)
    missing = []
    for n, k in zip(*np.nonzero(present), strict=True):
        row = row_of.get((names[n], int(numbers[n, k])))
        if row is None:
            missing.append(f"{names[n]}, candidate {numbers[n, k]}")
        rows[n, k] = row or 0
    if missing:
        raise BadData(
            f"baselines.parquet has no score for {len(missing):,} of {int(present.sum()):,} candidates, the first is "
            f"{missing[0]}: the ranker could not be compared with them. Run 02_generate_candidates.py --overwrite"
        )
    found = [c for c in baselines.column_names if c.startswith("score_")]
    return {c.removeprefix("score_"): np.where(present, baselines[c].to_numpy()[rows], 0.0) for c in found}
