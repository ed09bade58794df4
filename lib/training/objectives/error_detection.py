"""How well scores tell wrong tokens from right ones, and how honest calibrated chances are. Arrays only: no model.

Legend: N tokens of clean text into which a generator wrote.
"""

from dataclasses import dataclass, fields

import numpy as np

from lib import metrics
from lib.diffusion.calibration import BANDS, Calibration, Observed, Reading, band_edges, band_of

FEW = 100  # tokens; a smaller band is not measured
READINGS: tuple[Reading, ...] = ("filled", "partial")  # those whose masked share is known


@dataclass(frozen=True)
class Seen:
    """Tokens of fills of text that no model learned from, and what was thought of them, all (N,).

    Whoever fills gaps asks about the tokens that were written; whoever reads a text of which nothing is known, about all.
    """

    wrong: np.ndarray  # bool
    written: np.ndarray  # bool: by the generator; the others were given, and are right
    group: np.ndarray  # the unit that is resampled
    critic: np.ndarray  # raw probability of error, the whole text in view, and which tokens were given
    unknown: np.ndarray  # the same, but nothing is known of what was given
    share: np.ndarray  # of the text that was masked before the pass that completed it
    partial: np.ndarray  # raw, with a part of the written tokens masked again; NaN where that hid this one
    partial_share: np.ndarray  # of the text that is masked then
    confidence: np.ndarray  # one minus it: what the generator said when it wrote the token
    fresh: np.ndarray  # one minus it: what it says now that it sees the whole
    # One minus it: what it says of it with the given text alone in view, before anything was written
    given: np.ndarray

    def at(self, where: np.ndarray) -> "Seen":
        return Seen(*(getattr(self, f.name)[where] for f in fields(self)))

    @property
    def visible(self) -> np.ndarray:
        """(N,) bool: written, and not hidden from the partial view."""
        return self.written & ~np.isnan(self.partial)

    def reading(self, name: Reading) -> Observed:
        """What the critic said in one of its ways of reading."""
        if name == "unknown":
            return Observed(self.unknown, self.wrong, self.share)
        if name == "filled":
            return Observed(self.critic[self.written], self.wrong[self.written], self.share[self.written])
        there = self.visible
        return Observed(self.partial[there], self.wrong[there], self.partial_share[there])


def fitted(seen: Seen) -> Calibration:
    readings: dict[Reading, Observed] = {name: seen.reading(name) for name in (*READINGS, "unknown")}
    return Calibration.fit(readings, 1 - seen.confidence[seen.written])


def detection(seen: Seen, calibration: Calibration) -> dict[str, dict]:
    """Score -> {"auroc" as an estimate, "average_precision", "ece", "brier"}.

    They are of the written tokens. The partial view exists for those that were left to see; confidence on the same ones
    stands beside it. Those of `whole_text` are of all tokens, and know nothing of which were written.
    `confidence_given` is the generator's own ceiling, known where nothing but the masks was written: given the given text, the
    truth does not depend on what was written, so that as far as the generator's probabilities are the true ones nothing can
    say more. A critic that knows the language better than the generator could.
    """
    every = np.arange(len(seen.wrong))
    written, of_those = np.flatnonzero(seen.written), np.flatnonzero(seen.visible)
    own, rest = seen.at(written), seen.at(of_those)
    scores = {
        "critic": (own.critic, written),
        "critic_calibrated": (calibration(own.critic, "filled", own.share), written),
        "critic_unknown": (own.unknown, written),
        "critic_blend": (calibration.blended(own.critic, 1 - own.confidence), written),
        "confidence": (own.confidence, written),
        "confidence_fresh": (own.fresh, written),
        "confidence_given": (own.given, written),
        "critic_partial": (rest.partial, of_those),
        "critic_partial_calibrated": (calibration(rest.partial, "partial", rest.partial_share), of_those),
        "confidence_of_those": (rest.confidence, of_those),
        "whole_text_critic": (calibration(seen.unknown), every),
        "whole_text_confidence_fresh": (seen.fresh, every),
    }
    found = {}
    for name, (score, at) in scores.items():
        wrong = seen.wrong[at]
        found[name] = {
            "auroc": metrics.auroc_estimate(score, wrong, seen.group[at])._asdict(),
            "average_precision": metrics.average_precision(score, wrong),
            "ece": metrics.calibration_error(score, wrong),
            "brier": brier(score, wrong),
        }
    return found


def brier(probability: np.ndarray, happened: np.ndarray) -> float:
    """Mean squared distance of a forecast from what happened (Brier, 1950)."""
    return float(np.mean((probability - happened) ** 2))


def bands(seen: Seen, calibration: Calibration) -> list[dict]:
    """For each reading and band of the masked share: error rate, ECE and Brier score of the raw probabilities, of the
    one curve for all, and of the curves by band (`own`: whether this band has one)."""
    rows = []
    for name in READINGS:
        observed = seen.reading(name)
        band, curves = band_of(observed.share), calibration.readings[name].bands
        for number in range(BANDS):
            here = band == number
            if here.sum() < FEW:
                continue
            raw, wrong = observed.probability[here], observed.wrong[here]
            said = {
                "raw": raw,
                "one_curve": calibration(raw, name),
                "by_band": calibration(raw, name, observed.share[here]),
            }
            low, high = band_edges(number)
            own = bool(curves) and curves[number] is not None
            row = {"reading": name, "low": low, "high": high, "tokens": len(wrong), "own": own}
            row["error_rate"] = float(wrong.mean())
            for kind, probability in said.items():
                row[f"ece_{kind}"] = metrics.calibration_error(probability, wrong)
                row[f"brier_{kind}"] = brier(probability, wrong)
            rows.append(row)
    return rows
