"""Masking: exact counts, keyed rows, runs as sticky as the settings say, no stall."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import RandomMasking, StickyMasking
from lib.diffusion.masking import draw_mask, masked_counts, mean_run_length

RANDOM = RandomMasking(type="random")


def sticky(p1: float, p2: float) -> StickyMasking:
    return StickyMasking(type="sticky", p1=p1, p2=p2)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [RANDOM, sticky(0.3, 0.0), sticky(0.02, 0.9), sticky(0.0, 0.9), sticky(0.0, 0.0), sticky(1, 1)]
    ),
    st.integers(1, 40),
    st.integers(0, 10_000),
    st.data(),
)
def test_counts_are_exact_and_only_eligible_tokens_are_masked(masking, length, key, data):
    rng = np.random.default_rng(key)
    eligible = rng.random((5, length)) < 0.8
    counts = np.array([data.draw(st.integers(0, int(n))) for n in eligible.sum(1)])
    mask = draw_mask(masking, eligible, counts, key, np.arange(5))
    assert (mask.sum(1) == counts).all()
    assert not (mask & ~eligible).any()


def test_a_row_does_not_depend_on_its_batch():
    eligible = np.ones((8, 100), bool)
    counts = np.full(8, 40)
    for masking in (RANDOM, sticky(0.05, 0.8)):
        whole = draw_mask(masking, eligible, counts, 3, np.arange(8))
        alone = draw_mask(masking, eligible[:1], counts[:1], 3, np.array([5]))
        np.testing.assert_array_equal(whole[5], alone[0])


def test_sticky_runs_are_longer_than_independent_ones_and_grow_with_stickiness():
    eligible, counts = np.ones((64, 1024), bool), np.full(64, 410)
    lengths = [
        mean_run_length(draw_mask(m, eligible, counts, 1, np.arange(64)))
        for m in (RANDOM, sticky(0.2, 0.8), sticky(0.02, 0.9))
    ]
    assert lengths[0] == pytest.approx(1 / 0.6, rel=0.03)
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[2] > 4


def test_random_masking_is_uniform_over_positions():
    mask = draw_mask(RANDOM, np.ones((4000, 20), bool), np.full(4000, 5), 9, np.arange(4000))
    share = mask.mean(0)
    assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_more_masks_than_tokens_is_refused():
    with pytest.raises(ValueError, match="more masks than"):
        draw_mask(RANDOM, np.ones((1, 3), bool), np.array([4]), 0, np.array([0]))


def test_masked_counts_round_to_the_nearest_and_mask_at_least_one():
    counts = masked_counts(np.array([0.0, 0.5, 1.0, 0.26]), np.array([10, 5, 7, 10]))
    assert counts.tolist() == [1, 2, 7, 3]
