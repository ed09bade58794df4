"""From a critic's raw probability of error to how often such a token is one (isotonic regression)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import durable
from lib.errors import BadData

POINTS = 101


@dataclass(frozen=True)
class Calibration:
    """A rising curve through points; between them straight lines. Without points, the identity."""

    raw: tuple[float, ...] = (0.0, 1.0)
    calibrated: tuple[float, ...] = (0.0, 1.0)
    blend: tuple[float, float, float] = (1.0, 0.0, 0.0)  # weights of the two log-odds and a constant

    def __call__(self, probability: np.ndarray) -> np.ndarray:
        return np.interp(probability, self.raw, self.calibrated)

    def blended(self, probability: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """Chance of error from the critic's raw probability and the generator's confidence when it wrote the token.

        The two know different things: confidence came before the other drafts, the critic sees them all. Their
        log-odds are weighed by a logistic regression (stacking, Wolpert 1992).
        """
        a, b, c = self.blend
        return 1 / (1 + np.exp(-(a * _log_odds(probability) + b * _log_odds(1 - confidence) + c)))

    @classmethod
    def fit(
        cls, probability: np.ndarray, happened: np.ndarray, confidence: np.ndarray | None = None
    ) -> "Calibration":
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
        points = tuple(raw.tolist()), tuple(np.maximum.accumulate(lifted).tolist())
        return (
            cls(*points) if confidence is None else cls(*points, _weights(probability, confidence, happened))
        )

    def save(self, path: Path) -> None:
        values = {"raw": list(self.raw), "calibrated": list(self.calibrated), "blend": list(self.blend)}
        durable.write_json(path, values)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(stored["raw"]), tuple(stored["calibrated"]), tuple(stored["blend"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadData(
                f"{path} is no calibration: {error}; run 05_train_critic with --overwrite"
            ) from None


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
