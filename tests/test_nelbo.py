"""The NELBO: the weighted sum is an unbiased bound, for both weightings, and equals a brute-force sum."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm

from lib.config import load_config
from lib.diffusion.masking import BatchDraw
from lib.diffusion.nelbo import draw_ratios, mask_batch, stratified
from lib.models.build import start_model
from lib.sections.masking import DiffusionConfig
from lib.training.objectives.language_model import MaskedDiffusion
from tests.trainings import TOKENIZER, TOKENS, context, splits


def config(weight: str, low: float = 0.0) -> DiffusionConfig:
    """With uniform ratios, as in the bound."""
    changes = [f"diffusion.weight={weight}", f"diffusion.min_masked_ratio={low}"]
    return load_config(overrides=[*changes, "diffusion.ratios={type: uniform}"]).diffusion


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


# --- the distribution of mask ratios -------------------------------------------------------------------------------------


def normal(mean: float, deviation: float, uniform_from: float = 1.0) -> DiffusionConfig:
    values = f"{{type: normal, mean: {mean}, deviation: {deviation}, uniform_from: {uniform_from}}}"
    return load_config(overrides=[f"diffusion.ratios={values}"]).diffusion


@pytest.mark.parametrize("mean, deviation", [(0.5, 0.2), (0.3, 0.4), (0.9, 0.05)])
def test_normal_ratios_have_the_distribution_of_a_truncated_normal(mean, deviation):
    drawn = draw_ratios(normal(mean, deviation).ratios, stratified(3, np.arange(32 * 400), 32), 0.0)
    wanted = truncnorm((0 - mean) / deviation, (1 - mean) / deviation, mean, deviation)
    assert kstest(drawn, wanted.cdf).pvalue > 0.01
    bands = np.floor(
        wanted.cdf(drawn).reshape(400, 32) * 32 - 1e-9
    )  # each step covers the distribution evenly
    assert (np.sort(bands, axis=1) == np.arange(32)).mean() > 0.99


def test_normal_ratios_turn_into_uniform_ones_at_the_end():
    uniform = stratified(3, np.arange(3200), 32)
    ratios = normal(0.5, 0.1, uniform_from=0.5).ratios
    spread = [draw_ratios(ratios, uniform, progress).std() for progress in (0.0, 0.5, 0.75, 0.9, 1.0)]
    assert spread[0] == spread[1] < spread[2] < spread[3] < spread[4]
    np.testing.assert_array_equal(draw_ratios(ratios, uniform, 1.0), uniform)
    by_row = draw_ratios(ratios, uniform, np.repeat([0.0, 1.0], 1600))
    np.testing.assert_array_equal(by_row[1600:], uniform[1600:])
    np.testing.assert_array_equal(by_row[:1600], draw_ratios(ratios, uniform[:1600], 0.0))


def test_uniform_ratios_are_those_of_the_bound():
    uniform = stratified(3, np.arange(3200), 32)
    assert draw_ratios(config("exact_count").ratios, uniform, 0.3) is uniform


def test_training_follows_the_ratios_and_evaluation_measures_the_bound():
    """The objective gives each step its place in the training; evaluation has the same masks whatever training draws."""
    architecture = load_config(quick_test=True).architecture
    model, _ = start_model("language_model", architecture, "bidirectional", len(TOKENIZER), 0, "m")
    plain = MaskedDiffusion(context(steps=100), splits(), config("exact_count"), TOKENS)
    bell = MaskedDiffusion(context(steps=100), splits(), normal(0.5, 0.05, uniform_from=0.5), TOKENS)
    with torch.no_grad():
        assert plain.evaluate(model.eval()) == bell.evaluate(model)
    ids, valid = np.full((8, 16), 5), np.ones((8, 16), bool)

    def ratios(objective: MaskedDiffusion, step: int) -> np.ndarray:
        return objective.mask(ids, valid, "test", np.arange(8 * step, 8 * step + 8), 8).ratios

    for step in (0, 49):
        assert np.abs(ratios(bell, step) - 0.5).max() < 0.25 < np.abs(ratios(plain, step) - 0.5).max()
    assert np.abs(ratios(bell, 99) - ratios(plain, 99)).max() <= 1 / 16
    # What a critic reads is filled from any ratio, as in sampling
    filled, wanted = (
        mask(ids, valid, "test", np.arange(8), 8).masked for mask in (bell.mask_to_fill, plain.mask)
    )
    np.testing.assert_array_equal(filled, wanted)
