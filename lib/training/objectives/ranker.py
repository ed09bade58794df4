"""`ranker`: a score for each of the K candidates of an example; the best one is to win.

Legend: N examples, K candidates, T positions.
"""

import numpy as np
import torch
from torch import Tensor, nn

from lib import metrics, randomness
from lib.runtime import Runtime
from lib.training.data import Rows, Sequences
from lib.training.objectives.base import ResultRow, chunks, result_row, tensor, with_cls


class BestCandidate:
    """Cross-entropy on the best candidate of each pool; tied best ones share the target.

    Args:
        pools: (N, K) row numbers into `sequences`, -1 for none.
        rewards: (rows,) in [0, 1].
        terms: name -> (rows,) values of each term of the reward.
    """

    selection = "cross_entropy"

    def __init__(self, label, sequences: Sequences, rewards: np.ndarray, train_pools: np.ndarray,
                 held_out_pools: np.ndarray, groups: np.ndarray, cls_id: int, runtime: Runtime, seed: int,
                 num_evaluated: int, terms: dict[str, np.ndarray] | None = None):  # fmt: skip
        self.label, self.sequences, self.rewards, self.runtime = label, sequences, rewards, runtime
        self.terms = terms or {}
        self.train, self.held_out, self._groups, self.cls_id = train_pools, held_out_pools, groups, cls_id
        self._order = Rows(seed, f"{label} order", len(train_pools))
        spread = randomness.permutation(seed, "held-out pools", 0, len(held_out_pools))
        self._evaluated = np.sort(spread[: max(1, num_evaluated // train_pools.shape[1])])
        self.tokens_per_row = (sequences.width + 1) * train_pools.shape[1]

    def scores(self, model: nn.Module, pools: np.ndarray) -> Tensor:
        """(N, K) scores, -inf where there is no candidate."""
        ids, valid = with_cls(*self.sequences.batch(pools), self.cls_id)  # (N, K, T)
        with self.runtime.autocast():
            scores = model(tensor(ids, self.runtime), tensor(valid, self.runtime)).float()
        return scores.masked_fill(tensor(pools < 0, self.runtime), -torch.inf)

    def target(self, pools: np.ndarray) -> np.ndarray:
        """(N, K) probabilities: the best reward's candidates share 1."""
        reward = np.where(pools >= 0, self.rewards[pools], -1.0)
        best = reward == reward.max(1, keepdims=True)
        return best / best.sum(1, keepdims=True)

    def _cross_entropy(self, scores: Tensor, target: Tensor) -> Tensor:
        logs = torch.log_softmax(scores, -1)
        return -torch.where(target > 0, target * logs, 0.0).sum(-1)  # (N,)

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        pools = self.train[self._order.samples(np.arange(rows.start, rows.stop))]
        target = tensor(self.target(pools).astype(np.float32), self.runtime)
        return {"loss": self._cross_entropy(self.scores(model, pools), target).mean()}

    def _predict(self, model: nn.Module, pools: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((N, K) scores, (N,) cross-entropies)."""
        scores, losses = [], []
        for part in chunks(len(pools), 16):
            s = self.scores(model, pools[part])
            target = tensor(self.target(pools[part]).astype(np.float32), self.runtime)
            losses.append(self._cross_entropy(s, target).cpu().numpy())
            scores.append(s.cpu().numpy())
        return np.concatenate(scores), np.concatenate(losses)

    def _metrics(self, pools: np.ndarray, scores: np.ndarray, losses: np.ndarray) -> tuple[dict, np.ndarray]:
        reward = np.where(pools >= 0, self.rewards[pools], np.nan)
        chosen = np.take_along_axis(reward, scores.argmax(1)[:, None], 1)[:, 0]
        best, mean = np.nanmax(reward, 1), np.nanmean(reward, 1)
        correct = (chosen == best).astype(float)
        better = (scores > np.take_along_axis(scores, np.nanargmax(reward, 1)[:, None], 1)).sum(1)
        return {
            "cross_entropy": float(losses.mean()),
            "accuracy": float(correct.mean()),
            "average_reward": float(chosen.mean()),
            "reward_ratio": float(chosen.sum() / max(best.sum(), 1e-12)),
            "normalised_reward_ratio": float((chosen - mean).sum() / max((best - mean).sum(), 1e-12)),
            "mrr": float((1 / (1 + better)).mean()),
        }, correct

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        pools = self.held_out[self._evaluated]
        return self._metrics(pools, *self._predict(model, pools))[0]

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out pools, beside a random choice."""
        scores, losses = self._predict(model, self.held_out)
        values, correct = self._metrics(self.held_out, scores, losses)
        chance = float((self.target(self.held_out) > 0).sum() / (self.held_out >= 0).sum())
        hits, count = metrics.sum_by(self._groups, correct, np.ones_like(correct))
        row = result_row(
            self.label, "accuracy", metrics.ratio(hits, count), "chance", chance, lower_is_better=False
        )
        return values | {"chance": chance, "terms": self._winners(scores)}, [row]

    def _winners(self, scores: np.ndarray) -> dict[str, dict[str, float]]:
        """Mean of the reward and of each of its terms over held-out pools: of the winner, of all, of the best."""
        pools = self.held_out
        reward = np.where(pools >= 0, self.rewards[pools], -np.inf)
        found = {}
        for name, values in ({"reward": self.rewards} | self.terms).items():
            value = np.where(pools >= 0, values[pools], np.nan)
            pick = lambda rows, v=value: float(np.take_along_axis(v, rows[:, None], 1).mean())  # noqa: E731
            found[name] = {
                "winner": pick(scores.argmax(1)),
                "random": float(np.nanmean(value, 1).mean()),
                "best": pick(reward.argmax(1)),
            }
        return found
