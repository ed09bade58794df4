"""`token_classifier`: a class for every token of a candidate, such as original, random replacement or predicted.

Legend: B rows, T positions, N valid tokens, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import metrics, randomness
from lib.engine.parts import Part
from lib.errors import BadConfig
from lib.sections.models import ModelSpec
from lib.training.data import Rows, Sequences
from lib.training.objectives.base import (
    ResultRow,
    TrainingContext,
    chunks,
    evaluation_rows,
    forward,
    result_row,
    some_of,
    tensor,
)
from lib.training.objectives.candidates import CandidateSplits, Stream, whole_sequences
from lib.training.stage_inputs import StageInputs

EVALUATION_BATCH = 64
MAX_REPORTED = (
    2**16
)  # held-out candidates that a report reads; the log-probabilities of their tokens are held in memory


@dataclass(frozen=True)
class LabelledTokens:
    """Sequences and the classes of their tokens, aligned."""

    sequences: Sequences
    labels: Sequences


def token_classifier_objective(
    context: TrainingContext, spec: ModelSpec, stage_inputs: StageInputs, context_length: int
) -> "TokenClasses":
    """The objective over the candidates of the run.

    Raises BadData for a candidate longer than `context_length`, BadConfig for a label outside `num_classes`.
    """
    read = whole_sequences(context.label, context_length, stage_inputs)

    def labelled(table: pa.Table) -> LabelledTokens:
        return LabelledTokens(read(table), Sequences(table["token_labels"], context_length, 0))

    splits = CandidateSplits.of(stage_inputs.candidate_splits(spec.split), labelled)
    labels = [split.labels.ids for split in (splits.train, splits.selection, splits.held_out)]
    highest = max(int(ids.max()) for ids in labels if len(ids))
    if highest >= spec.num_classes:
        raise BadConfig(
            f"models.{context.label}.num_classes is {spec.num_classes}, but the token labels go up to {highest}; "
            f"set it to at least {highest + 1}"
        )
    shards = stage_inputs.open_stream(context.label) if spec.split == "train" else None

    def stream(rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert shards is not None
        batch = labelled(shards.rows(rows))
        every = np.arange(batch.sequences.count)
        return *batch.sequences.batch(every), batch.labels.batch(every)[0]

    source = None if shards is None else stream
    return TokenClasses(context, splits, spec.num_classes, spec.class_weighting, source)


class TokenClasses:
    """Cross-entropy per token.

    Args:
        num_classes: C, at least 2. Class 0 is the unchanged token.
        class_weighting: `none`, `inverse_frequency` (over the train split) or `dynamic` (over each batch).
        stream: rows of the training from shards, in place of the train split.
    """

    selection = "cross_entropy"
    draws_ahead = True

    def __init__(
        self,
        context: TrainingContext,
        splits: CandidateSplits[LabelledTokens],
        num_classes: int,
        class_weighting: str,
        stream: Stream | None = None,
    ):
        self.label, self.seed, self.runtime = context.label, context.seed, context.runtime
        self.splits, self.num_classes, self.weighting, self.stream = (
            splits,
            num_classes,
            class_weighting,
            stream,
        )
        train = splits.train
        self._order = Rows(context.seed, f"{context.label} order", train.sequences.count)
        count = splits.selection.sequences.count
        shuffled = randomness.permutation(context.seed, "selection candidates", 0, count)
        self.evaluated = np.sort(shuffled[: context.settings.evaluation_examples])
        counts = np.bincount(train.labels.ids, minlength=num_classes)
        self.frequencies = counts / max(len(train.labels.ids), 1)  # (C,)
        self.tokens_per_row = train.sequences.width

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The weighted mean cross-entropy of the batch's tokens."""
        if self.stream is not None:
            ids, valid, labels = self.stream(rows)
        else:
            samples = self._order.samples(np.arange(rows.start, rows.stop))
            ids, valid = self.splits.train.sequences.batch(samples)  # (B, T) each
            labels, _ = self.splits.train.labels.batch(samples)  # (B, T)
        targets = labels[valid]  # (N,)
        counts = np.bincount(targets, minlength=self.num_classes)  # (C,)

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            logits = forward(model, self.runtime, ids, valid).logits  # (B, T, C)
            logits = logits[tensor(valid, self.runtime)].float()  # (N, C)
            batch_counts = np.array([totals[f"class {c}"] for c in range(self.num_classes)])
            weight = self._class_weights(batch_counts)  # (C,)
            total = F.cross_entropy(
                logits, tensor(targets, self.runtime), weight=tensor(weight, self.runtime), reduction="sum"
            )
            return {"loss": total / float((weight.astype(np.float64) * batch_counts).sum())}

        return Part({f"class {c}": int(n) for c, n in enumerate(counts)}, losses)

    def _class_weights(self, counts: np.ndarray) -> np.ndarray:
        """(C,) float32 weights with mean 1 over the tokens; the weight of an absent class is 0.

        `counts`: (C,) tokens of each class in the global batch, for `dynamic` weights.
        """
        if self.weighting == "none":
            return np.ones(self.num_classes, np.float32)
        share = self.frequencies if self.weighting == "inverse_frequency" else counts / counts.sum()
        present = share > 0
        weight = np.where(present, 1.0 / np.maximum(share, 1e-12), 0.0) / present.sum()
        return weight.astype(np.float32)

    def _predict(
        self, model: nn.Module, split: LabelledTokens, samples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """((N, C) log-probabilities, (N,) classes, (N,) sample indices) of the valid tokens of some samples."""

        def predict(part: np.ndarray) -> tuple[np.ndarray, ...]:
            ids, valid = split.sequences.batch(samples[part])
            labels, _ = split.labels.batch(samples[part])
            logits = forward(model, self.runtime, ids, valid).logits.float()
            scores = torch.log_softmax(logits, -1).cpu().numpy()[valid]
            return scores, labels[valid], np.broadcast_to(samples[part][:, None], valid.shape)[valid]

        found = self.runtime.processes.share(
            predict, list(chunks(len(samples), evaluation_rows(EVALUATION_BATCH, split.sequences.width)))
        )
        scores, classes, owners = zip(*found, strict=True)
        return np.concatenate(scores), np.concatenate(classes), np.concatenate(owners)

    def _confusion(self, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """(C, C) counts: row the true class, column the predicted one."""
        pairs = classes * self.num_classes + scores.argmax(1)
        return np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        scores, classes, _ = self._predict(model, self.splits.selection, self.evaluated)
        ce = -scores[np.arange(len(classes)), classes].mean()
        return {"cross_entropy": float(ce), **metrics.classification(self._confusion(scores, classes))}

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out candidates: scores per class, the confusion matrix, AUROC of "not original".

        Of more than `MAX_REPORTED` candidates, a random sample.
        """
        held_out, groups = self.splits.held_out, np.unique(self.splits.groups, return_inverse=True)[1]
        some = some_of(self.seed, self.label, "held-out candidates", held_out.sequences.count, MAX_REPORTED)
        scores, classes, owners = self._predict(model, held_out, some)
        confusion = self._confusion(scores, classes)
        ce = -scores[np.arange(len(classes)), classes]
        # The baseline predicts the class frequencies of the train split
        prior = -np.log(np.maximum(self.frequencies, 1e-9))[classes]
        total, base, count = metrics.sum_by(groups[owners], ce, prior, np.ones_like(ce))
        constant = float(base.sum() / count.sum())
        values = {
            "cross_entropy": float(ce.mean()),
            "constant_cross_entropy": constant,
            "confusion": confusion.tolist(),
            **metrics.classification(confusion),
        }
        estimate, name = metrics.ratio(total, count), "cross-entropy, nats/token"
        row = result_row(self.label, name, estimate, "class shares", constant, lower_is_better=True)
        rows = [row.with_difference(metrics.ratio(total - base, count))]
        changed, suspicion = classes > 0, 1 - np.exp(scores[:, 0])
        if changed.all() or not changed.any():
            return values, rows  # AUROC is undefined
        auroc = metrics.auroc_estimate(suspicion, changed, groups[owners])
        values["auroc_changed"] = auroc.value
        baseline, value, paired = "chance", 0.5, None
        if self.splits.confidence is not None:
            doubt = -np.concatenate([self.splits.confidence[i] for i in some])
            baseline, value = "generator's confidence", metrics.auroc(doubt, changed)
            values["auroc_changed_of_confidence"] = value
            paired = metrics.auroc_estimate(suspicion, changed, groups[owners], doubt)
        name = "AUROC, changed tokens"
        row = result_row(self.label, name, auroc, baseline, value, lower_is_better=False)
        rows.append(row.with_difference(paired))
        return values, rows
