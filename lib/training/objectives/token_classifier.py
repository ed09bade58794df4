"""`token_classifier`: a class for every token, such as original, random replacement or predicted."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import metrics, randomness
from lib.runtime import Runtime
from lib.training.data import Rows, Sequences
from lib.training.objectives.base import ResultRow, chunks, forward, result_row, tensor

FreshLabels = Callable[[range], tuple[np.ndarray, np.ndarray, np.ndarray]]


class TokenClasses:
    """Cross-entropy per token.

    Args:
        train, selection, held_out: sequences to learn from, to choose the best step by, and to report on.
        train_labels, selection_labels, held_out_labels: `Sequences` over the classes, aligned with the ids.
        groups: (held-out rows,) what is resampled together.
        num_classes: at least 2.
        class_weighting: none; inverse_frequency (over the training set); dynamic (over each batch).
        confidence: log-probabilities of each held-out sequence's tokens under the masked LM that wrote: the baseline.
        fresh: rows of the training -> (B, T) ids, validity and labels, in place of `train`.
    """

    selection = "cross_entropy"

    def __init__(self, label, train, train_labels, selection, selection_labels, held_out, held_out_labels, groups,
                 num_classes: int, class_weighting: str, runtime: Runtime, seed: int, num_evaluated: int,
                 confidence: list[np.ndarray] | None = None, fresh: FreshLabels | None = None):  # fmt: skip
        self.confidence, self.fresh = confidence, fresh
        self.label, self.runtime, self.seed, self.num_classes = label, runtime, seed, num_classes
        self.train: Sequences = train
        self.train_labels: Sequences = train_labels
        self._selection: tuple[Sequences, Sequences] = (selection, selection_labels)
        self._held_out: tuple[Sequences, Sequences] = (held_out, held_out_labels)
        self._groups = groups
        self._order = Rows(seed, f"{label} order", train.count)
        spread = randomness.permutation(seed, "selection candidates", 0, selection.count)
        self._evaluated = np.sort(spread[:num_evaluated])
        self.weighting = class_weighting
        self.frequencies = np.bincount(train_labels.ids, minlength=num_classes) / max(
            len(train_labels.ids), 1
        )
        self.tokens_per_row = train.width

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        if self.fresh is not None:
            ids, valid, labels = self.fresh(rows)
        else:
            samples = self._order.samples(np.arange(rows.start, rows.stop))
            (ids, valid), (labels, _) = self.train.batch(samples), self.train_labels.batch(samples)
        logits = (
            forward(model, self.runtime, ids, valid).logits[tensor(valid, self.runtime)].float()
        )  # (N, C)
        target = labels[valid]
        weight = self._class_weights(target)
        return {"loss": F.cross_entropy(logits, tensor(target, self.runtime), weight=weight)}

    def _class_weights(self, target: np.ndarray) -> Tensor | None:
        """(C,) weights with mean 1 over the tokens; absent classes weigh nothing."""
        if self.weighting == "none":
            return None
        share = self.frequencies
        if self.weighting == "dynamic":
            share = np.bincount(target, minlength=self.num_classes) / len(target)
        present = share > 0
        weight = np.where(present, 1.0 / np.maximum(share, 1e-12), 0.0) / present.sum()
        return tensor(weight.astype(np.float32), self.runtime)

    def _predict(self, model: nn.Module, split: tuple[Sequences, Sequences], rows: np.ndarray):
        """Over `rows` of a split: (N, C) log-probabilities, (N,) classes, (N,) row numbers, for valid tokens."""
        sequences, labels_of = split
        scores, classes, owners = [], [], []
        for part in chunks(len(rows), 64):
            ids, valid = sequences.batch(rows[part])
            labels, _ = labels_of.batch(rows[part])
            logits = forward(model, self.runtime, ids, valid).logits.float()
            scores.append(torch.log_softmax(logits, -1).cpu().numpy()[valid])
            classes.append(labels[valid])
            owners.append(np.broadcast_to(rows[part][:, None], valid.shape)[valid])
        return np.concatenate(scores), np.concatenate(classes), np.concatenate(owners)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        scores, classes, _ = self._predict(model, self._selection, self._evaluated)
        ce = -scores[np.arange(len(classes)), classes].mean()
        return {"cross_entropy": float(ce), **metrics.classification(self._confusion(scores, classes))}

    def _confusion(self, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
        pairs = classes * self.num_classes + scores.argmax(1)
        return np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out candidates: per class scores, the confusion table, AUROC of "not original"."""
        scores, classes, owners = self._predict(model, self._held_out, np.arange(self._held_out[0].count))
        confusion = self._confusion(scores, classes)
        ce = -scores[np.arange(len(classes)), classes]
        prior = -np.log(np.maximum(self.frequencies, 1e-9))[classes]
        # The number of predicted tokens alone may be what a classifier knows; the constant knows the class shares.
        total, base, count = metrics.sum_by(self._groups[owners], ce, prior, np.ones_like(ce))
        changed, suspicion = classes > 0, 1 - np.exp(scores[:, 0])
        constant = float(base.sum() / count.sum())
        values = {
            "cross_entropy": float(ce.mean()),
            "constant_cross_entropy": constant,
            "confusion": confusion.tolist(),
            **metrics.classification(confusion),
        }
        rows = [
            result_row(self.label, "cross-entropy, nats/token", metrics.ratio(total, count), "class shares", constant,
                       lower_is_better=True)
        ]  # fmt: skip
        if changed.all() or not changed.any():
            return values, rows  # there is nothing to tell apart
        found = metrics.auroc_estimate(suspicion, changed, self._groups[owners])
        values["auroc_changed"] = found.value
        baseline, value = "chance", 0.5
        if self.confidence is not None:
            doubt = -np.concatenate(self.confidence)
            baseline, value = "generator's confidence", metrics.auroc(doubt, changed)
            values["auroc_changed_of_confidence"] = value
        rows.append(
            result_row(self.label, "AUROC, changed tokens", found, baseline, value, lower_is_better=False)
        )
        return values, rows
