"""Numbers that judge predictions, with 95 % intervals from resampling whole groups. numpy and scikit-learn only."""

from typing import NamedTuple

import numpy as np

from lib import randomness

RESAMPLES = 1000
MOST_GROUPS = 256  # of AUROC, whose time grows with them


class Estimate(NamedTuple):
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def _counts(units: int, resamples: int) -> np.ndarray:
    """(R, U) how often each unit is drawn in each resample: the same draws for every metric, so rows are paired."""
    generator = np.random.Generator(np.random.Philox(randomness.key(0, "bootstrap", units)))
    return generator.multinomial(units, np.full(units, 1 / units), size=resamples)


def ratio(
    numerators: np.ndarray, denominators: np.ndarray | None = None, resamples: int = RESAMPLES
) -> Estimate:
    """sum(numerators) / sum(denominators) over units (the mean if no denominators), resampling units."""
    numerators = np.asarray(numerators, np.float64)
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, np.float64)
    counts = _counts(len(numerators), resamples)
    values = (counts @ numerators) / np.maximum(counts @ denominators, 1e-12)
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(float(numerators.sum() / max(denominators.sum(), 1e-12)), float(low), float(high))


def auroc_estimate(
    score: np.ndarray, happened: np.ndarray, groups: np.ndarray, other: np.ndarray | None = None
) -> Estimate:
    """AUROC of (N,) scores, or by how much it exceeds that of `other` (N,) scores of the same values; groups resampled.

    More than MOST_GROUPS groups are joined to so many: fewer units, each still independent of the others.
    """
    _, unit = np.unique(groups, return_inverse=True)
    unit = unit % MOST_GROUPS
    size = int(unit.max()) + 1
    draws = np.concatenate([np.ones((1, size), np.int64), _counts(size, RESAMPLES)])
    values = _grouped_auroc(score, happened, unit, draws)
    if other is not None:
        values = values - _grouped_auroc(other, happened, unit, draws)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))


def _grouped_auroc(
    score: np.ndarray, happened: np.ndarray, unit: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """(R,) AUROC with the values of unit u counted `draws[r, u]` times; NaN where only one kind is left.

    What is sorted once for all draws is how often a positive of one unit is above a negative of another, ties by half.
    """
    size = draws.shape[1]
    _, rank = np.unique(score, return_inverse=True)
    positive, negative = np.flatnonzero(happened), np.flatnonzero(~happened)
    above = np.zeros((size, size))  # positives' unit, negatives' unit
    for u in range(size):
        count = np.bincount(rank[negative[unit[negative] == u]], minlength=int(rank.max()) + 1)
        below = (np.cumsum(count) - count / 2)[rank[positive]]
        above[:, u] = np.bincount(unit[positive], below, size)
    pairs = (draws @ np.bincount(unit[positive], minlength=size)) * (
        draws @ np.bincount(unit[negative], minlength=size)
    )
    wins = ((draws @ above) * draws).sum(1)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)


def sum_by(groups: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Sums of each array over the rows of every group, in the order of the sorted group names."""
    _, unit = np.unique(groups, return_inverse=True)
    return [np.bincount(unit, weights=np.asarray(v, np.float64)) for v in values]


# ----------------------------------------------------------------------------------------- per mode


def regression(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """MSE, MAE, R2 (against the constant that is the targets' mean), Pearson, Spearman."""
    from scipy.stats import spearmanr

    error = predicted - target
    mse, variance = float(np.mean(error**2)), float(np.var(target))
    flat = np.std(predicted) == 0 or variance == 0
    return {
        "mse": mse,
        "mae": float(np.mean(np.abs(error))),
        "r2": 1 - mse / variance if variance else float("nan"),
        "pearson": float("nan") if flat else float(np.corrcoef(predicted, target)[0, 1]),
        "spearman": float("nan") if flat else float(spearmanr(predicted, target).statistic),
    }


def classification(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy and, per class, precision, recall and F1 from a (true, predicted) table of counts."""
    hit, of_class, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    result = {"accuracy": float(hit.sum() / max(confusion.sum(), 1))}
    for c in range(len(confusion)):
        if not of_class[c] and not predicted[c]:
            continue  # a class that neither occurs nor is predicted has no scores
        result[f"precision_{c}"] = float(hit[c] / max(predicted[c], 1))
        result[f"recall_{c}"] = float(hit[c] / max(of_class[c], 1))
        result[f"f1_{c}"] = float(2 * hit[c] / max(of_class[c] + predicted[c], 1))
    result["macro_f1"] = float(np.mean([v for k, v in result.items() if k.startswith("f1_")] or [0.0]))
    return result


def calibration_error(probability: np.ndarray, happened: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over about equally filled bins (Naeini et al., 2015); equal forecasts share one."""
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1]))
    bin_of = np.searchsorted(edges, probability, side="right")
    count = np.bincount(bin_of, minlength=len(edges) + 1)
    gap = np.bincount(bin_of, probability, len(edges) + 1) - np.bincount(bin_of, happened, len(edges) + 1)
    return float(np.abs(gap).sum() / count.sum())


def reliability(predicted: np.ndarray, happened: np.ndarray, bins: int = 10) -> list[list[float]]:
    """[mean prediction, mean of what happened, count] of about equally filled bins; equal predictions share one."""
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1]))
    bin_of = np.searchsorted(edges, predicted, side="right")
    count = np.bincount(bin_of)
    said, was = np.bincount(bin_of, predicted), np.bincount(bin_of, happened)
    return [[float(said[b] / n), float(was[b] / n), int(n)] for b, n in enumerate(count) if n]


def auroc(score: np.ndarray, happened: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Chance that a positive scores above a negative; NaN when there is only one kind."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(happened)) < 2:
        return float("nan")
    return float(roc_auc_score(happened, score, sample_weight=weights))


def average_precision(score: np.ndarray, happened: np.ndarray, weights: np.ndarray | None = None) -> float:
    from sklearn.metrics import average_precision_score

    if not happened.any():
        return float("nan")
    return float(average_precision_score(happened, score, sample_weight=weights))


def ngram_entropy(sequences: list[np.ndarray], n: int) -> float:
    """Entropy in nats of the pooled n-grams of token sequences (n-grams do not cross sequences)."""
    grams = [np.lib.stride_tricks.sliding_window_view(s, n) for s in sequences if len(s) >= n]
    if not grams:
        return 0.0
    _, counts = np.unique(np.concatenate(grams), axis=0, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())
