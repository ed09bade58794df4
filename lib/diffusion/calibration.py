"""Calibration of a critic: from its raw probability of error to the frequency of errors (isotonic regression).

The miscalibration depends on what the critic is conditioned on and on the share of masked tokens. There are three kinds of
text, called readings:

    filled   a whole draft, with a conditioning mask. Its masked share is that before the pass that completed it.
    partial  a text with masks in it. Its masked share is the present one.
    unknown  a whole text of which nothing is known: any share of its tokens may be generated.

Each has a curve. The first two also have one for each quarter of the masked share that has enough tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib import durable
from lib.errors import BadData

POINTS = 101
BANDS = 4
MIN_TOKENS = 1000  # of a band that has its own curve
MIN_PER_OUTCOME = 50  # of them right, and wrong
Reading = Literal["filled", "partial", "unknown"]


@dataclass(frozen=True)
class Curve:
    """A rising piecewise linear curve through points. Without points, the identity."""

    raw: tuple[float, ...] = (0.0, 1.0)
    calibrated: tuple[float, ...] = (0.0, 1.0)

    def __call__(self, probability: np.ndarray) -> np.ndarray:
        return np.interp(probability, self.raw, self.calibrated)

    @classmethod
    def fit(cls, probability: np.ndarray, happened: np.ndarray) -> "Curve":
        """Isotonic regression of outcomes on probabilities, stored at quantiles of the probabilities.

        Isotonic regression has flat steps, which would make ties. Straight lines between the points and a small slope keep
        the critic's order of tokens.
        """
        from sklearn.isotonic import IsotonicRegression

        if len(np.unique(happened)) < 2:
            return cls()
        model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(probability, happened)
        raw = np.unique(np.concatenate([[0.0], np.quantile(probability, np.linspace(0, 1, POINTS)), [1.0]]))
        curve = np.clip(model.predict(raw), 1e-4, 1 - 1e-4)
        # Outside the data the curve is constant.
        lifted = 0.999 * curve + 0.001 * raw
        return cls(tuple(raw.tolist()), tuple(np.maximum.accumulate(lifted).tolist()))


@dataclass(frozen=True)
class Observed:
    """Tokens with known outcome, all (N,).

    Attributes:
        probability: the critic's raw probability of error.
        wrong: bool, whether the token is an error.
        share: masked share of its text.
    """

    probability: np.ndarray
    wrong: np.ndarray
    share: np.ndarray


@dataclass(frozen=True)
class Curves:
    """Curves of one reading: `whole` for all masked shares, and one or None for each band of the share."""

    whole: Curve = field(default_factory=Curve)
    bands: tuple[Curve | None, ...] = ()

    @classmethod
    def fit(cls, observed: Observed, by_band: bool) -> "Curves":
        return cls(Curve.fit(observed.probability, observed.wrong), _bands(observed) if by_band else ())


@dataclass(frozen=True)
class Calibration:
    """A calibrated critic.

    Attributes:
        readings: reading -> its curves. Without curves a raw probability stays as it is.
        blend: weights of the critic's log-odds, of the confidence's, and a constant.
    """

    readings: Mapping[str, Curves] = field(default_factory=dict)
    blend: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def __call__(
        self, probability: np.ndarray, reading: Reading = "unknown", share: np.ndarray | None = None
    ) -> np.ndarray:
        """Frequency of errors among tokens of these raw probabilities.

        Args:
            probability: (B, T) or (N,) raw.
            share: (B,) or (N,) masked share of the text, if known; see the module.
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
        """Probability of error, from the critic's raw probability and the stored confidence.

        The two have different inputs: confidence is from before the other tokens were drafted, the critic reads them all.
        A logistic regression weights their log-odds (stacking, Wolpert 1992).
        """
        a, b, c = self.blend
        return 1 / (1 + np.exp(-(a * _log_odds(probability) + b * _log_odds(1 - confidence) + c)))

    @classmethod
    def fit(cls, readings: Mapping[Reading, Observed], confidence: np.ndarray | None = None) -> "Calibration":
        """Curves of each reading. With the stored confidence (N,) of the `filled` tokens, the blend, too."""
        curves = {
            name: Curves.fit(observed, by_band=name != "unknown") for name, observed in readings.items()
        }
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
            stored = durable.read_json(path)
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
                f"{path} is not a valid calibration: {error}; run 05_train_critic with --overwrite"
            ) from None


def band_of(share: np.ndarray) -> np.ndarray:
    """Index of the band of [0, 1] that a masked share lies in, of BANDS equal ones; 1 is in the last."""
    return np.minimum((share * BANDS).astype(np.int64), BANDS - 1)


def band_edges(number: int) -> tuple[float, float]:
    return number / BANDS, (number + 1) / BANDS


def _bands(observed: Observed) -> tuple[Curve | None, ...]:
    curves: list[Curve | None] = []
    for number in range(BANDS):
        here = band_of(observed.share) == number
        wrong = observed.wrong[here]
        enough = len(wrong) >= MIN_TOKENS and min(wrong.sum(), (~wrong).sum()) >= MIN_PER_OUTCOME
        curves.append(Curve.fit(observed.probability[here], wrong) if enough else None)
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
