"""Pools of candidate texts with their prompts and rewards, as the rankers of stages 04 to 06 read them.

Legend: N pools, K candidates (of the largest pool).
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from lib import randomness
from lib.errors import BadData
from lib.log import say
from lib.ranking.metrics import RELEVANT
from lib.training.data import pools

TEACHER_TERM = "teacher"  # the term of rewards that holds the scores of a teacher


@dataclass(frozen=True)
class PoolTable:
    """The pools of one split. An absent candidate is "" or 0, and False in `present`.

    Attributes:
        example_ids, prompts, tags: lists of N.
        groups: (N,) group of each pool. Intervals resample whole groups.
        candidate_ids: (N, K) int, as in the table candidates.
        texts, kinds, values: (N, K) strings.
        controls: (N, K) the texts as they would read for another page; None if the task gives none.
        rewards: (N, K) in [0, 1].
        terms: name -> (N, K), each term of the reward.
        present: (N, K) bool.
        baselines: name -> (N, K) scores of simple methods.
        skipped: number of pools left out because all their rewards are equal.
        relevant: reward from which a candidate is relevant, for MAP and MRR.
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
    relevant: float = RELEVANT

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(
        cls,
        candidates: pa.Table,
        examples: pa.Table,
        baselines: pa.Table | None = None,
        *,
        with_equal: bool = False,
        relevant: float = RELEVANT,
    ) -> "PoolTable":
        """The pools of candidates joined with their rewards, and of their examples.

        Args:
            with_equal: keep pools whose rewards are all equal, for losses that learn from them.

        Raises BadData if no pool has candidates of different reward, or no pool at all `with_equal`.
        """
        rows, skipped = (all_pools(candidates), 0) if with_equal else decided_pools(candidates)
        present = rows >= 0

        def text(name: str) -> np.ndarray:
            return np.where(present, np.asarray(candidates[name].to_pylist(), dtype=object)[rows], "")

        def number(name: str) -> np.ndarray:
            return np.where(present, candidates[name].to_numpy()[rows], 0)

        names = np.asarray(candidates["example_id"].to_pylist(), dtype=object)[rows[:, 0]].tolist()
        row_of = {name: i for i, name in enumerate(examples["example_id"].to_pylist())}
        aligned = examples.take(pa.array([row_of[name] for name in names]))
        return cls(
            example_ids=names,
            prompts=aligned["prompt"].to_pylist(),
            tags=[tags or [] for tags in aligned["tags"].to_pylist()],
            groups=np.asarray(aligned["group"].to_pylist(), dtype=object),
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
            relevant=relevant,
        )

    @property
    def targets(self) -> np.ndarray:
        """(N, K) what distillation learns: the scores of a teacher if the data has them, otherwise the rewards."""
        return self.terms.get(TEACHER_TERM, self.rewards)

    def draws(self, size: int) -> list["PoolTable"]:
        """The pools divided into draws of `size` candidates. Each epoch of a training takes the next draw.

        If no example has more than `size` candidates, there is one draw. Raises BadData if an example has more and
        they do not make whole pools, or not the same number of pools as for the other examples.
        """
        count = self.present.shape[1]
        if count <= size:
            return [self]
        counts = self.present.sum(1)
        if count % size or (counts != count).any():
            odd = int(np.argmax((counts % size > 0) | (counts != count)))
            raise BadData(
                f"{self.example_ids[odd]} has {counts[odd]} candidates, another example {count}: they do not make the same "
                f"number of whole pools of candidates.per_example ({size}) for every example. Set candidates.per_example to "
                "the number that the task makes, or make the same number for each example, and run "
                "02_generate_candidates.py --overwrite"
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

    def mismatched(self, seed: int) -> np.ndarray:
        """(N,) for each pool the index of a pool of another group, by a keyed draw. Its prompt is a mismatched one."""
        order = randomness.permutation(seed, "stranger's prompt", 0, len(self))
        result = np.empty(len(self), np.int64)
        result[order] = np.roll(order, -1)
        for shift in range(2, len(self)):  # where the next pool is of the same group, try the one after it
            same = self.groups[result] == self.groups
            if not same.any():
                break
            shifted = np.empty_like(result)
            shifted[order] = np.roll(order, -shift)
            result = np.where(same, shifted, result)
        return result


@dataclass(frozen=True)
class PoolRows:
    """What a ranker reads of B pools, and their rewards. Arrays are (B, K); absent candidates as in `PoolTable`."""

    prompts: list[str]
    texts: np.ndarray
    present: np.ndarray
    rewards: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, table: PoolTable, index: np.ndarray) -> "PoolRows":
        """The pools `index` of a table."""
        prompts = [table.prompts[i] for i in index]
        arrays = (table.texts, table.present, table.rewards, table.targets)
        return cls(prompts, *(array[index] for array in arrays))

    @classmethod
    def of_draws(cls, draws: list[PoolTable], draw: np.ndarray, index: np.ndarray) -> "PoolRows":
        """The pools `index`, each in the draw that `draw` (B,) names. All draws have the same pools."""
        ends = np.flatnonzero(np.diff(draw)) + 1  # of rows that follow each other in the same draw
        runs = [
            cls.of(draws[d[0]], i) for d, i in zip(np.split(draw, ends), np.split(index, ends), strict=True)
        ]
        prompts = [prompt for run in runs for prompt in run.prompts]
        arrays = [np.concatenate([getattr(run, n) for run in runs]) for n in cls.arrays()]
        return cls(prompts, *arrays)

    @staticmethod
    def arrays() -> tuple[str, ...]:
        """Names of the (B, K) arrays."""
        return ("texts", "present", "rewards", "targets")

    def narrowed(self) -> "PoolRows":
        """The same pools without the columns that none of them fills."""
        width = int(self.present.sum(1).max(initial=1))
        return replace(self, **{name: getattr(self, name)[:, :width] for name in self.arrays()})

    def chosen(self, columns: np.ndarray) -> "PoolRows":
        """The candidates at (B, C) columns of each pool."""
        found = {name: np.take_along_axis(getattr(self, name), columns, 1) for name in self.arrays()}
        return replace(self, **found)


