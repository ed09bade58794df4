"""`sequence_scorer`: one score in [0, 1] per candidate, or one of C classes, read at [CLS].

Legend: B rows, T positions, R sequences, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn

from lib import detection, metrics, randomness
from lib.config import Config
from lib.detection import Windows
from lib.engine.parts import Part
from lib.log import say
from lib.sections.models import ModelSpec
from lib.training.data import Rows, Sequences
from lib.training.objectives.base import (
    ResultRow,
    TrainingContext,
    chunks,
    evaluation_rows,
    forward,
    result_row,
    tensor,
    with_cls,
)
from lib.training.objectives.candidates import CandidateSplits, Stream, whole_sequences
from lib.training.stage_inputs import StageInputs

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class ScoredSequences:
    """R sequences with their targets.

    Attributes:
        targets: (R,) in [0, 1], or class numbers.
        changed_fraction: (R,) share of tokens that differ from the original; None if it is not known, or not used.
        windows: the document of each sequence; None if there are no documents to report on.
        synthetic: (R,) bool, whether the sequence is labelled as anything but original; None as for `windows`.
    """

    sequences: Sequences
    targets: np.ndarray
    changed_fraction: np.ndarray | None = None
    windows: Windows | None = None
    synthetic: np.ndarray | None = None


def sequence_scorer_objective(
    context: TrainingContext, spec: ModelSpec, stage_inputs: StageInputs, context_length: int
) -> "SequenceScore":
    """The objective over the candidates of the run. Raises BadData for a candidate longer than `context_length`."""
    read = whole_sequences(context.label, context_length, stage_inputs)
    tables = stage_inputs.candidate_splits(spec.split)
    classify = spec.target_type == "classification"
    # Rewards of the user's own labels say nothing about changed tokens
    known = not stage_inputs.config.has_own_labels and not any(
        table["changed_fraction"].null_count for table in (tables.train, tables.held_out)
    )

    def targets_of(table: pa.Table) -> np.ndarray:
        rewards = table["reward"].to_numpy()
        if classify and stage_inputs.config.data.label_classes is not None:
            return table["term_class"].to_numpy().astype(np.int64)
        return reward_classes(rewards, spec.num_classes) if classify else rewards

    def scored(table: pa.Table) -> ScoredSequences:
        changed = table["changed_fraction"].to_numpy() if known and not classify else None
        targets = targets_of(table)
        if classify and stage_inputs.config.data.label_classes is None:
            return ScoredSequences(
                read(table), targets
            )  # bands of a score: none of them is the original text
        synthetic = targets != 0 if classify else targets < 1
        return ScoredSequences(
            read(table), targets, changed, documents_of(table, stage_inputs.config), synthetic
        )

    splits = CandidateSplits.of(tables, scored)
    shards = stage_inputs.open_stream(context.label) if spec.split == "train" else None

    def stream(rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert shards is not None
        table = shards.rows(rows)
        return *read(table).batch(np.arange(table.num_rows)), targets_of(table)

    source = None if shards is None else stream
    cls_id = stage_inputs.tokenizer.cls_token_id
    if classify:
        return SequenceClasses(context, splits, cls_id, source, num_classes=spec.num_classes)
    return SequenceScore(context, splits, cls_id, source)


def documents_of(table: pa.Table, config: Config) -> Windows:
    """The documents of a table of candidates. Without labels beside the text, each candidate is a document of its own."""
    tokens = pc.list_value_length(table["token_ids"]).to_numpy()
    if not config.data.has_labels:
        return Windows(np.arange(len(tokens)), np.maximum(tokens, 1))
    names = pc.replace_substring_regex(table["example_id"], r":\d+$", "").combine_chunks()
    return Windows(names.dictionary_encode().indices.to_numpy().astype(np.int64), np.maximum(tokens, 1))


def reward_classes(rewards: np.ndarray, num_classes: int) -> np.ndarray:
    """Classes of rewards: equal bands of [0, 1], of which the last includes 1."""
    return np.minimum((rewards * num_classes).astype(np.int64), num_classes - 1)


class SequenceScore:
    """Mean squared error of a score in [0, 1]. The model's `logits` are the scores already.

    Args:
        cls_id: [CLS], put in front of every sequence.
        stream: rows of the training from shards, in place of the train split.
    """

    selection = "mse"
    draws_ahead = True

    def __init__(
        self,
        context: TrainingContext,
        splits: CandidateSplits[ScoredSequences],
        cls_id: int,
        stream: Stream | None = None,
    ):
        self.label, self.runtime = context.label, context.runtime
        self.splits, self.cls_id, self.stream = splits, cls_id, stream
        train = splits.train.sequences
        self._order = Rows(context.seed, f"{context.label} order", train.count)
        count = splits.selection.sequences.count
        shuffled = randomness.permutation(context.seed, "selection candidates", 0, count)
        self.evaluated = np.sort(shuffled[: context.settings.evaluation_examples])
        self.tokens_per_row = train.width + 1

    def _batch(self, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """((B, T + 1) ids and validity with [CLS] in front, (B,) targets) of global training rows."""
        if self.stream is not None:
            ids, valid, targets = self.stream(rows)
        else:
            samples = self._order.samples(np.arange(rows.start, rows.stop))
            ids, valid = self.splits.train.sequences.batch(samples)
            targets = self.splits.train.targets[samples]
        return *with_cls(ids, valid, self.cls_id), targets

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The mean loss of the batch's sequences."""
        ids, valid, targets = self._batch(rows)

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            logits = forward(model, self.runtime, ids, valid).logits.float()
            return {"loss": self._mean_loss(logits, targets) * (len(targets) / totals["rows"])}

        return Part({"rows": len(targets)}, losses)

    def _mean_loss(self, logits: Tensor, targets: np.ndarray) -> Tensor:
        """The mean over (B, 1) logits and (B,) targets."""
        return F.mse_loss(logits.squeeze(-1), tensor(targets.astype(np.float32), self.runtime))

    def predict(self, model: nn.Module, sequences: Sequences, samples: np.ndarray) -> np.ndarray:
        """(R,) scores of some sequences; (R, C) log-probabilities of classes."""

        def score(part: np.ndarray) -> tuple[np.ndarray]:
            ids, valid = with_cls(*sequences.batch(samples[part]), self.cls_id)
            logits = forward(model, self.runtime, ids, valid).logits.float()
            return (self._scores(logits).cpu().numpy(),)

        found = self.runtime.processes.share(
            score, list(chunks(len(samples), evaluation_rows(EVALUATION_BATCH, sequences.width + 1)))
        )
        return np.concatenate([scores for (scores,) in found])

    def _scores(self, logits: Tensor) -> Tensor:
        """What `predict` gives for (B, 1) logits."""
        return logits.squeeze(-1)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        split = self.splits.selection
        return metrics.regression(
            self.predict(model, split.sequences, self.evaluated), split.targets[self.evaluated]
        )

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out sequences, against the mean of the training targets as a constant prediction.

        `rewritten` has the figures without the untouched sequences, which are the easiest to recognise. It is left out
        where it is not known which tokens were changed.
        """
        sequences, target, groups = (
            self.splits.held_out.sequences,
            self.splits.held_out.targets,
            self.splits.groups,
        )
        predicted = self.predict(model, sequences, np.arange(sequences.count))
        constant = float(self.splits.train.targets.mean())
        squared, base = metrics.sum_by(groups, (predicted - target) ** 2, (constant - target) ** 2)
        count = metrics.sum_by(groups, np.ones_like(target))[0]
        values: dict[str, Any] = metrics.regression(predicted, target)
        values |= {"constant_mse": float(base.sum() / count.sum())}
        values["reliability"] = metrics.reliability(predicted, target)
        # Rewards of the user's own labels do not say which texts are untouched
        untouched = (target == target.max()) & (self.splits.held_out.changed_fraction is not None)
        if 0 < untouched.sum() < len(target):
            values["auroc_untouched"] = metrics.auroc(predicted, untouched)
            values["rewritten"] = metrics.regression(predicted[~untouched], target[~untouched])
        values |= self._oracle_error()
        by_document, detected = self._report_documents(model, predicted)
        values |= by_document
        mse = metrics.ratio(squared, count)
        row = result_row(self.label, "MSE", mse, "constant", values["constant_mse"], lower_is_better=True)
        row = row.with_difference(metrics.ratio(squared - base, count))
        if not np.ptp(target):
            return values, [row, *detected]  # R2 is undefined
        r2 = metrics.r2_estimate(predicted, target, groups)
        baseline, value, paired = "constant", 0.0, None
        if self.splits.confidence is not None:
            mean = np.array([row.mean() for row in self.splits.confidence])
            by_confidence = self._predict_from_confidence(mean)
            values["confidence"] = self._confidence_baseline(mean, by_confidence, untouched)
            baseline, value = "mean confidence", values["confidence"]["r2"]
            paired = metrics.r2_estimate(predicted, target, groups, by_confidence)
        r2_row = result_row(self.label, "R2", r2, baseline, value, lower_is_better=False)
        return values, [row, r2_row.with_difference(paired), *detected]

    def _report_documents(
        self, model: nn.Module, predicted: np.ndarray
    ) -> tuple[dict[str, Any], list[ResultRow]]:
        """Held-out figures of whole documents: the metrics of joined predictions, and how well synthetic ones are detected.

        The selection split chooses how windows are joined, the thresholds and the calibration. `predicted`: what `predict`
        gives for all held-out sequences.
        """
        chosen, reported = self.splits.selection, self.splits.held_out
        if chosen.windows is None or reported.windows is None:
            return {}, []
        found = self.predict(model, chosen.sequences, np.arange(chosen.sequences.count))
        first = self._joined(chosen, found, detection.JOINS[0], None)
        how = detection.choose_join(chosen.windows, self._suspicion(found), first.synthetic)
        groups = self.splits.groups[reported.windows.first]
        on_selection, on_held_out = (
            self._joined(split, scores, how, names)
            for split, scores, names in ((chosen, found, None), (reported, predicted, groups))
        )
        values: dict[str, Any] = {"join": how}
        if len(reported.windows.first) < len(reported.windows.document):
            joined = reported.windows.join(self._probabilities(predicted), self._suspicion(predicted), how)
            target = reported.windows.join(reported.targets, reported.targets, "mean")
            values["documents"] = self._metrics(joined, target)
        if not on_held_out.has_both or on_selection.synthetic.all():
            return values, []
        values["detection"] = detection.measure(on_selection, on_held_out)
        rows = []
        for rates in values["detection"]["thresholds"]:
            name, estimate = f"TPR at {rates['target']:.0%} FPR", metrics.Estimate(**rates["tpr"])
            rows.append(
                result_row(self.label, name, estimate, "chance", rates["target"], lower_is_better=False)
            )
        return values, rows

    def _joined(
        self, split: ScoredSequences, scores: np.ndarray, how: str, groups: np.ndarray | None
    ) -> detection.Scored:
        """The documents of a split, with the log-odds that each is synthetic."""
        assert split.windows is not None and split.synthetic is not None
        suspicion = self._suspicion(scores)
        joined = detection.log_odds(split.windows.join(suspicion, suspicion, how))
        first = split.windows.first
        synthetic = np.logical_or.reduceat(split.synthetic, first)
        return detection.Scored(joined, synthetic, first if groups is None else groups)

    def _suspicion(self, scores: np.ndarray) -> np.ndarray:
        """(R,) in [0, 1]: how synthetic sequences are, from what `predict` gives."""
        return 1 - scores

    def _probabilities(self, scores: np.ndarray) -> np.ndarray:
        """What is averaged over the windows of a document."""
        return scores

    def _metrics(self, predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
        """Metrics of joined predictions."""
        return metrics.regression(predicted, target)

    def _predict_from_confidence(self, mean: np.ndarray) -> np.ndarray:
        """(N,) predictions of the held-out targets from the generator's (N,) mean log-probabilities of the sequences.

        They are an isotonic (rising) function, fitted on one half of the groups and applied to the other.
        """
        target = self.splits.held_out.targets
        half = np.unique(self.splits.groups, return_inverse=True)[1] % 2
        predicted = np.full(len(mean), target.mean())
        if len(np.unique(half)) == 2:
            for fold in (0, 1):
                other = half != fold
                model = IsotonicRegression(out_of_bounds="clip").fit(mean[other], target[other])
                predicted[half == fold] = model.predict(mean[half == fold])
        return predicted

    def _confidence_baseline(
        self, mean: np.ndarray, predicted: np.ndarray, untouched: np.ndarray
    ) -> dict[str, float]:
        """How well the generator's (N,) mean log-probabilities, and the predictions from them, fit the targets."""
        target = self.splits.held_out.targets
        found = metrics.regression(predicted, target)
        ranks = metrics.regression(mean, target)
        values = {"mse": found["mse"], "r2": found["r2"], "spearman": ranks["spearman"]}
        if 0 < untouched.sum() < len(mean):
            values["auroc_untouched"] = metrics.auroc(mean, untouched)
        return values

    def _oracle_error(self) -> dict[str, float]:
        """MSE and R2 of an oracle that knows which tokens differ from the original.

        It cannot see synthetic tokens that equal the original ones, but those count in the target. Its prediction is an
        isotonic function of the changed share (rising or falling), fitted on the training sequences.
        """
        train, held_out = self.splits.train, self.splits.held_out
        if train.changed_fraction is None or held_out.changed_fraction is None:
            return {}
        changed = train.changed_fraction
        rising = bool(np.corrcoef(changed, train.targets)[0, 1] > 0) if np.ptp(changed) else True
        model = IsotonicRegression(increasing=rising, out_of_bounds="clip").fit(changed, train.targets)
        error = float(((model.predict(held_out.changed_fraction) - held_out.targets) ** 2).mean())
        variance = float(held_out.targets.var())
        best = 1 - error / variance if variance else 0.0
        say(
            f"{self.label}: upper bound (oracle that knows the changed tokens): MSE {error:.4f}, R2 {best:.3f}"
        )
        return {"irreducible_mse": error, "best_r2": best}


