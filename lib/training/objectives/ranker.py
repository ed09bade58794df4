"""`ranker` of tasks without prompts: a score for each of the K candidates of an example.

The model scores each candidate by itself. Training maximises the probability of the best candidate of a pool.

Legend: N pools, K candidates, T positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lib import randomness
from lib.engine.parts import Part
from lib.metrics import Estimate
from lib.ranking.losses import cross_entropy
from lib.ranking.metrics import paired_difference, ranking_metrics, summarise, winners
from lib.sections.models import ModelSpec
from lib.training.data import Rows, Sequences, Splits
from lib.training.lengths import WholeTexts
from lib.training.objectives.base import (
    ResultRow,
    TrainingContext,
    chunks,
    evaluation_rows,
    result_row,
    tensor,
    with_cls,
)
from lib.training.objectives.candidates import confidence_of
from lib.training.pool_table import decided_pools, say_skipped, terms_of
from lib.training.stage_inputs import SELECTION, StageInputs, explained

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class TokenPools:
    """N pools of up to K sequences.

    Attributes:
        rows: (N, K) sequence indices, -1 for none.
        rewards: (N, K) in [0, 1]; any value where there is no sequence.
        terms: name -> (N, K), each term of the reward.
        groups: (N,) group of each pool. Intervals resample whole groups.
        skipped: number of pools left out because all their rewards are equal.
        confidence: (N, K) the generator's mean log-probability of each sequence; None if it is not known.
    """

    rows: np.ndarray
    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    groups: np.ndarray
    skipped: int = 0
    confidence: np.ndarray | None = None

    @property
    def present(self) -> np.ndarray:
        """(N, K) bool."""
        return self.rows >= 0

    def subset(self, index: np.ndarray) -> "TokenPools":
        terms = {name: values[index] for name, values in self.terms.items()}
        confidence = None if self.confidence is None else self.confidence[index]
        return TokenPools(
            self.rows[index], self.rewards[index], terms, self.groups[index], confidence=confidence
        )


def ranker_objective(
    context: TrainingContext, spec: ModelSpec, stage_inputs: StageInputs, context_length: int
) -> "BestCandidate":
    """The objective over the pools of the run. Raises BadData for a candidate longer than `context_length`."""
    pools, columns, first_row = [], [], 0
    for split in (spec.split, SELECTION, "held_out"):
        table = stage_inputs.candidates(split)
        WholeTexts(context.label, context_length, stage_inputs.config).add(table).refuse()
        with explained(split):
            rows, skipped = decided_pools(table)  # (N, K)
        say_skipped(context.label, split, skipped)
        terms = {term: table[f"term_{term}"].to_numpy()[rows] for term in terms_of(table)}
        groups = np.asarray(table["group"].to_pylist())[rows[:, 0]]
        sequence_idx = np.where(rows >= 0, rows + first_row, -1)
        found = confidence_of(table["token_confidence"]) if split == "held_out" else None  # a baseline
        confidence = None if found is None else np.array([row.mean() for row in found])[rows]
        rewards = table["reward"].to_numpy()[rows]
        pools.append(TokenPools(sequence_idx, rewards, terms, groups, skipped, confidence))
        columns.append(table["token_ids"])
        first_row += table.num_rows
    # One list of sequences for the three splits
    token_ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    tokenizer = stage_inputs.tokenizer
    sequences = Sequences(token_ids, context_length, tokenizer.pad_token_id)
    return BestCandidate(context, sequences, Splits(*pools), tokenizer.cls_token_id)


class BestCandidate:
    """Cross-entropy of the best candidates of each pool.

    Args:
        sequences: candidates of all splits, to which the pools refer.
        cls_id: [CLS], put in front of every sequence.
    """

    selection = "loss"
    draws_ahead = True

    def __init__(
        self, context: TrainingContext, sequences: Sequences, splits: Splits[TokenPools], cls_id: int
    ):
        self.label, self.runtime, self.seed = context.label, context.runtime, context.seed
        self.sequences, self.splits, self.cls_id = sequences, splits, cls_id
        train, selection = splits.train, splits.selection
        self._order = Rows(context.seed, f"{context.label} order", len(train.rows))
        shuffled = randomness.permutation(context.seed, "selection token pools", 0, len(selection.rows))
        pool_size = train.rows.shape[1]
        num_pools = max(1, context.settings.evaluation_examples // pool_size)
        self.evaluated = selection.subset(np.sort(shuffled[:num_pools]))
        self.tokens_per_row = (sequences.width + 1) * pool_size

    def scores(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """(N, K) scores of (N, K) sequence indices, -inf where there is no candidate."""
        ids, valid = with_cls(*self.sequences.batch(rows), self.cls_id)  # (N, K, T + 1)
        with self.runtime.autocast():
            mask = None if valid.all() else tensor(valid, self.runtime)
            scores = model(tensor(ids, self.runtime), mask).float()
        return scores.masked_fill(tensor(rows < 0, self.runtime), -torch.inf)

    def _losses(self, scores: Tensor, pools: TokenPools) -> Tensor:
        """(N,) nats."""
        rewards = tensor(pools.rewards.astype(np.float32), self.runtime)
        return cross_entropy(scores, rewards, tensor(pools.present, self.runtime))

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The mean loss of the batch's pools."""
        pools = self.splits.train.subset(self._order.samples(np.arange(rows.start, rows.stop)))

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            return {"loss": self._losses(self.scores(model, pools.rows), pools).sum() / totals["pools"]}

        return Part({"pools": len(rows)}, losses)

    @torch.no_grad()
    def _predict(self, model: nn.Module, pools: TokenPools) -> tuple[np.ndarray, float]:
        """((N, K) scores, mean loss)."""

        def score(part: np.ndarray) -> tuple[np.ndarray]:
            return (self.scores(model, pools.rows[part]).cpu().numpy(),)

        found = self.runtime.processes.share(
            score, list(chunks(len(pools.rows), evaluation_rows(EVALUATION_BATCH, self.tokens_per_row)))
        )
        scores = np.concatenate([part for (part,) in found])
        return scores, float(self._losses(tensor(scores, self.runtime), pools).mean())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        pools = self.evaluated
        scores, loss = self._predict(model, pools)
        per_pool = ranking_metrics(scores, pools.rewards, pools.present)
        return {"loss": loss} | {n: float(per_pool[n].mean()) for n in ("accuracy", "average_reward", "mrr")}

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out pools, against a random choice or the generator's mean confidence, whichever is better."""
        pools = self.splits.held_out
        scores, loss = self._predict(model, pools)
        per_pool = ranking_metrics(scores, pools.rewards, pools.present)
        values: dict[str, Any] = summarise(per_pool, pools.groups, self.seed)
        others = {"chance": per_pool["chance"]}  # name -> (N,) accuracy
        if pools.confidence is not None:
            of_confidence = ranking_metrics(pools.confidence, pools.rewards, pools.present)
            values["confidence"] = summarise(of_confidence, pools.groups, self.seed)
            others["mean confidence"] = of_confidence["accuracy"]
        rival = max(others, key=lambda name: others[name].mean())
        lead = paired_difference(per_pool["accuracy"], others[rival], pools.groups, self.seed)
        row = result_row(
            self.label, "accuracy", Estimate(**values["accuracy"]), rival, others[rival].mean(),
            lower_is_better=False,
        )  # fmt: skip
        terms = winners(scores, pools.rewards, pools.present, pools.terms)
        return {"loss": loss, **values, "terms": terms}, [row.with_difference(Estimate(**lead))]
