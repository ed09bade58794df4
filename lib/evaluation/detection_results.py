"""How well a run detects synthetic documents: the judge beside other detectors, on the same documents.

The selection split chooses thresholds, calibrations, signs and the strength of regularisation. The held-out split is measured.
"""

from functools import partial
from typing import Any

import numpy as np

from lib import metrics
from lib.detection import Scored, choose_join, measure
from lib.evaluation import detectors
from lib.evaluation.labelled_documents import LabelledDocuments, read_documents
from lib.evaluation.parts_of_text import measure_parts
from lib.evaluation.run_models import RunModels
from lib.log import Progress, say
from lib.tokenization import TEXTS_AT_A_TIME

LIMITS = {"train": 20_000, "selection": 4_000, "held_out": 4_000}  # documents that are read
JUDGE, WORDS = "judge", "TF-IDF, words"
STEPS = 7


def detection_results(evaluator: RunModels) -> dict[str, Any] | None:
    """The figures of all detectors; None if documents of one kind are missing in a split, which a line says.

    Returns:
        detectors: name -> figures of `lib.detection.measure`.
        differences: name -> AUROC of the judge minus that of the detector, with its interval.
        join: how the judge's windows are joined; windows: the judge's figures window by window.
        parts: figures of `measure_parts`, if the run has labelled spans.
    """
    with Progress("detectors", STEPS) as progress:
        work = _Detection(evaluator, progress)
        if problem := work.problem():
            say(f"detection is not measured: {problem}")
            return None
        return work.results()


class _Detection:
    """The documents of three splits, and what the models say about them."""

    def __init__(self, evaluator: RunModels, progress: Progress):
        self.evaluator, self.progress, self.done = evaluator, progress, 0
        self.train, self.chosen, self.reported = (
            read_documents(evaluator.stage, evaluator.config, split, limit) for split, limit in LIMITS.items()
        )
        self.suspicions: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def problem(self) -> str:
        """Why nothing can be measured; empty if it can."""
        for split, documents in zip(LIMITS, (self.train, self.chosen, self.reported), strict=True):
            for kind, number in (
                ("original", (~documents.synthetic).sum()),
                ("synthetic", documents.synthetic.sum()),
            ):
                if not number:
                    return f"the split {split} has no {kind} documents"
        return ""

    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.evaluator.judge is not None:
            found |= self._judge()
        self._step()
        for name, analyzer in ((WORDS, "word"), ("TF-IDF, characters", "char")):
            self.suspicions[name] = detectors.bag_of_words(self.train, self.chosen, self.reported, analyzer)
            self._step()
        self._add_with_sign("length", detectors.lengths(self.chosen), detectors.lengths(self.reported))
        of_tokens = self._likelihoods()
        self._step()
        if self.evaluator.inspector is not None:
            of_tokens = {"inspector": self._of_inspector()} | of_tokens
        self._step()
        found["detectors"] = {name: measure(*self._scored(*both)) for name, both in self.suspicions.items()}
        if JUDGE in self.suspicions:
            found["differences"] = {name: self._difference(name) for name in self.suspicions if name != JUDGE}
        self._step()
        if self.evaluator.config.data.spans_key is not None and of_tokens:
            found["parts"] = measure_parts(
                self.chosen, self.reported, of_tokens, partial(offsets_of, self.evaluator.tokenizer)
            )
        self._step()
        return found

    def _step(self) -> None:
        self.done += 1
        self.progress.update(self.done)

    def _scored(self, on_chosen: np.ndarray, on_reported: np.ndarray) -> tuple[Scored, Scored]:
        pairs = ((self.chosen, on_chosen), (self.reported, on_reported))
        first, second = (Scored(scores, d.synthetic, d.groups) for d, scores in pairs)
        return first, second

    def _judge(self) -> dict[str, Any]:
        """Adds the judge. Returns how its windows are joined, and its figures window by window."""
        evaluator = self.evaluator
        read = partial(
            detectors.judge_suspicion, evaluator.judge, evaluator.runtime, tokenizer=evaluator.tokenizer
        )
        on_chosen, on_reported = read(self.chosen), read(self.reported)
        how = evaluator.judge_figures.get("join") or choose_join(
            self.chosen.windows, on_chosen, self.chosen.synthetic
        )
        joined = (
            detectors.joined_judge(documents, scores, how)
            for documents, scores in ((self.chosen, on_chosen), (self.reported, on_reported))
        )
        self.suspicions[JUDGE] = next(joined), next(joined)
        windows = measure(_window_scores(self.chosen, on_chosen), _window_scores(self.reported, on_reported))
        return {"join": how, "windows": windows}

    def _likelihoods(self) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
        """Adds the detectors by likelihood. Returns the nats of all tokens."""
        evaluator = self.evaluator
        models = [m for m in (evaluator.autoregressive, evaluator.reference) if m is not None]
        if not models:
            return {}
        observer = models[1] if len(models) > 1 else None
        first, second = (
            detectors.likelihoods(models[0], observer, evaluator.runtime, documents, evaluator.tokenizer)
            for documents in (self.chosen, self.reported)
        )
        on_chosen, on_reported = first.detectors(self.chosen), second.detectors(self.reported)
        for name, scores in on_chosen.items():
            self._add_with_sign(name, scores, on_reported[name])
        return {"log-likelihood": (first.nll, second.nll)}

    def _of_inspector(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Adds the inspector's mean over the tokens of a document. Returns the suspicions of all tokens."""
        evaluator = self.evaluator
        first, second = (
            detectors.inspector_suspicion(
                evaluator.inspector, evaluator.runtime, documents, evaluator.tokenizer
            )
            for documents in (self.chosen, self.reported)
        )
        means = (
            detectors.joined_judge(d, np.array([s.mean() if len(s) else 0.0 for s in scores]), "mean")
            for d, scores in ((self.chosen, first), (self.reported, second))
        )
        self.suspicions["inspector"] = next(means), next(means)
        return first, second

    def _add_with_sign(self, name: str, on_chosen: np.ndarray, on_reported: np.ndarray) -> None:
        self.suspicions[name] = detectors.with_sign(on_chosen, on_reported, self.chosen.synthetic)

    def _difference(self, name: str) -> dict[str, float]:
        """AUROC of the judge minus that of another detector."""
        ours, other = (self.suspicions[n][1] for n in (JUDGE, name))
        return metrics.auroc_estimate(ours, self.reported.synthetic, self.reported.groups, other)._asdict()


def _window_scores(documents: LabelledDocuments, suspicion: np.ndarray) -> Scored:
    """Each window as a text of its own, with the label of its document."""
    of = documents.document
    return Scored(detectors.log_odds(suspicion), documents.synthetic[of], documents.groups[of])


def offsets_of(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """(T, 2) first character and end of each token, for each text."""
    found: list[np.ndarray] = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        coded = tokenizer(
            texts[start : start + TEXTS_AT_A_TIME],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        found += [np.asarray(pairs, np.int64).reshape(-1, 2) for pairs in coded["offset_mapping"]]
    return found
