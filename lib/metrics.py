"""Metrics of predictions, with 95 % intervals from a bootstrap over groups.

Every interval of this project is computed here, by one method. The unit is a group: a document, a block, a page or a
sample. The values of a group are summed first, and whole groups are resampled.

The interval is the bootstrap-t interval (Efron, 1981; Hall, 1988). The deviation of each resample is divided by its own
standard error, which accounts for the skewness due to groups of unequal size. The quantiles of these ratios are
multiplied by the jackknife standard error (one group left out at a time). The interval is widened for the effective
number of groups (Kish, 1965), which is small when a few large groups dominate. The coverage is 94 to 96 %, where the
percentile bootstrap has 90 to 93 % (tests/test_coverage.py).

Legend: G groups, R resamples.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from lib import randomness

RESAMPLES = 1000
LEVEL = 0.95
MAX_UNITS = 1024  # for ratios; more groups are pooled into this many units
MAX_AUROC_UNITS = 256  # the time for AUROC grows with the square of this number
MIN_GROUPS = 10  # with fewer groups too few resamples differ, and Student's t replaces their quantiles
SHARE = (0.0, 1.0)  # limits of a fraction, an accuracy or an AUROC
_UNLIMITED = (-math.inf, math.inf)
_ROUNDING = 1e-12  # values this close to a limit are at the limit


class Estimate(NamedTuple):
    """A value and its 95 % interval. With a single group the spread is unknown, and the ends are NaN."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """The number after `±`."""
        return (self.high - self.low) / 2


@functools.lru_cache(maxsize=8)
def _counts(units: int, resamples: int, seed: int = 0) -> np.ndarray:
    """(R, G) how often each group is drawn in each resample. All metrics use the same draws, so that they are paired."""
    generator = np.random.Generator(np.random.Philox(randomness.key(seed, "bootstrap", units)))
    counts = generator.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def _interval(
    value: float,
    without: np.ndarray,
    weights: np.ndarray,
    deviations: np.ndarray,
    errors: np.ndarray,
    limits: tuple[float, float],
) -> Estimate:
    """The interval that the module describes.

    Args:
        without: (G,) the value with one group left out.
        weights: (G,) weight of each group in the value, for the effective number of groups.
        deviations, errors: (R,) the value of each resample minus `value`, and its standard error. The error is 0 or NaN
            where a resample has no spread, such as when it has a single group.
        limits: the smallest and the largest possible value.
    """
    size = len(without)
    if size < 2 or not np.isfinite(without).all():
        return Estimate(value, math.nan, math.nan)
    error = math.sqrt((size - 1) / size * float(((without - without.mean()) ** 2).sum()))
    share = weights / max(float(weights.sum()), 1e-300)
    effective = max(1 / float((share**2).sum()), 2.0)  # Kish: number of equal groups with the same variance
    tail = (1 - LEVEL) / 2
    t_effective, t_all = (float(stdtrit(n - 1, 1 - tail)) for n in (effective, size))
    low, high = -t_effective, t_effective
    spread = np.isfinite(deviations) & (errors > 0)
    if size >= MIN_GROUPS and (~spread).mean() <= tail:
        low, high = np.quantile(deviations[spread] / errors[spread], [tail, 1 - tail]) * (t_effective / t_all)
    # A resample above the value suggests that the true value is below it, so the ends are exchanged
    ends = np.clip([value - high * error, value - low * error], *limits)
    return Estimate(value, float(ends[0]), float(ends[1]))


def _spread(squares: np.ndarray, scale: np.ndarray, size: int) -> np.ndarray:
    """(R,) standard errors from sums of squared influences; 0 where only rounding errors are left."""
    return np.sqrt(np.where(squares > 1e-10 * scale, squares, 0.0) * size / (size - 1))


def _exact_at_limit(value: float, trials: int, limits: tuple[float, float]) -> Estimate | None:
    """The interval of a value at one of its limits, on which all groups agree; None for any other value.

    Resampling such groups shows no spread. The exact interval holds instead, with a group as one trial (Clopper and
    Pearson, 1934): a group that was not seen may lie at the other limit.
    """
    low, high = limits
    if not trials or not math.isfinite(high - low):
        return None
    reach = (high - low) * (1 - ((1 - LEVEL) / 2) ** (1 / trials))
    if math.isclose(value, high, abs_tol=_ROUNDING):
        return Estimate(value, high - reach, high)
    return Estimate(value, low, low + reach) if math.isclose(value, low, abs_tol=_ROUNDING) else None


def ratio(
    numerators: np.ndarray,
    denominators: np.ndarray | None = None,
    resamples: int | None = None,
    limits: tuple[float, float] = _UNLIMITED,
    seed: int = 0,
) -> Estimate:
    """sum(numerators) / sum(denominators) over groups, or the mean without denominators; groups are resampled.

    Args:
        numerators, denominators: (G,) sums of each group, see `sum_by`. Groups where both are 0 are ignored.
        limits: the smallest and the largest possible ratio of a group: `SHARE` if it is a fraction. A ratio at a limit has the
            exact interval.
    """
    n = np.asarray(numerators, np.float64)
    d = np.ones_like(n) if denominators is None else np.asarray(denominators, np.float64)
    value = float(n.sum() / max(d.sum(), 1e-12))
    if (exact := _exact_at_limit(value, int(np.count_nonzero(d)), limits)) is not None:
        return exact
    nonzero = (n != 0) | (d != 0)
    n, d = _pooled(n[nonzero], MAX_UNITS), _pooled(d[nonzero], MAX_UNITS)
    size, total = len(d), d.sum()
    if size < 2:
        return Estimate(value, math.nan, math.nan)
    rest = total - d
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = n - value * d  # centred first, which keeps rounding errors small
        without = np.where(rest > 0, value - residual / rest, np.nan)
        counts = _counts(size, resamples or RESAMPLES, seed)
        sums = counts @ np.stack([d, residual, residual**2, residual * d, d**2], 1)  # (R, 5)
        total_d, total_r, total_rr, total_rd, total_dd = sums.T
        deviation = np.where(total_d > 0, total_r / total_d, np.nan)
        squares = total_rr - 2 * deviation * total_rd + deviation**2 * total_dd
        errors = _spread(squares, total_rr, size) / total_d
    return _interval(value, without, np.abs(d), deviation, errors, limits)


def _pooled(values: np.ndarray, num_units: int) -> np.ndarray:
    """The values, summed into `num_units` units if there are more groups than that."""
    return values if len(values) <= num_units else np.bincount(np.arange(len(values)) % num_units, values)


def r2_estimate(
    predicted: np.ndarray, target: np.ndarray, groups: np.ndarray, other: np.ndarray | None = None
) -> Estimate:
    """R² of (N,) predictions, or the R² minus that of `other` (N,) predictions. Groups are resampled.

    R² is 1 - squared error / squared deviation from the mean target.
    """
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    centred, squared = target - target.mean(), (predicted - target) ** 2
    perfect = 1.0 if other is None else 0.0  # the value if the sum of `squared` is 0
    if other is not None:
        squared = squared - (np.asarray(other, np.float64) - target) ** 2
    e, y, q, m = (
        _pooled(x, MAX_UNITS) for x in sum_by(groups, squared, centred, centred**2, np.ones_like(target))
    )
    size, spread = len(e), q.sum()
    if not spread > 0:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(perfect - e.sum() / spread)
    if size < 2:
        return Estimate(value, math.nan, math.nan)

    def unexplained(e, y, q, m):
        return e / (q - y**2 / m)

    with np.errstate(divide="ignore", invalid="ignore"):
        without = perfect - unexplained(*(x.sum() - x for x in (e, y, q, m)))
        counts = _counts(size, RESAMPLES)
        drawn = (counts @ np.stack([e, y, q, m], 1)).T
        share, mean = unexplained(*drawn), drawn[1] / drawn[3]  # (R,)
        around = (
            q - 2 * mean[:, None] * y + mean[:, None] ** 2 * m
        )  # (R, G) squares around the resample's mean
        influence = (e - share[:, None] * around) / (drawn[2] - drawn[1] ** 2 / drawn[3])[:, None]
        squares = (counts * influence**2).sum(1)
        errors = _spread(squares, share**2, size)
    limits = _UNLIMITED if other is not None else (-math.inf, 1.0)
    return _interval(value, without, q, perfect - share - value, errors, limits)


def auroc_estimate(
    score: np.ndarray, happened: np.ndarray, groups: np.ndarray, other: np.ndarray | None = None
) -> Estimate:
    """AUROC of (N,) scores, or the AUROC minus that of `other` (N,) scores of the same items. Groups are resampled.

    More than MAX_AUROC_UNITS groups are pooled into that many units, which are still independent of each other. An AUROC of
    0 or 1 has the exact interval, with a pair of a positive and a negative unit as one trial.
    """
    happened = np.asarray(happened, bool)
    _, unit = np.unique(groups, return_inverse=True)
    unit = unit % MAX_AUROC_UNITS
    size = int(unit.max()) + 1
    ones, counts = np.ones((1, size)), _counts(size, RESAMPLES)
    found = _auroc_by_unit(score, happened, unit)
    value, _ = found.resampled(ones)
    trials = min(int(np.count_nonzero(kind)) for kind in (found.positive, found.negative))
    if other is None and size > 1 and (exact := _exact_at_limit(float(value[0]), trials, SHARE)) is not None:
        return exact
    resampled, influence = found.resampled(counts)
    without, limits = found.without(), SHARE
    if other is not None:
        reference = _auroc_by_unit(other, happened, unit)
        values, influences = reference.resampled(counts)
        value = value - reference.resampled(ones)[0]
        resampled, influence = resampled - values, influence - influences
        without, limits = without - reference.without(), (-1.0, 1.0)
    squares = (counts * influence**2).sum(1)
    weights = found.positive / max(found.positive.sum(), 1) + found.negative / max(found.negative.sum(), 1)
    errors = _spread(squares, np.ones_like(squares) * 1e-12, size) if size > 1 else squares
    return _interval(float(value[0]), without, weights, resampled - value[0], errors, limits)


class _AurocCounts(NamedTuple):
    """Counts from which the AUROC of every resample follows without sorting again.

    Attributes:
        above: (G, G) pairs in which a positive of one group (row) is above a negative of another (column); ties count half.
        positive, negative: (G,) number of positives and negatives in each group.
    """

    above: np.ndarray
    positive: np.ndarray
    negative: np.ndarray

    def resampled(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((R,) AUROC with group g counted `counts[r, g]` times, (R, G) the influence of another copy of group g).

        NaN where a resample has only positives or only negatives.
        """
        rows, columns = counts @ self.above.T, counts @ self.above  # (R, G)
        positives, negatives = counts @ self.positive, counts @ self.negative
        pairs = positives * negatives
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(pairs > 0, (columns * counts).sum(1) / pairs, np.nan)
            shares = self.positive / positives[:, None] + self.negative / negatives[:, None]
            influence = (rows + columns) / pairs[:, None] - value[:, None] * shares
        return value, influence

    def without(self) -> np.ndarray:
        """(G,) AUROC with one group left out."""
        above, diagonal = self.above, np.diag(self.above)
        remaining = above.sum() - above.sum(0) - above.sum(1) + diagonal
        pairs = (self.positive.sum() - self.positive) * (self.negative.sum() - self.negative)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(pairs > 0, remaining / pairs, np.nan)


