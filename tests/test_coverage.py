"""Intervals cover the truth as often as they say, for groups of unequal size; their parts against formulas written out."""

import math

import numpy as np
import pytest
from scipy import stats

from lib import metrics

REPETITIONS = 2000


def sizes(rng, count: int) -> np.ndarray:
    """Documents: most are short, a few are long."""
    return np.ceil(rng.lognormal(2.5, 0.8, count)).astype(int)


def share_covered(estimate, truth: float, repetitions: int) -> float:
    """How often `estimate()` holds the truth."""
    found = [estimate() for _ in range(repetitions)]
    return float(np.mean([e.low <= truth <= e.high for e in found]))


@pytest.mark.slow
@pytest.mark.parametrize("count", [25, 60])
def test_nelbo_and_nll_cover(count):
    """Nats of whole documents over their tokens: each document has a difficulty of its own, skewed to the right."""
    rng = np.random.default_rng(count)

    def once() -> metrics.Estimate:
        tokens = sizes(rng, count)
        nats = rng.gamma(8, 2 / 8, count) * rng.gamma(2.0 * tokens, 0.5)
        return metrics.ratio(nats, tokens)

    assert 0.93 < share_covered(once, 2.0, REPETITIONS) < 0.97


@pytest.mark.slow
def test_accuracy_covers_near_its_end():
    rng = np.random.default_rng(1)

    def once() -> metrics.Estimate:
        tokens = sizes(rng, 30)
        return metrics.ratio(rng.binomial(tokens, rng.beta(9, 1, 30)), tokens, limits=metrics.SHARE)

    assert 0.93 < share_covered(once, 0.9, REPETITIONS) < 0.97


@pytest.mark.slow
def test_r2_covers():
    rng = np.random.default_rng(2)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of = np.repeat(np.arange(count), sizes(rng, count))
        target = rng.normal(0, 0.5, count)[of] + rng.random(len(of))
        predicted = 0.7 * target + 0.1 + rng.normal(0, 0.1, count)[of] + rng.normal(0, 0.2, len(of))
        return predicted, target, of

    predicted, target, _ = draw(30_000)
    truth = 1 - ((predicted - target) ** 2).mean() / target.var()
    assert 0.92 < share_covered(lambda: metrics.r2_estimate(*draw(30)), truth, 600) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize("max_units", [256, 24])
def test_auroc_covers_also_where_groups_are_pooled(monkeypatch, max_units):
    monkeypatch.setattr(metrics, "MAX_AUROC_UNITS", max_units)
    rng = np.random.default_rng(3)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of = np.repeat(np.arange(count), sizes(rng, count))
        happened = rng.random(len(of)) < rng.beta(4, 6, count)[of]
        shift, gain = rng.normal(0, 0.7, count)[of], rng.normal(1, 0.5, count)[of]
        return shift + gain * happened + rng.normal(0, 1, len(of)), happened, of

    truth = float(np.mean([metrics.auroc(*draw(3000)[:2]) for _ in range(6)]))
    assert 0.915 < share_covered(lambda: metrics.auroc_estimate(*draw(40)), truth, 400) < 0.98


def test_few_groups_get_students_interval_of_the_jackknife_widened_for_unequal_sizes():
    n, d = np.array([4.0, 1.0, 9.0, 2.0]), np.array([2.0, 1.0, 5.0, 2.0])
    found = metrics.ratio(n, d)
    without = np.array([(n.sum() - n[i]) / (d.sum() - d[i]) for i in range(4)])
    error = math.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    effective = d.sum() ** 2 / (d**2).sum()
    half = stats.t.ppf(0.975, effective - 1) * error
    assert found == pytest.approx((1.6, 1.6 - half, 1.6 + half))
    assert found.half_width == pytest.approx(half)


@pytest.mark.parametrize("equal", [True, False])
def test_resamples_are_studentised_and_follow_the_skewness(equal):
    """The bootstrap-t interval written out, resample by resample; unequal groups widen it."""
    rng = np.random.default_rng(4)
    d = np.full(20, 1.0) if equal else rng.lognormal(0, 0.8, 20)
    n = d * rng.exponential(1, 20)
    value, ratios = n.sum() / d.sum(), []
    for count in metrics._counts(20, metrics.RESAMPLES):
        of = np.repeat(np.arange(20), count.astype(int))
        drawn = n[of].sum() / d[of].sum()
        error = math.sqrt(20 / 19 * ((n[of] - drawn * d[of]) ** 2).sum()) / d[of].sum()
        ratios.append((drawn - value) / error)
    low, high = np.quantile(ratios, [0.025, 0.975])
    effective = d.sum() ** 2 / (d**2).sum()
    wider = stats.t.ppf(0.975, effective - 1) / stats.t.ppf(0.975, 19)
    without = (n.sum() - n) / (d.sum() - d)
    error = math.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum()) * wider
    found = metrics.ratio(n, d)
    assert found == pytest.approx((value, value - high * error, value - low * error))
    assert (wider > 1.02) != equal
    assert found.high - value > 1.1 * (value - found.low)  # the truth of such values lies above more often


