"""Metrics against formulas written out, and intervals that cover as often as they say."""

import numpy as np
import pytest

from lib import metrics


def test_regression_against_formulas():
    target = np.array([0.0, 0.5, 1.0, 0.25])
    predicted = np.array([0.1, 0.4, 0.8, 0.3])
    values = metrics.regression(predicted, target)
    assert values["mse"] == pytest.approx(((predicted - target) ** 2).mean())
    assert values["r2"] == pytest.approx(1 - values["mse"] / target.var())
    assert values["spearman"] == 1
    assert metrics.regression(np.full(4, target.mean()), target)["r2"] == pytest.approx(0)


def test_classification_of_a_known_table():
    values = metrics.classification(np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]]))
    assert values["accuracy"] == pytest.approx(12 / 15)
    assert values["precision_1"] == pytest.approx(4 / 6) and values["recall_1"] == pytest.approx(4 / 5)
    assert values["f1_1"] == pytest.approx(8 / 11) and "f1_2" not in values


def test_calibration_error_of_honest_and_boastful_forecasts():
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    happened = rng.random(50_000) < p
    assert metrics.calibration_error(p, happened) < 0.01
    assert metrics.calibration_error(np.where(p > 0.5, 1.0, 0.0), happened) == pytest.approx(0.25, abs=0.01)


def test_reliability_is_the_means_of_equally_filled_bins():
    predicted, happened = np.repeat([0.1, 0.4, 0.9], 10), np.r_[np.zeros(10), np.tile([0, 1], 5), np.ones(10)]
    points = metrics.reliability(predicted, happened, 3)
    assert np.allclose(points, [[0.1, 0, 10], [0.4, 0.5, 10], [0.9, 1, 10]])
    assert metrics.reliability(np.full(5, 0.3), np.arange(5) % 2) == [[pytest.approx(0.3), 0.4, 5]]


def test_groups_are_resampled_whole():
    """Ten copies of each value carry no more knowledge than one."""
    rng = np.random.default_rng(2)
    score, happened = rng.random(100), rng.random(100) < 0.5
    groups = np.arange(100)
    width = {}
    for copies in (1, 10):
        s, h, g = (np.repeat(x, copies) for x in (score, happened, groups))
        e = metrics.auroc_estimate(s, h, g)
        width[copies] = e.high - e.low
    assert width[10] == pytest.approx(width[1], rel=0.01)


def test_auroc_of_resampled_groups_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    score, happened = rng.integers(0, 20, 500) / 20, rng.random(500) < 0.3
    groups = rng.integers(0, 30, 500)
    draws = np.concatenate([np.ones((1, 30)), rng.integers(0, 4, (5, 30)), 1 - np.eye(30)])
    by_unit = metrics._auroc_by_unit(score, happened, groups)
    values, influence = by_unit.resampled(draws)
    for draw, found in zip(draws, values, strict=True):
        assert found == pytest.approx(metrics.auroc(score, happened, draw[groups].astype(float)))
    np.testing.assert_allclose(by_unit.without(), values[6:])
    for unit in (0, 7):  # one more of a group, by finite differences
        more = draws[1] + 1e-6 * (np.arange(30) == unit)
        slope = (by_unit.resampled(more[None])[0][0] - values[1]) / 1e-6
        assert influence[1, unit] == pytest.approx(slope, abs=1e-5)
    whole = metrics.auroc_estimate(score, happened, groups)
    assert (
        whole.value == pytest.approx(metrics.auroc(score, happened)) and whole.low < whole.value < whole.high
    )
    noisy = score + rng.normal(0, 0.3, 500)
    difference = metrics.auroc_estimate(score, happened, groups, noisy)
    assert difference.value == pytest.approx(whole.value - metrics.auroc(noisy, happened))
    assert metrics.auroc_estimate(score, happened, groups, score)[:] == (0, 0, 0)
    one_each = np.arange(500)  # more groups than are told apart
    many = metrics.auroc_estimate(score, happened, one_each)
    assert many.high - many.low == pytest.approx(whole.high - whole.low, rel=0.4)


def test_ngram_entropy():
    even = [np.tile([1, 2, 3, 4], 50)]
    assert metrics.ngram_entropy(even, 1) == pytest.approx(np.log(4))
    assert metrics.ngram_entropy([np.zeros(9, int)], 4) == 0
