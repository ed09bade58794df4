"""Keyed noise: uniform, independent, the same for a row in any batch, the same tomorrow."""

import numpy as np
import pytest

from lib import randomness


def test_stored_values_so_that_old_runs_stay_reproducible():
    assert randomness.key(1337, "step", 5) == STORED_KEY
    np.testing.assert_array_equal(randomness.bits(42, [0, 7], 2), np.array(STORED_BITS, np.uint64))


STORED_KEY = 10465847967101500592
STORED_BITS = [[10996452266160306281, 2958219263312191191], [9508832464636469864, 3312437767693446675]]


def test_uniform_over_rows_over_columns_and_over_keys():
    for sample in (
        randomness.uniform(1, np.arange(100_000), 1)[:, 0],
        randomness.uniform(1, [0], 100_000)[0],
        np.array([randomness.uniform(randomness.key(0, "k", i), [0], 1)[0, 0] for i in range(20_000)]),
    ):
        counts = np.bincount((sample * 100).astype(int), minlength=100)
        chi_square = ((counts - len(sample) / 100) ** 2 / (len(sample) / 100)).sum()
        assert 50 < chi_square < 165  # 99 degrees of freedom


def test_neighbouring_rows_columns_and_keys_are_uncorrelated():
    block = randomness.uniform(3, np.arange(2000), 50)
    other = randomness.uniform(4, np.arange(2000), 50)
    for a, b in ((block[:-1], block[1:]), (block[:, :-1], block[:, 1:]), (block, other)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015


def test_each_bit_is_fair():
    bits = randomness.bits(9, np.arange(20_000), 1)[:, 0]
    shares = [((bits >> np.uint64(i)) & np.uint64(1)).mean() for i in range(64)]
    assert np.abs(np.array(shares) - 0.5).max() < 0.02


def test_any_subset_of_rows_gives_the_same_numbers():
    whole = randomness.uniform(5, np.arange(50), 8)
    np.testing.assert_array_equal(randomness.uniform(5, [31, 2, 44], 8), whole[[31, 2, 44]])
    np.testing.assert_array_equal(randomness.uniform(5, np.arange(50), 3), whole[:, :3])


def test_permutations_differ_by_epoch_and_are_whole():
    orders = [randomness.permutation(1, "order", e, 1000) for e in range(3)]
    assert all(sorted(o) == list(range(1000)) for o in orders)
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.15
    assert (orders[0] != orders[1]).mean() > 0.99


def test_hash_fraction_is_uniform():
    values = np.array([randomness.hash_fraction(1, "split", f"document {i}") for i in range(20_000)])
    assert values.mean() == pytest.approx(0.5, abs=0.01) and values.min() >= 0 and values.max() < 1
