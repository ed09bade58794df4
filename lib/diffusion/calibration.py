"""From a critic's raw probability of error to how often such a token is one (isotonic regression).

How far a critic is off depends on what it is told and on how much was masked. Three ways of reading:

    filled   a whole draft, with the knowledge of which tokens were given; masked: the share before the pass that completed it
    partial  a text with masks in it; masked: what is now
    unknown  a whole text of which nothing is known: any share of its tokens may have been written

Each has a curve of its own, and the first two one for each quarter of the masked share where there is enough to learn from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib import durable
from lib.errors import BadData

POINTS = 101
BANDS = 4
LEAST = 1000  # tokens of a band, for a curve of its own
LEAST_OF_EACH = 50  # of them right, and wrong
Reading = Literal["filled", "partial", "unknown"]


@dataclass(frozen=True)
class Curve:
    """A rising curve through points; between them straight lines. Without points, the identity."""

    raw: tuple[float, ...] = (0.0, 1.0)
    calibrated: tuple[float, ...] = (0.0, 1.0)

    def __call__(self, probability: np.ndarray) -> np.ndarray:
        return np.interp(probability, self.raw, self.calibrated)

    @classmethod
    def fit(cls, probability: np.ndarray, happened: np.ndarray) -> "Curve":
        """Isotonic regression of what happened on what was said, kept at evenly filled points.

        Isotonic steps are flat, and ties between tokens would be settled by chance; the points, joined by lines
        and lifted by a hair, keep the critic's own order.
        """
        from sklearn.isotonic import IsotonicRegression

        if len(np.unique(happened)) < 2:
            return cls()
        model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(probability, happened)
        raw = np.unique(np.concatenate([[0.0], np.quantile(probability, np.linspace(0, 1, POINTS)), [1.0]]))
        curve = np.clip(model.predict(raw), 1e-4, 1 - 1e-4)
        # The curve's ends are where there was data; beyond it the identity's ends 0 and 1 are no better a guess.
        lifted = 0.999 * curve + 0.001 * raw
        return cls(tuple(raw.tolist()), tuple(np.maximum.accumulate(lifted).tolist()))


@dataclass(frozen=True)
class Observed:
    """Tokens whose fate is known, all (N,): what the critic said, whether they were wrong, the masked share."""

    probability: np.ndarray
    wrong: np.ndarray
    share: np.ndarray


@dataclass(frozen=True)
class Curves:
    """Of one way of reading: `whole` for all shares, and one, or None, for each band of the masked share."""

    whole: Curve = field(default_factory=Curve)
    bands: tuple[Curve | None, ...] = ()

    @classmethod
    def fit(cls, seen: Observed, by_band: bool) -> "Curves":
        return cls(Curve.fit(seen.probability, seen.wrong), _bands(seen) if by_band else ())


@dataclass(frozen=True)
class Calibration:
    """
    Attributes:
        readings: way of reading -> its curves; without them a raw probability stays as it is.
        blend: weights of the critic's log-odds, the confidence's, and a constant.
    """

    readings: Mapping[str, Curves] = field(default_factory=dict)
    blend: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def __call__(
        self, probability: np.ndarray, reading: Reading = "unknown", share: np.ndarray | None = None
    ) -> np.ndarray:
        """The share of such tokens that are errors.

        Args:
            probability: (B, T) or (N,) raw.
            share: (B,) or (N,) share of the text that was masked, if known; see the module.
        """
        curves = self.readings.get(reading, Curves())
        result = curves.whole(probability)
        if share is not None:
            band = band_of(share)
            for number, curve in enumerate(curves.bands):
                here = band == number
                if curve is not None and here.any():
                    result[here] = curve(probability[here])
        return result

    def blended(self, probability: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """Chance of error from the critic's raw probability and the generator's confidence when it wrote the token.

        The two know different things: confidence came before the other drafts, the critic sees them all. Their
        log-odds are weighed by a logistic regression (stacking, Wolpert 1992).
        """
        a, b, c = self.blend
        return 1 / (1 + np.exp(-(a * _log_odds(probability) + b * _log_odds(1 - confidence) + c)))

    @classmethod
    def fit(cls, readings: Mapping[Reading, Observed], confidence: np.ndarray | None = None) -> "Calibration":
        """Curves of each way of reading, and the blend if the stored confidence (N,) of the `filled` tokens is given."""
        curves = {name: Curves.fit(seen, by_band=name != "unknown") for name, seen in readings.items()}
        if confidence is None or len(np.unique(readings["filled"].wrong)) < 2:
            return cls(curves)
        filled = readings["filled"]
        return cls(curves, _weights(filled.probability, confidence, filled.wrong))

    def save(self, path: Path) -> None:
        readings = {
            name: {
                "whole": _plain(curves.whole),
                "bands": [None if curve is None else _plain(curve) for curve in curves.bands],
            }
            for name, curves in self.readings.items()
        }
        durable.write_json(path, {"blend": list(self.blend), "readings": readings})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            readings = {
                name: Curves(
                    _curve(curves["whole"]), tuple(None if c is None else _curve(c) for c in curves["bands"])
                )
                for name, curves in stored["readings"].items()
            }
            first, second, constant = stored["blend"]
            return cls(readings, (first, second, constant))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadData(
                f"{path} is no calibration: {error}; run 05_train_critic with --overwrite"
            ) from None


def band_of(share: np.ndarray) -> np.ndarray:
    """Which of the BANDS equal bands of [0, 1] a masked share lies in; 1 is in the last."""
    return np.minimum((share * BANDS).astype(np.int64), BANDS - 1)


def band_edges(number: int) -> tuple[float, float]:
    return number / BANDS, (number + 1) / BANDS


def _bands(seen: Observed) -> tuple[Curve | None, ...]:
    curves: list[Curve | None] = []
    for number in range(BANDS):
        here = band_of(seen.share) == number
        wrong = seen.wrong[here]
        enough = len(wrong) >= LEAST and min(wrong.sum(), (~wrong).sum()) >= LEAST_OF_EACH
        curves.append(Curve.fit(seen.probability[here], wrong) if enough else None)
    return tuple(curves)


def _plain(curve: Curve) -> dict[str, Any]:
    return {"raw": list(curve.raw), "calibrated": list(curve.calibrated)}


def _curve(stored: Mapping[str, Any]) -> Curve:
    return Curve(tuple(stored["raw"]), tuple(stored["calibrated"]))


def _log_odds(probability: np.ndarray) -> np.ndarray:
    share = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.log(share / (1 - share))


def _weights(
    probability: np.ndarray, confidence: np.ndarray, happened: np.ndarray
) -> tuple[float, float, float]:
    from sklearn.linear_model import LogisticRegression

    features = np.stack([_log_odds(probability), _log_odds(1 - confidence)], 1)
    model = LogisticRegression(C=1e6).fit(features, happened)
    return float(model.coef_[0, 0]), float(model.coef_[0, 1]), float(model.intercept_[0])
