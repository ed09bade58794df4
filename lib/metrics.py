"""Numbers that judge predictions, with 95 % intervals from resampling whole groups. numpy, scipy and scikit-learn only.

Every interval of this project is made here, by one method. A group (a document, a block, a page, a sample) is the unit:
values of one group are summed first, and whole groups are resampled. The interval is the bootstrap-t one (Efron, 1981;
Hall, 1988): each resample's deviation is taken in units of its own standard error, which follows the skewness that
groups of unequal size bring; the quantiles of these ratios are scaled by the jackknife's standard error (one group
left out at a time), and widened for the effective number of groups (Kish, 1965) when a few large ones decide. The
percentile bootstrap covers the truth in 90 to 93 % where this covers it in 94 to 96 % (tests/test_coverage.py).

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
MOST_UNITS = 1024  # of a ratio; more groups are pooled into this many units
MOST_GROUPS = 256  # of AUROC, whose time grows with their square
FEWEST_GROUPS = 10  # below, too few resamples differ: Student's t in place of their quantiles
SHARE = (0.0, 1.0)  # the limits of a share, an accuracy or an AUROC
_UNLIMITED = (-math.inf, math.inf)


class Estimate(NamedTuple):
    """A value and its 95 % interval. One group alone says nothing of the spread: then the ends are NaN."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """What `±` stands for."""
        return (self.high - self.low) / 2


@functools.lru_cache(maxsize=8)
def _counts(units: int, resamples: int, seed: int = 0) -> np.ndarray:
    """(R, G) how often each group is drawn in each resample: the same draws for every metric, so rows are paired."""
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
    """The interval of the module's head.

    Args:
        without: (G,) the value with one group left out.
        weights: (G,) share of each group in the value, for the effective number of groups.
        deviations, errors: (R,) each resample's value minus `value`, and its standard error; 0 or NaN where the
            resample has no spread, as when it holds one group alone.
        limits: what the value cannot pass.
    """
    size = len(without)
    if size < 2 or not np.isfinite(without).all():
        return Estimate(value, math.nan, math.nan)
    error = math.sqrt((size - 1) / size * float(((without - without.mean()) ** 2).sum()))
    share = weights / max(float(weights.sum()), 1e-300)
    effective = max(1 / float((share**2).sum()), 2.0)  # Kish's number of equal groups that would say as much
    tail = (1 - LEVEL) / 2
    of_few, of_all = (float(stdtrit(n - 1, 1 - tail)) for n in (effective, size))
    low, high = -of_few, of_few
    spread = np.isfinite(deviations) & (errors > 0)
    if size >= FEWEST_GROUPS and (~spread).mean() <= tail:
        low, high = np.quantile(deviations[spread] / errors[spread], [tail, 1 - tail]) * (of_few / of_all)
    # A resample above the value means that the truth may lie below it
    ends = np.clip([value - high * error, value - low * error], *limits)
    return Estimate(value, float(ends[0]), float(ends[1]))


def _spread(squares: np.ndarray, scale: np.ndarray, size: int) -> np.ndarray:
    """(R,) standard errors from sums of squared influences; 0 where all that is left is rounding."""
    return np.sqrt(np.where(squares > 1e-10 * scale, squares, 0.0) * size / (size - 1))


def ratio(
    numerators: np.ndarray,
    denominators: np.ndarray | None = None,
    resamples: int | None = None,
    limits: tuple[float, float] = _UNLIMITED,
    seed: int = 0,
) -> Estimate:
    """sum(numerators) / sum(denominators) over groups (the mean if no denominators), resampling groups.

    Args:
        numerators, denominators: (G,) sums of each group, see `sum_by`. Groups with two zeros count nothing.
        limits: (0, 1), `SHARE`, where the ratio is a share.
    """
    n = np.asarray(numerators, np.float64)
    d = np.ones_like(n) if denominators is None else np.asarray(denominators, np.float64)
    value = float(n.sum() / max(d.sum(), 1e-12))
    there = (n != 0) | (d != 0)
    n, d = _joined(n[there], MOST_UNITS), _joined(d[there], MOST_UNITS)
    size, total = len(d), d.sum()
    if size < 2:
        return Estimate(value, math.nan, math.nan)
    rest = total - d
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = n - value * d  # centred first: what is left of rounding is small
        without = np.where(rest > 0, value - residual / rest, np.nan)
        counts = _counts(size, resamples or RESAMPLES, seed)
        sums = counts @ np.stack([d, residual, residual**2, residual * d, d**2], 1)  # (R, 5)
        drawn, off, own, both, squared = sums.T
        deviation = np.where(drawn > 0, off / drawn, np.nan)
        squares = own - 2 * deviation * both + deviation**2 * squared
        errors = _spread(squares, own, size) / drawn
    return _interval(value, without, np.abs(d), deviation, errors, limits)


def _joined(values: np.ndarray, most: int) -> np.ndarray:
    """Values of more than `most` groups, summed into `most` units."""
    return values if len(values) <= most else np.bincount(np.arange(len(values)) % most, values)


def r2_estimate(predicted: np.ndarray, target: np.ndarray, groups: np.ndarray) -> Estimate:
    """1 - squared error / squared deviation from the targets' own mean, of (N,) predictions; groups resampled."""
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    centred = target - target.mean()
    e, y, q, m = (
        _joined(x, MOST_UNITS)
        for x in sum_by(groups, (predicted - target) ** 2, centred, centred**2, np.ones_like(target))
    )
    size, spread = len(e), q.sum()
    if not spread > 0:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(1 - e.sum() / spread)
    if size < 2:
        return Estimate(value, math.nan, math.nan)

    def unexplained(e, y, q, m):
        return e / (q - y**2 / m)

    with np.errstate(divide="ignore", invalid="ignore"):
        without = 1 - unexplained(*(x.sum() - x for x in (e, y, q, m)))
        counts = _counts(size, RESAMPLES)
        drawn = (counts @ np.stack([e, y, q, m], 1)).T
        share, mean = unexplained(*drawn), drawn[1] / drawn[3]  # (R,)
        around = (
            q - 2 * mean[:, None] * y + mean[:, None] ** 2 * m
        )  # (R, G) squares around the resample's mean
        influence = (e - share[:, None] * around) / (drawn[2] - drawn[1] ** 2 / drawn[3])[:, None]
        squares = (counts * influence**2).sum(1)
        errors = _spread(squares, share**2, size)
    return _interval(value, without, q, 1 - share - value, errors, (-math.inf, 1.0))