def all_pools(candidates: pa.Table) -> np.ndarray:
    """(N, K) row indices of the candidates of each pool, -1 for none."""
    return pools(np.asarray(candidates["example_id"].to_pylist(), dtype=object))


def decided_pools(candidates: pa.Table) -> tuple[np.ndarray, int]:
    """The pools that have candidates of different reward.

    Returns:
        (N, K) row indices of the candidates of each pool, -1 for none, and the number of skipped pools.

    Raises BadData if all pools would be skipped.
    """
    rows = all_pools(candidates)
    reward = candidates["reward"].to_numpy()[rows]
    present = rows >= 0
    decided = np.where(present, reward, -np.inf).max(1) > np.where(present, reward, np.inf).min(1)
    if not decided.any():
        raise BadData("no pool has candidates of different reward to choose from")
    return rows[decided], int((~decided).sum())


def say_skipped(name: str, split: str, skipped: int) -> None:
    """Log how many pools of a split are skipped because all their rewards are equal."""
    if skipped:
        say(f"{name}: {skipped:,} pools in {split} have equal rewards; they are skipped")


def terms_of(candidates: pa.Table) -> list[str]:
    """Names of the reward terms that all candidates have, from the columns of candidates joined with their rewards."""
    names = [c for c in candidates.column_names if c.startswith("term_")]
    return [c.removeprefix("term_") for c in names if not np.isnan(candidates[c].to_numpy()).any()]


def _aligned(
    baselines: pa.Table | None, names: list[str], candidate_ids: np.ndarray, present: np.ndarray
) -> dict[str, np.ndarray]:
    """name -> (N, K) scores of the baselines, joined by example and candidate.

    Empty if the table has none of the pools: those of the training split are not scored. Raises BadData if it has some
    candidates of these pools but not all.
    """
    if baselines is None:
        return {}
    keys = zip(baselines["example_id"].to_pylist(), baselines["candidate_id"].to_pylist(), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    if not {name for name, _ in row_of} & set(names):
        return {}
    rows = np.zeros(candidate_ids.shape, np.int64)
    missing = []
    for n, k in zip(*np.nonzero(present), strict=True):
        row = row_of.get((names[n], int(candidate_ids[n, k])))
        if row is None:
            missing.append(f"{names[n]}, candidate {candidate_ids[n, k]}")
        rows[n, k] = row or 0
    if missing:
        raise BadData(
            f"baselines.parquet has no score for {len(missing):,} of {int(present.sum()):,} candidates, the first is "
            f"{missing[0]}. The baselines cannot be measured; run 02_generate_candidates.py --overwrite"
        )
    columns = [c for c in baselines.column_names if c.startswith("score_")]
    return {c.removeprefix("score_"): np.where(present, baselines[c].to_numpy()[rows], 0.0) for c in columns}
