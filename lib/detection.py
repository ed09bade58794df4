"""Decide whether texts are synthetic: windows joined to documents, thresholds at a fixed rate of false alarms, and their quality.

A detector gives each text a suspicion: the higher, the likelier it is synthetic. Everything that is chosen (how windows are
joined, the threshold, the calibration) is chosen on one set of texts, and measured on another.

The threshold for a false positive rate (FPR) is the split conformal quantile (Papadopoulos et al., 2002): of n original texts, the
k-th smallest suspicion with k = ceil((n + 1)(1 - FPR)). A new original text then exceeds it with a probability of at most FPR.
An AUROC hides false alarms; the true positive rate (TPR) at a fixed FPR does not.

Legend: W windows, D documents.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib import metrics

FPR_TARGETS = (0.01, 0.05)
JOINS = ("mean", "max", "first")
MAX_LOG_ODDS = 15.0


@dataclass(frozen=True)
class Windows:
    """Windows of documents; those of one document follow each other.

    Attributes:
        document: (W,) number of the document, from 0 in rising order.
        tokens: (W,) their tokens, the weights of a mean.
    """

    document: np.ndarray
    tokens: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """(D,) the first window of each document."""
        return np.unique(self.document, return_index=True)[1]

    def join(self, values: np.ndarray, suspicion: np.ndarray, how: str) -> np.ndarray:
        """(D, ...) values of documents from (W, ...) values of windows.

        Args:
            suspicion: (W,); `max` takes the most suspicious window of each document.
            how: mean (weighted by tokens), max or first.
        """
        if how == "first":
            return values[self.first]
        if how == "max":
            order = np.lexsort((-suspicion, self.document))
            return values[order[np.unique(self.document[order], return_index=True)[1]]]
        weights = self.tokens.reshape(-1, *[1] * (values.ndim - 1)).astype(np.float64)
        total = np.add.reduceat(values * weights, self.first, axis=0)
        return total / np.add.reduceat(weights, self.first, axis=0)


@dataclass(frozen=True)
class Scored:
    """Suspicions of texts, and the truth. Everything is (D,).

    Attributes:
        groups: texts of one group are not independent; intervals resample whole groups.
    """

    suspicion: np.ndarray
    synthetic: np.ndarray
    groups: np.ndarray

    @property
    def has_both(self) -> bool:
        return bool(self.synthetic.any() and not self.synthetic.all())


def choose_join(windows: Windows, suspicion: np.ndarray, synthetic: np.ndarray) -> str:
    """The way to join windows with the highest AUROC over documents; the mean if all are equal.

    `synthetic`: (D,) of documents.
    """
    if len(windows.first) == len(windows.document):
        return JOINS[0]
    scores = [metrics.auroc(windows.join(suspicion, suspicion, how), synthetic) for how in JOINS]
    return JOINS[0] if math.isnan(scores[0]) else JOINS[int(np.argmax(scores))]


def threshold_for(originals: np.ndarray, fpr: float) -> float:
    """The threshold for a false positive rate from the suspicions of original texts: a higher one is an alarm.

    Of fewer than 1 / fpr - 1 texts it is the highest suspicion, since no lower one is known to be safe.
    """
    count = len(originals)
    number = min(math.ceil((count + 1) * (1 - fpr) - 1e-9), count)
    return float(np.sort(originals)[number - 1])


@dataclass(frozen=True)
class Calibration:
    """From suspicion to the probability that a text is synthetic: a logistic function (Platt, 1999)."""

    slope: float
    offset: float

    def __call__(self, suspicion: np.ndarray) -> np.ndarray:
        odds = np.clip(
            self.slope * np.asarray(suspicion, np.float64) + self.offset, -MAX_LOG_ODDS, MAX_LOG_ODDS
        )
        return 1 / (1 + np.exp(-odds))

    @classmethod
    def fit(cls, chosen: Scored, rising: bool = False) -> "Calibration":
        """By maximum likelihood. With texts of one kind only, their share is the probability of every text.

        `rising`: a suspicion that falls with the share of synthetic texts gives the same probability to every text, too.
        """
        from sklearn.linear_model import LogisticRegression

        x, spread = chosen.suspicion, float(chosen.suspicion.std())
        slope = 0.0
        if chosen.has_both and spread > 0:
            model = LogisticRegression(C=100.0).fit(((x - x.mean()) / spread)[:, None], chosen.synthetic)
            slope = float(model.coef_[0, 0]) / spread
        if slope == 0 or (rising and slope < 0):
            share = float(np.clip(chosen.synthetic.mean(), 1e-4, 1 - 1e-4))
            return cls(0.0, math.log(share / (1 - share)))
        return cls(slope, float(model.intercept_[0]) - slope * float(x.mean()))


def measure(chosen: Scored, reported: Scored) -> dict[str, Any]:
    """Figures of a detector: AUROC, calibration, and the rates at each threshold.

    Args:
        chosen: texts that thresholds and calibration are chosen on. It must have original texts.
        reported: texts that everything is measured on, of both kinds.
    """
    calibration = Calibration.fit(chosen, rising=True)
    probability, happened = calibration(reported.suspicion), reported.synthetic.astype(np.float64)
    originals = chosen.suspicion[~chosen.synthetic]
    thresholds = []
    for target in FPR_TARGETS:
        value = threshold_for(originals, target)
        alarm = reported.suspicion > value
        rates = {
            name: _share(alarm[of], reported.groups[of])
            for name, of in (("tpr", reported.synthetic), ("fpr", ~reported.synthetic))
        }
        enough = len(originals) >= round(1 / target) - 1
        thresholds.append({"target": target, "threshold": value, "enough_originals": enough, **rates})
    return {
        "auroc": metrics.auroc_estimate(reported.suspicion, reported.synthetic, reported.groups)._asdict(),
        "thresholds": thresholds,
        "originals": len(originals),
        "calibration": {"slope": calibration.slope, "offset": calibration.offset},
        "ece": metrics.calibration_error(probability, happened),
        "brier": float(((probability - happened) ** 2).mean()),
        "documents": len(happened),
        "synthetic": int(happened.sum()),
    }


def _share(alarm: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    hits, count = metrics.sum_by(groups, alarm, np.ones(len(alarm)))
    return metrics.ratio(hits, count, limits=metrics.SHARE)._asdict()


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Log-odds, limited, so that certain predictions stay finite."""
    p = np.clip(np.asarray(probability, np.float64), 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


# ------------------------------------------------------------------------------------------ parts of a text


def change_point(probability: np.ndarray) -> int:
    """The number of tokens before the most likely place where a text turns from original to synthetic.

    `probability`: (T,) of each token to be synthetic. It maximises the likelihood of original tokens before the place and
    synthetic ones after it, over all places from 0 to T.
    """
    odds = log_odds(probability)
    return int(np.argmax(np.append(np.cumsum(odds[::-1])[::-1], 0.0)))


def best_f1_threshold(score: np.ndarray, happened: np.ndarray) -> float:
    """The threshold with the highest F1: predictions are scores of at least this value."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(happened[order])
    f1 = 2 * hits / (np.arange(1, len(score) + 1) + happened.sum())
    last = np.append(
        score[order][1:] != score[order][:-1], True
    )  # of equal scores, all or none are predicted
    return float(score[order][int(np.argmax(np.where(last, f1, -1.0)))]) if happened.any() else math.inf


def f1_estimate(predicted: np.ndarray, happened: np.ndarray, groups: np.ndarray) -> metrics.Estimate:
    """F1 of (N,) predictions. Groups are resampled."""
    both, total = metrics.sum_by(
        groups, 2.0 * (predicted & happened), predicted.astype(float) + happened.astype(float)
    )
    return metrics.ratio(both, total, limits=metrics.SHARE)
