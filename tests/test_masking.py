"""Masking: exact counts, keyed rows, runs as sticky as the settings say, whole lines, no jam; 80/10/10."""

import os
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import load_config
from lib.diffusion.masking import (
    BatchDraw,
    corrupt_80_10_10,
    draw_mask,
    expected_run_length,
    line_numbers,
    masked_counts,
    mean_run_length,
)
from lib.errors import BadConfig
from lib.sections.masking import LineMasking, Masking, RandomMasking, SpanMasking, StickyMasking

RANDOM = RandomMasking(type="random")


def sticky(p1: float, p2: float) -> StickyMasking:
    return StickyMasking(type="sticky", p1=p1, p2=p2)


def span(num_spans: int) -> SpanMasking:
    return SpanMasking(type="span", num_spans=num_spans)


def line(min_ratio: float = 0.0, max_ratio: float = 1.0) -> LineMasking:
    return LineMasking(type="line", min_ratio=min_ratio, max_ratio=max_ratio)


EXACT: list[Masking] = [
    RANDOM, span(1), span(3), span(1000), sticky(0.3, 0.0), sticky(0.3, 0.1), sticky(0.02, 0.9), sticky(1e-5, 0.5),
    sticky(1e-9, 0.5), sticky(0.0, 0.9), sticky(0.0, 0.01), sticky(0.2, 0.2), sticky(1, 0), sticky(1, 1),
]  # fmt: skip


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of one row, the obvious way."""
    return [len(run) for run in "".join("x" if m else " " for m in mask).split()]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(EXACT), st.integers(1, 40), st.integers(0, 10_000), st.data())
def test_counts_are_exact_and_only_eligible_tokens_are_masked(masking, length, key, data):
    rng = np.random.default_rng(key)
    eligible = rng.random((5, length)) < rng.choice([0.3, 0.8, 1.0])
    counts = np.array([data.draw(st.integers(0, int(n))) for n in eligible.sum(1)])
    mask = draw_mask(masking, eligible, counts, key, np.arange(5))
    assert (mask.sum(1) == counts).all()
    assert not (mask & ~eligible).any()


@pytest.mark.parametrize("masking", EXACT, ids=str)
def test_counts_are_exact_at_every_ratio_and_padding(masking):
    lengths = np.tile([300, 299, 128, 17, 1, 0], 10)
    ratios = np.repeat(np.linspace(0.02, 1, 10), 6)
    valid = np.arange(300) < lengths[:, None]
    counts = masked_counts(ratios, lengths)
    mask = draw_mask(masking, valid, counts, 5, np.arange(60))
    assert (mask.sum(1) == counts).all()
    assert not (mask & ~valid).any()


@pytest.mark.parametrize("masking", [*EXACT, line(), line(0.3, 0.35)], ids=str)
def test_a_row_depends_on_neither_its_batch_nor_the_width_of_the_padding(masking):
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 100, 8)
    lengths[5] = 100
    eligible = (np.arange(100) < lengths[:, None]) & (rng.random((8, 100)) < 0.95)
    counts = masked_counts(np.full(8, 0.4), eligible.sum(1))
    lines = line_numbers(rng.random((8, 100)) < 0.1)
    whole = draw_mask(masking, eligible, counts, 3, np.arange(8), lines)
    for row in range(8):
        here = slice(row, row + 1)
        alone = draw_mask(masking, eligible[here], counts[here], 3, np.array([row]), lines[here])
        np.testing.assert_array_equal(whole[row], alone[0])
        short = slice(0, lengths[row])
        cut = draw_mask(masking, eligible[here, short], counts[here], 3, np.array([row]), lines[here, short])
        np.testing.assert_array_equal(whole[row, short], cut[0])
    backwards = draw_mask(masking, eligible[::-1], counts[::-1], 3, np.arange(8)[::-1], lines[::-1])
    np.testing.assert_array_equal(whole, backwards[::-1])
    assert (draw_mask(masking, eligible, counts, 4, np.arange(8), lines) != whole).any()


def sticky_row(p1: float, p2: float, length: int, count: int, rng: random.Random) -> list[bool]:
    """One row, round by round, as slow and plain as the description of sticky masking."""

    def masked(i: int) -> bool:
        return 0 <= i < length and mask[i]

    mask = [False] * length
    while sum(mask) < count:
        chances = [p2 if masked(i - 1) or masked(i + 1) else p1 for i in range(length)]
        if all(chances[i] == 0 for i in range(length) if not mask[i]):  # jammed: one token at random
            mask[rng.choice([i for i in range(length) if not mask[i]])] = True
            continue
        new = [i for i in range(length) if not mask[i] and rng.random() < chances[i]]
        for i in new:
            mask[i] = True
        while sum(mask) > count:
            ends = [i for i in new if mask[i] and not (masked(i - 1) and masked(i + 1))]
            if not ends:  # only joints of two runs are left
                ends = [i for i in new if mask[i]]
            for i in rng.sample(ends, min(len(ends), sum(mask) - count)):
                mask[i] = False
    return mask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p1", "p2", "ratio"),
    [
        (0.02, 0.9, 0.4), (0.2, 0.8, 0.4), (0.05, 0.5, 0.2), (0.1, 0.9, 0.9), (0.3, 0.3, 0.5),
        (0.3, 0.0, 0.2), (0.3, 0.0, 0.6), (0.1, 0.05, 0.5), (0.7, 0.9, 0.3), (0.01, 0.9, 0.6),
    ],
)  # fmt: skip
def test_sticky_runs_are_as_long_as_those_of_rounds_played_one_by_one(p1, p2, ratio):
    length, count = 256, round(256 * ratio)
    rng = random.Random(1)
    slow = [runs(np.array(sticky_row(p1, p2, length, count, rng))) for _ in range(300)]
    expected = 300 * count / sum(len(row) for row in slow)
    rows = np.arange(3000)
    valid = np.ones((3000, length), bool)
    mask = draw_mask(sticky(p1, p2), valid, np.full(3000, count), 2, rows)
    assert mean_run_length(mask, valid) == pytest.approx(expected, rel=0.03)
    # No place is favoured, at the ends of the row neither, beyond what having one neighbour only does there.
    inner = mask.mean(0)[8:-8]
    assert np.abs(inner - inner.mean()).max() < 5.5 * np.sqrt(ratio * (1 - ratio) / 3000)


def test_sticky_runs_are_longer_than_independent_ones_and_grow_with_stickiness():
    lengths = [expected_run_length(m, 0.4) for m in (RANDOM, sticky(0.2, 0.8), sticky(0.02, 0.9))]
    assert lengths[0] == pytest.approx(1 / 0.6, rel=0.03)
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[2] > 4


def test_sticky_without_p1_grows_one_run_per_stretch_of_eligible_tokens():
    eligible = np.ones((200, 60), bool)
    eligible[:, 30] = False
    mask = draw_mask(sticky(0, 0.5), eligible, np.full(200, 20), 0, np.arange(200))
    assert all(runs(row) == [20] for row in mask)
    assert 60 < mask[:, :30].any(1).sum() < 140
    mask = draw_mask(sticky(0, 0.5), eligible, np.full(200, 40), 0, np.arange(200))
    assert all(sorted(runs(row))[1] >= 29 and len(runs(row)) == 2 for row in mask)


def test_sticky_that_can_mask_nothing_is_refused_in_words():
    with pytest.raises(BadConfig, match=r"diffusion\.masking: p1 and p2 are both 0 or nearly"):
        load_config(overrides=["diffusion.masking={type: sticky, p1: 0, p2: 0}"])


def test_run_lengths_count_valid_tokens_only():
    masked = np.array([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0]], bool)
    assert mean_run_length(masked, np.ones((2, 6), bool)) == 6 / 3
    valid = np.array([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]], bool)
    assert mean_run_length(masked, valid) == 4 / 3
    assert mean_run_length(masked, np.zeros((2, 6), bool)) == 0


@pytest.mark.parametrize("num_spans", [1, 2, 7, 50])
def test_spans_are_as_many_as_asked_and_apart_where_there_is_room(num_spans):
    lengths = np.tile([100, 60, 9], 20)
    counts = masked_counts(np.repeat(np.linspace(0.05, 1, 20), 3), lengths)
    mask = draw_mask(span(num_spans), np.arange(100) < lengths[:, None], counts, num_spans, np.arange(60))
    for row, count, length in zip(mask, counts, lengths, strict=True):
        assert sum(runs(row)) == count
        assert len(runs(row)) == min(num_spans, count, length - count + 1)


def test_spans_are_uniform_in_length_and_place():
    rows = 6000
    mask = draw_mask(span(2), np.ones((rows, 12), bool), np.full(rows, 5), 1, np.arange(rows))
    counts_of = np.unique(mask, axis=0, return_counts=True)[1]
    assert len(counts_of) == 4 * (
        8 * 7 // 2
    )  # cuts of 5 into two lengths, times two of the 8 places around 7 tokens
    chi_square = ((counts_of - rows / len(counts_of)) ** 2 / (rows / len(counts_of))).sum()
    assert abs(chi_square - (len(counts_of) - 1)) < 5 * np.sqrt(2 * len(counts_of))


def test_spans_run_over_tokens_that_may_not_be_masked():
    eligible = np.random.default_rng(0).random((50, 80)) < 0.7
    counts = eligible.sum(1) // 2
    mask = draw_mask(span(4), eligible, counts, 1, np.arange(50))
    assert all(len(runs(row[free])) == 4 for row, free in zip(mask, eligible, strict=True))


def random_lines(rows: int, length: int, mean: float, seed: int) -> np.ndarray:
    return line_numbers(np.random.default_rng(seed).random((rows, length)) < 1 / mean)


def test_line_numbers_keep_the_newline_with_its_line():
    ends = np.array([[0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]], bool)
    assert line_numbers(ends).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.5), (0.45, 0.55)])
def test_lines_are_masked_whole_and_as_many_as_wanted(low, high):
    rows, length = 200, 400
    lines = random_lines(rows, length, 12, 0)
    lengths = np.random.default_rng(1).integers(200, length + 1, rows)
    valid = np.arange(length) < lengths[:, None]
    wanted = masked_counts(np.linspace(0.05, 0.95, rows), lengths)
    mask = draw_mask(line(low, high), valid, wanted, 1, np.arange(rows), lines)
    for row in range(rows):
        for number in range(lines[row].max() + 1):
            whole = mask[row, (lines[row] == number) & valid[row]]
            assert whole.all() or not whole.any()
    assert not (mask & ~valid).any()
    share = mask.sum(1) / lengths
    assert ((share >= low) & (share <= high)).all()
    assert np.abs(share - np.clip(wanted / lengths, low, high)).mean() < 0.005


def test_lines_reach_the_ratios_where_some_orders_do_not_and_never_mask_nothing():
    sizes = [50, 30, 30]  # only the two short ones make 60 of 110
    lines = np.repeat(np.arange(3), sizes)[None].repeat(40, 0)
    every = np.ones(lines.shape, bool)
    masking = line(0.53, 0.56)
    mask = draw_mask(masking, every, np.full(40, 60), 0, np.arange(40), lines)
    assert (
        mask.sum(1) == 60
    ).mean() > 0.9  # eight orders; each begins with a short one in two of three cases
    one = np.zeros((2, 10), np.int64)
    assert draw_mask(line(0.1, 0.3), one == 0, np.array([3, 3]), 0, np.arange(2), one).all()
    assert not draw_mask(line(), one == 0, np.array([0, 0]), 0, np.arange(2), one).any()


@pytest.mark.parametrize(("wanted", "got"), [(13, 10), (18, 20), (3, 10), (98, 100)])
def test_lines_come_as_near_as_they_can_from_either_side(wanted, got):
    lines = np.repeat(np.arange(10), 10)[None]
    mask = draw_mask(line(), lines >= 0, np.array([wanted]), 0, np.array([0]), lines)
    assert mask.sum() == got


def test_every_line_is_masked_equally_often():
    lines = np.repeat(np.arange(20), 5)[None].repeat(2000, 0)
    mask = draw_mask(line(), np.ones(lines.shape, bool), np.full(2000, 35), 0, np.arange(2000), lines)
    assert (mask.sum(1) == 35).all()
    assert np.abs(mask.mean(0) - 0.35).max() < 5 * np.sqrt(0.35 * 0.65 / 2000)


def test_line_masking_needs_to_know_the_lines():
    every = np.ones((1, 4), bool)
    with pytest.raises(BadConfig, match="needs line numbers"):
        draw_mask(line(), every, np.array([2]), 0, np.array([0]))
    with pytest.raises(ValueError, match="number the lines"):
        draw_mask(line(), every, np.array([2]), 0, np.array([0]), np.array([[0, 1, 2, 9]]))


def test_random_masking_is_uniform_over_positions():
    mask = draw_mask(RANDOM, np.ones((4000, 20), bool), np.full(4000, 5), 9, np.arange(4000))
    share = mask.mean(0)
    assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_more_masks_than_tokens_is_refused():
    with pytest.raises(ValueError, match="exceeds its number of eligible tokens"):
        draw_mask(RANDOM, np.ones((1, 3), bool), np.array([4]), 0, np.array([0]))


def test_masked_counts_round_to_the_nearest_and_mask_at_least_one():
    counts = masked_counts(np.array([0.0, 0.5, 1.0, 0.26]), np.array([10, 5, 7, 10]))
    assert counts.tolist() == [1, 2, 7, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{type: span, num_spans: 0}", r"diffusion\.masking\.num_spans is 0"),
        ("{type: span, num_span: 2}", r"diffusion\.masking\.num_span: unknown key.*num_spans"),
        ("{type: line, min_ratio: 0.5, max_ratio: 0.2}", r"min_ratio \(0\.5\) must not exceed max_ratio"),
        ("{type: line, min_ratio: 0.1, max_ratio: 1.5}", r"diffusion\.masking\.max_ratio is 1\.5"),
        ("{type: lines}", "diffusion.masking.*'random', 'sticky', 'span', 'line'"),
    ],
)
def test_wrong_masking_settings_are_named(given, message):
    with pytest.raises(BadConfig, match=message):
        load_config(overrides=[f"diffusion.masking={given}"])


def test_80_10_10_shares_and_independent_replacements():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100, (400, 200))
    masked = rng.random(ids.shape) < 0.3
    allowed = np.arange(100, 200)  # none of the clean ids, so that the three fates can be told apart
    inputs = corrupt_80_10_10(ids, masked, 999, allowed, BatchDraw(1, "test", np.arange(400)))
    assert inputs.dtype == ids.dtype
    np.testing.assert_array_equal(inputs[~masked], ids[~masked])
    total = masked.sum()
    swapped = masked & (inputs >= 100) & (inputs < 200)
    for share, got in ((0.8, inputs == 999), (0.1, swapped), (0.1, masked & (inputs == ids))):
        assert abs(got.sum() - share * total) < 5 * np.sqrt(share * (1 - share) * total)
    # Replacements are uniform, and neighbours equal each other no more often than chance has it.
    new = inputs[swapped]
    counts = np.bincount(new - 100, minlength=100)
    assert abs(((counts - len(new) / 100) ** 2 / (len(new) / 100)).sum() - 99) < 5 * np.sqrt(2 * 99)
    same = (new[1:] == new[:-1]).sum()
    assert abs(same - len(new) / 100) < 5 * np.sqrt(len(new) / 100)


def test_80_10_10_follows_its_key_row_and_shares():
    ids = np.random.default_rng(0).integers(0, 50, (6, 80))
    masked = np.random.default_rng(1).random(ids.shape) < 0.5

    def corrupt(rows, shares=(0.8, 0.1), seed=1, purpose="test"):
        draw = BatchDraw(seed, purpose, np.asarray(rows))
        return corrupt_80_10_10(ids[rows], masked[rows], 60, np.arange(50), draw, shares)

    whole = corrupt(range(6))
    np.testing.assert_array_equal(whole[[4, 2]], corrupt([4, 2]))
    assert (whole != corrupt(range(6), seed=2)).any() and (whole != corrupt(range(6), purpose="other")).any()
    assert (corrupt(range(6), shares=(1, 0)) == np.where(masked, 60, ids)).all()
    assert (corrupt(range(6), shares=(0, 0)) == ids).all()
    with pytest.raises(ValueError, match="add up to at most 1"):
        corrupt(range(6), shares=(0.8, 0.3))
    with pytest.raises(ValueError, match="at least one allowed id"):
        corrupt_80_10_10(ids, masked, 60, np.array([]), BatchDraw(1, "test", np.arange(6)))


def test_every_stage_masks_a_large_batch_quickly():
    """Measured at 1 to 5 ms of processor time; the bound leaves room for slow and shared machines."""
    valid, rows = np.ones((64, 1024), bool), np.arange(64)
    lines = random_lines(64, 1024, 20, 0)
    for masking in (*EXACT, line(), line(0.3, 0.32)):
        for ratio in (0.2, 0.5, 0.9):
            counts = np.full(64, round(1024 * ratio))
            started = time.process_time()
            draw_mask(masking, valid, counts, 1, rows, lines)
            assert time.process_time() - started < 0.1, (masking, ratio, os.getloadavg())
