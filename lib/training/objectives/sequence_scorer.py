"""`sequence_scorer`: one score in [0, 1] per sequence, or one of N classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn

from lib import metrics, randomness
from lib.log import say
from lib.runtime import Runtime
from lib.training.data import Rows, Sequences
from lib.training.objectives.base import ResultRow, chunks, forward, result_row, tensor, with_cls

FreshTargets = Callable[[range], tuple[np.ndarray, np.ndarray, np.ndarray]]


class SequenceScore:
    """MSE on targets in [0, 1], read at [CLS]. The model's `logits` are the scores already.

    Args:
        train, selection, held_out: sequences to learn from, to choose the best step by, and to report on, each with its
            (N,) targets.
        groups: (held-out rows,) what is resampled together.
        confidence: log-probabilities of each held-out sequence's tokens under the masked LM that wrote; their mean is a
            baseline.
        changed: share of tokens that differ from the original, of the training and of the held-out sequences, where
            known: what of the target the text itself can tell.
        fresh: rows of the training -> ((B, T) ids, (B, T) validity, (B,) targets), in place of `train`.
    """

    selection = "mse"

    def __init__(self, label, train: Sequences, train_targets: np.ndarray, selection: Sequences,
                 selection_targets: np.ndarray, held_out: Sequences, held_out_targets: np.ndarray, groups: np.ndarray,
                 cls_id: int, runtime: Runtime, seed: int, num_evaluated: int, changed: tuple[np.ndarray, np.ndarray] | None = None,
                 confidence: list[np.ndarray] | None = None, fresh: FreshTargets | None = None):  # fmt: skip
        self.changed, self.confidence, self.fresh = changed, confidence, fresh
        self.label, self.runtime, self.cls_id = label, runtime, cls_id
        self.train, self.train_targets = train, train_targets
        self._selection, self._selection_targets = selection, selection_targets
        self.held_out, self.held_out_targets, self._groups = held_out, held_out_targets, groups
        self._order = Rows(seed, f"{label} order", train.count)
        spread = randomness.permutation(seed, "selection candidates", 0, selection.count)
        self._evaluated = np.sort(spread[:num_evaluated])
        self.tokens_per_row = train.width + 1

    def _batch(self, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids and validity with [CLS], (B,) targets) of rows of the training."""
        if self.fresh is not None:
            ids, valid, targets = self.fresh(rows)
        else:
            samples = self._order.samples(np.arange(rows.start, rows.stop))
            (ids, valid), targets = self.train.batch(samples), self.train_targets[samples]
        return *with_cls(ids, valid, self.cls_id), targets

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        ids, valid, targets = self._batch(rows)
        scores = forward(model, self.runtime, ids, valid).logits.float().squeeze(-1)  # (B,)
        return {"loss": F.mse_loss(scores, tensor(targets.astype(np.float32), self.runtime))}

    def predict(self, model: nn.Module, sequences: Sequences, rows: np.ndarray) -> np.ndarray:
        """(R,) scores of some rows of `sequences`."""
        scores = []
        for part in chunks(len(rows), 64):
            ids, valid = with_cls(*sequences.batch(rows[part]), self.cls_id)
            scores.append(forward(model, self.runtime, ids, valid).logits.float().squeeze(-1).cpu().numpy())
        return np.concatenate(scores)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return metrics.regression(
            self.predict(model, self._selection, self._evaluated), self._selection_targets[self._evaluated]
        )

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out sequences, beside the constant that is the mean of the training targets.

        `rewritten` holds the figures of the sequences that are not untouched: those alone are harder to tell apart.
        """
        target = self.held_out_targets
        predicted = self.predict(model, self.held_out, np.arange(self.held_out.count))
        constant = float(self.train_targets.mean())
        squared, base = metrics.sum_by(self._groups, (predicted - target) ** 2, (constant - target) ** 2)
        count = metrics.sum_by(self._groups, np.ones_like(target))[0]
        values: dict[str, Any] = metrics.regression(predicted, target)
        values |= {"constant_mse": float(base.sum() / count.sum())}
        values["reliability"] = metrics.reliability(predicted, target)
        untouched = target == target.max()
        if 0 < untouched.sum() < len(target):
            values["auroc_untouched"] = metrics.auroc(predicted, untouched)
            values["rewritten"] = metrics.regression(predicted[~untouched], target[~untouched])
        values |= self._least_error()
        mse = metrics.ratio(squared, count)
        row = result_row(self.label, "MSE", mse, "constant", values["constant_mse"], lower_is_better=True)
        if not np.ptp(target):
            return values, [row]  # nothing to explain: R2 is undefined
        r2 = metrics.r2_estimate(predicted, target, self._groups)
        baseline, value = "constant", 0.0
        if self.confidence is not None:
            values["confidence"] = self._of_confidence(untouched)
            baseline, value = "mean confidence", values["confidence"]["r2"]
        return values, [row, result_row(self.label, "R2", r2, baseline, value, lower_is_better=False)]

    def _of_confidence(self, untouched: np.ndarray) -> dict[str, float]:
        """How well the generator's mean log-probability of a sequence's tokens tells its target.

        As a rising function, learned on one half of the groups and measured on the other.
        """
        assert self.confidence is not None
        mean = np.array([row.mean() for row in self.confidence])
        half = np.unique(self._groups, return_inverse=True)[1] % 2
        predicted = np.full(len(mean), self.held_out_targets.mean())
        if len(np.unique(half)) == 2:
            for fold in (0, 1):
                known = half != fold
                model = IsotonicRegression(out_of_bounds="clip").fit(
                    mean[known], self.held_out_targets[known]
                )
                predicted[half == fold] = model.predict(mean[half == fold])
        found = metrics.regression(predicted, self.held_out_targets)
        ranks = metrics.regression(mean, self.held_out_targets)
        values = {"mse": found["mse"], "r2": found["r2"], "spearman": ranks["spearman"]}
        if 0 < untouched.sum() < len(mean):
            values["auroc_untouched"] = metrics.auroc(mean, untouched)
        return values

    def _least_error(self) -> dict[str, float]:
        """MSE of one who knows which tokens differ from the original, and the R² that this is.

        Synthetic tokens that came out as the original ones count in the target and leave no trace in the text. What
        such a one would say is learned on the training sequences, as a rising or falling function.
        """
        if self.changed is None:
            return {}
        train, held_out = self.changed
        rising = bool(np.corrcoef(train, self.train_targets)[0, 1] > 0) if np.ptp(train) else True
        model = IsotonicRegression(increasing=rising, out_of_bounds="clip").fit(train, self.train_targets)
        error = float(((model.predict(held_out) - self.held_out_targets) ** 2).mean())
        spread = float(self.held_out_targets.var())
        best = 1 - error / spread if spread else 0.0
        say(
            f"{self.label}: who knew which tokens differ from the original would reach MSE {error:.4f}, R2 {best:.3f}"
        )
        return {"irreducible_mse": error, "best_r2": best}


class SequenceClasses(SequenceScore):
    """Cross-entropy over N classes per sequence; targets are class numbers. There is no baseline of confidence."""

    selection = "cross_entropy"

    def __init__(self, *args, num_classes: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_classes = num_classes

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        ids, valid, targets = self._batch(rows)
        logits = forward(model, self.runtime, ids, valid).logits.float()  # (B, C)
        return {"loss": F.cross_entropy(logits, tensor(targets.astype(np.int64), self.runtime))}

    def predict(self, model: nn.Module, sequences: Sequences, rows: np.ndarray) -> np.ndarray:
        """(R, C) log-probabilities."""
        scores = []
        for part in chunks(len(rows), 64):
            ids, valid = with_cls(*sequences.batch(rows[part]), self.cls_id)
            logits = forward(model, self.runtime, ids, valid).logits.float()
            scores.append(torch.log_softmax(logits, -1).cpu().numpy())
        return np.concatenate(scores)

    def _scores(
        self, model: nn.Module, sequences: Sequences, targets: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, dict]:
        target = targets[rows].astype(np.int64)
        scores = self.predict(model, sequences, rows)
        pairs = target * self.num_classes + scores.argmax(1)
        confusion = np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, -1)
        ce = -scores[np.arange(len(target)), target]
        return ce, {"cross_entropy": float(ce.mean()), **metrics.classification(confusion)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self._scores(model, self._selection, self._selection_targets, self._evaluated)[1]

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        rows = np.arange(self.held_out.count)
        ce, values = self._scores(model, self.held_out, self.held_out_targets, rows)
        share = (
            np.bincount(self.train_targets.astype(np.int64), minlength=self.num_classes) / self.train.count
        )
        prior = -np.log(np.maximum(share, 1e-9))[self.held_out_targets.astype(np.int64)]
        total, base, count = metrics.sum_by(self._groups, ce, prior, np.ones_like(ce))
        constant = float(base.sum() / count.sum())
        estimate = metrics.ratio(total, count)
        return values, [
            result_row(
                self.label, "cross-entropy, nats", estimate, "class shares", constant, lower_is_better=True
            )
        ]