def _auroc_by_unit(score: np.ndarray, happened: np.ndarray, unit: np.ndarray) -> _AurocCounts:
    size = int(unit.max()) + 1
    _, rank = np.unique(score, return_inverse=True)
    positive, negative = np.flatnonzero(happened), np.flatnonzero(~happened)
    above = np.zeros((size, size))
    for u in range(size):
        count = np.bincount(rank[negative[unit[negative] == u]], minlength=int(rank.max()) + 1)
        below = (np.cumsum(count) - count / 2)[rank[positive]]
        above[:, u] = np.bincount(unit[positive], below, size)
    return _AurocCounts(
        above, *(np.bincount(unit[kind], minlength=size).astype(float) for kind in (positive, negative))
    )


def sum_by(groups: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Sums of each array over the rows of every group, in the order of the sorted group names."""
    _, unit = np.unique(groups, return_inverse=True)
    return [np.bincount(unit, weights=np.asarray(v, np.float64)) for v in values]


# ----------------------------------------------------------------------------------------- per mode


def regression(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """MSE, MAE, R² (against the mean target as prediction), Pearson and Spearman correlation."""
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
    """Expected calibration error over bins of about equal size (Naeini et al., 2015). Equal forecasts share a bin."""
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1]))
    bin_of = np.searchsorted(edges, probability, side="right")
    count = np.bincount(bin_of, minlength=len(edges) + 1)
    gap = np.bincount(bin_of, probability, len(edges) + 1) - np.bincount(bin_of, happened, len(edges) + 1)
    return float(np.abs(gap).sum() / count.sum())


def reliability(predicted: np.ndarray, happened: np.ndarray, bins: int = 10) -> list[list[float]]:
    """[mean prediction, mean outcome, count] for bins of about equal size. Equal predictions share a bin."""
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1]))
    bin_of = np.searchsorted(edges, predicted, side="right")
    count = np.bincount(bin_of)
    predictions, outcomes = np.bincount(bin_of, predicted), np.bincount(bin_of, happened)
    return [[float(predictions[b] / n), float(outcomes[b] / n), int(n)] for b, n in enumerate(count) if n]


def auroc(score: np.ndarray, happened: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Probability that a positive scores above a negative; NaN if there are only positives or only negatives."""
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
    """Entropy in nats of the n-grams of all sequences together. No n-gram spans two sequences."""
    grams = [np.lib.stride_tricks.sliding_window_view(s, n) for s in sequences if len(s) >= n]
    if not grams:
        return 0.0
    _, counts = np.unique(np.concatenate(grams), axis=0, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())