def test_a_ratio_in_other_units_has_the_interval_in_other_units():
    rng = np.random.default_rng(5)
    tokens = sizes(rng, 30)
    nats = 2.0 * tokens + rng.normal(0, 3, 30)
    one = np.array(metrics.ratio(nats, tokens))
    np.testing.assert_allclose(metrics.ratio(1000 * nats, tokens), 1000 * one)
    np.testing.assert_allclose(metrics.ratio(nats + tokens, tokens), one + 1)
    with_nothing = metrics.ratio(np.append(nats, 0), np.append(tokens, 0))
    np.testing.assert_allclose(with_nothing, one)


def test_more_groups_than_are_told_apart_give_about_the_same_interval():
    rng = np.random.default_rng(6)
    tokens = sizes(rng, 3000)
    nats = 2.0 * tokens + rng.normal(0, 3, 3000)
    found = metrics.ratio(nats, tokens)
    half = 1.96 * math.sqrt(((nats - found.value * tokens) ** 2).sum()) / tokens.sum()
    assert found.half_width == pytest.approx(half, rel=0.08)


def test_one_group_gives_no_interval_and_equal_ones_one_without_width():
    value, low, high = metrics.ratio(np.array([6.0]), np.array([3.0]))
    assert value == 2 and math.isnan(low) and math.isnan(high)
    assert metrics.ratio(np.arange(1.0, 21), np.arange(1.0, 21))[:] == (1, 1, 1)
    assert math.isnan(metrics.r2_estimate(np.arange(3.0), np.arange(3.0) ** 2, np.zeros(3)).low)
    assert math.isnan(metrics.auroc_estimate(np.arange(4.0), np.arange(4) > 1, np.zeros(4)).low)


def test_one_group_that_differs_makes_a_wide_interval_within_the_limits():
    """Most resamples then hold no copy of it, or nothing but it: they have no spread to divide by."""
    hits, tokens = np.full(30, 10.0), np.full(30, 10.0)
    hits[3] = 4
    found = metrics.ratio(hits, tokens, limits=metrics.SHARE)
    assert found.value == pytest.approx(0.98) and found.low < 0.945 and found.high == 1


def test_r2_is_that_of_the_formula_and_its_limit_is_1():
    rng = np.random.default_rng(7)
    target = rng.random(200) + 5
    predicted = target + rng.normal(0, 0.02, 200)
    found = metrics.r2_estimate(predicted, target, np.arange(200) % 20)
    assert found.value == pytest.approx(metrics.regression(predicted, target)["r2"])
    assert found.low < found.value < found.high <= 1
    shifted = metrics.r2_estimate(predicted + 1e3, target + 1e3, np.arange(200) % 20)
    np.testing.assert_allclose(shifted, found, rtol=1e-6)


def test_a_difference_of_r2_is_paired():
    """Errors that two predictions share do not widen the interval of their difference."""
    rng = np.random.default_rng(8)
    target, groups = rng.random(200), np.arange(200) % 20
    one = target + rng.normal(0, 0.2, 200)
    other = one + rng.normal(0, 0.02, 200)
    found = metrics.r2_estimate(one, target, groups, other)
    values = [metrics.regression(predicted, target)["r2"] for predicted in (one, other)]
    assert found.value == pytest.approx(values[0] - values[1]) and found.low < found.value < found.high
    assert found.half_width < 0.3 * metrics.r2_estimate(one, target, groups).half_width
    turned = metrics.r2_estimate(other, target, groups, one)
    np.testing.assert_allclose(turned, [-found.value, -found.high, -found.low])
    assert metrics.r2_estimate(one, target, groups, one) == pytest.approx((0, 0, 0))


def test_a_perfect_auroc_has_the_exact_interval():
    """The trials are disjoint pairs of a positive and a negative group: here three, whatever the number of negatives."""
    groups, happened = np.arange(12), np.arange(12) < 3
    low = stats.binomtest(3, 3).proportion_ci(0.95, "exact").low
    score = happened + np.arange(12) / 100
    assert metrics.auroc_estimate(score, happened, groups) == pytest.approx((1, low, 1))
    assert metrics.auroc_estimate(-score, happened, groups) == pytest.approx((0, 0, 1 - low))
    assert metrics.auroc_estimate(score, happened, groups, 2 * score) == pytest.approx((0, 0, 0))
