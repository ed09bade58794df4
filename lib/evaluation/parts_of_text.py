"""Which parts of a document are synthetic: word-level F1, and the place where a text turns from human to machine.

Everything is compared with likelihoods under an autoregressive model, and with an answer that reads no text.

Legend: D documents, W windows, N words.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib import metrics
from lib.detection import Calibration, Scored, best_f1_threshold, change_point, f1_estimate
from lib.evaluation.labelled_documents import LabelledDocuments

_WORD = re.compile(r"\S+")
Offsets = Callable[[list[str]], list[np.ndarray]]  # texts -> (T, 2) characters of each token


@dataclass(frozen=True)
class LabelledTokens:
    """The tokens of a document, in order.

    Attributes:
        text: of the document.
        bounds: (T, 2) first character and end of each token in it.
        labelled: (T,) bool, whether a span covers the token; suspicion: (T,) in [0, 1] or nats.
    """

    text: str
    bounds: np.ndarray
    labelled: np.ndarray
    suspicion: np.ndarray

    def by_character(self, values: np.ndarray) -> np.ndarray:
        """(characters,) values from (T,) values; characters of no token take the value of the next one."""
        if not len(values):
            return np.zeros(len(self.text))
        at = np.searchsorted(self.bounds[:, 1], np.arange(len(self.text)), side="right")
        return values[np.minimum(at, len(values) - 1)].astype(np.float64)

    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """((N,) mean suspicion of the characters of each word, (N,) bool: most of its characters are labelled)."""
        spans = np.array([match.span() for match in _WORD.finditer(self.text)], np.int64).reshape(-1, 2)
        sizes = spans[:, 1] - spans[:, 0]
        means = []
        for values in (self.suspicion, self.labelled):
            sums = np.append(0.0, np.cumsum(self.by_character(values)))
            means.append((sums[spans[:, 1]] - sums[spans[:, 0]]) / np.maximum(sizes, 1))
        return means[0], means[1] > 0.5

    def turn(self) -> int | None:
        """The character at which the text turns from human to machine; None if it does not turn exactly once, that way."""
        seen = np.flatnonzero([bool(self.text[start:end].strip()) for start, end in self.bounds])
        labelled = self.labelled[seen]  # white space belongs to neither side: spans often leave it out
        changes = np.flatnonzero(np.diff(labelled.astype(np.int8)))
        if len(changes) != 1 or not labelled[-1]:
            return None
        return int(self.bounds[seen[changes[0] + 1], 0])

    def predicted_turn(self, calibration: Calibration | None) -> int:
        """The most likely character of that turn; see `change_point`."""
        shares = self.suspicion if calibration is None else calibration(self.suspicion)
        at = change_point(shares)
        return int(self.bounds[at, 0]) if at < len(self.bounds) else len(self.text)


def tokens_of(
    documents: LabelledDocuments, suspicion: list[np.ndarray], offsets: Offsets
) -> Iterator[LabelledTokens]:
    """The tokens of every document. `suspicion`: (W,) arrays of tokens."""
    bounds = offsets(documents.texts)
    for number in range(len(documents)):
        windows, start, found = documents.of_document(number), 0, []
        for window in windows:
            start += len(documents.gap(window))
            found.append(bounds[window] + start)
            start += len(documents.texts[window])
        classes = np.concatenate([documents.classes[w] for w in windows]) > 0
        scores = np.concatenate([suspicion[w] for w in windows])
        yield LabelledTokens(documents.whole_texts[number], np.concatenate(found), classes, scores)


def measure_parts(
    chosen: LabelledDocuments,
    reported: LabelledDocuments,
    detectors: dict[str, tuple[list[np.ndarray], list[np.ndarray]]],
    offsets: Offsets,
) -> dict[str, Any]:
    """F1 of words and errors of turns in characters, for detectors of tokens and for answers that read no text.

    Thresholds and calibrations are chosen on the documents `chosen`.

    Args:
        detectors: name -> suspicions of the tokens of both sets of documents. Those of "log-likelihood" are nats.

    Returns:
        {"words": {name: F1}, "turns": {name: mean error}, "median_turn_error": {name: ...}, "num_turns": ...}
    """
    words: dict[str, Any] = {}
    turns: dict[str, Any] = {}
    medians: dict[str, float] = {}
    count = 0
    for name, (on_chosen, on_reported) in detectors.items():
        first, second = (
            list(tokens_of(documents, scores, offsets))
            for documents, scores in ((chosen, on_chosen), (reported, on_reported))
        )
        calibration = _calibration(first) if name == "log-likelihood" else None
        sign = -1.0 if calibration is not None and calibration.slope < 0 else 1.0
        score, labelled, _ = _words(first, chosen.groups, sign)
        threshold = best_f1_threshold(score, labelled)
        score, labelled, groups = _words(second, reported.groups, sign)
        words[name] = f1_estimate(score >= threshold, labelled, groups)._asdict()
        words.setdefault("every word", f1_estimate(np.ones(len(labelled), bool), labelled, groups)._asdict())
        turning = [
            (t, turn, g)
            for t, g in zip(second, reported.groups, strict=True)
            if (turn := t.turn()) is not None
        ]
        if not turning:
            continue
        count, of = len(turning), np.array([group for *_, group in turning])
        middle = _median_share(first)
        for answer, found in (
            (name, [t.predicted_turn(calibration) for t, *_ in turning]),
            ("constant share of the text", [middle * len(t.text) for t, *_ in turning]),
        ):
            errors = np.abs(np.array(found, np.float64) - np.array([turn for _, turn, _ in turning]))
            sums, counts = metrics.sum_by(of, errors, np.ones(count))
            turns[answer] = metrics.ratio(sums, counts)._asdict()
            medians[answer] = float(np.median(errors))
    return {"words": words, "turns": turns, "median_turn_error": medians, "num_turns": count}


def _words(
    documents: list[LabelledTokens], groups: np.ndarray, sign: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((N,) suspicion, (N,) bool labelled, (N,) group) of all words."""
    found = [document.words() for document in documents]
    score, labelled = (np.concatenate(column) for column in zip(*found, strict=True))
    return sign * score, labelled, np.repeat(groups, [len(scores) for scores, _ in found])


def _calibration(documents: list[LabelledTokens]) -> Calibration:
    """From the nats of a token to the probability that it is labelled."""
    scores, labelled = (
        np.concatenate([getattr(d, name) for d in documents]) for name in ("suspicion", "labelled")
    )
    return Calibration.fit(Scored(scores, labelled, np.zeros(len(scores))))


def _median_share(documents: list[LabelledTokens]) -> float:
    """The median share of a text before its turn; one half if no text turns."""
    shares = [turn / len(d.text) for d in documents if (turn := d.turn()) is not None]
    return float(np.median(shares)) if shares else 0.5
