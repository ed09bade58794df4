"""Which candidates of large pools a training step reads: others in every epoch, hard ones more often.

Legend: N training pools, D draws of them, B pools of a batch, K candidates, C candidates that are read.
"""

from dataclasses import dataclass

import numpy as np

from lib import randomness
from lib.ranking.bm25 import bm25_scores
from lib.sections.finqa import RankerConfig
from lib.training.pool_table import PoolRows, PoolTable


@dataclass(frozen=True)
class CandidateSampler:
    """Draws the candidates that are read, a function of the seed, the epoch and the pool.

    Attributes:
        size: C, the most candidates of a pool.
        log_weight: (D, N, K) of the training pools; None: all candidates are as likely.
    """

    size: int
    log_weight: np.ndarray | None
    seed: int
    num_pools: int

    @classmethod
    def of(cls, settings: RankerConfig, draws: list[PoolTable], seed: int) -> "CandidateSampler | None":
        """The sampler of a training with these draws of its pools; None if they are read whole."""
        size = settings.sampled_candidates
        if size is None or draws[0].present.shape[1] <= size:
            return None
        log_weight = None
        if settings.hard_negatives > 0:
            log_weight = settings.hard_negatives * np.stack([_relative_bm25(table) for table in draws])
        return cls(size, log_weight, seed, len(draws[0]))

    def sample(self, rows: PoolRows, epochs: np.ndarray, draw: np.ndarray, index: np.ndarray) -> PoolRows:
        """The pools with at most C candidates: the best ones, at most half of C, then others.

        The others are drawn without replacement by their weights (Gumbel top-k; Kool et al., 2019). They stay in their order.

        Args:
            epochs, draw, index: (B,) the epoch, the draw that `rows` are of, and the index of the pool among the training pools.
        """
        width = rows.present.shape[1]
        if width <= self.size:
            return rows
        uniform = randomness.uniform(
            randomness.key(self.seed, "sampled candidates"), epochs * self.num_pools + index, width
        )
        keys = -np.log(-np.log(np.clip(uniform, 1e-300, 1 - 1e-16)))
        if self.log_weight is not None:
            keys = keys + self.log_weight[draw, index, :width]
        known = np.where(rows.present, rows.rewards, -np.inf)
        best = rows.present & (known == known.max(1, keepdims=True))
        rank_of_best = np.argsort(
            np.argsort(-np.where(best, uniform, -1), 1, kind="stable"), 1, kind="stable"
        )
        forced = best & (rank_of_best < max(1, self.size // 2))
        # Further best candidates would be wrong negatives of nobody, but take the place of others: they come last
        keys = np.where(forced, np.inf, np.where(best, -1e6 + uniform, keys))
        keys = np.where(rows.present, keys, -np.inf)
        columns = np.sort(np.argsort(-keys, 1, kind="stable")[:, : self.size], 1)
        return rows.chosen(columns)


def _relative_bm25(table: PoolTable) -> np.ndarray:
    """(N, K) BM25 scores of the candidates, scaled to [0, 1] within their pool."""
    scores = bm25_scores(table.prompts, table.texts, table.present)
    low = np.where(table.present, scores, np.inf).min(1, keepdims=True)
    high = np.where(table.present, scores, -np.inf).max(1, keepdims=True)
    return (scores - low) / np.maximum(high - low, 1e-12)
