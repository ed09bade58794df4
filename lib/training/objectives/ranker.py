"""`ranker` of tasks without prompts: a score for each of the K candidates of an example; the best one is to win.

Knows pools of token sequences and a model that scores each sequence by itself. Legend: N pools, K candidates,
T positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.metrics import Estimate
from lib.ranking.losses import cross_entropy
from lib.ranking.metrics import ranking_metrics, summarise, winners
from lib.runtime import Runtime
from lib.training.data import Rows, Sequences
from lib.training.objectives.base import ResultRow, chunks, result_row, tensor, with_cls

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class TokenPools:
    """N pools of up to K sequences.

    Attributes:
        rows: (N, K) numbers of sequences, -1 for none.
        rewards: (N, K) in [0, 1], anything where there is none; terms: name -> (N, K), each term of the reward.
        groups: (N,) what is resampled together for intervals.
        skipped: pools left out because all their rewards are equal.
    """

    rows: np.ndarray
    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    groups: np.ndarray
    skipped: int = 0

    @property
    def present(self) -> np.ndarray:
        return self.rows >= 0

    def some(self, which: np.ndarray) -> "TokenPools":
        terms = {name: values[which] for name, values in self.terms.items()}
        return TokenPools(self.rows[which], self.rewards[which], terms, self.groups[which])


class BestCandidate:
    """Cross-entropy on the best candidates of each pool.

    Args:
        train, selection, held_out: pools to learn from, to choose the best step by, and to report on.
    """

    selection = "loss"

    def __init__(self, label: str, sequences: Sequences, train: TokenPools, selection: TokenPools, held_out: TokenPools,
                 cls_id: int, runtime: Runtime, seed: int, num_evaluated: int):  # fmt: skip
        self.label, self.sequences, self.train, self.held_out = label, sequences, train, held_out
        self.cls_id, self.runtime, self.seed = cls_id, runtime, seed
        self._order = Rows(seed, f"{label} order", len(train.rows))
        spread = randomness.permutation(seed, "selection token pools", 0, len(selection.rows))
        size = train.rows.shape[1]
        self._evaluated = selection.some(np.sort(spread[: max(1, num_evaluated // size)]))
        self.tokens_per_row = (sequences.width + 1) * size

    def scores(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """(N, K) scores of sequences by their numbers, -inf where there is no candidate."""
        ids, valid = with_cls(*self.sequences.batch(rows), self.cls_id)  # (N, K, T)
        with self.runtime.autocast():
            scores = model(tensor(ids, self.runtime), tensor(valid, self.runtime)).float()
        return scores.masked_fill(tensor(rows < 0, self.runtime), -torch.inf)

    def _losses(self, scores: Tensor, pools: TokenPools) -> Tensor:
        rewards = tensor(pools.rewards.astype(np.float32), self.runtime)
        return cross_entropy(scores, rewards, tensor(pools.present, self.runtime))

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        pools = self.train.some(self._order.samples(np.arange(rows.start, rows.stop)))
        return {"loss": self._losses(self.scores(model, pools.rows), pools).mean()}

    @torch.no_grad()
    def _predict(self, model: nn.Module, pools: TokenPools) -> tuple[np.ndarray, float]:
        """((N, K) scores, mean loss)."""
        parts = [self.scores(model, pools.rows[part]) for part in chunks(len(pools.rows), EVALUATION_BATCH)]
        scores = torch.cat(parts)
        return scores.cpu().numpy(), float(self._losses(scores, pools).mean())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        scores, loss = self._predict(model, self._evaluated)
        per_pool = ranking_metrics(scores, self._evaluated.rewards, self._evaluated.present)
        return {"loss": loss} | {n: float(per_pool[n].mean()) for n in ("accuracy", "average_reward", "mrr")}

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out pools, beside a random choice."""
        pools = self.held_out
        scores, loss = self._predict(model, pools)
        values = summarise(ranking_metrics(scores, pools.rewards, pools.present), pools.groups, self.seed)
        accuracy, chance = values["accuracy"], values["chance"]
        assert isinstance(accuracy, dict) and isinstance(chance, float)
        row = result_row(
            self.label, "accuracy", Estimate(**accuracy), "chance", chance, lower_is_better=False
        )
        terms = winners(scores, pools.rewards, pools.present, pools.terms)
        return {"loss": loss, **values, "terms": terms}, [row]
