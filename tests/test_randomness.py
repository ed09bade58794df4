"""Keyed noise: uniform, independent, the same for a row in any batch, the same tomorrow."""

import ast

import numpy as np
import pytest

from lib import randomness
from lib.config import ROOT


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


def test_draws_of_two_purposes_or_seeds_have_nothing_in_common():
    orders = [
        randomness.permutation(seed, purpose, 0, 1000) for seed, purpose in ((0, "a"), (0, "b"), (1, "a"))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (orders[i] == orders[j]).mean() < 0.02
    texts = [f"document {i}" for i in range(2000)]
    fractions = [
        np.array([randomness.hash_fraction(seed, purpose, t) for t in texts])
        for seed, purpose in ((0, "a"), (0, "b"), (1, "a"))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(fractions[i], fractions[j])[0, 1]) < 0.1
    keys = [randomness.key(0, "a"), randomness.key(1, "a"), randomness.key(0, "b"), randomness.key(0, "a", 1)]
    assert len(set(keys)) == 4 and randomness.key(0, "a", 1, 2) != randomness.key(0, "a", 2, 1)


TWICE = {  # what several places have on purpose
    "selection candidates",  # inspector and judge are evaluated on the same ones
    "f'{label} weights",  # one or the other makes a model, each of its own label
    "f'{label} order",  # the same
    "f'{context.label} order",  # the same
    "ratio",  # of a BatchDraw, which puts the purpose of its caller in front; one or the other draws a batch's masks
    "mask",  # of a BatchDraw, and of stage 02, whose context puts the stage in front
}


def purposes() -> list[tuple[str, str]]:
    """(purpose as it stands in the code, file and line) of every keyed draw of the library."""
    found = []
    for path in sorted((ROOT / "lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            place = {
                "key": 1,
                "permutation": 1,
                "hash_fraction": 1,
                "_generator": 1,
                "Rows": 1,
                "_noise": 0,
            }.get(name)
            own = name == "key" and len(node.args) == 1  # of a context, which knows the seed
            if place is None or len(node.args) <= (0 if own else place):
                continue
            purpose = node.args[0 if own else place]
            if isinstance(purpose, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append((ast.unparse(purpose).strip("'\""), f"{path.relative_to(ROOT)}:{node.lineno}"))
    return found


def test_no_two_draws_have_one_purpose():
    """Two draws of one key are one draw: what should be independent would be equal."""
    places: dict[str, list[str]] = {}
    for purpose, place in purposes():
        places.setdefault(purpose, []).append(place)
    assert len(places) > 50
    twice = {p: where for p, where in places.items() if len(where) > 1 and p not in TWICE}
    assert not twice


# ------------------------------------------------------------------------------- permutations of many samples


def sorted_order(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """The permutation of up to 10^7 samples as it has always been: the order of one draw per sample."""
    draws = randomness.bits(randomness.key(seed, purpose, epoch), np.arange(count), 1)[:, 0]
    return np.argsort(draws, kind="stable")


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 2**16, 2**16 + 1, 200_003])
def test_a_permutation_that_fits_in_memory_is_the_order_of_its_draws(count):
    expected = sorted_order(4, "order", 7, count)
    found = randomness.permutation(4, "order", 7, count)
    assert found.dtype == np.int64 and np.array_equal(found, expected)
    index = np.arange(count)[:: max(1, count // 5)]
    assert np.array_equal(randomness.Permutation(4, "order", 7, count)[index], expected[index])
    assert np.array_equal(randomness.sample(4, "s", count, 10), np.sort(sorted_order(4, "s", 0, count)[:10]))


@pytest.mark.parametrize("draw_key", [0, 1, 2**64 - 1])
def test_the_feistel_network_visits_every_sample_once(draw_key):
    """All counts up to 300, and those around powers of two and four: every value occurs exactly once."""
    powers = [2**k + d for k in range(9, 18) for d in (-1, 0, 1)]
    for count in [*range(1, 301), *powers]:
        found = randomness.feistel(draw_key, count, np.arange(count))
        assert np.array_equal(np.sort(found), np.arange(count)), count


def test_the_feistel_network_answers_position_by_position():
    count = 12_345_678_901
    index = np.array([[0, 1], [count - 1, 2**31 + 5]])
    found = randomness.feistel(9, count, index)
    assert found.shape == (2, 2) and ((found >= 0) & (found < count)).all()
    assert all(randomness.feistel(9, count, index[i, j]) == found[i, j] for i in (0, 1) for j in (0, 1))
    for wrong in (-1, count):
        with pytest.raises(IndexError, match="of a permutation of 12345678901 samples"):
            randomness.feistel(9, count, np.array([wrong]))


def test_values_of_the_feistel_network_are_uniform_and_independent():
    """Over 4,000 keys: the value of a position, the pair of two positions, and the distance of neighbours."""
    from scipy.stats import chisquare

    count, keys = 12, 4000
    values = np.array(
        [randomness.feistel(k * 7919 + 1, count, np.arange(count)) for k in range(keys)]
    )  # (keys, 12)
    for position in range(count):
        assert chisquare(np.bincount(values[:, position], minlength=count)).pvalue > 1e-5
    for one, other in ((0, 1), (3, 11), (5, 6)):
        pairs = np.bincount(values[:, one] * count + values[:, other], minlength=count**2).reshape(
            count, count
        )
        assert not np.diag(pairs).any()
        assert chisquare(pairs[~np.eye(count, dtype=bool)]).pvalue > 1e-5


def test_one_long_order_looks_random():
    """Values of consecutive positions: evenly spread, without serial correlation, and unlike those of another epoch."""
    from scipy.stats import chisquare

    count = 3 * 10**8
    index = np.arange(100_000)
    first, second = (randomness.Permutation(2, "order", epoch, count)[index] for epoch in (0, 1))
    assert len(np.unique(first)) == len(index)
    for values in (first, second):
        assert chisquare(np.bincount(values * 100 // count, minlength=100)).pvalue > 1e-5
        assert chisquare(np.bincount(values % 97, minlength=97)).pvalue > 1e-5
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_long_permutations_hold_no_array():
    import tracemalloc

    tracemalloc.start()
    order = randomness.Permutation(1, "order", 0, randomness.MAX_SORTED + 1)
    order[np.arange(64)]
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