class SequenceClasses(SequenceScore):
    """Cross-entropy over C classes per sequence. There is no confidence baseline."""

    selection = "cross_entropy"

    def __init__(self, *args, num_classes: int):
        super().__init__(*args)
        self.num_classes = num_classes

    def _mean_loss(self, logits: Tensor, targets: np.ndarray) -> Tensor:
        """The mean over (B, C) logits and (B,) classes."""
        return F.cross_entropy(logits, tensor(targets.astype(np.int64), self.runtime))

    def _scores(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1)

    def _class_metrics(self, scores: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """((R,) cross-entropies, metrics) of (R, C) log-probabilities."""
        pairs = target * self.num_classes + scores.argmax(1)
        confusion = np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, -1)
        ce = -scores[np.arange(len(target)), target]
        return ce, {"cross_entropy": float(ce.mean()), **metrics.classification(confusion)}

    def _suspicion(self, scores: np.ndarray) -> np.ndarray:
        """One minus the probability of the first class, which is original text."""
        return 1 - np.exp(scores[:, 0])

    def _probabilities(self, scores: np.ndarray) -> np.ndarray:
        return np.exp(scores)

    def _metrics(self, predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
        logs = np.log(np.maximum(predicted, 1e-9))
        return self._class_metrics(logs, np.rint(target).astype(np.int64))[1]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        split = self.splits.selection
        scores = self.predict(model, split.sequences, self.evaluated)
        return self._class_metrics(scores, split.targets[self.evaluated].astype(np.int64))[1]

    def report(self, model: nn.Module) -> tuple[dict, list[ResultRow]]:
        """All held-out sequences, against the class shares of the train split."""
        train, held_out = self.splits.train, self.splits.held_out
        scores = self.predict(model, held_out.sequences, np.arange(held_out.sequences.count))
        ce, figures = self._class_metrics(scores, held_out.targets.astype(np.int64))
        by_document, detected = self._report_documents(model, scores)
        values: dict[str, Any] = figures | by_document
        counts = np.bincount(train.targets.astype(np.int64), minlength=self.num_classes)
        share = counts / train.sequences.count
        prior = -np.log(np.maximum(share, 1e-9))[held_out.targets.astype(np.int64)]
        total, base, count = metrics.sum_by(self.splits.groups, ce, prior, np.ones_like(ce))
        estimate, constant = metrics.ratio(total, count), float(base.sum() / count.sum())
        name = "cross-entropy, nats"
        row = result_row(self.label, name, estimate, "class shares", constant, lower_is_better=True)
        return values, [row.with_difference(metrics.ratio(total - base, count)), *detected]