def auroc_estimate(
    score: np.ndarray, happened: np.ndarray, groups: np.ndarray, other: np.ndarray | None = None
) -> Estimate:
    """AUROC of (N,) scores, or by how much it exceeds that of `other` (N,) scores of the same values; groups resampled.

    More than MOST_GROUPS groups are pooled into that many units, which stay independent of each other.
    """
    happened = np.asarray(happened, bool)
    _, unit = np.unique(groups, return_inverse=True)
    unit = unit % MOST_GROUPS
    size = int(unit.max()) + 1
    ones, counts = np.ones((1, size)), _counts(size, RESAMPLES)
    found = _auroc_by_unit(score, happened, unit)
    value, _ = found.resampled(ones)
    resampled, influence = found.resampled(counts)
    without, limits = found.without(), SHARE
    if other is not None:
        rival = _auroc_by_unit(other, happened, unit)
        values, influences = rival.resampled(counts)
        value = value - rival.resampled(ones)[0]
        resampled, influence = resampled - values, influence - influences
        without, limits = without - rival.without(), (-1.0, 1.0)
    squares = (counts * influence**2).sum(1)
    weights = found.positive / max(found.positive.sum(), 1) + found.negative / max(found.negative.sum(), 1)
    errors = _spread(squares, np.ones_like(squares) * 1e-12, size) if size > 1 else squares
    return _interval(float(value[0]), without, weights, resampled - value[0], errors, limits)


class _ByUnit(NamedTuple):
    """What is sorted once for all resamples.

    Attributes:
        above: (G, G) how often a positive of one group (rows) is above a negative of another (columns), ties by half.
        positive, negative: (G,) how many values of each kind a group has.
    """

    above: np.ndarray
    positive: np.ndarray
    negative: np.ndarray

    def resampled(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((R,) AUROC with group g counted `counts[r, g]` times, (R, G) the influence of one more of group g).

        NaN where only one kind is left.
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
        above, own = self.above, np.diag(self.above)
        left = above.sum() - above.sum(0) - above.sum(1) + own
        pairs = (self.positive.sum() - self.positive) * (self.negative.sum() - self.negative)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(pairs > 0, left / pairs, np.nan)


def _auroc_by_unit(score: np.ndarray, happened: np.ndarray, unit: np.ndarray) -> _ByUnit:
    size = int(unit.max()) + 1
    _, rank = np.unique(score, return_inverse=True)
    positive, negative = np.flatnonzero(happened), np.flatnonzero(~happened)
    above = np.zeros((size, size))
    for u in range(size):
        count = np.bincount(rank[negative[unit[negative] == u]], minlength=int(rank.max()) + 1)
        below = (np.cumsum(count) - count / 2)[rank[positive]]
        above[:, u] = np.bincount(unit[positive], below, size)
    return _ByUnit(
        above, *(np.bincount(unit[kind], minlength=size).astype(float) for kind in (positive, negative))
    )


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
