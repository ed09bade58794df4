"""How well scores separate wrong tokens from right ones, and how well calibrated probabilities of error are.

Legend: N tokens of text that a generator filled.
"""

from dataclasses import dataclass, fields

import numpy as np

from lib import metrics
from lib.diffusion.calibration import BANDS, Calibration, Observed, Reading, band_edges, band_of
from lib.metrics import Estimate

MIN_TOKENS = 100  # a band with fewer tokens is not measured
READINGS: tuple[Reading, ...] = ("filled", "partial")  # those for which the masked share is known


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens of filled text that no model was trained on, and their scores. Everything is (N,).

    Scores are probabilities of error: the critic's raw ones, or one minus a probability of the generator.
    """

    wrong: np.ndarray  # bool
    generated: np.ndarray  # bool; the other tokens are conditioning tokens, and right
    group: np.ndarray  # intervals resample whole groups
    critic: np.ndarray  # of the whole text, with the conditioning mask
    unknown: np.ndarray  # of the whole text, without the conditioning mask
    share: np.ndarray  # of the text that was masked before the last forward pass
    partial: np.ndarray  # with a part of the generated tokens re-masked; NaN if this token was
    partial_share: np.ndarray  # of the text that is masked then
    confidence: np.ndarray  # stored: in the forward pass that sampled the token
    fresh: np.ndarray  # given the whole filled text
    first_pass: np.ndarray  # given the conditioning tokens only

    def subset(self, index: np.ndarray) -> "ScoredTokens":
        return ScoredTokens(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def visible(self) -> np.ndarray:
        """(N,) bool: generated, and not re-masked in the partial view."""
        return self.generated & ~np.isnan(self.partial)

    def reading(self, name: Reading) -> Observed:
        """The critic's probabilities in one way of reading, see `lib/diffusion/calibration.py`."""
        if name == "unknown":
            return Observed(self.unknown, self.wrong, self.share)
        if name == "filled":
            return Observed(
                self.critic[self.generated], self.wrong[self.generated], self.share[self.generated]
            )
        visible = self.visible
        return Observed(self.partial[visible], self.wrong[visible], self.partial_share[visible])


def fit_calibration(scored: ScoredTokens) -> Calibration:
    readings: dict[Reading, Observed] = {name: scored.reading(name) for name in (*READINGS, "unknown")}
    return Calibration.fit(readings, 1 - scored.confidence[scored.generated])


def _scores(scored: ScoredTokens, calibration: Calibration) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (score, indices of the tokens that it is measured on): the generated ones, with two exceptions.

    - `critic_partial`: those that are visible in the partial view. `confidence_visible` is measured on the same tokens.
    - `whole_text_*`: all tokens, without knowing which were generated.

    `confidence_first_pass` is the generator's own upper bound. Given the conditioning tokens, the clean text does not
    depend on what was generated. So no score can be better if the generator's probabilities are the true ones. A
    critic that models the language better than the generator can exceed it.
    """
    every = np.arange(len(scored.wrong))
    generated, visible = np.flatnonzero(scored.generated), np.flatnonzero(scored.visible)
    of_generated, of_visible = scored.subset(generated), scored.subset(visible)
    calibrated = calibration(of_generated.critic, "filled", of_generated.share)
    blended = calibration.blended(of_generated.critic, 1 - of_generated.confidence)
    partial = calibration(of_visible.partial, "partial", of_visible.partial_share)
    return {
        "critic": (of_generated.critic, generated),
        "critic_calibrated": (calibrated, generated),
        "critic_unknown": (of_generated.unknown, generated),
        "critic_blend": (blended, generated),
        "confidence": (of_generated.confidence, generated),
        "fresh_confidence": (of_generated.fresh, generated),
        "confidence_first_pass": (of_generated.first_pass, generated),
        "critic_partial": (of_visible.partial, visible),
        "critic_partial_calibrated": (partial, visible),
        "confidence_visible": (of_visible.confidence, visible),
        "whole_text_critic": (calibration(scored.unknown), every),
        "whole_text_fresh_confidence": (scored.fresh, every),
    }


def detection(scored: ScoredTokens, calibration: Calibration) -> dict[str, dict]:
    """Score, see `_scores` -> {"auroc" as an estimate, "average_precision", "ece", "brier"}."""
    found = {}
    for name, (score, index) in _scores(scored, calibration).items():
        wrong = scored.wrong[index]
        if not len(index):  # a short text whose generated tokens are all masked again
            unknown = float("nan")
            estimate = metrics.Estimate(unknown, unknown, unknown)._asdict()
            found[name] = {"auroc": estimate, **dict.fromkeys(("average_precision", "ece", "brier"), unknown)}
            continue
        found[name] = {
            "auroc": metrics.auroc_estimate(score, wrong, scored.group[index])._asdict(),
            "average_precision": metrics.average_precision(score, wrong),
            "ece": metrics.calibration_error(score, wrong),
            "brier": brier(score, wrong),
        }
    return found


def auroc_difference(scored: ScoredTokens, calibration: Calibration, name: str, other: str) -> Estimate:
    """The AUROC of a score of `detection` minus that of another one, which is measured on the same tokens."""
    scores = _scores(scored, calibration)
    (score, index), (reference, same) = scores[name], scores[other]
    if not np.array_equal(index, same):
        raise ValueError(f"{name} and {other} are measured on different tokens")
    return metrics.auroc_estimate(score, scored.wrong[index], scored.group[index], reference)


def brier(probability: np.ndarray, happened: np.ndarray) -> float:
    """Mean squared difference between a forecast probability and the outcome (Brier, 1950)."""
    return float(np.mean((probability - happened) ** 2))


def bands(scored: ScoredTokens, calibration: Calibration) -> list[dict]:
    """Calibration by reading and band of the masked share, one row each.

    Columns: the error rate; ECE and Brier score of the raw probabilities, with one curve for all bands, and with
    curves by band; `own`: whether this band has a curve.
    """
    rows = []
    for name in READINGS:
        observed = scored.reading(name)
        band, curves = band_of(observed.share), calibration.readings[name].bands
        for number in range(BANDS):
            in_band = band == number
            if in_band.sum() < MIN_TOKENS:
                continue
            raw, wrong = observed.probability[in_band], observed.wrong[in_band]
            probabilities = {
                "raw": raw,
                "one_curve": calibration(raw, name),
                "by_band": calibration(raw, name, observed.share[in_band]),
            }
            low, high = band_edges(number)
            has_curve = bool(curves) and curves[number] is not None
            row = {"reading": name, "low": low, "high": high, "tokens": len(wrong), "own": has_curve}
            row["error_rate"] = float(wrong.mean())
            for kind, probability in probabilities.items():
                row[f"ece_{kind}"] = metrics.calibration_error(probability, wrong)
                row[f"brier_{kind}"] = brier(probability, wrong)
            rows.append(row)
    return rows
