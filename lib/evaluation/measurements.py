"""Measure samples with the models of a run: likelihood, probability of error, judge score, fill accuracy.

Legend: B samples, T tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lib import metrics
from lib.evaluation.infilling import UNKNOWN, Start
from lib.evaluation.quality import from_first_gap, reference_nll, sequence_scores
from lib.tokenization import decode_batch
from lib.training.objectives.base import chunks

BATCH = 64


@dataclass
class Measurements:
    """What the models say about samples of one length, or of several lengths after `concatenated`.

    Attributes:
        texts: the samples as text.
        generated: the same from the first generated character on.
        nll: (B,) nats of `generated` under the reference model; None without that model.
        errors: for each sample (T,), the critic's calibrated probability of error.
        judge_scores: (B,); None without a judge.
        free: for each sample (T,) bool, which tokens were generated.
        num_correct: (B,) generated tokens that equal the target's; None without targets.
        num_known: (B,) generated tokens that have a target; None without targets.
    """

    texts: list[str]
    generated: list[str]
    nll: np.ndarray | None
    errors: list[np.ndarray]
    judge_scores: np.ndarray | None
    free: list[np.ndarray]
    num_correct: np.ndarray | None
    num_known: np.ndarray | None

    @classmethod
    def of(cls, ids: np.ndarray, start: Start, evaluator: Any) -> "Measurements":
        """Measure the samples (B, T) that were made from a start, with the evaluator's models."""
        tokenizer, runtime, free = evaluator.tokenizer, evaluator.runtime, start.free
        cls_id, counted = tokenizer.cls_token_id, from_first_gap(free)
        generated = decode_batch(tokenizer, [row[c] for row, c in zip(ids, counted, strict=True)])
        nll = None
        if evaluator.reference is not None:
            nll = reference_nll(evaluator.reference, runtime, ids, counted, cls_id)
        errors = [row for p in chunks(len(ids), BATCH) for row in evaluator.sampler.critic_error(ids[p])]
        judge_scores = None
        if evaluator.judge is not None:
            judge_scores = sequence_scores(evaluator.judge, runtime, ids, cls_id)
        num_correct = num_known = None
        if start.truth is not None:
            num_correct = (free & (ids == start.truth)).sum(1)
            num_known = (free & (start.truth != UNKNOWN)).sum(1)
        texts = decode_batch(tokenizer, ids)
        return cls(texts, generated, nll, errors, judge_scores, list(free), num_correct, num_known)

    @classmethod
    def concatenated(cls, parts: list["Measurements"]) -> "Measurements":
        """Samples of several lengths as one."""

        def joined(name: str) -> Any:
            values = [getattr(p, name) for p in parts]
            if isinstance(values[0], list):
                return [v for value in values for v in value]
            return None if values[0] is None else np.concatenate(values)

        return cls(*(joined(f.name) for f in fields(cls)))

    def means(self) -> dict[str, Any]:
        """Mean judge score, mean probability of error of the generated tokens, and share of correct fills."""
        accuracy = None
        if self.num_correct is not None and self.num_known is not None and self.num_known.any():
            accuracy = metrics.ratio(self.num_correct, self.num_known, limits=metrics.SHARE)._asdict()
        errors = [e[f] for e, f in zip(self.errors, self.free, strict=True)]
        return {
            "judge_score": None if self.judge_scores is None else float(self.judge_scores.mean()),
            "critic_error": float(np.concatenate(errors).mean()),
            "infill_accuracy": accuracy,
        }
