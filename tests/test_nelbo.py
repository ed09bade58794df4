"""The NELBO: the weighted sum is an unbiased bound, for both weightings, and equals a brute-force sum."""

import itertools
import math

import numpy as np
import pytest

from lib.config import load_config
from lib.diffusion.masking import BatchDraw
from lib.diffusion.nelbo import mask_batch, stratified
from lib.sections.masking import DiffusionConfig


def config(weight: str, low: float = 0.0) -> DiffusionConfig:
    changes = [f"diffusion.weight={weight}", f"diffusion.min_masked_ratio={low}"]
    return load_config(overrides=changes).diffusion


def test_stratified_ratios_spread_evenly_within_a_step_and_are_uniform_over_steps():
    rows = np.arange(32 * 500)
    values = stratified(7, rows, 32).reshape(500, 32)
    assert (np.sort(np.floor(values * 32), axis=1) == np.arange(32)).all()  # one per stratum
    assert abs(values[:, 0].mean() - 0.5) < 5 / math.sqrt(12 * 500)


@pytest.mark.parametrize("weight", ["exact_count", "inverse_t"])
def test_estimate_agrees_with_the_bound_summed_over_all_masks(weight):
    """A model whose cross-entropy depends on how much it sees: the bound can be summed by hand."""
    length, draws = 4, 40_000

    def cross_entropy(num_masked: int) -> float:
        return 0.3 + 0.5 * num_masked  # nats per masked token, the more masked the harder

    # Order-free chain rule: with k masked, each prediction costs cross_entropy(k); k is uniform over 1..n.
    exact = sum(cross_entropy(k) for k in range(1, length + 1)) / length
    valid = np.ones((draws, length), bool)
    batch = mask_batch(config(weight), valid, BatchDraw(0, "test", np.arange(draws), 50))
    costs = np.array([cross_entropy(k) for k in range(length + 1)])[batch.masked.sum(1)]
    rows = (batch.weights * costs[:, None]).sum(1)
    assert abs(rows.mean() - exact) < 4 * rows.std() / math.sqrt(draws)


def test_exact_count_has_the_smaller_variance():
    valid = np.ones((4000, 16), bool)
    spread = {
        w: mask_batch(config(w), valid, BatchDraw(0, "test", np.arange(4000), 40)).weights.sum(1).std()
        for w in ("exact_count", "inverse_t")
    }
    assert spread["exact_count"] < 1e-5 < spread["inverse_t"]


@pytest.mark.parametrize("weight", ["exact_count", "inverse_t"])
def test_padding_is_never_masked_and_a_row_weighs_by_its_own_length(weight):
    valid = np.tile(np.arange(10)[None, :] < np.array([[10], [3], [1]]), (2000, 1))
    batch = mask_batch(config(weight), valid, BatchDraw(1, "test", np.arange(6000), 3))
    assert not (batch.masked & ~valid).any() and not batch.weights[~valid].any()
    if weight == "exact_count":
        np.testing.assert_allclose(batch.weights.sum(1), 1, rtol=1e-6)
    for length in range(3):  # on average a row's weights are 1, whatever its length
        assert batch.weights[length::3].sum(1).mean() == pytest.approx(1, abs=0.15)
    np.testing.assert_allclose(batch.ratios, batch.masked.sum(1) / valid.sum(1))


def test_every_count_occurs_equally_often():
    valid = np.ones((16_000, 8), bool)
    counts = mask_batch(config("exact_count"), valid, BatchDraw(2, "test", np.arange(16_000), 16)).masked.sum(
        1
    )
    share = np.bincount(counts, minlength=9)[1:] / 16_000
    assert np.abs(share - 1 / 8).max() < 0.01


def test_min_masked_ratio_bounds_the_ratios():
    valid = np.ones((500, 20), bool)
    assert (
        mask_batch(config("exact_count", 0.5), valid, BatchDraw(3, "test", np.arange(500), 10)).ratios.min()
        >= 0.5
    )


def test_all_masks_of_a_count_are_equally_likely():
    valid = np.ones((30_000, 4), bool)
    masked = mask_batch(config("exact_count"), valid, BatchDraw(4, "test", np.arange(30_000), 30)).masked
    two = masked[masked.sum(1) == 2]
    share = [np.mean(two[:, a] & two[:, b]) for a, b in itertools.combinations(range(4), 2)]
    assert np.abs(np.array(share) - 1 / 6).max() < 0.02


def test_whole_lines_are_masked_and_weighed_by_what_was_masked():
    lines = np.tile(np.repeat(np.arange(5), [4, 10, 6, 12, 8]), (200, 1))
    masking = "{type: line, min_ratio: 0.1, max_ratio: 0.9}"
    by_line = load_config(overrides=[f"diffusion.masking={masking}"]).diffusion
    batch = mask_batch(by_line, np.ones(lines.shape, bool), BatchDraw(5, "test", np.arange(200), 20), lines)
    for masked, row in zip(batch.masked, lines, strict=True):
        assert all(masked[row == n].all() or not masked[row == n].any() for n in range(5))
    np.testing.assert_allclose(batch.weights.sum(1), 1, rtol=1e-6)
